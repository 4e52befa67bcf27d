"""verify_model.py passes what is sound and finds what was tampered with."""

import json
import re
import shutil

import pytest
import torch
from conftest import ROOT, run_quantize, run_script, save_tiny, tiny_tokenizer
from safetensors.torch import load_file, save_file

from common import verification
from common.checkpoint.writer import METADATA_FILE
from common.text import probe


@pytest.fixture(scope="module")
def checkpoint(tiny, calibration_text, tmp_path_factory):
    output = tmp_path_factory.mktemp("checkpoint") / "gptq-4bit"
    result = run_quantize("gptq", tiny, output, text=calibration_text)
    assert result.returncode == 0, result.stderr
    return output


SHARD, LINEAR = "model-00002-of-00003.safetensors", "model.layers.1.mlp.down_proj"


def change_tensor(name, change, shard=SHARD):
    def apply(folder):
        tensors = load_file(folder / shard)
        tensors[f"{LINEAR}.{name}"] = change(tensors[f"{LINEAR}.{name}"]).contiguous()
        save_file(tensors, folder / shard, metadata={"format": "pt"})

    return apply


def change_record(folder):
    record = json.loads((folder / METADATA_FILE).read_text())
    record["probe"]["baseline_perplexity"] = 1.5
    (folder / METADATA_FILE).write_text(json.dumps(record))


def change_error(folder):
    record = json.loads((folder / METADATA_FILE).read_text())
    record["linears"][LINEAR]["relative_output_error"] = 0.51
    (folder / METADATA_FILE).write_text(json.dumps(record))


def without(entry):
    def apply(folder):
        record = json.loads((folder / METADATA_FILE).read_text())
        *way, last = entry.split(".")
        owner = record[way[0]] if way else record
        del owner[last]
        (folder / METADATA_FILE).write_text(json.dumps(record))

    return apply


def run(folder, *options):
    result = run_script(ROOT / "verify_model.py", "--model-path", folder, *options)
    assert "Traceback" not in result.stderr, result.stderr
    return result


def check_it_fails(checkpoint, folder, change, failing):
    """A copy of the checkpoint in `folder`, changed, fails with a line that begins so."""
    shutil.copytree(checkpoint, folder)
    change(folder)
    result = run(folder)
    assert result.returncode == 1
    assert f"FAIL  {failing}" in result.stdout, result.stdout


def test_sound(checkpoint):
    result = run(checkpoint)
    assert result.returncode == 0, result.stdout
    assert result.stdout.count("PASS") == 11 and "FAIL" not in result.stdout
    assert "generation" in result.stdout


@pytest.mark.parametrize(
    "change, failing",
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "files complete"),
        (change_tensor("weight_packed", lambda t: t.roll(1, 0)), "recorded logits"),
        (change_tensor("weight_scale", lambda t: -t), "scales positive"),
        (
            change_tensor("weight_scale", lambda t: torch.full_like(t, float("nan"))),
            "scales positive",
        ),
        (change_tensor("weight_packed", lambda t: t[:-1]), "codes within range"),
        (
            change_tensor("weight_packed", lambda t: torch.cat([t[:1] ^ 1, t[1:]])),
            "files unchanged",
        ),
        (change_record, "perplexity"),
        (
            change_error,
            f"output errors: 1 linears are off by more than 0.5 of their output: {LINEAR} (0.51)",
        ),
    ],
    ids=["tokenizer", "codes", "negative", "nan", "shape", "one bit", "baseline", "wrecked"],
)
def test_tampered(checkpoint, tmp_path, change, failing):
    check_it_fails(checkpoint, tmp_path / "copy", change, failing)


def test_a_tokenizer_of_single_bytes_reads_the_beginning_of_the_probe():
    tokenizer = tiny_tokenizer()
    tokens, whole = probe.probe_tokens(tokenizer), tokenizer(probe.TEXT)["input_ids"]
    assert len(whole) > probe.MOST_TOKENS and tokens.tolist() == [whole[: probe.MOST_TOKENS]]


def test_rounded_inputs_tip_over_in_16_bits(tmp_path, calibration_text):
    """Which moves the logits of a sound checkpoint by more than rounding weights alone can; what
    one wrong linear does is still more.
    """
    sizes = dict(layers=12, hidden_size=256, intermediate_size=512, head_dim=64)
    model, output = save_tiny(tmp_path / "model", "llama", True, **sizes), tmp_path / "out"
    result = run_quantize("smoothquant", model, output, text=calibration_text)
    assert result.returncode == 0, result.stderr

    def difference() -> tuple[str, float]:
        said = run(output, "--dtype", "bfloat16").stdout
        verdict, found = re.search(r"(\w+)  recorded logits: differ by (\S+) of", said).groups()
        return verdict, float(found)

    verdict, moved = difference()
    assert verdict == "PASS" and moved > 0.08
    # As much in float32 on a processor that sums in another order.
    record = json.loads((output / METADATA_FILE).read_text())
    logits = torch.tensor(record["probe"]["logits"])
    noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    record["probe"]["logits"] = (logits + 0.1 * logits.std() * noise).tolist()
    (output / METADATA_FILE).write_text(json.dumps(record))
    assert "PASS  recorded logits" in run(output, "--dtype", "float32").stdout
    for part in ("weight", "weight_scale"):
        change_tensor(part, lambda t: t.roll(1, 0), "model-00002-of-00013.safetensors")(output)
    verdict, moved = difference()
    assert verdict == "FAIL" and moved > 0.3


@pytest.mark.parametrize(
    "change, words",
    [
        *[
            (without(entry), f"it lacks {entry}")
            for entry in (
                "options",
                "versions",
                "seconds.total",
                "bytes.quantized_weights",
                "compression_ratio",
                "linears",
                "method",
            )
        ],
        (without("bytes"), "it lacks bytes.quantized_weights, bytes.quantized_folder"),
        (lambda folder: (folder / METADATA_FILE).write_text("{"), "Expecting property name"),
    ],
    ids=[
        "options",
        "versions",
        "time",
        "size",
        "ratio",
        "linears",
        "method",
        "sizes",
        "unreadable",
    ],
)
def test_damaged_metadata(checkpoint, tmp_path, change, words):
    """Also where it lacks what only the evaluation and the tables need."""
    folder = tmp_path / "copy"
    check_it_fails(
        checkpoint, folder, change, f"metadata: {folder / METADATA_FILE} is damaged ({words}"
    )


def test_a_wrecked_linear_is_named_by_both_scripts(tiny, tmp_path, monkeypatch):
    """Its scales are made 1, as float16's small ones once were."""
    from common.kernels import rounding

    search = rounding.search_range

    def broken(weight, *arguments, **options):
        scale, zero_point = search(weight, *arguments, **options)
        if weight.shape == (64, 128):  # down_proj
            scale = torch.ones_like(scale)
        return scale, zero_point

    monkeypatch.setattr(rounding, "search_range", broken)
    result = run_quantize("hqq", tiny, tmp_path / "out", "--bits", 8)
    assert result.returncode == 0
    for name in ("model.layers.0.mlp.down_proj", LINEAR):
        assert f"warning: {name} is wrecked" in result.stdout
    assert "verify_model.py will fail" in result.stdout
    verified = run(tmp_path / "out")
    assert verified.returncode == 1
    assert "FAIL  output errors: 2 linears" in verified.stdout and LINEAR in verified.stdout
    # Errors are in the metadata alone.
    result = run_quantize("hqq", tiny, tmp_path / "bare", "--bits", 8, "--no-save-metadata")
    assert f"warning: {LINEAR} is wrecked" in result.stdout and "will fail" not in result.stdout
    assert "saved without metadata, so verify_model.py cannot know" in result.stdout
    assert run(tmp_path / "bare").returncode == 0


@pytest.mark.parametrize(
    "option, bits, name",
    [("--embedding-bits", 8, "model.embed_tokens"), ("--head-bits", 4, "lm_head")],
)
def test_a_wrecked_embedding_or_head_is_named_by_both_scripts(
    tiny_models, tmp_path, monkeypatch, option, bits, name
):
    from common.solvers import vocabulary

    search = vocabulary.search_range

    def quantize(output):
        result = run_quantize("hqq", tiny_models["llama", False], output, option, bits)
        assert result.returncode == 0, result.stderr
        return result

    assert "is wrecked" not in quantize(tmp_path / "fine").stdout
    error = json.loads((tmp_path / "fine" / METADATA_FILE).read_text())["ends"][name][
        "relative_output_error"
    ]
    assert 0 < error < 4 / 2**bits
    assert run(tmp_path / "fine").returncode == 0

    def broken(rows, *arguments, **options):
        scale, zero_point = search(rows, *arguments, **options)
        return torch.ones_like(scale), zero_point

    monkeypatch.setattr(vocabulary, "search_range", broken)
    assert f"warning: {name} is wrecked" in quantize(tmp_path / "out").stdout
    verified = run(tmp_path / "out")
    assert (
        verified.returncode == 1
        and "FAIL  output errors: " in verified.stdout
        and name in verified.stdout
    )


def test_no_more_logits_at_once_than_the_device_has_room_for(checkpoint, monkeypatch):
    """Beside the unpacked weights of a 3B shape 8 GiB hold no logits of a whole text: verify ended
    in an error there.
    """
    rows, forward = [], torch.nn.Linear.forward

    def watched(self, inputs):
        if self.out_features > 300:  # the head
            rows.append(inputs.shape[-2])
        return forward(self, inputs)

    monkeypatch.setattr(torch.nn.Linear, "forward", watched)
    monkeypatch.setattr(verification, "logits_at_once", lambda *_: 7)
    checks = list(verification.verify(checkpoint, torch.device("cpu"), torch.float32))
    assert len(checks) == 11 and all(check.passed for check in checks)
    assert max(rows) <= 7 and sum(rows) > 100


def test_truncated_shard(checkpoint, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint, folder)
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-100])
    result = run(folder)
    assert result.returncode in (1, 2) and "verified" not in result.stdout
