#!/usr/bin/env python3
"""Speed and memory of a checkpoint on a CPU: packed weights beside the same ones dense, by turns.

    python benchmarks/cpu_speed.py models/SmolLM2-135M-Instruct/hqq-4bit [more checkpoints]

Prefill of 64 and 512 tokens, 32 tokens decoded after 64, batch 1: the shortest of the rounds, which
other work on the machine disturbs least. Threads: OMP_NUM_THREADS.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.running.decoding import Decoder, decodes_faster
from common.running.runtime import kernels_of, load_for_running, load_model
from common.running.speed import NEW_TOKENS, measure_memory, weight_bytes

CPU = torch.device("cpu")


def decode_seconds(model, prompt: torch.Tensor) -> float:
    """Seconds for each token after the first."""
    if decodes_faster(model, prompt.shape[1] + 2 * NEW_TOKENS):
        decoder = Decoder(model, 1, prompt.shape[1] + 2 * NEW_TOKENS)
        decoder.start(prompt.tolist())
        start = time.perf_counter()
        tokens = sum(len(decoder.run(1)) for _ in range(4))
        return (time.perf_counter() - start) / tokens
    output = model(prompt, use_cache=True, logits_to_keep=1)
    start = time.perf_counter()
    for _ in range(NEW_TOKENS):
        token = output.logits[:, -1:].argmax(-1)
        output = model(token, past_key_values=output.past_key_values, use_cache=True)
    return (time.perf_counter() - start) / NEW_TOKENS


def prefill_seconds(model, prompt: torch.Tensor) -> float:
    start = time.perf_counter()
    model(prompt, use_cache=True, logits_to_keep=1)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for folder in options.checkpoints:
        models = [load(folder, CPU, torch.float32)[0] for load in (load_model, load_for_running)]
        generator = torch.Generator().manual_seed(0)
        prompt = torch.randint(0, models[0].config.vocab_size, (1, 512), generator=generator)
        best = [[float("inf")] * 3 for _ in models]
        with torch.inference_mode():
            for _ in range(options.rounds):
                for found, model in zip(best, models, strict=True):
                    times = (
                        prefill_seconds(model, prompt[:, :64]),
                        prefill_seconds(model, prompt),
                        decode_seconds(model, prompt[:, :64]),
                    )
                    found[:] = map(min, found, times)
            for found, model in zip(best, models, strict=True):
                memory = measure_memory(model, model.config.vocab_size)
                print(
                    f"{folder.name} {kernels_of(model)}: prefill of 64 {found[0]:.3f} s, of 512 "
                    f"{found[1]:.3f} s; decode {1 / found[2]:.1f} tokens/s; weights "
                    f"{weight_bytes(model) / 1e6:.0f} MB, to run {(memory or 0) / 1e6:.0f} MB",
                    flush=True,
                )


if __name__ == "__main__":
    main()
