//! Dims: sums of products of numbers, symbols and `floordiv`, `ceildiv`, `mod`, `min`, `max` of two dims.

use super::scan::{Parsed, Scanner};
use crate::dim::Dim;
use crate::dtype::DType;
use crate::graph::Type;

/// Deepest nesting of parentheses.
const MAX_NESTING: usize = 32;
/// Most terms that an expression may expand to: products of sums and remainders grow faster than their text.
const MAX_TERMS: usize = 4096;

/// A dim and a bound on the number of terms in it, nested ones included.
struct Sized {
    dim: Dim,
    terms: usize,
}

impl Scanner<'_> {
    pub(super) fn dim(&mut self) -> Parsed<Dim> {
        Ok(self.sum(0)?.dim)
    }

    pub(super) fn dims(&mut self) -> Parsed<Vec<Dim>> {
        self.list("[", "]", Scanner::dim)
    }

    pub(super) fn ty(&mut self) -> Parsed<Type> {
        let dtype = self.dtype()?;
        Ok(Type::new(dtype, self.dims()?))
    }

    pub(super) fn dtype(&mut self) -> Parsed<DType> {
        let start = self.place();
        let word = self.word("an element type")?;
        word.parse().map_err(|_| self.error_at(start, format!("expected an element type, found `{word}`")))
    }

    fn sized(&mut self, at: usize, dim: Dim, terms: usize) -> Parsed<Sized> {
        if terms > MAX_TERMS {
            return Err(self.error_at(at, format!("a dim of more than {MAX_TERMS} terms")));
        }
        Ok(Sized { dim, terms })
    }

    fn sum(&mut self, depth: usize) -> Parsed<Sized> {
        let at = self.place();
        if depth > MAX_NESTING {
            return Err(self.error_at(at, format!("a dim nested deeper than {MAX_NESTING}")));
        }
        let negative = self.eat("-");
        let mut total = self.product(depth, negative)?;
        loop {
            // `->` is not a minus.
            let negative = self.peek("-") && !self.peek("->");
            if !self.eat(if negative { "-" } else { "+" }) {
                return Ok(total);
            }
            let next = self.product(depth, negative)?;
            total = self.sized(at, total.dim + next.dim, total.terms.saturating_add(next.terms))?;
        }
    }

    fn product(&mut self, depth: usize, negative: bool) -> Parsed<Sized> {
        let at = self.place();
        // The sign belongs to the number: the least number has no positive.
        let sign = if negative { -1 } else { 1 };
        let mut total = if self.peek_word().starts_with(|c: char| c.is_ascii_digit()) {
            let value = i128::from(self.number::<u64>()?) * sign;
            let Ok(value) = i64::try_from(value) else {
                return Err(self.error_at(at, format!("{value} does not fit 64 bits")));
            };
            Sized { dim: Dim::constant(value), terms: 1 }
        } else {
            let factor = self.factor(depth)?;
            Sized { dim: Dim::constant(sign as i64) * factor.dim, terms: factor.terms }
        };
        while self.eat("*") {
            let next = self.factor(depth)?;
            let terms = total.terms.saturating_mul(next.terms);
            total = self.sized(at, total.dim, terms)?;
            total.dim = total.dim * next.dim;
        }
        Ok(total)
    }

    fn factor(&mut self, depth: usize) -> Parsed<Sized> {
        let at = self.place();
        if self.peek("`") {
            let dim = Dim::symbol(&self.quoted('`')?);
            return Ok(Sized { dim, terms: 1 });
        }
        if self.eat("(") {
            let inner = self.sum(depth + 1)?;
            self.need(")")?;
            return Ok(inner);
        }
        if self.peek_word().starts_with(|c: char| c.is_ascii_digit()) {
            return Ok(Sized { dim: Dim::constant(self.number()?), terms: 1 });
        }
        let word = self.word("a dim")?;
        if !matches!(word, "floordiv" | "ceildiv" | "mod" | "min" | "max") {
            return Ok(Sized { dim: Dim::symbol(word), terms: 1 });
        }
        self.need("(")?;
        let a = self.sum(depth + 1)?;
        self.need(",")?;
        let b = self.sum(depth + 1)?;
        self.need(")")?;
        let both = a.terms.saturating_add(b.terms).saturating_add(1);
        // A remainder holds its first operand twice.
        let terms = if word == "mod" { both.saturating_mul(b.terms + 1) } else { both };
        let checked = self.sized(at, a.dim, terms)?;
        let dim = match word {
            "floordiv" => checked.dim.floor_div(&b.dim),
            "ceildiv" => checked.dim.ceil_div(&b.dim),
            "mod" => checked.dim.modulo(&b.dim),
            "min" => checked.dim.minimum(&b.dim),
            _ => checked.dim.maximum(&b.dim),
        };
        Ok(Sized { dim, terms })
    }
}
