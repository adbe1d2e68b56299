//! Models built in code: small functions that write the graphs an importer would.

#![allow(dead_code, unreachable_pub)]

pub mod simulated;

use std::sync::Arc;
use tpshard_ir::graph::Output;
use tpshard_ir::op::{EinsumSpec, NormKind, Real, Window};
use tpshard_ir::weight::WeightExpr;
use tpshard_ir::{Bindings, DType, Dim, Graph, Monoid, Op, Scalar, StatePair, SymbolRange, Type, ValueId};
use tpshard_passes::Entry;

pub struct Net {
    pub graph: Graph,
    pub dtype: DType,
}

impl Net {
    pub fn new(name: &str, dtype: DType) -> Net {
        Net { graph: Graph::new(name), dtype }
    }

    pub fn add(&mut self, op: Op, args: &[ValueId], origin: &str) -> ValueId {
        let value = self.graph.add(op, args).unwrap();
        self.graph.set_origin(value, origin);
        value
    }

    pub fn input(&mut self, name: &str, dtype: DType, shape: &[Dim]) -> ValueId {
        self.graph.input(name, Type::new(dtype, shape.to_vec()))
    }

    pub fn weight(&mut self, name: &str, shape: &[usize]) -> ValueId {
        let expression = WeightExpr::initializer(name, self.dtype, shape.to_vec()).unwrap();
        self.add(Op::Weight(expression), &[], name)
    }

    pub fn map(&mut self, scalar: Scalar, args: &[ValueId], origin: &str) -> ValueId {
        self.add(Op::Map(scalar), args, origin)
    }

    pub fn einsum(&mut self, spec: &str, a: ValueId, b: ValueId, origin: &str) -> ValueId {
        self.add(Op::Einsum(EinsumSpec::parse(spec).unwrap()), &[a, b], origin)
    }

    pub fn reshape(&mut self, x: ValueId, shape: &[Dim], origin: &str) -> ValueId {
        self.add(Op::Reshape { shape: shape.to_vec() }, &[x], origin)
    }

    pub fn transpose(&mut self, x: ValueId, perm: &[usize], origin: &str) -> ValueId {
        self.add(Op::Transpose { perm: perm.to_vec() }, &[x], origin)
    }

    pub fn output(&mut self, name: &str, value: ValueId) {
        self.graph.outputs.push(Output { name: name.into(), value });
    }

    pub fn symbol(&mut self, name: &str) -> Dim {
        self.graph.symbols.insert(name.into(), SymbolRange { low: 1, high: 8192 });
        Dim::symbol(name)
    }

    /// `x · w + bias` over the last dim of `x[b, s, k]`.
    pub fn linear(&mut self, x: ValueId, name: &str, from: usize, to: usize, bias: bool) -> ValueId {
        let w = self.weight(&format!("{name}.weight"), &[from, to]);
        let y = self.einsum("bsk,kn->bsn", x, w, name);
        if !bias {
            return y;
        }
        let b = self.weight(&format!("{name}.bias"), &[to]);
        self.map(Scalar::Add, &[y, b], name)
    }

    pub fn norm(&mut self, kind: NormKind, x: ValueId, name: &str, width: usize) -> ValueId {
        let mut args = vec![x, self.weight(&format!("{name}.weight"), &[width])];
        if kind == NormKind::Layer {
            args.push(self.weight(&format!("{name}.bias"), &[width]));
        }
        let axis = self.graph.ty(x).rank() - 1;
        self.add(Op::Norm { kind, axis, epsilon: Real(1e-5) }, &args, name)
    }
}

pub fn dim(value: usize) -> Dim {
    Dim::from(value)
}

pub fn entry(name: &str, bindings: &[(&str, i64)]) -> Entry {
    let bindings: Bindings = bindings.iter().map(|&(n, v)| (Arc::from(n), v)).collect();
    Entry::new(name, bindings)
}

pub fn decode() -> Entry {
    entry("decode", &[("batch", 1), ("seq", 1), ("past", 2048)])
}

/// The sizes of a decoder.
#[derive(Clone, Copy)]
pub struct Sizes {
    pub layers: usize,
    pub width: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head: usize,
    pub hidden: usize,
    pub vocabulary: usize,
}

pub const LLAMA_8B: Sizes =
    Sizes { layers: 32, width: 4096, heads: 32, kv_heads: 8, head: 128, hidden: 14336, vocabulary: 128_256 };

/// A Llama: grouped-query attention, RMS norms, gated feed-forward, state in `past_key_values`.
pub fn llama(sizes: Sizes, dtype: DType) -> Graph {
    let mut net = Net::new("llama", dtype);
    let (batch, seq, past) = (net.symbol("batch"), net.symbol("seq"), net.symbol("past"));
    let ids = net.input("input_ids", DType::I64, &[batch.clone(), seq.clone()]);
    let positions = net.input("position_ids", DType::I64, &[batch.clone(), seq.clone()]);
    let mask_shape = [batch.clone(), dim(1), seq.clone(), &past + &seq];
    let mask = net.input("mask", dtype, &mask_shape);
    let table = net.weight("model.embed_tokens.weight", &[sizes.vocabulary, sizes.width]);
    let mut x = net.add(Op::Gather { axis: 0, window: None }, &[table, ids], "embed");
    let mut turn = |name: &str| {
        let table = net.weight(name, &[64, sizes.head / 2]);
        let rows = net.add(Op::Gather { axis: 0, window: None }, &[table, positions], name);
        let shape = [batch.clone(), dim(1), seq.clone(), dim(sizes.head / 2)];
        net.reshape(rows, &shape, name)
    };
    let (cos, sin) = (turn("cos"), turn("sin"));
    let kv_of_head: Vec<u32> = (0..sizes.heads).map(|h| (h * sizes.kv_heads / sizes.heads) as u32).collect();
    for layer in 0..sizes.layers {
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        let Sizes { width, heads, kv_heads, head, hidden, .. } = sizes;
        let normed = net.norm(NormKind::Rms, x, &name("input_layernorm"), width);
        let split = |net: &mut Net, part: &str, count: usize| {
            let y = net.linear(normed, &name(part), width, count * head, false);
            let y = net.reshape(y, &[batch.clone(), seq.clone(), dim(count), dim(head)], &name(part));
            net.transpose(y, &[0, 2, 1, 3], &name(part))
        };
        let rotate = |net: &mut Net, y: ValueId, part: &str| {
            net.add(Op::Rotary { interleaved: false }, &[y, cos, sin], &name(part))
        };
        let q = split(&mut net, "self_attn.q_proj", heads);
        let q = rotate(&mut net, q, "self_attn.rotary_q");
        let k = split(&mut net, "self_attn.k_proj", kv_heads);
        let k = rotate(&mut net, k, "self_attn.rotary_k");
        let v = split(&mut net, "self_attn.v_proj", kv_heads);
        let state = |net: &mut Net, what: &str, new: ValueId| {
            let (input, output) = (format!("past.{layer}.{what}"), format!("present.{layer}.{what}"));
            let shape = [batch.clone(), dim(kv_heads), past.clone(), dim(head)];
            let old = net.input(&input, dtype, &shape);
            let all = net.add(Op::Append { axis: 2 }, &[old, new], &name("self_attn.append"));
            net.output(&output, all);
            net.graph.states.push(StatePair { input: input.into(), output: output.into(), axis: 2 });
            all
        };
        let k = state(&mut net, "key", k);
        let v = state(&mut net, "value", v);
        let attention = Op::Attention {
            scale: Real((head as f64).powf(-0.5)),
            softcap: None,
            kv_of_head: kv_of_head.clone(),
            empty_rows_zero: false,
        };
        let y = net.add(attention, &[q, k, v, mask], &name("self_attn.attention"));
        let y = net.transpose(y, &[0, 2, 1, 3], &name("self_attn.merge"));
        let y = net.reshape(y, &[batch.clone(), seq.clone(), dim(heads * head)], &name("self_attn.merge"));
        let y = net.linear(y, &name("self_attn.o_proj"), heads * head, width, false);
        x = net.map(Scalar::Add, &[x, y], &name("attention_residual"));
        let normed = net.norm(NormKind::Rms, x, &name("post_attention_layernorm"), width);
        let gate = net.linear(normed, &name("mlp.gate_proj"), width, hidden, false);
        let up = net.linear(normed, &name("mlp.up_proj"), width, hidden, false);
        let sigmoid = net.map(Scalar::Sigmoid, &[gate], &name("mlp.act"));
        let silu = net.map(Scalar::Mul, &[gate, sigmoid], &name("mlp.act"));
        let y = net.map(Scalar::Mul, &[silu, up], &name("mlp.gated"));
        let y = net.linear(y, &name("mlp.down_proj"), hidden, width, false);
        x = net.map(Scalar::Add, &[x, y], &name("mlp_residual"));
    }
    let x = net.norm(NormKind::Rms, x, "model.norm", sizes.width);
    let logits = net.linear(x, "lm_head", sizes.width, sizes.vocabulary, false);
    net.output("logits", logits);
    net.graph
}

/// A GPT-2: layer norms with bias, one projection for query, key and value that is sliced, biases everywhere, the
/// embedding used again as the head.
pub fn gpt2(sizes: Sizes, dtype: DType) -> Graph {
    let mut net = Net::new("gpt2", dtype);
    let (batch, seq) = (net.symbol("batch"), net.symbol("seq"));
    let Sizes { width, heads, head, hidden, vocabulary, .. } = sizes;
    let ids = net.input("input_ids", DType::I64, &[batch.clone(), seq.clone()]);
    let table = net.weight("wte.weight", &[vocabulary, width]);
    let mut x = net.add(Op::Gather { axis: 0, window: None }, &[table, ids], "wte");
    for layer in 0..sizes.layers {
        let name = |part: &str| format!("h.{layer}.{part}");
        let normed = net.norm(NormKind::Layer, x, &name("ln_1"), width);
        let all = WeightExpr::initializer(name("attn.c_attn.weight"), dtype, vec![width, 3 * heads * head])
            .unwrap();
        let biases =
            WeightExpr::initializer(name("attn.c_attn.bias"), dtype, vec![3 * heads * head]).unwrap();
        let part = |net: &mut Net, index: usize| {
            let (start, length) = (index * heads * head, heads * head);
            let w = net.add(Op::Weight(all.slice(1, start, length).unwrap()), &[], &name("attn.c_attn"));
            let b = net.add(Op::Weight(biases.slice(0, start, length).unwrap()), &[], &name("attn.c_attn"));
            let y = net.einsum("bsk,kn->bsn", normed, w, &name("attn.c_attn"));
            let y = net.map(Scalar::Add, &[y, b], &name("attn.c_attn"));
            let y = net.reshape(y, &[batch.clone(), seq.clone(), dim(heads), dim(head)], &name("attn.split"));
            net.transpose(y, &[0, 2, 1, 3], &name("attn.split"))
        };
        let (q, k, v) = (part(&mut net, 0), part(&mut net, 1), part(&mut net, 2));
        let attention = Op::Attention {
            scale: Real(0.125),
            softcap: None,
            kv_of_head: (0..heads as u32).collect(),
            empty_rows_zero: false,
        };
        let y = net.add(attention, &[q, k, v], &name("attn"));
        let y = net.transpose(y, &[0, 2, 1, 3], &name("attn.merge"));
        let y = net.reshape(y, &[batch.clone(), seq.clone(), dim(heads * head)], &name("attn.merge"));
        let y = net.linear(y, &name("attn.c_proj"), heads * head, width, true);
        x = net.map(Scalar::Add, &[x, y], &name("residual_1"));
        let normed = net.norm(NormKind::Layer, x, &name("ln_2"), width);
        let y = net.linear(normed, &name("mlp.c_fc"), width, hidden, true);
        let y = net.map(Scalar::Tanh, &[y], &name("mlp.act"));
        let y = net.linear(y, &name("mlp.c_proj"), hidden, width, true);
        x = net.map(Scalar::Add, &[x, y], &name("residual_2"));
    }
    let x = net.norm(NormKind::Layer, x, "ln_f", width);
    let logits = net.einsum("bsk,vk->bsv", x, table, "lm_head");
    net.output("logits", logits);
    net.graph
}

/// A ResNet block between two convolutions, pooled and classified.
pub fn resnet(channels: usize, classes: usize) -> Graph {
    let mut net = Net::new("resnet", DType::F32);
    let batch = net.symbol("batch");
    let image = net.input("image", DType::F32, &[batch.clone(), dim(3), dim(16), dim(16)]);
    let window = |k: usize, stride: usize| Window {
        kernel: vec![k; 2],
        strides: vec![stride; 2],
        dilations: vec![1; 2],
        pads_low: vec![k / 2; 2],
        pads_high: vec![k / 2; 2],
        ceil: false,
    };
    let conv = |net: &mut Net, x: ValueId, name: &str, to: usize, k: usize, stride: usize| {
        let from = net.graph.ty(x).shape[1].as_size().unwrap();
        let w = net.weight(&format!("{name}.weight"), &[to, from, k, k]);
        let y = net.add(Op::Conv { window: window(k, stride), groups: 1 }, &[x, w], name);
        let b = net.weight(&format!("{name}.bias"), &[to, 1, 1]);
        net.map(Scalar::Add, &[y, b], name)
    };
    let relu = |net: &mut Net, x: ValueId, name: &str| {
        let zero = tpshard_ir::Tensor::from_le_bytes(DType::F32, vec![], &0f32.to_le_bytes()).unwrap();
        let zero = net.add(Op::Literal(tpshard_ir::op::Literal(Arc::new(zero))), &[], name);
        net.map(Scalar::Max, &[x, zero], name)
    };
    let x = conv(&mut net, image, "stem", channels, 3, 2);
    let mut x = relu(&mut net, x, "stem.relu");
    for block in 0..2 {
        let name = |part: &str| format!("layer.{block}.{part}");
        let y = conv(&mut net, x, &name("conv1"), channels, 3, 1);
        let y = relu(&mut net, y, &name("relu1"));
        let y = conv(&mut net, y, &name("conv2"), channels, 3, 1);
        let sum = net.map(Scalar::Add, &[x, y], &name("residual"));
        x = relu(&mut net, sum, &name("relu2"));
    }
    let pooled = net.add(Op::Reduce { monoid: Monoid::Sum, axes: vec![2, 3] }, &[x], "pool");
    let flat = net.reshape(pooled, &[batch.clone(), dim(channels)], "flatten");
    let w = net.weight("fc.weight", &[channels, classes]);
    let y = net.einsum("bk,kn->bn", flat, w, "fc");
    net.output("classes", y);
    net.graph
}

/// The text of a profile with no link but this one.
pub fn with_link(text: &str, link: &str) -> String {
    let others = text.lines().filter(|line| !line.starts_with("protocol."));
    let mut text: String = others.map(|line| format!("{line}\n")).collect();
    text.push_str(&format!("protocol.only = ring {link} | a test\n"));
    text
}
