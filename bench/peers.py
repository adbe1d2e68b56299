#!/usr/bin/env python3
"""How fast sharded decoders run beside ONNX Runtime, in one interleaved run.

    bench/peers.py --tpshard PATH [--rounds N] [--prompt N] [--decode N] [--raw FILE] MODEL.onnx...

needs `pip install onnxruntime numpy`. A model is a decoder with past and present, as transformers exports it. Every round
measures, one after another: one rank with one thread against ONNX Runtime with one, then one rank with two threads and two
ranks with one each against ONNX Runtime with two (IO binding, state stays in its memory). Printed are medians over rounds,
ratios of medians (above 1: tpshard is faster), and per cent between the quartiles; --raw keeps all samples as JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time

import numpy
import onnxruntime


class Runtime:
    """A decoder under ONNX Runtime."""

    def __init__(self, model, threads):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self.outputs = [output.name for output in self.session.get_outputs()]
        inputs = self.session.get_inputs()
        self.past = {i.name: i.shape for i in inputs if "past" in i.name}
        self.head = head_size(model)
        self.others = [i.name for i in inputs if "past" not in i.name]
        self.present = [name for name in self.outputs if "present" in name]

    def step(self, ids, length, state):
        binding = self.session.io_binding()
        for name, value in feeds(self.others, ids, length).items():
            binding.bind_cpu_input(name, value)
        for name, value in zip(self.past, state):
            binding.bind_ortvalue_input(name, value)
        for name in self.outputs:
            binding.bind_output(name)
        self.session.run_with_iobinding(binding)
        values = dict(zip(self.outputs, binding.get_outputs()))
        return [values[name] for name in self.present]

    def measure(self, prompt, decode):
        empty = [
            onnxruntime.OrtValue.ortvalue_from_numpy(numpy.zeros([1, s[1], 0, self.head or s[3]], numpy.float32))
            for s in self.past.values()
        ]
        start = time.perf_counter()
        state = self.step(prompt, 0, empty)
        first = time.perf_counter() - start
        tokens = []
        for length in range(prompt.shape[1], prompt.shape[1] + decode):
            start = time.perf_counter()
            state = self.step(prompt[:, :1], length, state)
            tokens.append(time.perf_counter() - start)
        return first, tokens


def head_size(model):
    """What the builder of ONNX Runtime GenAI says beside the model, where the past's own shape has a name only."""
    config = os.path.join(os.path.dirname(model), "genai_config.json")
    if not os.path.exists(config):
        return None
    with open(config, encoding="utf-8") as file:
        return json.load(file)["model"]["decoder"]["head_size"]


def feeds(names, ids, length):
    """What a decoder wants besides its past."""
    total = length + ids.shape[1]
    all_feeds = {
        "input_ids": ids,
        "attention_mask": numpy.ones((1, total), numpy.int64),
        "position_ids": numpy.arange(length, total, dtype=numpy.int64)[None],
    }
    return {name: all_feeds[name] for name in names}


def measure_folder(tpshard, folder, threads, inputs, decode):
    command = [tpshard, "bench", folder, "--inputs", inputs, "--decode", str(decode), "--threads", str(threads)]
    command += ["--samples", "1", "--warm-up", "1", "--json", "--quiet"]
    report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    phases = report["phases"]
    return phases["prompt"]["median_seconds"], [phases["token"]["median_seconds"]]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--tpshard", default="tpshard")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--decode", type=int, default=32)
    parser.add_argument("--raw")
    parser.add_argument("models", nargs="+")
    arguments = parser.parse_args()
    prompt = numpy.arange(arguments.prompt, dtype=numpy.int64)[None] % 1000
    raw = []
    for model in arguments.models:
        name = os.path.basename(os.path.dirname(os.path.abspath(model)))
        with tempfile.TemporaryDirectory() as scratch:
            folders = {}
            for ranks in (1, 2):
                folders[ranks] = os.path.join(scratch, str(ranks))
                dims = "batch=1,seq=1,past=128"
                command = [arguments.tpshard, "shard", model, "--tp", str(ranks), "--dim", dims]
                subprocess.run(command + ["-o", folders[ranks], "--quiet"], check=True, capture_output=True)
            runtimes = {threads: Runtime(model, threads) for threads in (1, 2)}
            inputs = os.path.join(scratch, "prompt.npz")
            numpy.savez(inputs, **feeds(runtimes[1].others, prompt, 0))
            for _ in range(arguments.rounds):
                for what, measured in (
                    ("1 rank, 1 thread", lambda: measure_folder(arguments.tpshard, folders[1], 1, inputs, arguments.decode)),
                    ("ONNX Runtime, 1 thread", lambda: runtimes[1].measure(prompt, arguments.decode)),
                    ("1 rank, 2 threads", lambda: measure_folder(arguments.tpshard, folders[1], 2, inputs, arguments.decode)),
                    ("2 ranks, 1 thread each", lambda: measure_folder(arguments.tpshard, folders[2], 1, inputs, arguments.decode)),
                    ("ONNX Runtime, 2 threads", lambda: runtimes[2].measure(prompt, arguments.decode)),
                ):
                    first, tokens = measured()
                    sample = {"model": name, "what": what, "prompt_seconds": first}
                    raw.append(sample | {"token_seconds": statistics.median(tokens)})
        table(name, [sample for sample in raw if sample["model"] == name])
    if arguments.raw:
        with open(arguments.raw, "w", encoding="utf-8") as file:
            json.dump(raw, file, indent=1)
            file.write("\n")


def table(name, samples):
    print(f"{name}\n  {'':<26}{'prompt ms':>10}{'spread':>8}{'ratio':>7}{'token ms':>10}{'spread':>8}{'ratio':>7}")
    against = {"1 rank, 1 thread": "ONNX Runtime, 1 thread"}
    for what in dict.fromkeys(sample["what"] for sample in samples):
        other = against.get(what, "ONNX Runtime, 2 threads")
        line = f"  {what:<26}"
        for key in ("prompt_seconds", "token_seconds"):
            own = [sample[key] for sample in samples if sample["what"] == what]
            median = statistics.median(own)
            low, _, high = statistics.quantiles(own, n=4)
            ratio = statistics.median(s[key] for s in samples if s["what"] == other) / median
            shown = "" if what.startswith("ONNX") else f"{ratio:.2f}"
            line += f"{median * 1e3:>10.2f}{(high - low) / median:>8.0%}{shown:>7}"
        print(line)


if __name__ == "__main__":
    main()
