//! The one table all sharding comes from.
//!
//! Per operation the table says two things. Its *factors*: each is an iteration index, with the dims it is the major
//! part of; splitting it splits those dims, and a factor that is reduced leaves partial values. Its *linear sets*:
//! which operands may hold partial values, and what the result then holds. From these [`squares`] generates every
//! typing `l(op(x…)) = op'(l1 x1 …)` on one mesh axis, and [`squares_on_mesh`] composes axes. Which attributes change
//! on a rank is said by `tpshard_ir::spmd`; what a change of layout costs in communication is said by
//! [`conversions`].
//!
//! What must not live here: costs, searches, names of models.
//!
//! A new operation needs one row in `factors`, one in `linear_sets`, and an instance in `tests/squares.rs`, which
//! executes every square it gets.

mod contract;
mod convert;
mod deal;
mod index;
mod leaf;
mod linear;
mod movement;
mod pointwise;
mod print;
mod square;

pub use convert::{conversions, is_well_formed};
pub use deal::{Units, candidate_units, canonical};
pub use linear::{LinearSet, linear_sets};
pub use print::rule_text;
pub use square::{Deals, MeshSquare, Square, squares, squares_on_mesh};

use tpshard_ir::{DType, DTypeClass, Dim, Monoid, Op, Type};

/// A dim a factor is the major part of: its extent is `count · inner`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FactorDim {
    pub dim: usize,
    /// How many consecutive elements of the dim belong to one step of the factor.
    pub inner: Dim,
}

impl FactorDim {
    pub fn whole(dim: usize) -> FactorDim {
        FactorDim { dim, inner: Dim::constant(1) }
    }

    pub fn of(dim: usize, inner: Dim) -> FactorDim {
        FactorDim { dim, inner }
    }
}

/// Where a factor appears in the result.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum FactorResult {
    Dim(FactorDim),
    /// The operation combines all its steps.
    Reduced(Monoid),
}

/// One iteration index of an operation.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Factor {
    /// Number of steps.
    pub count: Dim,
    /// Per operand the dim it is the major part of; an operand without one is needed whole by every step.
    pub operands: Vec<Option<FactorDim>>,
    pub result: FactorResult,
}

impl Factor {
    /// A factor that is a dim of the result.
    fn pass(count: &Dim, operands: Vec<Option<FactorDim>>, result: FactorDim) -> Factor {
        Factor { count: count.clone(), operands, result: FactorResult::Dim(result) }
    }

    /// A factor that is combined.
    fn reduced(count: &Dim, operands: Vec<Option<FactorDim>>, monoid: Monoid) -> Factor {
        Factor { count: count.clone(), operands, result: FactorResult::Reduced(monoid) }
    }

    /// True if every dim it names exists and has `count · inner` elements.
    fn fits(&self, args: &[&Type], result: &Type) -> bool {
        let fits = |ty: &Type, named: &FactorDim| {
            ty.shape.get(named.dim).is_some_and(|extent| *extent == &self.count * &named.inner)
        };
        self.operands.len() == args.len()
            && self.operands.iter().zip(args).all(|(f, ty)| f.as_ref().is_none_or(|f| fits(ty, f)))
            && match &self.result {
                FactorResult::Dim(named) => fits(result, named),
                FactorResult::Reduced(_) => true,
            }
    }
}

/// The factors of `op` on operands of types `args`. Factors of one step are left out: there is nothing to split.
pub fn factors(op: &Op, args: &[&Type], result: &Type) -> Vec<Factor> {
    let all = match op {
        Op::Input { .. } | Op::Weight(_) | Op::Literal(_) | Op::Size(_) | Op::Iota { .. } => {
            leaf::factors(op, result)
        }
        Op::Map(_) => pointwise::map(args, result),
        Op::Scan { axis, .. } | Op::Softmax { axis } | Op::TopK { axis, .. } => {
            pointwise::all_but(&[*axis], args, result)
        }
        Op::Norm { axis, .. } => pointwise::norm(*axis, args, result),
        Op::Rotary { .. } => pointwise::rotary(args, result),
        Op::Einsum(spec) => contract::einsum(spec, args),
        Op::Reduce { monoid, axes } => contract::reduce(*monoid, axes, args, result),
        Op::Conv { groups, .. } => contract::conv(*groups, args, result),
        Op::Pool { .. } => contract::pool(args, result),
        Op::Dequant { axis, block } => contract::dequant(*axis, *block, args, result),
        Op::Attention { kv_of_head, .. } => contract::attention(kv_of_head, args),
        Op::Broadcast { .. } => movement::broadcast(args, result),
        Op::Reshape { .. } => movement::reshape(args, result),
        Op::Transpose { perm } => movement::transpose(perm, result),
        Op::Slice { axis, .. } => pointwise::all_but(&[*axis], args, result),
        Op::Pad { low, high, .. } => movement::pad(low, high, args, result),
        Op::Concat { axis } | Op::Append { axis } => pointwise::all_but(&[*axis], args, result),
        Op::Gather { axis, window } => index::gather(*axis, window.is_some(), args, result),
        Op::GatherElements { axis } => index::gather_elements(*axis, args, result),
        Op::GatherNd { batch_dims } => index::gather_nd(*batch_dims, args, result),
        Op::ScatterElements { axis, .. } => index::scatter_elements(*axis, args, result),
        Op::ScatterNd { .. } => index::scatter_nd(args, result),
        // An unknown function of whole operands.
        Op::Deferred { .. } | Op::Convert(_) => vec![],
    };
    all.into_iter().filter(|f| !f.count.is_one() && f.fits(args, result)).collect()
}

/// True for the types partial values may have: those that arithmetic is done in.
fn holds_partials(dtype: DType) -> bool {
    dtype.class() != DTypeClass::Bool
        && matches!(
            dtype,
            DType::F32
                | DType::F16
                | DType::BF16
                | DType::F64
                | DType::I8
                | DType::I16
                | DType::I32
                | DType::I64
                | DType::U8
                | DType::U16
                | DType::U32
                | DType::U64
        )
}
