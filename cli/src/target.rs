//! What programs are built for, as `--target` says it.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

/// What `cuda` alone stands for: a card of each generation that is in use.
const USUAL_ARCHITECTURES: [u32; 3] = [80, 90, 100];
/// Most architectures of one build.
const MOST_ARCHITECTURES: usize = 8;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    Cpu,
    /// Compute capabilities, ascending: 90 for `sm_90`.
    Cuda(BTreeSet<u32>),
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Target, String> {
        let list = match text {
            "auto" | "cpu" => return Ok(Target::Cpu),
            "cuda" => return Ok(Target::Cuda(USUAL_ARCHITECTURES.into())),
            _ => text.strip_prefix("cuda:").ok_or("targets are auto, cpu, cuda, and cuda:sm_90,…")?,
        };
        let architecture = |word: &str| {
            let number = word.trim().strip_prefix("sm_").and_then(|number| number.parse::<u32>().ok());
            let known = number.filter(|number| (50..1000).contains(number));
            known.ok_or_else(|| format!("`{word}` is not an architecture such as sm_90"))
        };
        let all = list.split(',').map(architecture).collect::<Result<BTreeSet<u32>, String>>()?;
        if all.len() > MOST_ARCHITECTURES {
            return Err(format!("{} architectures, at most {MOST_ARCHITECTURES} are possible", all.len()));
        }
        Ok(Target::Cuda(all))
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Target::Cpu => f.write_str("cpu"),
            Target::Cuda(all) => {
                let all: Vec<String> = all.iter().map(|arch| format!("sm_{arch}")).collect();
                write!(f, "cuda:{}", all.join(","))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_read_and_written() {
        for (text, expected) in [
            ("auto", "cpu"),
            ("cpu", "cpu"),
            ("cuda", "cuda:sm_80,sm_90,sm_100"),
            ("cuda:sm_90,sm_80,sm_90", "cuda:sm_80,sm_90"),
        ] {
            assert_eq!(text.parse::<Target>().unwrap().to_string(), expected);
        }
        for wrong in ["", "gpu", "cuda:", "cuda:90", "cuda:sm_", "cuda:sm_9", "cuda:sm_90a", "cuda:sm_90,,"] {
            assert!(wrong.parse::<Target>().is_err(), "{wrong}");
        }
    }
}
