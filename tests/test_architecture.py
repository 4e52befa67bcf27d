"""What is said of the families, against transformers' own layers; that it is said once."""

import ast
import itertools

import pytest
import torch
from conftest import ARCHITECTURES, ROOT, run_script, sampled, save_tiny
from test_rotation_and_scaling import all_logits, hidden_rotation
from transformers import AutoModelForCausalLM

from common.model.architecture import FAMILIES
from common.model.source import SourceModel
from common.numerics.grid import Grid
from common.numerics.hadamard import rotation
from common.walk.method import Layer
from common.walk.scaling import fold_scale, shared_by_heads
from quantize_quarot import rotate_layer, rotate_vocabulary

CPU = torch.device("cpu")


def family_entries() -> list[ast.Call]:
    tree = ast.parse((ROOT / "common/model/architecture.py").read_text())
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "Family"
    ]


def test_a_family_is_one_entry_of_at_most_25_lines():
    entries = family_entries()
    assert [entry.args[0].value for entry in entries] == list(FAMILIES)
    assert all(entry.end_lineno - entry.lineno < 25 for entry in entries)
    assert {architecture for architecture, _ in ARCHITECTURES} == set(FAMILIES)


def test_nothing_else_names_a_family_or_a_linear():
    """No other module says what only holds for one family, but for what runs Llama's layers.
    llama.cpp's ways of cutting text have names of their own, some of them those of families.
    """
    linears = {name for family in FAMILIES.values() for name in (*family.linears, *family.norms)}
    allowed = ("model/architecture.py", "exporting/vocabulary.py")
    for file in [*(ROOT / "common").rglob("*.py"), *ROOT.glob("*.py")]:
        if str(file).endswith(allowed):
            continue
        said = {
            node.value
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        assert not said & {*FAMILIES, *linears}, file


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture, tied", ARCHITECTURES)
@torch.no_grad()
def test_a_walk_computes_what_the_model_does(tiny_models, architecture, tied, dtype):
    """Embedding, layers, windows shorter than the text, and logits, bit for bit."""
    folder = tiny_models[architecture, tied]
    tokens = torch.randint(0, 320, (2, 50), generator=torch.Generator().manual_seed(2))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    source = SourceModel(str(folder), CPU, dtype)
    assert torch.equal(all_logits(source, tokens), model(tokens).logits.float())
    hidden = model.model(tokens, output_hidden_states=True).hidden_states[-2]
    arguments = source.layer_arguments(50)[-1]
    assert torch.equal(
        source.original_logits(source.load_layer(1)(hidden, **arguments)),
        model(tokens).logits.float(),
    )


ODD = dict(
    hidden_size=96, intermediate_size=160, num_attention_heads=3, num_key_value_heads=1, head_dim=20
)


# Every architecture and every method of those.
ODD_CHAINS = {
    ("gemma3_text", "quarot"),
    ("granite", "smoothquant"),
    ("phi3", "gptq"),
    ("smollm3", "quarot"),
}


@pytest.fixture(scope="module")
def odd_models(tmp_path_factory):
    """Heads of 20, three of them, that are together narrower than the hidden state."""
    folders = {}
    for architecture in FAMILIES:
        folder = folders[architecture] = tmp_path_factory.mktemp("odd") / architecture
        save_tiny(folder, architecture, True, **ODD)
    return folders


@pytest.mark.parametrize("architecture", FAMILIES)
@torch.no_grad()
def test_odd_sizes_keep_the_function(odd_models, architecture):
    tokens = torch.randint(0, 320, (2, 40), generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(4)

    def opened():
        return SourceModel(str(odd_models[architecture]), CPU, torch.float64)

    def rotate(_, module):
        rotate_layer(module, hidden, rotation(20, seed=1))

    def scale(index, module):
        layer = Layer(index, module, Grid(4, None), torch.bfloat16)
        for group in layer.family.groups:
            random = torch.exp(0.5 * torch.randn(group.in_features(module), generator=generator))
            fold_scale(layer, group, shared_by_heads(layer, group, random))

    before, rotated = all_logits(opened(), tokens), opened()
    hidden = hidden_rotation(architecture, 96)
    if hidden is not None:
        rotate_vocabulary(rotated, hidden)
    for after in (all_logits(rotated, tokens, rotate), all_logits(opened(), tokens, scale)):
        assert (before - after).abs().max() < 1e-5 * before.abs().max()


@pytest.mark.parametrize(
    "architecture, method",
    sampled(
        itertools.product(
            ("gemma3_text", "granite", "phi3", "smollm3"), ("gptq", "smoothquant", "quarot")
        ),
        lambda *case: case in ODD_CHAINS,
    ),
)
def test_odd_sizes_through_the_whole_chain(
    odd_models, calibration_text, tmp_path, architecture, method
):
    result = run_script(
        ROOT / f"quantize_{method}.py",
        "--model",
        odd_models[architecture],
        "--output",
        tmp_path / "out",
        "--group-size",
        "channel",
        "--calib-samples",
        4,
        "--calib-length",
        64,
        "--calib-data",
        calibration_text,
    )
    assert result.returncode == 0, result.stderr
    verified = run_script(ROOT / "verify_model.py", "--model-path", tmp_path / "out")
    assert verified.returncode == 0, verified.stdout


@pytest.mark.parametrize(
    "method, lines",
    [
        ("gptq", ["--catch-up does nothing"]),
        ("quarot", ["R1 does not fold", "--catch-up does nothing"]),
    ],
)
def test_what_cannot_work_is_said_in_one_line(
    tiny_models, calibration_text, tmp_path, method, lines
):
    """Gemma 3 normalises what is added to the residual stream."""
    result = run_script(
        ROOT / f"quantize_{method}.py",
        "--model",
        tiny_models["gemma3_text", True],
        "--output",
        tmp_path / "out",
        "--calib-data",
        calibration_text,
        "--calib-samples",
        4,
        "--calib-length",
        64,
    )
    said = [line for line in result.stdout.splitlines() if line.startswith("gemma3_text")]
    assert len(said) == len(lines)
    assert all(line in one for line, one in zip(lines, said, strict=True))


@torch.no_grad()
def test_no_rotation_of_the_stream_folds_where_outputs_are_normalised(tiny_models):
    """What the entry says is so: folded all the same, it would change the function."""
    folder, tokens = str(tiny_models["gemma3_text", True]), torch.arange(2, 40)[None]
    before, source = (SourceModel(folder, CPU, torch.float64) for _ in range(2))
    before, hidden = all_logits(before, tokens), rotation(64, seed=0)
    rotate_vocabulary(source, hidden)
    value = rotation(16, seed=1)
    after = all_logits(source, tokens, lambda _, module: rotate_layer(module, hidden, value))
    assert (before - after).abs().max() > 0.1 * before.abs().max()
    assert FAMILIES["gemma3_text"].normalises_output
