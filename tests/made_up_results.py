"""Made-up results of a model, and the tables that analyze_results.py makes of them."""

from conftest import ROOT, run_script

README = "# Title\n\nbefore\n<!-- results:begin -->\n<!-- results:end -->\nafter\n"


def document(configuration, accuracy, **changes):
    facts = {
        "weights_bytes": 2_000_000 if configuration == "baseline" else 500_000,
        "folder_bytes": 2_500_000,
    }
    if configuration != "baseline":
        facts.update(
            compression_ratio=4.0,
            seconds={"load": 1.0, "solve": 2.0, "total": 3.5},
            memory={"peak_host_bytes": 2**30, "peak_device_bytes": 0},
            grid={"bits": 4, "group_size": 64},
            calibration={"samples": 2, "length": 8, "data": "demo", "seed": 0},
        )
    return {
        "model": "tiny",
        "configuration": configuration,
        "demo_data": True,
        "compute_dtype": "float32",
        "versions": {"python": "3", "torch": "2", "transformers": "5"},
        "device": {"type": "cpu", "name": "a CPU", "threads": 2},
        "quantization": facts,
        "tasks": {
            "arc": {"samples": 4, "accuracy": accuracy, "macro_f1": accuracy, "data": "demo"},
            "openmath": {
                "samples": 4,
                "within_tolerance": 0.25,
                "mean_absolute_difference": 1234567.0,
                "median_absolute_difference": 2.0,
                "no_number": 0.25,
                "data": "demo",
            },
            "perplexity": {"perplexity": 10 / accuracy, "windows": 3, "length": 16, "data": "demo"},
        },
        "speed": {
            "latency_seconds": 0.5,
            "tokens_per_second": 40.0,
            "kernels": "dense",
            "prompt_tokens": 64,
            "new_tokens": 32,
            "runs": 3,
        },
        "memory": {"weights_bytes": 2_000_000, "peak_host_bytes": 2**30, "peak_device_bytes": 0},
        **changes,
    }


def analyze(folder):
    return run_script(
        ROOT / "analyze_results.py",
        "--results-dir",
        folder / "results",
        "--readme",
        folder / "README.md",
        "--figures-dir",
        folder / "figures",
    )
