"""A checkpoint uploaded to the hub, when it is asked for."""

from __future__ import annotations

import json
from pathlib import Path

from httpx import HTTPError
from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from common.base.errors import UserError
from common.base.machine import command
from common.base.progress import say
from common.checkpoint import metadata
from common.checkpoint.public import without_paths
from common.checkpoint.writer import METADATA_FILE


def check_publishing(repository: str) -> None:
    """Refuse an upload that cannot succeed, before anything else is done for it.

    Args:
        repository: OWNER/NAME on the hub.
    Raises:
        UserError: a name of another form, no token, or HF_HUB_OFFLINE is set.
    """
    try:
        validate_repo_id(repository)
        well_formed = repository.count("/") == 1
    except HFValidationError:
        well_formed = False
    if not well_formed:
        raise UserError(f"--push-to-hub {repository} is not of the form OWNER/NAME")
    if constants.HF_HUB_OFFLINE:
        raise UserError("--push-to-hub needs the hub, and HF_HUB_OFFLINE is set: unset it")
    if not get_token():
        raise UserError(
            f"--push-to-hub needs a token that may write: run `{command('hf')} auth login`, or set "
            "HF_TOKEN"
        )


def publish(folder: Path, repository: str) -> None:
    """Upload the files of a checkpoint in one commit, to a repository that is made, private, where
    there is none. Metadata goes without paths of this machine.

    Args:
        repository: OWNER/NAME on the hub, as `check_publishing` allows it.
    Raises:
        UserError: the hub refuses, or cannot be reached.
    """
    disable_progress_bars()
    files = sorted(
        file for file in folder.iterdir() if file.is_file() and not file.name.startswith(".")
    )
    say(f"uploading {len(files)} files, {sum(file.stat().st_size for file in files) / 1e6:.1f} MB")
    api = HfApi()
    try:
        # One that exists stays as public as it is.
        url = api.create_repo(repository, private=True, exist_ok=True)
        additions = [CommitOperationAdd(file.name, _content(file)) for file in files]
        api.create_commit(repository, additions, commit_message=f"Upload {folder.resolve().name}")
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403, 404):
            raise UserError(
                f"the hub does not let this token write to {repository} ({status}): check the "
                f"owner's name, or run `{command('hf')} auth login` with a token that may write"
            ) from None
        raise UserError(
            f"the hub refuses {repository} ({status}: {_one_line(error.server_message)})"
        ) from None
    # Connections that fail, also inside the library's threads, and front matter that is refused.
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        # The library's threads wrap what went wrong in them.
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        raise UserError(
            f"cannot upload to {repository} ({type(cause).__name__}: {_one_line(str(cause))}); "
            "run it again when that is mended"
        ) from None
    say(f"{folder} is at {url}")


def _content(file: Path) -> str | bytes:
    if file.name != METADATA_FILE:
        return str(file)
    record = metadata.read(file.parent)
    return json.dumps(without_paths(record or {}), indent=1).encode()


def _one_line(text: str | None) -> str:
    return " ".join((text or "no reason given").split())[:150]
