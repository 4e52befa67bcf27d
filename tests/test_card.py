"""The model card of a checkpoint: what it says, what it must not say, and whose it is."""

import json
import shlex
import shutil

import pytest
import yaml
from conftest import ROOT, run_script, save_tiny

from common.checkpoint.format import open_checkpoint
from common.checkpoint.writer import METADATA_FILE, folder_bytes
from common.model.origin import Origin, origin_of
from common.reporting.engines import LLAMA_CPP, SGLANG, TRANSFORMERS, VLLM, support
from common.results.hashes import checkpoint_hash

LICENCE = """---
license: other
license_name: some-community-licence
license_link: LICENSE.txt
base_model: another/one
---
# The base
"""


def quantize(method, model, output, *options):
    result = run_script(
        ROOT / f"quantize_{method}.py", "--model", model, "--output", output, *options
    )
    assert result.returncode == 0, result.stderr
    return result


def card_of(folder) -> tuple[dict, str]:
    """Front matter and text."""
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


@pytest.fixture(scope="module")
def source(tiny_models, tmp_path_factory):
    """An untied model with a licence in its own card, in a folder whose path is nobody's matter."""
    folder = tmp_path_factory.mktemp("secret-place") / "some-model"
    shutil.copytree(tiny_models["llama", False], folder)
    (folder / "README.md").write_text(LICENCE)
    return folder


@pytest.fixture(scope="module")
def made(source, calibration_text, tmp_path_factory):
    output = tmp_path_factory.mktemp("card") / "gptq-4bit"
    few = ("--calib-samples", 4, "--calib-length", 32)
    quantize("gptq", source, output, "--calib-data", calibration_text, *few, "--sweeps", 0)
    return output


def test_what_a_card_says(made, source, calibration_text):
    front, text = card_of(made)
    record = json.loads((made / METADATA_FILE).read_text())
    assert front == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "other",
        "license_name": "some-community-licence",
        "tags": ["compressed-tensors", "gptq", "4-bit", "w4a16"],
    }
    assert "# some-model, gptq 4-bit\n" in text and "asymmetric, one scale for 64" in text
    assert record["calibration"]["fingerprint"] in text and record["made_from"]["model"] in text
    assert "vllm serve MODEL" in text and "Not with" in text
    for secret in (source.parent.name, calibration_text.parent.name, str(made)):
        assert secret not in text


def test_the_command_makes_it_again(made, source, calibration_text, tmp_path):
    """With the paths put back: the same files, bit for bit."""
    _, text = card_of(made)
    (line,) = [line for line in text.splitlines() if line.startswith("python quantize_")]
    paths = {"some-model": source, calibration_text.name: calibration_text}
    words = [paths.get(word, word) for word in shlex.split(line)[1:]]
    result = run_script(ROOT / words[0], *words[1:], "--output", tmp_path / "again")
    assert result.returncode == 0, result.stderr
    files = [
        json.loads((at / METADATA_FILE).read_text())["files"] for at in (made, tmp_path / "again")
    ]
    assert files[0] == files[1]


def test_a_card_counts_for_nothing(made, tmp_path):
    """Neither for the size nor for what results are of, nor for verification."""
    copy = tmp_path / "copy"
    shutil.copytree(made, copy)
    (copy / "README.md").unlink()
    assert folder_bytes(copy) == folder_bytes(made)
    assert checkpoint_hash(copy, tmp_path) == checkpoint_hash(made, tmp_path)
    assert run_script(ROOT / "verify_model.py", "--model-path", copy).returncode == 0
    assert not (copy / "README.md").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "# Mine\n",
        lambda text: text.replace("## How to load it", "## How I load it"),
        lambda text: f"{text}\nPS: mine\n",
        lambda text: text.encode("utf-16"),
        lambda text: "",
    ],
    ids=["other", "edited", "added", "encoding", "empty"],
)
def test_a_users_own_card_is_kept(made, source, tmp_path, change):
    """When it is written anew, and when there are results."""
    from common.reporting.card import refresh_card, write_card
    from common.results.naming import Subject

    mine = change((made / "README.md").read_text())
    mine = mine if isinstance(mine, bytes) else mine.encode()
    old, new = tmp_path / "old", tmp_path / "new"
    for folder in (old, new):
        shutil.copytree(made, folder)
        (folder / "README.md").write_bytes(b"nothing")
    (old / "README.md").write_bytes(mine)
    write_card(new, json.loads((made / METADATA_FILE).read_text()), before=old)
    assert (new / "README.md").read_bytes() == mine
    refresh_card(Subject(old, str(source), "some-model", "gptq-4bit"), tmp_path / "no-results")
    assert (old / "README.md").read_bytes() == mine


def test_overwriting_a_checkpoint_keeps_a_users_own_card(tiny, tmp_path):
    output = tmp_path / "hqq-4bit"
    quantize("hqq", tiny, output)
    first = (output / "README.md").read_text()
    assert "stays as it is" not in quantize("hqq", tiny, output, "--overwrite", "--bits", 8).stdout
    assert "hqq 8-bit" in (output / "README.md").read_text() != first
    (output / "README.md").write_text("mine")
    again = quantize("hqq", tiny, output, "--overwrite")
    assert "README.md is not a card that was written here, so it stays as it is" in again.stdout
    assert (output / "README.md").read_text() == "mine"


def test_without_metadata_there_is_a_card_too(tiny, tmp_path):
    quantize("hqq", tiny, tmp_path / "out", "--no-save-metadata")
    front, text = card_of(tmp_path / "out")
    assert front["tags"][1] == "hqq" and METADATA_FILE not in text


def test_results_come_into_the_card(made, source, tmp_path):
    """After an evaluation alone without a baseline, after a comparison with recovery; every number
    is that of the results.
    """
    folder, results = tmp_path / "gptq-4bit", tmp_path / "results"
    shutil.copytree(made, folder)
    where = ("--results-dir", results, "--data", "demo", "--limit", 6, "--windows", 2)
    where = (*where, "--window-length", 32, "--tasks", "arc,perplexity")
    script = ROOT / "common" / "evaluation.py"
    alone = run_script(script, "--model-path", folder, *where)
    assert alone.returncode == 0, alone.stderr
    about, _, section = (folder / "README.md").read_text().partition("\n## Results\n")
    assert about.split("<!--")[0] == (made / "README.md").read_text().split("<!--")[0]
    assert "Recovery is" not in section and "| ARC-Challenge accuracy | – |" in section

    compared = run_script(ROOT / "compare_to_baseline.py", "--quantized", folder, *where, "--json")
    assert compared.returncode == 0, compared.stderr
    metrics = {one["name"]: one for one in json.loads(compared.stdout)["metrics"]}
    text = (folder / "README.md").read_text()
    assert text.count("## Results") == 1 and str(tmp_path) not in text
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    table = {row[0]: row[1:] for row in rows}
    for name in ("ARC-Challenge accuracy", "Perplexity"):
        before, after, recovery, difference, verdict = table[name]
        one = metrics[name]
        assert float(before) == pytest.approx(one["baseline"], rel=1e-3)
        assert float(after) == pytest.approx(one["quantized"], rel=1e-3)
        share = f"{100 * one['quantized'] / one['baseline']:.1f}%" if one["baseline"] else "–"
        assert recovery == (share if name == "ARC-Challenge accuracy" else "–")
        assert "[" in difference and verdict == one["verdict"]
    # A card of an earlier version, which had none, is written first.
    (folder / "README.md").unlink()
    assert run_script(script, "--model-path", folder, *where, "--reuse").returncode == 0
    assert (folder / "README.md").read_text() == text


@pytest.mark.parametrize(
    "card, expected",
    [
        (None, {}),
        ("# no front matter\n", {}),
        ("---\nlicense: mit\n---\n", {"license": "mit"}),
        ("---\nlicense: [unclosed\n---\n", {}),
        ("---\n- a list\n---\n", {}),
        ("---\nlicense: 3\n---\n", {}),
        (
            "---\nlicense: other\nlicense_link: https://example.org/x\n---\n",
            {"license": "other", "license_link": "https://example.org/x"},
        ),
    ],
)
def test_a_licence_is_inherited_and_never_invented(tmp_path, card, expected):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert origin_of(str(tmp_path), tmp_path) == Origin(None, expected)


def test_the_origin_of_a_model_of_the_hub(tmp_path):
    """By its folder in the hub's cache; a link to a file of the base's leads there."""
    folder = tmp_path / "models--owner--base-1B" / "snapshots" / "0123abcd"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(LICENCE)
    for model in ("owner/base-1B", str(folder)):
        found = origin_of(model, folder)
        assert found.hub_id == "owner/base-1B"
        assert found.licence["license_link"].endswith("/owner/base-1B/blob/main/LICENSE.txt")
    assert origin_of("demo", tmp_path).licence == {"license": "apache-2.0"}


# What runs a checkpoint, and a word of the reason where something does not.
ENGINES = [
    ("hqq", "llama", (), {VLLM: "CPU with AVX-512", SGLANG: "kernel wants", LLAMA_CPP: True}),
    ("hqq", "llama", ("--bits", 8), {VLLM: "on a GPU", SGLANG: "kernel wants", LLAMA_CPP: True}),
    (
        "hqq",
        "llama",
        ("--bits", 8, "--asymmetric"),
        {VLLM: "Hopper", SGLANG: "symmetric", LLAMA_CPP: "zero-points"},
    ),
    ("hqq", "llama", ("--bits", 3), {VLLM: "3 bits", SGLANG: None, LLAMA_CPP: "3-bit codes"}),
    (
        "hqq",
        "llama",
        ("--group-size", "16"),
        {VLLM: "groups of 16", SGLANG: "groups of 16", LLAMA_CPP: "groups of 16"},
    ),
    ("hqq", "llama", ("--head-bits", 8), {VLLM: "on a GPU", SGLANG: None, LLAMA_CPP: True}),
    ("hqq", "llama", ("--embedding-bits", 8), {VLLM: "int8 embedding", SGLANG: "int8 embedding"}),
    ("smoothquant", "llama", (), {VLLM: "CPU with VNNI", SGLANG: None, LLAMA_CPP: "activations"}),
]


@pytest.mark.parametrize("method, architecture, options, expected", ENGINES)
def test_which_engines_run_it(
    tiny_models, calibration_text, tmp_path, method, architecture, options, expected
):
    text = () if method == "hqq" else ("--calib-data", calibration_text, "--calib-samples", 4)
    text = (*text, "--calib-length", 32) if text else ()
    result = quantize(method, tiny_models[architecture, False], tmp_path / "out", *options, *text)
    found = support(*open_checkpoint(tmp_path / "out"))
    assert found[TRANSFORMERS].runs
    for engine, words in expected.items():
        if isinstance(words, str):
            assert words in found[engine].words, engine
        else:
            assert found[engine].runs is words, engine
    note = "note: an int8 embedding runs in this project's runtime and transformers only"
    assert (note in result.stdout) is ("--embedding-bits" in options)
    record = json.loads((tmp_path / "out" / METADATA_FILE).read_text())["engines"]
    assert record["vLLM"] == {"runs": found[VLLM].runs, "words": found[VLLM].words}
    _, card = card_of(tmp_path / "out")
    assert ("vllm serve" in card) is found[VLLM].runs
    for one in found.values():
        assert one.words in card


@pytest.mark.parametrize("bits", [4, 8])
def test_a_shape_that_sglang_takes(tmp_path, bits):
    sizes = dict(hidden_size=128, intermediate_size=256, num_attention_heads=4)
    save_tiny(tmp_path / "model", "llama", True, num_key_value_heads=4, head_dim=32, **sizes)
    quantize("hqq", tmp_path / "model", tmp_path / "out", "--bits", bits)
    assert support(*open_checkpoint(tmp_path / "out"))[SGLANG].runs


def test_online_rotations_run_here_alone(tiny, calibration_text, tmp_path):
    few = ("--calib-data", calibration_text, "--calib-samples", 4, "--calib-length", 32)
    quantize("quarot", tiny, tmp_path / "out", "--act-bits", 8, "--sweeps", 0, *few)
    front, text = card_of(tmp_path / "out")
    assert "w4a8" in front["tags"] and "from_pretrained" not in text
    assert "Not with transformers, vLLM, SGLang, llama.cpp" in text
