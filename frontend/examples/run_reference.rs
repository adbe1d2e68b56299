//! Imports models, runs them in the reference interpreter and compares with recorded outputs:
//! `cargo run --release --example run_reference -- [--tolerance 1e-4] MODEL_FOLDER…`, where a folder holds `model.onnx`
//! and pairs `inputs*.npz`, `outputs*.npz`.

use anyhow::{Context, Result, bail};
use npyz::npz::NpzArchive;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::BufReader;
use std::path::Path;
use std::sync::Arc;
use tpshard_frontend::deferred::OnnxEvaluator;
use tpshard_frontend::{ImportOptions, Imported, import};
use tpshard_ir::interp::{OpError, run_tensors_with};
use tpshard_ir::weight::{WeightExpr, WeightKind};
use tpshard_ir::{DType, Data, Op, Tensor};

/// Most elements alive in the interpreter.
const ELEMENT_LIMIT: usize = 1 << 30;

fn main() {
    let (mut tolerance, mut failed) = (1e-4, false);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        if argument == "--tolerance" {
            tolerance = arguments.next().and_then(|value| value.parse().ok()).unwrap_or(tolerance);
            continue;
        }
        match check(Path::new(&argument), tolerance) {
            Ok(text) => println!("ok {argument}: {text}"),
            Err(error) => {
                failed = true;
                println!("FAIL {argument}: {error:#}");
            }
        }
    }
    std::process::exit(i32::from(failed));
}

fn check(folder: &Path, tolerance: f64) -> Result<String> {
    let imported = import(&folder.join("model.onnx"), &ImportOptions::default())?;
    let mut worst = Vec::new();
    for suffix in ["", "_alt"] {
        let inputs = folder.join(format!("inputs{suffix}.npz"));
        if inputs.exists() {
            let expected = read(&folder.join(format!("outputs{suffix}.npz")))?;
            let found = compare(&imported, read(&inputs)?, &expected, tolerance)
                .with_context(|| format!("pair `{suffix}`"))?;
            worst.push(format!("{found:.1e}"));
        }
    }
    Ok(worst.join(" "))
}

fn compare(
    imported: &Imported,
    inputs: BTreeMap<Arc<str>, Tensor>,
    expected: &BTreeMap<Arc<str>, Tensor>,
    tolerance: f64,
) -> Result<f64> {
    // Packed codes are read as the type and shape the graph gives them.
    let mut leaves = BTreeMap::new();
    for node in imported.graph.nodes() {
        if let Op::Weight(expr) = &node.op {
            collect(expr, &mut leaves);
        }
    }
    let initializer = |name: &str| -> Result<Tensor, OpError> {
        let other = |what: String| OpError::Other(what);
        let bytes = imported.initializer_bytes(name).map_err(|fault| other(fault.to_string()))?;
        let (dtype, shape) = leaves.get(name).cloned().ok_or_else(|| other(format!("no weight {name}")))?;
        Tensor::from_le_bytes(dtype, shape, &bytes).map_err(|error| other(error.to_string()))
    };
    let evaluator = OnnxEvaluator::default();
    let outputs = run_tensors_with(&imported.graph, &inputs, &initializer, ELEMENT_LIMIT, Some(&evaluator))?;
    let mut worst = 0.0f64;
    for (name, found) in outputs {
        let Some(wanted) = expected.get(&name) else { bail!("no recorded output {name}") };
        if wanted.shape() != found.shape() {
            bail!("{name} has shape {:?}, expected {:?}", found.shape(), wanted.shape());
        }
        let (found, wanted) = (numbers(&found)?, numbers(wanted)?);
        for (at, (a, b)) in found.iter().zip(&wanted).enumerate() {
            let error =
                if a == b || (a.is_nan() && b.is_nan()) { 0.0 } else { (a - b).abs() / (1.0 + b.abs()) };
            if error.is_nan() || error > tolerance {
                bail!("{name}[{at}] is {a}, expected {b}");
            }
            worst = worst.max(error);
        }
    }
    Ok(worst)
}

fn collect(expr: &WeightExpr, leaves: &mut BTreeMap<String, (DType, Vec<usize>)>) {
    match expr.kind() {
        WeightKind::Initializer { name } => {
            leaves.insert(name.clone(), (expr.dtype(), expr.shape().to_vec()));
        }
        WeightKind::Concat { sources, .. } => sources.iter().for_each(|source| collect(source, leaves)),
        WeightKind::Slice { source, .. }
        | WeightKind::Transpose { source, .. }
        | WeightKind::Reshape { source }
        | WeightKind::Cast { source } => collect(source, leaves),
    }
}

fn numbers(tensor: &Tensor) -> Result<Vec<f64>> {
    macro_rules! all {
        ($v:expr) => {
            $v.iter().map(|&x| x as f64).collect()
        };
    }
    Ok(match tensor.data() {
        Data::F32(v) => all!(v),
        Data::F64(v) => v.clone(),
        Data::F16(v) => v.iter().map(|x| x.to_f64()).collect(),
        Data::BF16(v) => v.iter().map(|x| x.to_f64()).collect(),
        Data::I64(v) => all!(v),
        Data::I32(v) => all!(v),
        Data::I16(v) => all!(v),
        Data::I8(v) => all!(v),
        Data::U64(v) => all!(v),
        Data::U32(v) => all!(v),
        Data::U16(v) => all!(v),
        Data::U8(v) => all!(v),
        Data::Bool(v) => v.iter().map(|&x| f64::from(u8::from(x))).collect(),
        Data::Raw(dtype, _) => bail!("outputs of {dtype}"),
    })
}

fn read(path: &Path) -> Result<BTreeMap<Arc<str>, Tensor>> {
    let mut archive = NpzArchive::new(BufReader::new(File::open(path)?))?;
    let names: Vec<String> = archive.array_names().map(str::to_owned).collect();
    let mut tensors = BTreeMap::new();
    for name in names {
        let array = archive.by_name(&name)?.context("an array that is not there")?;
        let shape: Vec<usize> = array.shape().iter().map(|&extent| extent as usize).collect();
        let dtype = array.dtype().descr();
        macro_rules! typed {
            ($($code:literal $ty:ty),*) => {
                match dtype.trim_matches(|c: char| !c.is_ascii_alphanumeric()) {
                    $($code => Tensor::from_vec(shape, array.into_vec::<$ty>()?)?,)*
                    _ => bail!("{name} is of type {dtype}"),
                }
            };
        }
        let tensor = typed!(
            "f4" f32, "f8" f64, "f2" half::f16, "i8" i64, "i4" i32, "i2" i16, "i1" i8, "u8" u64, "u4" u32, "u2" u16,
            "u1" u8, "b1" bool
        );
        tensors.insert(name.as_str().into(), tensor);
    }
    Ok(tensors)
}
