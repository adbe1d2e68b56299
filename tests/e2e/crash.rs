//! A build that is killed leaves nothing or everything, and the next one clears up after it.

use crate::support::*;
use crate::words;
use std::path::Path;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

fn build(folder: &Path) -> Command {
    tpshard(words![model(), "--tp", "2", "-o", folder, "--overwrite"])
}

/// Starts a build and kills it after `time`.
fn killed_after(time: Duration, folder: &Path) {
    let mut child = start(&mut build(folder));
    sleep(time);
    child.kill().unwrap();
    child.wait().unwrap();
}

fn leftovers(parent: &Path) -> Vec<String> {
    names(parent).into_iter().filter(|name| name != "out").collect()
}

#[test]
fn a_killed_build_leaves_nothing_or_everything() {
    let scratch = scratch();
    let folder = scratch.path().join("out");
    let started = Instant::now();
    end(&mut build(&folder)).ok();
    let whole = started.elapsed();
    let mut left = 0;
    for point in 0..10u32 {
        std::fs::remove_dir_all(&folder).ok();
        killed_after(whole * point / 9, &folder);
        if folder.exists() {
            end(&mut tpshard(words!["check", folder])).ok();
        }
        left += usize::from(!leftovers(scratch.path()).is_empty());
    }
    assert!(left > 0, "every kill came before or after the work");

    // The next build removes what was left.
    end(&mut build(&folder)).ok();
    assert_eq!(leftovers(scratch.path()), [""; 0]);

    // Where a folder is replaced, the old or the new one is there at any time.
    for point in 0..6u32 {
        killed_after(whole * (point + 4) / 10, &folder);
        end(&mut tpshard(words!["check", folder])).ok();
    }
    end(&mut build(&folder)).ok();
    end(&mut tpshard(words!["check", folder, "--model", model()])).ok();
    assert_eq!(leftovers(scratch.path()), [""; 0]);
}

#[test]
fn builds_at_the_same_time_do_not_mix() {
    let scratch = scratch();
    let folder = scratch.path().join("out");
    let shard = |ranks: &str| start(&mut tpshard(words![model(), "--tp", ranks, "-o", folder]));
    let ended = [shard("2"), shard("3")].map(wait);
    let mut codes = ended.each_ref().map(|e| e.code);
    codes.sort();
    // Either both were at it until one was first, or one came when the other was done.
    assert_eq!(codes, [Some(0), Some(5)], "{ended:?}");
    end(&mut tpshard(words!["check", folder])).ok();
    assert_eq!(leftovers(scratch.path()), [""; 0]);
}
