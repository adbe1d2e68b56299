//! Models of `f32` narrowed to 16 bits: which values become narrow, what stays, and that results stay near.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use tpshard_ir::interp::{OpError, run_tensors};
use tpshard_ir::text::{parse_graph, print_graph};
use tpshard_ir::verify::verify;
use tpshard_ir::{Border, DType, Data, Graph, Op, Tensor};
use tpshard_passes::canonical::canonicalise;
use tpshard_passes::extended::Extended;
use tpshard_passes::precision::{PrecisionError, narrowed};

const DECODER: &str = include_str!("precision/decoder.tir");

fn graph(text: &str) -> Graph {
    verify(parse_graph(text).unwrap_or_else(|e| panic!("{e}\n{text}"))).unwrap().into_inner()
}

/// A graph that computes `nodes` of a table of embeddings, `x: f32[n, 4]`, and gives the last value.
fn of_embeddings(nodes: &str) -> Graph {
    let last = nodes.lines().filter(|line| line.starts_with('%')).count() + 2;
    graph(&format!(
        "graph \"g\"\nsymbol n 1..64\n%0 = input \"ids\" : i64[n]\n\
         %1 = weight init(\"table\", f32, [16, 4]) : f32[16, 4]\n\
         %2 = gather {{axis=0}} (%1, %0) : f32[n, 4]\n{nodes}output \"y\" %{last}\n"
    ))
}

fn narrow(graph: &Graph, to: DType) -> Graph {
    let found = narrowed(graph, to).unwrap();
    verify(found.graph.clone()).unwrap();
    for (value, place) in graph.values().zip(&found.values) {
        if let (Op::Input { name }, Some(place)) = (&value.1.op, place) {
            assert_eq!(found.graph.node(*place).op, Op::Input { name: name.clone() });
        }
    }
    found.graph
}

/// The types of all results of an operation.
fn types(graph: &Graph, op: &str) -> Vec<DType> {
    graph.nodes().iter().filter(|node| node.op.name() == op).map(|node| node.ty.dtype).collect()
}

#[test]
fn a_decoder_becomes_what_is_written_down() {
    let text = print_graph(&narrow(&graph(DECODER), DType::BF16));
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/precision/decoder.bf16.tir");
    if std::env::var_os("TPSHARD_BLESS").is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(text, expected, "TPSHARD_BLESS=1 writes {}", path.display());
}

#[test]
fn norms_and_attention_are_recognised_with_their_own_parameters_wide() {
    let mut extended = Extended::new(narrow(&graph(DECODER), DType::F16));
    canonicalise(&mut extended);
    let live = extended.live();
    let found = |op: &str| {
        let node = live.iter().map(|&value| extended.graph.node(value)).find(|node| node.op.name() == op);
        let node = node.unwrap_or_else(|| panic!("no {op} in\n{}", extended.graph));
        let operands: Vec<DType> = node.args.iter().map(|&arg| extended.graph.ty(arg).dtype).collect();
        (node.ty.dtype, operands)
    };
    assert_eq!(found("norm"), (DType::F16, vec![DType::F16, DType::F32]));
    let attention = [DType::F16, DType::F16, DType::F16, DType::F32];
    assert_eq!(found("attention"), (DType::F16, attention.to_vec()));
}

#[test]
fn state_is_narrow_and_may_be_given_as_before() {
    let graph = narrow(&graph(DECODER), DType::BF16);
    let border = Border::Rounded { input: "past".into(), output: "present".into(), given: DType::F32 };
    assert_eq!(graph.borders, [border]);
    let ty = |name: &str| graph.outputs.iter().find(|o| &*o.name == name).map(|o| graph.ty(o.value).dtype);
    assert_eq!((ty("present"), ty("logits")), (Some(DType::BF16), Some(DType::F32)));
}

/// Elements from -1 to 1 that depend on the name.
fn noise(name: &str, shape: &[usize]) -> Tensor {
    let seed = name.bytes().fold(7u32, |seed, byte| seed.wrapping_mul(31).wrapping_add(byte.into()));
    let element = |i: usize| {
        let mixed = (seed.wrapping_add(i as u32).wrapping_mul(0x9e37_79b9) >> 8) as f32;
        mixed / (1 << 23) as f32 - 1.0
    };
    let count = shape.iter().product();
    Tensor::from_vec(shape.to_vec(), (0..count).map(element).collect::<Vec<f32>>()).unwrap()
}

fn outputs(graph: &Graph) -> BTreeMap<Arc<str>, Vec<f32>> {
    let numbers =
        |shape: &[usize], values: &[i64]| Tensor::from_vec(shape.to_vec(), values.to_vec()).unwrap();
    let inputs = BTreeMap::from([
        (Arc::from("ids"), numbers(&[2, 3], &[1, 7, 3, 9, 0, 31])),
        (Arc::from("positions"), numbers(&[2, 3], &[2, 3, 4, 2, 3, 4])),
        (Arc::from("past"), noise("past", &[2, 2, 2, 4])),
    ]);
    let shapes = BTreeMap::from([
        ("embedding", vec![32, 8]),
        ("cosines", vec![64, 4]),
        ("norm", vec![8]),
        ("query", vec![8, 8]),
        ("bias", vec![8]),
        ("out", vec![8, 8]),
    ]);
    let weight = |name: &str| -> Result<Tensor, OpError> { Ok(noise(name, &shapes[name])) };
    let outputs = run_tensors(graph, &inputs, &weight, 1 << 20).unwrap();
    let singles = |tensor: &Tensor| match tensor.data() {
        Data::F32(values) => values.clone(),
        other => panic!("an output of {}", other.dtype()),
    };
    outputs.iter().map(|(name, tensor)| (name.clone(), singles(tensor))).collect()
}

#[test]
fn results_are_near_and_of_the_types_that_the_model_declares() {
    let whole = graph(DECODER);
    let exact = outputs(&whole);
    for (to, tolerance) in [(DType::BF16, 2e-2), (DType::F16, 2e-3)] {
        for (name, rounded) in outputs(&narrow(&whole, to)) {
            let range = exact[&name].iter().fold(0f32, |range, x| range.max(x.abs()));
            let error =
                exact[&name].iter().zip(&rounded).fold(0f32, |error, (a, b)| error.max((a - b).abs()));
            assert!(error > 0.0 && error <= tolerance * range, "{name} as {to}: {error} of {range}");
        }
    }
}

#[test]
fn what_is_narrow_already_comes_back_as_it_is() {
    let once = narrow(&graph(DECODER), DType::BF16);
    assert_eq!(narrow(&once, DType::BF16), once);
    assert_eq!(narrowed(&once, DType::F16), Err(PrecisionError::Other { found: DType::BF16 }));
    let message = PrecisionError::Other { found: DType::BF16 }.to_string();
    assert!(message.contains("bf16") && message.contains("help: "), "{message}");
    assert_eq!(narrowed(&once, DType::F32), Err(PrecisionError::Target { to: DType::F32 }));
}

#[test]
fn doubles_and_integers_are_left_alone() {
    for dtype in ["f64", "i32"] {
        let text = format!(
            "graph \"g\"\nsymbol n 1..8\n%0 = input \"x\" : {dtype}[n, 4]\n\
             %1 = weight init(\"w\", {dtype}, [4, 4]) : {dtype}[4, 4]\n\
             %2 = einsum \"ab,bc->ac\" (%0, %1) : {dtype}[n, 4]\noutput \"y\" %2\n"
        );
        let graph = graph(&text);
        let found = narrowed(&graph, DType::F16).unwrap();
        assert_eq!((&found.graph, found.products), (&graph, 0));
    }
}

#[test]
fn tables_of_positions_stay_exact() {
    // Frequencies times positions are a product without activations.
    let graph = of_embeddings(
        "%3 = reshape {shape=[n, 1]} (%0) : i64[n, 1]\n%4 = cast {to=f32} (%3) : f32[n, 1]\n\
         %5 = weight init(\"frequencies\", f32, [1, 4]) : f32[1, 4]\n\
         %6 = einsum \"ab,bc->ac\" (%4, %5) : f32[n, 4]\n%7 = cos (%6) : f32[n, 4]\n\
         %8 = weight init(\"w\", f32, [4, 4]) : f32[4, 4]\n%9 = einsum \"ab,bc->ac\" (%2, %8) : f32[n, 4]\n\
         %10 = mul (%9, %7) : f32[n, 4]\n",
    );
    let graph = narrow(&graph, DType::BF16);
    assert_eq!(types(&graph, "einsum"), [DType::F32, DType::BF16]);
    assert_eq!(types(&graph, "cos"), [DType::F32]);
    assert_eq!(types(&graph, "mul"), [DType::F32]);
    assert_eq!(types(&graph, "gather"), [DType::BF16]);
}

#[test]
fn numbers_beyond_the_narrow_type_keep_their_values_wide() {
    let graph = of_embeddings(
        "%3 = weight init(\"w\", f32, [4, 4]) : f32[4, 4]\n%4 = einsum \"ab,bc->ac\" (%2, %3) : f32[n, 4]\n\
         %5 = literal f32[] [1e5] : f32[]\n%6 = min (%4, %5) : f32[n, 4]\n%7 = neg (%6) : f32[n, 4]\n",
    );
    assert_eq!(types(&narrow(&graph, DType::F16), "min"), [DType::F32]);
    assert_eq!(types(&narrow(&graph, DType::BF16), "min"), [DType::BF16]);
}

#[test]
fn quantised_weights_stay_with_their_scales() {
    let graph = of_embeddings(
        "%3 = weight init(\"codes\", u8, [4, 4]) : u8[4, 4]\n%4 = weight init(\"scales\", f32, [1, 4]) : f32[1, 4]\n\
         %5 = dequant {axis=0, block=4} (%3, %4) : f32[4, 4]\n%6 = einsum \"ab,bc->ac\" (%2, %5) : f32[n, 4]\n\
         %7 = weight init(\"w\", f32, [4, 4]) : f32[4, 4]\n%8 = einsum \"ab,bc->ac\" (%6, %7) : f32[n, 4]\n",
    );
    let graph = narrow(&graph, DType::BF16);
    assert_eq!(types(&graph, "dequant"), [DType::F32]);
    assert_eq!(types(&graph, "einsum"), [DType::F32, DType::BF16]);
}

#[test]
fn what_products_read_is_stored_narrow_and_what_sums_read_is_not_rounded() {
    let graph = of_embeddings(
        "%3 = weight init(\"w\", f32, [4, 4]) : f32[4, 4]\n%4 = einsum \"ab,bc->ac\" (%2, %3) : f32[n, 4]\n\
         %5 = sigmoid (%4) : f32[n, 4]\n%6 = einsum \"ab,bc->ac\" (%5, %3) : f32[n, 4]\n\
         %7 = add (%4, %6) : f32[n, 4]\n%8 = reduce {monoid=sum, axes=[1]} (%7) : f32[n, 1]\n",
    );
    let graph = narrow(&graph, DType::F16);
    assert_eq!(types(&graph, "sigmoid"), [DType::F32]);
    // Only the sum reads it.
    assert_eq!(types(&graph, "add"), [DType::F32]);
    assert_eq!(types(&graph, "reduce"), [DType::F32]);
    // One cast of what the second product reads.
    let casts = types(&graph, "cast");
    assert_eq!(casts.iter().filter(|dtype| **dtype == DType::F16).count(), 1, "{}", print_graph(&graph));
}

#[test]
fn weights_are_cast_where_they_are_stored() {
    let graph = of_embeddings(
        "%3 = weight init(\"w\", f32, [4, 4]) : f32[4, 4]\n%4 = transpose {perm=[1, 0]} (%3) : f32[4, 4]\n\
         %5 = einsum \"ab,bc->ac\" (%2, %4) : f32[n, 4]\n",
    );
    let graph = narrow(&graph, DType::F16);
    assert_eq!(types(&graph, "weight"), [DType::F16, DType::F16]);
    // That of the output alone.
    assert_eq!(types(&graph, "cast"), [DType::F32]);
}
