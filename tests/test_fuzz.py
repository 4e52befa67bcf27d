"""Damaged checkpoints and results given to verify, compare and analyze: an error, never a
traceback, never a wrong "ok".
"""

import copy
import json
import random
import shutil

import pytest
import torch
from conftest import ROOT, assert_user_error, run_quantize, run_script, sampled
from made_up_results import README, model_part

from common.base.errors import UserError
from common.verification import verify

METADATA = "quantization_metadata.json"
NONSENSE = (None, -1, 0, 7, 1e30, "", "x", [], {}, True, [None], {"a": 1})


@pytest.fixture(scope="module")
def checkpoint(tiny, calibration_text, tmp_path_factory):
    output = tmp_path_factory.mktemp("checkpoint") / "gptq-4bit"
    result = run_quantize("gptq", tiny, output, text=calibration_text, samples=4)
    assert result.returncode == 0, result.stderr
    return output


def paths(value, prefix=()):
    """The path of every value inside a JSON document."""
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, inner in items:
        yield (*prefix, key)
        yield from paths(inner, (*prefix, key))


def changed(document, rng: random.Random):
    """The document with one value anywhere replaced by nonsense, or missing."""
    document = copy.deepcopy(document)
    *way, last = rng.choice(list(paths(document)))
    owner = document
    for key in way:
        owner = owner[key]
    if rng.random() < 0.3:
        del owner[last]
    else:
        owner[last] = rng.choice(NONSENSE)
    return document


def is_verified(folder) -> bool:
    """Whether verify_model.py would say so; anything but a UserError goes through."""
    try:
        checks = list(verify(folder, torch.device("cpu"), torch.float32))
        return all(check.passed is not False for check in checks)
    except UserError:
        return False


def damage_json(file, rng):
    file.write_text(json.dumps(changed(json.loads(file.read_text()), rng)))


def cut(file, rng):
    content = file.read_bytes()
    file.write_bytes(content[: rng.randrange(len(content))])


def flip(file, rng):
    content = bytearray(file.read_bytes())
    # The first bytes hold the header, where one wrong bit does the most.
    place = (
        rng.randrange(min(len(content), 2000))
        if rng.random() < 0.5
        else rng.randrange(len(content))
    )
    content[place] ^= 1 << rng.randrange(8)
    file.write_bytes(bytes(content))


DAMAGES = [
    (damage_json, "config.json"),
    (cut, "config.json"),
    (cut, "model-00001-of-00003.safetensors"),
    (flip, "model-00002-of-00003.safetensors"),
    (flip, "model-00003-of-00003.safetensors"),
    (damage_json, "model.safetensors.index.json"),
    (cut, "tokenizer.json"),
]


@pytest.mark.parametrize(
    "damage, name, seed",
    sampled(
        [(*damage, seed) for damage in DAMAGES for seed in range(2)],
        lambda damage, name, seed: seed == 0,
    ),
    ids=lambda value: getattr(value, "__name__", value),
)
def test_damaged_checkpoints_are_never_verified(checkpoint, tmp_path, damage, name, seed):
    """With metadata the hashes tell; without, it has to be found some other way or be harmless, but
    in good order.
    """
    rng = random.Random(f"{damage.__name__} {name} {seed}")
    for trial in range(4):
        folder = tmp_path / str(trial)
        shutil.copytree(checkpoint, folder)
        damage(folder / name, rng)
        changed_really = not _same_json(folder / name, checkpoint / name)
        if trial % 2:
            (folder / METADATA).unlink()
            is_verified(folder)
        else:
            assert not (changed_really and is_verified(folder)), trial
        shutil.rmtree(folder)


def _same_json(one, other) -> bool:
    try:
        return json.loads(one.read_text()) == json.loads(other.read_text())
    except ValueError:
        return one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("seed", sampled([(seed,) for seed in range(8)], lambda seed: seed == 0))
def test_damaged_metadata_is_an_error_or_harmless(checkpoint, tmp_path, seed):
    rng = random.Random(seed)
    for trial in range(5):
        folder = tmp_path / str(trial)
        shutil.copytree(checkpoint, folder)
        damage_json(folder / METADATA, rng)
        is_verified(folder)
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", [METADATA, "config.json"])
def test_compare_with_a_damaged_checkpoint(checkpoint, tmp_path, name):
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint, folder)
    (folder / name).write_text((folder / name).read_text()[:200])
    result = run_script(
        ROOT / "compare_to_baseline.py",
        "--quantized",
        folder,
        "--results-dir",
        tmp_path / "results",
    )
    assert_user_error(result, name)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    "name", ["baseline.json", "gptq-4bit.json", "samples/gptq-4bit.jsonl.gz", "status.json"]
)
def test_analyze_with_truncated_results(tmp_path, name):
    model_part(tmp_path / "results", ["gptq-4bit"])
    file = tmp_path / "results" / "tiny" / name
    file.write_bytes(file.read_bytes()[: len(file.read_bytes()) // 2])
    (tmp_path / "README.md").write_text(README)
    result = run_script(
        ROOT / "analyze_results.py",
        "--results-dir",
        tmp_path / "results",
        "--readme",
        tmp_path / "README.md",
        "--tables-dir",
        tmp_path / "tables",
        "--report",
        tmp_path / "report.html",
        cwd=tmp_path,
    )
    if name.startswith("samples"):  # the others are still shown
        assert result.returncode == 0 and f"{file.name} is missing or damaged" in result.stdout
    else:
        assert_user_error(result, file.name)


def test_no_code_and_no_pickle_from_a_folder(tiny, calibration_text, tmp_path):
    """A model folder that brings code, and one with pickled weights: the code is not run, the
    pickle not opened.
    """
    folder = tmp_path / "with-code"
    shutil.copytree(tiny, folder)
    (folder / "trap.py").write_text(
        f"open({str(tmp_path / 'sprung')!r}, 'w')\nfrom transformers import LlamaConfig as Trap\n"
    )
    config = json.loads((folder / "config.json").read_text())
    for model_type in (config["model_type"], "trap"):
        (folder / "config.json").write_text(
            json.dumps(
                {
                    **config,
                    "model_type": model_type,
                    "auto_map": {"AutoConfig": "trap.Trap", "AutoModelForCausalLM": "trap.Trap"},
                }
            )
        )
        run_script(
            ROOT / "quantize_hqq.py", "--model", folder, "--output", tmp_path / f"out-{model_type}"
        )
        assert not (tmp_path / "sprung").exists()
    pickled = tmp_path / "pickled"
    shutil.copytree(tiny, pickled)
    (pickled / "model.safetensors").unlink()
    torch.save({"x": torch.ones(1)}, pickled / "pytorch_model.bin")
    assert_user_error(
        run_script(ROOT / "quantize_hqq.py", "--model", pickled, "--output", tmp_path / "out"),
        "safetensors",
    )
    result = run_script(
        ROOT / "common" / "evaluation.py",
        "--model-path",
        pickled,
        "--tasks",
        "speed",
        "--results-dir",
        tmp_path / "results",
    )
    assert_user_error(result, "only safetensors weights are read")
