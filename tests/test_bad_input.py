"""What a user can get wrong: one clear line, exit code 2, nothing half-written."""

import contextlib
import json
import resource
import shutil
import signal

import pytest
from conftest import ROOT, assert_user_error, run_script

GPTQ, HQQ = ROOT / "quantize_gptq.py", ROOT / "quantize_hqq.py"
NO_NETWORK = {"HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent-cache"}


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--model", "no/such-model-at-all"], ["no/such-model-at-all", "--model demo"]),
        (["--model", "./nowhere"], ["./nowhere", "does not exist"]),
        (["--bits", "5"], ["5 bits", "--bits 2 or 3 or 4 or 8"]),
        (
            ["--group-size", "48"],
            ["group size 48 does not divide", "q_proj", "64 or 32 or auto or channel"],
        ),
        (["--group-size", "1"], ["groups of 1 take 24 bits a weight", "use --group-size 32"]),
        (["--bits", "8", "--group-size", "2"], ["groups of 2 take 16 bits a weight"]),
        (["--calib-samples", "100000"], ["calibration data", "use at most --calib-samples"]),
        (["--calib-data", "missing.txt"], ["missing.txt does not exist"]),
        (["--calib-data", "nonsense"], ["nonsense is neither a file"]),
        (["--output", "/proc/nowhere/x"], ["/proc/nowhere/x", "cannot be written"]),
        (["--device", "cuda"], ["no CUDA device", "--device cpu"]),
    ],
)
def test_wrong_options(tiny, calibration_text, tmp_path, arguments, words):
    import torch

    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    output = tmp_path / "out"
    result = run_script(
        GPTQ,
        "--model",
        tiny,
        "--calib-data",
        calibration_text,
        "--calib-samples",
        8,
        "--calib-length",
        64,
        "--output",
        output,
        *arguments,
        **(NO_NETWORK if "no/such-model-at-all" in arguments else {}),
    )
    assert_user_error(result, *words)
    assert not output.exists() and not list(tmp_path.iterdir())


def broken_copy(source, target, change):
    shutil.copytree(source, target)
    change(target)
    return target


def edit_config(**values):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **values}))

    return change


@pytest.mark.parametrize(
    "change, words",
    [
        (
            edit_config(model_type="gpt_neox", architectures=["GPTNeoXForCausalLM"]),
            ["gpt_neox is not supported", "llama"],
        ),
        (edit_config(quantization_config={"quant_method": "gptq"}), ["quantized already"]),
        (edit_config(intermediate_size=96), ["do not fit its config.json"]),
        (lambda folder: (folder / "config.json").write_text("{"), ["config.json cannot be read"]),
        (lambda folder: (folder / "config.json").unlink(), ["no config.json"]),
        (lambda folder: (folder / "model.safetensors").unlink(), ["no model.safetensors"]),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(
                (folder / "model.safetensors").read_bytes()[:5000]
            ),
            ["incomplete or damaged", "copy or download them again"],
        ),
        (
            lambda folder: (folder / "tokenizer.json").write_text("{}"),
            ["tokenizer cannot be loaded"],
        ),
    ],
)
def test_broken_models(tiny, tmp_path, change, words):
    model = broken_copy(tiny, tmp_path / "model", change)
    result = run_script(HQQ, "--model", model, "--output", tmp_path / "out")
    assert_user_error(result, *words)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.unfinished").exists()


def test_foreign_folders_given_to_verify_and_compare(tiny, tmp_path):
    (tmp_path / "empty").mkdir()
    for script, flag in (
        ("verify_model.py", "--model-path"),
        ("compare_to_baseline.py", "--quantized"),
        ("common/evaluation.py", "--model-path"),
    ):
        assert_user_error(run_script(ROOT / script, flag, tmp_path / "missing"), "missing")
        assert_user_error(run_script(ROOT / script, flag, tmp_path / "empty"), "no config.json")
    for script, flag in (
        ("verify_model.py", "--model-path"),
        ("compare_to_baseline.py", "--quantized"),
    ):
        assert_user_error(
            run_script(ROOT / script, flag, tiny), "not a checkpoint of the quantize scripts"
        )


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("quantize_gptq.py", ["--bist", "4"]),
        ("quantize_smoothquant.py", ["--alpha", "Auto"]),
        ("verify_model.py", []),
        ("compare_to_baseline.py", ["--quantized"]),
        ("analyze_results.py", ["--nothing"]),
        ("common/evaluation.py", ["--limit", "none"]),
        ("common/baseline.py", ["--nothing"]),
        ("common/gguf_export.py", []),
    ],
)
def test_a_mistyped_command_is_answered_with_one_line(script, words):
    result = run_script(ROOT / script, *words)
    assert result.returncode == 2 and not result.stdout
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and "--help" in line


def test_an_output_that_is_no_checkpoint_is_never_replaced(tiny, tmp_path):
    output = tmp_path / "precious"
    output.mkdir()
    (output / "thesis.txt").write_text("years of work")
    assert_user_error(
        run_script(HQQ, "--model", tiny, "--output", output, "--overwrite"), "not a checkpoint"
    )
    assert (output / "thesis.txt").read_text() == "years of work"


def test_an_output_below_a_file(tiny, tmp_path):
    (tmp_path / "notes").write_text("")
    result = run_script(HQQ, "--model", tiny, "--output", tmp_path / "notes" / "out" / "put")
    assert_user_error(result, f"{tmp_path / 'notes'} is a file", "choose another")


def test_a_model_that_is_not_quantized_is_never_replaced(tiny, tmp_path):
    """Not the one that is quantized, nor another."""
    source, other = shutil.copytree(tiny, tmp_path / "a"), shutil.copytree(tiny, tmp_path / "b")
    before = (source / "model.safetensors").read_bytes()
    for output in (source, other):
        result = run_script(HQQ, "--model", source, "--output", output, "--overwrite")
        assert_user_error(result, "a model that is not quantized", "another --output")
        assert (output / "model.safetensors").read_bytes() == before
    made = tmp_path / "out"
    for _ in range(2):
        result = run_script(HQQ, "--model", source, "--output", made, "--overwrite")
        assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("place", ["/proc/nowhere", "a file"])
def test_results_that_cannot_be_written(tiny, tmp_path, place):
    """Said before anything is evaluated."""
    if place == "a file":
        place = tmp_path / "file"
        place.write_text("")
    result = run_script(
        ROOT / "common/baseline.py", "--model", tiny, "--data", "demo", "--results-dir", place
    )
    assert_user_error(result, "results cannot be written to", "--results-dir")
    assert "samples" not in result.stdout


@contextlib.contextmanager
def files_up_to(size):
    """No file of this process grows beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("limit, left", [(30000, True), (9000, False)])
def test_disk_full(tiny, tmp_path, limit, left):
    """A writer that cannot write half-way: the size limit of a file stands in for the full disk.
    Finished layers are kept.
    """
    arguments = [HQQ, "--model", tiny, "--output", tmp_path / "out"]
    with files_up_to(limit):
        stopped = run_script(*arguments)
    assert_user_error(stopped, "cannot write")
    assert [file.name for file in tmp_path.iterdir()] == (["out.unfinished"] if left else [])
    freed = run_script(*arguments, "--resume")
    assert freed.returncode == 0 and ("after 2 layers" in freed.stdout) is left
