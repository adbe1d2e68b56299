//! Families of kernels on random operands.

use super::case::{Case, case, program};
use super::library::Kernels;
use super::machine::Machine;
use tpshard_ir::interp::{Domain, Num, Real};
use tpshard_ir::program::device::How;
use tpshard_ir::{DType, Tensor};

/// How far a result may be from the reference, as a share of the largest element.
fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => 2e-3,
        DType::BF16 => 1.6e-2,
        DType::F64 => 1e-12,
        _ => 1e-5,
    }
}

/// The first difference that is too large.
pub(crate) fn difference(found: &Tensor, wanted: &Tensor) -> Option<String> {
    if found.dtype() != wanted.dtype() || found.shape() != wanted.shape() {
        return Some(format!("{}{:?}", found.dtype(), found.shape()));
    }
    let (found, wanted) = (Real.import(found), Real.import(wanted));
    let float = |n: &Num| if let Num::Float(x) = n { *x } else { 0.0 };
    let range =
        wanted.elements().iter().map(|n| float(n).abs()).filter(|x| x.is_finite()).fold(0.0, f64::max);
    let bound = (tolerance(wanted.dtype) * range).max(1e-37);
    let differs = |(a, b): (&Num, &Num)| match (a, b) {
        (Num::Int(a), Num::Int(b)) => a != b,
        _ => {
            let (a, b) = (float(a), float(b));
            !(a == b || a.is_nan() && b.is_nan() || (a - b).abs() <= bound)
        }
    };
    let at = found.elements().iter().zip(wanted.elements()).position(differs)?;
    Some(format!("element {at}: {:?}, not {:?}", found.elements()[at], wanted.elements()[at]))
}

/// Runs every case in all modes. `host` says how many steps may be left to the CPU, over all cases.
pub(crate) fn check(cases: &[Case], host: usize) {
    let program = program(cases);
    let folder = tempfile::tempdir().unwrap();
    let source = &program.device.as_ref().unwrap().source;
    let kernels = Kernels::compile(source, folder.path()).unwrap_or_else(|error| panic!("{error}"));
    let mut left = 0;
    for (index, case) in cases.iter().enumerate() {
        let reference = case.reference();
        for order in [None, Some(0), Some(1), Some(7)] {
            kernels.set_order(order);
            let mut machine = Machine::new(&program, index, &kernels, case, &reference);
            machine.run().unwrap_or_else(|error| panic!("{}\norder {order:?}: {error}", case.text));
            assert_eq!(machine.fault, [0; 4], "{}", case.text);
            for output in &case.graph.outputs {
                let found = machine.read(output.value);
                if let Some(difference) = difference(&found, &reference[output.value.index()]) {
                    let steps = &program.entries[index].device.as_ref().unwrap().steps;
                    panic!("{}\norder {order:?}: {difference}\n{steps:#?}", case.text);
                }
            }
            left += if order.is_none() { machine.host } else { 0 };
        }
    }
    assert_eq!(left, host, "steps left to the CPU");
}

const FLOATS: [&str; 4] = ["f32", "f16", "bf16", "f64"];
const SINGLE: [&str; 3] = ["f32", "f16", "bf16"];

fn elementwise_functions_of_floats_cases() -> Vec<Case> {
    let unary = "neg abs sign reciprocal sqrt rsqrt exp log sin cos tan asin acos atan sinh cosh asinh acosh atanh tanh \
                 sigmoid erf floor ceil round is_nan is_inf";
    let binary = "add sub mul div pow min max mod rem equal less less_equal greater greater_equal";
    let mut cases = Vec::new();
    for dtype in FLOATS {
        for function in unary.split_whitespace() {
            cases.push(case("n=70", &format!("x: {dtype}[n, 3]\n{function} (0)")));
        }
        for function in binary.split_whitespace() {
            cases.push(case("n=9", &format!("x: {dtype}[n, 3]\ny: {dtype}[3]\n{function} (0, 1)")));
        }
    }
    cases
}

fn elementwise_functions_of_integers_cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for dtype in ["i8", "i16", "i32", "i64", "u8", "u16", "u32", "u64"] {
        for function in "neg abs sign bit_not".split_whitespace() {
            cases.push(case("n=40", &format!("x: {dtype}[n, 3]\n{function} (0)")));
        }
        let functions = "add sub mul min max bit_and bit_or bit_xor shift_left shift_right equal less less_equal greater \
                         greater_equal";
        for function in functions.split_whitespace() {
            cases.push(case("n=9", &format!("x: {dtype}[n, 30]\ny: {dtype}[30]\n{function} (0, 1)")));
        }
        if dtype != "u64" {
            for function in "div mod rem".split_whitespace() {
                cases
                    .push(case("n=9", &format!("x: {dtype}[n, 30]\ny: {dtype}[30] 1..9\n{function} (0, 1)")));
            }
        }
    }
    for function in "div mod rem".split_whitespace() {
        cases.push(case("n=9", &format!("x: i32[n, 30]\ny: i32[30] -9..-1\n{function} (0, 1)")));
    }
    cases
}

fn casts_cases() -> Vec<Case> {
    let types = "f32 f16 bf16 f64 i8 i16 i32 i64 u8 u16 u32 u64 bool";
    let mut cases = Vec::new();
    for from in types.split_whitespace() {
        for to in types.split_whitespace() {
            let range = match from {
                "bool" => "",
                "f32" | "f64" => " -3000000000..4000000000",
                "f16" | "bf16" => " -300..400",
                _ => " 0..90",
            };
            cases.push(case("", &format!("x: {from}[40]{range}\ncast {{to={to}}} (0)")));
        }
    }
    cases
}

fn bools_and_selections_cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for function in "and or xor equal".split_whitespace() {
        cases.push(case("n=9", &format!("x: bool[n, 30]\ny: bool[30]\n{function} (0, 1)")));
    }
    cases.push(case("n=9", "x: bool[n, 30]\nnot (0)"));
    for dtype in ["f32", "f16", "f64", "i8", "i64", "u64", "bool"] {
        let text = format!("c: bool[n, 1]\nx: {dtype}[n, 30]\ny: {dtype}[30]\nselect (0, 1, 2)");
        cases.push(case("n=9", &text));
    }
    cases
}

fn fused_regions_read_through_views_cases() -> Vec<Case> {
    let cases = [
        "x: f32[b, s, 8]\nw: f32[8]\nmul (0, 1)\nliteral f32[] [0.5] ()\nadd (2, 3)\nsigmoid (4)\nmul (4, 5)",
        "x: f32[b, s, 8]\ntranspose {perm=[0, 2, 1]} (0)\nexp (1)\ny: f32[b, 8, s]\nadd (2, 3)",
        "x: f32[b, s, 8]\nslice {axis=2, start=5, length=3, step=-2} (0)\nneg (1)",
        "x: f32[b, s, 8]\nslice {axis=1, start=s - 1, length=1, step=1} (0)\nbroadcast {shape=[b, s, 8]} (1)\nsub (0, 2)",
        "x: i64[s]\nsize {value=4*b + s} ()\nadd (0, 1)\nliteral i64[1] [7] ()\nmul (2, 3)",
        "x: f16[b, s, 8]\ny: f16[b, s, 8]\nmul (0, 1)\ncast {to=f32} (2)\ncast {to=f16} (3)\nadd (4, 0)",
        "x: f32[b, s, 8]\nreshape {shape=[b*s, 2, 4]} (0)\ntranspose {perm=[0, 2, 1]} (1)\nreshape {shape=[b, s, 8]} (2)\nadd (0, 3)",
        "iota {start=b, length=s + 40} ()\ncast {to=f32} (0)\nsin (1)",
        "x: f32[b, s, 8]\nreshape {shape=[b*s*8]} (0)",
        "x: f32[b, s, 8]\ntranspose {perm=[2, 0, 1]} (0)",
        "x: f32[1, s, 1]\nbroadcast {shape=[b, s, 4]} (0)",
    ];
    let cases: Vec<Case> = cases
        .iter()
        .flat_map(|text| ["b=2 s=5", "b=1 s=1", "b=3 s=100", "b=0 s=4"].map(|b| case(b, text)))
        .collect();
    cases
}

fn copies_concatenations_and_pads_cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for dtype in ["f32", "f16", "bool", "i64", "u8"] {
        cases.push(case("s=4", &format!("x: {dtype}[s, 3]\ny: {dtype}[s, 5]\nconcat {{axis=1}} (0, 1, 0)")));
        cases.push(case("s=4", &format!("x: {dtype}[s, 3]\ny: {dtype}[2, 3]\nappend {{axis=0}} (0, 1)")));
    }
    for mode in ["constant(1.5)", "reflect", "edge", "wrap"] {
        let text = format!("x: f32[s, 5, 2]\npad {{low=[2, 1, 0], high=[s, 3, 0], mode={mode}}} (0)");
        cases.push(case("s=4", &text));
        let text = format!(
            "x: f16[s, 5]\ntranspose {{perm=[1, 0]}} (0)\npad {{low=[1, 0], high=[0, 2], mode={mode}}} (1)"
        );
        cases.push(case("s=3", &text));
    }
    cases.push(case("", "x: i64[5]\npad {low=[2], high=[1], mode=constant(-7.0)} (0)"));
    cases.push(case("", "x: f32[5, 4]\npad {low=[-1, 2], high=[-2, 0], mode=constant(-inf)} (0)"));
    cases
}

fn gathers_cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for dtype in ["f32", "bf16", "i64", "bool"] {
        for index in ["i64", "i32"] {
            let text = format!("t: {dtype}[9, 6]\ni: {index}[b, s] -9..9\ngather {{axis=0}} (0, 1)");
            cases.push(case("b=2 s=5", &text));
        }
        cases
            .push(case("b=2 s=5", &format!("t: {dtype}[b, 9, 3]\ni: i64[s] 0..9\ngather {{axis=1}} (0, 1)")));
        cases.push(case("b=2 s=5", &format!("t: {dtype}[b, 9]\ni: i64[] 0..9\ngather {{axis=1}} (0, 1)")));
        let text = format!("t: {dtype}[9, 4]\ni: i64[s] 0..30\ngather {{axis=0, start=6, extent=30}} (0, 1)");
        cases.push(case("s=40", &text));
        let text = format!("t: {dtype}[b, 9, 3]\ni: i64[b, s, 3] -9..9\ngather_elements {{axis=1}} (0, 1)");
        cases.push(case("b=2 s=5", &text));
        let text =
            format!("t: {dtype}[b, 4, 4, 3]\ni: i64[b, s, 2] -4..4\ngather_nd {{batch_dims=1}} (0, 1)");
        cases.push(case("b=2 s=5", &text));
        let text = format!("t: {dtype}[4, 4, 3]\ni: i64[b, s, 1] -4..4\ngather_nd {{batch_dims=0}} (0, 1)");
        cases.push(case("b=2 s=5", &text));
    }
    cases
}

fn quantised_blocks_cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for dtype in ["i8", "u8", "i4", "u4", "i2", "u2"] {
        for float in ["f32", "f16"] {
            let text = format!(
                "q: {dtype}[6, 32]\ns: {float}[6, 4]\nz: {dtype}[6, 4]\ndequant {{axis=1, block=8}} (0, 1, 2)"
            );
            cases.push(case("", &text));
            cases.push(case(
                "",
                &format!("q: {dtype}[30, 4]\ns: {float}[4, 4]\ndequant {{axis=0, block=8}} (0, 1)"),
            ));
        }
        cases.push(case("", &format!("q: {dtype}[6, 32]\ncast {{to=i32}} (0)")));
    }
    cases
}

fn softmax_over_any_axis_cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for dtype in FLOATS {
        for axis in 0..3 {
            cases.push(case("b=2 s=37", &format!("x: {dtype}[b, s, 5]\nsoftmax {{axis={axis}}} (0)")));
        }
        let text = format!("x: {dtype}[b, s, 5]\ntranspose {{perm=[0, 2, 1]}} (0)\nsoftmax {{axis=2}} (1)");
        cases.push(case("b=2 s=300", &text));
        cases.push(case("b=1 s=1", &text));
    }
    cases
}

fn norms_cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for dtype in SINGLE {
        for kind in ["layer", "rms"] {
            for width in [1, 7, 300, 2000] {
                let text = format!(
                    "x: {dtype}[b, s, {width}]\nw: {dtype}[{width}]\nc: {dtype}[{width}]\n\
                     norm {{kind={kind}, axis=2, epsilon=0.00001}} (0, 1, 2)"
                );
                cases.push(case("b=2 s=3", &text));
            }
            let text = format!(
                "x: {dtype}[b, s, 6]\ntranspose {{perm=[1, 0, 2]}} (0)\nw: {dtype}[b, 6]\n\
                 norm {{kind={kind}, axis=1, epsilon=0.001}} (1, 2)"
            );
            cases.push(case("b=2 s=3", &text));
        }
    }
    cases
}

fn reductions_and_scans_cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for dtype in ["f32", "f16", "f64", "i32", "i64", "u8", "u64"] {
        for monoid in ["sum", "prod", "max", "min"] {
            for axes in ["[2]", "[1]", "[0, 2]", "[0, 1, 2]"] {
                let text = format!("x: {dtype}[b, s, 5]\nreduce {{monoid={monoid}, axes={axes}}} (0)");
                cases.push(case("b=3 s=21", &text));
            }
            let text = format!(
                "x: {dtype}[b, s]\ntranspose {{perm=[1, 0]}} (0)\nreduce {{monoid={monoid}, axes=[1]}} (1)"
            );
            cases.push(case("b=300 s=2", &text));
            for flags in ["exclusive=false, reverse=false", "exclusive=true, reverse=true"] {
                let text = format!("x: {dtype}[b, s, 5]\nscan {{monoid={monoid}, axis=1, {flags}}} (0)");
                cases.push(case("b=3 s=6", &text));
            }
        }
    }
    cases
}

fn products_cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for dtype in SINGLE {
        for (spec, a, b) in [
            ("sk,kn->sn", "s, 20", "20, 70"),
            ("sk,nk->sn", "s, 20", "70, 20"),
            ("bsk,kn->bsn", "b, s, 40", "40, 9"),
            ("bhsd,bhtd->bhst", "b, 3, s, 8", "b, 3, 6, 8"),
            ("bhst,bhtd->bhsd", "b, 3, s, 6", "b, 3, 6, 8"),
            ("bshd,hdn->bsn", "b, s, 3, 8", "3, 8, 10"),
            ("bsk,ksn->bnk", "b, s, 4", "4, s, 5"),
            ("i,j->ij", "s", "7"),
            ("i,i->", "9", "9"),
            ("bk,bk->b", "s, 9", "s, 9"),
        ] {
            for sizes in ["b=2 s=1", "b=1 s=5", "b=3 s=70"] {
                cases.push(case(
                    sizes,
                    &format!("x: {dtype}[{a}]\ny: {dtype}[{b}]\neinsum \"{spec}\" (0, 1)"),
                ));
            }
        }
    }
    let text = "x: f32[b, s, 3, 8]\ntranspose {perm=[0, 2, 1, 3]} (0)\ny: f32[b, 3, 6, 8]\n\
                slice {axis=2, start=1, length=4, step=1} (2)\neinsum \"bhsd,bhtd->bhst\" (1, 3)";
    cases.push(case("b=2 s=5", text));
    cases.push(case("b=2 s=0", text));
    for dtype in ["f64", "i32", "i64", "u8", "u64"] {
        for (sizes, spec, y) in [("s=2", "sk,kn->sn", "9, 5"), ("s=70", "sk,nk->sn", "5, 9")] {
            cases.push(case(sizes, &format!("x: {dtype}[s, 9]\ny: {dtype}[{y}]\neinsum \"{spec}\" (0, 1)")));
        }
    }
    for dtype in SINGLE {
        // Aligned for reads of 16 bytes, with more columns than a block has, and a depth that is cut into parts.
        for (spec, y) in [("sk,nk->sn", "300, 264"), ("sk,kn->sn", "264, 300"), ("sk,kn->sn", "264, 296")] {
            for rows in ["s=1", "s=4", "s=6"] {
                cases.push(case(
                    rows,
                    &format!("x: {dtype}[s, 264]\ny: {dtype}[{y}]\neinsum \"{spec}\" (0, 1)"),
                ));
            }
        }
        let text = format!(
            "x: {dtype}[s, 272]\nslice {{axis=1, start=3, length=264, step=1}} (0)\ny: {dtype}[24, 264]\n\
             einsum \"sk,nk->sn\" (1, 2)"
        );
        cases.push(case("s=3", &text));
    }
    let constant = "x: f32[s, 9]\nweight init(\"w\", f32, [7, 9]) ()\neinsum \"nk,sk->sn\" (1, 0)";
    cases.push(case("s=2", constant));
    cases.push(case("s=90", constant));
    cases
}

fn products_of_quantised_blocks_cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for dtype in ["u4", "i4", "u8", "i8", "u2"] {
        for float in ["f32", "f16"] {
            let (blocks, depth) = (3, 96);
            let q = format!("x: {float}[b, s, {depth}]\nq: {dtype}[20, {depth}]\ns: {float}[20, {blocks}]\n");
            for sizes in ["b=1 s=1", "b=2 s=5"] {
                cases.push(case(
                    sizes,
                    &format!("{q}z: {dtype}[20, {blocks}]\ndequant {{axis=1, block=32}} (1, 2, 3)\neinsum \"bsk,nk->bsn\" (0, 4)"),
                ));
                cases.push(case(
                    sizes,
                    &format!("{q}dequant {{axis=1, block=32}} (1, 2)\neinsum \"bsk,nk->bsn\" (0, 3)"),
                ));
                let text = format!(
                    "x: {float}[b, s, {depth}]\nq: {dtype}[{depth}, 20]\ns: {float}[12, 20]\nz: {dtype}[12, 20]\n\
                     dequant {{axis=0, block=8}} (1, 2, 3)\neinsum \"bsk,kn->bsn\" (0, 4)"
                );
                cases.push(case(sizes, &text));
                let text = format!(
                    "x: {float}[b, s, {depth}]\nq: {dtype}[{depth}, 20]\ns: {float}[{depth}, 5]\n\
                     dequant {{axis=1, block=4}} (1, 2)\neinsum \"bsk,kn->bsn\" (0, 3)"
                );
                cases.push(case(sizes, &text));
            }
        }
    }
    // Also read by something else, so that it is made.
    cases.push(case(
        "s=2",
        "x: f32[s, 32]\nq: u4[20, 32]\ns: f32[20, 4]\ndequant {axis=1, block=8} (1, 2)\neinsum \"sk,nk->sn\" (0, 3)\n\
         reduce {monoid=sum, axes=[1]} (3)\nreshape {shape=[1, 20]} (5)\nadd (4, 6)",
    ));
    cases
}

fn scatters_cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for dtype in ["f32", "f16", "i64", "u8", "bool"] {
        for monoid in ["none", "sum", "prod", "max", "min"] {
            if dtype == "bool" && monoid != "none" {
                continue;
            }
            for (axis, shape) in [(0, "8, 5"), (1, "9, s")] {
                let text = format!(
                    "x: {dtype}[9, 5]\ni: i64[{shape}] -5..5\nu: {dtype}[{shape}]\n\
                     scatter_elements {{axis={axis}, monoid={monoid}}} (0, 1, 2)"
                );
                if axis == 0 {
                    cases.push(case("s=3", &text));
                }
                let text = format!(
                    "x: {dtype}[6, 4]\ni: i64[6, 3] -4..4\nu: {dtype}[3, 6]\ntranspose {{perm=[1, 0]}} (2)\n\
                     scatter_elements {{axis=1, monoid={monoid}}} (0, 1, 3)"
                );
                cases.push(case("", &text));
            }
            let text = format!(
                "x: {dtype}[4, 5, s]\ni: i64[2, 3, 2] -4..4\nu: {dtype}[2, 3, s]\nscatter_nd {{monoid={monoid}}} (0, 1, 2)"
            );
            cases.push(case("s=70", &text));
        }
    }
    cases
}

fn best_entries_cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for dtype in ["f32", "f16", "f64", "i64", "u8"] {
        for largest in [true, false] {
            // Few different numbers, so that there are ties.
            let text =
                format!("x: {dtype}[s, 40] 0..9\nround (0)\ntop_k {{axis=1, k=7, largest={largest}}} (1)");
            let whole = text.replace("\nround (0)", "").replace("(1)", "(0)");
            let text = if dtype.starts_with('f') { text } else { whole };
            cases.push(case("s=3", &text));
            let text = format!("x: {dtype}[3, 5, s]\nlog (0)\ntop_k {{axis=1, k=5, largest={largest}}} (1)");
            let whole = text.replace("\nlog (0)", "").replace("(1)", "(0)");
            // Logarithms of negative numbers are not numbers.
            cases.push(case("s=70", if dtype.starts_with('f') { &text } else { &whole }));
        }
    }
    cases
}

fn attention_cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for dtype in SINGLE {
        for (map, kv) in [("[0, 1, 2, 3]", 4), ("[0, 0, 1, 1]", 2), ("[0, 1, 1, 1]", 2), ("[1, 0, 1, 0]", 2)]
        {
            for (sizes, bias, rest) in [
                ("b=2 s=1 t=9", "", "softcap=none"),
                ("b=1 s=11 t=300", "b, 1, s, t", "softcap=none"),
                ("b=2 s=5 t=130", "1, 4, 1, t", "softcap=2.5"),
                ("b=1 s=3 t=0", "", "softcap=none"),
            ] {
                let mut text =
                    format!("q: {dtype}[b, 4, s, 8]\nk: {dtype}[b, {kv}, t, 8]\nv: {dtype}[b, {kv}, t, 6]\n");
                let mut args = "0, 1, 2";
                if !bias.is_empty() {
                    text += &format!("bias: {dtype}[{bias}]\n");
                    args = "0, 1, 2, 3";
                }
                text += &format!(
                    "attention {{scale=0.35, {rest}, kv_of_head={map}, empty_rows_zero=false}} ({args})"
                );
                cases.push(case(sizes, &text));
            }
        }
    }
    cases
}

/// A test for each family, and the list of all.
macro_rules! families {
    ($($name:ident: $cases:ident;)*) => {
        $(#[test]
        fn $name() {
            check(&$cases(), 0);
        })*

        /// The cases of all families.
        pub(crate) fn samples() -> Vec<Case> {
            [$($cases(),)*].into_iter().flatten().collect()
        }
    };
}

families! {
    elementwise_functions_of_floats: elementwise_functions_of_floats_cases;
    elementwise_functions_of_integers: elementwise_functions_of_integers_cases;
    casts: casts_cases;
    bools_and_selections: bools_and_selections_cases;
    fused_regions_read_through_views: fused_regions_read_through_views_cases;
    copies_concatenations_and_pads: copies_concatenations_and_pads_cases;
    gathers: gathers_cases;
    quantised_blocks: quantised_blocks_cases;
    softmax_over_any_axis: softmax_over_any_axis_cases;
    norms: norms_cases;
    reductions_and_scans: reductions_and_scans_cases;
    scatters: scatters_cases;
    best_entries: best_entries_cases;
    products: products_cases;
    products_of_quantised_blocks: products_of_quantised_blocks_cases;
    attention: attention_cases;
    rotary_embeddings: rotary_embeddings_cases;
    convolutions_and_pools: convolutions_and_pools_cases;
}

#[test]
fn attention_of_masked_rows_and_transposed_operands() {
    let mut cases = Vec::new();
    for empty in [true, false] {
        // A row of the mask that is true everywhere, and one that is false everywhere.
        let text = format!(
            "q: f32[1, s, 2, 8]\ntranspose {{perm=[0, 2, 1, 3]}} (0)\nk: f32[1, 2, t, 8]\nv: f32[1, 2, t, 8]\n\
             iota {{start=0, length=s}} ()\nreshape {{shape=[s, 1]}} (4)\nliteral i64[] [1] ()\n\
             equal (5, 6)\nbroadcast {{shape=[1, 1, s, t]}} (7)\n\
             literal f32[] [-inf] ()\nliteral f32[] [0.0] ()\nselect (8, 9, 10)\n\
             attention {{scale=1.0, softcap=none, kv_of_head=[0, 1], empty_rows_zero={empty}}} (1, 2, 3, 11)"
        );
        cases.push(case("s=3 t=140", &text));
    }
    check(&cases, 0);
}

fn rotary_embeddings_cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for dtype in SINGLE {
        for interleaved in [true, false] {
            let text = format!(
                "x: {dtype}[b, 3, s, 8]\nc: {dtype}[b, 1, s, 4]\nn: {dtype}[b, 1, s, 4]\n\
                 rotary {{interleaved={interleaved}}} (0, 1, 2)"
            );
            cases.push(case("b=2 s=5", &text));
            let text = format!(
                "x: {dtype}[b, s, 3, 8]\ntranspose {{perm=[0, 2, 1, 3]}} (0)\nc: {dtype}[s, 4]\nn: {dtype}[s, 4]\n\
                 rotary {{interleaved={interleaved}}} (1, 2, 3)"
            );
            cases.push(case("b=2 s=5", &text));
        }
    }
    cases
}

fn convolutions_and_pools_cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for dtype in SINGLE {
        for groups in [1, 2] {
            let channels = 4 / groups;
            cases.push(case(
                "n=2 h=7",
                &format!(
                    "x: {dtype}[n, 4, h, 9]\nw: {dtype}[6, {channels}, 3, 2]\nconv {{kernel=[3, 2], strides=[2, 1], \
                     dilations=[1, 2], pads_low=[1, 0], pads_high=[2, 1], ceil=false, groups={groups}}} (0, 1)"
                ),
            ));
        }
        cases.push(case(
            "n=2 h=12",
            &format!(
                "x: {dtype}[n, 4, h]\nw: {dtype}[6, 4, 3]\nconv {{kernel=[3], strides=[2], dilations=[1], \
                 pads_low=[1], pads_high=[1], ceil=false, groups=1}} (0, 1)"
            ),
        ));
        for kind in ["max", "average", "average_padded"] {
            for ceil in [true, false] {
                cases.push(case(
                    "n=2 h=8",
                    &format!(
                        "x: {dtype}[n, 3, h, 9]\npool {{kind={kind}, kernel=[3, 2], strides=[2, 2], dilations=[1, 1], \
                         pads_low=[1, 0], pads_high=[1, 1], ceil={ceil}}} (0)"
                    ),
                ));
            }
        }
    }
    cases
}

#[test]
fn state_grows_in_its_room() {
    let text = |rest: &str| {
        format!("past: f32[b, 2, p, 4]\nnew: f32[b, s, 2, 4]\ntranspose {{perm=[0, 2, 1, 3]}} (1)\n{rest}")
    };
    let append = text("append {axis=2} (0, 2)");
    let used = text("neg (0)\nappend {axis=2} (0, 2)");
    let cases = vec![
        case("b=2 p=5 s=3", &append).with_state(2),
        case("b=1 p=0 s=1", &append).with_state(2),
        case("b=2 p=5 s=0", &used).with_state(2),
    ];
    check(&cases, 0);
    // What reads the present reads it where it lies.
    let mut read =
        case("b=2 p=5 s=3", &text("append {axis=2} (0, 2)\nexp (3)\nreshape {shape=[b, 2, p*4 + s*4]} (3)"))
            .with_state(2);
    read.graph.outputs[0].value = tpshard_ir::ValueId(3);
    for value in [4, 5] {
        let name = format!("other{value}").as_str().into();
        read.graph.outputs.push(tpshard_ir::graph::Output { name, value: tpshard_ir::ValueId(value) });
    }
    check(&[read], 0);
}

#[test]
fn what_has_no_kernel_is_left_to_the_cpu() {
    let cases = [
        case("s=9", "x: f32[s, 7]\ntranspose {perm=[1, 0]} (0)\ntop_k {axis=1, k=3, largest=true} (1)"),
        case("s=9", "x: f32[s]\ni: i64[4, 1] 0..9\nu: f32[4]\nscatter_nd {monoid=none} (0, 1, 2)"),
        case("s=9", "x: f32[s, 7]\ny: f32[3]\neinsum \"sk,n->sn\" (0, 1)"),
    ];
    check(&cases, 3);
}

/// Weights and literals are no work of a step, and reshapes of what lies densely are no work at all.
#[test]
fn steps_are_few() {
    let cases = [case(
        "s=4",
        "x: f32[s, 6]\nweight init(\"w\", f32, [6]) ()\nreshape {shape=[1, 6]} (1)\nmul (0, 2)\nreshape {shape=[s*6]} (3)",
    )];
    let program = program(&cases);
    let steps = &program.entries[0].device.as_ref().unwrap().steps;
    let hows: Vec<&str> = steps
        .iter()
        .map(|step| match step.how {
            How::Leaf => "leaf",
            How::Alias(_) => "alias",
            How::Launch(_) => "launch",
            How::Product(_) => "product",
            How::Append { .. } => "append",
            How::Convert => "convert",
            How::Host => "host",
        })
        .collect();
    assert_eq!(hows, ["leaf", "leaf", "launch", "alias"]);
}
