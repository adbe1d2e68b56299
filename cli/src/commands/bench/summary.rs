//! What a bench found out, for people and for machines.

use super::lead::{Measured, RankLog, StepName, Submitted};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use tpshard_ir::wording::{Bytes, Seconds, without_numbers};

/// Nodes of the model that the table of operations lists at most.
const MOST_NODES: usize = 12;

/// Times of equal pieces of work, in seconds, sorted.
struct Times(Vec<f64>);

impl Times {
    fn of(nanoseconds: &[u64]) -> Times {
        let mut seconds: Vec<f64> = nanoseconds.iter().map(|&n| n as f64 / 1e9).collect();
        seconds.sort_by(f64::total_cmp);
        Times(seconds)
    }

    /// The smallest time that `share` of all do not exceed (nearest rank).
    fn quantile(&self, share: f64) -> f64 {
        let rank = (share * self.0.len() as f64).ceil() as usize;
        self.0.get(rank.max(1) - 1).or(self.0.last()).copied().unwrap_or(0.0)
    }

    fn median(&self) -> f64 {
        self.quantile(0.5)
    }
}

/// What one kind of step took on one rank, over all measured runs.
#[derive(Clone, Copy, Default)]
struct Share {
    calls: u64,
    nanoseconds: u64,
}

impl Share {
    fn add(&mut self, nanoseconds: u64) {
        self.calls += 1;
        self.nanoseconds += nanoseconds;
    }
}

/// Runs that do the same work: of the inputs or the prompt, or of one more token.
struct Phase {
    name: &'static str,
    /// Tokens that one run takes in, where they are known.
    tokens: Option<usize>,
    times: Times,
    /// Runs whose steps are remembered: long benches forget the first.
    remembered: usize,
    /// Collectives of the program and their payload, per run.
    traffic: (u64, u64),
    /// Of one run on rank 0, if a GPU executed it.
    submitted: Option<Submitted>,
    /// Per rank; nothing where steps were not timed.
    communication: Option<Vec<Share>>,
    /// On rank 0, most time first.
    kernels: Vec<(String, Share)>,
    nodes: Vec<(String, Share)>,
}

pub(super) struct Summary<'a> {
    logs: &'a [RankLog],
    threads: Option<usize>,
    first_run: f64,
    phases: Vec<Phase>,
}

impl<'a> Summary<'a> {
    /// `decode` tokens followed each prompt.
    pub(super) fn of(
        logs: &'a [RankLog],
        measured: &Measured,
        decode: usize,
        threads: Option<usize>,
    ) -> Summary<'a> {
        let is_prompt = move |run: u64| run.is_multiple_of(decode as u64 + 1);
        let name = if decode == 0 { "run" } else { "prompt" };
        let mut first = Phase::of(logs, measured.start, is_prompt);
        let tokens = measured.prompt.map(|(sequences, length)| sequences * length);
        (first.name, first.tokens, first.traffic) = (name, tokens, measured.run_traffic);
        first.times = Times::of(&measured.runs);
        first.submitted = measured.run_submitted;
        let mut phases = vec![first];
        if decode > 0 {
            let mut rest = Phase::of(logs, measured.start, |run| !is_prompt(run));
            let sequences = measured.prompt.map(|(sequences, _)| sequences);
            (rest.name, rest.tokens, rest.traffic) = ("token", sequences, measured.token_traffic);
            rest.times = Times::of(&measured.tokens);
            rest.submitted = measured.token_submitted;
            phases.push(rest);
        }
        Summary { logs, threads, first_run: measured.first as f64 / 1e9, phases }
    }

    pub(super) fn to_text(&self, by_op: bool) -> String {
        let mut text = String::new();
        let threads = self.threads.map_or(String::new(), |t| format!(", {t} threads each"));
        let ranks = self.logs.len();
        let _ = writeln!(text, "{ranks} {}{threads}", if ranks == 1 { "rank" } else { "ranks" });
        for phase in &self.phases {
            phase.write(&mut text);
        }
        let _ = writeln!(text, "{:<10} {}", "first run", Seconds(self.first_run));
        let peak = self.logs.iter().map(|log| log.peak_bytes).max().unwrap_or(0);
        let _ = writeln!(text, "{:<10} {} resident at most per rank", "memory", Bytes(peak));
        if by_op {
            for phase in &self.phases {
                phase.write_shares(&mut text, "kernel", &phase.kernels, usize::MAX);
                phase.write_shares(&mut text, "node", &phase.nodes, MOST_NODES);
            }
        }
        text
    }

    pub(super) fn to_json(&self, by_op: bool) -> Value {
        let ranks: Vec<Value> =
            self.logs.iter().map(|log| json!({ "rank": log.rank, "peak_bytes": log.peak_bytes })).collect();
        let phases: BTreeMap<&str, Value> =
            self.phases.iter().map(|phase| (phase.name, phase.to_json(by_op))).collect();
        json!({
            "ranks": ranks,
            "threads": self.threads,
            "first_run_seconds": self.first_run,
            "phases": phases,
        })
    }
}

impl Phase {
    /// What the logs say about the runs for which `wanted` holds.
    fn of(logs: &[RankLog], start: u64, wanted: impl Fn(u64) -> bool) -> Phase {
        let (mut kernels, mut nodes) = (BTreeMap::new(), BTreeMap::new());
        let mut runs = BTreeSet::new();
        let mut communication = Vec::new();
        for log in logs {
            let names: BTreeMap<_, &StepName> = log.names.iter().map(|(e, v, n)| ((*e, *v), n)).collect();
            let mut share = Share::default();
            for &(run, entry, value, begun, length) in &log.steps {
                let Some(name) = names.get(&(entry, value)).filter(|_| begun >= start && wanted(run)) else {
                    continue;
                };
                if name.communicates {
                    share.add(length);
                }
                if log.rank == 0 {
                    runs.insert(run);
                    kernels.entry(name.kernel.clone()).or_insert(Share::default()).add(length);
                    nodes.entry(without_numbers(&name.node)).or_insert(Share::default()).add(length);
                }
            }
            communication.push(share);
        }
        let sorted = |shares: BTreeMap<String, Share>| {
            let mut all: Vec<(String, Share)> = shares.into_iter().collect();
            all.sort_by_key(|(_, share)| std::cmp::Reverse(share.nanoseconds));
            all
        };
        Phase {
            name: "",
            tokens: None,
            times: Times(Vec::new()),
            remembered: runs.len().max(1),
            traffic: (0, 0),
            submitted: None,
            communication: logs.iter().any(|log| !log.steps.is_empty()).then_some(communication),
            kernels: sorted(kernels),
            nodes: sorted(nodes),
        }
    }

    fn per_run(&self, share: &Share) -> f64 {
        share.nanoseconds as f64 / 1e9 / self.remembered as f64
    }

    fn write(&self, text: &mut String) {
        let times = &self.times;
        let rate = match self.tokens {
            Some(tokens) => format!("{:.1} tokens/s", tokens as f64 / times.median()),
            None => format!("{:.1} per second", 1.0 / times.median()),
        };
        let [median, late, least] = [0.5, 0.95, 0.0].map(|share| Seconds(times.quantile(share)));
        let samples = times.0.len();
        let name = self.name;
        let _ = writeln!(
            text,
            "{name:<10} median {median}, 95 % within {late}, least {least}, {rate} ({samples} samples)"
        );
        let (collectives, bytes) = self.traffic;
        if collectives > 0 {
            let bytes = Bytes(bytes);
            let _ = write!(text, "{:<10} {collectives} collectives with {bytes}", "");
            let _ = match &self.communication {
                Some(shares) => {
                    let slowest = shares.iter().map(|share| self.per_run(share)).fold(0.0, f64::max);
                    writeln!(text, " take {}, waiting for others included", Seconds(slowest))
                }
                None => writeln!(text),
            };
        }
        if let Some(Submitted { launches, graphs, updates }) = self.submitted {
            let _ = writeln!(
                text,
                "{:<10} {launches} calls of kernels one by one, {graphs} CUDA graphs with {updates} calls changed",
                ""
            );
        }
    }

    fn write_shares(&self, text: &mut String, what: &str, shares: &[(String, Share)], most: usize) {
        let all: u64 = shares.iter().map(|(_, share)| share.nanoseconds).sum();
        let _ = writeln!(
            text,
            "\n{:>8} {:>12} {:>8}  {what}, per {} on rank 0",
            "calls", "time", "share", self.name
        );
        for (name, share) in shares.iter().take(most) {
            let calls = share.calls as f64 / self.remembered as f64;
            let part = 100.0 * share.nanoseconds as f64 / all.max(1) as f64;
            let name = if name.is_empty() { "-" } else { name };
            let _ = writeln!(text, "{calls:>8.1} {:>12} {part:>6.1} %  {name}", Seconds(self.per_run(share)));
        }
        if shares.len() > most {
            let _ = writeln!(text, "{:>32} {} others", "", shares.len() - most);
        }
    }

    fn to_json(&self, by_op: bool) -> Value {
        let shares = |all: &[(String, Share)]| -> Vec<Value> {
            let one = |(name, share): &(String, Share)| {
                let calls = share.calls as f64 / self.remembered as f64;
                json!({ "name": name, "calls": calls, "seconds": self.per_run(share) })
            };
            all.iter().map(one).collect()
        };
        let times = &self.times;
        let seconds = |shares: &Vec<Share>| shares.iter().map(|share| self.per_run(share)).collect();
        let waits: Option<Vec<f64>> = self.communication.as_ref().map(seconds);
        let mut value = json!({
            "samples": times.0.len(),
            "median_seconds": times.median(),
            "p95_seconds": times.quantile(0.95),
            "least_seconds": times.quantile(0.0),
            "all_seconds": times.0,
            "tokens": self.tokens,
            "tokens_per_second": self.tokens.map(|tokens| tokens as f64 / times.median()),
            "collectives": self.traffic.0,
            "communication_bytes": self.traffic.1,
            "communication_seconds_by_rank": waits,
        });
        if let Some(Submitted { launches, graphs, updates }) = self.submitted {
            value["submitted"] = json!({ "launches": launches, "graphs": graphs, "updates": updates });
        }
        if by_op {
            value["kernels"] = shares(&self.kernels).into();
            value["nodes"] = shares(&self.nodes).into();
        }
        value
    }
}
