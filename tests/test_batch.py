"""The batch that makes the results: what it runs, passes on, keeps and refuses."""

import json
import re

import pytest
from batch_stand_ins import STAND_INS
from conftest import ROOT, interrupt_after, run_script

from common.base.errors import UserError
from common.results.documents import load_all
from common.run_all.steps import Batch


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
    said = capfd.readouterr().out
    assert "failed: gptq-4bit, gptq-8bit" in said
    # Of what went well, how long it took: quantize, verify and evaluate of two, and the baseline.
    took = re.findall(r"^--- (\w+): \d+ s$", said, re.MULTILINE)
    assert sorted(took) == ["evaluate"] * 3 + ["quantize"] * 2 + ["verify"] * 2


def test_a_folder_for_results_that_is_none(batch, tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(UserError, match="results cannot be written to"):
        batch("--only", "baseline", "--results-dir", str(tmp_path / "taken"))
    assert not (batch.folder / "calls").exists()


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


@pytest.mark.parametrize("options", [[], ["--group-size", "16"]])
def test_what_an_interrupted_batch_began(real_batch, tiny, monkeypatch, capfd, options):
    """With the same options it is gone on with, with others started again."""
    output = f"models/{tiny.name}/hqq-4bit"
    words = ["--model", tiny, "--bits", "4", "--output", output, *options]
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        run_script(ROOT / "quantize_hqq.py", *words, cwd=real_batch.folder)
    assert (real_batch.folder / f"{output}.unfinished").is_dir()
    code, status = real_batch("--limit", "3")
    assert code == 0 and status["hqq-4bit"]["state"] == "done"
    assert ("resuming" in real_batch.output) is not bool(options)
    assert ("started again" in capfd.readouterr().out) is bool(options)
    assert not (real_batch.folder / f"{output}.unfinished").exists()


def test_another_batch_s_states_are_kept(tmp_path):
    """Two batches on one results folder, of other configurations, each with what it read first."""
    one, other = (
        Batch("owner/tiny", "tiny", tmp_path, False, [], "auto", [], {}) for _ in range(2)
    )
    one.note("gptq-4bit", "done", verified="x")
    other.note("awq-4bit", "running")
    one.note("gptq-8bit", "running")
    status = json.loads((tmp_path / "tiny" / "status.json").read_text())
    assert {name: entry["state"] for name, entry in status.items()} == {
        "gptq-4bit": "done",
        "awq-4bit": "running",
        "gptq-8bit": "running",
    }
    assert status["gptq-4bit"]["verified"] == "x"


@pytest.mark.usefixtures("undrawn")
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
        f"| ⚠️ Check | 4-bit: {status['hqq-4bit']['reason']} |" in (folder / "README.md").read_text()
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
        (["--calib-samples", "abc"], "--calib-samples: abc is not a whole number"),
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
        (["--windows", "two"], "--windows: two is not a whole number (it is passed to common/eval"),
        (["--windows"], "--windows: expected one argument"),
        (["--windows", "2", "3"], "unknown option --windows 2 3"),
        (["--tasks", "arc,mmlu"], "unknown task mmlu; known are arc"),
        (["--name", "x"], "unknown option --name x"),  # the batch names configurations itself
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


def test_the_evaluation_is_passed_its_options(batch, capfd):
    """Every configuration's is, the baseline's too; no method's script is."""
    words = ["--windows", "2", "--tasks=arc,perplexity", "--data", "demo", "--arc-data", "my/arc"]
    assert batch("--only", "baseline,hqq-4bit", "--limit", "5", *words, "--group-size", "64") == 0
    calls = (batch.folder / "calls").read_text().splitlines()
    told = {line.split()[0]: line for line in calls}
    for script in ("common/baseline.py", "common/evaluation.py"):
        assert f"--limit 5 {' '.join(words)} --results-dir" in told[script]
        assert "--group-size" not in told[script]
    assert told["quantize_hqq.py"].endswith("models/tiny/hqq-4bit --group-size 64")
    assert "left out" not in capfd.readouterr().out


@pytest.mark.parametrize("words", [["--limit", "abc"], ["--limit", "0"], ["--dtype", "float8"]])
def test_options_of_the_batch_are_checked_before_anything_starts(batch, words, capsys):
    with pytest.raises(SystemExit) as end:
        batch(*words)
    last = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and f"argument {words[0]}: " in last
    assert not (batch.folder / "calls").exists()


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
