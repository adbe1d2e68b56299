#!/usr/bin/env python3
"""Makes tiny-llama/: the model that the README's first command shards.

A Llama decoder (grouped-query attention, rotary positions, SwiGLU, KV cache) with seeded random weights, written by
PyTorch's own exporter, with inputs and PyTorch's outputs for a prompt and for one decode step.

    pip install torch==2.11.0 transformers==5.23.0 onnx==1.23.2 onnxscript==0.7.2 numpy
    python tests/models/make_tiny_llama.py
"""

import os
import pathlib

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import onnx
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 4, 8, 4, 8, 512
FOLDER = pathlib.Path(__file__).parent / "tiny-llama"


class WithCache(torch.nn.Module):
    """The model with its cache as plain tensors: key and value per layer, in and out."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, position_ids, past):
        cache = DynamicCache()
        for layer in range(LAYERS):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        result = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        present = [tensor for layer in result.past_key_values.layers for tensor in (layer.keys, layer.values)]
        return result.logits, *present


def example(batch, sequence, past, seed):
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (batch, sequence), generator=random)
    mask = torch.ones(batch, past + sequence, dtype=torch.int64)
    positions = torch.arange(past, past + sequence).expand(batch, sequence).contiguous()
    shape = (batch, KV_HEADS, past, HEAD_DIM)
    cache = tuple(torch.randn(shape, generator=random) for _ in range(2 * LAYERS))
    return ids, mask, positions, cache


def main():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HEADS * HEAD_DIM,
        intermediate_size=176,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        vocab_size=VOCABULARY,
        max_position_embeddings=512,
        initializer_range=0.15,
        attn_implementation="eager",
    )
    module = WithCache(LlamaForCausalLM(config).eval())
    states = [f"{i}.{part}" for i in range(LAYERS) for part in ("key", "value")]
    inputs = ["input_ids", "attention_mask", "position_ids"] + [f"past_key_values.{s}" for s in states]
    outputs = ["logits"] + [f"present.{s}" for s in states]
    axes = {"input_ids": {0: "batch", 1: "seq"}, "attention_mask": {0: "batch", 1: "total"}}
    axes |= {"position_ids": {0: "batch", 1: "seq"}, "logits": {0: "batch", 1: "seq"}}
    axes |= {f"past_key_values.{s}": {0: "batch", 2: "past"} for s in states}
    axes |= {f"present.{s}": {0: "batch", 2: "total"} for s in states}
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / "model.onnx"
    with torch.no_grad():
        torch.onnx.export(
            module,
            example(2, 3, 5, seed=1),
            str(path),
            dynamo=False,
            dynamic_axes=axes,
            input_names=inputs,
            output_names=outputs,
            opset_version=17,
            do_constant_folding=True,
        )
    model = onnx.load(path)
    for node in model.graph.node:
        node.doc_string = ""
    onnx.save(model, path)
    for name, (batch, sequence, past) in {"": (2, 7, 0), "_decode": (2, 1, 7)}.items():
        arguments = example(batch, sequence, past, seed=2)
        with torch.no_grad():
            results = module(*arguments)
        flat = [*arguments[:3], *arguments[3]]
        save(FOLDER / f"inputs{name}.npz", inputs, flat)
        save(FOLDER / f"outputs{name}.npz", outputs, results)


def save(path, names, tensors):
    arrays = {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in zip(names, tensors)}
    np.savez(path, **arrays)


if __name__ == "__main__":
    main()
