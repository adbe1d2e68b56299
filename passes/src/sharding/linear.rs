//! Which operands may hold partial values: `f(x ∘ y) = f(x) ∘ f(y)` for the operands of a set taken together, all
//! others being replicated.
//!
//! A coset `P(∘)` has many representatives, so a row here must hold for every one of them. Only laws of exact
//! arithmetic count: rounding to a narrower type, truncation and integers that are widened after they wrapped do not
//! distribute.

use super::holds_partials;
use tpshard_ir::op::{PadMode, PoolKind};
use tpshard_ir::{DType, Monoid, Op, Scalar, Type};

/// The operands that hold partial values of `monoid`; the result then does too.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LinearSet {
    pub monoid: Monoid,
    /// Per operand, whether it is partial. The others are replicated.
    pub operands: Vec<bool>,
}

/// The linear sets of `op` on operands of types `args`.
pub fn linear_sets(op: &Op, args: &[&Type], result: &Type) -> Vec<LinearSet> {
    use Monoid::{Max, Min, Prod, Sum};
    let set = |monoid: Monoid, members: &[usize]| LinearSet {
        monoid,
        operands: (0..args.len()).map(|i| members.contains(&i)).collect(),
    };
    let each = |members: &[usize]| Monoid::ALL.map(|m| set(m, members)).to_vec();
    let everything: Vec<usize> = (0..args.len()).collect();
    let found = match op {
        Op::Map(scalar) => map(*scalar, args, &set),
        Op::Einsum(_) | Op::Conv { .. } => vec![set(Sum, &[0]), set(Sum, &[1])],
        Op::Reduce { monoid, .. } | Op::Scan { monoid, .. } => vec![set(*monoid, &[0])],
        Op::Pool { kind, .. } => match kind {
            PoolKind::Max => vec![set(Max, &[0])],
            PoolKind::Average { .. } => vec![set(Sum, &[0])],
            PoolKind::Lp { .. } => vec![],
        },
        Op::Broadcast { .. } | Op::Reshape { .. } | Op::Transpose { .. } | Op::Slice { .. } => each(&[0]),
        Op::Pad { mode, .. } => match mode {
            // What is filled in is combined with itself.
            PadMode::Constant(value) => {
                let mut sets = vec![set(Max, &[0]), set(Min, &[0])];
                if value.0 == 0.0 {
                    sets.push(set(Sum, &[0]));
                }
                sets
            }
            PadMode::Reflect | PadMode::Edge | PadMode::Wrap => each(&[0]),
        },
        Op::Concat { .. } | Op::Append { .. } => each(&everything),
        // A window fills in zeros.
        Op::Gather { window: Some(_), .. } => vec![set(Sum, &[0])],
        Op::Gather { window: None, .. } | Op::GatherElements { .. } | Op::GatherNd { .. } => each(&[0]),
        Op::ScatterElements { monoid, .. } | Op::ScatterNd { monoid } => match monoid {
            None => each(&[0, 2]),
            Some(monoid) => vec![set(*monoid, &[0, 2])],
        },
        Op::Dequant { .. } => vec![set(Sum, &[1])],
        Op::Attention { .. } => vec![set(Sum, &[2])],
        Op::Rotary { .. } => vec![set(Sum, &[0])],
        Op::Input { .. }
        | Op::Weight(_)
        | Op::Literal(_)
        | Op::Size(_)
        | Op::Iota { .. }
        | Op::TopK { .. }
        | Op::Softmax { .. }
        | Op::Norm { .. }
        | Op::Deferred { .. }
        | Op::Convert(_) => vec![],
    };
    let typed = |set: &LinearSet| {
        set.operands.iter().zip(args).all(|(&member, ty)| !member || holds_partials(ty.dtype))
    };
    let possible =
        |set: &LinearSet| set.monoid != Prod || result.dtype.is_float() || result.dtype.is_integer();
    found.into_iter().filter(|s| holds_partials(result.dtype) && typed(s) && possible(s)).collect()
}

fn map(scalar: Scalar, args: &[&Type], set: &dyn Fn(Monoid, &[usize]) -> LinearSet) -> Vec<LinearSet> {
    use Monoid::{Max, Min, Prod, Sum};
    match scalar {
        Scalar::Neg => vec![set(Sum, &[0])],
        Scalar::Add | Scalar::Sub => vec![set(Sum, &[0, 1])],
        Scalar::Mul => vec![set(Sum, &[0]), set(Sum, &[1]), set(Prod, &[0, 1])],
        Scalar::Div if args[0].dtype.is_float() => vec![set(Sum, &[0]), set(Prod, &[0, 1])],
        Scalar::Max => vec![set(Max, &[0]), set(Max, &[1]), set(Max, &[0, 1])],
        Scalar::Min => vec![set(Min, &[0]), set(Min, &[1]), set(Min, &[0, 1])],
        Scalar::Select => Monoid::ALL.map(|m| set(m, &[1, 2])).to_vec(),
        Scalar::Cast(to) if widens(args[0].dtype, to) => Monoid::ALL.map(|m| set(m, &[0])).to_vec(),
        Scalar::Cast(_)
        | Scalar::Bits(_)
        | Scalar::Div
        | Scalar::Abs
        | Scalar::Sign
        | Scalar::Reciprocal
        | Scalar::Sqrt
        | Scalar::Rsqrt
        | Scalar::Exp
        | Scalar::Log
        | Scalar::Sin
        | Scalar::Cos
        | Scalar::Tan
        | Scalar::Asin
        | Scalar::Acos
        | Scalar::Atan
        | Scalar::Sinh
        | Scalar::Cosh
        | Scalar::Asinh
        | Scalar::Acosh
        | Scalar::Atanh
        | Scalar::Tanh
        | Scalar::Sigmoid
        | Scalar::Erf
        | Scalar::Floor
        | Scalar::Ceil
        | Scalar::Round
        | Scalar::IsNan
        | Scalar::IsInf
        | Scalar::Not
        | Scalar::BitNot
        | Scalar::Pow
        | Scalar::Mod
        | Scalar::Rem
        | Scalar::And
        | Scalar::Or
        | Scalar::Xor
        | Scalar::BitAnd
        | Scalar::BitOr
        | Scalar::BitXor
        | Scalar::ShiftLeft
        | Scalar::ShiftRight
        | Scalar::Equal
        | Scalar::Less
        | Scalar::LessEqual
        | Scalar::Greater
        | Scalar::GreaterEqual => vec![],
    }
}

/// True if a cast keeps every value.
fn widens(from: DType, to: DType) -> bool {
    use DType::{BF16, F16, F32, F64};
    from == to
        || match to {
            F32 => matches!(from, F16 | BF16),
            F64 => matches!(from, F16 | BF16 | F32),
            _ => false,
        }
}
