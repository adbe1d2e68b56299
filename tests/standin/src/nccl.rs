//! The functions of `libnccl`, as it does them for cliques that are told not to wait.
#![allow(unsafe_code)] // What a C library exports.

use crate::combine::{Combining, combined, size_of_element};
use crate::driver::current_device;
use crate::memory;
use crate::settings::{begin_clique, begin_collective, refuses, settings, works};
use crate::streams::{Stream, drain_device};
use crate::wires::{MOST_RANKS, Wires};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::io::Read;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, Ordering::SeqCst};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

const SUCCESS: c_int = 0;
const UNHANDLED_CUDA_ERROR: c_int = 1;
const SYSTEM_ERROR: c_int = 2;
const INVALID_ARGUMENT: c_int = 4;
const INVALID_USAGE: c_int = 5;
const IN_PROGRESS: c_int = 7;

const MAGIC: c_uint = 0xcafe_beef;
/// A call that does not wait is said to be in progress this often, whatever it does.
const LATENESS: u32 = 2;
const NAP: Duration = Duration::from_micros(50);

/// `ncclUniqueId`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Id([u8; 128]);

/// The beginning of `ncclConfig_t`.
#[repr(C)]
pub struct Settings {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
}

/// A rank's end of a clique; never freed.
struct Clique {
    ranks: usize,
    rank: usize,
    device: c_int,
    /// Once all have come.
    wires: OnceLock<Wires>,
    state: AtomicI32,
    late: AtomicU32,
    /// Groups of work that are in the stream and not done.
    pending: AtomicU32,
    finalized: AtomicBool,
    aborted: AtomicBool,
    gone: AtomicBool,
}

/// What is to be done in a stream; memory by its address.
#[derive(Clone, Copy)]
enum Work {
    AllReduce { from: u64, to: u64, count: usize, element: c_int, operation: c_int },
    AllGather { from: u64, to: u64, bytes: usize },
    ReduceScatter { from: u64, to: u64, count: usize, element: c_int, operation: c_int },
    Broadcast { from: u64, to: u64, bytes: usize, root: usize },
    Send { from: u64, bytes: usize, peer: usize },
    Receive { to: u64, bytes: usize, peer: usize },
}

type Grouped = (&'static Clique, &'static Stream, Work);

thread_local! {
    static DEPTH: Cell<u32> = const { Cell::new(0) };
    static GROUP: RefCell<Vec<Grouped>> = const { RefCell::new(Vec::new()) };
}

static LAST_ERROR: Mutex<Option<CString>> = Mutex::new(None);

fn last_error(text: String) {
    *LAST_ERROR.lock().unwrap_or_else(PoisonError::into_inner) = CString::new(text).ok();
}

/// # Safety
/// As NVIDIA documents it; so are all others.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclGetVersion(version: *mut c_int) -> c_int {
    // SAFETY: by the caller, as in all functions.
    unsafe { version.write(settings().nccl as c_int) };
    SUCCESS
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclGetUniqueId(id: *mut Id) -> c_int {
    let mut bytes = [0; 128];
    let read = std::fs::File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes[..16]));
    if read.is_err() {
        return SYSTEM_ERROR;
    }
    // SAFETY: see above.
    unsafe { id.write(Id(bytes)) };
    SUCCESS
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommInitRankConfig(
    clique: *mut *mut c_void,
    ranks: c_int,
    id: Id,
    rank: c_int,
    config: *mut Settings,
) -> c_int {
    // SAFETY: see above.
    let config = unsafe { &*config };
    let (Ok(ranks), Ok(rank)) = (usize::try_from(ranks), usize::try_from(rank)) else {
        return INVALID_ARGUMENT;
    };
    let known = config.magic == MAGIC && config.size >= size_of::<Settings>() && config.version >= 21_400;
    if !known || config.blocking != 0 || rank >= ranks || ranks > MOST_RANKS {
        last_error("settings that are not known".into());
        return INVALID_ARGUMENT;
    }
    begin_clique();
    let (device, state) = (current_device(), AtomicI32::new(IN_PROGRESS));
    let made: &'static Clique = Box::leak(Box::new(Clique {
        ranks,
        rank,
        device,
        wires: OnceLock::new(),
        state,
        late: AtomicU32::new(0),
        pending: AtomicU32::new(0),
        finalized: AtomicBool::new(false),
        aborted: AtomicBool::new(false),
        gone: AtomicBool::new(false),
    }));
    let name: String = id.0[..16].iter().map(|byte| format!("{byte:02x}")).collect();
    // SAFETY: see above.
    unsafe { clique.write(std::ptr::from_ref(made).cast_mut().cast()) };
    if let Some(at_once) = refuses() {
        last_error("Network is unreachable".into());
        made.state.store(SYSTEM_ERROR, SeqCst);
        return if at_once { SYSTEM_ERROR } else { IN_PROGRESS };
    }
    std::thread::spawn(move || made.state.store(made.meet(&name, device as u32 + 1), SeqCst));
    IN_PROGRESS
}

impl Clique {
    /// The clique behind a handle that was not given back.
    fn behind(handle: *mut c_void) -> Option<&'static Clique> {
        if handle.is_null() {
            return None;
        }
        // SAFETY: handles are those of `ncclCommInitRankConfig`, which are never freed.
        let clique = unsafe { &*handle.cast::<Clique>() };
        (!clique.gone.load(SeqCst)).then_some(clique)
    }

    /// Waits for the others to come.
    fn meet(&self, name: &str, device: u32) -> c_int {
        std::thread::sleep(Duration::from_millis(settings().meeting));
        let wires = match Wires::join(name, self.ranks, self.rank, device) {
            Ok(wires) => wires,
            Err(error) => {
                last_error(error.to_string());
                return SYSTEM_ERROR;
            }
        };
        let devices = loop {
            match wires.devices() {
                Some(devices) => break devices,
                None if self.aborted.load(SeqCst) => return SYSTEM_ERROR,
                None => std::thread::sleep(NAP),
            }
        };
        let shares = |rank: &usize| devices[..*rank].contains(&devices[*rank]);
        if let Some(rank) = (0..self.ranks).find(shares)
            && std::env::var_os("NCCL_MULTI_RANK_GPU_ENABLE").is_none()
        {
            last_error(format!("Duplicate GPU detected : rank {rank} on device {}", devices[rank] - 1));
            return INVALID_USAGE;
        }
        let _ = self.wires.set(wires);
        SUCCESS
    }

    /// Whether the clique can be called now.
    fn ready(&self) -> Result<(), c_int> {
        match self.state.load(SeqCst) {
            SUCCESS if self.finalized.load(SeqCst) => Err(misused("a clique that was finalized is used")),
            SUCCESS if self.late.load(SeqCst) == 0 => Ok(()),
            SUCCESS | IN_PROGRESS => Err(misused("the clique is still in progress")),
            error => Err(error),
        }
    }
}

/// What the library says to a caller who does not keep to its rules; said aloud too, because callers may be silent.
fn misused(what: &str) -> c_int {
    eprintln!("stand-in: {what}");
    last_error(what.into());
    INVALID_ARGUMENT
}

/// Takes work of one call: now, or with the group.
fn take(clique: *mut c_void, stream: *mut c_void, work: Work, memory: &[(u64, usize)]) -> c_int {
    let (Some(clique), Some(stream)) = (Clique::behind(clique), Stream::at(stream.addr())) else {
        return INVALID_ARGUMENT;
    };
    if let Err(code) = clique.ready() {
        return code;
    }
    if memory.iter().any(|&(address, bytes)| bytes > 0 && !memory::holds(address, bytes)) {
        last_error("memory that is not there".into());
        return INVALID_ARGUMENT;
    }
    GROUP.with_borrow_mut(|group| group.push((clique, stream, work)));
    if DEPTH.get() > 0 { SUCCESS } else { put_group() }
}

/// Puts what was collected into its stream.
fn put_group() -> c_int {
    let group = GROUP.take();
    let Some(&(clique, stream, _)) = group.first() else { return SUCCESS };
    if group.iter().any(|(other, on, _)| !std::ptr::eq(*other, clique) || !std::ptr::eq(*on, stream)) {
        return INVALID_USAGE;
    }
    begin_collective();
    if !works() {
        last_error("Cuda failure 'unspecified launch failure'".into());
        return UNHANDLED_CUDA_ERROR;
    }
    clique.late.store(LATENESS, SeqCst);
    clique.pending.fetch_add(1, SeqCst);
    let work: Vec<Work> = group.into_iter().map(|(_, _, work)| work).collect();
    stream.put(Box::new(move || {
        clique.perform(&work);
        clique.pending.fetch_sub(1, SeqCst);
    }));
    IN_PROGRESS
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclGroupStart() -> c_int {
    DEPTH.set(DEPTH.get() + 1);
    SUCCESS
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclGroupEnd() -> c_int {
    let Some(depth) = DEPTH.get().checked_sub(1) else { return INVALID_USAGE };
    DEPTH.set(depth);
    if depth == 0 { put_group() } else { SUCCESS }
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommGetAsyncError(clique: *mut c_void, state: *mut c_int) -> c_int {
    let Some(clique) = Clique::behind(clique) else { return INVALID_ARGUMENT };
    let mut found = clique.state.load(SeqCst);
    let earlier = clique.late.fetch_update(SeqCst, SeqCst, |late| late.checked_sub(1));
    // The end waits for what is in the stream.
    let ending = clique.finalized.load(SeqCst) && clique.pending.load(SeqCst) > 0;
    if found == SUCCESS && (earlier.is_ok() || ending) {
        found = IN_PROGRESS;
    }
    // SAFETY: see above.
    unsafe { state.write(found) };
    SUCCESS
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommFinalize(clique: *mut c_void) -> c_int {
    let Some(clique) = Clique::behind(clique) else { return INVALID_ARGUMENT };
    if let Err(code) = clique.ready() {
        return code;
    }
    clique.finalized.store(true, SeqCst);
    clique.late.store(LATENESS, SeqCst);
    IN_PROGRESS
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommDestroy(clique: *mut c_void) -> c_int {
    let Some(clique) = Clique::behind(clique) else { return INVALID_ARGUMENT };
    if clique.late.load(SeqCst) > 0 || clique.pending.load(SeqCst) > 0 {
        return misused("a clique that is in progress is destroyed");
    }
    clique.gone.store(true, SeqCst);
    SUCCESS
}

/// Waits for the whole device, as freeing its memory does: also for what other cliques have there.
///
/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommAbort(clique: *mut c_void) -> c_int {
    let Some(clique) = Clique::behind(clique) else { return INVALID_ARGUMENT };
    clique.aborted.store(true, SeqCst);
    clique.gone.store(true, SeqCst);
    drain_device(clique.device);
    SUCCESS
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclGetErrorString(code: c_int) -> *const c_char {
    let text: &CStr = match code {
        SUCCESS => c"no error",
        UNHANDLED_CUDA_ERROR => c"unhandled cuda error",
        SYSTEM_ERROR => c"unhandled system error",
        INVALID_ARGUMENT => c"invalid argument",
        INVALID_USAGE => c"invalid usage",
        IN_PROGRESS => c"NCCL operation in progress",
        _ => c"unknown result code",
    };
    text.as_ptr()
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclGetLastError(_clique: *mut c_void) -> *const c_char {
    let last = LAST_ERROR.lock().unwrap_or_else(PoisonError::into_inner);
    // Texts are few and stay for ever, as the library's do until the next.
    last.clone().map_or(std::ptr::null(), |text| Box::leak(text.into_boxed_c_str()).as_ptr())
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclAllReduce(
    from: u64,
    to: u64,
    count: usize,
    element: c_int,
    operation: c_int,
    clique: *mut c_void,
    stream: *mut c_void,
) -> c_int {
    let Some(size) = size_of_element(element) else { return INVALID_ARGUMENT };
    let memory = [(from, count * size), (to, count * size)];
    take(clique, stream, Work::AllReduce { from, to, count, element, operation }, &memory)
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclAllGather(
    from: u64,
    to: u64,
    count: usize,
    element: c_int,
    clique: *mut c_void,
    stream: *mut c_void,
) -> c_int {
    let Some(size) = size_of_element(element) else { return INVALID_ARGUMENT };
    let (bytes, ranks) = (count * size, Clique::behind(clique).map_or(0, |clique| clique.ranks));
    take(clique, stream, Work::AllGather { from, to, bytes }, &[(from, bytes), (to, bytes * ranks)])
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclReduceScatter(
    from: u64,
    to: u64,
    count: usize,
    element: c_int,
    operation: c_int,
    clique: *mut c_void,
    stream: *mut c_void,
) -> c_int {
    let Some(size) = size_of_element(element) else { return INVALID_ARGUMENT };
    let ranks = Clique::behind(clique).map_or(0, |clique| clique.ranks);
    let memory = [(from, count * size * ranks), (to, count * size)];
    take(clique, stream, Work::ReduceScatter { from, to, count, element, operation }, &memory)
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclBroadcast(
    from: u64,
    to: u64,
    count: usize,
    element: c_int,
    root: c_int,
    clique: *mut c_void,
    stream: *mut c_void,
) -> c_int {
    let (Some(size), Ok(root)) = (size_of_element(element), usize::try_from(root)) else {
        return INVALID_ARGUMENT;
    };
    let bytes = count * size;
    take(clique, stream, Work::Broadcast { from, to, bytes, root }, &[(from, bytes), (to, bytes)])
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclSend(
    from: u64,
    count: usize,
    element: c_int,
    peer: c_int,
    clique: *mut c_void,
    stream: *mut c_void,
) -> c_int {
    let (Some(size), Ok(peer)) = (size_of_element(element), usize::try_from(peer)) else {
        return INVALID_ARGUMENT;
    };
    take(clique, stream, Work::Send { from, bytes: count * size, peer }, &[(from, count * size)])
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclRecv(
    to: u64,
    count: usize,
    element: c_int,
    peer: c_int,
    clique: *mut c_void,
    stream: *mut c_void,
) -> c_int {
    let (Some(size), Ok(peer)) = (size_of_element(element), usize::try_from(peer)) else {
        return INVALID_ARGUMENT;
    };
    take(clique, stream, Work::Receive { to, bytes: count * size, peer }, &[(to, count * size)])
}

/// Bytes to or from a rank, and how many of them are on the other side.
struct Transfer {
    peer: usize,
    address: u64,
    bytes: usize,
    done: usize,
}

#[derive(Default)]
struct Plan {
    sends: VecDeque<Transfer>,
    receives: VecDeque<Transfer>,
    combinings: Vec<Combining>,
}

impl Plan {
    fn send(&mut self, peer: usize, address: u64, bytes: usize) {
        self.sends.push_back(Transfer { peer, address, bytes, done: 0 });
    }

    fn receive(&mut self, peer: usize, address: u64, bytes: usize) {
        self.receives.push_back(Transfer { peer, address, bytes, done: 0 });
    }
}

/// A copy of device memory.
fn copied(address: u64, bytes: usize) -> Vec<u8> {
    let mut copy = vec![0; bytes];
    // SAFETY: the memory was there when the work was taken, and memory is freed after the streams are done.
    unsafe { memory::copy(copy.as_mut_ptr().addr() as u64, address, bytes) };
    copy
}

/// Overwrites device memory.
fn written(address: u64, from: &[u8]) {
    // SAFETY: as above.
    unsafe { memory::copy(address, from.as_ptr().addr() as u64, from.len()) };
}

impl Clique {
    /// Does the work of a group, unless it is aborted before the others have done theirs.
    fn perform(&self, group: &[Work]) {
        let Some(wires) = self.wires.get() else { return };
        let mut plan = Plan::default();
        for work in group {
            self.plan(*work, &mut plan);
        }
        while !plan.sends.is_empty() || !plan.receives.is_empty() {
            if self.aborted.load(SeqCst) {
                return;
            }
            // SAFETY: as in `copied`; what is combined lives in the plan.
            let sent = moved(&mut plan.sends, |t| unsafe {
                wires.send(t.peer, t.address + t.done as u64, t.bytes - t.done)
            });
            // SAFETY: as above.
            let received = moved(&mut plan.receives, |t| unsafe {
                wires.receive(t.peer, t.address + t.done as u64, t.bytes - t.done)
            });
            if sent + received == 0 {
                std::thread::sleep(NAP);
            }
        }
        for combining in plan.combinings {
            written(combining.to, &combined(&combining));
        }
    }

    fn others(&self) -> impl Iterator<Item = usize> + use<> {
        let own = self.rank;
        (0..self.ranks).filter(move |&rank| rank != own)
    }

    fn plan(&self, work: Work, plan: &mut Plan) {
        match work {
            Work::AllReduce { from, to, count, element, operation } => {
                let bytes = count * size_of_element(element).unwrap_or(0);
                self.others().for_each(|peer| plan.send(peer, from, bytes));
                self.combine(plan, (from, bytes), to, [element, operation]);
            }
            Work::ReduceScatter { from, to, count, element, operation } => {
                let bytes = count * size_of_element(element).unwrap_or(0);
                self.others().for_each(|peer| plan.send(peer, from + (peer * bytes) as u64, bytes));
                self.combine(plan, (from + (self.rank * bytes) as u64, bytes), to, [element, operation]);
            }
            Work::AllGather { from, to, bytes } => {
                written(to + (self.rank * bytes) as u64, &copied(from, bytes));
                for peer in self.others() {
                    plan.send(peer, from, bytes);
                    plan.receive(peer, to + (peer * bytes) as u64, bytes);
                }
            }
            Work::Broadcast { from, to, bytes, root } if root == self.rank => {
                written(to, &copied(from, bytes));
                self.others().for_each(|peer| plan.send(peer, from, bytes));
            }
            Work::Broadcast { to, bytes, root, .. } => plan.receive(root, to, bytes),
            Work::Send { from, bytes, peer } => plan.send(peer, from, bytes),
            Work::Receive { to, bytes, peer } => plan.receive(peer, to, bytes),
        }
    }

    /// Receives from all, to combine it.
    fn combine(
        &self,
        plan: &mut Plan,
        (own, bytes): (u64, usize),
        to: u64,
        [element, operation]: [c_int; 2],
    ) {
        let mut parts = vec![vec![0; bytes]; self.ranks];
        parts[self.rank] = copied(own, bytes);
        for peer in self.others() {
            plan.receive(peer, parts[peer].as_mut_ptr().addr() as u64, bytes);
        }
        plan.combinings.push(Combining { parts, to, element, operation });
    }
}

/// Moves bytes of the first transfer with every rank; those behind it wait. The number of bytes moved.
fn moved(transfers: &mut VecDeque<Transfer>, mut step: impl FnMut(&Transfer) -> usize) -> usize {
    let mut seen = Vec::new();
    let mut total = 0;
    for transfer in transfers.iter_mut() {
        if !seen.contains(&transfer.peer) {
            seen.push(transfer.peer);
            let count = step(transfer);
            transfer.done += count;
            total += count;
        }
    }
    let before = transfers.len();
    transfers.retain(|transfer| transfer.done < transfer.bytes);
    total + before - transfers.len()
}
