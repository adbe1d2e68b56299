//! Measured kernels: what a machine that was calibrated says of the families of kernels its ranks run.
//!
//! A node is an amount of [`Work`] for one [`Family`]: calls, tasks, elements, operations, bytes. Its time is linear in
//! them, and a calibration finds the [`Rates`] by running small programs whose work it counts with the same functions.
//! Profiles without measured kernels, all built-in ones, are priced by the roofline instead.

mod work;

pub use work::{Look, Sizes, work, work_of};

use std::collections::BTreeMap;

macro_rules! families {
    ($($(#[$doc:meta])* $variant:ident $name:literal;)*) => {
        /// Kernels whose time grows with the same quantities.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Family { $($(#[$doc])* $variant,)* }

        impl Family {
            pub const ALL: &'static [Family] = &[$(Family::$variant,)*];

            /// The name in a profile.
            pub fn name(self) -> &'static str {
                match self { $(Family::$variant => $name,)* }
            }
        }
    };
}

families! {
    /// A product of several rows with a weight. Operations; elements of rows and result; bytes of the weight.
    Product "product";
    /// A product of one row with a weight. Bytes of the weight.
    Vector "vector";
    /// Products of two computed operands. Tasks are products; elements of operands and results.
    Batched "batched";
    /// Tasks are runs of neighbours that are gathered, elements what is; bytes of the filters.
    Convolution "convolution";
    /// Elements are those under all windows.
    Pool "pool";
    /// Of several queries. Tasks are heads; elements are scores.
    Attention "attention";
    /// Of one query: keys and values are only read.
    Query "query";
    /// Elements per function and operand; tasks are runs of neighbours; operations are transcendental functions.
    Elementwise "elementwise";
    /// Tasks are rows.
    Softmax "softmax";
    /// Tasks are rows.
    Norm "norm";
    /// Tasks are rows.
    Rotary "rotary";
    /// Tasks are results.
    Reduce "reduce";
    /// Concatenations, gathers, pads. Tasks are runs of neighbours; bytes read and written.
    Move "move";
    /// A copy of elements that do not lie next to each other.
    Copy "copy";
    /// A quantised weight widened in every step.
    Widen "widen";
    /// Another shape or order of elements that stay where they are.
    View "view";
    /// The reference interpreter. Operations, and elements of operands and result.
    Reference "reference";
    /// Ranks that wait for one another at a collective, beyond what it takes among ranks that do nothing else. Calls.
    Meeting "meeting";
    /// A step as such. Tasks are inputs, bytes are theirs, which every rank gets; elements are those of outputs.
    Step "step";
}

impl Family {
    pub fn of_name(name: &str) -> Option<Family> {
        Family::ALL.iter().copied().find(|f| f.name() == name)
    }
}

/// What the time of a kernel is proportional to. The same struct holds amounts and seconds for one of each.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Quantities {
    pub call: f64,
    pub task: f64,
    pub element: f64,
    pub operation: f64,
    pub byte: f64,
}

/// Seconds for one of each quantity.
pub type Rates = Quantities;

impl Quantities {
    pub const NAMES: [&'static str; 5] = ["call", "task", "element", "operation", "byte"];

    pub fn to_array(self) -> [f64; 5] {
        [self.call, self.task, self.element, self.operation, self.byte]
    }

    pub fn from_array([call, task, element, operation, byte]: [f64; 5]) -> Quantities {
        Quantities { call, task, element, operation, byte }
    }

    /// `factor` times `other` more.
    #[must_use]
    pub fn plus(self, other: Quantities, factor: f64) -> Quantities {
        let mut sum = self.to_array();
        sum.iter_mut().zip(other.to_array()).for_each(|(a, b)| *a += factor * b);
        Quantities::from_array(sum)
    }

    #[must_use]
    pub fn over(self, divisor: f64) -> Quantities {
        Quantities::from_array(self.to_array().map(|amount| amount / divisor))
    }

    /// The sum of the products.
    pub fn dot(self, rates: Rates) -> f64 {
        self.to_array().iter().zip(rates.to_array()).map(|(amount, rate)| amount * rate).sum()
    }
}

/// An amount of work for one family.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Work {
    pub family: Family,
    pub amounts: Quantities,
}

/// Rates by family, while so many ranks run at once.
pub type Measured = BTreeMap<Family, Rates>;

/// Reads `call 1e-6 operation 2e-11`: what is not named costs nothing.
pub(super) fn parse_rates(text: &str) -> Result<Rates, String> {
    let mut rates = [0.0; 5];
    let mut words = text.split_whitespace();
    let mut any = false;
    while let Some(name) = words.next() {
        let slot = Quantities::NAMES.iter().position(|n| *n == name);
        let slot = slot.ok_or_else(|| format!("`{name}` is not one of {}", Quantities::NAMES.join(", ")))?;
        let number = words.next().ok_or_else(|| format!("`{name}` has no number"))?;
        let seconds = super::profile::positive(number)?;
        match rates.get_mut(slot) {
            Some(rate) if *rate == 0.0 => *rate = seconds,
            _ => return Err(format!("`{name}` is given twice")),
        }
        any = true;
    }
    if any { Ok(Quantities::from_array(rates)) } else { Err("no rate is given".into()) }
}

/// What [`parse_rates`] reads.
pub fn print_rates(rates: Rates) -> String {
    let named = Quantities::NAMES.iter().zip(rates.to_array()).filter(|(_, rate)| *rate > 0.0);
    named.map(|(name, rate)| format!("{name} {rate:.3e}")).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_read_as_they_are_printed() {
        let rates = Rates { call: 1.5e-6, operation: 2e-11, ..Rates::default() };
        assert_eq!(parse_rates(&print_rates(rates)), Ok(rates));
    }

    #[test]
    fn rates_that_are_wrong_say_so() {
        for (text, what) in [
            ("", "no rate is given"),
            ("call", "`call` has no number"),
            ("call 1 call 2", "`call` is given twice"),
            ("flop 1", "`flop` is not one of"),
            ("call -1", "not above zero"),
        ] {
            let error = parse_rates(text).unwrap_err();
            assert!(error.contains(what), "{text}: {error}");
        }
    }

    #[test]
    fn families_have_names_of_their_own() {
        for family in Family::ALL {
            assert_eq!(Family::of_name(family.name()), Some(*family));
        }
    }
}
