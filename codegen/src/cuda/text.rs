//! Building one call of a kernel: parameters, arguments and text grow together.
//!
//! Sizes that are the same dim share a parameter, and 0 and 1 are written as numbers, so that the text of a kernel says how
//! its operands lie but not how large they are. Calls whose text and parameters are equal call one kernel.

use super::space::Offsets;
use std::collections::BTreeMap;
use std::fmt::Write;
use tpshard_ir::program::device::{Argument, DeviceCode, DeviceKernel, Launch, Parameter};
use tpshard_ir::{DType, Dim, ValueId};

/// Threads of a block, where nothing asks for another number.
pub(super) const THREADS: u32 = 256;
/// Most blocks of a call: enough for every card, and loops take the rest.
const MAX_BLOCKS: i64 = 1 << 16;

/// Kernels by their text.
#[derive(Default)]
pub(super) struct Kernels {
    kernels: Vec<DeviceKernel>,
    /// Text with the name left out, and the kernel's index.
    known: BTreeMap<(String, String), usize>,
    /// How many kernels there are of a family.
    families: BTreeMap<String, usize>,
    source: String,
}

impl Kernels {
    /// All kernels, after `prelude`.
    pub(super) fn finish(self, prelude: &str) -> DeviceCode {
        DeviceCode { source: format!("{prelude}{}", self.source), kernels: self.kernels, cubins: vec![] }
    }

    fn index(
        &mut self,
        family: &str,
        threads: u32,
        parameters: Vec<Parameter>,
        head: &str,
        body: String,
    ) -> usize {
        let text = format!("{head}\n{body}");
        let key = (format!("{family} {threads}"), text);
        if let Some(&known) = self.known.get(&key) {
            return known;
        }
        let count = self.families.entry(family.into()).or_default();
        *count += 1;
        let name = if *count == 1 { family.to_string() } else { format!("{family}_{count}") };
        let index = self.kernels.len();
        // Writing to a string cannot fail.
        let _ = write!(
            self.source,
            "\nextern \"C\" __global__ void __launch_bounds__({threads}) {name}({head}) {{\n{body}}}\n"
        );
        self.known.insert(key, index);
        self.kernels.push(DeviceKernel { name, parameters, threads });
        index
    }
}

/// The C type of elements in memory. Packed integers are read from bytes.
pub(super) fn c_type(dtype: DType) -> Option<&'static str> {
    Some(match dtype {
        DType::F32 => "float",
        DType::F16 => "f16",
        DType::BF16 => "bf16",
        DType::F64 => "double",
        DType::I8 => "signed char",
        DType::I16 => "short",
        DType::I32 => "int",
        DType::I64 => "i64",
        DType::U8 | DType::Bool | DType::I4 | DType::U4 | DType::I2 | DType::U2 => "unsigned char",
        DType::U16 => "unsigned short",
        DType::U32 => "unsigned",
        DType::U64 => "u64",
        DType::F4E2M1
        | DType::F8E4M3FN
        | DType::F8E4M3FNUZ
        | DType::F8E5M2
        | DType::F8E5M2FNUZ
        | DType::F8E8M0 => return None,
    })
}

/// The C type that elements are computed in.
pub(super) fn wide_type(dtype: DType) -> &'static str {
    match dtype {
        DType::F64 => "double",
        DType::Bool => "bool",
        DType::U64 => "u64",
        dtype if dtype.is_float() => "float",
        _ => "i64",
    }
}

/// A call under construction.
pub(super) struct Call {
    parameters: Vec<(Parameter, String)>,
    arguments: Vec<Argument>,
    sizes: BTreeMap<Dim, String>,
    body: String,
    depth: usize,
    counter: usize,
}

impl Call {
    pub(super) fn new() -> Call {
        let (parameters, arguments, sizes) = (vec![], vec![], BTreeMap::new());
        Call { parameters, arguments, sizes, body: String::new(), depth: 1, counter: 0 }
    }

    fn parameter(&mut self, parameter: Parameter, name: &str, argument: Argument) -> String {
        self.parameters.push((parameter, name.into()));
        self.arguments.push(argument);
        name.into()
    }

    /// An operand in memory.
    pub(super) fn read(&mut self, name: &str, dtype: DType, value: ValueId, offset: &Dim) -> String {
        self.parameter(Parameter::Read(dtype), name, Argument::Value { value, offset: offset.clone() })
    }

    /// The result's memory.
    pub(super) fn write(&mut self, name: &str, dtype: DType, value: ValueId, offset: &Dim) -> String {
        self.parameter(Parameter::Write(dtype), name, Argument::Value { value, offset: offset.clone() })
    }

    /// Scratch memory, to be written or read.
    pub(super) fn scratch(&mut self, name: &str, parameter: Parameter, offset: Dim) -> String {
        self.parameter(parameter, name, Argument::Scratch { offset })
    }

    /// A size: a number if it is 0 or 1, else a parameter.
    pub(super) fn size(&mut self, dim: &Dim) -> String {
        if let Some(number @ (0 | 1)) = dim.as_const() {
            return number.to_string();
        }
        self.variable(dim)
    }

    /// A size that is a parameter in any case.
    pub(super) fn variable(&mut self, dim: &Dim) -> String {
        if let Some(known) = self.sizes.get(dim) {
            return known.clone();
        }
        let name = format!("n{}", self.sizes.len());
        self.sizes.insert(dim.clone(), name.clone());
        self.parameter(Parameter::Size, &name, Argument::Size(dim.clone()))
    }

    /// A number that is not part of the text.
    pub(super) fn real(&mut self, number: f32) -> String {
        let name = self.fresh("r");
        self.parameter(Parameter::Real, &name, Argument::Real(number.to_bits()))
    }

    /// The arguments of functions that may meet a fault: `fault, step`.
    pub(super) fn fault(&mut self, value: ValueId) -> String {
        if !self.parameters.iter().any(|(p, _)| *p == Parameter::Fault) {
            self.parameter(Parameter::Fault, "fault", Argument::Fault);
            self.parameter(Parameter::Size, "step", Argument::Size(Dim::constant(i64::from(value.0))));
        }
        "fault, step".into()
    }

    /// A name not used yet.
    pub(super) fn fresh(&mut self, stem: &str) -> String {
        self.counter += 1;
        format!("{stem}{}", self.counter)
    }

    /// A line of the body.
    pub(super) fn line(&mut self, text: impl AsRef<str>) {
        let text = text.as_ref();
        if text.starts_with('}') {
            self.depth = self.depth.saturating_sub(1);
        }
        let _ = writeln!(self.body, "{}{text}", "    ".repeat(self.depth));
        if text.ends_with('{') {
            self.depth += 1;
        }
    }

    /// Several lines.
    pub(super) fn lines(&mut self, text: &str) {
        for line in text.lines().map(str::trim).filter(|line| !line.is_empty()) {
            self.line(line);
        }
    }

    /// Begins a loop of all threads of all blocks over `count` elements.
    pub(super) fn for_each(&mut self, index: &str, count: &Dim) {
        let count = self.variable(count);
        self.line(format!(
            "for (i64 {index} = blockIdx.x * (i64)blockDim.x + threadIdx.x; {index} < {count}; \
             {index} += gridDim.x * (i64)blockDim.x) {{"
        ));
    }

    /// Begins a loop of blocks over `count` rows.
    pub(super) fn for_each_row(&mut self, index: &str, count: &Dim) {
        let count = self.variable(count);
        self.line(format!("for (i64 {index} = blockIdx.x; {index} < {count}; {index} += gridDim.x) {{"));
    }

    /// Declares where the operands of `offsets` are at the linear index `index`; the names of the places.
    pub(super) fn places(&mut self, offsets: &Offsets, index: &str) -> Vec<String> {
        let coordinates = self.coordinates(&offsets.extents, index);
        offsets.strides.iter().map(|strides| self.sum(&coordinates, strides)).collect()
    }

    /// Declares the index along each of several dims at the linear index `index`.
    pub(super) fn coordinates(&mut self, extents: &[Dim], index: &str) -> Vec<String> {
        let Some((_, inner)) = extents.split_first() else { return vec![] };
        if inner.is_empty() {
            return vec![index.into()];
        }
        let rest = self.fresh("rest");
        self.line(format!("i64 {rest} = {index};"));
        let mut names = Vec::with_capacity(extents.len());
        for extent in inner.iter().rev() {
            let (name, extent) = (self.fresh("i"), self.size(extent));
            self.line(format!("i64 {name} = split({rest}, {extent});"));
            names.push(name);
        }
        names.push(rest);
        names.reverse();
        names
    }

    /// `coordinates · strides` as an expression.
    pub(super) fn sum(&mut self, coordinates: &[String], strides: &[Dim]) -> String {
        let mut terms = Vec::new();
        for (coordinate, stride) in coordinates.iter().zip(strides) {
            match self.size(stride).as_str() {
                "0" => {}
                "1" => terms.push(coordinate.clone()),
                stride => terms.push(format!("{coordinate} * {stride}")),
            }
        }
        if terms.is_empty() { "0".into() } else { terms.join(" + ") }
    }

    /// A call by all threads of enough blocks for `count` elements.
    pub(super) fn over(self, kernels: &mut Kernels, family: &str, count: &Dim) -> Launch {
        let blocks = count.ceil_div(&Dim::constant(i64::from(THREADS)));
        self.finish(kernels, family, THREADS, [blocks, Dim::constant(1), Dim::constant(1)], 0)
    }

    /// A call with a block for each of `rows`.
    pub(super) fn over_rows(self, kernels: &mut Kernels, family: &str, rows: &Dim, threads: u32) -> Launch {
        self.finish(kernels, family, threads, [rows.clone(), Dim::constant(1), Dim::constant(1)], 0)
    }

    pub(super) fn finish(
        self,
        kernels: &mut Kernels,
        family: &str,
        threads: u32,
        blocks: [Dim; 3],
        shared: u32,
    ) -> Launch {
        let head: Vec<String> = self.parameters.iter().map(|(p, name)| declaration(*p, name)).collect();
        let parameters = self.parameters.into_iter().map(|(p, _)| p).collect();
        let kernel = kernels.index(family, threads, parameters, &head.join(", "), self.body);
        let [x, y, z] = blocks;
        let blocks = [x.minimum(&Dim::constant(MAX_BLOCKS)), y, z];
        Launch { kernel, blocks, threads, shared, arguments: self.arguments }
    }
}

fn declaration(parameter: Parameter, name: &str) -> String {
    let ty = |dtype| c_type(dtype).unwrap_or("unsigned char");
    match parameter {
        Parameter::Read(dtype) => format!("const {} *{name}", ty(dtype)),
        Parameter::Write(dtype) => format!("{} *{name}", ty(dtype)),
        Parameter::Size => format!("i64 {name}"),
        Parameter::Real => format!("float {name}"),
        Parameter::Fault => format!("i64 *{name}"),
    }
}

/// An element in the type it is computed in.
pub(super) fn load(dtype: DType, array: &str, place: &str) -> String {
    match dtype {
        DType::Bool => format!("({array}[{place}] != 0)"),
        DType::I4 => format!("packed_i4({array}, {place})"),
        DType::U4 => format!("packed_u4({array}, {place})"),
        DType::I2 => format!("packed_i2({array}, {place})"),
        DType::U2 => format!("packed_u2({array}, {place})"),
        _ => format!("wide({array}[{place}])"),
    }
}

/// Writes an element.
pub(super) fn store(array: &str, place: &str, value: &str) -> String {
    format!(
        "put({array} + {}, {value});",
        if place.contains(' ') { format!("({place})") } else { place.into() }
    )
}
