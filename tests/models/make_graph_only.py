#!/usr/bin/env python3
"""Writes decoders without their weights: enough for `tpshard plan`.

    pip install onnx==1.23.2
    python tests/models/make_graph_only.py OUT.onnx [--shape llama-8b|llama-70b|gpt3-175b|mixtral-8x7b] [--layers N]
                                           [--hidden N] [--heads N] [--kv-heads N] [--ffn N] [--vocabulary N]

The weights are external data in a file that does not exist. Llama is written as exporters write it, with rotary
embeddings and repeated KV heads spelled out; GPT-3 like GPT-2, with fused query, key and value; Mixtral like Llama,
every expert applied to every token and weighted by a dense routing table.
"""

import argparse
import dataclasses

import onnx
from onnx import TensorProto, helper


@dataclasses.dataclass
class Size:
    family: str
    dtype: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocabulary: int
    positions: int = 2048
    experts: int = 8
    chosen: int = 2

    @property
    def depth(self):
        return self.hidden // self.heads


F16, BF16 = TensorProto.FLOAT16, TensorProto.BFLOAT16
SHAPES = {
    "llama-8b": Size("llama", F16, 32, 4096, 32, 8, 14336, 128256),
    "llama-70b": Size("llama", BF16, 80, 8192, 64, 8, 28672, 128256),
    "gpt3-175b": Size("gpt", F16, 96, 12288, 96, 96, 49152, 50257),
    "mixtral-8x7b": Size("mixtral", BF16, 32, 4096, 32, 8, 14336, 32000),
}


class Builder:
    def __init__(self, size):
        self.size, self.nodes, self.weights, self.outputs, self.offset = size, [], [], [], 0

    def op(self, kind, *inputs, outputs=1, **attributes):
        names = [f"v{len(self.nodes)}" if i == 0 else f"v{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, name=f"/{kind}_{len(self.nodes)}", **attributes))
        return names[0] if outputs == 1 else names

    def weight(self, name, *shape):
        tensor = TensorProto(name=name, data_type=self.size.dtype, dims=shape, data_location=TensorProto.EXTERNAL)
        length = 2
        for dim in shape:
            length *= dim
        for key, value in {"location": "weights.bin", "offset": self.offset, "length": length}.items():
            tensor.external_data.add(key=key, value=str(value))
        self.offset += length
        self.weights.append(tensor)
        return name

    def constant(self, values, dtype=TensorProto.INT64):
        shape = [len(values)] if isinstance(values, list) else []
        flat = values if isinstance(values, list) else [values]
        return self.op("Constant", value=helper.make_tensor("", dtype, shape, flat))

    def linear(self, x, name, width, out, bias):
        y = self.op("MatMul", x, self.weight(f"{name}.weight", width, out))
        return self.op("Add", y, self.weight(f"{name}.bias", out)) if bias else y

    def append(self, i, part, new):
        name = f"present.{i}.{part}"
        past = f"past_key_values.{i}.{part}"
        self.nodes.append(helper.make_node("Concat", [past, new], [name], name=f"/concat_{i}_{part}", axis=2))
        self.outputs.append(name)
        return name


def split_heads(b, x, count):
    shaped = b.op("Reshape", x, b.constant([0, 0, count, b.size.depth]))
    return b.op("Transpose", shaped, perm=[0, 2, 1, 3])


def attend(b, q, k, v):
    """Attention over keys and values with as many heads as the queries."""
    size = b.size
    scores = b.op("MatMul", q, b.op("Transpose", k, perm=[0, 1, 3, 2]))
    scores = b.op("Mul", scores, b.constant(size.depth**-0.5, size.dtype))
    weights = b.op("Softmax", b.op("Add", scores, "mask"), axis=-1)
    mixed = b.op("Transpose", b.op("MatMul", weights, v), perm=[0, 2, 1, 3])
    return b.op("Reshape", mixed, b.constant([0, 0, size.hidden]))


def rms_norm(b, x, name):
    wide = b.op("Cast", x, to=TensorProto.FLOAT)
    square = b.op("Pow", wide, b.constant(2.0, TensorProto.FLOAT))
    mean = b.op("ReduceMean", square, axes=[-1], keepdims=1)
    root = b.op("Sqrt", b.op("Add", mean, b.constant(1e-5, TensorProto.FLOAT)))
    normal = b.op("Cast", b.op("Div", wide, root), to=b.size.dtype)
    return b.op("Mul", normal, b.weight(name, b.size.hidden))


def layer_norm(b, x, name):
    scale, shift = (b.weight(f"{name}.{part}", b.size.hidden) for part in ("weight", "bias"))
    return b.op("LayerNormalization", x, scale, shift, axis=-1, epsilon=1e-5)


def rotate(b, x, cos, sin):
    half = b.size.depth // 2
    low = b.op("Slice", x, b.constant([0]), b.constant([half]), b.constant([3]))
    high = b.op("Slice", x, b.constant([half]), b.constant([2 * half]), b.constant([3]))
    turned = b.op("Concat", b.op("Neg", high), low, axis=3)
    return b.op("Add", b.op("Mul", x, cos), b.op("Mul", turned, sin))


def repeat(b, x):
    groups, repeats, depth = b.size.kv_heads, b.size.heads // b.size.kv_heads, b.size.depth
    wide = b.op("Unsqueeze", x, b.constant([2]))
    shape = b.op("Shape", wide)
    batch = b.op("Slice", shape, b.constant([0]), b.constant([1]))
    length = b.op("Slice", shape, b.constant([3]), b.constant([4]))
    target = b.op("Concat", batch, b.constant([groups, repeats]), length, b.constant([depth]), axis=0)
    flat = b.op("Concat", batch, b.constant([groups * repeats]), length, b.constant([depth]), axis=0)
    return b.op("Reshape", b.op("Expand", wide, target), flat)


def llama_attention(b, i, x):
    size, name = b.size, f"layers.{i}"
    q, k, v = (
        split_heads(b, b.linear(x, f"{name}.{part}_proj", size.hidden, count * size.depth, bias=False), count)
        for part, count in (("q", size.heads), ("k", size.kv_heads), ("v", size.kv_heads))
    )
    q, k = rotate(b, q, "cos", "sin"), rotate(b, k, "cos", "sin")
    k, v = (repeat(b, b.append(i, part, new)) for part, new in (("key", k), ("value", v)))
    return b.linear(attend(b, q, k, v), f"{name}.o_proj", size.hidden, size.hidden, bias=False)


def gated(b, x, product):
    """`down(silu(gate x) * up x)`; `product(x, name)` applies a weight."""
    gate = product(x, "gate")
    return product(b.op("Mul", b.op("Mul", gate, b.op("Sigmoid", gate)), product(x, "up")), "down")


def llama_mlp(b, i, x):
    size = b.size
    widths = {"gate": (size.hidden, size.ffn), "up": (size.hidden, size.ffn), "down": (size.ffn, size.hidden)}
    return gated(b, x, lambda x, name: b.linear(x, f"layers.{i}.{name}_proj", *widths[name], bias=False))


def mixtral_experts(b, i, x):
    """Every expert on every token, `[batch, experts, seq, hidden]`, weighted by what the router gave the chosen ones."""
    size = b.size
    logits = b.linear(x, f"layers.{i}.router", size.hidden, size.experts, bias=False)
    shares = b.op("Softmax", b.op("Cast", logits, to=TensorProto.FLOAT), axis=-1)
    best, index = b.op("TopK", shares, b.constant([size.chosen]), outputs=2, axis=-1)
    best = b.op("Div", best, b.op("ReduceSum", best, b.constant([-1]), keepdims=1))
    zeros = b.op("Mul", shares, b.constant(0.0, TensorProto.FLOAT))
    table = b.op("Cast", b.op("ScatterElements", zeros, index, best, axis=2), to=size.dtype)
    widths = {"gate": (size.hidden, size.ffn), "up": (size.hidden, size.ffn), "down": (size.ffn, size.hidden)}

    def product(x, name):
        return b.op("MatMul", x, b.weight(f"layers.{i}.experts.{name}", size.experts, *widths[name]))

    mixed = gated(b, b.op("Unsqueeze", x, b.constant([1])), product)
    share = b.op("Unsqueeze", b.op("Transpose", table, perm=[0, 2, 1]), b.constant([3]))
    return b.op("ReduceSum", b.op("Mul", mixed, share), b.constant([1]), keepdims=0)


def llama_layer(b, i, x):
    x = b.op("Add", x, llama_attention(b, i, rms_norm(b, x, f"layers.{i}.input_norm")))
    mlp = mixtral_experts if b.size.family == "mixtral" else llama_mlp
    return b.op("Add", x, mlp(b, i, rms_norm(b, x, f"layers.{i}.post_norm")))


def gelu(b, x):
    """The tanh form, as GPT-2 has it."""

    def scalar(value):
        return b.constant(value, b.size.dtype)

    inner = b.op("Add", x, b.op("Mul", b.op("Pow", x, scalar(3.0)), scalar(0.044715)))
    inner = b.op("Tanh", b.op("Mul", inner, scalar(0.7978845608)))
    return b.op("Mul", b.op("Mul", x, scalar(0.5)), b.op("Add", inner, scalar(1.0)))


def gpt_layer(b, i, x):
    size, name = b.size, f"h.{i}"
    inner = layer_norm(b, x, f"{name}.ln_1")
    fused = b.linear(inner, f"{name}.attn.c_attn", size.hidden, 3 * size.hidden, bias=True)
    parts = b.op("Split", fused, b.constant([size.hidden] * 3), outputs=3, axis=2)
    q, k, v = (split_heads(b, part, size.heads) for part in parts)
    k, v = b.append(i, "key", k), b.append(i, "value", v)
    x = b.op("Add", x, b.linear(attend(b, q, k, v), f"{name}.attn.c_proj", size.hidden, size.hidden, bias=True))
    inner = b.linear(layer_norm(b, x, f"{name}.ln_2"), f"{name}.mlp.c_fc", size.hidden, size.ffn, bias=True)
    return b.op("Add", x, b.linear(gelu(b, inner), f"{name}.mlp.c_proj", size.ffn, size.hidden, bias=True))


def build(b):
    size = b.size
    gpt = size.family == "gpt"
    x = b.op("Gather", b.weight("embed_tokens", size.vocabulary, size.hidden), "input_ids")
    if gpt:
        positions = b.op("Gather", b.weight("embed_positions", size.positions, size.hidden), "position_ids")
        x = b.op("Add", x, positions)
    for i in range(size.layers):
        x = (gpt_layer if gpt else llama_layer)(b, i, x)
    x = (layer_norm if gpt else rms_norm)(b, x, "norm")
    head = b.weight("lm_head", size.hidden, size.vocabulary)
    b.nodes.append(helper.make_node("MatMul", [x, head], ["logits"], name="/lm_head"))


def model(size):
    b = Builder(size)
    build(b)

    def value(name, shape, dtype=size.dtype):
        return helper.make_tensor_value_info(name, dtype, shape)

    inputs = [value("input_ids", ["batch", "seq"], TensorProto.INT64), value("mask", ["batch", 1, "seq", "total"])]
    if size.family == "gpt":
        inputs.append(value("position_ids", ["batch", "seq"], TensorProto.INT64))
    else:
        inputs += [value(name, ["batch", 1, "seq", size.depth]) for name in ("cos", "sin")]
    past = ["batch", size.kv_heads, "past", size.depth]
    present = ["batch", size.kv_heads, "total", size.depth]
    inputs += [value(f"past_key_values.{i}.{p}", past) for i in range(size.layers) for p in ("key", "value")]
    results = [value("logits", ["batch", "seq", size.vocabulary])] + [value(name, present) for name in b.outputs]
    graph = helper.make_graph(b.nodes, size.family, inputs, results, initializer=b.weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b")
    for flag in ("layers", "hidden", "heads", "kv-heads", "ffn", "vocabulary"):
        parser.add_argument(f"--{flag}", type=int)
    given = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    out, shape = given.pop("out"), given.pop("shape")
    with open(out, "wb") as file:
        file.write(model(dataclasses.replace(SHAPES[shape], **given)).SerializeToString())


if __name__ == "__main__":
    main()
