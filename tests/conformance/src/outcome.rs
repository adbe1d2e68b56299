//! What became of a test under one treatment, and the line a worker says it in.

use std::fmt;

/// Longest reason that is kept.
const LONGEST: usize = 160;

/// How a model is run: as it stands, or with all inputs but the first made initializers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Form {
    Plain,
    Constant,
}

impl Form {
    pub(crate) const ALL: [Form; 2] = [Form::Plain, Form::Constant];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Form::Plain => "as it stands",
            Form::Constant => "constantified",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Verdict {
    Pass,
    /// The importer says why it does not take the model.
    Refused,
    /// An error where there should be outputs.
    Failed,
    /// Outputs that are not the suite's.
    Wrong,
    /// A panic, a signal, or no end in time.
    Crash,
}

impl Verdict {
    pub(crate) const ALL: [Verdict; 5] =
        [Verdict::Pass, Verdict::Refused, Verdict::Failed, Verdict::Wrong, Verdict::Crash];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Verdict::Pass => "pass",
            Verdict::Refused => "refused",
            Verdict::Failed => "failed",
            Verdict::Wrong => "wrong",
            Verdict::Crash => "crash",
        }
    }
}

/// One run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) form: Form,
    pub(crate) ranks: usize,
    pub(crate) verdict: Verdict,
    /// Empty for passes.
    pub(crate) reason: String,
    /// Steps whose result is split.
    pub(crate) split: usize,
    /// Steps in which ranks communicate.
    pub(crate) collectives: usize,
}

impl Outcome {
    pub(crate) fn new(form: Form, ranks: usize, verdict: Verdict, reason: &str) -> Outcome {
        Outcome { form, ranks, verdict, reason: clean(reason), split: 0, collectives: 0 }
    }

    /// Reads what [`Outcome`] prints.
    pub(crate) fn parse(line: &str) -> Option<Outcome> {
        let mut fields = line.split('\t');
        let form = fields.next().and_then(|f| Form::ALL.into_iter().find(|form| form.name() == f))?;
        let ranks = fields.next()?.parse().ok()?;
        let verdict = fields.next().and_then(|v| Verdict::ALL.into_iter().find(|o| o.name() == v))?;
        let split = fields.next()?.parse().ok()?;
        let collectives = fields.next()?.parse().ok()?;
        let reason = fields.next()?.to_owned();
        Some(Outcome { form, ranks, verdict, reason, split, collectives })
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}\t{}\t{}\t{}\t{}\t{}",
            self.form.name(),
            self.ranks,
            self.verdict.name(),
            self.split,
            self.collectives,
            self.reason
        )
    }
}

/// One line that fits into a table.
fn clean(reason: &str) -> String {
    let mut text: String = reason.split_whitespace().collect::<Vec<_>>().join(" ").replace('|', "\\|");
    if let Some((cut, _)) = text.char_indices().nth(LONGEST) {
        text.truncate(cut);
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outcome_survives_its_line() {
        let mut outcome = Outcome::new(Form::Constant, 3, Verdict::Wrong, "y:\tshape [1]\n| should");
        (outcome.split, outcome.collectives) = (4, 2);
        assert_eq!(Outcome::parse(&outcome.to_string()), Some(outcome.clone()));
        assert_eq!(outcome.reason, "y: shape [1] \\| should");
        assert_eq!(Outcome::parse("as it stands\t1\tgreat\t0\t0\t"), None);
    }
}
