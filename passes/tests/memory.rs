//! What every rank holds of a plan.

mod common;

use common::{LLAMA_8B, Sizes, decode, llama};
use tpshard_ir::DType;
use tpshard_passes::cost::Profile;
use tpshard_passes::extended::Extended;
use tpshard_passes::memory::{RankMemory, rank_memory};
use tpshard_passes::{MemoryGoal, Plan, PlanOptions, plan};

fn planned(ranks: usize) -> Plan {
    let mut options = PlanOptions::new(ranks, Profile::built_in("h100-sxm").unwrap());
    options.entries = vec![decode()];
    options.memory = MemoryGoal::Least;
    plan(Extended::new(llama(Sizes { layers: 2, ..LLAMA_8B }, DType::BF16)), &options).unwrap()
}

#[test]
fn rank_0_holds_what_the_report_says_and_no_rank_more() {
    for ranks in [1, 2, 3, 4, 6] {
        let plan = planned(ranks);
        let report = &plan.report;
        let all = rank_memory(&plan);
        let first = RankMemory {
            weights: report.weight_bytes,
            state: report.state_bytes,
            activations: report.activation_bytes,
        };
        assert_eq!((all.len(), all[0]), (ranks, first), "{report}");
        let stored: u64 = all.iter().map(|m| m.weights + m.state).sum();
        assert_eq!(stored, report.balance.total, "{report}");
        for (rank, memory) in all.iter().enumerate() {
            assert!(memory.weights <= first.weights && memory.state <= first.state, "{rank} of {ranks}");
            assert!(memory.total() <= first.total(), "{rank} of {ranks}: {memory:?}");
            if ranks.is_power_of_two() {
                assert_eq!(*memory, first, "{rank} of {ranks}");
            }
        }
    }
}

/// Eight KV heads over three ranks: three, three and two.
#[test]
fn the_last_of_three_ranks_holds_less() {
    let all = rank_memory(&planned(3));
    assert_eq!(all[0].state, all[1].state);
    assert_eq!(all[2].state * 3, all[0].state * 2);
    assert!(all[2].weights < all[0].weights && all[2].activations < all[0].activations, "{all:?}");
}
