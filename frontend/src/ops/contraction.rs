//! Products: MatMul, Gemm, Einsum, <https://onnx.ai/onnx/operators/>, and ONNX Runtime's FusedMatMul,
//! <https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md>. All become einsums of two operands.

use super::activation::named_activation;
use crate::error::quote;
use crate::lower::{Call, Lowered, Lowering, Value, invalid, unsupported};
use tpshard_ir::op::EinsumSpec;
use tpshard_ir::{Dim, Monoid, Op, Scalar, ValueId};

const LETTERS: &[u8] = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";

pub(super) fn matmul(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let (a, b) = (l.data(call.input(0)?)?, l.data(call.input(1)?)?);
    Ok(vec![Value::Data(product(l, a, b, false, false)?)])
}

/// NumPy's `matmul` of data, either operand with its last two dims swapped.
pub(super) fn product(
    l: &mut Lowering<'_>,
    a: ValueId,
    b: ValueId,
    swap_a: bool,
    swap_b: bool,
) -> Lowered<ValueId> {
    let (rank_a, rank_b) = (l.graph.ty(a).rank(), l.graph.ty(b).rank());
    if rank_a == 0 || rank_b == 0 {
        return Err(invalid("a product with a scalar"));
    }
    let (lead_a, lead_b) = (rank_a.saturating_sub(2), rank_b.saturating_sub(2));
    let batch = lead_a.max(lead_b);
    if batch + 3 > 26 {
        return Err(unsupported(format!("a product of rank {}", batch + 2)));
    }
    let (m, k, n) = (LETTERS[batch], LETTERS[batch + 1], LETTERS[batch + 2]);
    let inner_a = if rank_a == 1 { 0 } else { rank_a - 1 - usize::from(swap_a) };
    let inner_b = if rank_b == 1 { 0 } else { rank_b - 2 + usize::from(swap_b) };
    let (da, db) = (l.graph.ty(a).shape[inner_a].clone(), l.graph.ty(b).shape[inner_b].clone());
    l.unify(&da, &db)?;
    let (mut keep_a, mut keep_b) = (Vec::new(), Vec::new());
    for axis in 0..batch {
        let own = |lead: usize| axis.checked_sub(batch - lead);
        let dim =
            |l: &Lowering<'_>, id: ValueId, at: Option<usize>| at.map(|at| l.graph.ty(id).shape[at].clone());
        let (in_a, in_b) = (dim(l, a, own(lead_a)), dim(l, b, own(lead_b)));
        match (in_a, in_b) {
            (Some(x), Some(y)) if x.is_one() && !y.is_one() => keep_b.push(axis),
            (Some(x), Some(y)) if y.is_one() && !x.is_one() => keep_a.push(axis),
            (Some(x), Some(y)) => {
                l.unify(&x, &y)?;
                keep_a.push(axis);
                keep_b.push(axis);
            }
            (Some(_), None) => keep_a.push(axis),
            (None, _) => keep_b.push(axis),
        }
    }
    let letters = |keep: &[usize], tail: &[u8]| {
        keep.iter().map(|&axis| LETTERS[axis]).chain(tail.iter().copied()).collect::<Vec<u8>>()
    };
    let pair =
        |first: u8, second: u8, swap: bool| if swap { vec![second, first] } else { vec![first, second] };
    let tail_a = if rank_a == 1 { vec![k] } else { pair(m, k, swap_a) };
    let tail_b = if rank_b == 1 { vec![k] } else { pair(k, n, swap_b) };
    let a = without_units(l, a, lead_a, batch, &keep_a)?;
    let b = without_units(l, b, lead_b, batch, &keep_b)?;
    let mut output: Vec<u8> = (0..batch).map(|axis| LETTERS[axis]).collect();
    if rank_a > 1 {
        output.push(m);
    }
    if rank_b > 1 {
        output.push(n);
    }
    let spec = EinsumSpec { inputs: vec![letters(&keep_a, &tail_a), letters(&keep_b, &tail_b)], output };
    l.add(Op::Einsum(spec), &[a, b])
}

/// Drops the leading dims of extent 1 that the other operand stretches.
fn without_units(
    l: &mut Lowering<'_>,
    x: ValueId,
    lead: usize,
    batch: usize,
    keep: &[usize],
) -> Lowered<ValueId> {
    let shape = l.graph.ty(x).shape.clone();
    let mut kept: Vec<Dim> =
        (0..lead).filter(|own| keep.contains(&(own + batch - lead))).map(|own| shape[own].clone()).collect();
    kept.extend(shape[lead..].iter().cloned());
    if kept.len() == shape.len() { Ok(x) } else { l.reshape(x, &kept) }
}

/// `alpha A' B' + beta C`.
pub(super) fn gemm(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let alpha = f64::from(call.attributes.float("alpha", 1.0)?);
    let beta = f64::from(call.attributes.float("beta", 1.0)?);
    let (swap_a, swap_b) = (call.attributes.bool("transA", false)?, call.attributes.bool("transB", false)?);
    call.attributes.ignore("broadcast");
    let (a, b) = (l.data(call.input(0)?)?, l.data(call.input(1)?)?);
    if l.graph.ty(a).rank() != 2 || l.graph.ty(b).rank() != 2 {
        return Err(invalid(format!("Gemm of {} and {}", l.graph.ty(a), l.graph.ty(b))));
    }
    let mut result = product(l, a, b, swap_a, swap_b)?;
    if alpha != 1.0 {
        result = l.map_number(Scalar::Mul, result, alpha)?;
    }
    if let Some(c) = call.optional(2)
        && beta != 0.0
    {
        let mut c = l.data(c)?;
        if beta != 1.0 {
            c = l.map_number(Scalar::Mul, c, beta)?;
        }
        let rank = l.graph.ty(c).rank();
        if rank > 2 {
            return Err(invalid(format!("a bias of rank {rank}")));
        }
        let before = l.graph.ty(result).shape.clone();
        result = l.map(Scalar::Add, &[result, c])?;
        if l.graph.ty(result).shape != l.current_all(&before) {
            return Err(invalid("the bias is larger than the product"));
        }
    }
    Ok(vec![Value::Data(result)])
}

/// FusedGemm of ONNX Runtime: a Gemm and what is applied to each element of its result.
pub(super) fn fused_gemm(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let name = call.attributes.string("activation", "")?;
    let alpha = call.attributes.optional_float("activation_alpha")?.map(f64::from);
    let beta = call.attributes.optional_float("activation_beta")?.map(f64::from);
    call.attributes.ignore("activation_gamma");
    let mut values = gemm(l, call)?;
    if !name.is_empty() {
        for value in &mut values {
            let x = l.data(value)?;
            *value = Value::Data(named_activation(l, name, x, alpha, beta)?);
        }
    }
    Ok(values)
}

/// FusedMatMul, and TransposeMatMul as it was called before: `alpha A' B'`.
pub(super) fn fused_matmul(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let alpha = f64::from(call.attributes.float("alpha", 1.0)?);
    let (swap_a, swap_b) = (call.attributes.bool("transA", false)?, call.attributes.bool("transB", false)?);
    let (last_a, last_b) =
        (call.attributes.bool("transBatchA", false)?, call.attributes.bool("transBatchB", false)?);
    let (a, b) = (l.data(call.input(0)?)?, l.data(call.input(1)?)?);
    let a = if last_a { batch_first(l, a)? } else { a };
    let b = if last_b { batch_first(l, b)? } else { b };
    let mut result = product(l, a, b, swap_a, swap_b)?;
    if alpha != 1.0 {
        result = l.map_number(Scalar::Mul, result, alpha)?;
    }
    Ok(vec![Value::Data(result)])
}

/// `[m, batch…, k]` as `[batch…, m, k]`.
fn batch_first(l: &mut Lowering<'_>, x: ValueId) -> Lowered<ValueId> {
    let rank = l.graph.ty(x).rank();
    if rank < 3 {
        return Ok(x);
    }
    let mut perm: Vec<usize> = (1..rank - 1).collect();
    perm.extend([0, rank - 1]);
    l.transpose(x, &perm)
}

/// Any number of operands, contracted from left to right; an ellipsis stands for broadcast dims.
pub(super) fn einsum(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let text: String =
        call.attributes.required_string("equation")?.chars().filter(|c| !c.is_whitespace()).collect();
    let values = call.all()?;
    let mut operands = Vec::with_capacity(values.len());
    for value in &values {
        operands.push(l.data(value)?);
    }
    let (terms, output) = parse_equation(l, &text, &operands)?;
    let mut terms =
        terms.into_iter().zip(operands).map(|(letters, id)| Term { letters, id }).collect::<Vec<_>>();
    for term in &mut terms {
        *term = diagonal(l, term)?;
    }
    terms.reverse();
    let mut result = terms.pop().ok_or_else(|| invalid("no operands"))?;
    while let Some(next) = terms.pop() {
        let later =
            |letter: u8| output.contains(&letter) || terms.iter().any(|term| term.letters.contains(&letter));
        result = contract(l, &result, &next, &later)?;
    }
    Ok(vec![Value::Data(arrange(l, &result, &output)?)])
}

struct Term {
    letters: Vec<u8>,
    id: ValueId,
}

/// The letters of each operand and of the result, with ellipses replaced by letters of their own.
fn parse_equation(l: &Lowering<'_>, text: &str, operands: &[ValueId]) -> Lowered<(Vec<Vec<u8>>, Vec<u8>)> {
    let wrong = || invalid(format!("the equation {}", quote(text)));
    let (inputs, output) = match text.split_once("->") {
        Some((inputs, output)) => (inputs, Some(output)),
        None => (text, None),
    };
    let inputs: Vec<&str> = inputs.split(',').collect();
    if inputs.len() != operands.len() {
        return Err(wrong());
    }
    let used: Vec<u8> = text.bytes().filter(u8::is_ascii_alphabetic).collect();
    let free: Vec<u8> = LETTERS.iter().copied().filter(|letter| !used.contains(letter)).collect();
    let named = |term: &str| term.bytes().filter(u8::is_ascii_alphabetic).count();
    let mut wide = None;
    for (term, &id) in inputs.iter().zip(operands) {
        let rank = l.graph.ty(id).rank();
        let extra = rank.checked_sub(named(term)).ok_or_else(wrong)?;
        if !term.contains("...") && extra > 0 {
            return Err(wrong());
        }
        if term.contains("...") && wide.is_some_and(|wide| wide != extra) {
            return Err(invalid(format!(
                "{}: its ellipses stand for different numbers of dims",
                quote(text)
            )));
        }
        wide = if term.contains("...") { Some(extra) } else { wide };
    }
    let widest = wide.unwrap_or(0);
    let ellipsis =
        |width: usize| free.get(..widest).and_then(|letters| letters.get(widest - width..)).ok_or_else(wrong);
    let expand = |term: &str, width: usize| -> Lowered<Vec<u8>> {
        let mut letters = Vec::new();
        let (before, after) = match term.split_once("...") {
            None => (term, None),
            Some((before, after)) => (before, Some(after)),
        };
        letters.extend(before.bytes());
        if let Some(after) = after {
            letters.extend(ellipsis(width)?);
            letters.extend(after.bytes());
        }
        if letters.iter().any(|letter| !letter.is_ascii_alphabetic()) {
            return Err(wrong());
        }
        Ok(letters)
    };
    let mut terms = Vec::with_capacity(inputs.len());
    for (term, &id) in inputs.iter().zip(operands) {
        let letters = expand(term, l.graph.ty(id).rank() - named(term))?;
        if letters.len() != l.graph.ty(id).rank() {
            return Err(wrong());
        }
        terms.push(letters);
    }
    let output = match output {
        Some(output) => expand(output, widest)?,
        None => {
            // Implicit: the ellipsis, then letters that occur once, in alphabetical order.
            let mut once: Vec<u8> = used
                .iter()
                .copied()
                .filter(|letter| used.iter().filter(|other| *other == letter).count() == 1)
                .collect();
            once.sort_unstable();
            ellipsis(widest)?.iter().copied().chain(once).collect()
        }
    };
    let known = |letter: &u8| terms.iter().any(|term: &Vec<u8>| term.contains(letter));
    let repeated = (0..output.len()).any(|at| output[..at].contains(&output[at]));
    if repeated || !output.iter().all(known) {
        return Err(wrong());
    }
    Ok((terms, output))
}

/// Takes the diagonal of letters that an operand repeats.
fn diagonal(l: &mut Lowering<'_>, term: &Term) -> Lowered<Term> {
    let mut letters = term.letters.clone();
    let mut id = term.id;
    while let Some(second) = (0..letters.len()).find(|&at| letters[..at].contains(&letters[at])) {
        let first = letters.iter().position(|letter| *letter == letters[second]).unwrap_or(0);
        let (a, b) = (l.graph.ty(id).shape[first].clone(), l.graph.ty(id).shape[second].clone());
        l.unify(&a, &b)?;
        // Keep what is on the diagonal, zero the rest, and sum one of the two dims away.
        let rank = letters.len();
        let mut index = |axis: usize| -> Lowered<ValueId> {
            let length = l.graph.ty(id).shape[axis].clone();
            let iota = l.add(Op::Iota { start: Dim::constant(0), length: length.clone() }, &[])?;
            let mut along = vec![Dim::constant(1); rank];
            along[axis] = length;
            l.reshape(iota, &along)
        };
        let (row, column) = (index(first)?, index(second)?);
        let on = l.map(Scalar::Equal, &[row, column])?;
        let zero = l.scalar(l.graph.ty(id).dtype, 0.0)?;
        let kept = l.map(Scalar::Select, &[on, id, zero])?;
        let sum = l.reduce(Monoid::Sum, kept, &[second])?;
        let mut shape = l.graph.ty(sum).shape.clone();
        shape.remove(second);
        id = l.reshape(sum, &shape)?;
        letters.remove(second);
    }
    Ok(Term { letters, id })
}

fn contract(l: &mut Lowering<'_>, a: &Term, b: &Term, later: &dyn Fn(u8) -> bool) -> Lowered<Term> {
    let (mut a, mut b) =
        (Term { letters: a.letters.clone(), id: a.id }, Term { letters: b.letters.clone(), id: b.id });
    for letter in a.letters.clone() {
        let (Some(x), Some(y)) = (position(&a, letter), position(&b, letter)) else { continue };
        let (dx, dy) = (l.graph.ty(a.id).shape[x].clone(), l.graph.ty(b.id).shape[y].clone());
        // A dim of 1 is stretched by the other operand.
        if dx.is_one() && !dy.is_one() {
            a = squeezed(l, &a, x)?;
        } else if dy.is_one() && !dx.is_one() {
            b = squeezed(l, &b, y)?;
        } else {
            l.unify(&dx, &dy)?;
        }
    }
    let mut output: Vec<u8> = a.letters.iter().copied().filter(|&letter| later(letter)).collect();
    let rest = b.letters.iter().copied().filter(|letter| later(*letter) && !a.letters.contains(letter));
    output.extend(rest);
    let spec = EinsumSpec { inputs: vec![a.letters.clone(), b.letters.clone()], output: output.clone() };
    Ok(Term { letters: output, id: l.add(Op::Einsum(spec), &[a.id, b.id])? })
}

fn position(term: &Term, letter: u8) -> Option<usize> {
    term.letters.iter().position(|other| *other == letter)
}

fn squeezed(l: &mut Lowering<'_>, term: &Term, axis: usize) -> Lowered<Term> {
    let mut shape = l.graph.ty(term.id).shape.clone();
    let mut letters = term.letters.clone();
    shape.remove(axis);
    letters.remove(axis);
    Ok(Term { letters, id: l.reshape(term.id, &shape)? })
}

/// Sums letters that the result does not have and puts the others in order.
fn arrange(l: &mut Lowering<'_>, term: &Term, output: &[u8]) -> Lowered<ValueId> {
    let axes: Vec<usize> =
        (0..term.letters.len()).filter(|&at| !output.contains(&term.letters[at])).collect();
    let sum = l.reduce(Monoid::Sum, term.id, &axes)?;
    let shape = l.graph.ty(sum).shape.clone();
    let kept: Vec<Dim> =
        (0..shape.len()).filter(|at| !axes.contains(at)).map(|at| shape[at].clone()).collect();
    let letters: Vec<u8> = term.letters.iter().copied().filter(|letter| output.contains(letter)).collect();
    let sum = l.reshape(sum, &kept)?;
    let perm: Option<Vec<usize>> =
        output.iter().map(|letter| letters.iter().position(|other| other == letter)).collect();
    let perm = perm.ok_or_else(|| invalid("the equation"))?;
    l.transpose(sum, &perm)
}
