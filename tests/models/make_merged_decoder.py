#!/usr/bin/env python3
"""Makes merged-decoder/: a decoder of two graphs behind one `If`, the form in which Optimum merges decoders.

`use_cache_branch` chooses: true takes the graph with a cache, false the one for a prompt, which ignores the past it is
given. Both read the weights of the outer graph. Random weights from a seed; inputs, and what ONNX Runtime makes of
them for both values.

    pip install onnx==1.23.2 onnxruntime numpy
    python tests/models/make_merged_decoder.py
"""

import pathlib

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

LAYERS, HEADS, HEAD_DIM, VOCABULARY, POSITIONS = 2, 6, 4, 96, 64
HIDDEN, INNER = HEADS * HEAD_DIM, 4 * HEADS * HEAD_DIM
FOLDER = pathlib.Path(__file__).parent / "merged-decoder"
PAST = [f"past_key_values.{layer}.{kind}" for layer in range(LAYERS) for kind in ("key", "value")]
PRESENT = [name.replace("past_key_values", "present") for name in PAST]


def weights():
    random = np.random.default_rng(0)
    tensors = {}

    def add(name, *shape, around=0.0):
        tensors[name] = (around + random.normal(0, 0.3 if around == 0 else 0.1, shape)).astype(np.float32)

    add("tokens.weight", VOCABULARY, HIDDEN)
    add("positions.weight", POSITIONS, HIDDEN)
    for layer in range(LAYERS):
        for name in ("q", "k", "v", "o"):
            add(f"layers.{layer}.{name}.weight", HIDDEN, HIDDEN)
        add(f"layers.{layer}.up.weight", HIDDEN, INNER)
        add(f"layers.{layer}.up.bias", INNER)
        add(f"layers.{layer}.down.weight", INNER, HIDDEN)
        for norm in ("before", "after"):
            add(f"layers.{layer}.{norm}.weight", HIDDEN, around=1.0)
            add(f"layers.{layer}.{norm}.bias", HIDDEN)
    add("norm.weight", HIDDEN, around=1.0)
    add("norm.bias", HIDDEN)
    add("head.weight", HIDDEN, VOCABULARY)
    return tensors


def ints(*values):
    return numpy_helper.from_array(np.array(values, np.int64))


class Branch:
    """The nodes of one graph; `cached` says whether keys and values follow those of the past."""

    def __init__(self, cached):
        self.cached, self.nodes, self.prefix = cached, [], "cached" if cached else "prompt"

    def op(self, kind, *inputs, output=None, **attributes):
        output = output or f"{self.prefix}/{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], name=output, **attributes))
        return output

    def constant(self, tensor):
        return self.op("Constant", value=tensor)

    def norm(self, x, name):
        return self.op("LayerNormalization", x, f"{name}.weight", f"{name}.bias", axis=-1, epsilon=1e-5)

    def heads(self, x, weight):
        split = self.op("Reshape", self.op("MatMul", x, weight), self.constant(ints(0, 0, HEADS, HEAD_DIM)))
        return self.op("Transpose", split, perm=[0, 2, 1, 3])

    def bias(self):
        """What is added to the scores: nothing where a key is not masked and not in the future."""
        keys = self.op("Squeeze", self.op("Shape", "attention_mask", start=1), self.constant(ints(0)))
        zero = self.constant(numpy_helper.from_array(np.array(0, np.int64)))
        one = self.constant(numpy_helper.from_array(np.array(1, np.int64)))
        columns = self.op("Range", zero, keys, one)
        rows = self.op("Unsqueeze", "position_ids", self.constant(ints(2)))
        seen = self.op("LessOrEqual", columns, rows)
        seen = self.op("Unsqueeze", seen, self.constant(ints(1)))
        mask = self.op("Cast", "attention_mask", to=TensorProto.BOOL)
        mask = self.op("Unsqueeze", mask, self.constant(ints(1, 2)))
        nothing = self.constant(numpy_helper.from_array(np.array(0, np.float32)))
        never = self.constant(numpy_helper.from_array(np.array(-1e9, np.float32)))
        return self.op("Where", self.op("And", seen, mask), nothing, never)

    def build(self):
        x = self.op("Add", self.op("Gather", "tokens.weight", "input_ids"),
                    self.op("Gather", "positions.weight", "position_ids"))
        bias, results = self.bias(), []
        for layer in range(LAYERS):
            name = f"layers.{layer}"
            inner = self.norm(x, f"{name}.before")
            q, k, v = (self.heads(inner, f"{name}.{part}.weight") for part in "qkv")
            past = PAST[2 * layer:2 * layer + 2]
            own = [f"{self.prefix}/{present}" for present in PRESENT[2 * layer:2 * layer + 2]]
            if self.cached:
                k = self.op("Concat", past[0], k, axis=2, output=own[0])
                v = self.op("Concat", past[1], v, axis=2, output=own[1])
            else:
                k = self.op("Identity", k, output=own[0])
                v = self.op("Identity", v, output=own[1])
            results += own
            scale = self.constant(numpy_helper.from_array(np.array(HEAD_DIM ** -0.5, np.float32)))
            scores = self.op("MatMul", self.op("Mul", q, scale), self.op("Transpose", k, perm=[0, 1, 3, 2]))
            shares = self.op("Softmax", self.op("Add", scores, bias), axis=-1)
            mixed = self.op("Transpose", self.op("MatMul", shares, v), perm=[0, 2, 1, 3])
            mixed = self.op("Reshape", mixed, self.constant(ints(0, 0, HIDDEN)))
            x = self.op("Add", x, self.op("MatMul", mixed, f"{name}.o.weight"))
            inner = self.op("MatMul", self.norm(x, f"{name}.after"), f"{name}.up.weight")
            inner = self.op("Relu", self.op("Add", inner, f"{name}.up.bias"))
            x = self.op("Add", x, self.op("MatMul", inner, f"{name}.down.weight"))
        logits = self.op("MatMul", self.norm(x, "norm"), "head.weight", output=f"{self.prefix}/logits")
        length = "total" if self.cached else "sequence"
        outputs = [helper.make_tensor_value_info(logits, TensorProto.FLOAT, ["batch", "sequence", VOCABULARY])]
        outputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", HEADS, length, HEAD_DIM])
                    for name in results]
        return helper.make_graph(self.nodes, self.prefix, [], outputs)


def model():
    info = helper.make_tensor_value_info
    inputs = [info("input_ids", TensorProto.INT64, ["batch", "sequence"]),
              info("attention_mask", TensorProto.INT64, ["batch", "total"]),
              info("position_ids", TensorProto.INT64, ["batch", "sequence"])]
    inputs += [info(name, TensorProto.FLOAT, ["batch", HEADS, "past", HEAD_DIM]) for name in PAST]
    inputs.append(info("use_cache_branch", TensorProto.BOOL, [1]))
    outputs = [info("logits", TensorProto.FLOAT, ["batch", "sequence", VOCABULARY])]
    outputs += [info(name, TensorProto.FLOAT, ["batch", HEADS, "present", HEAD_DIM]) for name in PRESENT]
    choice = helper.make_node("If", ["use_cache_branch"], [output.name for output in outputs], name="choice",
                              then_branch=Branch(True).build(), else_branch=Branch(False).build())
    initializers = [numpy_helper.from_array(tensor, name) for name, tensor in weights().items()]
    graph = helper.make_graph([choice], "merged-decoder", inputs, outputs, initializers)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8,
                             producer_name="make_merged_decoder.py")
    onnx.checker.check_model(made, full_check=True)
    return made


def example(batch, sequence, past, cached, seed):
    random = np.random.default_rng(seed)
    before = past if cached else 0
    positions = np.broadcast_to(np.arange(before, before + sequence), (batch, sequence))
    inputs = {
        "input_ids": random.integers(0, VOCABULARY, (batch, sequence)),
        "attention_mask": np.ones((batch, before + sequence), np.int64),
        "position_ids": np.ascontiguousarray(positions),
        "use_cache_branch": np.array([cached]),
    }
    for name in PAST:
        inputs[name] = random.normal(0, 1, (batch, HEADS, past, HEAD_DIM)).astype(np.float32)
    return inputs


def main():
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / "model.onnx"
    onnx.save(model(), path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    # A prompt comes with a past that is to be ignored.
    for label, arguments in {"prompt": (2, 5, 1, False, 1), "step": (2, 1, 7, True, 2)}.items():
        inputs = example(*arguments)
        np.savez(FOLDER / f"inputs_{label}.npz", **inputs)
        np.savez(FOLDER / f"outputs_{label}.npz", **dict(zip(names, session.run(names, inputs))))


if __name__ == "__main__":
    main()
