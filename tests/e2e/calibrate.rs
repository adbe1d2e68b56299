//! `calibrate` refuses what it cannot measure. What it measures is no matter for a test.

use crate::support::*;
use crate::words;

#[test]
fn what_cannot_be_measured_is_refused() {
    let scratch = scratch();
    for ranks in ["1", "65"] {
        end(&mut tpshard(words!["calibrate", "--ranks", ranks])).fails(2, &["--ranks", "help: "]);
    }
    end(&mut tpshard(words!["calibrate", "-o", scratch.path()])).fails(2, &["is a folder", "help: "]);
    end(&mut tpshard(words!["calibrate", "--worker", scratch.path().join("x")])).fails(2, &["--worker"]);
    end(&mut tpshard(words!["calibrate", "--against", scratch.path()])).fails(2, &["--profile"]);
    let words = words!["calibrate", "--profile", "abacus", "--against", scratch.path()];
    end(&mut tpshard(words)).fails(2, &["abacus", "help: "]);
    assert!(names(scratch.path()).is_empty());
}

#[test]
fn a_model_planned_for_another_machine_is_not_compared() {
    let folder = sharded(2);
    let words = words!["calibrate", "--profile", "l4", "--against", &folder];
    end(&mut tpshard(words)).fails(2, &["was planned for", "`l4`", "help: "]);
}
