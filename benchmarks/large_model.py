#!/usr/bin/env python3
"""Seconds and memory by the number of layers, and every method on a model of the Llama-3.1-8B
shape, on little memory.

    python benchmarks/large_model.py --output large.json

Random weights are written to disk once; GPTQ runs on the first 4, 8, 16 and 32 layers of them, then
every other method on all. Each run is a process of its own, which may take --device-gib of the GPU
and no more. Calibration tokens are random.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import quantization_speed
import torch
from scripts import processes
from shape import write_random_model

from common import metadata
from common.base.device import resolve_device
from common.cli import quiet_libraries
from common.model.source import load_tokenizer, resolve_folder
from common.text.windows import Windows

SHAPE = dict(
    hidden_size=4096,
    intermediate_size=14336,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=False,
)
TRIAL_SHAPE = dict(
    hidden_size=128,
    intermediate_size=256,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    tie_word_embeddings=False,
)
LENGTH = 2048


def write_model(folder: Path, layers: int, trial: bool) -> None:
    tokenizer, shape = load_tokenizer(resolve_folder("demo")), TRIAL_SHAPE if trial else SHAPE
    write_random_model(folder, tokenizer, resolve_device("auto"), num_hidden_layers=layers, **shape)


def first_layers(folder: Path, layers: int) -> Path:
    """A folder that is the model cut off after some layers: links to its files, and a configuration
    of its own.
    """
    cut = folder.with_name(f"{folder.name}-{layers}")
    cut.mkdir()
    for file in folder.iterdir():
        (cut / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text())
    (cut / "config.json").unlink()
    (cut / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    return cut


def measure(
    method: str,
    folder: Path,
    samples: int,
    length: int,
    device_gib: float,
    iterations: str,
    answer: Path,
) -> None:
    """Quantize and write what it took to `answer`. iterations: AdaRound's."""
    quiet_libraries()
    quantization_speed.METHODS["adaround"] += ["--iterations", iterations]
    for words in quantization_speed.METHODS.values():
        words += ["--device-memory", str(device_gib)]
    tokens = torch.randint(0, 128256, (samples, length), generator=torch.Generator().manual_seed(0))
    found = quantization_speed.ours(
        method, folder, Windows(tokens, "random tokens", 0), answer.parent
    )
    answer.write_text(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--depths",
        type=int,
        nargs="+",
        default=[4, 8, 16, 32],
        help="for GPTQ; the last is the model's",
    )
    parser.add_argument(
        "--samples", type=int, default=64, help="of 2048 tokens, for GPTQ (default: %(default)s)"
    )
    parser.add_argument(
        "--other-samples", type=int, default=64, help="for the other methods (default: %(default)s)"
    )
    parser.add_argument(
        "--methods",
        default="hqq,smoothquant,awq,quarot,adaround",
        help="the others (default: %(default)s)",
    )
    parser.add_argument("--adaround-iterations", default="150")
    parser.add_argument(
        "--device-gib",
        type=float,
        default=10.0,
        help="device memory a run may take (default: %(default)s)",
    )
    parser.add_argument("--trial", action="store_true", help="a tiny model and short windows")
    parser.add_argument("--output", type=Path, help="JSON of everything, written after every run")
    options = parser.parse_args()
    results = {
        "versions": metadata.versions(),
        "device_gib": options.device_gib,
        "length": LENGTH,
        "runs": [],
    }

    def apart(target: Callable, *arguments) -> bool:
        process = processes().Process(target=target, args=arguments)
        process.start()
        process.join()
        return not process.exitcode

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        if not apart(write_model, folder, options.depths[-1], options.trial):
            sys.exit("the model could not be written")
        runs = [("gptq", depth, options.samples) for depth in options.depths]
        runs += [
            (method, options.depths[-1], options.other_samples)
            for method in filter(None, options.methods.split(","))
        ]
        for method, depth, samples in runs:
            whole = depth == options.depths[-1]
            part, answer = (
                folder if whole else first_layers(folder, depth),
                Path(scratch) / "answer.json",
            )
            answer.unlink(missing_ok=True)
            apart(
                measure,
                method,
                part,
                samples,
                64 if options.trial else LENGTH,
                options.device_gib,
                options.adaround_iterations,
                answer,
            )
            shutil.rmtree(Path(scratch) / method, ignore_errors=True)
            if not answer.is_file():
                print(f"RESULT {method}, {depth} layers: failed", flush=True)
                continue
            found = {
                "method": method,
                "layers": depth,
                "samples": samples,
                **json.loads(answer.read_text()),
            }
            results["runs"].append(found)
            if options.output:
                options.output.write_text(json.dumps(results, indent=1))
            phases = ", ".join(
                f"{phase} {seconds:.1f}" for phase, seconds in found["seconds"].items()
            )
            print(
                f"RESULT {method}, {depth} layers, {samples} samples: device "
                f"{(found['peak_device_bytes'] or 0) / 2**30:.2f} GiB, host "
                f"{found['peak_host_bytes'] / 2**30:.2f} GiB, {phases}",
                flush=True,
            )


if __name__ == "__main__":
    main()
