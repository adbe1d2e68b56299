//! Hardware profiles: what one device and the links between devices can do.
//!
//! A profile is a text file of `quantity = value | source` lines, so that every number says where it comes from. Some
//! are built in; any other can be read from a file, and `tpshard calibrate` writes one for the machine it runs on.
//! [`collective`] prices collectives; [`rule`] evaluates the rule of thumb for compute-bound work.

mod collective;
mod rule;
#[cfg(test)]
mod tests;

pub use collective::{Algorithm, Collective, Protocol, Span};
pub use rule::Prefill;

use super::kernels::{Family, Measured, Rates, parse_rates};
use std::collections::BTreeMap;
use tpshard_ir::{DType, DTypeClass};

/// The profiles that are built in: name and text.
const BUILT_IN: &[(&str, &str)] = &[
    ("a10", include_str!("../../profiles/a10.txt")),
    ("a100-pcie-80", include_str!("../../profiles/a100-pcie-80.txt")),
    ("a100-sxm-80", include_str!("../../profiles/a100-sxm-80.txt")),
    ("a100-sxm-80-roce-100", include_str!("../../profiles/a100-sxm-80-roce-100.txt")),
    ("b200", include_str!("../../profiles/b200.txt")),
    ("cpu-shm", include_str!("../../profiles/cpu-shm.txt")),
    ("h100-pcie", include_str!("../../profiles/h100-pcie.txt")),
    ("h100-sxm", include_str!("../../profiles/h100-sxm.txt")),
    ("h100-sxm-ib-ndr", include_str!("../../profiles/h100-sxm-ib-ndr.txt")),
    ("h200-sxm", include_str!("../../profiles/h200-sxm.txt")),
    ("h800-sxm", include_str!("../../profiles/h800-sxm.txt")),
    ("l4", include_str!("../../profiles/l4.txt")),
    ("l40s", include_str!("../../profiles/l40s.txt")),
];

/// The most protocols a profile may list.
const MAX_PROTOCOLS: usize = 256;
/// The longest text that is read.
const MAX_TEXT: usize = 1 << 20;

/// A device and its links. Times are in seconds, rates per second.
#[derive(Clone, Debug, PartialEq)]
pub struct Profile {
    pub name: String,
    pub memory_bytes: f64,
    pub memory_bandwidth: f64,
    /// The share of `memory_bandwidth` that good kernels reach.
    pub memory_fraction: f64,
    /// The share of the peak that good kernels reach.
    pub compute_fraction: f64,
    peaks: [f64; 5],
    /// Between two kernels.
    pub kernel_launch: f64,
    /// What a step costs however little it computes: waking the ranks, handing inputs and outputs over.
    pub step_overhead: f64,
    /// Ranks that share one machine's cores and memory; the peaks, the bandwidth and the memory are given for one of
    /// that many. None for devices of their own.
    pub shared_ranks: Option<usize>,
    /// Ranks that the links of `protocols` reach; further ranks are reached through `network`.
    pub node_ranks: Option<usize>,
    /// Within a node.
    pub protocols: Vec<Protocol>,
    /// Between nodes; the bandwidth is one rank's.
    pub network: Vec<Protocol>,
    /// Rates of measured kernels, by the number of ranks that ran at once; empty for machines known from data sheets.
    pub kernels: BTreeMap<usize, Measured>,
    /// The share of its rate that a product keeps while a collective is under way; none where the two do not overlap.
    pub overlap_rate: Option<f64>,
    /// Weights of a step up to so many bytes stay in the caches that ranks share.
    pub cache_bytes: Option<f64>,
    /// The text the profile was read from, comments included, for the record of a build.
    pub text: String,
}

/// Why a text is not a profile.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum ProfileError {
    #[error("no profile is called `{name}`\nhelp: built in are {}; or give the path of a profile file", Profile::names().join(", "))]
    Unknown { name: String },
    #[error("profile line {line}: {what}\nhelp: a line reads `quantity = value | source`")]
    Line { line: usize, what: String },
    #[error("the profile does not give `{quantity}`\nhelp: add `{quantity} = value | source`")]
    Missing { quantity: &'static str },
    #[error("the profile has {bytes} bytes\nhelp: at most {MAX_TEXT} are read")]
    TooLong { bytes: usize },
}

const PEAKS: [&str; 5] = ["peak.f64", "peak.f32", "peak.f16", "peak.bf16", "peak.i8"];
const SCALARS: [&str; 5] =
    ["memory_bytes", "memory_bandwidth", "memory_fraction", "compute_fraction", "kernel_launch"];
/// Quantities that may be left out.
const OPTIONAL: [&str; 5] = ["step_overhead", "shared_ranks", "node_ranks", "cache_bytes", "overlap_rate"];

impl Profile {
    /// Names of the built-in profiles, sorted.
    pub fn names() -> Vec<&'static str> {
        BUILT_IN.iter().map(|(name, _)| *name).collect()
    }

    /// The built-in profile `name`.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn built_in(name: &str) -> Result<Profile, ProfileError> {
        match Profile::built_in_text(name) {
            Some(text) => Profile::parse(text),
            None => Err(ProfileError::Unknown { name: name.into() }),
        }
    }

    /// The text of the built-in profile `name`.
    pub fn built_in_text(name: &str) -> Option<&'static str> {
        BUILT_IN.iter().find(|(known, _)| *known == name).map(|(_, text)| *text)
    }

    /// Reads the text of a profile file.
    ///
    /// # Errors
    /// A line that is not understood, a number out of range, or a quantity that is missing.
    pub fn parse(text: &str) -> Result<Profile, ProfileError> {
        if text.len() > MAX_TEXT {
            return Err(ProfileError::TooLong { bytes: text.len() });
        }
        let mut lines = Lines::default();
        for (index, line) in text.lines().enumerate() {
            lines.read(line.trim()).map_err(|what| ProfileError::Line { line: index + 1, what })?;
        }
        lines.finish(text)
    }

    /// Operations per second on elements of `dtype`. Storage types are widened before they are computed with.
    pub fn peak(&self, dtype: DType) -> f64 {
        self.data_sheet_peak(dtype) * self.compute_fraction
    }

    /// As [`Profile::peak`], if every operation slot were used.
    pub fn data_sheet_peak(&self, dtype: DType) -> f64 {
        let slot = match (dtype, dtype.class()) {
            (DType::F64, _) => 0,
            (DType::F16, _) => 2,
            (DType::BF16, _) => 3,
            (DType::I8 | DType::U8, _) => 4,
            (_, DTypeClass::Float | DTypeClass::Int | DTypeClass::Uint | DTypeClass::Bool) => 1,
        };
        self.peaks[slot]
    }

    /// Bytes per second that kernels reach.
    pub fn bandwidth(&self) -> f64 {
        self.memory_bandwidth * self.memory_fraction
    }

    /// The rates of measured kernels while `ranks` run at once. Numbers of ranks that were not measured get those of the
    /// nearest that was, slower by as many ranks as there are more of.
    pub fn measured_kernels(&self, ranks: usize) -> Option<Measured> {
        let nearest = self.kernels.keys().copied().min_by_key(|&k| (k.abs_diff(ranks), k))?;
        let mut found = self.kernels.get(&nearest)?.clone();
        let more = (ranks.max(1) as f64 / nearest as f64).max(1.0);
        for rates in found.values_mut() {
            *rates = Rates::from_array(rates.to_array().map(|seconds| seconds * more));
        }
        Some(found)
    }

    /// The profile of one of `ranks`, where ranks share a machine: the machine's operations, bandwidth and memory are
    /// divided between them. Devices of their own stay as they are.
    #[must_use]
    pub fn shared_between(&self, ranks: usize) -> Profile {
        let mut own = self.clone();
        if let Some(kernels) = self.measured_kernels(ranks) {
            own.kernels = BTreeMap::from([(ranks, kernels)]);
        }
        if let Some(measured) = self.shared_ranks {
            let share = measured as f64 / ranks.max(1) as f64;
            own.peaks.iter_mut().for_each(|peak| *peak *= share);
            own.memory_bandwidth *= share;
            own.memory_bytes *= share;
            own.shared_ranks = Some(ranks.max(1));
        }
        own
    }
}

/// What was read so far.
#[derive(Default)]
struct Lines<'a> {
    name: Option<String>,
    numbers: BTreeMap<&'a str, f64>,
    protocols: Vec<Protocol>,
    network: Vec<Protocol>,
    kernels: BTreeMap<usize, Measured>,
}

impl<'a> Lines<'a> {
    fn read(&mut self, line: &'a str) -> Result<(), String> {
        if line.is_empty() || line.starts_with('#') {
            return Ok(());
        }
        let (key, rest) = line.split_once('=').ok_or("no `=`")?;
        let (key, rest) = (key.trim(), rest.trim());
        if key == "name" {
            return match self.name.replace(rest.to_owned()) {
                Some(_) => Err("`name` is given twice".into()),
                None => Ok(()),
            };
        }
        let (value, source) = rest.split_once('|').ok_or_else(|| format!("`{key}` names no source"))?;
        if source.trim().is_empty() {
            return Err(format!("`{key}` names no source"));
        }
        if let Some(protocol) = key.strip_prefix("protocol.") {
            return self.protocol(protocol, value);
        }
        if let Some(kernel) = key.strip_prefix("kernel.") {
            return self.kernel(kernel, value);
        }
        if !SCALARS.iter().chain(&PEAKS).chain(&OPTIONAL).any(|known| *known == key) {
            return Err(format!("`{key}` is not a quantity of a profile"));
        }
        let number = positive(value)?;
        if (key.ends_with("_fraction") || key == "overlap_rate") && number > 1.0 {
            return Err(format!("the share `{key}` is above 1"));
        }
        if key.ends_with("_ranks") {
            count(value)?;
        }
        match self.numbers.insert(key, number) {
            Some(_) => Err(format!("`{key}` is given twice")),
            None => Ok(()),
        }
    }

    fn protocol(&mut self, name: &str, value: &str) -> Result<(), String> {
        let (list, name) = match name.strip_prefix("inter.") {
            Some(name) => (&mut self.network, name),
            None => (&mut self.protocols, name),
        };
        if list.len() >= MAX_PROTOCOLS {
            return Err(format!("more than {MAX_PROTOCOLS} protocols"));
        }
        if name.is_empty() || list.iter().any(|p| p.name == name) {
            return Err(format!("the protocol `{name}` is given twice, or has no name"));
        }
        list.push(Protocol::parse(name, value)?);
        Ok(())
    }

    /// `FAMILY.RANKS`.
    fn kernel(&mut self, name: &str, value: &str) -> Result<(), String> {
        let (family, ranks) = name.split_once('.').ok_or("a kernel is given as `kernel.FAMILY.RANKS`")?;
        let known = Family::of_name(family);
        let family = known.ok_or_else(|| format!("`{family}` is not a family of kernels"))?;
        match self.kernels.entry(count(ranks)?).or_default().insert(family, parse_rates(value)?) {
            Some(_) => Err(format!("`kernel.{name}` is given twice")),
            None => Ok(()),
        }
    }

    fn finish(self, text: &str) -> Result<Profile, ProfileError> {
        let missing = |quantity| ProfileError::Missing { quantity };
        // A machine that was measured for some numbers of ranks needs an answer for the others.
        if !self.protocols.iter().any(|p| p.algorithm == Algorithm::Ring) {
            return Err(missing("protocol.NAME"));
        }
        let optional = |key: &str| self.numbers.get(key).copied();
        let ranks = |key: &str| optional(key).map(|number| number as usize);
        let number = |key: &'static str| optional(key).ok_or(missing(key));
        let mut peaks = [0.0; 5];
        for (slot, key) in peaks.iter_mut().zip(PEAKS) {
            *slot = number(key)?;
        }
        if ranks("node_ranks").is_some() && !self.network.iter().any(|p| p.algorithm == Algorithm::Ring) {
            return Err(missing("protocol.inter.NAME"));
        }
        if ranks("node_ranks").is_none() && !self.network.is_empty() {
            return Err(missing("node_ranks"));
        }
        Ok(Profile {
            memory_bytes: number(SCALARS[0])?,
            memory_bandwidth: number(SCALARS[1])?,
            memory_fraction: number(SCALARS[2])?,
            compute_fraction: number(SCALARS[3])?,
            kernel_launch: number(SCALARS[4])?,
            step_overhead: optional("step_overhead").unwrap_or(0.0),
            shared_ranks: ranks("shared_ranks"),
            node_ranks: ranks("node_ranks"),
            kernels: self.kernels,
            cache_bytes: optional("cache_bytes"),
            overlap_rate: optional("overlap_rate"),
            peaks,
            name: self.name.ok_or(missing("name"))?,
            protocols: self.protocols,
            network: self.network,
            text: text.to_owned(),
        })
    }
}

pub(super) fn positive(text: &str) -> Result<f64, String> {
    let text = text.trim();
    match text.parse::<f64>() {
        Ok(number) if number.is_finite() && number > 0.0 => Ok(number),
        Ok(_) => Err(format!("`{text}` is not above zero")),
        Err(_) => Err(format!("`{text}` is not a number")),
    }
}

fn count(text: &str) -> Result<usize, String> {
    let text = text.trim();
    match text.parse::<usize>() {
        Ok(number) if (1..=1024).contains(&number) => Ok(number),
        _ => Err(format!("`{text}` is not a number of ranks from 1 to 1024")),
    }
}
