#!/usr/bin/env python3
"""Writes a Llama-shaped decoder without its weights: enough for `tpshard plan`.

    pip install onnx==1.23.2
    python tests/models/make_graph_only.py OUT.onnx [--layers 32] [--hidden 4096] [--heads 32] [--kv-heads 8]
                                           [--ffn 14336] [--vocabulary 128256]

The weights are external data in a file that does not exist, in float16.
"""

import argparse

import onnx
from onnx import TensorProto, helper

DTYPE = TensorProto.FLOAT16


class Builder:
    def __init__(self):
        self.nodes, self.weights, self.offset = [], [], 0

    def op(self, kind, *inputs, **attributes):
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=f"/{kind}_{len(self.nodes)}", **attributes))
        return name

    def weight(self, name, *shape):
        tensor = TensorProto(name=name, data_type=DTYPE, dims=shape, data_location=TensorProto.EXTERNAL)
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


def rms_norm(b, x, name, hidden):
    wide = b.op("Cast", x, to=TensorProto.FLOAT)
    square = b.op("Pow", wide, b.constant(2.0, TensorProto.FLOAT))
    mean = b.op("ReduceMean", square, axes=[-1], keepdims=1)
    root = b.op("Sqrt", b.op("Add", mean, b.constant(1e-5, TensorProto.FLOAT)))
    normal = b.op("Cast", b.op("Div", wide, root), to=DTYPE)
    return b.op("Mul", normal, b.weight(name, hidden))


def rotate(b, x, cos, sin, half):
    low = b.op("Slice", x, b.constant([0]), b.constant([half]), b.constant([3]))
    high = b.op("Slice", x, b.constant([half]), b.constant([2 * half]), b.constant([3]))
    turned = b.op("Concat", b.op("Neg", high), low, axis=3)
    return b.op("Add", b.op("Mul", x, cos), b.op("Mul", turned, sin))


def repeat(b, x, groups, repeats, depth):
    wide = b.op("Unsqueeze", x, b.constant([2]))
    shape = b.op("Shape", wide)
    batch = b.op("Slice", shape, b.constant([0]), b.constant([1]))
    length = b.op("Slice", shape, b.constant([3]), b.constant([4]))
    target = b.op("Concat", batch, b.constant([groups, repeats]), length, b.constant([depth]), axis=0)
    flat = b.op("Concat", batch, b.constant([groups * repeats]), length, b.constant([depth]), axis=0)
    return b.op("Reshape", b.op("Expand", wide, target), flat)


def layer(b, i, x, mask, cos, sin, size, outputs):
    depth = size.hidden // size.heads
    inner = rms_norm(b, x, f"layers.{i}.input_norm", size.hidden)

    def heads(name, count):
        y = b.op("MatMul", inner, b.weight(f"layers.{i}.{name}", size.hidden, count * depth))
        return b.op("Transpose", b.op("Reshape", y, b.constant([0, 0, count, depth])), perm=[0, 2, 1, 3])

    q = rotate(b, heads("q_proj", size.heads), cos, sin, depth // 2)
    k = rotate(b, heads("k_proj", size.kv_heads), cos, sin, depth // 2)
    v = heads("v_proj", size.kv_heads)
    present = []
    for part, new in (("key", k), ("value", v)):
        name = f"present.{i}.{part}"
        b.nodes.append(helper.make_node("Concat", [f"past_key_values.{i}.{part}", new], [name], name=f"/concat_{i}_{part}", axis=2))
        present.append(name)
        outputs.append(name)
    repeats = size.heads // size.kv_heads
    k, v = (repeat(b, p, size.kv_heads, repeats, depth) for p in present)
    scores = b.op("MatMul", q, b.op("Transpose", k, perm=[0, 1, 3, 2]))
    scores = b.op("Mul", scores, b.constant(depth**-0.5, DTYPE))
    weights = b.op("Softmax", b.op("Add", scores, mask), axis=-1)
    mixed = b.op("Transpose", b.op("MatMul", weights, v), perm=[0, 2, 1, 3])
    mixed = b.op("Reshape", mixed, b.constant([0, 0, size.hidden]))
    x = b.op("Add", x, b.op("MatMul", mixed, b.weight(f"layers.{i}.o_proj", size.hidden, size.hidden)))
    inner = rms_norm(b, x, f"layers.{i}.post_norm", size.hidden)
    gate = b.op("MatMul", inner, b.weight(f"layers.{i}.gate_proj", size.hidden, size.ffn))
    up = b.op("MatMul", inner, b.weight(f"layers.{i}.up_proj", size.hidden, size.ffn))
    gated = b.op("Mul", b.op("Mul", gate, b.op("Sigmoid", gate)), up)
    return b.op("Add", x, b.op("MatMul", gated, b.weight(f"layers.{i}.down_proj", size.ffn, size.hidden)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    for flag, value in (("layers", 32), ("hidden", 4096), ("heads", 32), ("kv-heads", 8), ("ffn", 14336), ("vocabulary", 128256)):
        parser.add_argument(f"--{flag}", type=int, default=value)
    size = parser.parse_args()
    depth = size.hidden // size.heads
    b = Builder()
    outputs = []
    x = b.op("Gather", b.weight("embed_tokens", size.vocabulary, size.hidden), "input_ids")
    for i in range(size.layers):
        x = layer(b, i, x, "mask", "cos", "sin", size, outputs)
    x = rms_norm(b, x, "norm", size.hidden)
    b.nodes.append(helper.make_node("MatMul", [x, b.weight("lm_head", size.hidden, size.vocabulary)], ["logits"], name="/lm_head"))

    def value(name, dtype, shape):
        return helper.make_tensor_value_info(name, dtype, shape)

    inputs = [
        value("input_ids", TensorProto.INT64, ["batch", "seq"]),
        value("mask", DTYPE, ["batch", 1, "seq", "total"]),
        value("cos", DTYPE, ["batch", 1, "seq", depth]),
        value("sin", DTYPE, ["batch", 1, "seq", depth]),
    ]
    cache = ["batch", size.kv_heads, "past", depth]
    inputs += [value(f"past_key_values.{i}.{p}", DTYPE, cache) for i in range(size.layers) for p in ("key", "value")]
    results = [value("logits", DTYPE, ["batch", "seq", size.vocabulary])]
    results += [value(name, DTYPE, ["batch", size.kv_heads, "total", depth]) for name in outputs]
    graph = helper.make_graph(b.nodes, "llama", inputs, results, initializer=b.weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    with open(size.out, "wb") as file:
        file.write(model.SerializeToString())


if __name__ == "__main__":
    main()
