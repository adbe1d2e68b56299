//! Device tables as parts of a container, and back.
//!
//! `cuda/kernels` has one line per kernel (`kernel softmax_f32 256 read:f32 write:f32 size`) and per cubin (`cubin 90 12 9`).
//! An entry has one line per step (`step 7 step 0 launch`) and below it one per call
//! (`call 3 256 0 "blocks x" "y" "z" value 5 "0" size "4*seq"`). Dims stand in quotes. Then follow the values that may be made
//! in pieces (`pieces 7 "rows" "row" 256:2,1024:4 launch`), with the calls of a piece below.

use super::{Argument, Cubin, DeviceCode, DeviceKernel, DeviceLowering, DeviceStep, How, Launch, Matrix};
use super::{Parameter, Pieces, Product};
use crate::container::Payload;
use crate::dim::Dim;
use crate::graph::ValueId;
use crate::program::codec::{ProgramError, part};
use crate::program::lines::Words;
use crate::program::lowering::Stage;
use crate::text::{parse_dim, quote};
use std::collections::BTreeMap;
use std::fmt::Write;

const SOURCE: &str = "cuda/source.cu";
const KERNELS: &str = "cuda/kernels";
/// Most cubins of a program.
const MAX_CUBINS: usize = 16;

type Result<T> = std::result::Result<T, ProgramError>;

fn cubin_part(arch: u32) -> String {
    format!("cuda/sm_{arch}.cubin")
}

pub(in crate::program) fn write_code(code: &DeviceCode) -> Vec<(String, Vec<u8>)> {
    let mut table = String::new();
    for kernel in &code.kernels {
        let parameters: Vec<String> = kernel.parameters.iter().map(parameter_text).collect();
        // Writing to a string cannot fail.
        let _ = writeln!(table, "kernel {} {} {}", quote(&kernel.name), kernel.threads, parameters.join(" "));
    }
    for cubin in &code.cubins {
        let _ = writeln!(table, "cubin {} {} {}", cubin.arch, cubin.nvrtc.0, cubin.nvrtc.1);
    }
    let mut parts =
        vec![(SOURCE.to_string(), code.source.clone().into_bytes()), (KERNELS.into(), table.into_bytes())];
    parts.extend(code.cubins.iter().map(|cubin| (cubin_part(cubin.arch), cubin.bytes.clone())));
    parts
}

fn parameter_text(parameter: &Parameter) -> String {
    match parameter {
        Parameter::Read(dtype) => format!("read:{dtype}"),
        Parameter::Write(dtype) => format!("write:{dtype}"),
        Parameter::Size => "size".into(),
        Parameter::Real => "real".into(),
        Parameter::Fault => "fault".into(),
    }
}

/// The code that the kernels' table and the parts it names hold; `None` for programs without.
pub(in crate::program) fn read_code(payload: &Payload<'_>) -> Result<Option<DeviceCode>> {
    if payload.part(KERNELS).is_none() {
        return Ok(None);
    }
    let mut code = DeviceCode { source: part(payload, SOURCE)?.to_string(), ..DeviceCode::default() };
    for mut words in Words::lines(KERNELS, part(payload, KERNELS)?)? {
        match words.word("a key")?.as_str() {
            "kernel" => {
                let (name, threads) = (words.word("a name")?, words.parse("a number of threads")?);
                let parameters = words.rest::<String>("a parameter")?;
                let parameters: Option<Vec<Parameter>> =
                    parameters.iter().map(|text| parameter(text)).collect();
                let parameters = parameters.ok_or_else(|| words.error("an unknown kind of parameter"))?;
                code.kernels.push(DeviceKernel { name, parameters, threads });
            }
            "cubin" if code.cubins.len() < MAX_CUBINS => {
                let arch = words.parse("an architecture")?;
                let nvrtc = (words.parse("a version")?, words.parse("a version")?);
                let name = cubin_part(arch);
                let bytes = payload.part(&name).ok_or(ProgramError::Missing { part: name })?.to_vec();
                code.cubins.push(Cubin { arch, nvrtc, bytes });
            }
            other => return Err(words.error(format!("`{other}` is not known here"))),
        }
        words.end()?;
    }
    code.check().map_err(|what| ProgramError::Content { part: KERNELS.into(), what })?;
    Ok(Some(code))
}

fn parameter(text: &str) -> Option<Parameter> {
    match text.split_once(':') {
        Some(("read", dtype)) => Some(Parameter::Read(dtype.parse().ok()?)),
        Some(("write", dtype)) => Some(Parameter::Write(dtype.parse().ok()?)),
        Some(_) => None,
        None => match text {
            "size" => Some(Parameter::Size),
            "real" => Some(Parameter::Real),
            "fault" => Some(Parameter::Fault),
            _ => None,
        },
    }
}

fn dim_text(dim: &Dim) -> String {
    quote(&dim.to_string())
}

pub(in crate::program) fn write_lowering(lowering: &DeviceLowering) -> Vec<u8> {
    let mut out = String::new();
    for step in &lowering.steps {
        let stage = match step.stage {
            Stage::Load => "load",
            Stage::Step => "step",
        };
        let how = match &step.how {
            How::Leaf => "leaf".to_string(),
            How::Alias(value) => format!("alias {}", value.0),
            How::Launch(_) => "launch".into(),
            How::Product(product) => product_text(product),
            How::Append { state, .. } => format!("append {}", state.0),
            How::Convert => "convert".into(),
            How::Host => "host".into(),
        };
        let _ = writeln!(out, "step {} {stage} {} {how}", step.value.0, dim_text(&step.scratch));
        for launch in step.how.launches() {
            out.push_str(&launch_text(launch));
        }
    }
    for (value, pieces) in &lowering.pieces {
        let how = match &pieces.how {
            How::Product(product) => product_text(product),
            _ => "launch".to_string(),
        };
        let counts: Vec<String> =
            pieces.counts.iter().map(|(rows, count)| format!("{rows}:{count}")).collect();
        let dims = [&pieces.rows, &pieces.row].map(dim_text).join(" ");
        let _ = writeln!(out, "pieces {} {dims} {} {how}", value.0, counts.join(","));
        for launch in pieces.how.launches() {
            out.push_str(&launch_text(launch));
        }
    }
    out.into_bytes()
}

fn product_text(product: &Product) -> String {
    let matrix = |m: &Matrix| {
        let dims: Vec<String> = [&m.offset, &m.batch, &m.row, &m.column].map(dim_text).into();
        format!("{} {}", m.value.0, dims.join(" "))
    };
    let sizes = [&product.batch, &product.rows, &product.columns, &product.depth].map(dim_text).join(" ");
    let matrices = [&product.left, &product.right, &product.result].map(matrix).join(" ");
    format!("product {} {sizes} {matrices}", product.dtype)
}

fn launch_text(launch: &Launch) -> String {
    let blocks = launch.blocks.each_ref().map(dim_text).join(" ");
    let mut line = format!("call {} {} {} {blocks}", launch.kernel, launch.threads, launch.shared);
    for argument in &launch.arguments {
        let _ = match argument {
            Argument::Value { value, offset } => write!(line, " value {} {}", value.0, dim_text(offset)),
            Argument::Scratch { offset } => write!(line, " scratch {}", dim_text(offset)),
            Argument::Size(dim) => write!(line, " size {}", dim_text(dim)),
            Argument::Real(bits) => write!(line, " real {bits}"),
            Argument::Fault => write!(line, " fault"),
        };
    }
    line.push('\n');
    line
}

pub(in crate::program) fn read_lowering(payload: &Payload<'_>, name: &str) -> Result<DeviceLowering> {
    let mut steps: Vec<DeviceStep> = Vec::new();
    let mut pieces: BTreeMap<ValueId, Pieces> = BTreeMap::new();
    let mut last_cut = None;
    for mut words in Words::lines(name, part(payload, name)?)? {
        match words.word("a key")?.as_str() {
            "step" if pieces.is_empty() => steps.push(read_step(&mut words)?),
            "pieces" => {
                let (value, read) = read_pieces(&mut words)?;
                last_cut = Some(value);
                if pieces.insert(value, read).is_some() {
                    return Err(words.error(format!("the pieces of {value} a second time")));
                }
            }
            "call" => {
                let launch = read_launch(&mut words)?;
                let cut = last_cut.and_then(|value| pieces.get_mut(&value)).map(|pieces| &mut pieces.how);
                match cut.or_else(|| steps.last_mut().map(|step| &mut step.how)) {
                    Some(How::Launch(launches) | How::Append { launches, .. }) => launches.push(launch),
                    Some(How::Product(product)) => product.fallback.push(launch),
                    _ => return Err(words.error("a call without a step that calls")),
                }
            }
            other => return Err(words.error(format!("`{other}` is not known here"))),
        }
        words.end()?;
    }
    Ok(DeviceLowering { steps, pieces })
}

fn read_pieces(words: &mut Words<'_>) -> Result<(ValueId, Pieces)> {
    let value = value(words)?;
    let (rows, row) = (dim(words)?, dim(words)?);
    let text = words.word("numbers of pieces")?;
    let count = |word: &str| {
        let (rows, count) = word.split_once(':')?;
        Some((rows.parse().ok()?, count.parse().ok()?))
    };
    let counts: Option<Vec<(u64, u32)>> = text.split(',').map(count).collect();
    let counts = counts.ok_or_else(|| words.error(format!("`{text}` are no numbers of pieces")))?;
    let how = match words.word("a way")?.as_str() {
        "launch" => How::Launch(vec![]),
        "product" => How::Product(Box::new(read_product(words)?)),
        other => return Err(words.error(format!("`{other}` is no way to make pieces"))),
    };
    Ok((value, Pieces { rows, row, counts, how }))
}

fn value(words: &mut Words<'_>) -> Result<ValueId> {
    words.parse("a value").map(ValueId)
}

fn dim(words: &mut Words<'_>) -> Result<Dim> {
    let text = words.word("a dim")?;
    parse_dim(&text).map_err(|error| words.error(format!("the dim `{text}`: {error}")))
}

fn read_step(words: &mut Words<'_>) -> Result<DeviceStep> {
    let made = value(words)?;
    let stage = match words.word("a stage")?.as_str() {
        "load" => Stage::Load,
        "step" => Stage::Step,
        other => return Err(words.error(format!("`{other}` is not a stage"))),
    };
    let scratch = dim(words)?;
    let how = match words.word("a way")?.as_str() {
        "leaf" => How::Leaf,
        "alias" => How::Alias(value(words)?),
        "launch" => How::Launch(vec![]),
        "product" => How::Product(Box::new(read_product(words)?)),
        "append" => How::Append { state: value(words)?, launches: vec![] },
        "convert" => How::Convert,
        "host" => How::Host,
        other => return Err(words.error(format!("`{other}` is no way to make a value"))),
    };
    Ok(DeviceStep { value: made, stage, scratch, how })
}

fn read_product(words: &mut Words<'_>) -> Result<Product> {
    let dtype = words.parse("an element type")?;
    let (batch, rows, columns, depth) = (dim(words)?, dim(words)?, dim(words)?, dim(words)?);
    let mut matrix = || -> Result<Matrix> {
        let value = value(words)?;
        let (offset, batch) = (dim(words)?, dim(words)?);
        Ok(Matrix { value, offset, batch, row: dim(words)?, column: dim(words)? })
    };
    let (left, right, result) = (matrix()?, matrix()?, matrix()?);
    Ok(Product { batch, rows, columns, depth, left, right, result, dtype, fallback: vec![] })
}

fn read_launch(words: &mut Words<'_>) -> Result<Launch> {
    let (kernel, threads) = (words.parse("a kernel")?, words.parse("a number of threads")?);
    let shared = words.parse("a number of bytes")?;
    let blocks = [dim(words)?, dim(words)?, dim(words)?];
    let mut arguments = Vec::new();
    while !words.is_done() {
        arguments.push(match words.word("an argument")?.as_str() {
            "value" => Argument::Value { value: value(words)?, offset: dim(words)? },
            "scratch" => Argument::Scratch { offset: dim(words)? },
            "size" => Argument::Size(dim(words)?),
            "real" => Argument::Real(words.parse("the bits of a number")?),
            "fault" => Argument::Fault,
            other => return Err(words.error(format!("`{other}` is not an argument"))),
        });
    }
    Ok(Launch { kernel, blocks, threads, shared, arguments })
}
