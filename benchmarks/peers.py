"""Other libraries, each as its documentation says to use it: a function of a model in memory, token
windows [samples, length], a tokenizer and a group size, that quantizes the model's linears in
place. Each raises ImportError where its library is not installed.
"""

from __future__ import annotations

import tempfile

import torch
from torch import Tensor, nn


def _compress(model, windows: Tensor, tokenizer, recipe: list) -> None:
    from datasets import Dataset
    from llmcompressor import oneshot

    data = Dataset.from_dict(
        {"input_ids": windows.tolist(), "attention_mask": torch.ones_like(windows).tolist()}
    )
    # The library reads the configuration again, from where the model says that it comes from.
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        model.name_or_path = model.config._name_or_path = folder
        oneshot(
            model=model,
            processor=tokenizer,
            dataset=data,
            recipe=recipe,
            max_seq_length=windows.shape[1],
            num_calibration_samples=len(windows),
            pad_to_max_length=False,
            shuffle_calibration_samples=False,
        )


def _weights_only(group_size: int) -> dict:
    """Settings of 4-bit weights with zero-points in groups."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weights = QuantizationArgs(
        num_bits=4, type="int", strategy="group", group_size=group_size, symmetric=False
    )
    return {
        "config_groups": {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)},
        "ignore": ["lm_head"],
    }


def llm_compressor_gptq(model, windows: Tensor, tokenizer, group_size: int = 128) -> None:
    from llmcompressor.modifiers.gptq import GPTQModifier

    _compress(model, windows, tokenizer, [GPTQModifier(**_weights_only(group_size))])


def llm_compressor_awq(model, windows: Tensor, tokenizer, group_size: int = 128) -> None:
    from llmcompressor.modifiers.awq import AWQModifier

    _compress(model, windows, tokenizer, [AWQModifier(**_weights_only(group_size))])


def llm_compressor_smoothquant(model, windows: Tensor, tokenizer, group_size: int = 128) -> None:
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.smoothquant import SmoothQuantModifier

    _compress(
        model,
        windows,
        tokenizer,
        [
            SmoothQuantModifier(smoothing_strength=0.8),
            GPTQModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"]),
        ],
    )


def hqq(model, _windows: Tensor, _tokenizer, group_size: int = 64) -> None:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    settings = BaseQuantizeConfig(nbits=4, group_size=group_size, axis=1)
    for layer in model.model.layers:
        for name, linear in list(layer.named_modules()):
            if isinstance(linear, nn.Linear):
                layer.set_submodule(
                    name,
                    HQQLinear(
                        linear,
                        settings,
                        compute_dtype=linear.weight.dtype,
                        device=str(linear.weight.device),
                    ),
                )


def auto_round(model, windows: Tensor, tokenizer, group_size: int = 128) -> None:
    """Turns the model to bfloat16."""
    from auto_round import AutoRound

    # The library takes batches of the size that it steps by.
    rows = [{"input_ids": window, "attention_mask": torch.ones_like(window)} for window in windows]
    AutoRound(
        model,
        scheme="W4A16",
        tokenizer=tokenizer,
        dataset=torch.utils.data.DataLoader(rows, batch_size=8),
        nsamples=len(windows),
        seqlen=windows.shape[1],
        batch_size=8,
        iters=200,
        group_size=group_size,
        sym=False,
        device_map=str(next(model.parameters()).device),
    ).quantize()


PEERS = {
    "hqq 4-bit g64": hqq,
    "AutoRound, 200 iterations": auto_round,
    "llm-compressor GPTQ": llm_compressor_gptq,
    "llm-compressor SmoothQuant + GPTQ W8A8": llm_compressor_smoothquant,
    "llm-compressor AWQ": llm_compressor_awq,
}
