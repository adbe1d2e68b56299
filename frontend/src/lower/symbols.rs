//! The names of unknown sizes.
//!
//! Inputs name their dynamic dims; a name may also be an expression over other names (`s15 + s70`). When two sizes must
//! agree, one symbol is replaced by the other side everywhere, and the fact is kept so that a user can be told why an
//! input must have the size of another.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use tpshard_ir::Dim;
use tpshard_ir::dim::is_plain_symbol;

/// The longest symbol or expression that is read; longer ones get a name from their input.
const LONGEST: usize = 256;
/// Most terms and parentheses in a dim expression.
const MOST_TOKENS: usize = 64;

/// The symbols in order of first appearance: earlier ones are kept when two are found equal.
#[derive(Debug, Default)]
pub(crate) struct Symbols {
    order: BTreeMap<Arc<str>, usize>,
    /// Those that data decides while the model runs.
    data: BTreeSet<Arc<str>>,
    /// Those of them that say how many there are of something, not what shape was asked for.
    counts: BTreeSet<Arc<str>>,
    /// The names that are a dim of an input by themselves, if expressions are to be over those.
    given: Option<BTreeSet<String>>,
}

impl Symbols {
    /// The symbol `name`, known from now on.
    pub(crate) fn symbol(&mut self, name: &str) -> Dim {
        let dim = Dim::symbol(name);
        self.note(&dim);
        dim
    }

    /// A new symbol, for a size that data decides: a count, or a shape that was asked for.
    pub(crate) fn defined_by_data(&mut self, wanted: &str, count: bool) -> Dim {
        let mut name = wanted.to_owned();
        while self.order.contains_key(name.as_str()) {
            name.push('_');
        }
        self.data.insert(name.as_str().into());
        if count {
            self.counts.insert(name.as_str().into());
        }
        self.symbol(&name)
    }

    /// True if data decides `dim`, at least in part.
    pub(crate) fn depends_on_data(&self, dim: &Dim) -> bool {
        dim.symbols().iter().any(|symbol| self.data.contains(symbol))
    }

    /// True if one of the two is a count that data decides and the other a size of the inputs: that they meet in an
    /// elementwise function says little about whether they are equal.
    pub(crate) fn count_meets_input(&self, a: &Dim, b: &Dim) -> bool {
        let count = |dim: &Dim| dim.as_symbol().is_some_and(|symbol| self.counts.contains(symbol));
        let given = |dim: &Dim| dim.as_const().is_none() && !self.depends_on_data(dim);
        (count(a) && given(b)) || (count(b) && given(a))
    }

    /// From now on, expressions over several names are taken as such only if inputs give the names values. ONNX does not
    /// know expressions: where two exporters' names meet, `past_seq_len + seq_len` may be just another name.
    pub(crate) fn given_by_inputs(&mut self, names: BTreeSet<String>) {
        self.given = Some(names);
    }

    /// True if the inputs give all names of `dim` values, or one name is left that the dim itself gives one.
    fn can_be_solved(&self, dim: &Dim) -> bool {
        let Some(given) = &self.given else { return true };
        dim.symbols().iter().filter(|name| !given.contains(&***name)).count() <= 1
    }

    /// The declared dim `text`: one name, or an expression over names.
    pub(crate) fn declared(&mut self, text: &str, fallback: &str) -> Dim {
        let text = text.trim();
        if text.is_empty() || text.len() > LONGEST {
            return self.symbol(fallback);
        }
        if !is_plain_symbol(text)
            && let Some(dim) = parse(text)
            && dim.as_const().is_none_or(|value| value >= 0)
            && self.can_be_solved(&dim)
        {
            self.note(&dim);
            return dim;
        }
        self.symbol(text)
    }

    fn note(&mut self, dim: &Dim) {
        for name in dim.symbols() {
            let next = self.order.len();
            self.order.entry(name).or_insert(next);
        }
    }

    /// Names of all symbols, earliest first.
    pub(crate) fn names(&self) -> Vec<Arc<str>> {
        let mut names: Vec<_> = self.order.iter().collect();
        names.sort_by_key(|(_, at)| **at);
        names.into_iter().map(|(name, _)| name.clone()).collect()
    }

    /// Solves `left = right` for one symbol: which one, and what it equals. Of the possible ones that come out as a sum
    /// of sizes (`total = past + seq`, not `past = total - seq`) the last to appear is replaced. A size that data decides
    /// comes first, the latest of them: what is known when the run starts must not depend on it.
    pub(crate) fn solve(&self, left: &Dim, right: &Dim) -> Option<(Arc<str>, Dim)> {
        let difference = left - right;
        let order = |name: &Arc<str>| self.order.get(name).copied().unwrap_or(usize::MAX);
        let latest = difference.symbols().into_iter().filter(|s| self.data.contains(s)).max_by_key(order);
        if let Some(name) = latest {
            return solve_for(&difference, &name).map(|solution| (name, solution));
        }
        let mut candidates: Vec<(bool, usize, Arc<str>, Dim)> = Vec::new();
        for name in difference.symbols() {
            if let Some(solution) = solve_for(&difference, &name) {
                let order = self.order.get(&name).copied().unwrap_or(usize::MAX);
                candidates.push((solution.is_nonnegative(), order, name, solution));
            }
        }
        candidates.sort_by(|a, b| (a.0, a.1, &a.2).cmp(&(b.0, b.1, &b.2)));
        candidates.pop().map(|(_, _, name, solution)| (name, solution))
    }
}

/// `name` such that `zero` is zero, if it occurs in one linear term only.
fn solve_for(zero: &Dim, name: &str) -> Option<Dim> {
    let at = |value: i64| zero.substitute(&|symbol| (symbol == name).then(|| Dim::constant(value)));
    let rest = at(0);
    let factor = (at(1) - &rest).as_const().filter(|&factor| factor != 0)?;
    let linear = &rest + &(Dim::constant(factor) * Dim::symbol(name));
    (linear == *zero && !rest.symbols().iter().any(|symbol| &**symbol == name)).then_some(())?;
    (-&rest).exact_div(&Dim::constant(factor))
}

/// True if the two can never be equal.
pub(crate) fn never_equal(a: &Dim, b: &Dim) -> bool {
    let one = Dim::constant(1);
    (a - b - &one).is_nonnegative() || (b - a - &one).is_nonnegative()
}

/// Parses `a + 2*b`, `floor(a/2)`, `max(1, a)` as exporters write them; `None` if the text is anything else.
fn parse(text: &str) -> Option<Dim> {
    let tokens = tokens(text)?;
    let mut parser = Parser { tokens: &tokens, depth: 0 };
    let dim = parser.sum()?;
    parser.tokens.is_empty().then_some(dim)
}

#[derive(Debug, PartialEq)]
enum Token {
    Name(String),
    Number(i64),
    Sign(char),
}

fn tokens(text: &str) -> Option<Vec<Token>> {
    let mut tokens = Vec::new();
    let mut rest = text.trim_start();
    while let Some(first) = rest.chars().next() {
        if tokens.len() >= MOST_TOKENS {
            return None;
        }
        let part = |keep: fn(char) -> bool| rest.find(|c| !keep(c)).unwrap_or(rest.len());
        let length = if first.is_ascii_digit() {
            let length = part(|c| c.is_ascii_digit());
            tokens.push(Token::Number(rest.get(..length)?.parse().ok()?));
            length
        } else if first.is_ascii_alphabetic() || first == '_' {
            let length = part(|c| c.is_ascii_alphanumeric() || c == '_' || c == '.');
            tokens.push(Token::Name(rest.get(..length)?.to_owned()));
            length
        } else if rest.starts_with("//") {
            tokens.push(Token::Sign('/'));
            2
        } else if "+-*/(),".contains(first) {
            tokens.push(Token::Sign(first));
            1
        } else {
            return None;
        };
        rest = rest.get(length..)?.trim_start();
    }
    Some(tokens)
}

struct Parser<'a> {
    tokens: &'a [Token],
    depth: usize,
}

impl Parser<'_> {
    fn accept(&mut self, sign: char) -> Option<()> {
        if self.tokens.first() == Some(&Token::Sign(sign)) {
            self.tokens = &self.tokens[1..];
            return Some(());
        }
        None
    }

    fn sum(&mut self) -> Option<Dim> {
        self.depth += 1;
        if self.depth > 16 {
            return None;
        }
        let mut sum = if self.accept('-').is_some() { -&self.product()? } else { self.product()? };
        loop {
            if self.accept('+').is_some() {
                sum = sum + self.product()?;
            } else if self.accept('-').is_some() {
                sum = sum - self.product()?;
            } else {
                self.depth -= 1;
                return Some(sum);
            }
        }
    }

    fn product(&mut self) -> Option<Dim> {
        let mut product = self.factor()?;
        loop {
            if self.accept('*').is_some() {
                product = product * self.factor()?;
            } else if self.accept('/').is_some() {
                let divisor = self.factor()?;
                divisor.as_const().is_none_or(|value| value > 0).then_some(())?;
                product = product.floor_div(&divisor);
            } else {
                return Some(product);
            }
        }
    }

    fn factor(&mut self) -> Option<Dim> {
        let (first, rest) = self.tokens.split_first()?;
        self.tokens = rest;
        match first {
            Token::Number(value) => Some(Dim::constant(*value)),
            Token::Sign('(') => {
                let inner = self.sum()?;
                self.accept(')')?;
                Some(inner)
            }
            Token::Sign(_) => None,
            Token::Name(name) if self.accept('(').is_some() => {
                let first = self.sum()?;
                if name.eq_ignore_ascii_case("floor") {
                    self.accept(')')?;
                    return Some(first);
                }
                self.accept(',')?;
                let second = self.sum()?;
                self.accept(')')?;
                match name.to_ascii_lowercase().as_str() {
                    "max" => Some(first.maximum(&second)),
                    "min" => Some(first.minimum(&second)),
                    "mod" => Some(first.modulo(&second)),
                    "floordiv" => Some(first.floor_div(&second)),
                    _ => None,
                }
            }
            Token::Name(name) => Some(Dim::symbol(name)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn s(name: &str) -> Dim {
        Dim::symbol(name)
    }

    #[test]
    fn expressions_become_dims_and_odd_names_stay_names() {
        let mut symbols = Symbols::default();
        assert_eq!(symbols.declared("s15 + s70", "x"), s("s15") + s("s70"));
        assert_eq!(symbols.declared("2*(n - 1)", "x"), s("n") * Dim::constant(2) - Dim::constant(2));
        assert_eq!(symbols.declared("floor(h/2)", "x"), s("h").floor_div(&Dim::constant(2)));
        assert_eq!(symbols.declared("batch size", "x"), s("batch size"));
        assert_eq!(symbols.declared("a +", "x"), s("a +"));
        assert_eq!(symbols.declared("a/0", "x"), s("a/0"));
        assert_eq!(symbols.declared("", "x"), s("x"));
        assert_eq!(symbols.declared("-3", "x"), s("-3"));
        symbols.given_by_inputs(["past".to_owned()].into());
        assert_eq!(symbols.declared("past + seq", "x"), s("past") + s("seq"));
        assert_eq!(symbols.declared("past_len + seq_len", "x"), s("past_len + seq_len"));
    }

    #[test]
    fn equations_are_solved_for_sums_and_for_the_later_symbol() {
        let mut symbols = Symbols::default();
        for name in ["batch", "seq", "total", "past", "other"] {
            symbols.symbol(name);
        }
        let solved =
            |a: &Dim, b: &Dim| symbols.solve(a, b).map(|(name, dim)| (name.to_string(), dim.to_string()));
        let total = solved(&s("total"), &(s("past") + s("seq"))).unwrap();
        assert_eq!((total.0.as_str(), total.1.as_str()), ("total", "past + seq"));
        assert_eq!(solved(&s("batch"), &s("other")).unwrap().0, "other");
        assert_eq!(solved(&s("batch"), &Dim::constant(4)).unwrap(), ("batch".into(), "4".into()));
        assert_eq!(solved(&(s("seq") * s("past")), &Dim::constant(4)), None);
        assert_eq!(solved(&s("seq"), &(s("seq").minimum(&s("past")) + Dim::constant(1))), None);
    }
}
