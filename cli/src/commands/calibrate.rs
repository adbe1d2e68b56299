//! `tpshard calibrate`: measures this machine as the ranks of a program see it, and writes a hardware profile.
//!
//! The kernels are timed through sessions, the collectives through communicators: what is priced is what runs. Rates
//! come from the difference between a long and a short program, so that what a step costs anyway cancels out.
//! [`links`] times collectives, [`kernels`] chains of one kernel, [`models`] whole models, [`fit`] draws lines through points, [`report`] writes the profile
//! and the tables, [`compare`] holds predictions against sharded models.

mod compare;
mod fit;
mod kernels;
mod links;
mod models;
mod report;
mod steps;

use crate::arguments::CalibrateArguments;
use crate::failure::{Failure, Kind, Outcome};
use kernels::Kernels;
use links::{Carrier, Point};
use models::Models;
use std::collections::BTreeMap;
use std::num::NonZero;
use steps::Slopes;
use tpshard_passes::cost::kernels::{Family, Measured, Rates};

/// Everything is measured so often, a round over everything after the other; the fastest round counts. A machine that
/// others use too has slow seconds and slow minutes but no fast ones, so what rounds have in common is the fastest.
pub(crate) const ROUNDS: usize = 5;
/// Most ranks that are measured together.
const MOST_RANKS: usize = 64;

/// How long to measure.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Effort {
    /// Samples that a median is taken of.
    pub(crate) samples: usize,
    /// Sizes from 1 KiB on, each `growth` times the one before.
    pub(crate) growth: usize,
    pub(crate) largest: usize,
}

impl Effort {
    fn of(quick: bool) -> Effort {
        if quick {
            Effort { samples: 3, growth: 4, largest: 4 << 20 }
        } else {
            Effort { samples: 7, growth: 2, largest: 16 << 20 }
        }
    }
}

/// Everything that was measured.
pub(crate) struct Measurements {
    pub(crate) ranks: usize,
    pub(crate) threads: usize,
    pub(crate) cores: usize,
    pub(crate) memory_bytes: f64,
    pub(crate) rates: steps::Rates,
    /// Rates of kernels, by the number of ranks that ran at once.
    pub(crate) kernels: BTreeMap<usize, Measured>,
    /// What the programs took that the rates come from, by the number of ranks.
    pub(crate) programs: BTreeMap<usize, Vec<(Family, String, f64, f64)>>,
    /// By the number of ranks.
    pub(crate) models: BTreeMap<usize, models::Compared>,
    pub(crate) points: Vec<Point>,
    /// What the profile is made from.
    pub(crate) carrier: Carrier,
}

impl Measurements {
    /// Has kernels take as long as they do in models, and ranks wait for one another.
    fn raise(&mut self) {
        for (ranks, families) in &mut self.kernels {
            let Some(models) = self.models.get(ranks) else { continue };
            models::raise(families, models.factor);
            if models.meeting > 0.0 {
                families.insert(Family::Meeting, Rates { call: models.meeting, ..Rates::default() });
            }
        }
    }
}

pub(crate) fn calibrate(arguments: &CalibrateArguments, json: bool, quiet: bool) -> Outcome<()> {
    let effort = Effort::of(arguments.quick);
    if let Some(file) = &arguments.worker {
        return links::work(file, effort);
    }
    if !arguments.against.is_empty() {
        return compare::compare(arguments, effort, json);
    }
    let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
    let ranks = arguments.ranks.unwrap_or_else(|| cores.clamp(2, 8));
    if !(2..=MOST_RANKS).contains(&ranks) {
        let message = format!("--ranks {ranks}: collectives are measured between 2 to {MOST_RANKS} ranks");
        return Err(Failure::new(Kind::Usage, format!("{message}\nhelp: leave it out for one rank a core")));
    }
    if let Some(out) = arguments.out.as_ref().filter(|out| out.is_dir()) {
        let message = format!("--out {}: is a folder\nhelp: name a file", out.display());
        return Err(Failure::new(Kind::Usage, message));
    }
    let say = |what: &str| {
        if !quiet && !json {
            eprintln!("measuring {what}");
        }
    };
    let several = counts(ranks);
    let all: Vec<usize> = [1].into_iter().chain(several.iter().copied()).collect();
    let (mut slopes, mut kernels) = (Slopes::default(), Kernels::new()?);
    let mut models: Vec<Models> = all.iter().map(|&count| Models::new(count)).collect::<Outcome<_>>()?;
    let mut rounds: Vec<Vec<Point>> = Vec::new();
    for round in 1..=ROUNDS {
        say(&format!("kernels, round {round} of {ROUNDS}"));
        slopes.round(ranks, effort)?;
        kernels.round(&all, effort)?;
        models.iter_mut().try_for_each(|models| models.round(effort))?;
        say(&format!("collectives, round {round} of {ROUNDS}"));
        let mut points = Vec::new();
        for &count in &several {
            points.extend(links::between_threads(count, effort)?);
            points.extend(links::between_processes(count, arguments.quick, effort)?);
        }
        rounds.push(points);
    }
    let mut measured = Measurements {
        ranks,
        threads: (cores / ranks).max(1),
        cores,
        memory_bytes: report::memory_of_machine()? / ranks as f64,
        rates: slopes.rates()?,
        kernels: all.iter().map(|&count| (count, kernels.rates(count))).collect(),
        programs: all.iter().map(|&count| (count, kernels.programs(count))).collect(),
        models: BTreeMap::new(),
        points: links::fastest(&rounds),
        carrier: Carrier::Processes,
    };
    let profile = report::profile(&measured)?;
    measured.models = all.iter().zip(&models).map(|(&count, m)| (count, m.compared(&profile))).collect();
    measured.raise();
    report::finish(&measured, arguments.out.as_deref(), json)
}

/// The numbers of ranks to measure: powers of two, and the largest.
fn counts(most: usize) -> Vec<usize> {
    let powers = (1..).map(|power| 1usize << power).take_while(|&count| count < most);
    powers.chain([most]).collect()
}

/// The middle of some samples.
pub(crate) fn median(mut samples: Vec<f64>) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples.get(samples.len() / 2).copied().unwrap_or(f64::NAN)
}

/// The medians of rounds, of which the fastest counts.
#[derive(Clone, Debug, Default)]
pub(crate) struct Rounds(Vec<f64>);

impl Rounds {
    pub(crate) fn add(&mut self, seconds: f64) {
        self.0.push(seconds);
    }

    /// Not a number if there was no round.
    pub(crate) fn fastest(&self) -> f64 {
        self.0.iter().copied().fold(f64::NAN, f64::min)
    }

    /// By how much of the fastest round's time the second fastest took longer: nothing if the machine was left alone.
    pub(crate) fn noise(&self) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        match sorted.as_slice() {
            [first, second, ..] => second / first - 1.0,
            _ => 0.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slow_rounds_do_not_count() {
        let mut rounds = Rounds::default();
        assert!(rounds.fastest().is_nan());
        [3.0, 2.0, 9.0, 2.5].into_iter().for_each(|seconds| rounds.add(seconds));
        assert_eq!(rounds.fastest(), 2.0);
        assert_eq!(rounds.noise(), 0.25);
    }

    #[test]
    fn counts_are_powers_of_two_and_the_largest() {
        assert_eq!(counts(2), [2]);
        assert_eq!(counts(4), [2, 4]);
        assert_eq!(counts(6), [2, 4, 6]);
    }

    #[test]
    fn the_median_is_no_outlier() {
        assert_eq!(median(vec![3.0, 100.0, 1.0]), 3.0);
        assert!(median(vec![]).is_nan());
    }
}
