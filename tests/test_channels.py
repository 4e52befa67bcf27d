"""Other channels of the same model: its function stays, and the grid of a 4-bit file is gone."""

import json
import sys

import pytest
import shuffled_model
import torch
from conftest import ARCHITECTURES, build_tiny
from transformers import AutoModelForCausalLM

from common.base.errors import UserError
from common.model import channels
from common.model.architecture import family_of
from common.model.channels import shuffle, turn_values
from common.numerics.grid import Grid, QuantizedLinear, grouped, min_max


def test_what_is_quantized_already_is_not_shuffled(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", "quantization_config": {"quant_method": "x"}})
    )
    monkeypatch.setattr(
        sys, "argv", ["shuffled_model.py", str(tmp_path), str(tmp_path / "out" / "folder")]
    )
    with pytest.raises(UserError, match="quantized already"):
        shuffled_model.main()


def values(weight: torch.Tensor) -> torch.Tensor:
    return weight.flatten().sort().values


@pytest.mark.parametrize(("architecture", "tied"), ARCHITECTURES)
@torch.no_grad()
def test_a_shuffled_model_has_the_same_weights_and_function(tiny_models, architecture, tied):
    model = AutoModelForCausalLM.from_pretrained(
        tiny_models[architecture, tied], dtype=torch.float32
    )
    tokens = torch.arange(2, 40)[None]
    logits = model(tokens).logits
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    shuffle(model, seed=0)
    torch.testing.assert_close(model(tokens).logits, logits, rtol=1e-4, atol=1e-4)
    turned = set()
    for number, layer in enumerate(model.model.layers):
        for group in family_of(layer).writing:  # rows of v and up as well, whatever their columns
            name = f"model.layers.{number}.{group.fed_by}.weight"
            rows = layer.get_submodule(group.fed_by).weight.norm(dim=1)
            assert not torch.allclose(rows, before[name].norm(dim=1))
        attention = family_of(layer).writing[0]
        for linear in (attention.fed_by, *attention.linears):
            turned |= {f"model.layers.{number}.{linear}.{kind}" for kind in ("weight", "bias")}
    names = {name for name, weight in model.named_parameters() if not weight.equal(before[name])}
    q_k = {name for name in before if "q_norm" in name or "k_norm" in name}
    # Rows of q and k stay where they are, and so do their norms and biases; norms may be all ones.
    assert names >= {name for name in before if name.endswith("proj.weight")}
    assert not names & q_k
    for name, weight in model.named_parameters():
        assert name in turned or torch.equal(values(weight), values(before[name]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (2,)], ids=["one turn", "one of each head"])
@torch.no_grad()
def test_turned_values_have_the_same_product(shape, dtype):
    """Of v's rows and o's columns, query head by query head, in float64."""
    layer = build_tiny("qwen2", False).to(dtype).model.layers[0]
    attention = layer.self_attn
    turn = torch.linalg.qr(torch.randn(*shape, 16, 16, dtype=torch.float64)).Q

    def products() -> torch.Tensor:  # [query heads, out, in and bias]
        v = torch.column_stack([attention.v_proj.weight, attention.v_proj.bias]).double()
        o = attention.o_proj.weight.double().view(64, 4, 16)
        return torch.stack([o[:, head] @ v.view(2, 16, -1)[head // 2] for head in range(4)])

    before, rows = products(), attention.v_proj.weight.double()
    turn_values(layer, turn)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    assert (products() - before).norm() < tolerance * before.norm()
    expected = (turn.expand(2, 16, 16).mT @ rows.view(2, 16, -1)).view(32, -1)
    assert torch.equal(attention.v_proj.weight, expected.to(dtype))  # rounded once


@torch.no_grad()
def test_each_head_has_a_turn_of_its_own(tiny, monkeypatch):
    """Orthogonal, whatever the size of a head."""
    turns = []
    monkeypatch.setattr(channels, "turn_values", lambda layer, turn: turns.append(turn))
    shuffle(AutoModelForCausalLM.from_pretrained(tiny), seed=0)
    turns = torch.stack(turns)  # [layers, heads, size, size]
    assert len(turns.flatten(0, 1).unique(dim=0)) == len(turns) * 2
    generator = torch.Generator().manual_seed(0)
    for size in (1, 5, 64):
        turn = channels._turn(size, generator)
        assert (turn @ turn.mT - torch.eye(size)).abs().max() < 1e-12
        assert size == 1 or not torch.equal(turn, turn.round())


def on_file_grid(weight: torch.Tensor) -> torch.Tensor:
    """A weight [out, in] rounded as the demo model's file is: groups of 32, 16 levels from the
    least to the largest value.
    """
    groups = weight.unflatten(1, (-1, 32))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    return (((groups - low) / (high - low) * 15).round() / 15 * (high - low) + low).flatten(1)


def real_zero_error(weight: torch.Tensor, size: int) -> float:
    """Squared error of rounding groups of a weight [out, in] to 16 levels from the least to the
    largest value, once the offset is fitted to the codes in turns, as the hqq package's is.
    """
    groups = weight.unflatten(1, (-1, size))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step, offset = (high - low) / 15, low
    for _ in range(20):
        codes = ((groups - offset) / step).round().clamp(0, 15)
        offset = (groups - codes * step).mean(-1, keepdim=True)
    return (codes * step + offset - groups).square().sum().item()


def integer_zero_error(weight: torch.Tensor, size: int) -> float:
    grid = Grid(4, size)
    rounded = QuantizedLinear.nearest(weight, *min_max(grouped(weight, grid), grid), grid)
    return (rounded.dequantize() - weight).square().sum().item()


@torch.no_grad()
def test_no_weight_is_left_on_the_files_grid():
    """Whoever has that file's form would round for nothing, or for less than others. On other
    channels real zero-points gain what they gain on weights that were never rounded, and integer
    ones, which do not find the grid, neither gain nor lose.
    """
    sizes = dict(hidden_size=512, intermediate_size=1024, head_dim=64, layers=1)
    model = build_tiny("llama", False, num_attention_heads=8, **sizes).float()
    weights = {name: w.data for name, w in model.named_parameters() if "_proj" in name}
    never_rounded = {name: weight.clone() for name, weight in weights.items()}
    for weight in weights.values():
        weight.copy_(on_file_grid(weight))
    on_grid = {name: weight.clone() for name, weight in weights.items()}
    shuffle(model, seed=0)
    shuffled = {name: w.data for name, w in model.named_parameters() if "_proj" in name}

    def real_to_integer(found: dict, name: str, size: int) -> float:
        return real_zero_error(found[name], size) / integer_zero_error(found[name], size)

    for size, share in ((32, 0.01), (64, 0.8)):
        for name in weights:
            expected = real_to_integer(never_rounded, name, size)
            assert real_to_integer(on_grid, name, size) < share * expected
            assert 0.95 * expected < real_to_integer(shuffled, name, size) < 1.05 * expected
            as_before = integer_zero_error(on_grid[name], size)
            assert 0.93 < integer_zero_error(shuffled[name], size) / as_before < 1.07
