//! What communication hides behind, in plans of a model that people know.

mod common;

use common::{LLAMA_8B, Sizes, decode, llama};
use tpshard_ir::DType;
use tpshard_ir::program::Determinism;
use tpshard_passes::cost::Profile;
use tpshard_passes::extended::Extended;
use tpshard_passes::overlap::Overlap;
use tpshard_passes::{CasePlanning, Entry, MemoryGoal, Plan, PlanOptions, plan_cases};

const LAYERS: usize = 2;

fn prompt(tokens: i64) -> Entry {
    let sizes = [("batch", 1), ("seq", tokens), ("past", 0)];
    Entry::new("prefill", sizes.into_iter().map(|(name, size)| (name.into(), size)).collect())
}

fn planned(profile: Profile, entry: Entry, change: impl Fn(&mut PlanOptions)) -> Plan {
    let graph = llama(Sizes { layers: LAYERS, ..LLAMA_8B }, DType::BF16);
    let mut options = PlanOptions::new(4, profile);
    options.memory = MemoryGoal::Least;
    change(&mut options);
    let case = CasePlanning { extended: Extended::new(graph), entries: vec![entry], pins: vec![] };
    plan_cases(&[case], &options).unwrap()
}

fn on(profile: &str, entry: Entry, change: impl Fn(&mut PlanOptions)) -> Plan {
    planned(Profile::built_in(profile).unwrap(), entry, change)
}

#[test]
fn sums_of_a_long_prompt_hide_behind_their_products() {
    let plan = on("h800-sxm", prompt(8192), |_| {});
    let whole = on("h800-sxm", prompt(8192), |options| options.overlap = Overlap::Off);
    let entry = &plan.report.entries[0];
    // Two products of every layer are summed.
    assert_eq!(plan.cuts.len(), 1);
    assert_eq!(plan.cuts[0].len(), 2 * LAYERS, "{}", plan.report);
    assert_eq!(entry.collectives.iter().filter(|c| c.pieces > 1).count(), 2 * LAYERS);
    let hidden: f64 = entry.collectives.iter().map(|c| c.hidden).sum();
    assert!(hidden > 0.0 && (hidden - entry.hidden).abs() < 1e-12);
    assert!((whole.report.seconds - plan.report.seconds - hidden).abs() < 1e-9);
    assert!((entry.seconds() - plan.report.seconds).abs() < 1e-9);
    for c in entry.collectives.iter().filter(|c| c.pieces > 1) {
        assert!(c.hidden > 0.0 && c.hidden < c.seconds, "{c:?}");
    }
    // Whatever is hidden, the program is the same, and so is what it carries.
    assert_eq!(plan.programs, whole.programs);
    assert!(whole.cuts.is_empty() && whole.report.entries[0].hidden == 0.0);
    let text = plan.report.to_string();
    assert!(text.contains("are hidden behind computing") && text.contains("pieces"), "{text}");
}

#[test]
fn where_it_does_not_pay_nothing_is_cut() {
    let nothing = |plan: Plan, why: &str| {
        assert!(plan.cuts.is_empty(), "{why}: {:?}", plan.cuts);
        assert_eq!(plan.report.entries[0].hidden, 0.0, "{why}");
        assert!(!plan.report.to_string().contains("hidden"), "{why}");
    };
    nothing(on("h100-sxm", decode(), |_| {}), "a token");
    nothing(on("h100-sxm", prompt(128), |_| {}), "a short prompt");
    nothing(on("h100-sxm", prompt(8192), |o| o.determinism = Determinism::Run), "equal bits");
    nothing(on("cpu-shm", prompt(8192), |_| {}), "the cores that compute are those that communicate");
    nothing(on("h100-sxm", prompt(8192), |o| o.ranks = 1), "one rank");
}

/// For measurements: as many as are wanted, whatever is predicted of them.
#[test]
fn pieces_can_be_asked_for() {
    let plan = on("h100-sxm", prompt(128), |options| options.overlap = Overlap::Pieces(3));
    assert_eq!(plan.cuts[0].len(), 2 * LAYERS);
    assert!(plan.cuts[0].values().all(|counts| *counts == [(32, 3)]), "{:?}", plan.cuts);
    // Small ones are slower, and the prediction says so.
    assert!(plan.report.entries[0].hidden < 0.0, "{}", plan.report);
}
