//! Quantities and names as people read them: one spelling wherever a plan or a program is described.

use std::fmt;

/// A number of bytes with a binary unit: `12.30 MiB`.
pub struct Bytes(pub u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scales = [(1u64 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
        match scales.iter().find(|(scale, _)| self.0 >= *scale) {
            Some((scale, unit)) => f.pad(&format!("{:.2} {unit}", self.0 as f64 / *scale as f64)),
            None => f.pad(&format!("{} B", self.0)),
        }
    }
}

/// A time with its unit: `12.30 µs`.
pub struct Seconds(pub f64);

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (value, unit) = match self.0 {
            s if s >= 1.0 => (s, "s"),
            s if s >= 1e-3 => (s * 1e3, "ms"),
            s => (s * 1e6, "µs"),
        };
        f.pad(&format!("{value:.2} {unit}"))
    }
}

/// `layers.12.w` and `layers.3.w` are one kind: runs of digits become `*`.
pub fn without_numbers(name: &str) -> String {
    let mut text = String::with_capacity(name.len());
    for c in name.chars() {
        match (c.is_ascii_digit(), text.ends_with('*')) {
            (true, true) => {}
            (true, false) => text.push('*'),
            (false, _) => text.push(c),
        }
    }
    text
}
