//! Operations whose shapes or control flow depend on data.
//!
//! A [`DeferredCall`] is an operation that is understood only when the values of its operands are known: a reshape to a
//! shape that an input gives, the places of non-zeros, a loop. The graph holds it as bytes that an [`Evaluator`]
//! understands; to everything else it is an uninterpreted function of its operands: equal calls on equal operands give
//! equal results, on every rank. Extents that nothing else says are symbols *defined by* the result: they get their
//! values when it is made ([`bind_result`]), are declared with ranges as all symbols are, and must be in them.
//!
//! What must not live here: what calls mean.

use crate::dim::{Bindings, Dim};
use crate::graph::{Graph, Node, SymbolRange, Type, ValueId};
use crate::op::Op;
use crate::tensor::Tensor;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

/// An operation that waits for its operands. Compared by its bytes.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DeferredCall {
    /// What messages call it: the operator.
    pub name: Arc<str>,
    /// What an evaluator reads.
    pub code: Arc<[u8]>,
}

impl fmt::Debug for DeferredCall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.name, self.code_text())
    }
}

impl DeferredCall {
    /// The bytes in hexadecimal, as `.tir` text holds them.
    pub fn code_text(&self) -> String {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let digit = |d: u8| DIGITS.get(usize::from(d & 15)).map_or('0', |&d| char::from(d));
        self.code.iter().flat_map(|&byte| [digit(byte >> 4), digit(byte)]).collect()
    }

    /// The inverse of [`DeferredCall::code_text`].
    pub fn parse(name: &str, code: &str) -> Option<DeferredCall> {
        let digits = code.chars().map(|c| c.to_digit(16)).collect::<Option<Vec<u32>>>()?;
        let pairs = digits.chunks(2).map(|pair| match pair {
            [high, low] => u8::try_from(high * 16 + low).ok(),
            _ => None,
        });
        Some(DeferredCall { name: name.into(), code: pairs.collect::<Option<Vec<u8>>>()?.into() })
    }
}

/// What gives calls their meaning. The same call on the same operands has the same results wherever it is evaluated:
/// ranks rely on it, each evaluates for itself.
pub trait Evaluator: Send + Sync {
    /// All results of `call`, none of more than `element_limit` elements.
    ///
    /// # Errors
    /// What is wrong with the operands, naming the node.
    fn evaluate(
        &self,
        call: &DeferredCall,
        operands: &[&Tensor],
        element_limit: usize,
    ) -> Result<Vec<Tensor>, String>;
}

/// An evaluator that can stand in options.
#[derive(Clone, Default)]
pub struct SharedEvaluator(pub Option<Arc<dyn Evaluator>>);

impl fmt::Debug for SharedEvaluator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "evaluator" } else { "no evaluator" })
    }
}

/// The error of a graph with deferred calls where nothing can evaluate them.
pub fn no_evaluator(call: &DeferredCall) -> String {
    format!("nothing here can evaluate a {} whose shape depends on data", call.name)
}

/// Checks a result against its declared type, and gives the symbols that it defines their values.
///
/// # Errors
/// A result of another element type or rank, an extent that is not the declared one, a size out of its range.
pub fn bind_result(
    ty: &Type,
    result: &Type,
    symbols: &BTreeMap<Arc<str>, SymbolRange>,
    bindings: &mut Bindings,
) -> Result<(), String> {
    if ty.dtype != result.dtype || ty.rank() != result.rank() {
        return Err(format!("made {result}, but the model says {ty}"));
    }
    let sizes: Vec<(&Dim, i64)> =
        ty.shape.iter().zip(&result.shape).map(|(dim, size)| (dim, size.as_const().unwrap_or(-1))).collect();
    loop {
        let before = bindings.len();
        for &(dim, size) in &sizes {
            let Some((symbol, value)) = solved(dim, size, bindings) else { continue };
            if let Some(range) = symbols.get(&symbol)
                && !(range.low..=range.high).contains(&value)
            {
                let (low, high) = (range.low, range.high);
                return Err(format!("dim `{symbol}` is {value}, allowed are {low} to {high}"));
            }
            bindings.insert(symbol, value);
        }
        if bindings.len() == before {
            break;
        }
    }
    for (axis, (dim, size)) in sizes.iter().enumerate() {
        match dim.eval(bindings) {
            Ok(value) if value == *size => {}
            Ok(value) => {
                let declared = if dim.as_const().is_some() { String::new() } else { format!(" = {value}") };
                return Err(format!(
                    "dim {axis} is {size}, but the model relies on it to be {dim}{declared}\n  \
                     help: correct the shapes that the model declares, or the inputs that decide them"
                ));
            }
            Err(error) => return Err(format!("dim {axis}: {error}")),
        }
    }
    Ok(())
}

/// The value of the only symbol of `dim` that has none, if the dim is that symbol or grows evenly with it.
fn solved(dim: &Dim, size: i64, bindings: &Bindings) -> Option<(Arc<str>, i64)> {
    if dim.as_const().is_some() {
        return None;
    }
    crate::interp::solve_linear(dim, size, bindings)
}

/// Gives what a result defines the least values that fit: for a step that failed and goes on with zeros.
pub fn bind_least(ty: &Type, symbols: &BTreeMap<Arc<str>, SymbolRange>, bindings: &mut Bindings) {
    for symbol in ty.shape.iter().flat_map(Dim::symbols) {
        let least = symbols.get(&symbol).map_or(0, |range| range.low);
        bindings.entry(symbol).or_insert(least);
    }
}

impl Node {
    /// The symbols of the type and of the attributes.
    pub fn symbols(&self) -> BTreeSet<Arc<str>> {
        let mut found: BTreeSet<Arc<str>> = self.ty.shape.iter().flat_map(Dim::symbols).collect();
        if !matches!(self.op, Op::Map(_) | Op::Einsum(_) | Op::Weight(_) | Op::Literal(_)) {
            let seen = std::cell::RefCell::new(BTreeSet::new());
            self.op.clone().for_each_dim_mut(&|dim| seen.borrow_mut().extend(dim.symbols()));
            found.extend(seen.into_inner());
        }
        found
    }
}

impl Graph {
    /// The symbols that no input gives a value: those that deferred results define.
    pub fn data_symbols(&self) -> BTreeSet<Arc<str>> {
        let mut defined: BTreeSet<Arc<str>> = self.symbols.keys().cloned().collect();
        for (_, _, ty) in self.inputs() {
            if defined.is_empty() {
                break;
            }
            for symbol in ty.shape.iter().flat_map(Dim::symbols) {
                defined.remove(&symbol);
            }
        }
        defined
    }

    /// The deferred values that define symbols which some value has that no operand has: it depends on them without
    /// naming them, so they come first, in this order.
    pub fn definers(&self) -> Vec<ValueId> {
        let data = self.data_symbols();
        if data.is_empty() {
            return Vec::new();
        }
        let symbols = |value: ValueId| -> BTreeSet<Arc<str>> {
            self.ty(value).shape.iter().flat_map(Dim::symbols).collect()
        };
        let mut open: BTreeSet<Arc<str>> = BTreeSet::new();
        for node in self.nodes().iter().filter(|node| !matches!(node.op, Op::Deferred { .. })) {
            let mut own = node.symbols();
            own.retain(|symbol| data.contains(symbol));
            if !own.is_empty() {
                let given: BTreeSet<Arc<str>> = node.args.iter().flat_map(|&arg| symbols(arg)).collect();
                open.extend(own.into_iter().filter(|symbol| !given.contains(symbol)));
            }
        }
        let mut found = Vec::new();
        for (value, node) in self.values().filter(|(_, n)| matches!(n.op, Op::Deferred { .. })) {
            let own: BTreeSet<Arc<str>> = node.ty.shape.iter().flat_map(Dim::symbols).collect();
            let before = open.len();
            open.retain(|symbol| !own.contains(symbol));
            if open.len() < before {
                found.push(value);
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::DType;

    fn range(low: i64, high: i64) -> SymbolRange {
        SymbolRange { low, high }
    }

    #[test]
    fn code_comes_back_from_text() {
        let call = DeferredCall { name: "NonZero".into(), code: (0..=255u8).collect::<Vec<_>>().into() };
        assert_eq!(DeferredCall::parse("NonZero", &call.code_text()), Some(call));
        assert!(DeferredCall::parse("NonZero", "0").is_none());
        assert!(DeferredCall::parse("NonZero", "0g").is_none());
    }

    #[test]
    fn results_bind_what_they_define_and_are_held_to_the_rest() {
        let ty =
            Type::new(DType::F32, vec![Dim::symbol("n"), Dim::symbol("n") * Dim::constant(2), 4i64.into()]);
        let symbols = [("n".into(), range(1, 8))].into();
        let made = |a: i64, b: i64, c: i64| Type::new(DType::F32, vec![a.into(), b.into(), c.into()]);
        let mut bindings = Bindings::new();
        bind_result(&ty, &made(3, 6, 4), &symbols, &mut bindings).unwrap();
        assert_eq!(bindings["n"], 3);
        // The second of two results that share a symbol is checked.
        let error = bind_result(&ty, &made(2, 4, 4), &symbols, &mut bindings).unwrap_err();
        assert!(error.contains("relies on it to be n = 3"), "{error}");
        let fresh = |made: Type| bind_result(&ty, &made, &symbols, &mut Bindings::new()).unwrap_err();
        assert!(fresh(made(3, 6, 5)).contains("dim 2 is 5, but the model relies on it to be 4"));
        assert!(fresh(made(3, 7, 4)).contains("dim 1 is 7"));
        assert!(fresh(made(9, 18, 4)).contains("dim `n` is 9, allowed are 1 to 8"));
        assert!(fresh(Type::new(DType::F32, vec![])).contains("but the model says"));
        let mut least = Bindings::new();
        bind_least(&ty, &symbols, &mut least);
        assert_eq!(least["n"], 1);
    }
}
