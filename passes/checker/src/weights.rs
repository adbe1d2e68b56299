//! Where an element of a weight comes from: read element by element, so that two expressions can be compared by what
//! they mean and not by how they are written.

use tpshard_ir::DType;
use tpshard_ir::weight::{WeightExpr, WeightKind};

/// An element of an initializer, and the element types it is cast through on the way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Source<'a> {
    pub(crate) initializer: &'a str,
    pub(crate) position: usize,
    pub(crate) casts: Vec<DType>,
}

/// The origin of the element at `index`; `None` if there is no such element.
pub(crate) fn source<'a>(expr: &'a WeightExpr, index: &[usize]) -> Option<Source<'a>> {
    if index.len() != expr.shape().len() || index.iter().zip(expr.shape()).any(|(i, extent)| i >= extent) {
        return None;
    }
    match expr.kind() {
        WeightKind::Initializer { name } => {
            let position = flat(index, expr.shape());
            Some(Source { initializer: name, position, casts: vec![expr.dtype()] })
        }
        WeightKind::Slice { source: inner, axis, start, .. } => {
            let mut at = index.to_vec();
            at[*axis] += start;
            source(inner, &at)
        }
        WeightKind::Concat { sources, axis } => {
            let mut at = index.to_vec();
            for part in sources {
                let extent = part.shape()[*axis];
                if at[*axis] < extent {
                    return source(part, &at);
                }
                at[*axis] -= extent;
            }
            None
        }
        WeightKind::Transpose { source: inner, perm } => {
            let mut at = vec![0; index.len()];
            for (&to, &i) in perm.iter().zip(index) {
                at[to] = i;
            }
            source(inner, &at)
        }
        WeightKind::Reshape { source: inner } => {
            source(inner, &unflat(flat(index, expr.shape()), inner.shape()))
        }
        WeightKind::Cast { source: inner } => {
            let mut found = source(inner, index)?;
            found.casts.push(expr.dtype());
            Some(found)
        }
    }
}

pub(crate) fn flat(index: &[usize], shape: &[usize]) -> usize {
    index.iter().zip(shape).fold(0, |flat, (&i, &extent)| flat * extent + i)
}

pub(crate) fn unflat(mut position: usize, shape: &[usize]) -> Vec<usize> {
    let mut index: Vec<usize> = shape
        .iter()
        .rev()
        .map(|&extent| {
            let i = position % extent.max(1);
            position /= extent.max(1);
            i
        })
        .collect();
    index.reverse();
    index
}

/// The expression with initializers called by number, in the order they are first met.
pub(crate) fn nameless(expr: &WeightExpr, names: &mut Vec<String>) -> String {
    let own = format!("{}{:?}", expr.dtype(), expr.shape());
    match expr.kind() {
        WeightKind::Initializer { name } => {
            let number = names.iter().position(|n| n == name).unwrap_or_else(|| {
                names.push(name.clone());
                names.len() - 1
            });
            format!("init{number} {own}")
        }
        WeightKind::Slice { source, axis, start, length } => {
            format!("slice({}; {axis} {start} {length})", nameless(source, names))
        }
        WeightKind::Concat { sources, axis } => {
            let parts: Vec<String> = sources.iter().map(|s| nameless(s, names)).collect();
            format!("concat({}; {axis})", parts.join(", "))
        }
        WeightKind::Transpose { source, perm } => format!("transpose({}; {perm:?})", nameless(source, names)),
        WeightKind::Reshape { source } => format!("reshape({}; {own})", nameless(source, names)),
        WeightKind::Cast { source } => format!("cast({}; {own})", nameless(source, names)),
    }
}
