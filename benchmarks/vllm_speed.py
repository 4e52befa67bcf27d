#!/usr/bin/env python3
"""Tokens per second of checkpoints in vLLM on a GPU, the kernels it runs them on, and how far its
log-probabilities are from those of transformers' plain load.

    python benchmarks/vllm_speed.py models/X/baseline models/X/gptq-4bit --output vllm.json

Runs in vLLM's own environment (`python -m venv .serving/vllm-gpu`, then `pip install vllm==0.26.0`)
and imports nothing of this project. As in decode_speed.py a prompt of 64 random tokens and 128 new
ones, at batch 1, 8 and 32, medians; decoding is the time of 129 new tokens less that of one. Each
checkpoint is loaded in a process of its own.
"""

import argparse
import json
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="WARNING",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # the engine in this process, to look at its kernels
)

PROMPT, NEW, REPEATS = 64, 128, 5
AGREEMENT_TOKENS = 256


def kernels(model) -> list[str]:
    """The classes that multiply with a model's rounded weights."""
    schemes = [getattr(module, "scheme", None) for module in model.modules()]
    return sorted({type(scheme.kernel).__name__ for scheme in schemes if scheme is not None})


def plain_log_probabilities(folder: str, tokens: list[list[int]]) -> list[list[float]]:
    """Of every token but the first, by transformers in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).cuda().eval()
    result = []
    with torch.inference_mode():
        for row in tokens:
            ids = torch.tensor([row], device="cuda")
            logs = model(ids).logits[0, :-1].float().log_softmax(-1)
            result.append(logs.gather(1, ids[0, 1:, None])[:, 0].tolist())
    return result


def measure(folder: str, batches: list[int], text: list[list[int]]) -> dict:
    """One checkpoint: kernels, speed by batch, agreement on `text` if there is any."""
    import torch
    from vllm import LLM, SamplingParams

    row: dict = {"checkpoint": folder}
    try:
        model = LLM(
            folder,
            dtype="bfloat16",
            skip_tokenizer_init=True,
            max_model_len=2048,
            max_num_seqs=max(batches),
            gpu_memory_utilization=0.2,
            enable_prefix_caching=False,
            compilation_config={"cudagraph_capture_sizes": batches},
        )
    except Exception as error:
        return {**row, "refused": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
    row["kernels"] = model.apply_model(kernels)[0]
    vocabulary = model.llm_engine.model_config.get_vocab_size()
    torch.manual_seed(0)

    def seconds(batch: int, new: int) -> float:
        prompts = [
            {"prompt_token_ids": prompt}
            for prompt in torch.randint(0, vocabulary, (batch, PROMPT)).tolist()
        ]
        sampling = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True, detokenize=False)
        began = time.perf_counter()
        model.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - began

    row["speed"] = {}
    for batch in batches:
        times = [(seconds(batch, 1), seconds(batch, NEW + 1)) for _ in range(REPEATS + 1)][1:]
        first, whole = (statistics.median(column) for column in zip(*times, strict=True))
        row["speed"][batch] = {
            "prefill_and_one_token_seconds": first,
            "decode_tokens_per_second": batch * NEW / (whole - first),
        }
    if text:
        outputs = model.generate(
            [{"prompt_token_ids": tokens} for tokens in text],
            SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False),
            use_tqdm=False,
        )
        ours = [
            [
                place[token].logprob
                for place, token in zip(out.prompt_logprobs[1:], tokens[1:], strict=True)
            ]
            for out, tokens in zip(outputs, text, strict=True)
        ]
        row["own"] = ours
    return row


def agreement(one: list[list[float]], other: list[list[float]]) -> dict:
    """Differences of two models' log-probabilities of the same tokens, in nats."""
    pairs = [pair for a, b in zip(one, other, strict=True) for pair in zip(a, b, strict=True)]
    differences = [abs(a - b) for a, b in pairs]
    return {
        "mean_difference": statistics.mean(differences),
        "largest_difference": max(differences),
        "mean_log_probability_vllm": statistics.mean(a for a, _ in pairs),
        "mean_log_probability_transformers": statistics.mean(b for _, b in pairs),
    }


def alone(function, *arguments):
    """A function's result, from a process of its own, whose GPU memory goes with it."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", nargs="+", help="folders")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument(
        "--text", type=Path, help="a text: compare log-probabilities of its first tokens, too"
    )
    parser.add_argument("--output", type=Path, help="JSON of everything, written as it comes")
    options = parser.parse_args()
    rows = []
    for folder in options.checkpoints:
        text: list[list[int]] = []
        if options.text:
            from transformers import AutoTokenizer

            ids = AutoTokenizer.from_pretrained(folder)(options.text.read_text())["input_ids"]
            text = [ids[i * AGREEMENT_TOKENS :][:AGREEMENT_TOKENS] for i in range(4)]
        try:
            row = alone(measure, folder, options.batches, text)
            if text and "own" in row:
                plain = alone(plain_log_probabilities, folder, text)
                row["agreement"] = agreement(row.pop("own"), plain)
        except Exception as error:  # the process ended
            row = {"checkpoint": folder, "refused": f"{type(error).__name__}: {error}"}
        rows.append(row)
        print("RESULT", json.dumps(row), flush=True)
        if options.output:
            options.output.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
