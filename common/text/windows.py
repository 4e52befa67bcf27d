"""Text to token windows for calibration and perplexity.

Calibration windows look like what the model sees in use. Each begins with the token that begins a
text (Llama's BOS), if the model has one; documents inside it do not begin with another, as in use
there is one, and its activations are like no other token's. A conversation ends as the chat
template ends it, plain text with the tokenizer's EOS, once. Where a document ends the next one
follows, and windows are cut without regard to where documents begin.

Perplexity windows are those of published tables (GPTQ's and AWQ's code): all rows of the text,
blank ones too, joined by a blank line and encoded in one piece, so that BOS, where the tokenizer
adds it, begins the first window and no other.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.base.errors import UserError
from common.text import chat
from common.text.data import demo_text, load_rows

# Chat text: instruct models are calibrated through their chat template, as they are used.
DEFAULT_DATA = "HuggingFaceH4/ultrachat_200k:train_sft"
DEFAULT_SAMPLES, DEFAULT_LENGTH = 128, 2048
DEMO_SAMPLES, DEMO_LENGTH = 16, 512
_TEXT_COLUMNS = ("text", "content", "messages", "conversations")
# Rows fetched from a hub data set for each window that is asked for: enough for short documents.
_ROWS_PER_WINDOW = 24
# Bytes to fetch for calibration text, apart from the ends of the files, which say where what is,
# and unless one row group is larger.
_TRAFFIC = 120_000_000
# Windows that are cut for each one that is used.
_CHOICE = 2


@dataclass(frozen=True)
class Windows:
    """Token windows [samples, length] (int64) and what identifies them."""

    tokens: Tensor
    source: str
    seed: int | None
    # What the chat template wrote as today's date, where one was used that writes it.
    template_date: str | None = None

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the shape and the token ids: equal fingerprints mean equal calibration."""
        digest = hashlib.sha256(str(tuple(self.tokens.shape)).encode())
        digest.update(self.tokens.to(torch.int64).numpy().tobytes())
        return digest.hexdigest()

    def describe(self) -> dict:
        samples, length = self.tokens.shape
        return {
            "data": self.source,
            "samples": samples,
            "length": length,
            "tokens": self.tokens.numel(),
            "seed": self.seed,
            "template_date": self.template_date,
            "fingerprint": self.fingerprint,
        }


def text_sample(windows: int | None = None, seed: int | None = None) -> tuple:
    """Which rows `data.load_rows` is asked for: for so many windows of calibration, or all: limit,
    seed, columns, budget.
    """
    return None if windows is None else _ROWS_PER_WINDOW * windows, seed, _TEXT_COLUMNS, _TRAFFIC


def load_texts(
    data: str,
    part: str,
    data_root: Path | None = None,
    windows: int | None = None,
    seed: int | None = None,
) -> tuple[list[str | list[dict]], str]:
    """Documents of a data set and the name of their source.

    Each is a text, empty where the row is blank, or a list of messages.

    Args:
        data: `demo`, a local file or a data set's address.
        part: which half of the demo's text, "calibration" or "evaluation".
    Raises:
        UserError: no rows, no column of text, or a row that holds neither a text nor messages.
    """
    if data == "demo":
        return [*demo_text(part)], "demo"
    loaded = load_rows(data, data_root, *text_sample(windows, seed))
    if not loaded.rows:
        raise UserError(f"{data} has no rows")
    column = next((name for name in _TEXT_COLUMNS if name in loaded.rows[0]), None)
    if column is None:
        raise UserError(
            f"{data} has none of the columns {', '.join(_TEXT_COLUMNS)}; it has "
            f"{', '.join(loaded.rows[0])}"
        )
    try:
        return [chat.document(row.get(column)) for row in loaded.rows], loaded.source
    except ValueError as error:
        raise UserError(
            f"{data} has a row whose {column} is {error}; wanted is a text or a list of messages "
            "{role, content} or {from, value}: convert it, or give other data"
        ) from None


def start_tokens(tokenizer) -> list[int]:
    """What a text of this model begins with: the special tokens that the tokenizer puts before it.

    Where it puts none, BOS if the chat template writes it once, in front (Llama 3's first
    tokenizers); a BOS that begins every message, as ChatML's `<|im_start|>` may be called, is part
    of the message.
    """
    plain, special = (
        tokenizer("a", add_special_tokens=flag)["input_ids"] for flag in (False, True)
    )
    if len(special) > len(plain):
        return special[: special.index(plain[0])] if plain and plain[0] in special else []
    bos = tokenizer.bos_token
    if not bos or not getattr(tokenizer, "chat_template", None):
        return []
    text = chat.render(
        tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
    )
    return [tokenizer.bos_token_id] if text.startswith(bos) and text.count(bos) == 1 else []


def encode_document(document: str | list[dict], tokenizer, start: list[int]) -> list[int]:
    """Token ids of a document, without the `start_tokens` in front, with what ends it, once.

    Raises:
        UserError: the chat template refuses the conversation, or writes nothing of it.
    """
    is_chat = False
    if isinstance(document, str):
        text = document
    elif not getattr(tokenizer, "chat_template", None):
        text = "\n\n".join(message["content"] for message in document)
    else:
        is_chat, text = True, chat.render(tokenizer, document)
        if not text.strip() and any(message["content"].strip() for message in document):
            raise UserError(
                "the model's chat template writes nothing of a conversation; give data "
                "of plain text instead"
            )
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if start and tokens[: len(start)] == start:
        tokens = tokens[len(start) :]
    eos = tokenizer.eos_token_id
    return tokens if is_chat or eos is None or tokens[-1:] == [eos] else [*tokens, eos]


def calibration_windows(
    data: str, tokenizer, samples: int, length: int, seed: int, data_root: Path | None = None
) -> Windows:
    """Draw `samples` windows of `length` tokens: documents in seeded order, joined, cut and
    sampled.

    The form of a window is described at the top of this file.

    Raises:
        UserError: the text does not suffice; says how much there is.
    """
    texts, source = load_texts(data, "calibration", data_root, samples, seed)
    rng = random.Random(seed)
    rng.shuffle(texts)
    start = start_tokens(tokenizer)
    body = length - len(start)
    needed = samples * body
    tokens: list[int] = []
    for text in (text for text in texts if text):
        tokens.extend(encode_document(text, tokenizer, start))
        if len(tokens) >= _CHOICE * needed:
            break
    if len(tokens) < needed:
        most = len(tokens) // max(body, 1)
        fewer = f"at most --calib-samples {most}" if most else "a smaller --calib-length"
        raise UserError(
            f"calibration data {data} has {len(tokens):,} tokens, {needed:,} are needed for "
            f"{samples} samples of {length}; use {fewer} or a larger --calib-data"
        )
    # More windows than needed, so that the seed chooses even where the text is one long document.
    chosen = rng.sample(range(len(tokens) // body), samples)
    windows = torch.tensor([tokens[i * body : (i + 1) * body] for i in chosen], dtype=torch.int64)
    if start:
        windows = torch.cat([torch.tensor(start).expand(samples, -1), windows], dim=1)
    return Windows(windows, source, seed, _date_in(texts, tokenizer))


def windows_of(options: argparse.Namespace, tokenizer, config) -> Windows:
    """The calibration windows that a quantize script's options ask for."""
    length = min(options.calib_length, config.max_position_embeddings)
    return calibration_windows(
        options.calib_data,
        tokenizer,
        options.calib_samples,
        length,
        options.seed,
        options.data_root,
    )


def evaluation_windows(
    data: str, tokenizer, samples: int | None, length: int, data_root: Path | None = None
) -> Windows:
    """The first `samples` consecutive windows of `length` tokens of an evaluation text, or all for
    None; fewer if the text ends before.

    The form of a window is described at the top of this file. What is left over at the end, less
    than a window, is not evaluated. Conversations follow each other as in calibration, after one
    BOS.

    Raises:
        UserError: the text does not fill one window.
    """
    texts, source = load_texts(data, "evaluation", data_root)
    plain = [text for text in texts if isinstance(text, str)]
    if len(plain) == len(texts):
        # Made a tensor here: transformers goes over a text's tokens one by one for it.
        tokens = torch.tensor(tokenizer("\n\n".join(plain), verbose=False)["input_ids"])
    else:
        start = start_tokens(tokenizer)
        documents = [encode_document(text, tokenizer, start) for text in texts if text]
        tokens = torch.tensor([*start, *itertools.chain(*documents)])
    count = len(tokens) // length if samples is None else min(samples, len(tokens) // length)
    if count == 0:
        raise UserError(f"{data} has {len(tokens):,} tokens, fewer than one window of {length}")
    windows = tokens[: count * length].view(count, length).clone()
    return Windows(windows, source, None, _date_in(texts, tokenizer))


def _date_in(texts: list[str | list[dict]], tokenizer) -> str | None:
    return None if all(isinstance(text, str) for text in texts) else chat.template_date(tokenizer)
