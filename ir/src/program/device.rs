//! How a GPU executes a graph: kernel text shared by all entries of a rank, and for each entry the calls in order.
//!
//! Every value that has memory of its own lies there densely, row by row, in the order of its dims; only what grows in
//! place (a state and what is appended to it) is spaced for its capacity, [`capacity_symbol`]. Slices, transposes and
//! stretches are no calls: kernels read their operands through strides, which are dim expressions like the sizes of a
//! call, so that one kernel serves every shape and every layer. What no kernel computes is left to the CPU's executor.
//!
//! What depends on data can go wrong while a kernel runs: an index out of range. Then the kernel goes on with an index that
//! is in range and notes what it met in four words, [`Argument::Fault`], which are looked at when the run has ended.
//!
//! Nothing here knows a driver. `codegen` writes these tables and `runtime` follows them.

mod check;
mod codec;
pub mod pieces;

pub use check::DeviceError;
pub(super) use codec::{read_code, read_lowering, write_code, write_lowering};
pub use pieces::Pieces;

use super::lowering::Stage;
use crate::dim::Dim;
use crate::dtype::DType;
use crate::graph::{Graph, ValueId};
use std::collections::{BTreeMap, BTreeSet};

/// The symbol that stands for the room along the growing dim of state pair `pair` of a program: the capacity of a
/// session's state, or the length of the present where state enters and leaves as plain tensors.
pub fn capacity_symbol(pair: usize) -> String {
    format!("@capacity{pair}")
}

/// What all entries of a rank program share.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceCode {
    /// CUDA C++ of all kernels, complete: it includes nothing.
    pub source: String,
    pub kernels: Vec<DeviceKernel>,
    /// The source, compiled. May be empty: then the runtime compiles at its first start.
    pub cubins: Vec<Cubin>,
}

/// A function of the source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceKernel {
    /// Its C name.
    pub name: String,
    pub parameters: Vec<Parameter>,
    /// Threads of a block, at most; kernels run with fewer.
    pub threads: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parameter {
    /// `const T *`
    Read(DType),
    /// `T *`
    Write(DType),
    /// `long long`
    Size,
    /// `float`
    Real,
    /// `long long *`: four words, zero before a run. A kernel that meets a fault stores a [fault code](FAULT_INDEX), the
    /// number of the step's value (which it is given as a size), the index met and the extent it is outside of.
    Fault,
}

/// Fault code: an index is out of range.
pub const FAULT_INDEX: i64 = 1;
/// Fault code: a division of integers by zero.
pub const FAULT_DIVISION: i64 = 2;

/// Most threads of a block.
pub const MAX_THREADS: u32 = 1024;
/// Most bytes of dynamic shared memory that a call asks for: what every card has without asking.
pub const MAX_SHARED: u32 = 48 << 10;

/// Machine code for one architecture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cubin {
    /// 90 for `sm_90`.
    pub arch: u32,
    /// Version of the compiler, which says which drivers load the code.
    pub nvrtc: (u32, u32),
    pub bytes: Vec<u8>,
}

/// The calls of one entry.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceLowering {
    pub steps: Vec<DeviceStep>,
    /// Values that may be made in pieces, because they are products and all that follows is a sum over ranks.
    pub pieces: BTreeMap<ValueId, Pieces>,
}

/// How one value is made. Values without a step are read through the strides of others, or not at all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceStep {
    pub value: ValueId,
    /// Steps of [`Stage::Load`] are [`How::Leaf`]: the CPU's executor computes them when a session opens.
    pub stage: Stage,
    /// Bytes of scratch memory that the step's calls use.
    pub scratch: Dim,
    pub how: How,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum How {
    /// An input, a weight, a literal, a size, or what depends on weights alone: copied to the device.
    Leaf,
    /// The same memory as another value, in another shape.
    Alias(ValueId),
    /// Kernels, one after another; the last one completes the value.
    Launch(Vec<Launch>),
    /// A batched matrix product, by a library if there is one, else by kernels.
    Product(Box<Product>),
    /// `Append`: the state's memory is taken over, and kernels write what is new behind it. If the state is still needed
    /// or has no room, it is copied first.
    Append { state: ValueId, launches: Vec<Launch> },
    /// A change of layout: collectives on whole values.
    Convert,
    /// By the CPU's executor, on copies of the operands.
    Host,
}

/// One call of a kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Index in [`DeviceCode::kernels`].
    pub kernel: usize,
    /// Blocks along x, y and z. A call with no block is left out.
    pub blocks: [Dim; 3],
    pub threads: u32,
    /// Bytes of dynamic shared memory.
    pub shared: u32,
    /// One for every parameter.
    pub arguments: Vec<Argument>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Argument {
    /// The memory of a value, from its element `offset`.
    Value {
        value: ValueId,
        offset: Dim,
    },
    /// Scratch memory of the step, from its byte `offset`.
    Scratch {
        offset: Dim,
    },
    Size(Dim),
    /// Bits of an `f32`.
    Real(u32),
    Fault,
}

/// `result[b, m, n] = sum over k of left[b, m, k] * right[b, k, n]`, 16-bit floats accumulated in `f32`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Product {
    pub batch: Dim,
    pub rows: Dim,
    pub columns: Dim,
    pub depth: Dim,
    pub left: Matrix,
    pub right: Matrix,
    pub result: Matrix,
    /// Type of all three.
    pub dtype: DType,
    /// The same by our own kernels.
    pub fallback: Vec<Launch>,
}

/// A matrix in the memory of a value: element `(b, i, j)` lies at `offset + b * batch + i * row + j * column`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Matrix {
    pub value: ValueId,
    pub offset: Dim,
    pub batch: Dim,
    pub row: Dim,
    pub column: Dim,
}

impl How {
    /// The calls of own kernels.
    pub fn launches(&self) -> &[Launch] {
        match self {
            How::Launch(launches) | How::Append { launches, .. } => launches,
            How::Product(product) => &product.fallback,
            How::Leaf | How::Alias(_) | How::Convert | How::Host => &[],
        }
    }
}

impl DeviceStep {
    /// The values that the step reads, ascending, each once: all of them have a step of their own, before this one.
    pub fn reads(&self, graph: &Graph) -> Vec<ValueId> {
        let mut reads: BTreeSet<ValueId> = BTreeSet::new();
        for argument in self.how.launches().iter().flat_map(|launch| &launch.arguments) {
            if let Argument::Value { value, .. } = argument
                && *value != self.value
            {
                reads.insert(*value);
            }
        }
        match &self.how {
            How::Alias(value) | How::Append { state: value, .. } => {
                reads.insert(*value);
            }
            How::Product(product) => reads.extend([product.left.value, product.right.value]),
            How::Convert | How::Host => reads.extend(graph.node(self.value).args.iter().copied()),
            How::Leaf | How::Launch(_) => {}
        }
        reads.into_iter().collect()
    }
}
