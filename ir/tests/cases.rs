//! One file per case under `tests/cases`: a graph or program, its inputs, and what comes out, all in one text.
//!
//! `; input "x" f32[2] [1.0, 2.0]` and `; initializer "w" …` give values. What follows `; expect` is the result: outputs,
//! or the errors of parsing, verifying or running. `TPSHARD_BLESS=1 cargo test` rewrites it. Every graph is also printed and
//! parsed again, every program is compared exactly with its logical graph in the field.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use tpshard_ir::interp::{
    Domain, Field, Interpreter, OpError, Real, Split, eval_weight, random_array, random_weight,
};
use tpshard_ir::text::{
    parse_graph, parse_literal, parse_program, print_graph, print_literal, print_program,
};
use tpshard_ir::weight::WeightExpr;
use tpshard_ir::{Graph, Spmd, Tensor, verify, verify_program};

const LIMIT: usize = 1 << 20;
const EXPECT: &str = "; expect\n";

type Values = BTreeMap<Arc<str>, Tensor>;

fn values(text: &str, kind: &str) -> Values {
    let prefix = format!("; {kind} \"");
    let lines = text.lines().filter_map(|line| line.strip_prefix(&prefix));
    lines
        .map(|line| {
            let (name, literal) = line.split_once("\" ").expect("a name and a literal");
            (name.into(), parse_literal(literal).unwrap_or_else(|e| panic!("{kind} {name}: {e}")))
        })
        .collect()
}

fn lines(kind: &str, message: impl ToString) -> String {
    message.to_string().lines().map(|line| format!("; {kind}: {line}\n")).collect()
}

/// What the case's text stands for, as the lines after `; expect`.
fn outcome(text: &str) -> String {
    if text.contains("\nmesh [") {
        let program = match parse_program(text) {
            Ok(program) => program,
            Err(error) => return lines("parse error", error),
        };
        assert_eq!(parse_program(&print_program(&program)).as_ref(), Ok(&program));
        return match verify_program(program) {
            Ok(program) => run(&program.logical, Some(&program), text),
            Err(errors) => lines("verify error", errors),
        };
    }
    let graph = match parse_graph(text) {
        Ok(graph) => graph,
        Err(error) => return lines("parse error", error),
    };
    assert_eq!(parse_graph(&print_graph(&graph)).as_ref(), Ok(&graph));
    match verify(graph) {
        Ok(graph) => run(&graph, None, text),
        Err(errors) => lines("verify error", errors),
    }
}

fn run(graph: &Graph, program: Option<&Spmd>, text: &str) -> String {
    let (inputs, initializers) = (values(text, "input"), values(text, "initializer"));
    let initializer =
        |name: &str| initializers.get(name).cloned().ok_or_else(|| OpError::Other(format!("no `{name}`")));
    let weights = |expr: &WeightExpr| Ok(Real.import(&eval_weight(expr, &initializer, LIMIT)?));
    let interpreter = Interpreter { domain: &Real, weights: &weights, element_limit: LIMIT, deferred: None };
    let arrays = inputs.iter().map(|(name, tensor)| (name.clone(), Real.import(tensor))).collect();
    let outputs = match program {
        Some(program) => interpreter.run_program(program, &arrays, Split::Random(1)),
        None => interpreter.run(graph, &arrays),
    };
    if let (Some(program), Ok(_)) = (program, &outputs) {
        compare_in_field(program, &inputs);
    }
    match outputs {
        Ok(outputs) => outputs
            .iter()
            .map(|(name, array)| {
                format!("; output \"{name}\" {}\n", print_literal(&Real.export(array).unwrap()))
            })
            .collect(),
        Err(error) => lines("run error", error),
    }
}

/// Random inputs of the same shapes; integers are kept, since they may be indices.
fn compare_in_field(program: &Spmd, inputs: &Values) {
    let weights = |expr: &WeightExpr| random_weight(&Field, expr, 1, LIMIT);
    let interpreter = Interpreter { domain: &Field, weights: &weights, element_limit: LIMIT, deferred: None };
    let array = |tensor: &Tensor| match tensor.dtype().is_float() {
        true => random_array(&Field, tensor.dtype(), tensor.shape(), 5).unwrap(),
        false => Field.import(tensor),
    };
    let inputs = inputs.iter().map(|(name, tensor)| (name.clone(), array(tensor))).collect();
    let logical = interpreter.run(&program.logical, &inputs).unwrap();
    for seed in 0..3 {
        let outputs = interpreter.run_program(program, &inputs, Split::Random(seed)).unwrap();
        assert_eq!(outputs, logical);
    }
}

#[test]
fn cases() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cases");
    let mut paths: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    assert!(paths.len() > 20, "the cases are missing");
    let mut failures = String::new();
    for path in paths {
        let whole = std::fs::read_to_string(&path).unwrap();
        let (text, expected) = whole.split_once(EXPECT).unwrap_or((&whole, ""));
        println!("{}", path.display());
        let found = outcome(text);
        if found == expected {
            continue;
        }
        if std::env::var_os("TPSHARD_BLESS").is_some() {
            std::fs::write(&path, format!("{}\n{EXPECT}{found}", text.trim_end())).unwrap();
        } else {
            failures.push_str(&format!("{}\n--- expected\n{expected}--- found\n{found}\n", path.display()));
        }
    }
    assert!(failures.is_empty(), "\n{failures}help: TPSHARD_BLESS=1 accepts the new results");
}
