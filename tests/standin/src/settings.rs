//! What the stand-in device is like, and what goes wrong with it: words of the variable `TPSHARD_STANDIN`, separated by
//! spaces.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

pub(crate) struct Settings {
    /// `devices=N`: devices that are seen; 1.
    pub(crate) devices: u64,
    /// `driver=13000`: the version of the driver as it says it; 12080.
    pub(crate) driver: u64,
    /// `memory=BYTES`: memory of a device; 1 GiB.
    pub(crate) memory: u64,
    /// `fail=N`: launch number N, counted from 1, fails.
    fail: Option<u64>,
    /// `end=N`: the process ends at launch number N.
    end: Option<u64>,
    /// `rank=R`: launches fail or end the process on this rank only.
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
            end: number("end"),
            rank: number("rank"),
        }
    })
}

/// Counts a launch; false if it is to fail.
pub(crate) fn launch_succeeds() -> bool {
    static LAUNCHES: AtomicU64 = AtomicU64::new(0);
    let number = LAUNCHES.fetch_add(1, Ordering::Relaxed) + 1;
    let own = std::env::var("RANK").ok().and_then(|rank| rank.parse::<u64>().ok());
    let settings = settings();
    if settings.rank.is_some() && settings.rank != own {
        return true;
    }
    if settings.end == Some(number) {
        std::process::abort();
    }
    settings.fail != Some(number)
}
