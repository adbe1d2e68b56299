#!/usr/bin/env python3
"""Writes inputs of several shapes for a decoder model, and ONNX Runtime's outputs for them.

    python onnxruntime_golden.py MODEL FOLDER
"""

import pathlib
import sys

import numpy as np
import onnxruntime


def inputs(session, batch, sequence, past, seed):
    random = np.random.default_rng(seed)
    sizes = {"batch": batch, "seq": sequence, "past": past, "total": past + sequence}
    made = {}
    for entry in session.get_inputs():
        shape = [sizes[d] if isinstance(d, str) else d for d in entry.shape]
        if entry.name == "attention_mask":
            made[entry.name] = np.ones(shape, np.int64)
        elif entry.name == "position_ids":
            made[entry.name] = np.broadcast_to(np.arange(past, past + sequence), shape).astype(np.int64)
        elif entry.type == "tensor(int64)":
            made[entry.name] = random.integers(0, 512, shape)
        else:
            made[entry.name] = random.standard_normal(shape).astype(np.float32)
    return made


def main(model, folder):
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    for index, (batch, sequence, past) in enumerate([(1, 1, 0), (1, 11, 0), (3, 5, 2), (2, 1, 30)]):
        feed = inputs(session, batch, sequence, past, seed=index)
        np.savez(folder / f"inputs_{index}.npz", **feed)
        np.savez(folder / f"outputs_{index}.npz", **dict(zip(names, session.run(names, feed))))


if __name__ == "__main__":
    main(*sys.argv[1:])
