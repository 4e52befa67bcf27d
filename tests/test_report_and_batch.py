"""README's tables from results alone, and the batch that makes the results; both on made-up
runs."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, assert_user_error, run_script

from common.results.documents import CONFIGURATIONS, load_all
from common.results.identity import checkpoint_hash

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


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results" / "tiny"
    folder.mkdir(parents=True)
    for name, accuracy in (("baseline", 0.75), ("gptq-4bit", 0.5)):
        (folder / f"{name}.json").write_text(json.dumps(document(name, accuracy)))
    (folder / "status.json").write_text(
        json.dumps(
            {
                "baseline": {"state": "done"},
                "gptq-4bit": {"state": "warning", "reason": "FAIL | perplexity"},
                "hqq-4bit": {"state": "failed", "reason": "disk full"},
            }
        )
    )
    (tmp_path / "README.md").write_text(README)
    return tmp_path


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


def test_tables(results):
    assert analyze(results).returncode == 0
    text = (results / "README.md").read_text()
    assert text.startswith("# Title\n\nbefore\n") and text.endswith("after\n")
    lines = {
        line.split(" | ")[0].strip("| "): line
        for line in text.splitlines()
        if line.startswith("| ")
    }
    assert (
        "⬜ Not started" in lines["awq-4bit"]
        and "❌ Failed" in lines["hqq-4bit"]
        and "disk full" in lines["hqq-4bit"]
    )
    status = text[text.index("#### Status") : text.index("#### Size")]
    assert all(f"| {name} |" in status for name in CONFIGURATIONS)
    assert "⚠️ Check" in status and "FAIL / perplexity" in status
    assert "| gptq-4bit | 4 | 64 | 0.5 | 4.00 | 2.5 |" in text
    # Without records of the samples there are values, but no differences.
    assert (
        "| gptq-4bit | 0.500 | 0.500 | – | – | 0.250 | 1.23e+06 | 2 | 0.250 |" in text
        and "| gptq-4bit | 20.00 | –" in text
    )
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


def test_what_was_evaluated_on_fewer_samples_is_left_out(results):
    """A configuration that a later batch with another --limit refused: its figures are not those of
    the header's samples.
    """
    stale = document("gptq-4bit", 0.5)
    stale["tasks"]["arc"]["samples"] = 9
    stale["tasks"]["perplexity"]["windows"] = 9
    (results / "results/tiny/gptq-4bit.json").write_text(json.dumps(stale))
    assert analyze(results).returncode == 0
    text = (results / "README.md").read_text()
    assert (
        "Left out, as evaluated on more or fewer samples than these: gptq-4bit (arc, perplexity)."
        in text
    )
    assert (
        "| gptq-4bit | – | – | – | – | 0.250 | 1.23e+06 | 2 | 0.250 |" in text
        and "| gptq-4bit | – | –" in text
    )
    assert "0.500" not in text and "| gptq-4bit | 4 | 64 | 0.5 |" in text


def test_a_checkpoint_that_is_another_by_now_is_named(results, tiny):
    """Quantized again by hand: the tables still show what was evaluated."""
    folder = results / "models/tiny/gptq-4bit"
    shutil.copytree(tiny, folder)
    for found, named in ((checkpoint_hash(folder, results), False), ("0" * 64, True)):
        content = document("gptq-4bit", 0.5, checkpoint=found)
        (results / "results/tiny/gptq-4bit.json").write_text(json.dumps(content))
        said = run_script(
            ROOT / "analyze_results.py", "--readme", results / "README.md", cwd=results
        )
        assert said.returncode == 0, said.stderr
        line = (
            "tiny gptq-4bit: the figures are of another checkpoint than models/tiny/gptq-4bit "
            "holds now; evaluate it again"
        )
        assert (line in said.stdout.splitlines()) is named


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
NOTE = (
    "import sys, pathlib; a = sys.argv; "
    "pathlib.Path('calls').open('a').write(' '.join(a) + '\\n'); "
)
STAND_INS = {
    "quantize_gptq.py": "import sys; print('error: no luck today', file=sys.stderr); sys.exit(2)",
    "quantize_hqq.py": NOTE
    + "pathlib.Path(a[a.index('--output') + 1]).mkdir(parents=True, exist_ok=True)",
    "verify_model.py": "",
    "common/baseline.py": NOTE,
    "common/evaluation.py": NOTE,
    "analyze_results.py": "",
}


@pytest.fixture
def batch(tmp_path, monkeypatch):
    for name, content in STAND_INS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "common.run_all.check.show_problems", lambda *_: None
    )  # it would ask the hub for the model

    def run(*arguments):
        from common.batch import main

        monkeypatch.setattr(sys, "argv", ["batch", "--model", "owner/tiny", *arguments])
        return main()

    run.folder = tmp_path
    return run


def test_a_failure_does_not_stop_the_rest(batch, capfd):
    assert batch("--group-size", "32") == 1
    status = json.loads((batch.folder / "results/tiny/status.json").read_text())
    assert status["gptq-4bit"] == {
        "state": "failed",
        "reason": "no luck today",
        "source": "owner/tiny",
    }
    assert status["hqq-4bit"]["state"] == status["hqq-8bit"]["state"] == "done"
    assert "awq-4bit" not in status  # no script, so not started
    calls = (batch.folder / "calls").read_text().splitlines()
    calls = [call for call in calls if call.startswith("quantize_hqq")]
    assert len(calls) == 2 and all(
        "--group-size 32" in call and "--overwrite" not in call for call in calls
    )
    assert load_all(batch.folder / "nothing") == []
    assert "failed: gptq-4bit, gptq-8bit" in capfd.readouterr().out


def test_what_is_there_is_not_made_again_until_overwrite(batch):
    """The scripts are told to keep what was made in the same way (--resume, --reuse), or to make it
    again.
    """
    for arguments, quantizing, evaluating in (
        ([], None, "--reuse"),
        ([], "--resume", "--reuse"),
        (["--overwrite"], "--overwrite", None),
    ):
        (batch.folder / "calls").unlink(missing_ok=True)
        assert batch("--only", "baseline,hqq-4bit", *arguments) == 0
        calls = {
            line.split()[0]: line.split()
            for line in (batch.folder / "calls").read_text().splitlines()
        }
        assert set(calls) == {"quantize_hqq.py", "common/baseline.py", "common/evaluation.py"}
        assert {"--resume", "--overwrite"} & set(calls["quantize_hqq.py"]) == (
            {quantizing} if quantizing else set()
        )
        for script in ("common/baseline.py", "common/evaluation.py"):
            assert ("--reuse" in calls[script]) is (evaluating == "--reuse")
        assert (
            calls["common/evaluation.py"][calls["common/evaluation.py"].index("--baseline") + 1]
            == "owner/tiny"
        )


@pytest.fixture
def real_batch(tiny, tmp_path, monkeypatch):
    """The batch on a tiny model with the real scripts, each run in this process."""
    from common import batch

    # Two tasks of the demo, without answers to generate, keep this short.
    small = [
        "--data",
        "demo",
        "--tasks",
        "arc,perplexity",
        "--windows",
        "2",
        "--window-length",
        "48",
    ]

    def step(title, command, log, gpu):
        more = small if title == "evaluate" else []
        result = run_script(ROOT / command[1], *command[2:], *more, cwd=tmp_path)
        run.titles.append(f"{title} {Path(command[1]).stem}")
        run.output += result.stdout
        if result.returncode:
            raise batch.StepFailed(
                result.stderr.strip().splitlines()[-1].removeprefix("error: ")[:200]
            )

    def run(*arguments):
        run.titles, run.output = [], ""
        monkeypatch.setattr(
            sys, "argv", ["batch", "--model", str(tiny), "--only", "baseline,hqq-4bit", *arguments]
        )
        code = batch.main()
        return code, json.loads((tmp_path / "results" / tiny.name / "status.json").read_text())

    shutil.copy(ROOT / "quantize_hqq.py", tmp_path)
    (tmp_path / "README.md").write_text(README)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(batch, "step", step)
    monkeypatch.setattr(
        batch.subprocess, "run", lambda command: subprocess.CompletedProcess(command, 0)
    )
    run.folder, run.name = tmp_path, tiny.name
    return run


def test_a_batch_run_again(real_batch):
    """With the same options all is kept; other limits redo the evaluation; other options of the
    method are refused, by name.
    """
    folder = real_batch.folder
    base = ["--limit", "3", "--group-size", "64"]
    code, status = real_batch(*base)
    assert code == 0 and status["hqq-4bit"]["state"] == "done"
    result, checkpoint = (
        folder / "results" / real_batch.name / "hqq-4bit.json",
        folder / "models" / real_batch.name / "hqq-4bit" / "config.json",
    )
    made = result.stat().st_mtime_ns, checkpoint.stat().st_mtime_ns
    code, status = real_batch(*base)
    assert code == 0 and real_batch.titles == [
        "evaluate baseline",
        "quantize quantize_hqq",
        "evaluate evaluation",
    ]
    assert "nothing to resume" in real_batch.output and real_batch.output.count("used again") == 2
    assert "Evaluating" not in real_batch.output
    assert made == (result.stat().st_mtime_ns, checkpoint.stat().st_mtime_ns)
    code, status = real_batch("--limit", "2", "--group-size", "64")
    assert code == 0 and "arc was evaluated with samples 3, not 2" in real_batch.output
    assert (
        json.loads(result.read_text())["tasks"]["arc"]["samples"] == 2
        and checkpoint.stat().st_mtime_ns == made[1]
    )
    code, status = real_batch("--limit", "2", "--group-size", "32")
    assert code == 1 and status["hqq-4bit"]["state"] == "warning"
    assert (
        "--group-size 64, not 32" in status["hqq-4bit"]["reason"]
        and "--overwrite" in status["hqq-4bit"]["reason"]
    )
    assert checkpoint.stat().st_mtime_ns == made[1]  # nothing is destroyed
    assert run_script(ROOT / "analyze_results.py", cwd=folder).returncode == 0
    assert (
        f"| hqq-4bit | ⚠️ Check | {status['hqq-4bit']['reason']} |"
        in (folder / "README.md").read_text()
    )
    code, status = real_batch("--limit", "2", "--group-size", "32", "--overwrite")
    assert (
        code == 0
        and status["hqq-4bit"]["state"] == "done"
        and checkpoint.stat().st_mtime_ns > made[1]
    )
    assert json.loads(result.read_text())["quantization"]["grid"]["group_size"] == 32


def test_a_batch_without_metadata_run_again(real_batch):
    """It is finished where the batch knows what it was made with; else it is refused and kept."""
    folder, base = real_batch.folder, ["--limit", "2", "--no-save-metadata", "--only", "hqq-4bit"]
    checkpoint = folder / "models" / real_batch.name / "hqq-4bit"
    code, status = real_batch(*base)
    assert code == 0 and not (checkpoint / "quantization_metadata.json").exists()
    plain = ["--limit", "2", "--only", "hqq-4bit"]
    for again in (base, plain, [*plain, "--resume"]):  # these flags decide no weights
        code, status = real_batch(*again)
        assert code == 0 and real_batch.titles == ["evaluate evaluation"]
        assert "used again" in real_batch.output
    code, status = real_batch(*base, "--group-size", "32")
    assert code == 1 and status["hqq-4bit"]["state"] == "warning" and real_batch.titles == []
    reason = status["hqq-4bit"]["reason"]
    assert "made with the defaults, not --group-size 32; --overwrite makes it again" in reason
    code, status = real_batch(*base)  # the refusal has forgotten nothing
    assert code == 0 and status["hqq-4bit"]["state"] == "done"
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "_name_or_path": "somebody's"}))
    code, status = real_batch(*base)
    reason = status["hqq-4bit"]["reason"]
    assert code == 1 and "not known what it was made with; --overwrite" in reason
    code, status = real_batch(*base, "--group-size", "32", "--overwrite")
    assert code == 0 and status["hqq-4bit"]["made"]["options"] == ["--group-size", "32"]


@pytest.mark.parametrize(
    "words, said",
    [
        (["--calib-samples", "abc"], "--calib-samples: invalid positive value: 'abc'"),
        (["--grup-size", "64"], "unknown option --grup-size 64"),
        (["--only", "baseline", "--limt", "5"], "unknown option --limt 5"),
        (["--only", "smoothquant-8bit", "--damping", "0.1"], "unknown option --damping 0.1"),
        (["--alpha", "1.5"], "1.5 is not between 0 and 1"),
        (
            ["--only", "smoothquant-8bit", "--group-size", "64"],
            "--group-size: invalid choice: '64'",
        ),
        (["64"], "unknown option 64"),
        (
            ["--bits", "3"],
            "--bits 3 cannot be passed on: the batch itself tells each script its --bits",
        ),
        (["--output=elsewhere"], "--output=elsewhere cannot be passed on"),
        (["--only", "hqq-4bit", "--bit", "4"], "its --bits"),  # argparse takes abbreviations
        (["--mod", "another/model"], "its --model"),
        (["--overw"], "its --overwrite"),
    ],
)
def test_options_passed_on_are_checked_before_anything_starts(batch, words, said):
    from common.base.errors import UserError

    (batch.folder / "quantize_smoothquant.py").write_text(STAND_INS["quantize_hqq.py"])
    with pytest.raises(UserError) as error:
        batch(*words)
    assert said in str(error.value) and "\n" not in str(error.value)
    assert not (batch.folder / "calls").exists() and not (batch.folder / "results").exists()


def test_each_method_is_passed_the_options_that_its_script_takes(batch, capfd):
    """The others are left out, which one line says: a script that is passed one of them ends with
    an error.
    """
    for method in ("gptq", "smoothquant"):
        (batch.folder / f"quantize_{method}.py").write_text(STAND_INS["quantize_hqq.py"])
    assert (
        batch(
            "--only",
            "gptq-4bit,hqq-4bit,smoothquant-8bit",
            "--group-size",
            "64",
            "--seed=3",
            "--damping",
            "0.1",
        )
        == 0
    )
    calls = [
        line.split()
        for line in (batch.folder / "calls").read_text().splitlines()
        if line.startswith("quantize_")
    ]
    passed_on = {
        "gptq": ["--group-size", "64", "--seed=3", "--damping", "0.1"],
        "hqq": ["--group-size", "64", "--seed=3"],
        "smoothquant": ["--seed=3"],
    }
    assert {
        name.removeprefix("quantize_").removesuffix(".py"): words[6:] for name, *words in calls
    } == passed_on
    said = [line for line in capfd.readouterr().out.splitlines() if "left out" in line]
    assert len(said) == 1 and said[0].endswith(
        ": --group-size 64 for smoothquant; --damping 0.1 for hqq, smoothquant"
    )
    status = json.loads((batch.folder / "results/tiny/status.json").read_text())
    assert status["smoothquant-8bit"]["made"]["options"] == ["--seed=3"]
    # What is left out is refused by the script itself.
    import quantize_smoothquant

    with pytest.raises(SystemExit):
        quantize_smoothquant.argument_parser().parse_args(["--group-size", "64"])


@pytest.mark.parametrize("words", [["--limit", "abc"], ["--limit", "0"], ["--dtype", "float8"]])
def test_options_of_the_batch_are_checked_before_anything_starts(batch, words, capsys):
    with pytest.raises(SystemExit) as end:
        batch(*words)
    last = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and f"argument {words[0]}: " in last
    assert not (batch.folder / "calls").exists()


def test_another_results_folder_leaves_the_documented_run_in_the_readme(results):
    shutil.copytree(results / "results", results / "docs/results")
    (results / "results").rename(results / "mine")
    for folder, titles in (("mine", {"local", "documented"}), ("docs/results", {"documented"})):
        found = run_script(ROOT / "analyze_results.py", "--results-dir", folder, cwd=results)
        assert found.returncode == 0, found.stderr
        text = (results / "README.md").read_text()
        shown = {kind for kind in ("local", "documented") if f"### tiny ({kind} run)" in text}
        assert shown == titles


def test_documented_and_local_results_are_told_apart(results):
    """The documented run never passes as one of this machine; both are shown, each as what it
    is."""
    shutil.copytree(results / "results", results / "documented")
    file = results / "results/tiny/baseline.json"
    file.write_text(json.dumps(document("baseline", 0.875, date="2031-05-06")))
    assert (
        run_script(
            ROOT / "analyze_results.py",
            "--results-dir",
            results / "results",
            "--documented-dir",
            results / "documented",
            "--readme",
            results / "README.md",
            "--figures-dir",
            results / "figures",
        ).returncode
        == 0
    )
    text = (results / "README.md").read_text()
    local, documented = text.split("### tiny (documented run)")
    assert (
        "### tiny (local run)\n\nA local run of 2031-05-06." in local
        and "| baseline | 0.875 |" in local
    )
    assert (
        "with the project" in documented
        and "not of this machine" in documented
        and "| baseline | 0.750 |" in documented
    )
    assert "figures/tiny/memory.png" in local and "figures/documented/tiny/memory.png" in documented
    assert (results / "tables/tiny/measurements.csv").read_bytes() != (
        results / "tables/documented/tiny/measurements.csv"
    ).read_bytes()
    shutil.rmtree(results / "results")  # a fresh clone
    assert (
        run_script(
            ROOT / "analyze_results.py",
            "--results-dir",
            results / "results",
            "--documented-dir",
            results / "documented",
            "--readme",
            results / "README.md",
            "--figures-dir",
            results / "figures",
        ).returncode
        == 0
    )
    assert "local run" not in (results / "README.md").read_text()


@pytest.mark.slow
def test_a_fresh_clone_regenerates_readme(tmp_path):
    """From the committed results alone, to the letter."""
    readme = (ROOT / "README.md").read_text()
    (tmp_path / "README.md").write_text(readme)
    result = run_script(
        ROOT / "analyze_results.py",
        "--results-dir",
        tmp_path / "results",
        "--documented-dir",
        ROOT / "docs" / "results",
        "--readme",
        tmp_path / "README.md",
        "--figures-dir",
        tmp_path / "docs/figures",
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "README.md").read_text() == readme


def test_nothing_committed_is_where_local_results_are_looked_for():
    listed = subprocess.run(
        ["git", "ls-files", "results", "docs/results"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode or not listed.stdout:
        pytest.skip("no git checkout")
    assert all(line.startswith("docs/results/") for line in listed.stdout.splitlines())


def test_a_gpu_for_each_configuration(batch, capfd, monkeypatch):
    """Played without GPUs: two are busy at once, each with one configuration, and what they print
    is told apart.
    """
    (batch.folder / "quantize_gptq.py").write_text(STAND_INS["quantize_hqq.py"])
    note = (
        "import os, sys, time, pathlib; n = pathlib.Path(sys.argv[sys.argv.index('--model-path') + "
        "1]).name; "
        "f = pathlib.Path('gpu-' + os.environ['CUDA_VISIBLE_DEVICES']); assert not f.exists(); "
        "f.touch(); time.sleep(0.5); "
        "pathlib.Path('order').open('a').write(f'{n} {f}\\n'); f.unlink(); print('checked')"
    )
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
    from common.base.errors import UserError

    with pytest.raises(UserError, match="--gpus 4: this machine has 3; use --gpus 3"):
        batch("--gpus", "4")
