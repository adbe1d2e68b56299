//! `--split-all`: plans in which everything is split that a rule can split, whatever it costs.

use crate::draft::Draft;
use crate::support::*;
use crate::words;
use std::path::Path;
use tpshard_ir::{Op, StepKind};

/// Of the matrices that ranks hold: how many are split, and how many there are. And the number of collectives.
fn counts(folder: &Path) -> (usize, usize, usize) {
    let certificate = Draft::open(folder).certificate;
    let (mut split, mut all, mut collectives) = (0, 0, 0);
    for step in &certificate.steps {
        let node = certificate.logical.node(step.value);
        match &step.kind {
            StepKind::Compute if matches!(node.op, Op::Weight(_)) && node.ty.rank() > 1 => {
                all += 1;
                split += usize::from(!step.layout.is_replicated());
            }
            StepKind::Compute => {}
            StepKind::Convert(conversion) => collectives += usize::from(conversion.communicates()),
        }
    }
    (split, all, collectives)
}

/// A model this small is best left whole where memory is no matter; it is split because that was asked for, and right.
#[test]
fn what_would_be_left_whole_is_split() {
    let scratch = scratch();
    for ranks in [2, 3] {
        let [best, split] = ["best", "split"].map(|name| scratch.path().join(format!("{name}{ranks}")));
        shard(ranks, &best, &["--memory", "free"]);
        shard(ranks, &split, &["--memory", "free", "--split-all"]);
        let ((fewer, _, _), (more, all, collectives)) = (counts(&best), counts(&split));
        assert!(fewer < more && more == all, "{fewer}, {more} of {all} matrices on {ranks} ranks");
        assert!(collectives > 0, "{ranks} ranks");
        end(&mut tpshard(words!["check", split, "--model", model()])).ok();
        end(&mut tpshard(words!["verify", split, "--golden", golden()])).ok();
    }
}
