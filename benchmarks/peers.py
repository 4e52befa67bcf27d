"""Other libraries, each as its documentation says to use it, on our calibration tokens.

`PEERS` holds a function for each configuration of `common.results.peers`: of `Work` it makes a
`Quantized` model, in memory, which can be saved as a folder that transformers loads. Each raises
ImportError where its library is not installed (benchmarks/requirements.txt).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from common.base.files import write_json
from common.base.stopwatch import Stopwatch
from common.model.source import read_config


@dataclass(frozen=True)
class Work:
    """What a library is given.

    folder: the 16-bit model. windows: token ids [samples, length], None for a library that reads
    none. group_size: input channels that
    share a scale, of the libraries that have groups. watch: times reading the model apart.
    """

    folder: Path
    tokenizer: object
    windows: Tensor | None
    group_size: int
    device: torch.device
    watch: Stopwatch

    def load(self, **more):
        """The 16-bit model in its own type, on the device.

        Args:
            more: for `from_pretrained`; a library that quantizes while the model is read is given
                its settings here, and the time is its own then.
        """
        phase = "quantize" if more else "load"
        with self.watch(phase):
            return AutoModelForCausalLM.from_pretrained(
                self.folder,
                dtype="auto",
                device_map={"": self.device},
                use_safetensors=True,
                **more,
            ).eval()

    @property
    def tokens(self) -> Tensor:
        """The windows, of a library that needs them."""
        assert self.windows is not None
        return self.windows

    def rows(self) -> list[dict[str, list[list[int]]]]:
        """The windows as batches of one, lists of token ids and of ones."""
        return [
            {"input_ids": [window.tolist()], "attention_mask": [[1] * len(window)]}
            for window in self.tokens
        ]


@dataclass(frozen=True)
class Quantized:
    """A model in memory, and what writes it to a folder.

    dense_bytes: where the folder holds the weights as numbers of 16 bits, as the library has no
    other form that transformers reads: bytes that its own form takes, of all weights and of those
    with a code, and how many numbers the latter are.
    """

    model: nn.Module
    save: Callable[[Path], object]
    dense_bytes: tuple[int, int, int] | None = None


def _compress(work: Work, recipe: list, calibrated: bool = True) -> Quantized:
    """By llm-compressor, with these modifiers."""
    from datasets import Dataset
    from llmcompressor import oneshot

    # It pins what it keeps between layers, which torch cannot without a GPU.
    if work.device.type == "cpu":
        from llmcompressor.pipelines.cache import IntermediatesCache

        if hasattr(IntermediatesCache, "pin_memory"):
            IntermediatesCache.pin_memory = lambda *_, **__: None
    model, more = work.load(), {}
    if calibrated:
        rows = {
            "input_ids": work.tokens.tolist(),
            "attention_mask": torch.ones_like(work.tokens).tolist(),
        }
        more = {
            "dataset": Dataset.from_dict(rows),
            "max_seq_length": work.tokens.shape[1],
            "num_calibration_samples": len(work.tokens),
            "pad_to_max_length": False,
            "shuffle_calibration_samples": False,
        }
    with work.watch("quantize"):
        oneshot(model=model, processor=work.tokenizer, recipe=recipe, **more)
    return Quantized(model, lambda folder: model.save_pretrained(folder, save_compressed=True))


def _weights_only(work: Work) -> dict:
    """Settings of 4-bit weights with zero-points in groups, minimum to maximum."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weights = QuantizationArgs(
        num_bits=4, type="int", strategy="group", group_size=work.group_size, symmetric=False
    )
    return {
        "config_groups": {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)},
        "ignore": ["lm_head"],
    }


def round_to_nearest(work: Work) -> Quantized:
    """The control: nothing but rounding, ranges from minimum to maximum."""
    from llmcompressor.modifiers.quantization import QuantizationModifier

    return _compress(work, [QuantizationModifier(**_weights_only(work))], calibrated=False)


def llm_compressor_gptq(work: Work) -> Quantized:
    from llmcompressor.modifiers.gptq import GPTQModifier

    return _compress(work, [GPTQModifier(**_weights_only(work))])


def llm_compressor_awq(work: Work) -> Quantized:
    from llmcompressor.modifiers.awq import AWQModifier

    return _compress(work, [AWQModifier(**_weights_only(work))])


def llm_compressor_smoothquant(work: Work) -> Quantized:
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.smoothquant import SmoothQuantModifier

    return _compress(
        work,
        [
            SmoothQuantModifier(smoothing_strength=0.8),
            GPTQModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"]),
        ],
    )


def hqq(work: Work) -> Quantized:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    model, dtype = work.load(), None
    settings = BaseQuantizeConfig(nbits=4, group_size=work.group_size, axis=1)
    linears: dict[str, HQQLinear] = {}
    with work.watch("quantize"):
        for name, linear in list(model.model.layers.named_modules()):
            if isinstance(linear, nn.Linear):
                dtype = linear.weight.dtype
                linears[name] = HQQLinear(
                    linear, settings, compute_dtype=dtype, device=str(work.device)
                )
                model.model.layers.set_submodule(name, linears[name])
    coded = sum(
        tensor.nbytes
        for linear in linears.values()
        for tensor in (linear.W_q, linear.meta["scale"], linear.meta["zero"])
    )
    count = sum(linear.in_features * linear.out_features for linear in linears.values())
    rest = sum(
        parameter.nbytes for name, parameter in model.named_parameters() if "W_q" not in name
    )

    def save(folder: Path) -> None:
        """transformers cannot read HQQ's form any more (its reader is commented out), and
        compressed-tensors has no zero-points with a fraction: the weights go out as HQQ gives them
        back.
        """
        for name, linear in linears.items():
            with torch.device("meta"):
                dense = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None)
            dense.weight = nn.Parameter(linear.dequantize().to(dtype), requires_grad=False)
            if linear.bias is not None:  # a plain tensor on a GPU, where a module wants a parameter
                dense.bias = nn.Parameter(linear.bias.data, requires_grad=False)
            model.model.layers.set_submodule(name, dense)
        model.save_pretrained(folder)

    return Quantized(model, save, (coded + rest, coded, count))


def auto_round(work: Work) -> Quantized:
    from auto_round import AutoRound

    model = work.load()
    # The library takes batches of the size that it steps by.
    rows = [{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in work.tokens]
    size = min(8, len(rows))
    with work.watch("quantize"):
        rounding = AutoRound(
            model,
            scheme="W4A16",
            tokenizer=work.tokenizer,
            dataset=torch.utils.data.DataLoader(rows, batch_size=size),
            nsamples=len(rows),
            seqlen=work.tokens.shape[1],
            batch_size=size,
            iters=200,
            group_size=work.group_size,
            sym=False,
            device_map=str(work.device),
        )
        model, _ = rounding.quantize()

    def save(folder: Path) -> None:
        # Its own form cannot be written after `quantize`, and asks for one package more to be read
        # on a CPU. This one reads back the same (through optimum and GPTQModel).
        rounding.save_quantized(str(folder), format="auto_gptq")
        # GPTQModel's first choice on a Hopper card takes no rows that 128 does not divide, and
        # needs a compiler; its trainable kernels take every shape on every device.
        config = read_config(folder)
        config["quantization_config"]["backend"] = "auto_trainable"
        write_json(folder / "config.json", config)

    return Quantized(model, save)


def gptqmodel_gptq(work: Work) -> Quantized:
    """GPTQModel, called by optimum, as transformers does."""
    from optimum.gptq import GPTQQuantizer
    from transformers import GPTQConfig

    model = work.load()
    quantizer = GPTQQuantizer(
        bits=4,
        dataset=work.rows(),
        group_size=work.group_size,
        sym=False,
        model_seqlen=work.tokens.shape[1],
    )
    with work.watch("quantize"):
        model = quantizer.quantize_model(model, work.tokenizer)

    def save(folder: Path) -> None:
        # The tokens are no part of a configuration.
        settings = {**quantizer.to_dict(), "dataset": None}
        model.config.quantization_config = GPTQConfig.from_dict(settings)
        model.save_pretrained(folder)

    return Quantized(model, save)


def bitsandbytes_nf4(work: Work) -> Quantized:
    """Blocks of 64, which is its own size."""
    import bitsandbytes  # noqa: F401  (transformers would say it in other words)
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    model = work.load(quantization_config=settings)
    return Quantized(model, model.save_pretrained)


PEERS: dict[str, Callable[[Work], Quantized]] = {
    "rtn-4bit": round_to_nearest,
    "llmcompressor-gptq-4bit": llm_compressor_gptq,
    "llmcompressor-awq-4bit": llm_compressor_awq,
    "llmcompressor-smoothquant-8bit": llm_compressor_smoothquant,
    "hqq-package-4bit": hqq,
    "autoround-4bit": auto_round,
    "gptqmodel-gptq-4bit": gptqmodel_gptq,
    "bitsandbytes-nf4": bitsandbytes_nf4,
}
