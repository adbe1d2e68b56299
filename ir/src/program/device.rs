//! How a GPU executes a graph: kernel text shared by all entries of a rank, and for each entry the calls in order.
//!
//! Every value that has memory of its own lies there densely, row by row, in the order of its dims; only what grows in
//! place (a state and what is appended to it) is spaced for its capacity, [`capacity_symbol`]. Slices, transposes and
//! stretches are no calls: kernels read their operands through strides, which are dim expressions like the sizes of a
//! call, so that one kernel serves every shape and every layer. What no kernel computes is left to the CPU's executor.
//!
//! Nothing here knows a driver. `codegen` writes these tables and `runtime` follows them.

use super::lowering::Stage;
use crate::dim::Dim;
use crate::dtype::DType;
use crate::graph::ValueId;

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
}

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
}

/// How one value is made. Values without a step are read through the strides of others, or not at all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceStep {
    pub value: ValueId,
    pub stage: Stage,
    pub how: How,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum How {
    /// An input, a weight, a literal, a size: what the node says, copied to the device.
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
    Value { value: ValueId, offset: Dim },
    /// Scratch memory of the step: the element `offset` of a region that lives as long as the step.
    Scratch { offset: Dim },
    Size(Dim),
    /// Bits of an `f32`.
    Real(u32),
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
