"""Where a 16-bit model comes from: its id on the hub and its licence, as far as they are known."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from common.base.files import json_or_none
from common.model.demo import HUB_ID, LICENCE, ORIGIN_FILE

README = "README.md"
_PAGE = "https://huggingface.co"
# The folder of a downloaded model in the hub's cache: models--<owner>--<name>/snapshots/<commit>.
_CACHED = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/[0-9a-f]+$")
# What a model card's front matter says of a licence.
_LICENCE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Origin:
    """hub_id: None where it is not known. licence: in a model card's keys, empty where no one says
    it.
    """

    hub_id: str | None
    licence: dict[str, str] = field(default_factory=dict)


def origin_of(model: str, folder: Path) -> Origin:
    """The origin of a model. Nothing is guessed: a folder's name is no id.

    Args:
        model: hub id, folder or `demo`.
        folder: its files.
    """
    if model == "demo" or "wheel" in (json_or_none(folder / ORIGIN_FILE) or {}):
        return Origin(HUB_ID, {"license": LICENCE})
    hub_id = None if Path(model).is_dir() else model
    if cached := _CACHED.search(folder.resolve().as_posix()):
        hub_id = "/".join(cached.groups())
    card = folder / README
    if hub_id and not card.is_file():
        card = _fetch_card(hub_id) or card
    said = {**(json_or_none(folder / "config.json") or {}), **_front_matter(card)}
    licence = {key: said[key] for key in _LICENCE_KEYS if isinstance(said.get(key), str)}
    link = licence.get("license_link", "")
    if link and "://" not in link:
        # A file beside the base model's weights, which is not beside the checkpoint's.
        del licence["license_link"]
        if hub_id:
            licence["license_link"] = f"{_PAGE}/{hub_id}/blob/main/{link.removeprefix('./')}"
    return Origin(hub_id, licence)


def _fetch_card(hub_id: str) -> Path | None:
    """The model card of a model on the hub; None where it has none or cannot be had."""
    from httpx import HTTPError
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(hub_id, README))
    except (OSError, ValueError, HTTPError):
        return None


def _front_matter(card: Path) -> dict:
    """What a model card says in its front matter; empty where there is none, or a damaged one."""
    from huggingface_hub import metadata_load
    from yaml import YAMLError

    try:
        return metadata_load(card) or {}
    except (OSError, ValueError, YAMLError):
        return {}
