"""Made-up results of a model, and the tables that analyze_results.py makes of them."""

import json
import random

from conftest import ROOT, run_script

from common.results.documents import load_model_results, write_samples
from common.results.hashes import rows_fingerprint
from common.text.data import demo_rows

README = "# Title\n\nbefore\n<!-- results:begin -->\n<!-- results:end -->\nafter\n"


def arc_records(right):
    """Of questions with two choices, by whether they are answered right."""
    return [
        {
            "id": f"q{i}",
            "acc": float(one),
            "acc_norm": float(one),
            "gold": "AB"[i % 2],
            "predicted": "AB"[(i + (not one)) % 2],
        }
        for i, one in enumerate(right)
    ]


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


# Names that break a page whose generator believes them.
NASTY = [
    "<img src=x onerror=alert(1)>",
    'a"b & <b>bold<b> `code',
    "*star* _under_ [x](javascript:alert(1))",
]
ANSWERS = ("yes", "no", "42")


def made_up_records(names, answers=ANSWERS):
    """Records of the demo's own questions by configuration and task: right or wrong at random, the
    same for the same name.
    """
    found = {}
    for name in names:
        chance = random.Random(name)
        arc = [
            {"id": row["id"], "gold": row["answerKey"], "predicted": letter, "scores": [0.0] * 4}
            | dict.fromkeys(("acc", "acc_norm"), float(letter == row["answerKey"]))
            for row in demo_rows("arc").rows
            if (letter := chance.choice([row["answerKey"], "A", "B"]))
        ]
        squad = [
            {"id": row["id"], "answerable": bool(row["answers"]["text"]), "cluster": row["title"]}
            | {"predicted": (said := chance.choice(answers)), "text": said}
            | dict.fromkeys(("f1", "exact_match"), float(chance.random() < 0.5))
            for row in demo_rows("squad").rows
        ]
        openmath = [
            {"id": f"openmath-{i}", "expected": float(row["expected_answer"]), "predicted": 1.0}
            | {"correct": float(chance.random() < 0.5), "absolute_difference": chance.random()}
            | {"text": chance.choice(answers)}
            for i, row in enumerate(demo_rows("openmath").rows)
        ]
        found[name] = {"arc": arc, "squad_v2": squad, "openmath": openmath}
    return found


def model_part(results_dir, names, answers=ANSWERS):
    """What the page shows of a made-up model, whose results are written to `results_dir`: a
    baseline and these configurations, of which the first four are compared on the demo's own tasks.
    """
    from common.reporting.compare_all import compare_all
    from common.reporting.page import ModelPart
    from common.reporting.page_samples import flipped

    folder = results_dir / "tiny"
    folder.mkdir(parents=True)
    for place, (name, samples) in enumerate(made_up_records(["baseline", *names], answers).items()):
        found = document(name, 0.75 - 0.01 * place)
        for task, file in (("arc", "arc"), ("squad_v2", "squad"), ("openmath", "openmath")):
            rows = demo_rows(file).rows
            found["tasks"].setdefault(task, {"f1": 0.5, "exact_match": 0.5, "data": "demo"})
            found["tasks"][task].update(samples=len(rows), fingerprint=rows_fingerprint(rows))
        if place:
            keys = ("kl_mean", "kl_median", "kl_99", "kl_999")
            spread = {key: 0.01 * place * 4**i for i, key in enumerate(keys)}
            found["tasks"]["perplexity"]["divergence"] = {**spread, "same_top": 0.9, "tokens": 9}
            found["quantization"]["relative_output_error"] = {
                f"model.layers.{layer}.{linear}": scale * (place + layer)
                for layer in range(3)
                for linear, scale in (("self_attn.q_proj", 0.01), ("mlp.down_proj", 0.2))
            }
        (folder / f"{name}.json").write_text(json.dumps(found))
        if place < 5:
            write_samples(results_dir, "tiny", name, samples)
    status = {name: {"state": "warning", "reason": f"{name} | </script>"} for name in names}
    (folder / "status.json").write_text(json.dumps(status))
    results = load_model_results(folder)
    comparisons = compare_all(results_dir, results)
    return ModelPart(results, comparisons, flipped(results, comparisons, results_dir, False))
