#!/usr/bin/env python3
"""Perplexity of the demo model quantized by every method, from the same calibration tokens.

    python benchmarks/quality.py --data-root ../shared/data --seeds 0 1 2 --output quality.json

WikiText-2 test, 80 windows of 2048; calibration 64 x 2048, group 64, asymmetric. One line per run, and a JSON of all.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from scripts import quantize  # noqa: E402

from common.calibration import evaluation_windows  # noqa: E402
from common.cli import configure_torch, quiet_libraries, resolve_device  # noqa: E402
from common.evaluation import PERPLEXITY_DATA, perplexity  # noqa: E402
from common.models import load_tokenizer, resolve_folder  # noqa: E402
from common.runtime import load_model  # noqa: E402

# What is run: a name, the script and its options.
RUNS = {
    "gptq-4bit": ("gptq", ["--bits", "4"]), "awq-4bit": ("awq", ["--bits", "4"]), "hqq-4bit": ("hqq", ["--bits", "4"]),
    "adaround-4bit": ("adaround", ["--bits", "4"]), "quarot-4bit": ("quarot", ["--bits", "4"]),
    "smoothquant-8bit": ("smoothquant", []), "gptq-8bit": ("gptq", ["--bits", "8"]),
    "hqq-8bit": ("hqq", ["--bits", "8"]), "adaround-8bit": ("adaround", ["--bits", "8"]),
    "quarot-w4a4kv4": ("quarot", ["--bits", "4", "--act-bits", "4", "--kv-bits", "4"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--calib-data", default="calib/pile_style_mix")
    parser.add_argument("--calib-samples", default="64")
    parser.add_argument("--calib-length", default="2048")
    parser.add_argument("--seeds", nargs="+", default=["0"])
    parser.add_argument("--runs", nargs="+", default=list(RUNS), help="names of RUNS, or a script and its options in quotes")
    parser.add_argument("--windows", type=int, default=80)
    parser.add_argument("--window-length", type=int, default=2048)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    quiet_libraries()
    configure_torch(0)
    device = resolve_device("auto")
    baseline = resolve_folder("demo")
    windows = evaluation_windows(PERPLEXITY_DATA, load_tokenizer(baseline), options.windows, options.window_length,
                                 options.data_root)

    def measure(folder: Path) -> float:
        return perplexity(load_model(folder, device, torch.float32)[0], windows)[0]["perplexity"]

    reference = measure(baseline)
    print(f"baseline {reference:.4f}", flush=True)
    records = [{"run": "baseline", "perplexity": reference}]
    with tempfile.TemporaryDirectory() as scratch:
        for run in options.runs:
            script, extra = RUNS[run] if run in RUNS else (run.split()[0], run.split()[1:])
            for seed in options.seeds:
                output = Path(scratch) / "checkpoint"
                group = [] if script == "smoothquant" else ["--group-size", "64"]
                seconds = quantize(script, ["--model", "demo", "--output", str(output), "--overwrite", "--seed", seed, *group,
                                            "--data-root", str(options.data_root), "--calib-data", options.calib_data,
                                            "--calib-samples", options.calib_samples, "--calib-length",
                                            options.calib_length, *extra])
                value = measure(output)
                phases = json.loads((output / "quantization_metadata.json").read_text())["seconds"]
                records.append({"run": run, "seed": int(seed), "perplexity": value, "ratio": value / reference,
                                "seconds": round(seconds, 1), "phases": phases})
                print(f"RESULT {run} seed {seed}: {value:.4f}, {value / reference:.4f} x, {seconds:.1f} s, solve "
                      f"{phases['solve']:.1f}", flush=True)
    if options.output:
        options.output.write_text(json.dumps({"calibration": options.calib_data, "records": records}, indent=1))


if __name__ == "__main__":
    main()
