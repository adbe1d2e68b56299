//! docs/onnx-support.md: what passes, per suite and per operator, and why the rest does not. Generated; the test fails
//! when it is stale.

use crate::outcome::{Form, Outcome, Verdict};
use crate::suite::Test;
use crate::tier::Tier;
use crate::worker::RANKS;
use std::collections::BTreeMap;
use std::fmt::Write;

/// Numbers of runs by verdict.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally([usize; Verdict::ALL.len()]);

impl Tally {
    fn add(&mut self, verdict: Verdict) {
        self.0[verdict as usize] += 1;
    }

    pub(crate) fn of(&self, verdict: Verdict) -> usize {
        self.0[verdict as usize]
    }

    fn total(&self) -> usize {
        self.0.iter().sum()
    }

    fn wrong(&self) -> usize {
        self.total() - self.of(Verdict::Pass) - self.of(Verdict::Refused)
    }
}

/// A test with its runs.
pub(crate) type Ran<'a> = (&'a Test, &'a [Outcome]);

const HEAD: &str = "# What of ONNX works

Written by `cargo xtask conformance --write`, which runs ONNX's own backend tests; `cargo xtask conformance` fails when a
row is not what is written here. A test is imported, planned, its certificate checked, and executed on 1 rank, then on 2
and 3 ranks with everything split that a rule can split (`--split-all`), and compared with the suite's outputs in the
suite's tolerances (`dft_inverse`, whose zeros are expected as noise, in 1e-5). *Constantified* tests have all inputs but the first as initializers, as real models have weights.
A test is *refused* if the importer says why it does not take the model; *not right* is everything else that does not
pass: an error after that, a wrong result or a crash.
";

/// The whole document.
pub(crate) fn document(ran: &[Ran<'_>]) -> String {
    let mut text = HEAD.to_owned();
    tiers(&mut text, ran);
    totals(&mut text, ran);
    operators(&mut text, ran);
    reasons(&mut text, ran);
    text
}

/// The runs of one form on one number of ranks.
fn tally<'a>(ran: impl Iterator<Item = &'a Ran<'a>>, form: Form, ranks: usize) -> Tally {
    let mut tally = Tally::default();
    for (_, outcomes) in ran {
        for outcome in outcomes.iter().filter(|o| o.form == form && o.ranks == ranks) {
            tally.add(outcome.verdict);
        }
    }
    tally
}

/// The newest opset that is taken.
const OPSETS: i64 = 26;

/// The shares that pass of what is to pass.
fn tiers(text: &mut String, ran: &[Ran<'_>]) {
    let _ = write!(
        text,
        "\n## Node tests by tier\n\nOf the tests in opsets up to {OPSETS}, those that pass. A test is of the highest tier of its operators.\n\n\
         | tier | form | tests |"
    );
    for ranks in RANKS {
        let _ = write!(text, " N = {ranks} | % |");
    }
    text.push_str("\n|---|---|--:|");
    text.push_str(&"--:|--:|".repeat(RANKS.len()));
    text.push('\n');
    let mut row = |title: &str, tiers: &[Tier]| {
        let counts = |test: &Test| test.kind == "node" && test.opset <= OPSETS && tiers.contains(&test.tier);
        for form in Form::ALL {
            let members = || ran.iter().filter(|(test, _)| counts(test));
            let total = tally(members(), form, 1).total();
            if total == 0 {
                continue;
            }
            let _ = write!(text, "| {title} | {} | {total} |", form.name());
            for ranks in RANKS {
                let pass = tally(members(), form, ranks).of(Verdict::Pass);
                let _ = write!(text, " {pass} | {} |", percent(pass, total));
            }
            text.push('\n');
        }
    };
    for tier in Tier::ALL {
        row(&tier.to_string(), &[tier]);
    }
    row("1 and 2", &[Tier::Tensor, Tier::Numeric]);
}

/// Rounded down, so that 100 means all.
fn percent(part: usize, whole: usize) -> String {
    let tenths = part * 1000 / whole.max(1);
    format!("{}.{}", tenths / 10, tenths % 10)
}

fn totals(text: &mut String, ran: &[Ran<'_>]) {
    text.push_str("\n## Suites\n\nA test that a newer version of the package has as well, in the same opset, is run once, as the newer one has it.\n\n");
    text.push_str("| onnx | tests | form | run | pass | refused | not right |");
    for ranks in &RANKS[1..] {
        let _ = write!(text, " pass on {ranks} ranks | split | collectives |");
    }
    text.push_str("\n|---|---|---|--:|--:|--:|--:|");
    text.push_str(&"--:|--:|--:|".repeat(RANKS.len() - 1));
    text.push('\n');
    let mut groups: BTreeMap<(&str, &str), Vec<Ran<'_>>> = BTreeMap::new();
    for (test, outcomes) in ran {
        groups.entry((&test.suite, &test.kind)).or_default().push((test, outcomes));
    }
    for ((suite, kind), members) in groups.iter().rev() {
        for form in Form::ALL {
            let one = tally(members.iter(), form, 1);
            if one.total() == 0 {
                continue;
            }
            let _ = write!(
                text,
                "| {suite} | {kind} | {} | {} | {} | {} | {} |",
                form.name(),
                one.total(),
                one.of(Verdict::Pass),
                one.of(Verdict::Refused),
                one.wrong()
            );
            for &ranks in &RANKS[1..] {
                let here = |o: &&Outcome| o.form == form && o.ranks == ranks;
                let runs = || members.iter().flat_map(|(_, outcomes)| outcomes.iter().filter(here));
                let split = runs().filter(|o| o.split > 0).count();
                let collectives: usize = runs().map(|o| o.collectives).sum();
                let pass = tally(members.iter(), form, ranks).of(Verdict::Pass);
                let _ = write!(text, " {pass} | {split} | {collectives} |");
            }
            text.push('\n');
        }
    }
    text.push_str("\n*split*: tests in which ranks hold parts of a value; *collectives*: of all tests.\n");
}

fn operators(text: &mut String, ran: &[Ran<'_>]) {
    text.push_str("\n## Operators\n\n");
    text.push_str(
        "By the opset of the node tests. *Written out* is the operator's function body in its place.\n\n",
    );
    text.push_str(
        "| operator | opset | pass | refused | not right | constantified: pass | refused | not right |\n",
    );
    text.push_str("|---|--:|--:|--:|--:|--:|--:|--:|\n");
    let mut groups: BTreeMap<(String, i64), Vec<Ran<'_>>> = BTreeMap::new();
    for (test, outcomes) in ran.iter().filter(|(test, _)| test.kind == "node") {
        groups.entry((title(test), test.operator.opset)).or_default().push((test, outcomes));
    }
    for ((operator, opset), members) in &groups {
        let _ = write!(text, "| {operator} | {opset} |");
        for form in Form::ALL {
            let mut tally = Tally::default();
            for (_, outcomes) in members {
                // A test passes that passes on all numbers of ranks.
                let of_form = || outcomes.iter().filter(|o| o.form == form);
                let worst = of_form().map(|o| o.verdict).max();
                worst.into_iter().for_each(|verdict| tally.add(verdict));
            }
            for number in [tally.of(Verdict::Pass), tally.of(Verdict::Refused), tally.wrong()] {
                match number {
                    0 => text.push_str(" |"),
                    number => drop(write!(text, " {number} |")),
                }
            }
        }
        text.push('\n');
    }
}

fn title(test: &Test) -> String {
    let name = &test.operator.name;
    if test.operator.expanded { format!("{name}, written out") } else { name.clone() }
}

fn reasons(text: &mut String, ran: &[Ran<'_>]) {
    text.push_str("\n## What does not pass, and why\n\n");
    text.push_str("| verdict | reason | form | tests |\n|---|---|---|---|\n");
    let mut groups: BTreeMap<(Verdict, &str, Form), Vec<String>> = BTreeMap::new();
    for (test, outcomes) in ran {
        for outcome in outcomes.iter().filter(|o| o.verdict != Verdict::Pass) {
            let ranks =
                if outcome.ranks > 1 { format!(" on {} ranks", outcome.ranks) } else { String::new() };
            let name = test.name.strip_prefix("test_").unwrap_or(&test.name);
            let named = format!("{name} ({}){ranks}", test.suite);
            groups.entry((outcome.verdict, &outcome.reason, outcome.form)).or_default().push(named);
        }
    }
    for ((verdict, reason, form), tests) in &groups {
        let _ = writeln!(text, "| {} | {reason} | {} | {} |", verdict.name(), form.name(), tests.join(", "));
    }
}

/// The lines that only one of two documents has, the first few of them.
pub(crate) fn differences(committed: &str, now: &str) -> String {
    const SHOWN: usize = 40;
    let only = |a: &str, b: &str, sign: char| -> Vec<String> {
        let known: std::collections::BTreeSet<&str> = b.lines().collect();
        a.lines().filter(|line| !known.contains(line)).map(|line| format!("  {sign} {line}")).collect()
    };
    let mut lines = only(committed, now, '-');
    lines.extend(only(now, committed, '+'));
    let more = lines.len().saturating_sub(SHOWN);
    lines.truncate(SHOWN);
    if more > 0 {
        lines.push(format!("  and {more} more"));
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::suite::Operator;

    fn test(name: &str) -> Test {
        Test {
            suite: "1.0".into(),
            kind: "node".into(),
            name: name.into(),
            model: "".into(),
            data: Vec::new(),
            rtol: 0.0,
            atol: 0.0,
            share: None,
            operator: Operator { name: "Add".into(), opset: 14, expanded: false },
            opset: 14,
            tier: Tier::Tensor,
        }
    }

    #[test]
    fn a_test_that_fails_on_two_ranks_does_not_pass() {
        let (a, b) = (test("test_add"), test("test_add_bcast"));
        let pass = |ranks| Outcome::new(Form::Plain, ranks, Verdict::Pass, "");
        let good = [pass(1), pass(2), pass(3)];
        let bad = [pass(1), Outcome::new(Form::Plain, 2, Verdict::Wrong, "y")];
        let text = document(&[(&a, &good), (&b, &bad)]);
        assert!(text.contains("\n| Add | 14 | 1 | | 1 | | | |\n"), "{text}");
        assert!(
            text.contains("| 1.0 | node | as it stands | 2 | 2 | 0 | 0 | 1 | 0 | 0 | 1 | 0 | 0 |"),
            "{text}"
        );
        assert!(
            text.contains("| 1: tensor computation | as it stands | 2 | 2 | 100.0 | 1 | 50.0 | 1 | 50.0 |"),
            "{text}"
        );
        assert!(text.contains("| wrong | y | as it stands | add_bcast (1.0) on 2 ranks |"), "{text}");
        assert_eq!(differences("a\nb\n", "a\nc\n"), "  - b\n  + c");
    }
}
