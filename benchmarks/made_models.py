"""Models that a script makes to be measured on: where they are written, and that nothing else is
there.
"""

from __future__ import annotations

from pathlib import Path

from common.base.errors import UserError
from common.base.files import why_not_writable


def check_new(folder: Path) -> None:
    """Raises UserError where a folder is there already, or cannot be made."""
    if folder.exists():
        raise UserError(f"{folder} exists already; choose another folder")
    if reason := why_not_writable(folder.parent):
        raise UserError(f"{folder} cannot be written ({reason}); choose another folder")


def save_model(model, tokenizer, folder: Path) -> None:
    """Write a model of transformers with its tokenizer, and say what it is."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"{folder}: {model.config.model_type}, {len(model.model.layers)} layers")
