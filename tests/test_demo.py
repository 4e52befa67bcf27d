"""The demo model in depth: it is made once, and quantizing it keeps most of its quality."""

import copy
import json

import pytest
import torch
from conftest import ROOT, interrupt_after, oracle, run_script
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.checkpoint.tensors import decompress, stored_parts
from common.model import demo as demo
from common.model.from_gguf import reading_gguf
from common.numerics.grid import Grid
from common.running.runtime import load_model
from common.tasks.perplexity import perplexity
from common.text.data import demo_rows, demo_text
from common.text.windows import evaluation_windows


def test_a_gguf_file_is_read_once(monkeypatch):
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    read = []
    monkeypatch.setattr(gguf, "GGUFReader", lambda path: read.append(path) or object())
    reader = gguf.GGUFReader
    with reading_gguf():
        assert gguf.GGUFReader("a") is gguf.GGUFReader("a")
    assert read == ["a"] and gguf.GGUFReader is reader


def test_a_demo_model_of_an_earlier_version_is_made_anew(tmp_path, monkeypatch, capsys):
    """Its weights were others: figures of both would stand beside each other."""
    folder = tmp_path / "baseline"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text("old")
    monkeypatch.setattr(demo, "_fetch_gguf", lambda scratch: scratch)
    monkeypatch.setattr(
        demo,
        "_convert",
        lambda _, new: [
            (new / name).write_text("new") for name in ("config.json", "model.safetensors")
        ],
    )
    assert demo.prepare_demo_model(folder) == folder
    assert (folder / "config.json").read_text() == "new" and "earlier version" in "".join(
        capsys.readouterr()
    )
    (folder / "config.json").write_text("kept")
    demo.prepare_demo_model(folder)
    assert (folder / "config.json").read_text() == "kept"


@torch.no_grad()
def test_the_demo_model_is_the_files_on_other_channels(tiny, tmp_path, monkeypatch):
    """With a tiny model in the place of what the file holds."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tiny),
        AutoTokenizer.from_pretrained(tiny),
    )
    model.config.quantization_config = "the file's"
    before = copy.deepcopy(model).float()
    for loader, made in ((AutoModelForCausalLM, model.float()), (AutoTokenizer, tokenizer)):
        monkeypatch.setattr(loader, "from_pretrained", lambda *_, made=made, **__: made)
    demo._convert(tmp_path / "file", tmp_path / "demo")
    monkeypatch.undo()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "demo", dtype=torch.float32)
    tokens = torch.arange(2, 40)[None]
    logits = before(tokens).logits
    assert (found(tokens).logits - logits).abs().max() < 0.05 * logits.abs().max()
    embedding = found.model.embed_tokens.weight
    assert not torch.equal(embedding, before.model.embed_tokens.weight)
    assert torch.equal(embedding.sort().values, before.model.embed_tokens.weight.sort().values)
    # Whatever decides the weights is in the file by which an older version's are known.
    assert set(demo.ORIGIN) == {"wheel", "file", "seed", "turn"}


def test_demo_tasks_have_the_hubs_columns():
    arc, easy, squad, math = (
        demo_rows(name).rows for name in ("arc", "arc_easy", "squad", "openmath")
    )
    assert len(arc) >= 120 and len(easy) >= 60 and len(squad) >= 80 and len(math) >= 100
    questions = [row["question"] for row in arc + easy]
    assert len(set(questions)) == len(questions) == len({row["id"] for row in arc + easy})
    # A model that always takes the same letter is at chance.
    assert {letter: sum(row["answerKey"] == letter for row in easy) for letter in "ABCD"} == (
        dict.fromkeys("ABCD", len(easy) // 4)
    )
    for row in arc + easy:
        assert set(row) == {"id", "question", "choices", "answerKey"} and row["choices"][
            "label"
        ] == list("ABCD")
        assert len(set(row["choices"]["text"])) == 4 and row["answerKey"] in "ABCD"
    for row in squad:
        assert set(row) == {"id", "title", "context", "question", "answers"}
        for text, start in zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True):
            assert row["context"][start : start + len(text)] == text
    assert len({row["context"] for row in squad}) >= 16
    assert 0.3 <= sum(not row["answers"]["text"] for row in squad) / len(squad) <= 0.37
    for row in math:
        assert set(row) == {"problem", "generated_solution", "expected_answer", "problem_source"}
        float(row["expected_answer"])
    assert len({row["problem"] for row in math}) == len(math)


def test_demo_texts_share_no_paragraph():
    paragraphs = [
        {p for text in demo_text(part) for p in text.split("\n\n") if p.strip()}
        for part in ("calibration", "evaluation")
    ]
    assert not paragraphs[0] & paragraphs[1]
    assert min(map(len, paragraphs)) > 100


def evaluate(folder, results, *options):
    result = run_script(
        ROOT / "common/evaluation.py", "--model-path", folder, "--results-dir", results, *options
    )
    assert result.returncode == 0, result.stderr
    file = next(results.glob(f"*/{folder.name}.json"))
    return json.loads(file.read_text())["tasks"]


# A small calibration and neither sweeps nor catching up keep these short.
SHORT = ("--calib-samples", 4, "--sweeps", 0, "--catch-up", 0)


def test_the_demo_model_answers(demo_model, tmp_path):
    """Well above chance."""
    found = evaluate(demo_model, tmp_path, "--limit", 16, "--tasks", "arc")
    assert found["arc"]["accuracy"] > 0.5


def test_four_bits_keep_the_quality_of_the_first_layers(demo_model, tmp_path, monkeypatch):
    """As `test_demo_model_end_to_end`, but the run ends after two of the 30 layers, as by Ctrl-C,
    and what is finished is put in the place of the model's own weights.
    """
    interrupt_after(monkeypatch, 2)
    words = ["--model", "demo", "--output", tmp_path / "out", *SHORT, "--calib-length", 256]
    assert run_script(ROOT / "quantize_gptq.py", *words).returncode == 130
    model, tokenizer = load_model(demo_model, torch.device("cpu"), torch.float32)
    windows = evaluation_windows("demo", tokenizer, 6, 128)
    before = perplexity(model, windows)[0]["perplexity"]
    shards = [load_file(file) for file in (tmp_path / "out.unfinished").glob("*.safetensors")]
    quantized = 0
    for shard in shards:
        for name in (name for name in shard if name.endswith(".weight_packed")):
            linear = name.removesuffix(".weight_packed")
            state = stored_parts(shard.__getitem__, shard, linear)
            model.get_submodule(linear).weight.data = decompress(state, Grid(4, 64))
            quantized += 1
        for name in (name for name in shard if name.endswith("layernorm.weight")):
            model.get_parameter(name).data = shard[name].float()  # channels are balanced
    assert len(shards) == 2 and quantized == 2 * 7
    ratio = perplexity(model, windows)[0]["perplexity"] / before
    assert 1.0 < ratio < 1.03


@pytest.mark.slow
def test_demo_model_end_to_end(demo_model, tmp_path):
    """Four bits keep most of the quality; the scores are well above chance."""
    output = tmp_path / "gptq-4bit"
    result = run_script(ROOT / "quantize_gptq.py", "--model", "demo", "--output", output, *SHORT)
    assert result.returncode == 0, result.stderr
    options = ["--limit", 16, "--tasks", "arc,perplexity", "--windows", 2]
    baseline, quantized = (
        evaluate(folder, tmp_path / "results", *options) for folder in (demo_model, output)
    )
    assert baseline["arc"]["accuracy"] > 0.5
    ratio = quantized["perplexity"]["perplexity"] / baseline["perplexity"]["perplexity"]
    assert 1.0 < ratio < 1.3


# Calibration and evaluation of the figures in docs/performance.md.
CALIBRATION = [
    "--calib-data",
    "calib/pile_style_mix",
    "--calib-samples",
    32,
    "--calib-length",
    512,
    "--group-size",
    64,
]
PERPLEXITY = ["--tasks", "perplexity", "--windows", 20, "--window-length", 1024]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_perplexity_on_wikitext(demo_model, shared_data, tmp_path):
    """The stated ratios: GPTQ-4bit 1.25, GPTQ-8bit and HQQ-8bit 1.005; HQQ-4bit not worse than the
    hqq package.
    """
    from common.model.architecture import family_of

    quantizer = oracle("hqq.core.quantize").Quantizer
    found = {
        "baseline": evaluate(demo_model, tmp_path, *PERPLEXITY, "--data-root", shared_data)[
            "perplexity"
        ]["perplexity"]
    }
    for method, bits in (("gptq", 4), ("gptq", 8), ("hqq", 4), ("hqq", 8)):
        output = tmp_path / f"{method}-{bits}bit"
        result = run_script(
            ROOT / f"quantize_{method}.py",
            "--model",
            "demo",
            "--bits",
            bits,
            "--output",
            output,
            "--data-root",
            shared_data,
            *CALIBRATION,
        )
        assert result.returncode == 0, result.stderr
        found[output.name] = evaluate(output, tmp_path, *PERPLEXITY, "--data-root", shared_data)[
            "perplexity"
        ]["perplexity"]
    model, tokenizer = load_model(demo_model, torch.device("cpu"), torch.float32)
    for layer in model.model.layers:
        for name in family_of(layer).linears:
            weight = layer.get_submodule(name).weight
            codes, meta = quantizer.quantize(
                weight.data,
                nbits=4,
                group_size=64,
                optimize=True,
                axis=1,
                device="cpu",
                compute_dtype=torch.float32,
                bitpack=False,
            )
            weight.data = quantizer.dequantize(codes, meta).view_as(weight).float()
    windows = evaluation_windows(
        "Salesforce/wikitext/wikitext-2-raw-v1:test", tokenizer, 20, 1024, shared_data
    )
    found["hqq package"] = perplexity(model, windows)[0]["perplexity"]
    print({name: round(value, 3) for name, value in found.items()})
    ratios = {name: value / found["baseline"] for name, value in found.items()}
    assert ratios["gptq-4bit"] <= 1.25
    assert ratios["gptq-8bit"] <= 1.005 and ratios["hqq-8bit"] <= 1.005
    assert found["hqq-4bit"] <= found["hqq package"]
