"""Models whose linears, embedding and head stay packed in memory and are unpacked inside the matrix
product.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from common.base.errors import UserError
from common.checkpoint.format import open_checkpoint, unknown_form, weight_format
from common.checkpoint.tensors import stored_codes, stored_parts
from common.kernels import processor
from common.kernels.forms import PackedWeight, Rounded, Rounding, TwoBytes, pack
from common.kernels.inference import (
    as_rows,
    integer_matmul,
    packed_matmul,
    round_rows,
    unpack,
    wanted_rounding,
)
from common.model.architecture import FAMILIES, fill_buffers
from common.model.online import CONFIG_KEY
from common.numerics.grid import Grid

PACKED_BITS = (4, 8)
# The tensors of a `PackedWeight`.
WEIGHTS = ("packed", "scale", "zero_point", "kernel_scale")


class PackedLinear(nn.Module):
    """A linear on packed weights.

    Args:
        bias: [out] or None.
        activation_bits: 8 for inputs rounded per token as they come; a product of integers then.
    """

    def __init__(
        self, weight: PackedWeight, bias: Tensor | None, activation_bits: int | None = None
    ):
        super().__init__()
        self.activation_bits = activation_bits
        # The weights [out, in], for inputs of many rows, where somebody has room for them.
        self.dense: Tensor | None = None
        self.put(weight, bias)

    def put(self, weight: PackedWeight, bias: Tensor | None) -> None:
        """Replace the weights and the bias."""
        self.codes = weight
        for name in WEIGHTS:
            self.register_buffer(name, getattr(weight, name))
        self.register_buffer("bias", bias)

    def _apply(self, *arguments, **options) -> PackedLinear:
        """As for every module, which replaces its buffers by what they are elsewhere."""
        super()._apply(*arguments, **options)
        buffers = {name: getattr(self, name) for name in WEIGHTS}
        self.codes = replace(self.codes, **buffers)
        return self

    def wanted_rounding(self, inputs: Tensor) -> Rounding | None:
        """How inputs like these, of which rows and type count, are rounded here, if they are."""
        if self.activation_bits is not None:
            return Rounding(self.activation_bits)
        return wanted_rounding(inputs, self.codes)

    def forward(self, inputs: Tensor | Rounded | TwoBytes) -> Tensor:
        """Args: inputs: [..., in], or [rows, in] rounded already, as `wanted_rounding` says."""
        if self.dense is not None and isinstance(inputs, Tensor):
            if inputs.numel() > processor.FUSED_ROWS * inputs.shape[-1]:
                return functional.linear(inputs, self.dense, self.bias)
        if isinstance(inputs, Rounded):
            output = integer_matmul(inputs, self.codes)
        elif isinstance(inputs, TwoBytes) or self.activation_bits is None:
            output = packed_matmul(inputs, self.codes)
        else:
            rounded = cast(Rounded, round_rows(as_rows(inputs), Rounding(self.activation_bits)))
            output = integer_matmul(rounded, self.codes)
            output = output.view(*inputs.shape[:-1], output.shape[1])
        return output if self.bias is None else output + self.bias


def is_plain(linear: nn.Module) -> bool:
    """Whether a module is a linear on a plain matrix of numbers, and no other library's."""
    weight = getattr(linear, "weight", None)
    return (
        type(linear) is nn.Linear
        and isinstance(weight, nn.Parameter)
        and (type(weight.data) is Tensor and weight.is_floating_point())
    )


def stack(linears: list[PackedLinear]) -> PackedLinear:
    """One linear of all output channels of several that share their input; those become views of
    it.
    """

    def joined(tensors: list[Tensor | None], axis: int = 0) -> Tensor | None:
        return None if tensors[0] is None else torch.cat(tensors, axis)

    codes = [linear.codes for linear in linears]
    whole = replace(
        codes[0],
        packed=joined([part.packed for part in codes]),
        scale=joined([part.scale for part in codes]),
        zero_point=joined([part.zero_point for part in codes]),
        kernel_scale=joined([part.kernel_scale for part in codes], 1),
    )
    bias = joined([linear.bias for linear in linears])
    start = 0
    for linear, part in zip(linears, codes, strict=True):
        rows = slice(start, start + len(part.packed))
        linear.put(whole[rows], None if bias is None else bias[rows])
        start = rows.stop
    return PackedLinear(whole, bias, linears[0].activation_bits)


class PackedEmbedding(nn.Module):
    """An embedding whose rows are int8 codes with a scale each.

    Args:
        factor: what the family's own embedding multiplies by, if by anything.
    """

    def __init__(self, rows: PackedLinear, dtype: torch.dtype, factor: Tensor | None = None):
        super().__init__()
        self.rows, self.dtype = rows, dtype
        self.factor = None if factor is None else factor.to(dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = unpack(self.rows.codes[tokens.reshape(-1)], self.dtype).view(*tokens.shape, -1)
        return hidden if self.factor is None else hidden * self.factor


def prepare_for_processor(model: nn.Module) -> bool:
    """Bring a packed model's weights into the form of torch's products on a CPU. Returns whether
    that was done: False, and nothing is changed, where one of them has no such form.
    """
    linears = {module for module in model.modules() if isinstance(module, PackedLinear)}
    # Rows of an embedding are read one by one.
    rows = {module.rows for module in model.modules() if isinstance(module, PackedEmbedding)}
    if not all(
        processor.fits(linear.codes)
        and (linear not in rows or processor.is_row_of_bytes(linear.codes))
        for linear in linears
    ):
        return False
    for linear in linears:
        linear.put(processor.repack(linear.codes), linear.bias)
    return True


def unpack_for_prompts(model: nn.Module) -> None:
    """Hold a model's weights dense beside the packed ones where a CPU would unpack them again for
    each prompt. Takes the dense model's memory, too.
    """
    for module in model.modules():
        if isinstance(module, PackedLinear) and module.activation_bits is None:
            weight = module.codes
            if weight.kernel_scale is not None and not processor.is_row_of_bytes(weight):
                dtype = next(model.parameters()).dtype
                module.dense = processor.unpack_transposed(weight).T.to(dtype).contiguous()


def can_be_packed(config: dict, names: Iterable[str]) -> bool:
    """Whether a checkpoint can run on packed weights: only what is known exactly, anything else is
    left to transformers.

    Args:
        config: the content of its config.json.
        names: of all tensors in its files.
    """
    if CONFIG_KEY in config or unknown_form(config, names):
        return False
    stored = weight_format(config)
    grids = stored.grid, *stored.vocabulary.values()
    # Of 4 bits two channels of a group share a byte.
    pairs = all(grid.bits == 8 or (grid.group_size or 2) % 2 == 0 for grid in grids)
    return pairs and all(grid.bits in PACKED_BITS for grid in grids)


def load_packed(folder: Path, device: torch.device, dtype: torch.dtype):
    """The model in a checkpoint folder with its quantized weights packed.

    Raises:
        UserError: tensors are missing, damaged or do not fit the configuration.
    """
    content, tensors = open_checkpoint(folder)
    stored = weight_format(content)
    vocabulary = stored.vocabulary
    config = AutoConfig.for_model(
        **{key: value for key, value in content.items() if key != "quantization_config"}
    )
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)

    def linear(name: str, grid: Grid, bits: int | None = None) -> PackedLinear:
        parts = stored_parts(lambda part: tensors.read(part).to(device), tensors, name)
        bias = tensors.read(f"{name}.bias").to(device, dtype) if f"{name}.bias" in tensors else None
        try:
            codes, zero_point = stored_codes(parts, grid)
            return PackedLinear(
                pack(codes, parts["weight_scale"], zero_point, grid.bits), bias, bits
            )
        except KeyError as error:
            raise UserError(f"{folder}: {name} lacks its {error.args[0]}; quantize again") from None

    decoder = model.model
    fill_buffers(model, device)
    for index, layer in enumerate(decoder.layers):
        for name in FAMILIES[config.model_type].linears:
            layer.set_submodule(
                name, linear(f"model.layers.{index}.{name}", stored.grid, stored.activation_bits)
            )
    if vocabulary:
        if "model.embed_tokens" in vocabulary or config.tie_word_embeddings:
            rows = linear("model.embed_tokens", next(iter(vocabulary.values())))
            factor = getattr(decoder.embed_tokens, "embed_scale", None)
            decoder.embed_tokens = PackedEmbedding(rows, dtype, factor)
            if config.tie_word_embeddings:
                model.lm_head = rows
        if "lm_head" in vocabulary and not config.tie_word_embeddings:
            model.lm_head = linear("lm_head", vocabulary["lm_head"])
    for name, parameter in list(model.named_parameters()):
        if name != "lm_head.weight" or not config.tie_word_embeddings:
            owner, _, leaf = name.rpartition(".")
            value = nn.Parameter(tensors.read(name).to(device, dtype), requires_grad=False)
            if value.shape != parameter.shape:
                raise UserError(f"{folder}: {name} does not fit its config.json")
            setattr(model.get_submodule(owner), leaf, value)
    if isinstance(model.lm_head, nn.Linear) and config.tie_word_embeddings:
        model.lm_head.weight = decoder.embed_tokens.weight
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()
