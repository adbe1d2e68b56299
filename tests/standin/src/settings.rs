//! What the stand-in device is like, and what goes wrong with it: words of the variable `TPSHARD_STANDIN`, separated by
//! spaces.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

pub(crate) struct Settings {
    /// `devices=N`: devices that are seen; 1.
    pub(crate) devices: u64,
    /// `driver=13000`: the version of the driver as it says it; 12080.
    pub(crate) driver: u64,
    /// `memory=BYTES`: memory of a device; 1 GiB.
    pub(crate) memory: u64,
    /// `fail=N`: launch number N, counted from 1, fails.
    fail: Option<u64>,
    /// `break=N`: launch number N fails, and from then on everything that the device is asked for.
    break_at: Option<u64>,
    /// `end=N`: the process ends at launch number N.
    end: Option<u64>,
    /// `stop=N`: launch number N is never done.
    stop: Option<u64>,
    /// `busy=N`: what comes before event number N after the first clique takes three seconds more.
    busy: Option<u64>,
    /// `delay=N`: stream number N of a device, counted from 1, does nothing until somebody waits for it; see `streams`.
    pub(crate) delay: Option<u64>,
    /// `spoil=N`: capture number N, counted from 1, is spoiled.
    spoil: Option<u64>,
    /// `refuse-graph=N`: launch number N of a graph, counted from 1, finds no memory.
    refuse_graph: Option<u64>,
    /// `end-collective=N`: the process ends at collective number N, counted from 1.
    end_collective: Option<u64>,
    /// `nccl=22809`: the version of the library of collectives as it says it.
    pub(crate) nccl: u64,
    /// `refuse=1`: no clique comes about; `refuse=2`: and that is said at once.
    refuse: Option<u64>,
    /// `meeting=MS`: making a clique takes so many milliseconds longer.
    pub(crate) meeting: u64,
    /// `rank=R`: only on this rank does anything go wrong.
    rank: Option<u64>,
}

/// The settings of this process.
pub(crate) fn settings() -> &'static Settings {
    static SETTINGS: OnceLock<Settings> = OnceLock::new();
    SETTINGS.get_or_init(|| {
        let text = std::env::var("TPSHARD_STANDIN").unwrap_or_default();
        let number = |name: &str| {
            let word = text.split_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('='))?;
            word.parse::<u64>().ok()
        };
        Settings {
            devices: number("devices").unwrap_or(1),
            driver: number("driver").unwrap_or(12080),
            memory: number("memory").unwrap_or(1 << 30),
            fail: number("fail"),
            break_at: number("break"),
            end: number("end"),
            stop: number("stop"),
            busy: number("busy"),
            delay: number("delay"),
            spoil: number("spoil"),
            refuse_graph: number("refuse-graph"),
            end_collective: number("end-collective"),
            nccl: number("nccl").unwrap_or(22809),
            refuse: number("refuse"),
            meeting: number("meeting").unwrap_or(0),
            rank: number("rank"),
        }
    })
}

/// Whether anything goes wrong on this rank.
fn concerned() -> bool {
    let own = std::env::var("RANK").ok().and_then(|rank| rank.parse::<u64>().ok());
    settings().rank.is_none() || settings().rank == own
}

/// Counts a launch; false if it is to fail.
pub(crate) fn launch_succeeds() -> bool {
    static LAUNCHES: AtomicU64 = AtomicU64::new(0);
    let number = Some(LAUNCHES.fetch_add(1, Ordering::Relaxed) + 1);
    let settings = settings();
    if !concerned() {
        return true;
    }
    if settings.end == number {
        std::process::abort();
    }
    if settings.stop == number {
        loop {
            std::thread::park();
        }
    }
    if settings.break_at == number {
        BROKEN.store(true, Ordering::SeqCst);
    }
    settings.fail != number && works()
}

/// From now on, events are counted.
pub(crate) fn begin_clique() {
    HAS_CLIQUE.store(true, Ordering::SeqCst);
}

static HAS_CLIQUE: AtomicBool = AtomicBool::new(false);

/// Counts an event; how much longer takes what comes before it.
pub(crate) fn busy() -> Option<Duration> {
    static EVENTS: AtomicU64 = AtomicU64::new(0);
    if !HAS_CLIQUE.load(Ordering::SeqCst) {
        return None;
    }
    let number = EVENTS.fetch_add(1, Ordering::Relaxed) + 1;
    (settings().busy == Some(number)).then_some(Duration::from_secs(3))
}

static BROKEN: AtomicBool = AtomicBool::new(false);

/// Whether the device does anything any more.
pub(crate) fn works() -> bool {
    !BROKEN.load(Ordering::SeqCst)
}

/// Whether no clique comes about, and whether that is said at once.
pub(crate) fn refuses() -> Option<bool> {
    settings().refuse.filter(|_| concerned()).map(|how| how == 2)
}

/// Counts a collective.
pub(crate) fn begin_collective() {
    static COLLECTIVES: AtomicU64 = AtomicU64::new(0);
    let number = COLLECTIVES.fetch_add(1, Ordering::Relaxed) + 1;
    if concerned() && settings().end_collective == Some(number) {
        std::process::abort();
    }
}

/// Counts a capture; false if it is to be spoiled.
pub(crate) fn capture_succeeds() -> bool {
    static CAPTURES: AtomicU64 = AtomicU64::new(0);
    let number = CAPTURES.fetch_add(1, Ordering::Relaxed) + 1;
    !concerned() || settings().spoil != Some(number)
}

/// Counts a launch of a graph; false if it is to be refused.
pub(crate) fn graph_succeeds() -> bool {
    static LAUNCHES: AtomicU64 = AtomicU64::new(0);
    let number = LAUNCHES.fetch_add(1, Ordering::Relaxed) + 1;
    !concerned() || settings().refuse_graph != Some(number)
}
