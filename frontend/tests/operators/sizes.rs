//! Sizes: what is known of them, where they have to agree, and what stays open.

use crate::support::*;
use tpshard_frontend::{AttributeValue, Dim as Extent, ErrorKind, ImportOptions, Imported, ValueType};
use tpshard_ir::interp::run_tensors;
use tpshard_ir::{DType, Op, Relation, Tensor};

#[test]
fn shape_arithmetic_never_becomes_data_flow() {
    let imported = builder(17)
        .input("x", DType::F32, "batch seq 8")
        .weight("zero", &Tensor::scalar(0i64))
        .weight("one", &Tensor::scalar(1i64))
        .weight("axes", &i64s(&[0]))
        .weight("rest", &i64s(&[-1]))
        .weight("width", &i64s(&[4]))
        .node("Shape", "x", "s", &[])
        .node("Gather", "s zero", "b", &[])
        .node("Gather", "s one", "n", &[])
        .node("Unsqueeze", "b axes", "b1", &[])
        .node("Mul", "n n", "nn", &[])
        .node("Div", "nn n", "n2", &[])
        .node("Unsqueeze", "n2 axes", "n1", &[])
        .node("Concat", "b1 n1 rest width", "target", &[("axis", int(0))])
        .node("Reshape", "x target", "y", &[])
        .output("y", DType::F32)
        .import()
        .unwrap();
    assert_eq!(imported.graph.len(), 2);
    let y = imported.graph.outputs[0].value;
    assert_eq!(imported.graph.ty(y).to_string(), "f32[batch, seq, 2, 4]");
    assert_eq!(&*imported.graph.node(y).origin, "node_8");
    assert_eq!(run(&imported, &[("x", counting(&[2, 3, 8]))])[0].shape(), [2, 3, 2, 4]);
}

#[test]
fn sizes_are_unified_and_reported_with_the_node() {
    let imported = builder(17)
        .input("x", DType::F32, "batch seq")
        .input("mask", DType::F32, "rows total")
        .node("Add", "x mask", "y", &[])
        .output("y", DType::F32)
        .import()
        .unwrap();
    let names: Vec<&str> = imported.graph.symbols.keys().map(|name| &**name).collect();
    assert_eq!(names, ["batch", "seq"]);
    let equality = &imported.report.equalities[1];
    assert_eq!((&*equality.symbol, equality.equals.to_string().as_str()), ("total", "seq"));
    assert!(equality.reason.contains("node_0"), "{}", equality.reason);

    let error = builder(17)
        .input("x", DType::F32, "n 3")
        .input("y", DType::F32, "n 4")
        .node("Add", "x y", "z", &[])
        .output("z", DType::F32)
        .import()
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(first_fault(&error).contains("3 and 4"), "{error}");
}

#[test]
fn states_are_appended_to_and_total_is_past_plus_seq() {
    let mut model = builder(17)
        .input("mask", DType::F32, "batch total")
        .input("new", DType::F32, "batch 2 seq 4")
        .input("past_key_values.0.key", DType::F32, "batch 2 past 4")
        .node("Concat", "past_key_values.0.key new", "present.0.key", &[("axis", int(-2))])
        .node("Identity", "mask", "y", &[])
        .output("y", DType::F32);
    model.graph.outputs.push(info("present.0.key", DType::F32, Some("batch 2 total 4")));
    let imported = model.import().unwrap();
    let state = &imported.graph.states[0];
    assert_eq!((&*state.input, &*state.output, state.axis), ("past_key_values.0.key", "present.0.key", 2));
    let (_, _, mask) = imported.graph.inputs().next().unwrap();
    assert_eq!(mask.to_string(), "f32[batch, past + seq]");
    let roles: Vec<String> =
        imported.report.roles.iter().map(|(name, role)| format!("{name}={}", role.name())).collect();
    assert_eq!(roles, ["batch=batch", "past=past", "seq=seq"]);
}

#[test]
fn huge_constants_are_stretched_scalars_and_huge_ranges_index_grids() {
    let imported = builder(17)
        .input("x", DType::F32, "1")
        .weight("shape", &i64s(&[1 << 20, 1 << 20]))
        .weight("zero", &Tensor::scalar(0i64))
        .weight("limit", &Tensor::scalar(1i64 << 40))
        .weight("one", &Tensor::scalar(1i64))
        .node("ConstantOfShape", "shape", "c", &[])
        .node("Add", "x c", "y", &[])
        .node("Range", "zero limit one", "r", &[])
        .output("y", DType::F32)
        .output("r", DType::I64)
        .import()
        .unwrap();
    assert!(imported.graph.len() < 10);
}

#[test]
fn bound_inputs_decide_branches_and_shapes() {
    let branch = |op: &str| {
        let mut graph = builder(17).node(op, "x", "z", &[]).graph;
        graph.outputs.push(info("z", DType::F32, None));
        AttributeValue::Graph(Box::new(graph))
    };
    let model = || {
        builder(17)
            .input("x", DType::F32, "n")
            .input("flag", DType::Bool, "")
            .node("If", "flag", "y", &[("then_branch", branch("Neg")), ("else_branch", branch("Abs"))])
            .output("y", DType::F32)
    };
    let waiting = model().import().unwrap().graph;
    assert!(waiting.nodes().iter().any(|node| matches!(node.op, Op::Deferred { .. })));
    for (flag, wanted) in [(true, 2.0), (false, 2.0)] {
        let bindings = [("flag".to_owned(), Tensor::scalar(flag))].into();
        let imported = model().import_with(&ImportOptions { bindings, ..ImportOptions::default() }).unwrap();
        assert_eq!(imported.graph.inputs().count(), 1);
        assert_eq!(imported.graph.nodes()[1].op.name(), if flag { "neg" } else { "abs" });
        close(&run(&imported, &[("x", f32s(&[1], &[-2.0]))])[0], &[1], &[wanted]);
    }
    let bindings = [("nothing".to_owned(), Tensor::scalar(true))].into();
    let error = model().import_with(&ImportOptions { bindings, ..ImportOptions::default() }).unwrap_err();
    assert!(first_fault(&error).contains("flag"), "{error}");
}

#[test]
fn declared_dims_of_outputs_are_not_believed() {
    // `n` and `m` stay two sizes, although the output says the transposed has the shape of its operand.
    let mut declared = builder(17).input("x", DType::F32, "n m").node("Transpose", "x", "y", &[]);
    declared.graph.outputs.push(info("y", DType::F32, Some("n m")));
    let y = declared.run(&[("x", counting(&[2, 3]))]);
    close(&y[0], &[3, 2], &[0.0, 3.0, 1.0, 4.0, 2.0, 5.0]);

    let mut stale = builder(17).input("x", DType::F32, "2 3").node("Relu", "x", "y", &[]);
    stale.graph.outputs.push(info("y", DType::F32, Some("2 7 3")));
    let imported = stale.import().unwrap();
    assert!(imported.report.notes[0].contains("declared as f32[2, 7, 3]"), "{:?}", imported.report.notes);

    let mut wrong = builder(17).input("x", DType::F32, "2").node("Relu", "x", "y", &[]);
    wrong.graph.outputs.push(info("y", DType::I64, Some("2")));
    assert!(first_fault(&wrong.import().unwrap_err()).contains("computed as f32[2]"));
}

/// The size `s` of the input `x` that a guard refuses, or the result.
fn with_size(imported: &Imported, shape: &[usize]) -> Result<Vec<f32>, String> {
    let inputs = [("x".into(), counting(shape))].into_iter().collect();
    let initializer = |name: &str| Ok(imported.model.storage.to_tensor(&imported.tensors[name]).unwrap());
    let results = run_tensors(&imported.graph, &inputs, &initializer, 1 << 20).map_err(|e| e.to_string())?;
    Ok(results[0].1.as_slice::<f32>().unwrap().to_vec())
}

#[test]
fn a_named_size_that_meets_a_number_is_that_number_or_one() {
    let add = builder(17)
        .input("x", DType::F32, "s")
        .weight("w", &f32s(&[3], &[10.0, 20.0, 30.0]))
        .node("Add", "x w", "y", &[])
        .output("y", DType::F32)
        .import()
        .unwrap();
    assert_eq!(add.graph.ty(add.graph.outputs[0].value).to_string(), "f32[3]");
    assert_eq!(with_size(&add, &[1]).unwrap(), [10.0, 20.0, 30.0]);
    assert_eq!(with_size(&add, &[3]).unwrap(), [10.0, 21.0, 32.0]);
    for wrong in [0, 2, 4, 6, 7] {
        let error = with_size(&add, &[wrong]).unwrap_err();
        assert!(error.contains("node_0") && error.contains("s stretches to 3"), "{error}");
    }
    let expand = |shape: &[i64]| {
        builder(17)
            .input("x", DType::F32, "s 2")
            .weight("shape", &i64s(shape))
            .node("Expand", "x shape", "y", &[])
            .output("y", DType::F32)
            .import()
            .unwrap()
    };
    assert_eq!(with_size(&expand(&[2, 1]), &[1, 2]).unwrap(), [0.0, 1.0, 0.0, 1.0]);
    assert_eq!(with_size(&expand(&[2, 1]), &[2, 2]).unwrap(), [0.0, 1.0, 2.0, 3.0]);
    assert_eq!(with_size(&expand(&[1, 1]), &[3, 2]).unwrap().len(), 6);
    assert!(with_size(&expand(&[2, 1]), &[3, 2]).is_err());
}

#[test]
fn a_number_expanded_to_a_named_size_may_stay() {
    let imported = builder(17)
        .input("x", DType::F32, "s")
        .weight("w", &f32s(&[3], &[1.0, 2.0, 3.0]))
        .node("Shape", "x", "shape", &[])
        .node("Expand", "w shape", "y", &[])
        .output("y", DType::F32)
        .import()
        .unwrap();
    assert_eq!(with_size(&imported, &[1]).unwrap(), [1.0, 2.0, 3.0]);
    assert_eq!(with_size(&imported, &[3]).unwrap(), [1.0, 2.0, 3.0]);
    assert!(with_size(&imported, &[2]).is_err());
}

#[test]
fn sizes_stay_sizes_on_their_way_through_floats() {
    // `x[:min(n, 1), :min(s, 9)]` with the ends computed in floating point, as old exporters do.
    let imported = builder(17)
        .input("x", DType::F32, "n s")
        .weight("table", &counting(&[1, 5]))
        .weight("most", &f32s(&[2], &[1.0, 9.0]))
        .weight("starts", &i64s(&[0, 0]))
        .node("Shape", "x", "shape", &[])
        .node("Cast", "shape", "floats", &[("to", int(1))])
        .node("Min", "floats most", "least", &[])
        .node("Cast", "least", "ends", &[("to", int(7))])
        .node("Slice", "table starts ends", "part", &[])
        .node("Expand", "part shape", "y", &[])
        .output("y", DType::F32)
        .import()
        .unwrap();
    assert!(imported.graph.nodes().iter().all(|node| !matches!(node.op, Op::Deferred { .. })));
    assert_eq!(imported.graph.ty(imported.graph.outputs[0].value).to_string(), "f32[n, s]");
    assert_eq!(with_size(&imported, &[2, 3]).unwrap(), [0.0, 1.0, 2.0, 0.0, 1.0, 2.0]);
    assert!(with_size(&imported, &[2, 6]).unwrap_err().contains("s <= 5"));
}

#[test]
fn a_count_that_meets_a_size_of_the_inputs_is_left_to_the_run() {
    let imported = builder(17)
        .input("limit", DType::F32, "")
        .input("x", DType::F32, "n")
        .weight("zero", &f32s(&[], &[0.0]))
        .weight("one", &f32s(&[], &[1.0]))
        .node("Range", "zero limit one", "steps", &[])
        .node("Add", "steps x", "y", &[])
        .output("y", DType::F32)
        .import()
        .unwrap();
    let deferred = imported.graph.nodes().iter().filter(|node| matches!(node.op, Op::Deferred { .. }));
    assert_eq!(deferred.count(), 2);
    // The input keeps its size.
    assert_eq!(imported.graph.inputs().nth(1).unwrap().2.to_string(), "f32[n]");
}

#[test]
fn expressions_over_names_that_no_input_has_are_names() {
    // The mask's dim is written in names of another part of the exporter.
    let import = |mask: &str| {
        let mut model = builder(17)
            .input("x", DType::F32, "past seq")
            .node("Concat", "x x", "all", &[("axis", int(1))])
            .node("Add", "all mask", "y", &[])
            .output("y", DType::F32);
        let mut info = info("mask", DType::F32, Some(""));
        if let Some(ValueType::Tensor(ty)) = &mut info.value_type {
            ty.shape = Some(vec![Extent::Symbol(mask.into())]);
        }
        model.graph.inputs.push(info);
        model.import().unwrap()
    };
    for mask in ["past_len + seq_len", "2*seq"] {
        let imported = import(mask);
        assert_eq!(imported.graph.inputs().nth(1).unwrap().2.to_string(), "f32[2*seq]");
        let y = run(&imported, &[("x", counting(&[1, 2])), ("mask", counting(&[4]))]);
        close(&y[0], &[1, 4], &[0.0, 2.0, 2.0, 4.0]);
    }
}

#[test]
fn what_is_clamped_to_zero_counts_as_its_size_where_that_is_needed() {
    let imported = builder(17)
        .input("x", DType::F32, "s")
        .weight("w", &f32s(&[1], &[100.0]))
        .weight("one", &i64s(&[1]))
        .weight("all", &i64s(&[i64::MAX]))
        .node("Slice", "x one all", "tail", &[])
        .node("Concat", "tail w", "moved", &[("axis", int(0))])
        .node("Add", "x moved", "y", &[])
        .output("y", DType::F32)
        .import()
        .unwrap();
    assert_eq!(imported.graph.ty(imported.graph.outputs[0].value).to_string(), "f32[s]");
    assert_eq!(with_size(&imported, &[1]).unwrap(), [100.0]);
    assert_eq!(with_size(&imported, &[3]).unwrap(), [1.0, 3.0, 102.0]);
    assert!(with_size(&imported, &[0]).is_err());
}

#[test]
fn sizes_that_agree_for_some_inputs_only_are_checked_before_the_run() {
    for (joins, wanted) in [("Add", [1.0, 4.0, 3.0, 6.0]), ("Concat", [0.0, 1.0, 2.0, 3.0])] {
        let attributes: &[(&str, AttributeValue)] = if joins == "Add" { &[] } else { &[("axis", int(0))] };
        let imported = builder(17)
            .input("x", DType::F32, "1 1 s")
            .node("MaxPool", "x", "half", &[("kernel_shape", ints(&[2])), ("strides", ints(&[2]))])
            .node("Concat", "half half", "whole", &[("axis", int(2))])
            .node(joins, "x whole", "y", attributes)
            .output("y", DType::F32)
            .import()
            .unwrap();
        assert!(imported.graph.nodes().iter().all(|node| !matches!(node.op, Op::Deferred { .. })));
        assert_eq!(with_size(&imported, &[1, 1, 4]).unwrap()[..4], wanted);
        let error = with_size(&imported, &[1, 1, 5]).unwrap_err();
        assert!(error.contains("node_2"), "{error}");
    }
}

/// `x` and what is left of it by windows of two, in shape `1 1 s` and, as far as the model knows, another.
fn with_pairs() -> Builder {
    builder(17)
        .input("x", DType::F32, "1 1 s")
        .node("MaxPool", "x", "half", &[("kernel_shape", ints(&[2])), ("strides", ints(&[2]))])
        .node("Concat", "half half", "whole", &[("axis", int(2))])
}

#[test]
fn a_size_that_was_at_most_another_is_still_held_to_be_equal() {
    let imported = with_pairs()
        .weight("from", &i64s(&[2]))
        .weight("to", &i64s(&[3]))
        .weight("zero", &i64s(&[0]))
        .node("Shape", "whole", "shape", &[])
        .node("Slice", "shape from to", "end", &[])
        .node("Slice", "x zero end from", "part", &[])
        .node("Expand", "part shape", "same", &[])
        .node("Add", "x whole", "y", &[])
        .output("y", DType::F32)
        .output("same", DType::F32)
        .import()
        .unwrap();
    let relations: Vec<Relation> = imported.graph.guards.iter().map(|guard| guard.relation).collect();
    assert_eq!(relations, [Relation::LessEqual, Relation::Equal]);
    assert_eq!(with_size(&imported, &[1, 1, 4]).unwrap(), [1.0, 4.0, 3.0, 6.0]);
    assert!(with_size(&imported, &[1, 1, 5]).unwrap_err().contains("node_6"));
}

#[test]
fn a_size_left_to_the_run_does_not_hide_one_that_is_wrong() {
    let error = with_pairs()
        .weight("three", &i64s(&[1, 3, 1]))
        .weight("four", &i64s(&[1, 4, 1]))
        .node("Expand", "x three", "a", &[])
        .node("Expand", "whole four", "b", &[])
        .node("Add", "a b", "y", &[])
        .output("y", DType::F32)
        .import()
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(first_fault(&error).contains("3 and 4"), "{error}");
}

#[test]
fn products_and_joins_over_sizes_that_data_decides_wait() {
    let start = || {
        builder(17)
            .input("x", DType::F32, "n")
            .input("shape", DType::I64, "2")
            .weight("w", &counting(&[6, 2]))
            .weight("v", &counting(&[6, 1]))
            .weight("flat", &i64s(&[-1]))
            .node("Reshape", "x shape", "r", &[])
            .node("Reshape", "r flat", "f", &[])
    };
    let einsum = ("equation", AttributeValue::String("k,kn->n".to_owned().into()));
    let column = ("axes", i64s(&[1]));
    for model in [
        start().node("MatMul", "f w", "y", &[]),
        start().node("Einsum", "f w", "y", &[einsum]),
        start().weight(column.0, &column.1).node("Unsqueeze", "f axes", "c", &[]).node(
            "Concat",
            "c v",
            "y",
            &[("axis", int(1))],
        ),
    ] {
        let imported = model.output("y", DType::F32).import().unwrap();
        let y = imported.graph.outputs[0].value;
        assert!(matches!(imported.graph.node(y).op, Op::Deferred { .. }));
    }
}
