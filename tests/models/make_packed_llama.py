#!/usr/bin/env python3
"""Makes packed-llama/: a decoder with quantised weights, in the form that ONNX Runtime GenAI's model builder writes.

Weights are codes of 4 bits in blocks of 32 (in the second layer with zero points, in the first without, the last product
with 8 bits), activations are rounded to bytes (`accuracy_level` 4), attention is GroupQueryAttention with rotary positions
inside. Seeded random weights; inputs and ONNX Runtime's outputs for a prompt and for one decode step.

An activation that lies between two bytes is rounded one way or the other depending on the last bit of a sum, and the
outputs then differ by a thousandth: the script refuses a model in which one comes near.

    pip install onnx==1.23.2 onnxruntime==1.31.1 numpy
    python tests/models/make_packed_llama.py
"""

import pathlib

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

LAYERS, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, VOCABULARY, POSITIONS = 2, 4, 2, 32, 256, 384, 32
HIDDEN = HEADS * HEAD_DIM
BLOCK = 32
FOLDER = pathlib.Path(__file__).parent / "packed-llama"
random = np.random.default_rng(4)
nodes, initializers, rounded = [], [], []


def initializer(name, array):
    initializers.append(numpy_helper.from_array(array, name))
    return name


def node(op, inputs, outputs, domain="", **attributes):
    nodes.append(helper.make_node(op, inputs, outputs, name=outputs[0], domain=domain, **attributes))
    return outputs[0]


def product(name, x, depth, columns, bits=4, zero_points=False):
    per_byte = 8 // bits
    blocks = depth // BLOCK
    inputs = [
        x,
        initializer(f"{name}.codes", random.integers(0, 256, (columns, blocks, BLOCK // per_byte), dtype=np.uint8)),
        initializer(f"{name}.scales", random.uniform(0.2, 1.0, (columns * blocks,)).astype(np.float32) / (6 << bits - 4) / depth**0.5),
    ]
    if zero_points:
        of_column = -(-blocks * bits // 8)
        low, high = random.integers(6, 11, (2, columns * of_column), dtype=np.uint8)
        inputs.append(initializer(f"{name}.zeros", low | high << 4))
    rounded.append(x)
    attributes = dict(K=depth, N=columns, bits=bits, block_size=BLOCK, accuracy_level=4)
    return node("MatMulNBits", inputs, [name], "com.microsoft", **attributes)


def norm_scale(name):
    return initializer(f"{name}.scale", (1 + 0.05 * random.standard_normal(HIDDEN)).astype(np.float32))


def model():
    ms = "com.microsoft"
    initializer("one", np.array([1], np.int64))
    initializer("last", np.array(1, np.int64))
    node("ReduceSum", ["attention_mask", "one"], ["lengths"], keepdims=0)
    node("Sub", ["lengths", "one"], ["lengths_less_one"])
    node("Cast", ["lengths_less_one"], ["seqlens_k"], to=TensorProto.INT32)
    node("Shape", ["attention_mask"], ["mask_shape"])
    node("Gather", ["mask_shape", "last"], ["total"], axis=0)
    node("Cast", ["total"], ["total_sequence_length"], to=TensorProto.INT32)
    angles = np.arange(POSITIONS)[:, None] / 10000 ** (np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    initializer("cos", np.cos(angles).astype(np.float32))
    initializer("sin", np.sin(angles).astype(np.float32))
    initializer("table", random.standard_normal((VOCABULARY, HIDDEN)).astype(np.float32))
    node("Gather", ["table", "input_ids"], ["embedding"])
    x = node("SimplifiedLayerNormalization", ["embedding", norm_scale("norm.0")], ["norm.0"], axis=-1, epsilon=1e-6)
    residual = "embedding"
    width = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    for layer in range(LAYERS):
        name, zeros = f"layer.{layer}", layer == 1
        qkv = product(f"{name}.qkv", x, HIDDEN, width, zero_points=zeros)
        past = [f"past_key_values.{layer}.{part}" for part in ("key", "value")]
        present = [f"present.{layer}.{part}" for part in ("key", "value")]
        inputs = [qkv, "", "", *past, "seqlens_k", "total_sequence_length", "cos", "sin"]
        outputs = [f"{name}.attention", *present]
        heads = dict(num_heads=HEADS, kv_num_heads=KV_HEADS, do_rotary=1)
        x = product(f"{name}.o", node("GroupQueryAttention", inputs, outputs, ms, **heads), HIDDEN, HIDDEN, zero_points=zeros)
        norm = norm_scale(f"{name}.norm")
        outputs = [f"{name}.norm", "", "", f"{name}.sum"]
        skip = "SkipSimplifiedLayerNormalization"
        x = node(skip, [residual, x, norm], outputs, ms, epsilon=1e-6)
        gate = product(f"{name}.gate", x, HIDDEN, INTERMEDIATE, zero_points=zeros)
        up = product(f"{name}.up", x, HIDDEN, INTERMEDIATE, zero_points=zeros)
        node("Sigmoid", [gate], [f"{name}.sigmoid"])
        node("Mul", [gate, f"{name}.sigmoid"], [f"{name}.silu"])
        down = product(f"{name}.down", node("Mul", [f"{name}.silu", up], [f"{name}.mul"]), INTERMEDIATE, HIDDEN, zero_points=zeros)
        norm = norm_scale(f"norm.{layer + 1}")
        residual, outputs = f"{name}.out", [f"norm.{layer + 1}", "", "", f"{name}.out"]
        x = node(skip, [f"{name}.sum", down, norm], outputs, ms, epsilon=1e-6)
    node("Identity", [product("head", x, HIDDEN, VOCABULARY, bits=8)], ["logits"])

    tensor = helper.make_tensor_value_info
    inputs = [
        tensor("input_ids", TensorProto.INT64, ["batch_size", "sequence_length"]),
        tensor("attention_mask", TensorProto.INT64, ["batch_size", "total_sequence_length"]),
    ]
    outputs = [tensor("logits", TensorProto.FLOAT, ["batch_size", "sequence_length", VOCABULARY])]
    for layer in range(LAYERS):
        for part in ("key", "value"):
            past = ["batch_size", KV_HEADS, "past_sequence_length", HEAD_DIM]
            present = ["batch_size", KV_HEADS, "total_sequence_length", HEAD_DIM]
            inputs.append(tensor(f"past_key_values.{layer}.{part}", TensorProto.FLOAT, past))
            outputs.append(tensor(f"present.{layer}.{part}", TensorProto.FLOAT, present))
    graph = helper.make_graph(nodes, "packed-llama", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(ms, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def example(batch, sequence, past):
    inputs = {
        "input_ids": random.integers(0, VOCABULARY, (batch, sequence)),
        "attention_mask": np.ones((batch, past + sequence), np.int64),
    }
    for layer in range(LAYERS):
        for part in ("key", "value"):
            shape = (batch, KV_HEADS, past, HEAD_DIM)
            inputs[f"past_key_values.{layer}.{part}"] = random.standard_normal(shape).astype(np.float32)
    return inputs


def outputs_of(made, inputs):
    """The outputs, after a look at what is rounded."""
    watched = onnx.ModelProto()
    watched.CopyFrom(made)
    watched.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in dict.fromkeys(rounded))
    session = onnxruntime.InferenceSession(watched.SerializeToString(), providers=["CPUExecutionProvider"])
    values = dict(zip([output.name for output in session.get_outputs()], session.run(None, inputs)))
    for name in rounded:
        blocks = values[name].astype(np.float64).reshape(-1, BLOCK)
        bytes_ = blocks * (127 / np.abs(blocks).max(-1, keepdims=True))
        nearest = np.abs(np.abs(bytes_ % 1) - 0.5).min()
        assert nearest > 4e-5, f"{name}: {nearest} from a tie; take another seed"
    session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    return dict(zip([output.name for output in session.get_outputs()], session.run(None, inputs)))


def main():
    made = model()
    FOLDER.mkdir(exist_ok=True)
    onnx.save(made, FOLDER / "model.onnx")
    for name, inputs in [("", example(1, 5, 0)), ("_decode", example(2, 1, 6))]:
        np.savez(FOLDER / f"inputs{name}.npz", **inputs)
        np.savez(FOLDER / f"outputs{name}.npz", **outputs_of(made, inputs))


if __name__ == "__main__":
    main()
