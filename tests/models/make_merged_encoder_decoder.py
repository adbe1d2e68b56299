#!/usr/bin/env python3
"""Makes merged-encoder-decoder/: a decoder that looks at what an encoder made, as Optimum merges those of T5.

`use_cache_branch` chooses as in merged-decoder/. The graph for a prompt makes keys and values of what the encoder gave;
the one with a cache takes them from its past, and has an empty constant where the other graph has them. The past and
the encoder's part of it have lengths of their own. Random weights from a seed; inputs, and what ONNX Runtime makes of
them for both values.

    pip install onnx==1.23.2 onnxruntime numpy
    python tests/models/make_merged_encoder_decoder.py
"""

import pathlib

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

LAYERS, HEADS, HEAD_DIM, VOCABULARY, BUCKETS, FARTHEST = 2, 4, 8, 64, 8, 16
HIDDEN, INNER, WIDTH = 24, 40, HEADS * HEAD_DIM
FOLDER = pathlib.Path(__file__).parent / "merged-encoder-decoder"
SIDES = [(side, kind) for side in ("decoder", "encoder") for kind in ("key", "value")]
PAST = [f"past_key_values.{layer}.{side}.{kind}" for layer in range(LAYERS) for side, kind in SIDES]
PRESENT = [name.replace("past_key_values", "present") for name in PAST]
LEAST = float(np.finfo(np.float32).min)


def weights():
    random = np.random.default_rng(0)
    tensors = {}

    def add(name, *shape, around=0.0):
        tensors[name] = (around + random.normal(0, 0.3 if around == 0 else 0.1, shape)).astype(np.float32)

    add("shared.weight", VOCABULARY, HIDDEN)
    add("distances.weight", BUCKETS, HEADS)
    for layer in range(LAYERS):
        for attention in ("self", "cross"):
            for part in "qkv":
                add(f"layers.{layer}.{attention}.{part}.weight", HIDDEN, WIDTH)
            add(f"layers.{layer}.{attention}.o.weight", WIDTH, HIDDEN)
            add(f"layers.{layer}.{attention}.norm.weight", HIDDEN, around=1.0)
        add(f"layers.{layer}.wi.weight", HIDDEN, INNER)
        add(f"layers.{layer}.wo.weight", INNER, HIDDEN)
        add(f"layers.{layer}.norm.weight", HIDDEN, around=1.0)
    add("norm.weight", HIDDEN, around=1.0)
    return tensors


def ints(*values):
    return numpy_helper.from_array(np.array(values, np.int64))


def one(value, dtype=np.float32):
    return numpy_helper.from_array(np.array(value, dtype))


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

    def number(self, value):
        return self.constant(one(value, np.int64 if isinstance(value, int) else np.float32))

    def dim(self, x, axis):
        return self.op("Gather", self.op("Shape", x), self.number(axis), axis=0)

    def row(self, x):
        return self.op("Unsqueeze", x, self.constant(ints(0)))

    def column(self, x):
        return self.op("Unsqueeze", x, self.constant(ints(1)))

    def places(self, count):
        return self.op("Range", self.number(0), count, self.number(1))

    def norm(self, x, name):
        mean = self.op("ReduceMean", self.op("Pow", x, self.number(2.0)), axes=[-1])
        root = self.op("Sqrt", self.op("Add", mean, self.number(1e-6)))
        return self.op("Mul", f"{name}.weight", self.op("Div", x, root))

    def heads(self, x, weight):
        sizes = [self.row(self.dim(x, 0))] + [self.constant(ints(size)) for size in (-1, HEADS, HEAD_DIM)]
        split = self.op("Reshape", self.op("MatMul", x, weight), self.op("Concat", *sizes, axis=0))
        return self.op("Transpose", split, perm=[0, 2, 1, 3])

    def attend(self, q, k, v, bias, weight):
        scores = self.op("Add", self.op("MatMul", q, self.op("Transpose", k, perm=[0, 1, 3, 2])), bias)
        mixed = self.op("MatMul", self.op("Softmax", scores, axis=-1), v)
        sizes = [self.row(self.dim(q, 0))] + [self.constant(ints(size)) for size in (-1, WIDTH)]
        mixed = self.op("Transpose", mixed, perm=[0, 2, 1, 3])
        return self.op("MatMul", self.op("Reshape", mixed, self.op("Concat", *sizes, axis=0)), weight)

    def distances(self, new, total):
        """What the scores get for how far a key is behind a query: small distances one by one, others in buckets."""
        places, few = self.places(total), BUCKETS // 2
        behind = self.op("Sub", self.row(places), self.column(places))
        behind = self.op("Neg", self.op("Min", behind, self.number(0)))
        share = self.op("Div", self.op("Cast", behind, to=TensorProto.FLOAT), self.number(float(few)))
        share = self.op("Log", self.op("Add", share, self.number(1e-9)))
        share = self.op("Div", share, self.number(float(np.log(FARTHEST / few))))
        far = self.op("Cast", self.op("Mul", share, self.number(float(BUCKETS - few))), to=TensorProto.INT64)
        far = self.op("Min", self.op("Add", far, self.number(few)), self.number(BUCKETS - 1))
        bucket = self.op("Where", self.op("Less", behind, self.number(few)), behind, far)
        bias = self.op("Transpose", self.op("Gather", "distances.weight", bucket), perm=[2, 0, 1])
        if not self.cached:
            return self.row(bias)
        ends = [self.row(self.op("Neg", new)), self.constant(ints(2**63 - 1))]
        return self.op("Slice", self.row(bias), *ends, self.constant(ints(2)), self.constant(ints(1)))

    def masked(self, mask):
        """The least number where a mask is 0."""
        return self.op("Mul", self.op("Sub", self.number(1.0), mask), self.number(LEAST))

    def own_bias(self):
        new = self.dim("input_ids", 1)
        total = self.op("Add", new, self.dim(PAST[0], 2)) if self.cached else new
        sizes = self.op("Concat", self.row(self.dim("input_ids", 0)), self.row(total), axis=0)
        mask = self.op("ConstantOfShape", sizes, value=numpy_helper.from_array(np.ones(1, np.float32)))
        rows = self.column(self.op("Add", self.places(new), self.op("Sub", total, new)))
        seen = self.op("Cast", self.op("LessOrEqual", self.row(self.places(total)), rows), to=TensorProto.FLOAT)
        between = self.constant(ints(1, 2))
        mask = self.op("Mul", self.op("Unsqueeze", mask, between), self.row(self.row(seen)))
        return self.op("Add", self.distances(new, total), self.masked(mask))

    def build(self):
        x = self.op("Gather", "shared.weight", "input_ids")
        bias = self.own_bias()
        mask = self.op("Cast", "encoder_attention_mask", to=TensorProto.FLOAT)
        other_bias = self.masked(self.op("Unsqueeze", mask, self.constant(ints(1, 2))))
        results = []
        for layer in range(LAYERS):
            name = f"layers.{layer}"
            past = PAST[4 * layer:4 * layer + 4]
            present = [f"{self.prefix}/{each}" for each in PRESENT[4 * layer:4 * layer + 4]]
            inner = self.norm(x, f"{name}.self.norm")
            q, *new = (self.heads(inner, f"{name}.self.{part}.weight") for part in "qkv")
            if self.cached:
                k, v = (self.op("Concat", past[i], new[i], axis=2, output=present[i]) for i in (0, 1))
            else:
                k, v = (self.op("Identity", new[i], output=present[i]) for i in (0, 1))
            x = self.op("Add", x, self.attend(q, k, v, bias, f"{name}.self.o.weight"))
            q = self.heads(self.norm(x, f"{name}.cross.norm"), f"{name}.cross.q.weight")
            if self.cached:
                nothing = numpy_helper.from_array(np.zeros((0, HEADS, 1, HEAD_DIM), np.float32))
                for each in present[2:]:
                    self.op("Constant", value=nothing, output=each)
                k, v = past[2:]
            else:
                made = [self.heads("encoder_hidden_states", f"{name}.cross.{part}.weight") for part in "kv"]
                k, v = (self.op("Identity", made[i], output=present[2 + i]) for i in (0, 1))
            x = self.op("Add", x, self.attend(q, k, v, other_bias, f"{name}.cross.o.weight"))
            inner = self.op("MatMul", self.norm(x, f"{name}.norm"), f"{name}.wi.weight")
            x = self.op("Add", x, self.op("MatMul", self.op("Relu", inner), f"{name}.wo.weight"))
            results += present
        x = self.op("Mul", self.norm(x, "norm"), self.number(HIDDEN**-0.5))
        table = self.op("Transpose", "shared.weight", perm=[1, 0])
        logits = self.op("MatMul", x, table, output=f"{self.prefix}/logits")
        info, length = helper.make_tensor_value_info, "total" if self.cached else "decoder_sequence_length"
        outputs = [info(logits, TensorProto.FLOAT, ["batch_size", "decoder_sequence_length", VOCABULARY])]
        for each in results:
            shape = ["batch_size", HEADS, length, HEAD_DIM]
            if ".encoder." in each:
                shape = [0, HEADS, 1, HEAD_DIM] if self.cached else shape[:2] + ["encoder_sequence_length", HEAD_DIM]
            outputs.append(info(each, TensorProto.FLOAT, shape))
        return helper.make_graph(self.nodes, self.prefix, [], outputs)


def length_of(name, encoder, decoder):
    return encoder if ".encoder." in name else decoder


def model():
    info = helper.make_tensor_value_info
    lengths = ("encoder_sequence_length_out", "past_decoder_sequence_length")
    inputs = [info("encoder_attention_mask", TensorProto.INT64, ["batch_size", "encoder_sequence_length"]),
              info("input_ids", TensorProto.INT64, ["batch_size", "decoder_sequence_length"]),
              info("encoder_hidden_states", TensorProto.FLOAT, ["batch_size", "encoder_sequence_length", HIDDEN])]
    inputs += [info(name, TensorProto.FLOAT, ["batch_size", HEADS, length_of(name, *lengths), HEAD_DIM]) for name in PAST]
    inputs.append(info("use_cache_branch", TensorProto.BOOL, [1]))
    outputs = [info("logits", TensorProto.FLOAT, ["batch_size", "decoder_sequence_length", VOCABULARY])]
    outputs += [info(name, TensorProto.FLOAT, ["entries", HEADS, length_of(name, "encoder_out", "total"), HEAD_DIM])
                for name in PRESENT]
    choice = helper.make_node("If", ["use_cache_branch"], [output.name for output in outputs], name="optimum::if",
                              then_branch=Branch(True).build(), else_branch=Branch(False).build())
    initializers = [numpy_helper.from_array(tensor, name) for name, tensor in weights().items()]
    graph = helper.make_graph([choice], "merged-encoder-decoder", inputs, outputs, initializers)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8,
                             producer_name="make_merged_encoder_decoder.py")
    onnx.checker.check_model(made, full_check=True)
    return made


def example(batch, sequence, past, encoder, cached, seed):
    random = np.random.default_rng(seed)
    mask = np.ones((batch, encoder), np.int64)
    mask[0, -1] = 0
    inputs = {
        "encoder_attention_mask": mask,
        "input_ids": random.integers(0, VOCABULARY, (batch, sequence)),
        "encoder_hidden_states": random.normal(size=(batch, encoder, HIDDEN)).astype(np.float32),
        "use_cache_branch": np.array([cached]),
    }
    for name in PAST:
        length = length_of(name, encoder if cached else past, past)
        inputs[name] = random.normal(size=(batch, HEADS, length, HEAD_DIM)).astype(np.float32)
    return inputs


def main():
    FOLDER.mkdir(exist_ok=True)
    made = model()
    onnx.save(made, FOLDER / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    # A prompt is given a past of one entry, which it ignores.
    for name, inputs in {"prompt": example(2, 3, 1, 5, False, 1), "step": example(2, 1, 3, 5, True, 2)}.items():
        results = dict(zip((output.name for output in made.graph.output), session.run(None, inputs)))
        np.savez_compressed(FOLDER / f"inputs_{name}.npz", **inputs)
        np.savez_compressed(FOLDER / f"outputs_{name}.npz", **results)


if __name__ == "__main__":
    main()
