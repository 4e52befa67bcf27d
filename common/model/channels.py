"""Other channels of the same model: in another order, or value heads in another basis. What writes
a channel and what reads it change alike, so the function stays.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from common.model.architecture import LinearGroup, family_of

# By how much `shuffle` turns the channels of a value head against each other: the standard
# deviation of the angles, in radians. A third of it leaves a part of the grid that they lay on;
# however far they turn the rounding error of o_proj moves by a percent or so.
TURN = 0.3


@torch.no_grad()
def shuffle(model: nn.Module, seed: int) -> None:
    """Take the weights of a causal LM off the grid of a 4-bit file, in place: draw another order of
    the channels of the hidden state and of the MLP, so that no group is a block of the file, and
    for those of a value head, which may all be in one group, another order and a turn of each two
    neighbours. Weights but v_proj's and o_proj's stay what they are, to the last bit.
    """
    generator, decoder = torch.Generator().manual_seed(seed), model.model
    hidden = torch.randperm(model.config.hidden_size, generator=generator)
    for reader in {decoder.embed_tokens.weight, model.lm_head.weight}:  # one where they are tied
        reader.data = reader.data[:, hidden]
    decoder.norm.weight.data = decoder.norm.weight.data[hidden]
    for layer in decoder.layers:
        family = family_of(layer)
        for name in family.norms:
            norm = layer.get_submodule(name)
            norm.weight.data = norm.weight.data[hidden]
        for name in (name for group in family.reading for name in group.linears):
            linear = layer.get_submodule(name)
            linear.weight.data = linear.weight.data[:, hidden]
        for group in family.writing:
            for parameter in layer.get_submodule(group.linears[0]).parameters():
                parameter.data = parameter.data[hidden]  # weight [out, in], bias [out]
        values, mlp = family.writing
        heads, _, size = values.heads(values.in_features(layer), model.config)
        turn_values(layer, torch.stack([_turn(size, generator) for _ in range(heads)]))
        reorder(layer, mlp, torch.randperm(mlp.in_features(layer), generator=generator)[None])


def _turn(size: int, generator: torch.Generator) -> Tensor:
    """An orthogonal matrix [size, size], float64: channels in another order, of which each two
    neighbours are turned by an angle.
    """
    order = torch.randperm(size, generator=generator)
    angles = TURN * torch.randn(size // 2, generator=generator, dtype=torch.float64)
    turn, first = torch.eye(size, dtype=torch.float64), torch.arange(0, size - 1, 2)
    turn[first, first] = turn[first + 1, first + 1] = angles.cos()
    turn[first, first + 1], turn[first + 1, first] = -angles.sin(), angles.sin()
    return turn[order]


def turn_values(module: nn.Module, turn: Tensor) -> None:
    """Change, in float64, the basis in which v_proj of a decoder layer hands a value head to
    o_proj. turn: orthogonal, [size, size] for all heads or [key-value heads, size, size].
    """
    group = family_of(module).writing[0]
    linear = module.get_submodule(group.linears[0])
    heads, queries, size = group.heads(linear.in_features, module.self_attn.config)
    turn = turn.to(linear.weight.device).expand(heads, size, size)
    for parameter in module.get_submodule(group.fed_by).parameters():
        rows = parameter.data[-heads * size :]  # of a weight [out, in] or bias [out]
        rows.copy_((turn.mT @ rows.double().view(heads, size, -1)).view(rows.shape))
    by_head = linear.weight.data.double().view(-1, heads, queries, size).transpose(0, 1)
    turned = (by_head.flatten(1, 2) @ turn).view(by_head.shape).transpose(0, 1)
    linear.weight.data = turned.reshape(linear.weight.shape).to(linear.weight.dtype)


def reorder(module: nn.Module, group: LinearGroup, order: Tensor) -> None:
    """Let the channels that the one linear of a group in a decoder layer reads change places: its
    columns and the rows that they come from. order: [key-value heads, size], where each of a head's
    channels comes from.
    """
    linear, rows = module.get_submodule(group.linears[0]), _places(order)
    queries = linear.in_features // len(rows)
    # Query heads lie one after the other, those that share a key-value head side by side.
    linear.weight.data = linear.weight.data[:, _places(order.repeat_interleave(queries, 0))]
    for parameter in _feeding(module, group):  # weight [out, in] or bias [out]
        # What gate_proj puts out is multiplied into it, so its rows go along.
        parts = [parameter[-len(rows) :]] if group.by_head else parameter.split(len(rows))
        for part in parts:
            part.copy_(part[rows])


def _places(order: Tensor) -> Tensor:
    """Where channels of all heads come from, [heads * size], of each head's own [heads, size]."""
    first = torch.arange(len(order), device=order.device) * order.shape[1]
    return (first.unsqueeze(1) + order).flatten()


def _feeding(module: nn.Module, group: LinearGroup) -> list[Tensor]:
    """The weights and biases of which rows are the input channels of a group."""
    family = family_of(module)
    (before,) = (each for each in family.groups if group.fed_by in each.linears)
    names = [group.fed_by] if group.by_head else before.linears
    return [each.data for name in names for each in module.get_submodule(name).parameters()]
