"""Speed of single answers, and the memory that the model takes for them."""

from __future__ import annotations

from common.running.speed import measure_memory, measure_speed
from common.tasks.task import Evaluation, Record, Task

# What the words in the column of kernels mean (`runtime.kernels_of`).
KERNELS = {
    "dense": "Kernels `dense`: plain transformers unpacks the weights when the model is loaded, so "
    "a smaller checkpoint saves disk there, not memory or time; the library's wrappers "
    "cost a little.",
    "library": "`library's ...`: modules of the library that quantized it, as transformers calls "
    "them.",
    "packed": "`packed`: weights stay packed in memory and are unpacked inside the product; on a "
    "CPU by torch's own products, for up to 32 tokens at once with activations in bfloat16.",
    "streamed": "`streamed`: the GPU has no room for the weights, so layers are read from the "
    "files for every forward pass.",
    "graph": "`graph`: decoding replays a captured CUDA graph, and so does reading the prompt.",
}


class Speed(Task):
    """Latency, tokens per second and memory to run, batch 1."""

    name, title, place = "speed", "Speed", 6
    per_sample = False

    def run(self, model, prepared: None, evaluation: Evaluation) -> tuple[dict, list[Record]]:
        found = measure_speed(model, model.config.vocab_size)
        found["memory_bytes"] = measure_memory(model, model.config.vocab_size)
        return found, []

    def in_words(self, summary: dict) -> str:
        return f"{summary['tokens_per_second']:.1f} tokens/s"


TASK = Speed()


def method_in_words(summary: dict, device_type: str) -> str:
    """How the figures were measured, in two sentences."""
    where = "GPU" if device_type == "cuda" else "host without Python and its packages"
    spread = " and in square brackets their range" if "latency_seconds_low" in summary else ""
    return (
        f"Latency is one answer of {summary['new_tokens']} tokens to a prompt of "
        f"{summary['prompt_tokens']}, batch 1, median of {summary['runs']} runs{spread}; tokens/s "
        "is its decoding. Memory to run is what the model takes with 2,048 tokens of context, "
        f"batch 1: weights, cache and what it works with, on the {where}."
    )
