#!/usr/bin/env python3
"""How fast sharded decoders run beside ONNX Runtime, OpenVINO and llama.cpp, in one interleaved run.

    bench/peers.py --tpshard PATH [--rounds N] [--prompt N] [--decode N] [--raw FILE] [--openvino] [--llama-cpp] MODEL.onnx...

needs `pip install onnxruntime numpy`, and `openvino`, or `llama-cpp-python gguf`, for the peers that flags add. A model is a
decoder with past and present, as transformers exports it. Every round measures, one after another: one rank with one thread
against the peers with one, then one rank with two threads and two ranks with one each against the peers with two (IO
binding, state stays in their memory). OpenVINO only takes the prompt; llama.cpp is given random weights of 4 bits (Q4_0) in
the shape that `genai_config.json` beside the model says. Printed are medians over rounds, ratios of medians (a peer's over
tpshard's: above 1, tpshard is faster), and per cent between the quartiles; --raw keeps all samples as JSON.
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

PEERS = ("ONNX Runtime", "OpenVINO", "llama.cpp")


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


class OpenVino:
    """The prompt of a decoder under OpenVINO."""

    def __init__(self, model, threads):
        import openvino

        core = openvino.Core()
        options = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        self.compiled = core.compile_model(model, "CPU", options)
        self.inputs = [(i.any_name, i.partial_shape) for i in self.compiled.inputs]

    def measure(self, prompt, _decode):
        given = feeds([name for name, _ in self.inputs if "past" not in name], prompt, 0)
        for name, shape in self.inputs:
            if "past" in name:
                given[name] = numpy.zeros([1, shape[1].get_length(), 0, shape[3].get_length()], numpy.float32)
        request = self.compiled.create_infer_request()
        request.infer(given)
        start = time.perf_counter()
        request.infer(given)
        return time.perf_counter() - start, []


class LlamaCpp:
    """A decoder of the same shape under llama.cpp."""

    def __init__(self, file, threads):
        import llama_cpp

        threads = {"n_threads": threads, "n_threads_batch": threads}
        self.llama = llama_cpp.Llama(file, n_ctx=512, n_batch=512, verbose=False, **threads)

    def measure(self, prompt, decode):
        ids = prompt[0].tolist()
        self.llama.reset()
        start = time.perf_counter()
        self.llama.eval(ids)
        first = time.perf_counter() - start
        tokens = []
        for _ in range(decode):
            start = time.perf_counter()
            self.llama.eval(ids[:1])
            tokens.append(time.perf_counter() - start)
        return first, tokens


def make_gguf(model, file):
    """Random weights of 4 bits in the shape of a model of ONNX Runtime GenAI's builder."""
    import gguf
    import onnx

    with open(os.path.join(os.path.dirname(model), "genai_config.json"), encoding="utf-8") as text:
        config = json.load(text)["model"]
    decoder = config["decoder"]
    hidden, heads, kv_heads = (decoder[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    head, layers, vocabulary = decoder["head_size"], decoder["num_hidden_layers"], config["vocab_size"]
    graph = onnx.load(model, load_external_data=False).graph
    width = next(a.i for n in graph.node if "gate_proj" in n.name for a in n.attribute if a.name == "N")
    random = numpy.random.default_rng(0)
    kind = gguf.GGMLQuantizationType.Q4_0
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(width)
    writer.add_rope_dimension_count(head)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{i}>" for i in range(vocabulary)])
    writer.add_token_scores([0.0] * vocabulary)
    writer.add_token_types([gguf.TokenType.UNKNOWN if i == 0 else gguf.TokenType.NORMAL for i in range(vocabulary)])

    def matrix(name, rows, columns):
        blocks = random.integers(0, 256, (rows, columns // 32, 18), dtype=numpy.uint8)
        scale = numpy.full(blocks.shape[:2], 0.1 / columns**0.5, numpy.float16)
        blocks[..., :2] = scale[..., None].view(numpy.uint8)
        writer.add_tensor(name, blocks.reshape(rows, -1), raw_dtype=kind)

    def norm(name):
        writer.add_tensor(name, numpy.ones(hidden, numpy.float32))

    matrix("token_embd.weight", vocabulary, hidden)
    matrix("output.weight", vocabulary, hidden)
    norm("output_norm.weight")
    for layer in range(layers):
        block = f"blk.{layer}"
        norm(f"{block}.attn_norm.weight")
        norm(f"{block}.ffn_norm.weight")
        matrix(f"{block}.attn_q.weight", heads * head, hidden)
        matrix(f"{block}.attn_k.weight", kv_heads * head, hidden)
        matrix(f"{block}.attn_v.weight", kv_heads * head, hidden)
        matrix(f"{block}.attn_output.weight", hidden, heads * head)
        matrix(f"{block}.ffn_gate.weight", width, hidden)
        matrix(f"{block}.ffn_up.weight", width, hidden)
        matrix(f"{block}.ffn_down.weight", hidden, width)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


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
    parser.add_argument("--openvino", action="store_true")
    parser.add_argument("--llama-cpp", action="store_true")
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
            made = {"ONNX Runtime": lambda threads: Runtime(model, threads)}
            if arguments.openvino:
                made["OpenVINO"] = lambda threads: OpenVino(model, threads)
            if arguments.llama_cpp:
                file = os.path.join(scratch, "model.gguf")
                make_gguf(model, file)
                made["llama.cpp"] = lambda threads: LlamaCpp(file, threads)
            peers = {(peer, threads): make(threads) for peer, make in made.items() for threads in (1, 2)}
            inputs = os.path.join(scratch, "prompt.npz")
            numpy.savez(inputs, **feeds(peers["ONNX Runtime", 1].others, prompt, 0))

            def own(ranks, threads):
                return lambda: measure_folder(arguments.tpshard, folders[ranks], threads, inputs, arguments.decode)

            def peer(name, threads):
                return lambda: peers[name, threads].measure(prompt, arguments.decode)

            measurements = [("1 rank, 1 thread", own(1, 1))]
            measurements += [(f"{name}, 1 thread", peer(name, 1)) for name in made]
            measurements += [("1 rank, 2 threads", own(1, 2)), ("2 ranks, 1 thread each", own(2, 1))]
            measurements += [(f"{name}, 2 threads", peer(name, 2)) for name in made]
            for _ in range(arguments.rounds):
                for what, measure in measurements:
                    first, tokens = measure()
                    token = statistics.median(tokens) if tokens else None
                    raw.append({"model": name, "what": what, "prompt_seconds": first, "token_seconds": token})
        table(name, [sample for sample in raw if sample["model"] == name])
    if arguments.raw:
        with open(arguments.raw, "w", encoding="utf-8") as file:
            json.dump(raw, file, indent=1)
            file.write("\n")


def table(name, samples):
    """Of what is ours, a ratio for every peer that uses as many threads."""
    print(f"{name}\n  {'':<26}{'prompt ms':>10}{'spread':>8}{'token ms':>10}{'spread':>8}")
    medians = {}
    for what in dict.fromkeys(sample["what"] for sample in samples):
        line = f"  {what:<26}"
        for key in ("prompt_seconds", "token_seconds"):
            taken = [sample[key] for sample in samples if sample["what"] == what and sample[key] is not None]
            if not taken:
                line += f"{'':>18}"
                continue
            medians[what, key] = median = statistics.median(taken)
            low, _, high = statistics.quantiles(taken, n=4)
            line += f"{median * 1e3:>10.2f}{(high - low) / median:>8.0%}"
        print(line)
    for what in dict.fromkeys(what for what, _ in medians):
        if what.startswith(PEERS):
            continue
        threads = "1 thread" if what == "1 rank, 1 thread" else "2 threads"
        for peer in PEERS:
            keys = [(f"{peer}, {threads}", key) for key in ("prompt_seconds", "token_seconds")]
            ratios = [f"{medians[key] / medians[what, key[1]]:.2f}" for key in keys if key in medians]
            if ratios:
                print(f"  {what} beside {peer}: {', '.join(ratios)}")


if __name__ == "__main__":
    main()
