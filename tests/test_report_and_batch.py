"""README's tables from results alone, and the batch that makes the results; both on made-up runs."""

import json
import shutil
import sys

import pytest
from conftest import ROOT, assert_user_error, run_script

from common.results import CONFIGURATIONS, load_all

README = "# Title\n\nbefore\n<!-- results:begin -->\n<!-- results:end -->\nafter\n"


def document(configuration, accuracy, **changes):
    facts = {"weights_bytes": 2_000_000 if configuration == "baseline" else 500_000, "folder_bytes": 2_500_000}
    if configuration != "baseline":
        facts.update(compression_ratio=4.0, seconds={"load": 1.0, "solve": 2.0, "total": 3.5},
                     memory={"peak_host_bytes": 2**30, "peak_device_bytes": 0}, grid={"bits": 4, "group_size": 64},
                     calibration={"samples": 2, "length": 8, "data": "demo", "seed": 0})
    return {"model": "tiny", "configuration": configuration, "demo_data": True, "compute_dtype": "float32",
            "versions": {"python": "3", "torch": "2", "transformers": "5"},
            "device": {"type": "cpu", "name": "a CPU", "threads": 2}, "quantization": facts,
            "tasks": {"arc": {"samples": 4, "accuracy": accuracy, "macro_f1": accuracy, "data": "demo"},
                      "openmath": {"samples": 4, "within_tolerance": 0.25, "mean_absolute_difference": 1234567.0,
                                   "median_absolute_difference": 2.0, "no_number": 0.25, "data": "demo"},
                      "perplexity": {"perplexity": 10 / accuracy, "windows": 3, "length": 16, "data": "demo"}},
            "speed": {"latency_seconds": 0.5, "tokens_per_second": 40.0, "kernels": "dense", "prompt_tokens": 64,
                      "new_tokens": 32, "runs": 3},
            "memory": {"weights_bytes": 2_000_000, "peak_host_bytes": 2**30, "peak_device_bytes": 0}, **changes}


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results" / "tiny"
    folder.mkdir(parents=True)
    for name, accuracy in (("baseline", 0.75), ("gptq-4bit", 0.5)):
        (folder / f"{name}.json").write_text(json.dumps(document(name, accuracy)))
    (folder / "status.json").write_text(json.dumps({"baseline": {"state": "done"}, "gptq-4bit": {"state": "warning",
                                                    "reason": "FAIL | perplexity"}, "hqq-4bit": {"state": "failed",
                                                                                                 "reason": "disk full"}}))
    (tmp_path / "README.md").write_text(README)
    return tmp_path


def analyze(folder):
    return run_script(ROOT / "analyze_results.py", "--results-dir", folder / "results", "--readme", folder / "README.md",
                      "--figures-dir", folder / "figures")


def test_tables(results):
    assert analyze(results).returncode == 0
    text = (results / "README.md").read_text()
    assert text.startswith("# Title\n\nbefore\n") and text.endswith("after\n")
    lines = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("| ")}
    assert "⬜ Not started" in lines["awq-4bit"] and "❌ Failed" in lines["hqq-4bit"] and "disk full" in lines["hqq-4bit"]
    status = text[text.index("#### Status"):text.index("#### Size")]
    assert all(f"| {name} |" in status for name in CONFIGURATIONS)
    assert "⚠️ Check" in status and "FAIL / perplexity" in status
    assert "| gptq-4bit | 4 | 64 | 0.5 | 4.00 | 2.5 |" in text
    # Without records of the samples there are values, but no differences.
    assert "| gptq-4bit | 0.500 | 0.500 | – | – | 0.250 | 1.23e+06 | 2 | 0.250 |" in text and "| gptq-4bit | 20.00 | –" in text
    assert "What the differences mean" not in text
    assert "compare methods with each other" in text
    for link in ("accuracy_against_size", "quantization_time", "memory"):
        assert (results / "figures" / "tiny" / f"{link}.png").stat().st_size > 5000
        assert f"figures/tiny/{link}.png" in text


def test_twice_changes_nothing(results):
    def everything():
        analyze(results)
        return {file: file.read_bytes() for file in results.rglob("*") if file.is_file()}

    assert everything() == everything()


def test_other_conditions_are_named(results):
    other = document("hqq-8bit", 0.7, device={"type": "cuda", "name": "a GPU", "threads": 2})
    (results / "results/tiny/hqq-8bit.json").write_text(json.dumps(other))
    assert analyze(results).returncode == 0
    assert "not to be compared with it: hqq-8bit" in (results / "README.md").read_text()


def test_damaged_results_and_readme(results):
    (results / "results/tiny/gptq-4bit.json").write_text("{")
    before = (results / "README.md").read_text()
    assert_user_error(analyze(results), "gptq-4bit.json is damaged")
    assert (results / "README.md").read_text() == before
    (results / "results/tiny/gptq-4bit.json").unlink()
    (results / "README.md").write_text("no markers")
    assert_user_error(analyze(results), "needs the lines")
    shutil.rmtree(results / "results")
    assert_user_error(analyze(results), "holds no results")


# Scripts that stand in for the real ones: they note how they were called, and gptq fails.
STAND_INS = {
    "quantize_gptq.py": "import sys; print('error: no luck today', file=sys.stderr); sys.exit(2)",
    "quantize_hqq.py": "import sys, pathlib; a = sys.argv; pathlib.Path('calls').open('a').write(' '.join(a) + '\\n'); "
                       "pathlib.Path(a[a.index('--output') + 1]).mkdir(parents=True, exist_ok=True)",
    "verify_model.py": "",
    "common/baseline.py": "import pathlib; p = pathlib.Path('results/tiny'); p.mkdir(parents=True, exist_ok=True); "
                          "(p / 'baseline.json').write_text('{}')",
    "common/evaluation.py": "import sys, pathlib; name = pathlib.Path(sys.argv[sys.argv.index('--model-path') + 1]).name; "
                            "(pathlib.Path('results/tiny') / f'{name}.json').write_text('{}')",
    "analyze_results.py": "",
}


@pytest.fixture
def batch(tmp_path, monkeypatch):
    for name, content in STAND_INS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("common.check.show_problems", lambda *_: None)          # it would ask the hub for the model

    def run(*arguments):
        from common.batch import main

        monkeypatch.setattr(sys, "argv", ["batch", "--model", "owner/tiny", *arguments])
        return main()

    run.folder = tmp_path
    return run


def test_a_failure_does_not_stop_the_rest(batch, capfd):
    assert batch("--group-size", "32") == 1
    status = json.loads((batch.folder / "results/tiny/status.json").read_text())
    assert status["gptq-4bit"] == {"state": "failed", "reason": "no luck today"}
    assert status["hqq-4bit"]["state"] == status["hqq-8bit"]["state"] == "done"
    assert "awq-4bit" not in status                                             # no script, so not started
    calls = (batch.folder / "calls").read_text().splitlines()
    assert len(calls) == 2 and all("--group-size 32" in call and "--overwrite" not in call for call in calls)
    assert load_all(batch.folder / "nothing") == []
    assert "failed: gptq-4bit, gptq-8bit" in capfd.readouterr().out


def test_finished_ones_are_skipped_until_overwrite(batch, capfd):
    batch("--only", "baseline,hqq-4bit")
    assert batch("--only", "baseline,hqq-4bit") == 0
    assert "hqq-4bit: finished before, skipped" in capfd.readouterr().out
    assert len((batch.folder / "calls").read_text().splitlines()) == 1
    shutil.rmtree(batch.folder / "logs")                                        # results of another machine
    shutil.rmtree(batch.folder / "models")
    assert batch("--only", "baseline,hqq-4bit") == 0
    assert len((batch.folder / "calls").read_text().splitlines()) == 2
    assert "skipped" not in capfd.readouterr().out
    assert batch("--only", "hqq-4bit", "--overwrite") == 0
    calls = (batch.folder / "calls").read_text().splitlines()
    assert len(calls) == 3 and "--overwrite" in calls[2]


def test_a_gpu_for_each_configuration(batch, capfd, monkeypatch):
    """Played without GPUs: two are busy at once, each with one configuration, and what they print is told apart."""
    (batch.folder / "quantize_gptq.py").write_text(STAND_INS["quantize_hqq.py"])
    note = "import os, sys, time, pathlib; n = pathlib.Path(sys.argv[sys.argv.index('--model-path') + 1]).name; " \
           "f = pathlib.Path('gpu-' + os.environ['CUDA_VISIBLE_DEVICES']); assert not f.exists(); f.touch(); time.sleep(0.5); " \
           "pathlib.Path('order').open('a').write(f'{n} {f}\\n'); f.unlink(); print('checked')"
    (batch.folder / "verify_model.py").write_text(note)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    assert batch("--gpus", "2") == 0
    lines = [line.split() for line in (batch.folder / "order").read_text().splitlines()]
    assert sorted(name for name, _ in lines) == ["gptq-4bit", "gptq-8bit", "hqq-4bit", "hqq-8bit"]
    assert {gpu for _, gpu in lines} == {"gpu-4", "gpu-5"}
    status = json.loads((batch.folder / "results/tiny/status.json").read_text())
    assert [status[name]["state"] for name, _ in lines] == ["done"] * 4
    assert "[hqq-8bit] checked" in capfd.readouterr().out
    from common.errors import UserError

    with pytest.raises(UserError, match="--gpus 4: this machine has 3; use --gpus 3"):
        batch("--gpus", "4")
