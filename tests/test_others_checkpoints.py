"""What other libraries quantized, beside ours: how it is filed, counted and shown."""

import json
import shutil

import pytest
import torch
from conftest import ROOT, assert_user_error, run_script
from made_up_results import README, analyze, document
from safetensors.torch import load_file, save_file
from stub_hub import StubHub

from common.base import libraries
from common.base.errors import UserError
from common.checkpoint import foreign
from common.checkpoint.metadata import quantization_facts
from common.model.tensors import TensorReader
from common.results.peers import PEERS
from common.running.runtime import load_model

EVALUATION = ROOT / "common/evaluation.py"
SMALL = ["--data", "demo", "--limit", 2, "--windows", 2, "--window-length", 48]
SMALL += ["--tasks", "arc,perplexity"]
PINS = sorted((ROOT / "benchmarks").glob("requirements*.txt"))
A8W4 = "Int8DynamicActivationInt4WeightConfig"
GPTQ = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 32,
    "sym": False,
    "desc_act": False,
    "meta": {"quantizer": ["optimum:2.3.0", "gptqmodel:7.5.0"]},
}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
HQQ = {
    "quant_method": "hqq",
    "quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64, "axis": 1}},
}


def copy_of(source, target, quantization, tensors=None):
    """A model's folder with this quantization_config, its tensors changed."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = quantization
    (target / "config.json").write_text(json.dumps(config))
    if tensors:
        file = target / "model.safetensors"
        weights = tensors(load_file(file))
        save_file(weights, file, metadata={"format": "pt"})
    return target


def as_gptq(weights):
    """Every linear of a decoder layer in place of its matrix [out, in] as GPTQModel stores it."""
    found = {}
    for name, value in weights.items():
        if not name.endswith("_proj.weight"):
            found[name] = value
            continue
        prefix, (rows, columns) = name.removesuffix("weight"), value.shape
        found[f"{prefix}qweight"] = torch.zeros(columns // 8, rows, dtype=torch.int32)
        found[f"{prefix}qzeros"] = torch.zeros(columns // 32, rows // 8, dtype=torch.int32)
        found[f"{prefix}scales"] = torch.ones(columns // 32, rows, dtype=torch.float16)
        found[f"{prefix}g_idx"] = torch.arange(columns, dtype=torch.int32) // 32
    return found


@pytest.mark.parametrize(
    "quantization, packages",
    [(GPTQ, ("optimum", "gptqmodel")), (NF4, ("bitsandbytes",)), (HQQ, ("hqq",))],
    ids=["gptq", "nf4", "hqq"],
)
def test_a_missing_package_is_one_line(tiny, tmp_path, monkeypatch, quantization, packages):
    """With the version that was tried, and the environment that has it."""
    pins = [line for file in PINS for line in file.read_text().splitlines() if "==" in line]
    wanted = [pin for one in packages for pin in pins if pin.split("==")[0] == one]
    assert len(wanted) == len(packages)
    monkeypatch.setattr(foreign, "find_spec", lambda _: None)
    folder = copy_of(tiny, tmp_path / "theirs", quantization)
    words = [EVALUATION, "--model-path", folder, "--baseline", tiny]
    result = run_script(*words, "--results-dir", tmp_path / "results", *SMALL)
    assert_user_error(
        result,
        f"quantized with {quantization['quant_method']}, which needs {' and '.join(packages)}: ",
        f"-m pip install {' '.join(map(repr, wanted))}, or run this with .peers/bin/python, which ",
    )
    monkeypatch.setattr("sys.prefix", "/some/.peers")
    assert ".peers/bin" not in libraries.how_to_install(list(packages))
    assert libraries.how_to_install(["aqlm"]).endswith("-m pip install aqlm")
    assert not list((tmp_path / "results").glob("*/*.json"))


@pytest.mark.parametrize(
    "quantization, named",
    [
        ({"quant_method": "squeezellm", "bits": 4}, "squeezellm"),
        ({"bits": 4}, "a method that its config.json does not name"),
        ("4-bit", "a method that its config.json does not name"),
    ],
)
def test_a_method_that_transformers_does_not_know_is_refused(tiny, tmp_path, quantization, named):
    """It would be read as plain weights, and shown as such."""
    folder = copy_of(tiny, tmp_path / "theirs", quantization)
    words = [EVALUATION, "--model-path", folder, "--baseline", tiny]
    result = run_script(*words, "--results-dir", tmp_path / "results", *SMALL)
    assert_user_error(result, f"theirs is quantized with {named}, which transformers", "plain")
    assert not list((tmp_path / "results").glob("*/*.json"))


def test_a_library_that_ends_the_process_is_one_line(tiny, tmp_path, monkeypatch):
    """As auto-round does where a package of its own is missing."""

    def leave(*_, **__):
        raise SystemExit(-1)

    monkeypatch.setattr(foreign, "find_spec", lambda _: True)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", leave)
    folder = copy_of(tiny, tmp_path / "theirs", {"quant_method": "auto-round", "bits": 4})
    with pytest.raises(UserError, match="theirs cannot be loaded: -1"):
        load_model(folder, torch.device("cpu"), torch.float32)


def test_bits_are_counted_from_the_tensors(tiny, tmp_path):
    """By hand: 4-bit codes, per 32 of them a scale of 16 bits and a zero-point of 4, and 32 bits
    for each input channel.
    """
    folder = copy_of(tiny, tmp_path / "theirs", GPTQ, as_gptq)
    facts = quantization_facts(folder, TensorReader(tiny))
    shapes = [
        tensor.shape
        for name, tensor in load_file(tiny / "model.safetensors").items()
        if name.endswith("_proj.weight")
    ]
    weights = sum(rows * columns for rows, columns in shapes)
    bits = sum(rows * columns * (4 + 20 / 32) + 32 * columns for rows, columns in shapes)
    assert facts["bits_per_weight"]["coded"] == pytest.approx(bits / weights, abs=1e-4)
    everything = sum(one.numel() for one in load_file(tiny / "model.safetensors").values())
    size = (folder / "model.safetensors").stat().st_size
    assert facts["bits_per_weight"]["all"] == pytest.approx(
        8 * facts["weights_bytes"] / everything, abs=1e-4
    )
    assert 0 < size - facts["weights_bytes"] < 20_000  # the header
    assert facts["grid"] == {"bits": 4, "group_size": 32, "symmetric": False}
    assert facts["library"]["name"] == "optimum 2.3.0 + gptqmodel 7.5.0"
    assert "seconds" not in facts and "calibration" not in facts
    # Without the 16-bit model bits of a weight are not known.
    assert quantization_facts(folder)["bits_per_weight"] == {"coded": None, "all": None}


@pytest.mark.parametrize(
    "quantization, grid",
    [
        (NF4, {"bits": 4, "group_size": 64}),
        ({"load_in_8bit": True, "quant_method": "bitsandbytes"}, {"bits": 8, "group_size": None}),
        (HQQ, {"bits": 4, "group_size": 64}),
        (
            {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True},
            {"bits": 4, "group_size": 128, "symmetric": False},
        ),
        ({"quant_method": "gptq", "bits": 4, "group_size": -1}, {"bits": 4, "group_size": None}),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, {"bits": 8}),
        ({"quant_method": "quanto", "weights": "int4"}, {"bits": 4}),
        ({"quant_method": "fp_quant", "forward_dtype": "mxfp4"}, {"bits": 4}),
        (
            {"quant_method": "torchao", "quant_type": {"default": {"_type": A8W4, "_data": {}}}},
            {"bits": 4},
        ),
        ({"quant_method": "torchao", "quant_type": "int8_weight_only"}, {"bits": 8}),
        ({"quant_method": "torchao", "quant_type": "autoquant"}, None),
        ({"quant_method": "hqq", "quant_config": [1]}, None),
    ],
)
def test_the_grid_that_a_configuration_tells(tiny, tmp_path, quantization, grid):
    folder = copy_of(tiny, tmp_path / "theirs", quantization)
    assert quantization_facts(folder).get("grid") == grid


NAMES = """
import sys
from common.cli import quiet_libraries
quiet_libraries()
from common.base.errors import UserError
from common.results.naming import subject_of
for model in sys.argv[2:]:
    try:
        found = subject_of(model, sys.argv[1])
        print(model, "->", found.configuration, found.name, found.folder.name)
    except UserError as error:
        print(model, "-> error:", error)
"""


def test_from_the_hub(tiny, tmp_path):
    """By id, or one GGUF file of a repository; filed under the id's last part."""
    repository = tmp_path / "served/models/owner/Tiny-GPTQ"
    repository.parent.mkdir(parents=True)
    copy_of(tiny, repository, GPTQ)
    (repository / "tiny-q4.gguf").write_bytes(b"GGUF")
    asked = ["owner/Tiny-GPTQ", "owner/Tiny-GPTQ/tiny-q4.gguf", "owner/Tiny-GPTQ/none.gguf"]
    with StubHub(tmp_path / "served") as hub:
        lines = hub.python(NAMES, str(tiny), *asked, home=tmp_path / "home")
    found = dict(line.split(" -> ", 1) for line in lines if " -> " in line)
    assert found[asked[0]].startswith(f"Tiny-GPTQ {tiny.name} ")
    assert found[asked[1]] == f"tiny-q4 {tiny.name} tiny-q4.gguf"
    assert found[asked[2]] == "error: owner/Tiny-GPTQ has no file none.gguf on the hub"


@pytest.fixture(scope="module")
def exported(tiny_models, tmp_path_factory):
    """A checkpoint of ours, a folder with the same as a GGUF file; its 16-bit model."""
    folder, model = tmp_path_factory.mktemp("exported"), tiny_models["llama", True]
    words = ["--model", model, "--output", folder / "hqq-4bit", "--group-size", 32]
    assert run_script(ROOT / "quantize_hqq.py", *words).returncode == 0
    (folder / "files").mkdir()
    words = ["--model-path", folder / "hqq-4bit", "--output", folder / "files/theirs.gguf"]
    result = run_script(ROOT / "common/gguf_export.py", *words)
    assert result.returncode == 0, result.stderr
    return folder, model


def test_a_gguf_file_answers_as_the_checkpoint_that_it_was_made_from(exported, tmp_path):
    folder, model = exported
    found = {}
    for path, name in (("hqq-4bit", "hqq-4bit"), ("files", "theirs")):
        words = [EVALUATION, "--model-path", folder / path, "--baseline", model, *SMALL]
        result = run_script(*words, "--results-dir", tmp_path / "results")
        assert result.returncode == 0, result.stderr
        file = tmp_path / "results" / model.name / f"{name}.json"
        found[name] = json.loads(file.read_text())
    ours, theirs = (found[name]["tasks"] for name in ("hqq-4bit", "theirs"))
    # GGUF's scales are float16, ours bfloat16.
    assert theirs["perplexity"]["perplexity"] == pytest.approx(
        ours["perplexity"]["perplexity"], rel=2e-3
    )
    assert theirs["perplexity"]["fingerprint"] == ours["perplexity"]["fingerprint"]
    facts = found["theirs"]["quantization"]
    assert facts["library"]["name"].startswith("GGUF Q4_1")
    assert facts["bits_per_weight"]["coded"] == pytest.approx(5, abs=0.01)  # 4 + (16 + 16) / 32


def test_mistakes_about_files(tiny, exported, tmp_path):
    def ask(*words):
        return run_script(EVALUATION, "--model-path", *words, "--results-dir", tmp_path, *SMALL)

    folder, model = exported
    file = folder / "files/theirs.gguf"
    assert_user_error(ask(file), "theirs.gguf is quantized", "--baseline")
    assert_user_error(ask(file, "--baseline", model, "--name", "gptq-4bit"), "another --name")
    assert_user_error(ask(file, "--baseline", model, "--name", "baseline"), "another")
    assert_user_error(ask(file, "--baseline", model, "--name", "a/b"), "another --name")
    assert_user_error(ask(tiny, "--name", "theirs"), "is not quantized", "--name")
    two = tmp_path / "two"
    two.mkdir()
    for name in "ab":
        (two / f"{name}.gguf").write_bytes(b"GGUF no more")
    assert_user_error(ask(two, "--baseline", model), "2 GGUF files", "a.gguf")
    broken = ask(two / "a.gguf", "--baseline", model)
    assert_user_error(broken, "a.gguf is no readable GGUF file")
    (tmp_path / "list.txt").write_text("")
    assert_user_error(ask(tmp_path / "list.txt"), "is a file", ".gguf")


def test_a_baseline_of_another_shape_is_refused(exported, deep, tmp_path):
    folder, _ = exported
    words = [EVALUATION, "--model-path", folder / "files", "--baseline", deep]
    result = run_script(*words, "--results-dir", tmp_path, *SMALL)
    assert_user_error(result, "num_hidden_layers 2", "has 8", "--baseline")


@pytest.mark.usefixtures("undrawn")
def test_tables_say_whose_a_row_is(tmp_path):
    folder = tmp_path / "results" / "tiny"
    folder.mkdir(parents=True)
    (tmp_path / "README.md").write_text(README)
    library = {"name": "llmcompressor", "version": "0.14"}
    facts = document("gptq-4bit", 0.5)["quantization"]
    theirs = {
        "weights_bytes": 400_000,
        "folder_bytes": 450_000,
        "bits_per_weight": {"coded": 4.5, "all": 3.2},
        "library": {"name": "optimum 2.3.0 + gptqmodel 7.5.0", "format": "gptq"},
        "grid": {"bits": 4, "group_size": 32, "symmetric": False},
    }
    rows = {
        "baseline": document("baseline", 0.75)["quantization"],
        "gptq-4bit": facts,
        "llmcompressor-gptq-4bit": {**facts, "library": library},
        "theirs": theirs,
    }
    for name, quantization in rows.items():
        found = document(name, 0.5, quantization=quantization)
        (folder / f"{name}.json").write_text(json.dumps(found))
    states = {
        "autoround-4bit": {"state": "failed", "reason": "auto-round is not installed"},
        "llmcompressor-gptq-4bit": {"state": "done"},
    }
    (folder / "status.json").write_text(json.dumps(states))
    assert analyze(tmp_path).returncode == 0
    text = (tmp_path / "README.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    first = next(line for line in lines if line.startswith("| theirs |"))
    assert "| 4.50 (3.20) | 0.4 |" in first and first.split("|")[8].strip() == "–"
    assert (
        "Quantized by other libraries: llmcompressor-gptq-4bit (llmcompressor 0.14), theirs "
        "(optimum 2.3.0 + gptqmodel 7.5.0)." in text
    )
    title = PEERS["llmcompressor-gptq-4bit"].title
    assert (
        f"| {title} | weights, calibrated | ✅ Done | – | ✅ Done | by llmcompressor 0.14 |"
        in lines
    )
    failed = next(line for line in lines if line.startswith("| AutoRound"))
    assert failed.endswith("| ❌ Failed | 4-bit: auto-round is not installed |")
    # What is not ours has no bits that its results do not tell.
    size = next(line for line in lines if line.startswith("| theirs | 4 | 32 |"))
    assert size
