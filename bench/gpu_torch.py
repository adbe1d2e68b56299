#!/usr/bin/env python3
"""PyTorch on the shapes of `bench-gpu models`: decoding and prefill of a Llama-like decoder in bf16.

    bench-gpu models FOLDER > shapes.json
    python bench/gpu_torch.py shapes.json [--seconds 180] [--device cuda]

Prints one JSON object: for every share and for `eager` and `compile` (torch.compile with CUDA graphs) the seconds of the
prompt and of one token behind it, or why it is missing. Random weights, the key and value cache of a fixed size, attention by
scaled_dot_product_attention, the logits of the last token only. Nothing is started when the time is up.
"""

import argparse
import json
import statistics
import sys
import time

import torch
import torch._dynamo
import torch.nn.functional as F


class Decoder(torch.nn.Module):
    """`room` is the length of the cache."""

    def __init__(self, size, room, device):
        super().__init__()
        self.size, self.room = size, room
        kind = {"device": device, "dtype": torch.bfloat16}

        def weight(*shape):
            return torch.empty(*shape, **kind).uniform_(-0.03, 0.03)

        hidden, depth, heads, kv_heads = size["hidden"], size["depth"], size["heads"], size["kv_heads"]
        self.embedding = weight(size["vocabulary"], hidden)
        self.head = weight(size["vocabulary"], hidden)
        self.norms = [torch.ones(hidden, **kind) for _ in range(2 * size["layers"] + 1)]
        self.layers = [
            {
                "qkv": weight((heads + 2 * kv_heads) * depth, hidden),
                "o": weight(hidden, heads * depth),
                "gate_up": weight(2 * size["ffn"], hidden),
                "down": weight(hidden, size["ffn"]),
                "key": torch.zeros(1, kv_heads, room, depth, **kind),
                "value": torch.zeros(1, kv_heads, room, depth, **kind),
            }
            for _ in range(size["layers"])
        ]
        frequencies = 500000.0 ** (-torch.arange(0, depth // 2, device=device).float() / (depth // 2))
        angles = torch.outer(torch.arange(room, device=device).float(), frequencies)
        self.cos, self.sin = (torch.cat([f(angles)] * 2, -1).bfloat16() for f in (torch.cos, torch.sin))
        self.places = torch.arange(room, device=device)
        # CUDA graphs take what lies at one place as it is, and let the caches be written to.
        for layer in self.layers:
            for tensor in layer.values():
                torch._dynamo.mark_static_address(tensor)
        for tensor in [self.embedding, self.head, self.cos, self.sin, self.places, *self.norms]:
            torch._dynamo.mark_static_address(tensor)

    def norm(self, x, index):
        wide = x.float()
        normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
        return normal.to(x.dtype) * self.norms[index]

    def rotated(self, x, cos, sin):
        low, high = x.chunk(2, -1)
        return x * cos + torch.cat([-high, low], -1) * sin

    def forward(self, tokens, positions):
        size = self.size
        heads, kv_heads, depth = size["heads"], size["kv_heads"], size["depth"]
        count = tokens.shape[1]
        x = F.embedding(tokens, self.embedding)
        cos, sin = self.cos[positions], self.sin[positions]
        mask = None if count > 1 else (self.places[None, :] <= positions[:, None])[None, None]
        for index, layer in enumerate(self.layers):
            qkv = F.linear(self.norm(x, 2 * index), layer["qkv"]).view(1, count, heads + 2 * kv_heads, depth)
            q, k, v = qkv.transpose(1, 2).split([heads, kv_heads, kv_heads], 1)
            q, k = self.rotated(q, cos, sin), self.rotated(k, cos, sin)
            layer["key"].index_copy_(2, positions, k)
            layer["value"].index_copy_(2, positions, v)
            if count > 1:
                mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            else:
                mixed = F.scaled_dot_product_attention(
                    q, layer["key"], layer["value"], attn_mask=mask, enable_gqa=True
                )
            x = x + F.linear(mixed.transpose(1, 2).reshape(1, count, heads * depth), layer["o"])
            gate, up = F.linear(self.norm(x, 2 * index + 1), layer["gate_up"]).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, layer["down"])
        return F.linear(self.norm(x[:, -1:], -1), self.head).argmax(-1)


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def median(call, device, samples):
    for _ in range(3):
        call()
    synchronize(device)
    times = []
    for _ in range(samples):
        start = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@torch.no_grad()
def measure(size, compiled, device):
    prompt = size["prompt"]
    model = Decoder(size, prompt + 64, device)
    step = torch.compile(model, mode="reduce-overhead", dynamic=False) if compiled else model
    tokens = torch.arange(prompt, device=device)[None] % size["vocabulary"]
    positions = torch.arange(prompt, device=device)
    last = torch.full((1,), prompt, device=device)
    one = tokens[:, :1].clone()

    def call(tokens, positions):
        if compiled and device == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        return step(tokens, positions)

    return {
        "prompt_seconds": median(lambda: call(tokens, positions), device, 5),
        "token_seconds": median(lambda: call(one, last), device, 30),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes")
    parser.add_argument("--seconds", type=float, default=180, help="nothing is started after so long")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no GPU")
    with open(arguments.shapes) as file:
        shares = json.load(file)["shares"]
    end = time.perf_counter() + arguments.seconds
    results = []
    # All shares eagerly first: compiling takes long.
    for compiled in (False, True):
        for size in shares:
            result = {"ranks": size["ranks"], "mode": "compile" if compiled else "eager"}
            if time.perf_counter() > end:
                result["missing"] = "no time left"
            else:
                try:
                    result.update(measure(size, compiled, arguments.device))
                except Exception as error:  # One way that fails says nothing of the others.
                    result["missing"] = (str(error).splitlines() or [type(error).__name__])[0]
            if arguments.device == "cuda":
                torch.compiler.reset()
                torch.cuda.empty_cache()
            results.append(result)
    print(json.dumps({"torch": torch.__version__, "results": results}))


if __name__ == "__main__":
    main()
