"""Text to token windows for calibration and perplexity."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.data import demo_text, load_rows
from common.errors import UserError

# Chat text: instruct models are calibrated through their chat template, as they are used.
DEFAULT_DATA = "HuggingFaceH4/ultrachat_200k:train_sft"
DEFAULT_SAMPLES, DEFAULT_LENGTH = 128, 2048
DEMO_SAMPLES, DEMO_LENGTH = 16, 512
_TEXT_COLUMNS = ("text", "content", "messages", "conversations")
# Rows fetched from a hub data set for each window that is asked for: enough for short documents.
_ROWS_PER_WINDOW = 24
# Bytes to fetch for calibration text, apart from the ends of the files, which say where what is.
_TRAFFIC = 120_000_000
# Windows that are cut for each one that is used.
_CHOICE = 2


@dataclass(frozen=True)
class Windows:
    """Token windows [samples, length] (int64) and what identifies them."""

    tokens: Tensor
    source: str
    seed: int | None

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the shape and the token ids: equal fingerprints mean equal calibration."""
        digest = hashlib.sha256(str(tuple(self.tokens.shape)).encode())
        digest.update(self.tokens.to(torch.int64).numpy().tobytes())
        return digest.hexdigest()

    def describe(self) -> dict:
        return {"data": self.source, "samples": self.tokens.shape[0], "length": self.tokens.shape[1],
                "tokens": self.tokens.numel(), "seed": self.seed, "fingerprint": self.fingerprint}


def load_texts(data: str, part: str, tokenizer, data_root: Path | None = None, limit: int | None = None,
               seed: int | None = None) -> tuple[list[str], str]:
    """Documents of a data set as plain text, and the name of their source.

    Args:
        data: `demo`, a local file or a data set's address.
        part: which half of the demo's text, "calibration" or "evaluation".
        tokenizer: whose chat template turns rows of messages into text.
    """
    if data == "demo":
        return demo_text(part), "demo"
    loaded = load_rows(data, data_root, limit, seed, _TEXT_COLUMNS, _TRAFFIC)
    if not loaded.rows:
        raise UserError(f"{data} has no rows")
    column = next((name for name in _TEXT_COLUMNS if name in loaded.rows[0]), None)
    if column is None:
        raise UserError(f"{data} has none of the columns {', '.join(_TEXT_COLUMNS)}; it has "
                        f"{', '.join(loaded.rows[0])}")
    values = [row[column] for row in loaded.rows if row.get(column)]
    return [_as_text(value, tokenizer) for value in values], loaded.source


def _as_text(value: str | list[dict], tokenizer) -> str:
    if isinstance(value, str):
        return value
    if getattr(tokenizer, "chat_template", None):
        return tokenizer.apply_chat_template(value, tokenize=False)
    return "\n\n".join(message["content"] for message in value)


def calibration_windows(data: str, tokenizer, samples: int, length: int, seed: int,
                        data_root: Path | None = None) -> Windows:
    """Draw `samples` windows of `length` tokens: documents in seeded order, joined, cut and sampled.

    Where the tokenizer starts every text with a token of its own (Llama's BOS), each window starts with it too.

    Raises:
        UserError: the text does not suffice; says how much there is.
    """
    texts, source = load_texts(data, "calibration", tokenizer, data_root, limit=_ROWS_PER_WINDOW * samples, seed=seed)
    rng = random.Random(seed)
    rng.shuffle(texts)
    start = _start_tokens(tokenizer)
    body = length - len(start)
    needed = samples * body
    tokens: list[int] = []
    for text in texts:
        tokens.extend(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if tokenizer.eos_token_id is not None:
            tokens.append(tokenizer.eos_token_id)
        if len(tokens) >= _CHOICE * needed:
            break
    if len(tokens) < needed:
        raise UserError(f"calibration data {data} has {len(tokens):,} tokens, {needed:,} are needed for {samples} samples "
                        f"of {length}; use at most --calib-samples {len(tokens) // max(body, 1)} or a larger --calib-data")
    # More windows than needed, so that the seed chooses even where the text is one long document.
    chosen = rng.sample(range(len(tokens) // body), samples)
    windows = torch.tensor([tokens[i * body:(i + 1) * body] for i in chosen], dtype=torch.int64)
    if start:
        windows = torch.cat([torch.tensor(start).expand(samples, -1), windows], dim=1)
    return Windows(windows, source, seed)


def evaluation_windows(data: str, tokenizer, samples: int, length: int, data_root: Path | None = None) -> Windows:
    """The first `samples` consecutive windows of `length` tokens of an evaluation text, fewer if it ends before."""
    texts, source = load_texts(data, "evaluation", tokenizer, data_root)
    tokens = tokenizer("\n\n".join(texts), return_tensors="pt", verbose=False)["input_ids"][0]
    count = min(samples, len(tokens) // length)
    if count == 0:
        raise UserError(f"{data} has {len(tokens):,} tokens, fewer than one window of {length}")
    return Windows(tokens[:count * length].view(count, length).clone(), source, None)


def _start_tokens(tokenizer) -> list[int]:
    plain, special = (tokenizer("a", add_special_tokens=flag)["input_ids"] for flag in (False, True))
    return special[:special.index(plain[0])] if plain and plain[0] in special else []
