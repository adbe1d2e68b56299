//! Hardware profiles: what one device and the links between devices can do.
//!
//! A profile is a text file of `quantity = value | source` lines, so that every number says where it comes from. Some
//! are built in; any other can be read from a file.

use std::collections::BTreeMap;
use tpshard_ir::{DType, DTypeClass};

/// The profiles that are built in: name and text.
const BUILT_IN: &[(&str, &str)] = &[
    ("a100-pcie-80", include_str!("../../profiles/a100-pcie-80.txt")),
    ("a100-sxm-80", include_str!("../../profiles/a100-sxm-80.txt")),
    ("cpu-shm", include_str!("../../profiles/cpu-shm.txt")),
    ("h100-pcie", include_str!("../../profiles/h100-pcie.txt")),
    ("h100-sxm", include_str!("../../profiles/h100-sxm.txt")),
    ("h200-sxm", include_str!("../../profiles/h200-sxm.txt")),
    ("l4", include_str!("../../profiles/l4.txt")),
];

/// The most protocols a profile may list.
const MAX_PROTOCOLS: usize = 16;

/// One way the communicator carries a collective; the fastest for a size is used.
///
/// A collective of `s` ring steps that moves `B` bytes past each rank takes `base + s * step + B / bandwidth`.
#[derive(Clone, Debug, PartialEq)]
pub struct Protocol {
    pub name: String,
    /// Seconds before the first byte.
    pub base: f64,
    /// Seconds per ring step.
    pub step: f64,
    /// Bytes per second and direction.
    pub bandwidth: f64,
}

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
    pub protocols: Vec<Protocol>,
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
}

const PEAKS: [&str; 5] = ["peak.f64", "peak.f32", "peak.f16", "peak.bf16", "peak.i8"];
const SCALARS: [&str; 5] =
    ["memory_bytes", "memory_bandwidth", "memory_fraction", "compute_fraction", "kernel_launch"];

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
        match BUILT_IN.iter().find(|(known, _)| *known == name) {
            Some((_, text)) => Profile::parse(text),
            None => Err(ProfileError::Unknown { name: name.into() }),
        }
    }

    /// Reads the text of a profile file.
    ///
    /// # Errors
    /// A line that is not understood, a number out of range, or a quantity that is missing.
    pub fn parse(text: &str) -> Result<Profile, ProfileError> {
        let mut name = None;
        let mut numbers: BTreeMap<&str, f64> = BTreeMap::new();
        let mut protocols = Vec::new();
        for (index, raw) in text.lines().enumerate() {
            let fail = |what: String| ProfileError::Line { line: index + 1, what };
            let line = raw.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let (key, rest) = line.split_once('=').ok_or_else(|| fail("no `=`".into()))?;
            let (key, rest) = (key.trim(), rest.trim());
            if key == "name" {
                name = Some(rest.to_owned());
                continue;
            }
            let (value, source) =
                rest.split_once('|').ok_or_else(|| fail(format!("`{key}` names no source")))?;
            if source.trim().is_empty() {
                return Err(fail(format!("`{key}` names no source")));
            }
            if let Some(protocol) = key.strip_prefix("protocol.") {
                if protocols.len() >= MAX_PROTOCOLS {
                    return Err(fail(format!("more than {MAX_PROTOCOLS} protocols")));
                }
                protocols.push(parse_protocol(protocol, value).map_err(fail)?);
                continue;
            }
            let known = SCALARS.iter().chain(&PEAKS).any(|k| *k == key);
            if !known {
                return Err(fail(format!("`{key}` is not a quantity of a profile")));
            }
            let number = positive(value).map_err(&fail)?;
            if key.ends_with("_fraction") && number > 1.0 {
                return Err(fail(format!("the share `{key}` is above 1")));
            }
            if numbers.insert(key, number).is_some() {
                return Err(fail(format!("`{key}` is given twice")));
            }
        }
        if protocols.is_empty() {
            return Err(ProfileError::Missing { quantity: "protocol.NAME" });
        }
        let number =
            |quantity: &'static str| numbers.get(quantity).copied().ok_or(ProfileError::Missing { quantity });
        let mut peaks = [0.0; 5];
        for (slot, key) in peaks.iter_mut().zip(PEAKS) {
            *slot = number(key)?;
        }
        Ok(Profile {
            name: name.ok_or(ProfileError::Missing { quantity: "name" })?,
            memory_bytes: number(SCALARS[0])?,
            memory_bandwidth: number(SCALARS[1])?,
            memory_fraction: number(SCALARS[2])?,
            compute_fraction: number(SCALARS[3])?,
            kernel_launch: number(SCALARS[4])?,
            peaks,
            protocols,
            text: text.to_owned(),
        })
    }

    /// Operations per second on elements of `dtype`. Storage types are widened before they are computed with.
    pub fn peak(&self, dtype: DType) -> f64 {
        let slot = match (dtype, dtype.class()) {
            (DType::F64, _) => 0,
            (DType::F16, _) => 2,
            (DType::BF16, _) => 3,
            (DType::I8 | DType::U8, _) => 4,
            (_, DTypeClass::Float | DTypeClass::Int | DTypeClass::Uint | DTypeClass::Bool) => 1,
        };
        self.peaks[slot] * self.compute_fraction
    }

    /// Bytes per second that kernels reach.
    pub fn bandwidth(&self) -> f64 {
        self.memory_bandwidth * self.memory_fraction
    }

    /// Seconds for a collective of `steps` ring steps that moves `bytes` past each rank.
    pub fn collective(&self, steps: f64, bytes: f64) -> f64 {
        let time = |p: &Protocol| p.base + steps * p.step + bytes / p.bandwidth;
        self.protocols.iter().map(time).fold(f64::INFINITY, f64::min)
    }
}

fn positive(text: &str) -> Result<f64, String> {
    let text = text.trim();
    match text.parse::<f64>() {
        Ok(number) if number.is_finite() && number > 0.0 => Ok(number),
        Ok(_) => Err(format!("`{text}` is not above zero")),
        Err(_) => Err(format!("`{text}` is not a number")),
    }
}

fn parse_protocol(name: &str, text: &str) -> Result<Protocol, String> {
    let words: Vec<&str> = text.split_whitespace().collect();
    match words.as_slice() {
        ["base", base, "step", step, "bandwidth", bandwidth] => Ok(Protocol {
            name: name.to_owned(),
            base: positive(base)?,
            step: positive(step)?,
            bandwidth: positive(bandwidth)?,
        }),
        _ => Err("a protocol reads `base SECONDS step SECONDS bandwidth BYTES_PER_SECOND`".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn built_in_profiles_carry_their_names_and_are_sorted() {
        for name in Profile::names() {
            let profile = Profile::built_in(name).unwrap();
            assert_eq!(profile.name, name);
            assert!(profile.bandwidth() < profile.memory_bandwidth);
        }
        assert!(Profile::names().is_sorted());
    }

    #[test]
    fn dense_peaks_of_h200_are_those_of_h100() {
        let (a, b) = (Profile::built_in("h100-sxm").unwrap(), Profile::built_in("h200-sxm").unwrap());
        assert_eq!(a.peak(DType::BF16), b.peak(DType::BF16));
        assert!(a.peak(DType::F32) < a.peak(DType::F16));
    }

    #[test]
    fn the_fastest_protocol_for_a_size_is_used() {
        let profile = Profile::built_in("h100-sxm").unwrap();
        let small = profile.collective(2.0, 8192.0);
        assert!((small - (6.6e-6 + 1.2e-6 + 8192.0 / 141e9)).abs() < 1e-15);
        let large = profile.collective(2.0, 1e9);
        assert!((large - (8.4e-6 + 6.8e-6 + 1e9 / 370e9)).abs() < 1e-12);
    }

    #[test]
    fn wrong_lines_are_named() {
        let good = BUILT_IN[0].1;
        let with = |line: &str| Profile::parse(&format!("{line}\n{good}"));
        for bad in [
            "speed = 1 | guess",
            "memory_bytes = 1",
            "memory_bytes = 1 | ",
            "memory_bytes = -1 | guess",
            "memory_bytes = inf | guess",
            "memory_fraction = 1.5 | guess",
            "memory_bytes",
            "protocol.x = base 1 step 1 | guess",
        ] {
            assert!(matches!(with(bad), Err(ProfileError::Line { line: 1, .. })), "{bad}");
        }
        // The second mention is the one in the file proper.
        assert!(matches!(with("memory_bytes = 1 | guess"), Err(ProfileError::Line { line: 6, .. })));
        let without = |key: &str| {
            let text: Vec<&str> = good.lines().filter(|l| !l.starts_with(key)).collect();
            Profile::parse(&text.join("\n"))
        };
        for key in ["name", "memory_bytes", "peak.f32", "protocol."] {
            assert!(matches!(without(key), Err(ProfileError::Missing { .. })), "{key}");
        }
        assert!(matches!(Profile::built_in("abacus"), Err(ProfileError::Unknown { .. })));
    }
}
