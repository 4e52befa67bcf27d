"""Open a causal LM: find its files, read its tensors when they are needed.

A `SourceModel` keeps the embedding, the final norm and the head in memory and one decoder layer at
a time on the device, so that a model larger than the GPU can be walked through. Weights come from
safetensors only: no pickle is ever read.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from common.base.arguments import DEFAULT_MODEL
from common.base.errors import UserError, first_line
from common.base.files import read_json
from common.base.machine import command
from common.model.architecture import FAMILIES, fill_buffers
from common.model.demo import DEMO_NAME, prepare_demo_model
from common.model.fused import fuse_layers
from common.model.tensors import TensorReader

MODELS_FOLDER = Path("models")
# What a model needs, all at the top of its folder. Many repositories hold the same weights again in
# other forms (consolidated.safetensors, original/, *.bin, *.pth, *.gguf, onnx/).
MODEL_FILES = ("*.json", "*.jinja", "model*.safetensors", "tokenizer.model", "merges.txt")


def model_name(model: str) -> str:
    """The name under which a model's checkpoints and results are filed: the last part of its id or
    folder.
    """
    if model == "demo":
        return DEMO_NAME
    path = Path(model)
    if path.name == "baseline" and path.parent.name:
        return path.parent.name
    return path.resolve().name if path.is_dir() else model.rstrip("/").split("/")[-1]


def resolve_folder(model: str) -> Path:
    """The local folder with the files of `model`: a folder as it is, `demo` built on first use, a
    hub id downloaded.

    Raises:
        UserError: unknown or gated model, no network, or a folder that holds no model.
    """
    if model == "demo":
        return prepare_demo_model(MODELS_FOLDER / DEMO_NAME / "baseline")
    folder = Path(model)
    if folder.is_dir():
        _check_config(folder)
        return folder
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise UserError(
            f"model folder {model} does not exist; give a folder, a hub id such as "
            f"{DEFAULT_MODEL}, or demo"
        )
    return _download(model)


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download

    with hub_errors(model):
        return Path(
            snapshot_download(model, allow_patterns=list(MODEL_FILES), ignore_patterns=["*/*"])
        )


@contextmanager
def hub_errors(model: str) -> Iterator[None]:
    """While open, what the hub's library raises about `model` becomes a UserError."""
    from httpx import HTTPError
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    login = f"`{command('hf')} auth login`"
    try:
        yield
    except GatedRepoError:
        raise UserError(
            f"{model} is gated: accept its licence on its page of the hub, then run {login} "
            "(or set HF_TOKEN); --model demo needs no access"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"the hub has no model {model}, or it is private: check the name, run {login} if it is "
            "private, or use --model demo"
        ) from None
    except HFValidationError:
        raise UserError(
            f"{model} is neither a folder here nor a hub id; use --model demo to try things out"
        ) from None
    except (LocalEntryNotFoundError, OSError, HTTPError) as error:
        if HF_HUB_OFFLINE:
            raise UserError(
                f"{model} is not on this machine and HF_HUB_OFFLINE is set: unset it, give a "
                "local folder, or use --model demo"
            ) from None
        raise UserError(
            f"cannot download {model}: no network, or the hub does not answer "
            f"({type(error).__name__}); run the same again, which goes on where it broke off, give "
            "a local folder, or use --model demo"
        ) from None


def _check_config(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not a model: it has no config.json")


def read_config(folder: Path) -> dict:
    """The content of a model's config.json. Raises UserError when it is not there, or damaged."""
    _check_config(folder)
    return read_json(folder / "config.json", "quantize or download it again")


def load_config(folder: Path):
    """The model's configuration; refuses what the quantizers cannot work on.

    Raises:
        UserError: unreadable, not a supported architecture, or quantized already.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{folder}: config.json cannot be read ({first_line(error)})") from None
    if config.model_type not in FAMILIES:
        raise UserError(
            f"architecture {config.model_type} is not supported; supported are the families "
            f"{', '.join(FAMILIES)}"
        )
    if getattr(config, "quantization_config", None):
        raise UserError(f"{folder} is quantized already; give the 16-bit model it was made from")
    return config


def load_tokenizer(folder: Path):
    """The tokenizer in `folder`. Raises UserError when it is missing or broken."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the tokenizer libraries raise bare Exception for broken files
        raise UserError(f"{folder}: the tokenizer cannot be loaded ({first_line(error)})") from None


class SourceModel:
    """A 16- or 32-bit checkpoint, opened: small parts in memory, decoder layers read one by one.

    Args:
        model: hub id, folder or `demo`.
        device: where layers and hidden states are computed.
        dtype: the type they are computed in.
    """

    def __init__(self, model: str, device: torch.device, dtype: torch.dtype):
        self.name = model_name(model)
        self.folder = resolve_folder(model)
        self.config = load_config(self.folder)
        self.family = FAMILIES[self.config.model_type]
        self.device, self.dtype = device, dtype
        self.tensors = TensorReader(self.folder)
        self.storage_dtype = self.tensors.read("model.embed_tokens.weight").dtype
        self.tied = self.originally_tied = bool(self.config.tie_word_embeddings)
        # sdpa: windows are never padded, so no mask has to be built for it.
        self.config._attn_implementation = "sdpa"
        with torch.device("meta"):
            self.model = AutoModelForCausalLM.from_config(self.config, dtype=dtype)
        self.model.eval().requires_grad_(False)
        if device.type == "cuda":
            fuse_layers(self.model)
        decoder = self.model.model
        fill_buffers(self.model, device)
        self._fill(decoder.embed_tokens, "model.embed_tokens.")
        self._fill(decoder.norm, "model.norm.")
        if self.tied:
            self.model.lm_head.weight = decoder.embed_tokens.weight
        else:
            self._fill(self.model.lm_head, "lm_head.")

    @cached_property
    def tokenizer(self):
        """Its tokenizer. Raises UserError as `load_tokenizer`."""
        return load_tokenizer(self.folder)

    @property
    def num_layers(self) -> int:
        return self.config.num_hidden_layers

    def untie(self) -> None:
        """Give the head weights of its own, equal to the embedding's, so that each can be changed
        alone.
        """
        if self.tied:
            self.model.lm_head.weight = nn.Parameter(
                self.model.lm_head.weight.detach().clone(), requires_grad=False
            )
            self.tied = self.config.tie_word_embeddings = False

    def move_vocabulary(self, device: torch.device) -> None:
        """Move embedding and head, which take memory and are not needed between the first layer and
        the last.
        """
        head, embedding = self.model.lm_head, self.model.model.embed_tokens
        embedding.to(device)
        if self.tied:
            head.weight = embedding.weight
        else:
            head.to(device)

    def in_features(self) -> dict[str, int]:
        """Input channels of every linear that is quantized, by its name inside a decoder layer."""
        layer = self.model.model.layers[0]
        return {name: layer.get_submodule(name).in_features for name in self.family.linears}

    def _fill(self, module: nn.Module, prefix: str) -> None:
        state = {
            name.removeprefix(prefix): self.tensors.read(name).to(self.device, self.dtype)
            for name in self.tensors.names(prefix)
        }
        try:
            module.load_state_dict(state, assign=True)
        except RuntimeError as error:
            raise UserError(
                f"{self.folder}: the weights of {prefix.rstrip('.')} do not fit its config.json "
                f"({first_line(error)})"
            ) from None
        module.requires_grad_(False)

    def load_layer(self, index: int) -> nn.Module:
        """Decoder layer `index` with its weights, on the device."""
        layer = self.model.model.layers[index]
        self._fill(layer, f"model.layers.{index}.")
        return layer

    def release_layer(self, index: int) -> None:
        """Free the memory of a layer that is done with."""
        self.model.model.layers[index].to("meta")

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> Tensor:
        """Hidden states [batch, length, hidden] before the first layer, of token ids [batch,
        length].
        """
        embedded = self.model.model.embed_tokens(tokens.to(self.device))
        return self.family.scale_embedding(embedded, self.config)

    @torch.no_grad()
    def layer_arguments(self, length: int) -> list[dict]:
        """For each layer, the keyword arguments that the model's own forward gives it for windows
        of `length` tokens.

        Asking the model itself keeps this right for every architecture (rotary tables, sliding
        windows). The arguments have batch size 1 and broadcast.
        """
        seen: list[dict] = []
        originals = [layer.forward for layer in self.model.model.layers]

        def record(hidden_states, **arguments):
            seen.append(arguments)
            return hidden_states

        try:
            for layer in self.model.model.layers:
                layer.forward = record
            self.model.model(
                torch.zeros(1, length, dtype=torch.long, device=self.device), use_cache=False
            )
        finally:
            for layer, forward in zip(self.model.model.layers, originals, strict=True):
                layer.forward = forward
        return seen

    @torch.no_grad()
    def original_logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocabulary] as `logits`, through the final norm and head as they are in the
        source's files.
        """
        head = self.tensors.read(
            "model.embed_tokens.weight" if self.originally_tied else "lm_head.weight"
        )
        norm = copy.deepcopy(self.model.model.norm)
        norm.weight.data = self.tensors.read("model.norm.weight").to(self.device, self.dtype)
        logits = torch.nn.functional.linear(norm(hidden), head.to(self.device, self.dtype))
        return self.family.finish_logits(logits, self.config).float()

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocabulary] float32 of the last layer's hidden states [..., hidden]."""
        return self.head(hidden).float()

    def head(self, hidden: Tensor) -> Tensor:
        """The same in the model's own type, and where a gradient is wanted."""
        logits = self.model.lm_head(self.model.model.norm(hidden))
        return self.family.finish_logits(logits, self.config)
