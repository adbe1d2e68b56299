//! Symbolic dimensions: integer expressions over named symbols, kept in one normal form so that `==` decides most of
//! what shape inference and sharding ask.
//!
//! A `Dim` is a polynomial with integer coefficients over *atoms*: symbols, floor divisions, minima and maxima of
//! other dims. `ceildiv(a, b)` is `floordiv(a + b - 1, b)` and `mod(a, b)` is `a - b * floordiv(a, b)`, so neither
//! needs an atom of its own. Symbols are sizes and therefore at least zero; divisors are assumed positive, and
//! evaluation checks it. Arithmetic saturates: an absurd size stays absurd and is refused where sizes are limited.

use crate::text::quote_with;
use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::{Add, Mul, Neg, Sub};
use std::sync::Arc;

/// A symbolic integer, usually the extent of a tensor dimension.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Dim(Arc<[Term]>);

/// `coefficient * product of atoms`; the constant term has no atoms.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Term {
    atoms: Vec<Atom>,
    coefficient: i64,
}

#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Atom {
    Symbol(Arc<str>),
    FloorDiv(Dim, Dim),
    Min(Dim, Dim),
    Max(Dim, Dim),
}

/// Values of symbols, by name.
pub type Bindings = BTreeMap<Arc<str>, i64>;

/// Why a dim has no value under some bindings.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum EvalError {
    #[error("dim symbol `{0}` has no value")]
    Unbound(Arc<str>),
    #[error("dim `{0}` divides by {1}")]
    Divisor(String, i64),
    #[error("dim `{0}` overflows")]
    Overflow(String),
}

type Poly = BTreeMap<Vec<Atom>, i64>;

impl Dim {
    /// A constant.
    pub fn constant(value: i64) -> Dim {
        if value == 0 {
            return Dim(Arc::new([]));
        }
        Dim(Arc::new([Term { atoms: vec![], coefficient: value }]))
    }

    /// A named symbol, at least zero.
    pub fn symbol(name: &str) -> Dim {
        Dim::atom(Atom::Symbol(name.into()))
    }

    fn atom(atom: Atom) -> Dim {
        Dim(Arc::new([Term { atoms: vec![atom], coefficient: 1 }]))
    }

    fn poly(&self) -> Poly {
        self.0.iter().map(|t| (t.atoms.clone(), t.coefficient)).collect()
    }

    fn from_poly(poly: Poly) -> Dim {
        Dim(poly
            .into_iter()
            .filter(|(_, c)| *c != 0)
            .map(|(atoms, coefficient)| Term { atoms, coefficient })
            .collect())
    }

    /// The value, if the dim has no symbols left.
    pub fn as_const(&self) -> Option<i64> {
        match &*self.0 {
            [] => Some(0),
            [Term { atoms, coefficient }] if atoms.is_empty() => Some(*coefficient),
            _ => None,
        }
    }

    /// The constant as a size; `None` if symbolic or negative.
    pub fn as_size(&self) -> Option<usize> {
        self.as_const().and_then(|c| usize::try_from(c).ok())
    }

    /// The name, if the dim is exactly one symbol.
    pub fn as_symbol(&self) -> Option<&Arc<str>> {
        match &*self.0 {
            [Term { atoms, coefficient: 1 }] => match atoms.as_slice() {
                [Atom::Symbol(name)] => Some(name),
                _ => None,
            },
            _ => None,
        }
    }

    /// The two sides, if the dim is exactly the minimum of two.
    pub fn as_minimum(&self) -> Option<(&Dim, &Dim)> {
        match &*self.0 {
            [Term { atoms, coefficient: 1 }] => match atoms.as_slice() {
                [Atom::Min(a, b)] => Some((a, b)),
                _ => None,
            },
            _ => None,
        }
    }

    pub fn is_one(&self) -> bool {
        self.as_const() == Some(1)
    }

    pub fn is_zero(&self) -> bool {
        self.0.is_empty()
    }

    /// True if the value is at least zero for every assignment of sizes to symbols, as far as signs show.
    pub fn is_nonnegative(&self) -> bool {
        self.0.iter().all(|t| t.coefficient >= 0 && t.atoms.iter().all(Atom::is_nonnegative))
    }

    /// Rounds towards minus infinity. `divisor` is assumed positive.
    pub fn floor_div(&self, divisor: &Dim) -> Dim {
        if divisor.is_one() {
            return self.clone();
        }
        if let (Some(a), Some(b)) = (self.as_const(), divisor.as_const())
            && b > 0
        {
            return Dim::constant(a.div_euclid(b));
        }
        if let Some(quotient) = self.exact_div(divisor) {
            return quotient;
        }
        self.split_constant_division(divisor).unwrap_or_else(|| {
            // floordiv(floordiv(a, b), c) = floordiv(a, b * c)
            if let [Term { atoms, coefficient: 1 }] = &*self.0
                && let [Atom::FloorDiv(inner, by)] = atoms.as_slice()
            {
                return inner.floor_div(&(by * divisor));
            }
            Dim::atom(Atom::FloorDiv(self.clone(), divisor.clone()))
        })
    }

    /// `floordiv(c*q + r, c) = q + floordiv(r, c)` for a constant `c`, when some terms divide.
    fn split_constant_division(&self, divisor: &Dim) -> Option<Dim> {
        let by = divisor.as_const().filter(|b| *b > 1)?;
        let (mut quotient, mut rest) = (Poly::new(), Poly::new());
        for (atoms, coefficient) in self.poly() {
            let whole = coefficient.div_euclid(by);
            if coefficient % by == 0 || atoms.is_empty() {
                quotient.insert(atoms.clone(), whole);
            }
            let left = if atoms.is_empty() { coefficient.rem_euclid(by) } else { coefficient };
            if coefficient % by != 0 {
                rest.insert(atoms, left);
            }
        }
        let (quotient, rest) = (Dim::from_poly(quotient), Dim::from_poly(rest));
        (!quotient.is_zero()).then(|| quotient + rest.floor_div(divisor))
    }

    /// Rounds up. `divisor` is assumed positive.
    pub fn ceil_div(&self, divisor: &Dim) -> Dim {
        (self + divisor - Dim::constant(1)).floor_div(divisor)
    }

    /// The remainder of [`Dim::floor_div`].
    pub fn modulo(&self, divisor: &Dim) -> Dim {
        self - &(divisor * &self.floor_div(divisor))
    }

    pub fn minimum(&self, other: &Dim) -> Dim {
        match self.compare(other) {
            Some(Ordering::Less | Ordering::Equal) => self.clone(),
            Some(Ordering::Greater) => other.clone(),
            None => {
                let (a, b) = if self <= other { (self, other) } else { (other, self) };
                Dim::atom(Atom::Min(a.clone(), b.clone()))
            }
        }
    }

    pub fn maximum(&self, other: &Dim) -> Dim {
        match self.compare(other) {
            Some(Ordering::Less | Ordering::Equal) => other.clone(),
            Some(Ordering::Greater) => self.clone(),
            None => {
                let (a, b) = if self <= other { (self, other) } else { (other, self) };
                Dim::atom(Atom::Max(a.clone(), b.clone()))
            }
        }
    }

    /// The order of two dims where it holds for every assignment; ties count as `Less` or `Greater` both ways only
    /// if they may differ elsewhere.
    pub fn compare(&self, other: &Dim) -> Option<Ordering> {
        if self == other {
            return Some(Ordering::Equal);
        }
        if (other - self).is_nonnegative() {
            return Some(Ordering::Less);
        }
        (self - other).is_nonnegative().then_some(Ordering::Greater)
    }

    /// The quotient if `divisor` divides this polynomial exactly (multivariate long division).
    pub fn exact_div(&self, divisor: &Dim) -> Option<Dim> {
        let lead = divisor.0.last()?;
        if let (Some(whole), Some(part)) = (self.as_const(), divisor.as_const()) {
            return (whole.checked_rem(part) == Some(0)).then(|| Dim::constant(whole.saturating_div(part)));
        }
        let mut rest = self.poly();
        let mut quotient = Poly::new();
        while let Some((atoms, coefficient)) = rest.last_key_value().map(|(a, c)| (a.clone(), *c)) {
            let monomial = remove_all(&atoms, &lead.atoms)?;
            // The least number divided by -1 has no value.
            if coefficient.checked_rem(lead.coefficient)? != 0 || quotient.len() > 64 {
                return None;
            }
            let factor = coefficient.checked_div(lead.coefficient)?;
            let entry = quotient.entry(monomial.clone()).or_default();
            *entry = entry.saturating_add(factor);
            for term in divisor.0.iter() {
                let key = merge(&monomial, &term.atoms);
                let entry = rest.entry(key.clone()).or_default();
                *entry = entry.saturating_sub(term.coefficient.saturating_mul(factor));
                if *entry == 0 {
                    rest.remove(&key);
                } else if key >= atoms {
                    return None;
                }
            }
        }
        Some(Dim::from_poly(quotient))
    }

    /// The value under `bindings`.
    ///
    /// # Errors
    /// A symbol without value, a divisor that is not positive, or overflow.
    pub fn eval(&self, bindings: &Bindings) -> Result<i64, EvalError> {
        let overflow = || EvalError::Overflow(self.to_string());
        let mut sum = 0i64;
        for term in self.0.iter() {
            let mut product = term.coefficient;
            for atom in &term.atoms {
                product = product.checked_mul(atom.eval(bindings)?).ok_or_else(overflow)?;
            }
            sum = sum.checked_add(product).ok_or_else(overflow)?;
        }
        Ok(sum)
    }

    /// Replaces symbols; names that `replace` maps to `None` stay.
    pub fn substitute(&self, replace: &dyn Fn(&str) -> Option<Dim>) -> Dim {
        if self.as_const().is_some() {
            return self.clone();
        }
        self.0.iter().fold(Dim::constant(0), |sum, term| {
            let product = term.atoms.iter().fold(Dim::constant(term.coefficient), |product, atom| {
                product
                    * match atom {
                        Atom::Symbol(name) => replace(name).unwrap_or_else(|| Dim::atom(atom.clone())),
                        Atom::FloorDiv(a, b) => a.substitute(replace).floor_div(&b.substitute(replace)),
                        Atom::Min(a, b) => a.substitute(replace).minimum(&b.substitute(replace)),
                        Atom::Max(a, b) => a.substitute(replace).maximum(&b.substitute(replace)),
                    }
            });
            sum + product
        })
    }

    /// Every `x` of which this takes `max(0, x)`, outermost first.
    pub fn clamped(&self) -> Vec<Dim> {
        let mut found = Vec::new();
        for atom in self.0.iter().flat_map(|term| &term.atoms) {
            let (Atom::FloorDiv(a, b) | Atom::Min(a, b) | Atom::Max(a, b)) = atom else { continue };
            if let (Atom::Max(..), Some(inner)) =
                (atom, [(a, b), (b, a)].iter().find(|pair| pair.0.is_zero()))
            {
                found.push(inner.1.clone());
            }
            found.extend(a.clamped());
            found.extend(b.clamped());
        }
        found
    }

    /// `x` in place of `max(0, x)`, where `x` is known to be at least zero.
    pub fn unclamped(&self, x: &Dim) -> Dim {
        if self.as_const().is_some() {
            return self.clone();
        }
        self.0.iter().fold(Dim::constant(0), |sum, term| {
            let product = term.atoms.iter().fold(Dim::constant(term.coefficient), |product, atom| {
                product
                    * match atom {
                        Atom::Symbol(_) => Dim::atom(atom.clone()),
                        Atom::FloorDiv(a, b) => a.unclamped(x).floor_div(&b.unclamped(x)),
                        Atom::Min(a, b) => a.unclamped(x).minimum(&b.unclamped(x)),
                        Atom::Max(a, b) if (a.is_zero() && b == x) || (b.is_zero() && a == x) => x.clone(),
                        Atom::Max(a, b) => a.unclamped(x).maximum(&b.unclamped(x)),
                    }
            });
            sum + product
        })
    }

    /// The symbols the value depends on.
    pub fn symbols(&self) -> BTreeSet<Arc<str>> {
        let mut found = BTreeSet::new();
        self.collect_symbols(&mut found);
        found
    }

    fn collect_symbols(&self, found: &mut BTreeSet<Arc<str>>) {
        for atom in self.0.iter().flat_map(|t| &t.atoms) {
            match atom {
                Atom::Symbol(name) => {
                    found.insert(name.clone());
                }
                Atom::FloorDiv(a, b) | Atom::Min(a, b) | Atom::Max(a, b) => {
                    a.collect_symbols(found);
                    b.collect_symbols(found);
                }
            }
        }
    }

    /// Product of many dims.
    pub fn product<'a>(dims: impl IntoIterator<Item = &'a Dim>) -> Dim {
        dims.into_iter().fold(Dim::constant(1), |product, d| product * d.clone())
    }
}

impl Atom {
    fn is_nonnegative(&self) -> bool {
        match self {
            Atom::Symbol(_) => true,
            Atom::FloorDiv(a, b) => a.is_nonnegative() && b.is_nonnegative(),
            Atom::Min(a, b) => a.is_nonnegative() && b.is_nonnegative(),
            Atom::Max(a, b) => a.is_nonnegative() || b.is_nonnegative(),
        }
    }

    fn eval(&self, bindings: &Bindings) -> Result<i64, EvalError> {
        match self {
            Atom::Symbol(name) => bindings.get(name).copied().ok_or_else(|| EvalError::Unbound(name.clone())),
            Atom::FloorDiv(a, b) => {
                let (value, by) = (a.eval(bindings)?, b.eval(bindings)?);
                if by <= 0 {
                    return Err(EvalError::Divisor(Dim::atom(self.clone()).to_string(), by));
                }
                Ok(value.div_euclid(by))
            }
            Atom::Min(a, b) => Ok(a.eval(bindings)?.min(b.eval(bindings)?)),
            Atom::Max(a, b) => Ok(a.eval(bindings)?.max(b.eval(bindings)?)),
        }
    }
}

/// The sorted multiset `from` without the elements of `what`; `None` if one is missing.
fn remove_all(from: &[Atom], what: &[Atom]) -> Option<Vec<Atom>> {
    let mut left = from.to_vec();
    for atom in what {
        let at = left.iter().position(|a| a == atom)?;
        left.remove(at);
    }
    Some(left)
}

fn merge(a: &[Atom], b: &[Atom]) -> Vec<Atom> {
    let mut all: Vec<Atom> = a.iter().chain(b).cloned().collect();
    all.sort();
    all
}

impl Add for &Dim {
    type Output = Dim;
    fn add(self, other: &Dim) -> Dim {
        let mut sum = self.poly();
        for term in other.0.iter() {
            let entry = sum.entry(term.atoms.clone()).or_default();
            *entry = entry.saturating_add(term.coefficient);
        }
        Dim::from_poly(sum)
    }
}

impl Mul for &Dim {
    type Output = Dim;
    fn mul(self, other: &Dim) -> Dim {
        let mut product = Poly::new();
        for a in self.0.iter() {
            for b in other.0.iter() {
                let entry = product.entry(merge(&a.atoms, &b.atoms)).or_default();
                *entry = entry.saturating_add(a.coefficient.saturating_mul(b.coefficient));
            }
        }
        Dim::from_poly(product)
    }
}

impl Neg for &Dim {
    type Output = Dim;
    fn neg(self) -> Dim {
        self * &Dim::constant(-1)
    }
}

impl Sub for &Dim {
    type Output = Dim;
    fn sub(self, other: &Dim) -> Dim {
        self + &-other
    }
}

macro_rules! by_value {
    ($($trait:ident $method:ident),*) => {$(
        impl $trait for Dim {
            type Output = Dim;
            fn $method(self, other: Dim) -> Dim { (&self).$method(&other) }
        }
        impl $trait<Dim> for &Dim {
            type Output = Dim;
            fn $method(self, other: Dim) -> Dim { self.$method(&other) }
        }
        impl $trait<&Dim> for Dim {
            type Output = Dim;
            fn $method(self, other: &Dim) -> Dim { (&self).$method(other) }
        }
    )*};
}
by_value!(Add add, Mul mul, Sub sub);

impl From<i64> for Dim {
    fn from(value: i64) -> Dim {
        Dim::constant(value)
    }
}

impl From<usize> for Dim {
    fn from(value: usize) -> Dim {
        Dim::constant(i64::try_from(value).unwrap_or(i64::MAX))
    }
}

/// True if the name can stand unquoted in `.tir` text.
pub fn is_plain_symbol(name: &str) -> bool {
    let mut chars = name.chars();
    chars.next().is_some_and(|c| c.is_ascii_alphabetic() || c == '_')
        && chars.all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '.')
        && !matches!(name, "floordiv" | "ceildiv" | "mod" | "min" | "max")
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("0");
        }
        // Constants last reads like a person would write it.
        let terms =
            self.0.iter().filter(|t| !t.atoms.is_empty()).chain(self.0.iter().filter(|t| t.atoms.is_empty()));
        for (i, term) in terms.enumerate() {
            let sign = match (i, term.coefficient < 0) {
                (0, true) => "-",
                (0, false) => "",
                (_, true) => " - ",
                (_, false) => " + ",
            };
            write!(f, "{sign}")?;
            let magnitude = term.coefficient.unsigned_abs();
            if magnitude != 1 || term.atoms.is_empty() {
                write!(f, "{magnitude}")?;
            }
            for (j, atom) in term.atoms.iter().enumerate() {
                if j > 0 || magnitude != 1 {
                    f.write_str("*")?;
                }
                write!(f, "{atom}")?;
            }
        }
        Ok(())
    }
}

impl fmt::Display for Atom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Atom::Symbol(name) if is_plain_symbol(name) => f.write_str(name),
            Atom::Symbol(name) => f.write_str(&quote_with('`', name)),
            Atom::FloorDiv(a, b) => write!(f, "floordiv({a}, {b})"),
            Atom::Min(a, b) => write!(f, "min({a}, {b})"),
            Atom::Max(a, b) => write!(f, "max({a}, {b})"),
        }
    }
}

impl fmt::Debug for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn s(name: &str) -> Dim {
        Dim::symbol(name)
    }
    fn c(value: i64) -> Dim {
        Dim::constant(value)
    }

    #[test]
    fn normal_form_decides_equality() {
        assert_eq!((s("b") + s("s")) * c(2), c(2) * s("s") + s("b") * c(2));
        assert_eq!(&(s("b") * s("s") * c(64)).floor_div(&(s("s") * c(16))), &(s("b") * c(4)));
        assert_eq!(
            ((s("past") + s("seq")) * s("b") * c(8)).floor_div(&(s("past") + s("seq"))),
            s("b") * c(8)
        );
        assert_eq!((s("s") * c(4) + c(7)).floor_div(&c(4)), s("s") + c(1));
        assert_eq!(s("s").modulo(&c(4)) + c(4) * s("s").floor_div(&c(4)), s("s"));
        assert_eq!(s("s").floor_div(&c(2)).floor_div(&c(3)), s("s").floor_div(&c(6)));
    }

    #[test]
    fn minimum_is_resolved_when_signs_decide() {
        assert_eq!((s("past") + s("seq")).minimum(&s("past")), s("past"));
        assert_eq!(s("a").minimum(&s("b")), s("b").minimum(&s("a")));
        assert_eq!(c(3).maximum(&c(5)), c(5));
    }

    #[test]
    fn evaluation_reports_what_is_missing() {
        let d = (s("b") + c(3)).ceil_div(&s("n"));
        let bound: Bindings = [("b".into(), 5), ("n".into(), 4)].into();
        assert_eq!(d.eval(&bound), Ok(2));
        assert_eq!(d.eval(&Bindings::new()), Err(EvalError::Unbound("b".into())));
        assert!(d.eval(&[("b".into(), 5), ("n".into(), 0)].into()).is_err());
    }

    #[test]
    fn display_is_stable() {
        assert_eq!((c(4) * s("b") * s("s") - c(2)).to_string(), "4*b*s - 2");
        assert_eq!(s("a b").to_string(), "`a b`");
        assert_eq!(s("s").ceil_div(&c(4)).to_string(), "floordiv(s + 3, 4)");
    }
}
