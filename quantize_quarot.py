#!/usr/bin/env python3
"""QuaRot: rotate the model so that no channel stands out, then quantize it with GPTQ.

    python quantize_quarot.py --bits 4 --output models/Llama-3.2-1B-Instruct/quarot-4bit
    python quantize_quarot.py --model demo --head-bits 8
    python quantize_quarot.py --model demo --act-bits 4 --kv-bits 4

Ashkboos et al. 2024, "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs",
https://arxiv.org/abs/2404.00456. The gain of every RMSNorm is multiplied into the linears that read
it; then a random Hadamard rotation R1 of the hidden state is multiplied into all that reads or
writes it, and a Hadamard rotation R2 of each value head into v_proj and o_proj. What is left free,
the scales between v_proj and o_proj and between up_proj and down_proj, is balanced first, and in
W4A16 the channels in between are put in an order (common/walk/ordering.py). Where a family
normalises what is added to the hidden state (Gemma 3), R1 does not fold: R2 alone is, and else
channels are balanced and ranges searched as GPTQ's are (common/walk/balancing.py). All of this
folds into the weights, in float64: the rotated model is a plain model with the same function. Its
embedding and head are no longer the same matrix, so a tied head is stored on its own. Weights are
quantized to W4A16.

With --act-bits or --kv-bits the inputs of the linears and the key-value cache are rounded as the
model runs, after the paper's online rotations R3 of queries and keys and R4 of down_proj's input.
With --act-bits R1 is not folded: what the norms put out is rotated as it comes, and before that
each channel is scaled, in the norm's gain or in up_proj, by what does the least harm (`align`). A
tied head stays tied then, unless --head-bits rounds it alone. Such a checkpoint does not load
plainly, by intent; verify_model.py and common/evaluation.py run it.
"""

import argparse

import common  # noqa: F401  # says in one line where libraries are missing

# isort: split
import torch
from torch import Tensor, nn

from common import cli
from common.base import parallel
from common.base.progress import say
from common.model.architecture import Family, LinearGroup, family_of
from common.model.channels import turn_values
from common.model.online import (
    KeyForm,
    OnlineTransforms,
    attach,
    attention_inputs,
    enable_attention,
)
from common.model.source import MODELS_FOLDER, SourceModel
from common.numerics.grid import QuantizedLinear
from common.numerics.hadamard import factors, rotate, rotation
from common.quantization import quantize
from common.results.naming import filed_as
from common.walk.balancing import balance, pair_scale, usable
from common.walk.gptq import SWEEPS, gptq_layer, ranges_of_rotated_weights, searched_ranges
from common.walk.inputs import group_inputs
from common.walk.method import Layer, Method
from common.walk.ordering import order_channels
from common.walk.scaling import fold_into_weights, fold_scale

# Rotated inputs are even, and need no more damping than the GPTQ paper's.
DAMPING = 0.01
# Shares of their range that activations and cache keep. The paper's is 0.9 for all activations; the
# best for each token loses a sixth less (docs/Quantization_Methods_Deep_Dive.md).
ACTIVATION_CLIPS, KV_CLIP = (1.0, 0.9, 0.8, 0.7, 0.6), 0.95
# Of the calibration text, for `align` and `key_form`.
ALIGN_TOKENS = 16384
# Rows that are rotated at once.
ROWS = 16384


def times(weight: Tensor, matrix: Tensor) -> Tensor:
    """weight [..., in] @ matrix in float64, some rows at a time, returned in the weight's own
    type."""
    matrix = matrix.to(weight.device)
    return torch.cat([(part.double() @ matrix).to(weight.dtype) for part in weight.split(ROWS)])


def fuse_norm(family: Family, norm: nn.Module, linears: list[nn.Linear]) -> None:
    """Multiply an RMSNorm's gain [hidden] into the columns of the linears that read it; the gain
    becomes one.
    """
    gain = family.gain(norm).double()
    for linear in linears:
        linear.weight.data = torch.cat(
            [(part.double() * gain).to(part.dtype) for part in linear.weight.data.split(ROWS)]
        )
    family.set_gain(norm, torch.ones_like(norm.weight))


def rotate_vocabulary(source: SourceModel, hidden: Tensor) -> None:
    """Rotate what writes the hidden state first and reads it last: embedding and head. hidden: R1
    [hidden, hidden].
    """
    source.untie()
    fuse_norm(source.family, source.model.model.norm, [source.model.lm_head])
    embedding, head = source.model.model.embed_tokens, source.model.lm_head
    embedding.weight.data = times(embedding.weight, hidden)
    head.weight.data = times(head.weight, hidden)


def balance_group(module: nn.Module, group: LinearGroup) -> None:
    """Make each row of what feeds the one linear of a group in a decoder layer as long as the
    columns that read it, without changing their product.

    Of all models with the same function this takes the same one, so that how evenly a file's
    channels happen to be scaled does not decide how well they are rounded. The rotations do that
    for the hidden state alone.
    """
    fold_into_weights(module, group, pair_scale(module, group))


def rotate_layer(module: nn.Module, hidden: Tensor | None, value: Tensor) -> None:
    """Rotate a decoder layer.

    Args:
        hidden: R1 [hidden, hidden], or None where it does not fold.
        value: R2 [head size, head size].
    """
    family = family_of(module)
    for group in family.reading if hidden is not None else ():
        linears = [module.get_submodule(name) for name in group.linears]
        fuse_norm(family, module.get_submodule(group.fed_by), linears)
        for linear in linears:
            linear.weight.data = times(linear.weight, hidden)
    balance_group(module, family.writing[1])
    for group in family.writing if hidden is not None else ():
        linear = module.get_submodule(group.linears[0])
        linear.weight.data = times(linear.weight.T, hidden).T.contiguous()
        if linear.bias is not None:
            linear.bias.data = times(linear.bias, hidden)
    rotate_values(module, value)


def rotate_values(module: nn.Module, value: Tensor) -> None:
    """Balance and rotate, head by head, what v_proj hands to o_proj. value: R2 [head size, head
    size].
    """
    balance_group(module, family_of(module).writing[0])
    turn_values(module, value)


def align(layer: Layer) -> None:
    """Scale the input channels of q/k/v, gate/up and down_proj so that rounding rotated inputs to
    few bits does the least harm.

    A rotated token is rounded in steps that follow its length, and an error reaches the output
    through all weights alike, so the expected error is E‖Dx‖² ‖W D⁻¹‖² up to a factor. Of all
    diagonal D the one with d² = ‖column of W‖ / root mean square of x has the smallest, (Σ ‖column‖
    rms)². (Full matrices in place of D are the subject of arXiv 2603.04359.)
    """
    squares = input_squares(layer)
    for group in layer.family.groups:
        if not group.by_head:
            columns = sum(layer.weight(name).square().sum(0) for name in group.linears)
            scale = usable((squares[group] / columns).pow(0.25))
            fold_scale(layer, group, parallel.from_first(scale))


def input_squares(layer: Layer) -> dict[LinearGroup, Tensor]:
    """For each linear group the sum of squares [in] of its inputs' channels. Of down_proj's, among
    which a few tokens are hundreds of times as large as the others, every token counts as one of
    length one.
    """
    device, down = next(layer.module.parameters()).device, layer.family.writing[1]
    sums = {
        group: torch.zeros(group.in_features(layer.module), device=device)
        for group in layer.family.groups
    }

    def receive(group: LinearGroup, inputs: Tensor) -> None:
        tokens = inputs.float().flatten(0, -2).square()
        if group == down:
            tokens /= tokens.sum(1, keepdim=True).clamp(min=1e-20)
        sums[group] += tokens.sum(0)

    with group_inputs(layer.module, receive):
        some_forward(layer)
    return {group: parallel.add(total) for group, total in sums.items()}


def key_form(layer: Layer) -> KeyForm:
    """How the layer's keys are best put before they are rounded, by its calibration inputs. Some
    models' keys are nearly constant (Qwen2's biases), and few bits would see little else.
    """
    attention = layer.module.self_attn
    shape = attention.config.num_key_value_heads, attention.head_dim
    device = next(layer.module.parameters()).device
    mean, key_square, query_square = torch.zeros(3, *shape, device=device, dtype=torch.float64)

    def receive(query: Tensor, key: Tensor) -> None:
        keys, queries = key.double(), query.double().unflatten(1, (len(mean), -1))
        mean.add_(keys.sum((0, 2)))
        key_square.add_(keys.square().sum((0, 2)))
        query_square.add_(queries.square().mean(2).sum((0, 2)))

    with attention_inputs(layer.module, receive):
        tokens = some_forward(layer)
    tokens = parallel.add(torch.tensor(float(tokens), device=device))
    return KeyForm.fitted(
        *(parallel.add(total) / tokens for total in (mean, key_square, query_square))
    )


def some_forward(layer: Layer) -> int:
    """Lead some of the calibration text through the layer. Returns its tokens."""
    device, seen = next(layer.module.parameters()).device, 0
    for chunk in layer.inputs:
        layer.forward(chunk.to(device))
        seen += chunk.shape[0] * chunk.shape[1]
        if seen >= ALIGN_TOKENS:
            break
    return seen


def rotate_online(
    module: nn.Module, transforms: OnlineTransforms, keys: KeyForm | None = None
) -> None:
    """Let a decoder layer apply its online rotations as it runs, and undo them in the weights that
    read what they turn.
    """
    family = family_of(module)
    turned = (*family.reading, family.writing[1]) if transforms.hidden else family.writing[1:]
    for name in [name for group in turned for name in group.linears]:
        weight = module.get_submodule(name).weight
        weight.data = rotate(weight.double(), *factors(weight.shape[1])).to(weight.dtype)
    attach(module, transforms, keys)


def argument_parser() -> argparse.ArgumentParser:
    parser = cli.quantization_parser(__doc__, bits=4)
    parser.add_argument(
        "--damping",
        type=float,
        default=DAMPING,
        help="added to the Gram matrix's diagonal, as a share of its mean (default: %(default)s)",
    )
    parser.add_argument(
        "--sweeps",
        type=int,
        default=SWEEPS,
        help="refinements of the rounded weights (default: %(default)s)",
    )
    for flag, what in (("--act-bits", "inputs of the linears"), ("--kv-bits", "key-value cache")):
        parser.add_argument(
            flag,
            type=int,
            choices=(4, 8),
            help=f"round the {what} to so many bits as the model runs; the "
            "checkpoint then loads through this project only (default: 16-bit)",
        )
    cli.add_catch_up(parser)
    cli.add_tune_scales(parser)
    return parser


def method(options: argparse.Namespace) -> Method:
    transforms = None
    if options.act_bits or options.kv_bits:
        transforms = OnlineTransforms(
            options.act_bits,
            options.kv_bits,
            ACTIVATION_CLIPS,
            KV_CLIP,
            hidden=bool(options.act_bits),
        )
    rotations: dict[str, Tensor] = {}

    def rewrite_model(source: SourceModel) -> None:
        attention = source.model.model.layers[0].self_attn
        rotations["value"] = rotation(attention.head_dim, options.seed + 1)
        folds = not source.family.normalises_output
        if folds and not options.act_bits:
            rotations["hidden"] = rotation(source.config.hidden_size, options.seed)
            rotate_vocabulary(source, rotations["hidden"])
        elif options.head_bits:
            if source.tied:
                say(
                    "the head is the embedding's matrix; --head-bits gives it one of its own, by "
                    "which the checkpoint grows"
                )
            source.untie()
        if not folds and not options.act_bits:
            say(
                f"{source.family.model_type} normalises what attention and MLP add to the residual "
                "stream, so R1 does not fold into the weights and value heads alone are rotated; "
                "with --act-bits the hidden state is rotated as it comes"
            )
        if transforms:
            enable_attention(source.model)

    def rewrite_layer(layer: Layer) -> None:
        if options.act_bits:
            align(layer)
            rotate_values(layer.module, rotations["value"])
        else:
            if "hidden" not in rotations:
                balance(layer)  # as GPTQ, where R1 evens nothing out
            rotate_layer(layer.module, rotations.get("hidden"), rotations["value"])
            if not transforms:  # R4 mixes the channels, in whatever order they are
                order_channels(layer)
        if transforms:
            form = None
            if options.kv_bits:
                form = transforms.keys[layer.index] = key_form(layer)
            rotate_online(layer.module, transforms, form)

    def quantize_layer(layer: Layer) -> dict[str, QuantizedLinear]:
        # By the hidden state's rotation, which most weights read.
        rotated = options.act_bits or "hidden" in rotations
        ranges = ranges_of_rotated_weights if rotated else searched_ranges
        return gptq_layer(layer, options.damping, options.sweeps, ranges)

    return Method(
        "quarot",
        quantize_layer,
        online=transforms,
        catch_up=options.catch_up,
        tune_steps=options.tune_scales,
        rewrite_model=rewrite_model,
        unties=True,
        rewrite_layer=rewrite_layer,
    )


def main() -> None:
    options = argument_parser().parse_args()
    if options.act_bits or options.kv_bits:
        name = f"quarot-w{options.bits}a{options.act_bits or 16}kv{options.kv_bits or 16}"
        options.output = options.output or MODELS_FOLDER / filed_as(options.model) / name
    cli.resolve_tuning(options, rounds_online=bool(options.act_bits or options.kv_bits))
    quantize(options, method(options))


if __name__ == "__main__":
    cli.run(main)
