//! The functions of the header, in its order. What each does is said there.
#![allow(unsafe_code)] // C calls these, with pointers of its own.
#![allow(
    unreachable_pub,
    clippy::missing_safety_doc,
    reason = "the callers are in C, and the header is their contract"
)]

use crate::border::{options, out, path, shared, slice, tensors, text};
use crate::fail::{Fail, Outcome, VERSION, guarded, last_error};
use crate::handle::Handle;
use crate::open::{Options, open};
use crate::tensors::{CPort, CTensor, PortView, Results};
use std::ffi::c_char;
use std::mem::MaybeUninit;
use std::ptr::null_mut;

#[unsafe(no_mangle)]
pub extern "C" fn tpshard_version() -> *const c_char {
    VERSION.as_ptr()
}

#[unsafe(no_mangle)]
pub extern "C" fn tpshard_last_error() -> *const c_char {
    last_error()
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn tpshard_open(
    folder: *const c_char,
    given: *const Options,
    session: *mut *mut Handle,
) -> i32 {
    guarded(|| {
        // SAFETY: the header's contract.
        let (session, folder, options) =
            unsafe { (cleared(session, "session")?, path(folder, "folder")?, options(given)?) };
        session.write(Box::into_raw(Box::new(open(folder, &options)?)));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn tpshard_close(session: *mut Handle) -> i32 {
    guarded(|| {
        if session.is_null() {
            return Ok(());
        }
        // SAFETY: the header's contract: tpshard_open gave it, and this is its last use.
        unsafe { Box::from_raw(session) }.close()
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn tpshard_rank(session: *const Handle) -> i32 {
    // SAFETY: the header's contract.
    let session = unsafe { session.as_ref() };
    session.and_then(|session| i32::try_from(session.rank).ok()).unwrap_or(-1)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn tpshard_world_size(session: *const Handle) -> i32 {
    // SAFETY: the header's contract.
    let session = unsafe { session.as_ref() };
    session.and_then(|session| i32::try_from(session.world_size).ok()).unwrap_or(-1)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn tpshard_follow(session: *mut Handle) -> i32 {
    // SAFETY: the header's contract.
    guarded(|| unsafe { shared(session, "session")? }.follow())
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn tpshard_input_count(session: *const Handle) -> u64 {
    // SAFETY: the header's contract.
    unsafe { session.as_ref() }.map_or(0, |session| session.inputs.len() as u64)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn tpshard_input(session: *const Handle, index: u64, input: *mut CPort) -> i32 {
    guarded(|| {
        // SAFETY: the header's contract.
        let (input, session) = unsafe { (out(input, "input")?, shared(session, "session")?) };
        input.write(port(&session.inputs, index, "input")?);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn tpshard_output_count(session: *const Handle) -> u64 {
    // SAFETY: the header's contract.
    unsafe { session.as_ref() }.map_or(0, |session| session.outputs.len() as u64)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn tpshard_output(session: *const Handle, index: u64, output: *mut CPort) -> i32 {
    guarded(|| {
        // SAFETY: the header's contract.
        let (output, session) = unsafe { (out(output, "output")?, shared(session, "session")?) };
        output.write(port(&session.outputs, index, "output")?);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn tpshard_run(
    session: *mut Handle,
    inputs: *const CTensor,
    input_count: u64,
    results: *mut *mut Results,
) -> i32 {
    guarded(|| {
        // SAFETY: the header's contract.
        let (results, session, inputs) = unsafe {
            (cleared(results, "results")?, shared(session, "session")?, tensors(inputs, input_count)?)
        };
        results.write(Box::into_raw(Box::new(session.run(&inputs)?)));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn tpshard_step(
    session: *mut Handle,
    slots: *const u64,
    slot_count: u64,
    inputs: *const CTensor,
    input_count: u64,
    results: *mut *mut Results,
) -> i32 {
    guarded(|| {
        // SAFETY: the header's contract.
        let (results, session, slots, inputs) = unsafe {
            (
                cleared(results, "results")?,
                shared(session, "session")?,
                slice(slots, slot_count, "slots")?,
                tensors(inputs, input_count)?,
            )
        };
        results.write(Box::into_raw(Box::new(session.step(slots, &inputs)?)));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn tpshard_slot_new(session: *mut Handle, slot: *mut u64) -> i32 {
    // SAFETY: the header's contract.
    unsafe { number(session, slot, "slot", Handle::slot_new) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn tpshard_slot_fork(session: *mut Handle, from: u64, slot: *mut u64) -> i32 {
    // SAFETY: the header's contract.
    unsafe { number(session, slot, "slot", |session| session.slot_fork(from)) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn tpshard_slot_truncate(session: *mut Handle, slot: u64, length: u64) -> i32 {
    // SAFETY: the header's contract.
    guarded(|| unsafe { shared(session, "session")? }.slot_truncate(slot, length))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn tpshard_slot_drop(session: *mut Handle, slot: u64) -> i32 {
    // SAFETY: the header's contract.
    guarded(|| unsafe { shared(session, "session")? }.slot_drop(slot))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn tpshard_slot_length(session: *mut Handle, slot: u64, length: *mut u64) -> i32 {
    // SAFETY: the header's contract.
    unsafe { number(session, length, "length", |session| session.slot_length(slot)) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn tpshard_slot_save(session: *mut Handle, slot: u64, file: *const c_char) -> i32 {
    // SAFETY: the header's contract.
    guarded(|| unsafe { shared(session, "session")?.slot_save(slot, path(file, "path")?) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn tpshard_slot_load(session: *mut Handle, file: *const c_char, slot: *mut u64) -> i32 {
    // SAFETY: the header's contract.
    unsafe { number(session, slot, "slot", |session| session.slot_load(path(file, "path")?)) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn tpshard_results_count(results: *const Results) -> u64 {
    // SAFETY: the header's contract.
    unsafe { results.as_ref() }.map_or(0, |results| results.len() as u64)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn tpshard_results_get(
    results: *const Results,
    index: u64,
    tensor: *mut CTensor,
) -> i32 {
    guarded(|| {
        // SAFETY: the header's contract.
        let (tensor, results) = unsafe { (out(tensor, "tensor")?, shared(results, "results")?) };
        let found = usize::try_from(index).ok().and_then(|index| results.c(index));
        tensor.write(
            found
                .ok_or_else(|| Fail::usage(format!("there is no result {index}, only {}", results.len())))?,
        );
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn tpshard_results_find(
    results: *const Results,
    name: *const c_char,
    tensor: *mut CTensor,
) -> i32 {
    guarded(|| {
        // SAFETY: the header's contract.
        let (tensor, results, name) =
            unsafe { (out(tensor, "tensor")?, shared(results, "results")?, text(name, "name")?) };
        let found = results.position(name).and_then(|index| results.c(index));
        tensor.write(found.ok_or_else(|| {
            Fail::usage(format!("there is no result `{name}`; the results are {}", results.names()))
        })?);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn tpshard_results_free(results: *mut Results) {
    guarded(|| {
        if !results.is_null() {
            // SAFETY: the header's contract: a run gave them, and this is their last use.
            drop(unsafe { Box::from_raw(results) });
        }
        Ok(())
    });
}

/// Where a pointer goes, null for now.
///
/// # Safety
/// As [`out`].
unsafe fn cleared<'a, T>(pointer: *mut *mut T, what: &str) -> Outcome<&'a mut MaybeUninit<*mut T>> {
    // SAFETY: the caller's promise.
    let place = unsafe { out(pointer, what)? };
    place.write(null_mut());
    Ok(place)
}

/// A call that gives a number.
///
/// # Safety
/// As [`shared`] for the session and [`out`] for the number.
unsafe fn number(
    session: *mut Handle,
    place: *mut u64,
    what: &str,
    body: impl FnOnce(&Handle) -> Outcome<u64>,
) -> i32 {
    guarded(|| {
        // SAFETY: the caller's promise.
        let place = unsafe { out(place, what)? };
        place.write(0);
        // SAFETY: the caller's promise.
        place.write(body(unsafe { shared(session, "session")? })?);
        Ok(())
    })
}

fn port(ports: &[PortView], index: u64, what: &str) -> Outcome<CPort> {
    let found = usize::try_from(index).ok().and_then(|index| ports.get(index));
    found
        .map(PortView::c)
        .ok_or_else(|| Fail::usage(format!("there is no {what} {index}, only {}", ports.len())))
}
