//! The library of collectives `libnccl`: what ranks do together with values that lie in the memories of their GPUs.
//!
//! A [`Clique`] is one rank's end of the collectives of some ranks (NCCL's word is communicator). Its calls put work into
//! a queue of the device and do not wait: neither for the other ranks, nor for the library itself, which is told to return
//! at once and to go on in a thread of its own. [`Clique::settled`] says whether it has. Work that will never be done,
//! because a rank is gone, is ended by [`Clique::abort`], which any thread may call.
#![allow(unsafe_code)] // Calls into a C library.

use crate::cuda::{Device, DevicePointer, Lane, Memory};
use crate::error::DriverError;
use crate::library::{Library, functions};
use crate::search::SearchPath;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];

/// The oldest version whose calls, told not to wait, can be made from several threads. Earlier ones keep the work under way
/// in a variable of the calling thread: two cliques share it, and threads that look after a clique wait or crash.
const OLDEST: (u32, u32) = (2, 27);

/// Bytes of what the members of a clique recognise each other by.
pub const ID_BYTES: usize = 128;

// NCCL's numbers and the layout of its structures: from nccl.h of 2.28.9, held against it by a C program.
const IN_PROGRESS: c_int = 7;
const MAGIC: c_uint = 0xcafe_beef;
/// The version that the settings below are of: the first that had them. Newer libraries take everything that came later
/// as not set.
const SETTINGS_VERSION: c_uint = 21_400;

/// How long a clique may take to end in peace, and how long its lock is waited for before it is aborted.
const PARTING: Duration = Duration::from_secs(1);
const PAUSE: Duration = Duration::from_micros(200);

/// What the members of a clique recognise each other by.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Id([u8; ID_BYTES]);

/// `ncclConfig_t` of version 2.14.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct Settings {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
    unused: c_int,
}

functions! {
    /// The functions of `libnccl` that are used and return a status.
    Functions {
        version "ncclGetVersion" (version: *mut c_int);
        unique_id "ncclGetUniqueId" (id: *mut Id);
        begin "ncclCommInitRankConfig" (clique: *mut *mut c_void, ranks: c_int, id: Id, rank: c_int,
            settings: *mut Settings);
        finalize "ncclCommFinalize" (clique: *mut c_void);
        destroy "ncclCommDestroy" (clique: *mut c_void);
        abort "ncclCommAbort" (clique: *mut c_void);
        state "ncclCommGetAsyncError" (clique: *mut c_void, state: *mut c_int);
        all_reduce "ncclAllReduce" (from: DevicePointer, to: DevicePointer, count: usize, element: c_int,
            operation: c_int, clique: *mut c_void, stream: *mut c_void);
        all_gather "ncclAllGather" (from: DevicePointer, to: DevicePointer, count: usize, element: c_int,
            clique: *mut c_void, stream: *mut c_void);
        reduce_scatter "ncclReduceScatter" (from: DevicePointer, to: DevicePointer, count: usize, element: c_int,
            operation: c_int, clique: *mut c_void, stream: *mut c_void);
        broadcast "ncclBroadcast" (from: DevicePointer, to: DevicePointer, count: usize, element: c_int, root: c_int,
            clique: *mut c_void, stream: *mut c_void);
        send "ncclSend" (from: DevicePointer, count: usize, element: c_int, peer: c_int, clique: *mut c_void,
            stream: *mut c_void);
        receive "ncclRecv" (to: DevicePointer, count: usize, element: c_int, peer: c_int, clique: *mut c_void,
            stream: *mut c_void);
        group_start "ncclGroupStart" ();
        group_end "ncclGroupEnd" ();
    }
}

type TextOfCode = unsafe extern "C" fn(c_int) -> *const c_char;
type TextOfClique = unsafe extern "C" fn(*mut c_void) -> *const c_char;

/// An open library.
#[derive(Debug)]
pub struct Nccl {
    functions: Functions,
    error_text: Option<TextOfCode>,
    last_error: Option<TextOfClique>,
    version: (u32, u32, u32),
}

/// Types of elements that can be combined; others travel as bytes, which are `U8`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Element {
    I8,
    U8,
    I32,
    U32,
    I64,
    U64,
    F16,
    F32,
    F64,
    BF16,
}

impl Element {
    fn code(self) -> c_int {
        match self {
            Element::I8 => 0,
            Element::U8 => 1,
            Element::I32 => 2,
            Element::U32 => 3,
            Element::I64 => 4,
            Element::U64 => 5,
            Element::F16 => 6,
            Element::F32 => 7,
            Element::F64 => 8,
            Element::BF16 => 9,
        }
    }

    /// Bytes of one element.
    pub fn bytes(self) -> u64 {
        match self {
            Element::I8 | Element::U8 => 1,
            Element::F16 | Element::BF16 => 2,
            Element::I32 | Element::U32 | Element::F32 => 4,
            Element::I64 | Element::U64 | Element::F64 => 8,
        }
    }
}

/// How elements are combined. `Max` and `Min` of floats ignore what is not a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Operation {
    Sum,
    Prod,
    Max,
    Min,
}

impl Operation {
    fn code(self) -> c_int {
        match self {
            Operation::Sum => 0,
            Operation::Prod => 1,
            Operation::Max => 2,
            Operation::Min => 3,
        }
    }
}

/// Bytes of device memory.
#[derive(Clone, Copy, Debug)]
pub struct Span<'a> {
    pub memory: &'a Memory,
    pub offset: u64,
    pub bytes: u64,
}

impl Span<'_> {
    fn address(&self) -> Result<DevicePointer, DriverError> {
        self.memory.at(self.offset, self.bytes)
    }

    fn count(&self, element: Element) -> Result<usize, DriverError> {
        let whole = self.bytes.is_multiple_of(element.bytes());
        let count = usize::try_from(self.bytes / element.bytes()).ok().filter(|_| whole);
        count.ok_or(DriverError::Bounds { offset: self.offset, bytes: self.bytes, size: self.memory.len() })
    }
}

/// What NCCL keeps as text.
fn words(text: *const c_char) -> Option<String> {
    if text.is_null() {
        return None;
    }
    // SAFETY: the library's texts are constants, or one buffer that stays and whose last byte is always zero. Another thread
    // may write a text there meanwhile; then this is made of both.
    let text = unsafe { CStr::from_ptr(text) }.to_string_lossy().trim().to_owned();
    (!text.is_empty()).then_some(text)
}

impl Nccl {
    /// Opens the library.
    ///
    /// # Errors
    /// It is not there, or too old.
    pub fn load(search: &SearchPath) -> Result<Nccl, DriverError> {
        let help = "install the Python package nvidia-nccl-cu13 or nvidia-nccl-cu12, as the driver is for CUDA 13 or 12";
        let library = Library::find("the library of collectives libnccl", &NAMES, search, help)?;
        // SAFETY: the types are those of NCCL's header.
        let (error_text, last_error) =
            unsafe { (library.function("ncclGetErrorString"), library.function("ncclGetLastError")) };
        let functions = Functions::of(&library);
        let mut nccl = Nccl { functions, error_text, last_error, version: (0, 0, 0) };
        let mut version = 0;
        // SAFETY: the integer lives through the call.
        nccl.checked(unsafe { nccl.functions.version(&mut version) }, None)?;
        nccl.version = decoded(version);
        new_enough(nccl.version, nccl.functions.path())?;
        Ok(nccl)
    }

    pub fn version(&self) -> (u32, u32, u32) {
        self.version
    }

    /// The file that was opened.
    pub fn path(&self) -> &Path {
        self.functions.path()
    }

    /// What the members of a new clique recognise each other by; one of them asks for it and tells the others.
    ///
    /// # Errors
    /// No network interface can be listened on.
    pub fn unique_id(&self) -> Result<[u8; ID_BYTES], DriverError> {
        let mut id = Id([0; ID_BYTES]);
        // SAFETY: there is room for an id.
        self.checked(unsafe { self.functions.unique_id(&mut id) }, None)?;
        Ok(id.0)
    }

    /// Begins to make this rank's end of a clique, of which it is member number `rank`. It can be used once it has
    /// [`settled`](Clique::settled), for which all members have to come.
    ///
    /// # Errors
    /// What the library says at once.
    pub fn begin(
        self: &Arc<Nccl>,
        device: &Device,
        id: &[u8; ID_BYTES],
        rank: usize,
        ranks: usize,
    ) -> Result<Clique, DriverError> {
        device.enter()?;
        let number = |n: usize| c_int::try_from(n).unwrap_or(c_int::MAX);
        let size = size_of::<Settings>();
        let mut settings = Settings { size, magic: MAGIC, version: SETTINGS_VERSION, blocking: 0, unused: 0 };
        let mut handle = std::ptr::null_mut();
        // SAFETY: handle and settings live through the call; the device is that of this thread.
        let begun =
            unsafe { self.functions.begin(&mut handle, number(ranks), Id(*id), number(rank), &mut settings) };
        let made = (!handle.is_null()).then(|| {
            let handle = Mutex::new(Some(handle as usize));
            Clique { library: self.clone(), device: device.clone(), handle }
        });
        // What was made in spite of an error is ended by being dropped, after its text was asked for.
        self.checked(begun, (!handle.is_null()).then_some(handle))?;
        made.ok_or_else(|| ended("ncclCommInitRankConfig"))
    }

    /// The status of a call; that it goes on elsewhere is no error.
    fn checked(
        &self,
        called: Result<(&'static str, i32), DriverError>,
        clique: Option<*mut c_void>,
    ) -> Result<(), DriverError> {
        let (function, code) = called?;
        if code == 0 || code == IN_PROGRESS {
            return Ok(());
        }
        // SAFETY: unknown codes have a text too.
        let name = self.error_text.and_then(|text| words(unsafe { text(code) }));
        // SAFETY: the clique is alive, or none.
        let last = self.last_error.and_then(|text| words(unsafe { text(clique.unwrap_or_default()) }));
        let detail = last.map(|last| format!(": {last}")).unwrap_or_default();
        let name = name.unwrap_or_else(|| "an unknown error".into());
        Err(DriverError::Call { function, code, name, detail })
    }
}

fn new_enough((major, minor, patch): (u32, u32, u32), library: &Path) -> Result<(), DriverError> {
    if (major, minor) >= OLDEST {
        return Ok(());
    }
    let found = format!("{major}.{minor}.{patch}");
    let needed = format!("{}.{}", OLDEST.0, OLDEST.1);
    Err(DriverError::Version { library: library.to_path_buf(), found, needed })
}

/// The parts of a version; the number has had two forms.
fn decoded(version: c_int) -> (u32, u32, u32) {
    let version = u32::try_from(version).unwrap_or(0);
    let major = if version < 10_000 { 1000 } else { 10_000 };
    (version / major, version % major / 100, version % 100)
}

/// One rank's end of the collectives of some ranks on one device.
#[derive(Debug)]
pub struct Clique {
    library: Arc<Nccl>,
    device: Device,
    /// Nothing once it has ended.
    handle: Mutex<Option<usize>>,
}

fn ended(function: &'static str) -> DriverError {
    DriverError::Call { function, code: -1, name: "the collectives were ended".into(), detail: String::new() }
}

impl Clique {
    /// Calls with the handle, which stays alive until the call returns. No call waits for other ranks.
    fn with(
        &self,
        function: &'static str,
        call: impl FnOnce(&Functions, *mut c_void) -> Result<(&'static str, i32), DriverError>,
    ) -> Result<(), DriverError> {
        self.device.enter()?;
        let handle = self.handle.lock().unwrap_or_else(PoisonError::into_inner);
        let handle = handle.ok_or_else(|| ended(function))? as *mut c_void;
        self.library.checked(call(&self.library.functions, handle), Some(handle))
    }

    /// Whether the library has done what it was asked for, as far as it is the library's: collectives are in the queue
    /// then, not necessarily done. Nothing else may be asked for before.
    ///
    /// # Errors
    /// What went wrong meanwhile, also on other ranks as far as the library notices.
    pub fn settled(&self) -> Result<bool, DriverError> {
        let mut state = 0;
        self.with("ncclCommGetAsyncError", |f, clique| {
            // SAFETY: the clique is alive, the integer lives through the call.
            unsafe { f.state(clique, &mut state) }
        })?;
        if state == IN_PROGRESS {
            return Ok(false);
        }
        self.with("ncclCommGetAsyncError", |_, _| Ok(("a collective", state)))?;
        Ok(true)
    }

    /// Combines the elements of all members; `from` and `to` may be the same.
    ///
    /// # Errors
    /// Memory of other sizes, or the library fails.
    pub fn all_reduce(
        &self,
        lane: Lane,
        element: Element,
        operation: Operation,
        from: Span<'_>,
        to: Span<'_>,
    ) -> Result<(), DriverError> {
        let (source, target, count) = (from.address()?, to.address()?, from.count(element)?);
        same(from.bytes, &to)?;
        let stream = self.device.stream_of(lane);
        self.with("ncclAllReduce", |f, clique| {
            // SAFETY: both hold as many elements as said, and are only freed when the queue is done with them.
            unsafe { f.all_reduce(source, target, count, element.code(), operation.code(), clique, stream) }
        })
    }

    /// The bytes of all members, one after another; all bring as many.
    ///
    /// # Errors
    /// As [`Clique::all_reduce`].
    pub fn all_gather(
        &self,
        lane: Lane,
        ranks: usize,
        from: Span<'_>,
        to: Span<'_>,
    ) -> Result<(), DriverError> {
        let (source, target, count) = (from.address()?, to.address()?, from.count(Element::U8)?);
        same(from.bytes.saturating_mul(ranks as u64), &to)?;
        let stream = self.device.stream_of(lane);
        self.with("ncclAllGather", |f, clique| {
            // SAFETY: as above; the target has room for the bytes of all.
            unsafe { f.all_gather(source, target, count, Element::U8.code(), clique, stream) }
        })
    }

    /// Combines the elements of all members, of which each keeps as many as the others.
    ///
    /// # Errors
    /// As [`Clique::all_reduce`].
    pub fn reduce_scatter(
        &self,
        lane: Lane,
        ranks: usize,
        element: Element,
        operation: Operation,
        from: Span<'_>,
        to: Span<'_>,
    ) -> Result<(), DriverError> {
        let (source, target, count) = (from.address()?, to.address()?, to.count(element)?);
        same(to.bytes.saturating_mul(ranks as u64), &from)?;
        let stream = self.device.stream_of(lane);
        self.with("ncclReduceScatter", |f, clique| {
            // SAFETY: as above; the source holds as many elements for every member.
            unsafe {
                f.reduce_scatter(source, target, count, element.code(), operation.code(), clique, stream)
            }
        })
    }

    /// The bytes of member `root` on all members.
    ///
    /// # Errors
    /// As [`Clique::all_reduce`].
    pub fn broadcast(&self, root: usize, from: Span<'_>, to: Span<'_>) -> Result<(), DriverError> {
        let (source, target, count) = (from.address()?, to.address()?, from.count(Element::U8)?);
        same(from.bytes, &to)?;
        let (root, stream) = (c_int::try_from(root).unwrap_or(c_int::MAX), self.device.stream());
        self.with("ncclBroadcast", |f, clique| {
            // SAFETY: as above.
            unsafe { f.broadcast(source, target, count, Element::U8.code(), root, clique, stream) }
        })
    }

    /// Sends bytes to members, and receives bytes from members, all at once. What is sent to whom is what is received
    /// there; nothing is sent where there are no bytes.
    ///
    /// # Errors
    /// As [`Clique::all_reduce`].
    pub fn exchange(
        &self,
        sends: &[(usize, Span<'_>)],
        receives: &[(usize, Span<'_>)],
    ) -> Result<(), DriverError> {
        let described =
            |list: &[(usize, Span<'_>)]| -> Result<Vec<(c_int, DevicePointer, usize)>, DriverError> {
                let some = list.iter().filter(|(_, span)| span.bytes > 0);
                some.map(|(peer, span)| {
                    let peer = c_int::try_from(*peer).unwrap_or(c_int::MAX);
                    Ok((peer, span.address()?, span.count(Element::U8)?))
                })
                .collect()
            };
        let (sends, receives) = (described(sends)?, described(receives)?);
        if sends.is_empty() && receives.is_empty() {
            return Ok(());
        }
        let (element, stream) = (Element::U8.code(), self.device.stream());
        self.with("ncclGroupEnd", |f, clique| {
            // SAFETY: a group is opened and, whatever happens in between, closed again.
            unsafe { f.group_start() }?;
            let mut called = Ok(("ncclGroupStart", 0));
            let fine = |called: &Result<(&'static str, i32), DriverError>| {
                matches!(called, Ok((_, 0 | IN_PROGRESS)))
            };
            for &(peer, source, count) in &sends {
                if fine(&called) {
                    // SAFETY: as above.
                    called = unsafe { f.send(source, count, element, peer, clique, stream) };
                }
            }
            for &(peer, target, count) in &receives {
                if fine(&called) {
                    // SAFETY: as above.
                    called = unsafe { f.receive(target, count, element, peer, clique, stream) };
                }
            }
            // SAFETY: see above.
            let closed = unsafe { f.group_end() };
            if fine(&called) { closed } else { called }
        })
    }

    /// Ends the collectives that are under way, on the device too, and this. Any thread may call it, any number of times.
    pub fn abort(&self) {
        if let Some(handle) = self.taken() {
            // The library finds its device by itself; an abandoned queue must not keep it from ending its work.
            let _ = self.device.enter();
            // SAFETY: the handle was alive, and nobody else has it any more.
            let _ = unsafe { self.library.functions.abort(handle as *mut c_void) };
        }
    }

    /// The handle, which nobody uses then. Calls return at once; one that does not keeps this from being freed, for which
    /// it is not worth waiting for ever.
    fn taken(&self) -> Option<usize> {
        let deadline = Instant::now() + PARTING;
        loop {
            match self.handle.try_lock() {
                Ok(mut handle) => return handle.take(),
                Err(std::sync::TryLockError::Poisoned(poison)) => return poison.into_inner().take(),
                Err(std::sync::TryLockError::WouldBlock) if Instant::now() >= deadline => return None,
                Err(std::sync::TryLockError::WouldBlock) => std::thread::sleep(PAUSE),
            }
        }
    }

    /// Ends this in peace: all members have done all their collectives. If that takes too long, as [`Clique::abort`].
    pub fn finish(&self) {
        let begun = self.with("ncclCommFinalize", |f, clique| {
            // SAFETY: the clique is alive.
            unsafe { f.finalize(clique) }
        });
        let deadline = Instant::now() + PARTING;
        let mut quiet = begun.is_ok();
        while quiet {
            match self.settled() {
                Ok(true) => break,
                Ok(false) if Instant::now() < deadline => std::thread::sleep(PAUSE),
                _ => quiet = false,
            }
        }
        if !quiet {
            return self.abort();
        }
        if let Some(handle) = self.taken() {
            let entered = self.device.enter();
            // SAFETY: nothing is under way, and nobody else has the handle any more.
            let _ = entered.and_then(|()| unsafe { self.library.functions.destroy(handle as *mut c_void) });
        }
    }
}

impl Drop for Clique {
    fn drop(&mut self) {
        self.abort();
    }
}

fn same(bytes: u64, span: &Span<'_>) -> Result<(), DriverError> {
    if span.bytes == bytes {
        return Ok(());
    }
    Err(DriverError::Bounds { offset: span.offset, bytes, size: span.bytes })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_both_forms_are_understood() {
        assert_eq!(decoded(2708), (2, 7, 8));
        assert_eq!(decoded(21_400), (2, 14, 0));
        assert_eq!(decoded(22_809), (2, 28, 9));
        assert_eq!(decoded(-1), (0, 0, 0));
    }

    #[test]
    fn versions_that_do_not_bear_several_threads_are_refused() {
        let library = Path::new("libnccl.so.2");
        for old in [2708, 21_400, 22_602, 22_699] {
            let error = new_enough(decoded(old), library).unwrap_err().to_string();
            assert!(error.contains("libnccl.so.2") && error.contains("needed is 2.27 or newer"), "{error}");
        }
        for new in [22_703, 22_809, 23_007, 30_000] {
            assert_eq!(new_enough(decoded(new), library), Ok(()));
        }
    }

    #[test]
    fn settings_are_laid_out_as_in_the_header() {
        use std::mem::offset_of;
        let offsets =
            [offset_of!(Settings, magic), offset_of!(Settings, version), offset_of!(Settings, blocking)];
        assert_eq!((offsets, size_of::<Settings>(), size_of::<Id>()), ([8, 12, 16], 24, 128));
    }

    #[test]
    fn a_library_that_is_not_there_is_an_error_that_says_where_was_looked() {
        let empty = tempfile::tempdir().unwrap();
        let search = SearchPath::of(vec![empty.path().to_path_buf()]);
        match Nccl::load(&search) {
            Ok(nccl) => eprintln!("SKIPPED: this machine has {}", nccl.path().display()),
            Err(error) => {
                let text = error.to_string();
                for word in ["libnccl.so.2", "TPSHARD_CUDA_PATH", "nvidia-nccl-cu12", "nvidia-nccl-cu13"] {
                    assert!(text.contains(word), "{text}");
                }
            }
        }
    }

    #[test]
    fn the_library_of_this_machine_says_its_version_and_makes_ids() {
        match Nccl::load(&SearchPath::from_environment()) {
            Ok(nccl) => {
                assert!(nccl.version() >= (OLDEST.0, OLDEST.1, 0), "{:?}", nccl.version());
                let ids = [nccl.unique_id().unwrap(), nccl.unique_id().unwrap()];
                assert_ne!(ids[0], ids[1]);
            }
            Err(error) => {
                eprintln!("SKIPPED: {error}");
                let required = std::env::var("TPSHARD_REQUIRE").unwrap_or_default();
                assert!(required.split(',').all(|tool| tool != "nccl"));
            }
        }
    }
}
