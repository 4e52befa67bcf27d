#!/usr/bin/env python3
"""Perplexity and seconds of our methods and of other libraries on the demo model, from the same calibration tokens.

    python benchmarks/peer_quality.py --data-root ../shared/data

What is not installed (benchmarks/requirements.txt) is left out. WikiText-2 test; 4 bits in groups of 64, or W8A8.
"""

import argparse
import gc
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from peers import PEERS  # noqa: E402
from scripts import quantize  # noqa: E402

from common.calibration import calibration_windows, evaluation_windows  # noqa: E402
from common.cli import configure_torch, quiet_libraries, resolve_device  # noqa: E402
from common.evaluation import PERPLEXITY_DATA, perplexity  # noqa: E402
from common.models import load_tokenizer, resolve_folder  # noqa: E402
from common.runtime import load_model  # noqa: E402

GROUP_SIZE = 64
# Ours and the other library's, by name.
PAIRS = {"gptq": "llm-compressor GPTQ", "awq": "llm-compressor AWQ", "hqq": "hqq 4-bit g64",
         "smoothquant": "llm-compressor SmoothQuant + GPTQ W8A8"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--calib-data", default="calib/pile_style_mix")
    parser.add_argument("--calib-samples", type=int, default=16)
    parser.add_argument("--calib-length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=10, help="of 1024 tokens, for perplexity (default: %(default)s)")
    parser.add_argument("--only", default=",".join(PAIRS), help="our methods whose pair is compared (default: all)")
    options = parser.parse_args()
    quiet_libraries()
    configure_torch(0)
    device, folder = resolve_device("auto"), resolve_folder("demo")
    tokenizer = load_tokenizer(folder)
    windows = evaluation_windows(PERPLEXITY_DATA, tokenizer, options.windows, 1024, options.data_root)
    tokens = calibration_windows(options.calib_data, tokenizer, options.calib_samples, options.calib_length, 0,
                                 options.data_root).tokens

    def measure(model) -> float:
        return perplexity(model, windows)[0]["perplexity"]

    reference = measure(load_model(folder, device, torch.float32)[0])
    print(f"RESULT baseline {reference:.3f}", flush=True)

    def report(name: str, value: float, seconds: float) -> None:
        print(f"RESULT {name}: {value:.3f}, {value / reference:.4f} x, {seconds:.1f} s", flush=True)

    for method in options.only.split(","):
        with tempfile.TemporaryDirectory() as scratch:
            output = Path(scratch) / method
            group = [] if method == "smoothquant" else ["--group-size", str(GROUP_SIZE)]
            seconds = quantize(method, ["--model", "demo", "--output", str(output), *group, "--data-root", str(options.data_root),
                                        "--calib-data", options.calib_data, "--calib-samples", str(options.calib_samples),
                                        "--calib-length", str(options.calib_length)])
            report(f"ours {method}", measure(load_model(output, device, torch.float32)[0]), seconds)
        model, _ = load_model(folder, device, torch.float32)
        start = time.perf_counter()
        try:
            PEERS[PAIRS[method]](model, tokens, tokenizer, group_size=GROUP_SIZE)
        except ImportError as error:
            print(f"{PAIRS[method]}: not installed ({error})", flush=True)
            continue
        report(PAIRS[method], measure(model), time.perf_counter() - start)
        del model
        gc.collect()


if __name__ == "__main__":
    main()
