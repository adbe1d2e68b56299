//! What carries collectives, decided by rank 0 from what all ranks have.

use crate::session::CommChoice;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

type Version = (u32, u32, u32);

/// What a rank has.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Brought {
    pub(super) choice: CommChoice,
    /// NCCL's version, or why it cannot be used.
    pub(super) version: Result<Version, String>,
    /// Where its device is on the machine's bus; empty if that is not known.
    pub(super) bus: String,
    /// The pieces in which it makes products that are reduced, in words; empty if none.
    pub(super) pieces: String,
}

/// What all ranks do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Decision {
    /// `pieces`: products are made and reduced in pieces.
    Nccl { pieces: bool },
    /// Host memory, and why.
    Host(String),
    /// What was asked for cannot be.
    Refuse(String),
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}

/// The decision for ranks of one machine.
pub(super) fn decide(all: &[Brought]) -> Decision {
    let Some(first) = all.first() else { return Decision::Host("there are no ranks".into()) };
    if let Some((rank, other)) = all.iter().enumerate().find(|(_, rank)| rank.choice != first.choice) {
        return Decision::Refuse(format!(
            "rank 0 was started with --comm {}, rank {rank} with --comm {}\n  help: start all ranks alike",
            first.choice.name(),
            other.choice.name()
        ));
    }
    if first.choice == CommChoice::Shm {
        return Decision::Host("--comm shm".into());
    }
    let cannot = |short: String, whole: String| match first.choice {
        CommChoice::Nccl => {
            let more = if whole.contains("help: ") { ", or" } else { "\n  help:" };
            Decision::Refuse(format!("{whole}{more} go through host memory with --comm shm"))
        }
        CommChoice::Auto | CommChoice::Shm => Decision::Host(short),
    };
    let missing = all.iter().enumerate().find_map(|(rank, b)| Some((rank, b.version.as_ref().err()?)));
    if let Some((rank, why)) = missing {
        let found = if why.contains("was not found") { "libnccl was not found" } else { first_line(why) };
        return cannot(format!("rank {rank}: {found}"), format!("rank {rank}: {why}"));
    }
    let versions: BTreeSet<Version> = all.iter().filter_map(|b| b.version.clone().ok()).collect();
    if versions.len() > 1 {
        let versions: Vec<String> = versions.iter().map(|(a, b, c)| format!("{a}.{b}.{c}")).collect();
        let what = format!("the ranks have different versions of NCCL: {}", versions.join(", "));
        return cannot(what.clone(), what);
    }
    let buses: BTreeSet<&str> = all.iter().map(|b| b.bus.as_str()).filter(|bus| !bus.is_empty()).collect();
    // Who asks for NCCL may have told it to let ranks share a device.
    if first.choice == CommChoice::Auto && buses.len() < all.len() {
        return Decision::Host("ranks share a GPU".into());
    }
    let pieces = !first.pieces.is_empty() && all.iter().all(|rank| rank.pieces == first.pieces);
    Decision::Nccl { pieces }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rank(choice: CommChoice, version: Result<Version, &str>, bus: &str) -> Brought {
        Brought { choice, version: version.map_err(str::to_owned), bus: bus.into(), pieces: String::new() }
    }

    const WHOLE: Decision = Decision::Nccl { pieces: false };

    /// Ranks that take other pieces would wait for each other for ever.
    #[test]
    fn pieces_are_taken_if_they_are_those_of_all_ranks() {
        let with = |pieces: &str, bus| Brought { pieces: pieces.into(), ..rank(CommChoice::Auto, NEW, bus) };
        let two = |a, b| decide(&[with(a, "1"), with(b, "2")]);
        assert_eq!(two("main/%3 256:2", "main/%3 256:2"), Decision::Nccl { pieces: true });
        for other in ["", "main/%3 256:4", "main/%4 256:2"] {
            assert_eq!(two("main/%3 256:2", other), WHOLE);
            assert_eq!(two(other, "main/%3 256:2"), WHOLE);
        }
        assert_eq!(two("", ""), WHOLE);
    }

    const NEW: Result<Version, &str> = Ok((2, 28, 9));

    #[test]
    fn nccl_is_taken_where_every_rank_has_it_and_a_gpu_of_its_own() {
        use CommChoice::{Auto, Nccl, Shm};
        let apart = [rank(Auto, NEW, "1"), rank(Auto, NEW, "2")];
        assert_eq!(decide(&apart), WHOLE);
        for (other, why) in [
            (rank(Auto, NEW, "1"), "share a GPU"),
            (rank(Auto, NEW, ""), "share a GPU"),
            (rank(Auto, Err("libnccl was not found; looked"), "2"), "rank 1: libnccl was not found"),
            (rank(Auto, Ok((2, 27, 1)), "2"), "different versions of NCCL: 2.27.1, 2.28.9"),
        ] {
            let decided = decide(&[rank(Auto, NEW, "1"), other]);
            assert!(matches!(&decided, Decision::Host(found) if found.contains(why)), "{decided:?}");
        }
        assert_eq!(decide(&[rank(Shm, NEW, "1"), rank(Shm, NEW, "2")]), Decision::Host("--comm shm".into()));
        // Asked for, it is tried or refused, never left out.
        assert_eq!(decide(&[rank(Nccl, NEW, "1"), rank(Nccl, NEW, "1")]), WHOLE);
        for (other, why) in [
            (
                rank(Nccl, Err("too old"), "2"),
                "rank 1: too old\n  help: go through host memory with --comm shm",
            ),
            (rank(Nccl, Ok((2, 27, 1)), "2"), "different versions"),
            (rank(Auto, NEW, "2"), "--comm nccl, rank 1 with --comm auto"),
        ] {
            let decided = decide(&[rank(Nccl, NEW, "1"), other]);
            assert!(matches!(&decided, Decision::Refuse(found) if found.contains(why)), "{decided:?}");
        }
    }
}
