//! The closed list of operations.
//!
//! *Primitives* say what a model computes; *composites* (softmax, norm, attention, rotary) are shorthands that each
//! have a decomposition into primitives and exist for speed; *conversions* change the layout of a family and are the
//! only operations in which ranks communicate. Every operation has exactly one result. Attributes hold only what the
//! operand types and the result type do not say already.

use crate::deferred::DeferredCall;
use crate::dim::Dim;
use crate::dtype::DType;
use crate::graph::Type;
use crate::layout::Monoid;
use crate::tensor::Tensor;
use crate::weight::WeightExpr;
use std::cmp::Ordering;
use std::fmt;
use std::sync::Arc;

/// A real attribute, compared by its bits so that operations can be hashed and ordered.
#[derive(Clone, Copy, Debug)]
pub struct Real(pub f64);

impl PartialEq for Real {
    fn eq(&self, other: &Real) -> bool {
        self.0.to_bits() == other.0.to_bits()
    }
}
impl Eq for Real {}
impl std::hash::Hash for Real {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.0.to_bits().hash(state);
    }
}
impl PartialOrd for Real {
    fn partial_cmp(&self, other: &Real) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Real {
    fn cmp(&self, other: &Real) -> Ordering {
        self.0.total_cmp(&other.0)
    }
}

/// A small constant tensor written out in the graph; compared by type, shape and bytes.
#[derive(Clone, Debug)]
pub struct Literal(pub Arc<Tensor>);

impl Literal {
    fn key(&self) -> (DType, &[usize], Vec<u8>) {
        (self.0.dtype(), self.0.shape(), self.0.data().to_le_bytes())
    }
}
impl PartialEq for Literal {
    fn eq(&self, other: &Literal) -> bool {
        Arc::ptr_eq(&self.0, &other.0) || self.key() == other.key()
    }
}
impl Eq for Literal {}
impl std::hash::Hash for Literal {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.key().hash(state);
    }
}
impl PartialOrd for Literal {
    fn partial_cmp(&self, other: &Literal) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Literal {
    fn cmp(&self, other: &Literal) -> Ordering {
        self.key().cmp(&other.key())
    }
}

macro_rules! scalar_functions {
    ($($(#[$doc:meta])* $variant:ident $name:literal $arity:literal;)*) => {
        /// A function applied elementwise by [`Op::Map`].
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Scalar {
            $($(#[$doc])* $variant,)*
            /// To another element type. Float to integer truncates; to `bool` tests for non-zero.
            Cast(DType),
            /// The same bits as another element type of the same width.
            Bits(DType),
        }

        impl Scalar {
            /// Every function but those that take a type.
            pub const ALL: &'static [Scalar] = &[$(Scalar::$variant,)*];

            /// The text name; one for all types a function takes.
            pub fn name(self) -> &'static str {
                match self { $(Scalar::$variant => $name,)* Scalar::Cast(_) => "cast", Scalar::Bits(_) => "bits" }
            }

            /// Number of operands.
            pub fn arity(self) -> usize {
                match self { $(Scalar::$variant => $arity,)* Scalar::Cast(_) | Scalar::Bits(_) => 1 }
            }
        }
    };
}

scalar_functions! {
    Neg "neg" 1;
    Abs "abs" 1;
    Sign "sign" 1;
    Reciprocal "reciprocal" 1;
    Sqrt "sqrt" 1;
    Rsqrt "rsqrt" 1;
    Exp "exp" 1;
    Log "log" 1;
    Sin "sin" 1;
    Cos "cos" 1;
    Tan "tan" 1;
    Asin "asin" 1;
    Acos "acos" 1;
    Atan "atan" 1;
    Sinh "sinh" 1;
    Cosh "cosh" 1;
    Asinh "asinh" 1;
    Acosh "acosh" 1;
    Atanh "atanh" 1;
    Tanh "tanh" 1;
    Sigmoid "sigmoid" 1;
    Erf "erf" 1;
    Floor "floor" 1;
    Ceil "ceil" 1;
    /// To the nearest integer, halves to even.
    Round "round" 1;
    IsNan "is_nan" 1;
    /// True for either infinity.
    IsInf "is_inf" 1;
    /// Logical negation of `bool`.
    Not "not" 1;
    BitNot "bit_not" 1;
    Add "add" 2;
    Sub "sub" 2;
    Mul "mul" 2;
    /// Integer division truncates; division by zero is an error for integers.
    Div "div" 2;
    Pow "pow" 2;
    /// NaN if either operand is.
    Min "min" 2;
    /// NaN if either operand is.
    Max "max" 2;
    /// Remainder with the sign of the divisor.
    Mod "mod" 2;
    /// Remainder with the sign of the dividend, C's `fmod`.
    Rem "rem" 2;
    And "and" 2;
    Or "or" 2;
    Xor "xor" 2;
    BitAnd "bit_and" 2;
    BitOr "bit_or" 2;
    BitXor "bit_xor" 2;
    ShiftLeft "shift_left" 2;
    ShiftRight "shift_right" 2;
    Equal "equal" 2;
    Less "less" 2;
    LessEqual "less_equal" 2;
    Greater "greater" 2;
    GreaterEqual "greater_equal" 2;
    /// `select(condition, if_true, if_false)`.
    Select "select" 3;
}

/// Index letters of a contraction: every operand dim and result dim has one; letters missing from the result are
/// summed over.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EinsumSpec {
    pub inputs: Vec<Vec<u8>>,
    pub output: Vec<u8>,
}

impl EinsumSpec {
    /// From text such as `bsk,kn->bsn`; letters are ASCII lower case.
    pub fn parse(text: &str) -> Option<EinsumSpec> {
        let (inputs, output) = text.split_once("->")?;
        let letters =
            |t: &str| t.bytes().all(|b| b.is_ascii_alphabetic()).then(|| t.bytes().collect::<Vec<u8>>());
        let inputs = inputs.split(',').map(letters).collect::<Option<Vec<_>>>()?;
        Some(EinsumSpec { inputs, output: letters(output)? })
    }

    /// All letters, in order of first use.
    pub fn letters(&self) -> Vec<u8> {
        let mut seen = Vec::new();
        for &letter in self.inputs.iter().flatten().chain(&self.output) {
            if !seen.contains(&letter) {
                seen.push(letter);
            }
        }
        seen
    }
}

impl fmt::Display for EinsumSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = |v: &[u8]| v.iter().map(|&b| b as char).collect::<String>();
        let inputs: Vec<String> = self.inputs.iter().map(|v| text(v)).collect();
        write!(f, "{}->{}", inputs.join(","), text(&self.output))
    }
}

/// A sliding window over the trailing spatial dims.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Window {
    pub kernel: Vec<usize>,
    pub strides: Vec<usize>,
    pub dilations: Vec<usize>,
    pub pads_low: Vec<usize>,
    pub pads_high: Vec<usize>,
    /// Round the number of windows up (a last window may start inside the low padding or the data, never past it).
    pub ceil: bool,
}

/// How a pooling window is reduced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PoolKind {
    Max,
    Average {
        count_padding: bool,
    },
    /// `(sum |x|^p)^(1/p)`.
    Lp {
        p: u32,
    },
}

/// What a pad is filled with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PadMode {
    Constant(Real),
    Reflect,
    Edge,
    Wrap,
}

/// Layer norm subtracts the mean, RMS norm does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum NormKind {
    Layer,
    Rms,
}

/// Where a rank's slice of a gathered table lies: indices are global, `start` is the first row held here and
/// `extent` the global number of rows. Rows held elsewhere read as zero.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TableWindow {
    pub start: Dim,
    pub extent: Dim,
}

/// One operation. Operand order is given in the comments; `x` is the first operand.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Op {
    // Leaves.
    /// A graph input (or past state) of the given name.
    Input {
        name: Arc<str>,
    },
    /// A constant from the model's data, as a lazy expression over initializers.
    Weight(WeightExpr),
    /// A small constant.
    Literal(Literal),
    /// The value of a dim expression, a rank-0 `i64`.
    Size(Dim),
    /// `start, start + 1, …`: a rank-1 `i64` of the result's extent.
    Iota {
        start: Dim,
        length: Dim,
    },

    // Computation.
    /// `f(x, …)` elementwise; operands broadcast as in NumPy (aligned right, constant-1 dims stretch).
    Map(Scalar),
    /// Sum of products over two operands. 16-bit floats accumulate in `f32`.
    Einsum(EinsumSpec),
    /// Reduces `axes` to extent 1 (dims are kept).
    Reduce {
        monoid: Monoid,
        axes: Vec<usize>,
    },
    /// Running reduction along `axis`.
    Scan {
        monoid: Monoid,
        axis: usize,
        exclusive: bool,
        reverse: bool,
    },
    /// Convolution of `x[N, C, …]` with `w[M, C/groups, …]`; no bias.
    Conv {
        window: Window,
        groups: usize,
    },
    /// Pooling of `x[N, C, …]`.
    Pool {
        kind: PoolKind,
        window: Window,
    },
    /// Indices (`i64`) of the `k` largest or smallest along `axis`, best first, ties by lower index.
    TopK {
        axis: usize,
        k: Dim,
        largest: bool,
    },

    // Movement.
    /// Stretches to `shape`, NumPy alignment.
    Broadcast {
        shape: Vec<Dim>,
    },
    Reshape {
        shape: Vec<Dim>,
    },
    /// Result dim `i` is operand dim `perm[i]`.
    Transpose {
        perm: Vec<usize>,
    },
    /// `length` elements from `start` in steps of `step` (negative steps walk down) along `axis`.
    Slice {
        axis: usize,
        start: Dim,
        length: Dim,
        step: i64,
    },
    Pad {
        low: Vec<Dim>,
        high: Vec<Dim>,
        mode: PadMode,
    },
    Concat {
        axis: usize,
    },
    /// `x[…, indices, …]` along `axis`; negative indices count from the end.
    Gather {
        axis: usize,
        window: Option<TableWindow>,
    },
    /// ONNX GatherElements.
    GatherElements {
        axis: usize,
    },
    /// ONNX GatherND.
    GatherNd {
        batch_dims: usize,
    },
    /// ONNX ScatterElements of `(x, indices, updates)`; without a monoid updates replace.
    ScatterElements {
        axis: usize,
        monoid: Option<Monoid>,
    },
    /// ONNX ScatterND of `(x, indices, updates)`.
    ScatterNd {
        monoid: Option<Monoid>,
    },
    /// `(q - zero) * scale` of `(q, scale[, zero])`, where `scale` has one entry per `block` elements of `axis` and
    /// the extent of `q` elsewhere. The result has the type of `scale`.
    Dequant {
        axis: usize,
        block: usize,
    },
    /// `concat(state, new)` along `axis`, in place where the state is owned.
    Append {
        axis: usize,
    },

    // Composites.
    Softmax {
        axis: usize,
    },
    /// Of `(x, scale[, bias])` over dims `axis..`: `(x - mean) / sqrt(variance + epsilon) * scale + bias`, for RMS
    /// `x / sqrt(mean(x²) + epsilon) * scale + bias`. `scale` and `bias` have the dims `axis..`, and the type of `x`
    /// or, where that has 16 bits, `f32`.
    Norm {
        kind: NormKind,
        axis: usize,
        epsilon: Real,
    },
    /// Of `(q[b,h,s,d], k[b,g,t,d], v[b,g,t,e][, bias])`: `softmax(cap(scale · q kᵀ) + bias) v`, where query head `i`
    /// uses KV head `kv_of_head[i]`, `cap(x) = c·tanh(x/c)`, and `bias` broadcasts to `[b,h,s,t]`. It has the type of
    /// `q` or, where that has 16 bits, `f32`.
    /// With `empty_rows_zero` a row whose scores are all -inf gives zeros instead of NaN.
    Attention {
        scale: Real,
        softcap: Option<Real>,
        kv_of_head: Vec<u32>,
        empty_rows_zero: bool,
    },
    /// Of `(x[…, 2m], cos[…, m], sin[…, m])`: rotates pairs `(x1, x2)` to `(x1·cos - x2·sin, x1·sin + x2·cos)`;
    /// pairs are the two halves, or neighbours if `interleaved`. `cos` and `sin` have the type of `x` or, where that has
    /// 16 bits, `f32`.
    Rotary {
        interleaved: bool,
    },

    /// Result `output` of an operation that is understood only when its operands are known. It says its own type:
    /// symbols there that no input gives a value are defined by the result.
    Deferred {
        call: Arc<DeferredCall>,
        output: usize,
        ty: Type,
    },

    /// A change of layout.
    Convert(Conversion),
}

/// The changes of layout. `axes` are mesh axes, ascending; the group is the ranks that differ on them only.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Conversion {
    /// `R → S(dim, unit)`: keeps this rank's part; no communication.
    ShardSlice { axes: Vec<usize>, dim: usize, unit: Dim },
    /// `R → P(monoid)`: all but the first rank of the group hold the identity; no communication.
    OnlyFirst { axes: Vec<usize>, monoid: Monoid },
    /// `S(dim, unit) → R`.
    AllGather { axes: Vec<usize>, dim: usize, unit: Dim },
    /// `S(from, from_unit) → S(to, to_unit)`.
    AllToAll { axes: Vec<usize>, from: usize, from_unit: Dim, to: usize, to_unit: Dim },
    /// `P(monoid) → R`.
    AllReduce { axes: Vec<usize>, monoid: Monoid },
    /// `P(monoid) → S(dim, unit)`.
    ReduceScatter { axes: Vec<usize>, monoid: Monoid, dim: usize, unit: Dim },
    /// `S(dim, from_unit) → S(dim, to_unit)`: the same dim dealt in other units.
    Redeal { axes: Vec<usize>, dim: usize, from_unit: Dim, to_unit: Dim },
    /// Moves a family between device sets; reserved for pipeline stages.
    Transfer,
    /// Reduces the blocks of `axis` over all ranks of the group in one canonical binary tree, so that the result does
    /// not depend on how many ranks hold them: `S(axis) → R`, `axis` becoming extent 1.
    TreeReduce { axes: Vec<usize>, axis: usize, unit: Dim },
}

impl Conversion {
    /// The mesh axes that change.
    pub fn axes(&self) -> &[usize] {
        match self {
            Conversion::ShardSlice { axes, .. }
            | Conversion::OnlyFirst { axes, .. }
            | Conversion::AllGather { axes, .. }
            | Conversion::AllToAll { axes, .. }
            | Conversion::AllReduce { axes, .. }
            | Conversion::ReduceScatter { axes, .. }
            | Conversion::Redeal { axes, .. }
            | Conversion::TreeReduce { axes, .. } => axes,
            Conversion::Transfer => &[],
        }
    }

    /// The text name.
    pub fn name(&self) -> &'static str {
        match self {
            Conversion::ShardSlice { .. } => "shard_slice",
            Conversion::OnlyFirst { .. } => "only_first",
            Conversion::AllGather { .. } => "all_gather",
            Conversion::AllToAll { .. } => "all_to_all",
            Conversion::AllReduce { .. } => "all_reduce",
            Conversion::ReduceScatter { .. } => "reduce_scatter",
            Conversion::Redeal { .. } => "redeal",
            Conversion::Transfer => "transfer",
            Conversion::TreeReduce { .. } => "tree_reduce",
        }
    }

    /// True if ranks exchange data.
    pub fn communicates(&self) -> bool {
        !matches!(self, Conversion::ShardSlice { .. } | Conversion::OnlyFirst { .. })
    }
}

impl Op {
    /// The text name.
    pub fn name(&self) -> &'static str {
        match self {
            Op::Input { .. } => "input",
            Op::Weight(_) => "weight",
            Op::Literal(_) => "literal",
            Op::Size(_) => "size",
            Op::Iota { .. } => "iota",
            Op::Map(scalar) => scalar.name(),
            Op::Einsum(_) => "einsum",
            Op::Reduce { .. } => "reduce",
            Op::Scan { .. } => "scan",
            Op::Conv { .. } => "conv",
            Op::Pool { .. } => "pool",
            Op::TopK { .. } => "top_k",
            Op::Broadcast { .. } => "broadcast",
            Op::Reshape { .. } => "reshape",
            Op::Transpose { .. } => "transpose",
            Op::Slice { .. } => "slice",
            Op::Pad { .. } => "pad",
            Op::Concat { .. } => "concat",
            Op::Gather { .. } => "gather",
            Op::GatherElements { .. } => "gather_elements",
            Op::GatherNd { .. } => "gather_nd",
            Op::ScatterElements { .. } => "scatter_elements",
            Op::ScatterNd { .. } => "scatter_nd",
            Op::Dequant { .. } => "dequant",
            Op::Append { .. } => "append",
            Op::Softmax { .. } => "softmax",
            Op::Norm { .. } => "norm",
            Op::Attention { .. } => "attention",
            Op::Rotary { .. } => "rotary",
            Op::Deferred { .. } => "deferred",
            Op::Convert(conversion) => conversion.name(),
        }
    }

    /// True for operations without operands.
    pub fn is_leaf(&self) -> bool {
        matches!(self, Op::Input { .. } | Op::Weight(_) | Op::Literal(_) | Op::Size(_) | Op::Iota { .. })
    }

    /// True for operations that have a decomposition into primitives.
    pub fn is_composite(&self) -> bool {
        matches!(self, Op::Softmax { .. } | Op::Norm { .. } | Op::Attention { .. } | Op::Rotary { .. })
    }

    /// True if the result holds the operand's elements unchanged in the same order: a view, free at run time.
    pub fn is_view(&self) -> bool {
        matches!(self, Op::Reshape { .. })
    }
}
