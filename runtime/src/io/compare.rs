//! Is what we got what we should have got? Element by element, `|got - ref| <= atol + rtol * |ref|`.
//!
//! NaN equals NaN and an infinity equals itself; nothing else is near them. Integers are compared exactly before the
//! tolerance is asked, so that large ones lose nothing. Because NumPy files hold `bf16` as `f32`, these two types may
//! be compared with each other; all other types must be the same.

use super::NamedTensors;
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use tpshard_ir::interp::{Domain, Real};
use tpshard_ir::{DType, Data, Tensor};

/// A tolerance as on the command line: `1e-4`, or `logits:1e-4` for one output.
#[derive(Clone, Debug, PartialEq)]
pub struct Tolerance {
    pub output: Option<String>,
    pub value: f64,
}

/// The text is not `[output:]number`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is not a tolerance\n  help: write a number, or an output's name, a colon and a number: 1e-4, logits:1e-4"
)]
pub struct BadTolerance(String);

impl FromStr for Tolerance {
    type Err = BadTolerance;

    fn from_str(text: &str) -> Result<Tolerance, BadTolerance> {
        // Names may hold colons themselves.
        let (output, number) = match text.rsplit_once(':') {
            Some((output, number)) => (Some(output.to_owned()), number),
            None => (None, text),
        };
        let value = number.trim().parse().ok().filter(|v: &f64| v.is_finite() && *v >= 0.0);
        match (value, &output) {
            (Some(value), output) if output.as_deref() != Some("") => {
                Ok(Tolerance { output: output.clone(), value })
            }
            _ => Err(BadTolerance(text.into())),
        }
    }
}

/// Absolute and relative tolerances, with exceptions per output. The last one given counts.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tolerances {
    atol: f64,
    rtol: f64,
    atol_of: BTreeMap<String, f64>,
    rtol_of: BTreeMap<String, f64>,
}

impl Tolerances {
    pub fn new(atol: f64, rtol: f64) -> Tolerances {
        Tolerances { atol, rtol, ..Tolerances::default() }
    }

    pub fn set_atol(&mut self, tolerance: Tolerance) {
        match tolerance.output {
            Some(output) => drop(self.atol_of.insert(output, tolerance.value)),
            None => self.atol = tolerance.value,
        }
    }

    pub fn set_rtol(&mut self, tolerance: Tolerance) {
        match tolerance.output {
            Some(output) => drop(self.rtol_of.insert(output, tolerance.value)),
            None => self.rtol = tolerance.value,
        }
    }

    /// `atol` and `rtol` for an output.
    pub fn of(&self, output: &str) -> (f64, f64) {
        let pick = |special: &BTreeMap<String, f64>, general| special.get(output).copied().unwrap_or(general);
        (pick(&self.atol_of, self.atol), pick(&self.rtol_of, self.rtol))
    }

    /// Outputs with a tolerance of their own, to be checked against the outputs there are.
    pub fn outputs(&self) -> impl Iterator<Item = &str> {
        self.atol_of.keys().chain(self.rtol_of.keys()).map(String::as_str)
    }
}

/// How one output compares.
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    Compared {
        elements: usize,
        out_of_tolerance: usize,
        /// Infinite if NaN or infinity met something else.
        max_abs_error: f64,
        /// Over the elements whose reference is not zero.
        max_rel_error: f64,
        /// Where the absolute error is largest; `None` if all elements are equal.
        worst: Option<Vec<usize>>,
    },
    Shape {
        got: Vec<usize>,
        reference: Vec<usize>,
    },
    DType {
        got: DType,
        reference: DType,
    },
    /// In the reference only.
    Missing,
    /// Not in the reference.
    Unexpected,
    /// A storage type, compared byte by byte.
    Bytes {
        equal: bool,
    },
}

/// One output's verdict.
#[derive(Clone, Debug, PartialEq)]
pub struct OutputResult {
    pub name: String,
    pub atol: f64,
    pub rtol: f64,
    pub verdict: Verdict,
}

impl OutputResult {
    pub fn passed(&self) -> bool {
        matches!(self.verdict, Verdict::Compared { out_of_tolerance: 0, .. } | Verdict::Bytes { equal: true })
    }
}

/// All outputs' verdicts, in the reference's order.
#[derive(Clone, Debug, PartialEq)]
pub struct Comparison {
    pub outputs: Vec<OutputResult>,
}

impl Comparison {
    /// True if every output is within its tolerance. An empty reference proves nothing and does not pass.
    pub fn passed(&self) -> bool {
        !self.outputs.is_empty() && self.outputs.iter().all(OutputResult::passed)
    }
}

/// Compares two sets of tensors.
pub fn compare(got: &NamedTensors, reference: &NamedTensors, tolerances: &Tolerances) -> Comparison {
    let result = |name: &String, verdict: Verdict| {
        let (atol, rtol) = tolerances.of(name);
        OutputResult { name: name.clone(), atol, rtol, verdict }
    };
    let mut outputs = vec![];
    for (name, expected) in reference {
        let verdict = match got.get(name) {
            Some(tensor) => compare_tensors(tensor, expected, tolerances.of(name)),
            None => Verdict::Missing,
        };
        outputs.push(result(name, verdict));
    }
    let unexpected = got.keys().filter(|name| !reference.contains_key(*name));
    outputs.extend(unexpected.map(|name| result(name, Verdict::Unexpected)));
    Comparison { outputs }
}

fn compare_tensors(got: &Tensor, reference: &Tensor, tolerance: (f64, f64)) -> Verdict {
    if got.shape() != reference.shape() {
        return Verdict::Shape { got: got.shape().to_vec(), reference: reference.shape().to_vec() };
    }
    let (a, b) = (got.dtype(), reference.dtype());
    let exchanged = matches!((a, b), (DType::BF16, DType::F32) | (DType::F32, DType::BF16));
    if a != b && !exchanged {
        return Verdict::DType { got: a, reference: b };
    }
    match (Numbers::of(got), Numbers::of(reference)) {
        (Some(Numbers::Floats(a)), Some(Numbers::Floats(b))) => {
            let pairs = a.zip(b).map(|(a, b)| (float_error(a, b), b.abs()));
            tally(pairs, reference.shape(), tolerance)
        }
        (Some(Numbers::Integers(a)), Some(Numbers::Integers(b))) => {
            let pairs = a.zip(b).map(|(a, b)| ((a - b).unsigned_abs() as f64, b.unsigned_abs() as f64));
            tally(pairs, reference.shape(), tolerance)
        }
        _ => Verdict::Bytes { equal: got.data() == reference.data() },
    }
}

fn float_error(got: f64, reference: f64) -> f64 {
    if got == reference || (got.is_nan() && reference.is_nan()) {
        0.0
    } else if got.is_finite() && reference.is_finite() {
        (got - reference).abs()
    } else {
        f64::INFINITY
    }
}

/// Elements as numbers that hold all of them exactly.
enum Numbers<'a> {
    Floats(Box<dyn Iterator<Item = f64> + 'a>),
    Integers(Box<dyn Iterator<Item = i128> + 'a>),
}

impl<'a> Numbers<'a> {
    fn of(tensor: &'a Tensor) -> Option<Numbers<'a>> {
        macro_rules! integers {
            ($values:expr) => {
                Numbers::Integers(Box::new($values.iter().map(|&v| i128::from(v))))
            };
        }
        Some(match tensor.data() {
            Data::F32(v) => Numbers::Floats(Box::new(v.iter().map(|&v| f64::from(v)))),
            Data::F16(v) => Numbers::Floats(Box::new(v.iter().map(|v| v.to_f64()))),
            Data::BF16(v) => Numbers::Floats(Box::new(v.iter().map(|v| v.to_f64()))),
            Data::F64(v) => Numbers::Floats(Box::new(v.iter().copied())),
            Data::I8(v) => integers!(v),
            Data::I16(v) => integers!(v),
            Data::I32(v) => integers!(v),
            Data::I64(v) => integers!(v),
            Data::U8(v) => integers!(v),
            Data::U16(v) => integers!(v),
            Data::U32(v) => integers!(v),
            Data::U64(v) => integers!(v),
            Data::Bool(v) => integers!(v),
            Data::Raw(dtype, _) if dtype.is_float() => {
                let numbers = Real.import(tensor).elements().iter().map(|n| n.float()).collect::<Vec<_>>();
                Numbers::Floats(Box::new(numbers.into_iter()))
            }
            Data::Raw(..) => return None,
        })
    }
}

fn tally(pairs: impl Iterator<Item = (f64, f64)>, shape: &[usize], (atol, rtol): (f64, f64)) -> Verdict {
    let (mut elements, mut out_of_tolerance, mut max_abs_error, mut max_rel_error) = (0, 0, 0.0, 0.0);
    let mut worst = None;
    for (index, (error, magnitude)) in pairs.enumerate() {
        elements += 1;
        // An infinite or NaN reference would make the bound infinite or NaN; only its equal is within it.
        let bound = if magnitude.is_finite() { atol + rtol * magnitude } else { 0.0 };
        out_of_tolerance += usize::from(error > bound);
        if error > max_abs_error {
            (max_abs_error, worst) = (error, Some(index));
        }
        if magnitude > 0.0 && error > 0.0 {
            let relative = if magnitude.is_finite() { error / magnitude } else { f64::INFINITY };
            max_rel_error = f64::max(max_rel_error, relative);
        }
    }
    let worst = worst.map(|index| coordinates(index, shape));
    Verdict::Compared { elements, out_of_tolerance, max_abs_error, max_rel_error, worst }
}

fn coordinates(mut index: usize, shape: &[usize]) -> Vec<usize> {
    let mut at: Vec<usize> = shape
        .iter()
        .rev()
        .map(|&size| {
            let here = index % size.max(1);
            index /= size.max(1);
            here
        })
        .collect();
    at.reverse();
    at
}

impl fmt::Display for OutputResult {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = if self.passed() { "PASSED" } else { "FAILED" };
        write!(f, "{word} {}: ", self.name)?;
        match &self.verdict {
            Verdict::Compared { elements, out_of_tolerance, max_abs_error, max_rel_error, worst } => {
                write!(f, "max abs error {max_abs_error:.3e}, max rel error {max_rel_error:.3e}")?;
                if let Some(worst) = worst {
                    write!(f, " at {worst:?}")?;
                }
                write!(
                    f,
                    ", {out_of_tolerance} of {elements} beyond atol {:e} rtol {:e}",
                    self.atol, self.rtol
                )
            }
            Verdict::Shape { got, reference } => write!(f, "shape {got:?}, should be {reference:?}"),
            Verdict::DType { got, reference } => write!(f, "type {got}, should be {reference}"),
            Verdict::Missing => f.write_str("is missing"),
            Verdict::Unexpected => f.write_str("is not in the reference"),
            Verdict::Bytes { equal: true } => f.write_str("equal bytes"),
            Verdict::Bytes { equal: false } => f.write_str("different bytes"),
        }
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for output in &self.outputs {
            writeln!(f, "{output}")?;
        }
        f.write_str(if self.passed() { "PASSED" } else { "FAILED" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(name: &str, tensor: Tensor) -> NamedTensors {
        NamedTensors::from_iter([(name.to_owned(), tensor)])
    }

    fn f32s(values: &[f32]) -> Tensor {
        Tensor::from_vec(vec![values.len()], values.to_vec()).unwrap()
    }

    #[test]
    fn tolerance_is_absolute_plus_relative() {
        let reference = set("y", f32s(&[100.0, 0.0]));
        let line =
            |got: &[f32]| compare(&set("y", f32s(got)), &reference, &Tolerances::new(0.5, 0.01)).to_string();
        assert!(line(&[101.5, 0.5]).ends_with("PASSED"));
        let failed = line(&[101.6, 0.4]);
        assert!(
            failed
                .starts_with("FAILED y: max abs error 1.600e0, max rel error 1.600e-2 at [0], 1 of 2 beyond")
        );
        assert!(failed.ends_with("\nFAILED"));
    }

    #[test]
    fn nan_and_infinity_equal_only_themselves() {
        let (nan, inf) = (f32::NAN, f32::INFINITY);
        for (got, reference, passes) in [
            (nan, nan, true),
            (inf, inf, true),
            (-inf, -inf, true),
            (nan, 1.0, false),
            (1.0, nan, false),
            (inf, -inf, false),
            (1.0, inf, false),
            (inf, 1.0, false),
            (nan, inf, false),
        ] {
            let loose = Tolerances::new(1e30, 1e30);
            let result = compare(&set("y", f32s(&[got])), &set("y", f32s(&[reference])), &loose);
            assert_eq!(result.passed(), passes, "{got} against {reference}");
        }
    }

    #[test]
    fn large_integers_are_compared_exactly() {
        let scalar = |v: u64| set("y", Tensor::scalar(v));
        let result = compare(&scalar(u64::MAX), &scalar(u64::MAX - 1), &Tolerances::default());
        assert!(matches!(result.outputs[0].verdict, Verdict::Compared { max_abs_error: 1.0, .. }));
    }

    #[test]
    fn shapes_types_and_names_must_match() {
        let y = |tensor| set("y", tensor);
        let verdict = |got: &NamedTensors, reference: &NamedTensors| {
            let comparison = compare(got, reference, &Tolerances::new(1.0, 0.0));
            assert!(!comparison.passed());
            comparison.to_string()
        };
        let one = y(f32s(&[1.0]));
        assert!(verdict(&one, &y(f32s(&[1.0, 2.0]))).contains("shape [1], should be [2]"));
        assert!(
            verdict(&one, &y(Tensor::from_vec(vec![1], vec![1i32]).unwrap()))
                .contains("type f32, should be i32")
        );
        assert!(verdict(&one, &set("z", f32s(&[1.0]))).contains("FAILED z: is missing\nFAILED y: is not in"));
        assert!(verdict(&NamedTensors::new(), &NamedTensors::new()).contains("FAILED"));
        let brain = y(Tensor::from_vec(vec![1], vec![half::bf16::from_f32(1.0)]).unwrap());
        assert!(compare(&brain, &one, &Tolerances::default()).passed());
    }

    #[test]
    fn the_worst_element_is_found() {
        let tensor = |at: usize| {
            let mut values = vec![0f32; 24];
            values[at] = 3.0;
            set("y", Tensor::from_vec(vec![2, 3, 4], values).unwrap())
        };
        let result = compare(&tensor(23), &tensor(23), &Tolerances::default());
        assert!(matches!(&result.outputs[0].verdict, Verdict::Compared { worst: None, .. }));
        let mut got = tensor(23);
        got["y"].as_mut_slice::<f32>().unwrap()[17] = -5.0;
        let result = compare(&got, &tensor(23), &Tolerances::default());
        assert!(
            matches!(&result.outputs[0].verdict, Verdict::Compared { worst: Some(at), .. } if *at == [1, 1, 1])
        );
    }

    #[test]
    fn tolerances_are_parsed_and_the_specific_one_wins() {
        let mut tolerances = Tolerances::new(1e-5, 0.0);
        tolerances.set_atol("a:b:1e-2".parse().unwrap());
        tolerances.set_rtol("0.5".parse().unwrap());
        assert_eq!(tolerances.of("a:b"), (1e-2, 0.5));
        assert_eq!(tolerances.of("other"), (1e-5, 0.5));
        for bad in ["", "x", "y:", ":1", "-1", "nan", "y:inf"] {
            assert!(bad.parse::<Tolerance>().is_err(), "{bad}");
        }
    }
}
