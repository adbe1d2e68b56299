//! The text form: every operation round-trips, errors name the place, damaged text is never a panic.

use std::sync::Arc;
use tpshard_ir::op::*;
use tpshard_ir::text::{parse_graph, parse_program, print_graph, print_program};
use tpshard_ir::weight::WeightExpr;
use tpshard_ir::*;

fn s(name: &str) -> Dim {
    Dim::symbol(name)
}

fn c(value: i64) -> Dim {
    Dim::constant(value)
}

fn window() -> Window {
    Window {
        kernel: vec![3, 1],
        strides: vec![2, 1],
        dilations: vec![1, 4],
        pads_low: vec![0, 1],
        pads_high: vec![2, 0],
        ceil: true,
    }
}

fn literal(tensor: Tensor) -> Op {
    Op::Literal(Literal(Arc::new(tensor)))
}

fn literals() -> Vec<Op> {
    let mut all: Vec<Op> = DType::ALL
        .iter()
        .map(|&dtype| {
            let bytes: Vec<u8> = (0..dtype.byte_len(6).unwrap()).map(|i| (i * 37 % 251) as u8).collect();
            literal(Tensor::from_le_bytes(dtype, vec![2, 3], &bytes).unwrap())
        })
        .collect();
    let payload = [f32::from_bits(0xffc0_0123), -0.0, f32::MIN_POSITIVE, 1e-45, f32::NEG_INFINITY, 0.1];
    all.push(literal(Tensor::from_vec(vec![6], payload.to_vec()).unwrap()));
    all.push(literal(Tensor::scalar(f64::from_bits(0x7ff0_0000_0000_0001))));
    all.push(literal(Tensor::from_vec(vec![0, 3], Vec::<i64>::new()).unwrap()));
    all.push(literal(Tensor::scalar(i64::MIN)));
    all.push(literal(Tensor::scalar(u64::MAX)));
    all
}

fn conversions() -> Vec<Conversion> {
    let (axes, unit) = (vec![0, 1], s("seq"));
    let monoid = Monoid::Max;
    vec![
        Conversion::ShardSlice { axes: axes.clone(), dim: 1, unit: unit.clone() },
        Conversion::OnlyFirst { axes: axes.clone(), monoid },
        Conversion::AllGather { axes: vec![], dim: 1, unit: unit.clone() },
        Conversion::AllToAll { axes: axes.clone(), from: 0, from_unit: c(2), to: 1, to_unit: unit.clone() },
        Conversion::AllReduce { axes: axes.clone(), monoid: Monoid::Sum },
        Conversion::ReduceScatter { axes: axes.clone(), monoid: Monoid::Prod, dim: 1, unit: unit.clone() },
        Conversion::Redeal { axes: axes.clone(), dim: 0, from_unit: c(3), to_unit: unit.clone() },
        Conversion::Transfer,
        Conversion::TreeReduce { axes, axis: 2, unit },
    ]
}

fn every_op() -> Vec<Op> {
    let init = WeightExpr::initializer("w \"x\" \\ \n", DType::F32, vec![4, 6]).unwrap();
    let moved = init.slice(1, 0, 2).unwrap().transpose(vec![1, 0]).unwrap();
    let joined = WeightExpr::concat(vec![moved.clone(), moved], 0).unwrap().cast(DType::F16).unwrap();
    let mut all = vec![
        Op::Input { name: "past.0.key \u{7f}\t·".into() },
        Op::Weight(init),
        Op::Weight(joined),
        Op::Size(s("past") + s("seq") * c(3) - c(7)),
        Op::Iota { start: c(-3), length: s("a b") },
        Op::Einsum(EinsumSpec::parse("bsk,kn->bsn").unwrap()),
        Op::Reduce { monoid: Monoid::Max, axes: vec![0, 2] },
        Op::Scan { monoid: Monoid::Min, axis: 1, exclusive: true, reverse: false },
        Op::Conv { window: window(), groups: 2 },
        Op::TopK { axis: 0, k: s("k").minimum(&c(5)), largest: false },
        Op::Broadcast { shape: vec![] },
        Op::Reshape { shape: vec![s("b"), s("n").floor_div(&c(4)), s("n").modulo(&s("m"))] },
        Op::Transpose { perm: vec![1, 0] },
        Op::Slice { axis: 1, start: s("n") - c(1), length: s("n").maximum(&s("m")), step: i64::MIN },
        Op::Concat { axis: 0 },
        Op::Gather { axis: 0, window: None },
        Op::Gather { axis: 0, window: Some(TableWindow { start: s("r"), extent: c(100) }) },
        Op::GatherElements { axis: 3 },
        Op::GatherNd { batch_dims: 1 },
        Op::Deferred {
            call: Arc::new(DeferredCall { name: "Odd \"name\"".into(), code: vec![0, 127, 255].into() }),
            output: 2,
            ty: Type::new(DType::I64, vec![2i64.into(), s("odd symbol") + c(1)]),
        },
        Op::ScatterElements { axis: 1, monoid: None },
        Op::ScatterElements { axis: 1, monoid: Some(Monoid::Sum) },
        Op::ScatterNd { monoid: Some(Monoid::Prod) },
        Op::ScatterNd { monoid: None },
        Op::Dequant { axis: 1, block: 32 },
        Op::Append { axis: 2 },
        Op::Softmax { axis: 1 },
        Op::Norm { kind: NormKind::Layer, axis: 2, epsilon: Real(1e-5) },
        Op::Norm { kind: NormKind::Rms, axis: 2, epsilon: Real(f64::from_bits(0xfff8_0000_0000_0007)) },
        Op::Attention {
            scale: Real(0.125),
            softcap: None,
            kv_of_head: vec![0, 0, 1, 1],
            empty_rows_zero: false,
        },
        Op::Attention {
            scale: Real(0.1),
            softcap: Some(Real(50.0)),
            kv_of_head: vec![],
            empty_rows_zero: true,
        },
        Op::Rotary { interleaved: true },
        Op::Map(Scalar::Cast(DType::F8E4M3FNUZ)),
    ];
    for kind in [
        PoolKind::Max,
        PoolKind::Average { count_padding: false },
        PoolKind::Average { count_padding: true },
        PoolKind::Lp { p: 3 },
    ] {
        all.push(Op::Pool { kind, window: window() });
    }
    for mode in [PadMode::Constant(Real(f64::NEG_INFINITY)), PadMode::Reflect, PadMode::Edge, PadMode::Wrap] {
        all.push(Op::Pad { low: vec![c(-1), s("p")], high: vec![c(0), c(2)], mode });
    }
    all.extend(Scalar::ALL.iter().map(|&scalar| Op::Map(scalar)));
    all.extend(literals());
    all.extend(conversions().into_iter().map(Op::Convert));
    all
}

/// Every operation once, with operands and types that need not make sense.
fn graph() -> Graph {
    let mut graph = Graph::new("a \"name\"\u{85}\r\n");
    graph.symbols.insert("seq".into(), SymbolRange { low: 1, high: 4096 });
    graph.symbols.insert("odd `name` \\ \n".into(), SymbolRange { low: i64::MIN, high: i64::MAX });
    for (relation, reason) in [(Relation::Equal, "input `x`\n"), (Relation::LessEqual, "")] {
        let left = s("past") + s("odd `name` \\ \n");
        graph.guards.push(Guard { left, relation, right: c(i64::MIN), reason: reason.into() });
    }
    graph.states.push(StatePair { input: "past.0".into(), output: "present.0".into(), axis: 2 });
    graph.cases.push(Case {
        input: "use \"it\"".into(),
        ty: Type::new(DType::Bool, vec![c(1)]),
        value: true,
    });
    graph.borders = vec![
        Border::Stretch { input: "mask".into(), axis: 1, filling: Filling::Repeat },
        Border::Stretch { input: "a \"mask\"".into(), axis: 0, filling: Filling::Ones },
        Border::Stretch { input: "x".into(), axis: 2, filling: Filling::Any },
        Border::Rounded { input: "past.0".into(), output: "present.0".into(), given: DType::F16 },
        Border::Buffer {
            input: "past.0".into(),
            output: "present.0".into(),
            axis: 2,
            total: s("past") + s("odd `name` \\ \n"),
        },
    ];
    for (i, op) in every_op().into_iter().enumerate() {
        let shape = vec![s("seq") * c(4) - c(i as i64), s("floordiv").ceil_div(&s("min")), c(i64::MAX)];
        let ty = Type::new(DType::ALL[i % DType::ALL.len()], shape);
        let args = (0..i % 4).map(|k| ValueId((i - k) as u32)).collect();
        let origin = if i % 2 == 0 { "" } else { "/model/layers.0/\"q\"" };
        graph.push(Node { op, args, ty, origin: origin.into() });
    }
    graph.outputs.push(Output { name: "logits".into(), value: ValueId(u32::MAX) });
    graph.outputs.push(Output { name: "".into(), value: ValueId(0) });
    graph
}

fn program(mesh: Mesh) -> Spmd {
    let layouts = [
        layout::AxisLayout::Replicated,
        layout::AxisLayout::shard(2, 1usize),
        layout::AxisLayout::shard(0, s("seq") * c(16)),
        layout::AxisLayout::Partial(Monoid::Max),
    ];
    let mut steps = vec![];
    for (i, conversion) in conversions().into_iter().enumerate() {
        let layout = Layout((0..mesh.axes()).map(|a| layouts[(i + a) % 4].clone()).collect());
        let kind = if i % 3 == 0 { StepKind::Compute } else { StepKind::Convert(conversion) };
        let args = (0..i as u32 % 3).map(StepId).collect();
        steps.push(Step { value: ValueId(i as u32), layout, kind, args });
    }
    Spmd {
        mesh,
        logical: graph(),
        imported: 17,
        equations: vec![Equation { rule: "a \"rule\"".into(), left: ValueId(3), right: ValueId(40) }],
        steps,
        outputs: vec![SpmdOutput { name: "logits".into(), step: StepId(4) }],
    }
}

#[test]
fn every_operation_round_trips() {
    let graph = graph();
    let text = print_graph(&graph);
    let parsed = parse_graph(&text).unwrap_or_else(|e| panic!("{e}\n{text}"));
    for (a, b) in parsed.nodes().iter().zip(graph.nodes()) {
        assert_eq!(a, b);
    }
    assert_eq!(parsed, graph);
    assert_eq!(print_graph(&parsed), text);
}

#[test]
fn programs_round_trip_on_meshes_of_any_number_of_axes() {
    for mesh in [Mesh(vec![]), Mesh::flat(4), Mesh(vec![2, 3])] {
        let program = program(mesh);
        let text = print_program(&program);
        let parsed = parse_program(&text).unwrap_or_else(|e| panic!("{e}\n{text}"));
        assert_eq!(parsed, program);
    }
}

#[test]
fn dims_parse_the_whole_grammar() {
    let parsed = |text: &str| {
        let text = format!("graph \"\" guard {text} == 0 \"\"");
        parse_graph(&text).map(|mut g| g.guards.remove(0).left).map_err(|e| e.to_string())
    };
    assert_eq!(
        parsed("2 * (a + b) - ceildiv(s, 4)").unwrap(),
        c(2) * (s("a") + s("b")) - s("s").ceil_div(&c(4))
    );
    assert_eq!(parsed("mod(a, 3) + -1*b").unwrap_err(), "1:28: expected a dim, found `-1*b`");
    assert_eq!(parsed("-b*3 + mod(a, 3)").unwrap(), s("a").modulo(&c(3)) - c(3) * s("b"));
    assert_eq!(parsed("`min`*max(a, `x y`)").unwrap(), s("min") * s("a").maximum(&s("x y")));
    assert!(parsed(&"(".repeat(100_000)).unwrap_err().contains("nested deeper"));
    let product = format!("1{}", "*(a + b + c + d)".repeat(40));
    assert!(parsed(&product).unwrap_err().contains("more than 4096 terms"));
    let remainders = format!("{}x{}", "mod(".repeat(30), ", 7)".repeat(30));
    assert!(parsed(&remainders).unwrap_err().contains("more than 4096 terms"));
}

#[test]
fn errors_name_the_place_and_what_was_expected() {
    let error = |text: &str| parse_graph(text).unwrap_err().to_string();
    assert_eq!(error(""), "1:1: expected `graph`, found the end");
    assert_eq!(error("graph \"a\n\n"), "1:7: expected a closing `\"`");
    assert_eq!(error("graph \"g\" ; note\n%1 = size {value=1} : i64[]"), "2:1: expected `%0`");
    assert_eq!(
        error("graph \"é\"\n%0 = frobnicate : i64[]"),
        "2:6: expected an operation, found `frobnicate`"
    );
    assert_eq!(error("graph \"\"\n%0 = neg (%1) : f33[]"), "2:17: expected an element type, found `f33`");
    assert_eq!(error("graph \"\"\n%0 = softmax {axes=1}"), "2:15: expected `axis`, found `axes=1}`");
    assert_eq!(
        error("graph \"\" %0 = literal f32[2] [1.0] : f32[2]"),
        "1:23: shape [2] needs 2 elements of f32, found 1"
    );
    assert_eq!(error("graph \"\" %0 = weight init(\"w\", f32, 4)"), "1:37: expected `[`");
    assert_eq!(
        error("graph \"\" symbol a 1..2 symbol a 1..3"),
        "1:31: expected a new symbol, `a` has a range already"
    );
    assert!(error("graph \"\" junk").starts_with("1:10: expected a node, `output` or the end"));
    let error = parse_program("graph \"\" mesh [2] imported 0 $0 = %0 : Q compute").unwrap_err();
    assert_eq!(error.to_string(), "1:40: expected `compute` or a conversion, found `Q`");
}

struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % n.max(1) as u64) as usize
    }
}

#[test]
fn damaged_text_is_an_error_or_reads_back() {
    let text: Vec<char> = print_program(&program(Mesh(vec![2, 3]))).chars().collect();
    let mut random = Random(0x1234_5678_9abc_def1);
    let pieces = [
        "{",
        "}",
        "(",
        ")",
        "[",
        "\"",
        "\\u{",
        "`",
        "%",
        "$",
        "0",
        "-",
        "9999999999999999999999",
        ",",
        "·",
        "é",
    ];
    for _ in 0..1500 {
        let mut damaged = text.clone();
        for _ in 0..=random.below(3) {
            let at = random.below(damaged.len());
            match random.below(4) {
                0 => drop(damaged.remove(at)),
                1 => damaged.truncate(at.max(1)),
                2 => damaged[at] = text[random.below(text.len())],
                _ => {
                    let piece = pieces[random.below(pieces.len())];
                    damaged.splice(at..at, piece.chars());
                }
            }
        }
        let damaged: String = damaged.into_iter().collect();
        if let Ok(program) = parse_program(&damaged) {
            let again = parse_program(&print_program(&program)).unwrap();
            assert_eq!(again, program);
        }
        let _ = parse_graph(&damaged);
    }
}
