//! Another precision: a model of `f32` as one that multiplies and stores in 16 bits.
//!
//! [`narrowed`] rewrites an imported graph before anything else looks at it, so that the rewritten graph is what plans,
//! programs and checks are about. Weights of products, embedding tables and state become narrow; a cast of a weight is part
//! of its expression and happens while shards are written. Products sum in `f32` in any case, and so do composites.
//!
//! Every value of `f32` gets a *home*, the type in which it is made and stored:
//!
//! - products, attention and what is gathered from embedding tables are narrow, and so is what moves, adds up or
//!   chooses between narrow values;
//! - other elementwise functions, sums over rows, softmax, and everything that follows from positions, sizes and masks alone
//!   stay `f32`. What such a function makes is narrow after all where products read it;
//! - norms, rotary embeddings and attention take narrow operands with parameters, tables and masks in `f32`.
//!
//! A value that is read in another type than its home is cast where it is read; widening changes nothing. Products of
//! quantised weights, operations that wait for data, and everything of other types stay as they are. Inputs and outputs keep
//! their types; state is narrow, and a border says that it may be given as before.

mod facts;
mod rewrite;

use tpshard_ir::{DType, Graph, InferError, Op, ValueId};

/// A narrowed graph.
#[derive(Clone, Debug, PartialEq)]
pub struct Narrowed {
    pub graph: Graph,
    /// What every value of the graph before became; nothing if it is not needed any more.
    pub values: Vec<Option<ValueId>>,
    /// Products, convolutions and attentions that are narrow now and were not.
    pub products: usize,
}

/// Why a graph cannot be narrowed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PrecisionError {
    #[error("the model computes in {found}, not in f32\nhelp: leave --dtype out, or export the model in f32")]
    Other { found: DType },
    #[error("{to} is no type to compute in with half the bits of f32\nhelp: bf16 or f16")]
    Target { to: DType },
    #[error("{origin}: {error}\nhelp: please report this model, and leave --dtype out")]
    Infer { origin: String, error: InferError },
}

/// `graph` with its products in `to`. A graph without products in `f32`, such as one whose products are in `to` already,
/// comes back as it is.
///
/// # Errors
/// `to` has not 16 bits; the products are in the other type of 16 bits.
pub fn narrowed(graph: &Graph, to: DType) -> Result<Narrowed, PrecisionError> {
    if !is_half(to) {
        return Err(PrecisionError::Target { to });
    }
    let done = rewrite::rewrite(graph, to)?;
    if done.products > 0 {
        return Ok(done);
    }
    let other = |found: &DType| is_half(*found) && *found != to;
    match products(graph).find(other) {
        Some(found) => Err(PrecisionError::Other { found }),
        None => {
            let values = graph.values().map(|(value, _)| Some(value)).collect();
            Ok(Narrowed { graph: graph.clone(), values, products: 0 })
        }
    }
}

/// The types in which a graph multiplies.
pub fn products(graph: &Graph) -> impl Iterator<Item = DType> + '_ {
    graph.nodes().iter().filter(|node| is_product(&node.op)).map(|node| node.ty.dtype)
}

fn is_product(op: &Op) -> bool {
    matches!(op, Op::Einsum(_) | Op::Conv { .. } | Op::Attention { .. })
}

fn is_half(dtype: DType) -> bool {
    matches!(dtype, DType::F16 | DType::BF16)
}

/// True for operations that hand on elements of their first operand as they are.
fn moves(op: &Op) -> bool {
    matches!(
        op,
        Op::Broadcast { .. }
            | Op::Reshape { .. }
            | Op::Transpose { .. }
            | Op::Slice { .. }
            | Op::Pad { .. }
            | Op::GatherElements { .. }
            | Op::GatherNd { .. }
    )
}
