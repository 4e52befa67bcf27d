"""Under which names files are kept: models/<name>/<configuration> and results/<name>/.

The name is the last part of a model's id or folder. Where another model of that name has files
already, the owner goes before it: `unsloth--Llama-3.2-1B-Instruct`. A folder that is quantized is
never a baseline.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from common.base.errors import UserError
from common.base.files import json_or_none
from common.base.progress import say
from common.checkpoint import metadata
from common.checkpoint.writer import METADATA_FILE, is_quantized
from common.model.demo import DEMO_NAME
from common.model.source import MODELS_FOLDER
from common.results.documents import RESULTS_FOLDER, STATUS_FILE

BASELINE = "baseline"
_RESERVED = (BASELINE, STATUS_FILE.removesuffix(".json"))


@dataclass(frozen=True)
class Subject:
    """A model to evaluate.

    folder: its files. source: the 16-bit model that it is or was made from: a hub id, a folder's
    full path, or demo.
    name, configuration: where its results go.
    """

    folder: Path
    source: str
    name: str
    configuration: str

    @property
    def original(self) -> str:
        """The 16-bit model, to be opened: for a baseline the folder itself."""
        return str(self.folder) if self.configuration == BASELINE else self.source


def source_of(model: str) -> str:
    """One spelling of a model: hub ids as they are, folders as full paths, the demo's as demo."""
    path = Path(model)
    if model == "demo" or not path.is_dir():
        return model.rstrip("/")
    path = path.resolve()
    return "demo" if path.parts[-2:] == (DEMO_NAME, BASELINE) else str(path)


def filed_as(model: str, results_dir: Path = RESULTS_FOLDER) -> str:
    """The name of a model's folders among checkpoints and results.

    Args:
        model: hub id, folder or demo.
        results_dir: where results are; models/ is looked into too, so that both get the same name.
    Raises:
        UserError: every name for it is another model's.
    """
    source = source_of(model)
    if source == "demo":
        return DEMO_NAME
    parts = [part for part in Path(source).parts if part != "/"]
    if parts[-1] == BASELINE and len(parts) > 1:
        parts.pop()
    # One part suffices unless another model has it; the demo's name is always the demo's.
    names = ["--".join(parts[-count:]) for count in range(1, len(parts) + 1)]
    names = [name for name in names if name != DEMO_NAME]
    holders = {
        name: _sources(MODELS_FOLDER / name) | _sources(results_dir / name) for name in names
    }
    free = [name for name in names if holders[name] <= {source}]
    if not free:
        raise UserError(
            f"{' and '.join(names)} hold files of other models; move those of {model} or theirs to "
            "another folder"
        )
    name = next((name for name in free if source in holders[name]), free[0])
    others = holders.get(parts[-1], {"demo"}) - {source}
    if others:
        say(
            f"{parts[-1]} is the name of {', '.join(sorted(others))}; "
            f"files of {model} are kept under {name}"
        )
    return name


def _sources(folder: Path) -> set[str]:
    """The models that the checkpoints or results in a folder say they come from."""
    found = set()
    for file in [*folder.glob(f"*/{METADATA_FILE}"), *folder.glob("*.json")]:
        content = json_or_none(file)
        if content is None:
            continue  # whoever reads it for more will say so
        known = {METADATA_FILE: [content.get("model")], STATUS_FILE: content.values()}.get(
            file.name, [content]
        )
        found |= {
            source_of(one["source"])
            for one in known
            if isinstance(one, dict) and isinstance(one.get("source"), str)
        }
    return found


def subject_of(
    folder: Path, made_from: str | None = None, results_dir: Path = RESULTS_FOLDER
) -> Subject:
    """What a folder is: a quantized model or a baseline.

    Args:
        made_from: the 16-bit model of a quantized folder, where the folder does not say it or
            names a folder that is no longer there.
    Raises:
        UserError: no model, a quantized one that does not say what it was made from, or one that
            says it was made from another model than `made_from`.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give the --output of a quantize script")
    record = metadata.read(folder)
    if record is None and not is_quantized(folder):
        if made_from is not None:
            raise UserError(
                f"{folder} is not quantized, so it is a baseline itself; leave --baseline out"
            )
        return baseline_of(str(folder), folder, results_dir)
    source = made_from if record is None else _recorded_source(folder, record, made_from)
    if source is None:
        raise UserError(
            f"{folder} is quantized but does not say what it was made from; name its 16-bit model "
            "with --baseline"
        )
    configuration = folder.resolve().name
    if configuration in _RESERVED:
        raise UserError(
            f"{folder} is quantized, and {configuration}.json is kept for something else; "
            "rename the folder"
        )
    return Subject(folder, source_of(source), filed_as(source, results_dir), configuration)


def _recorded_source(folder: Path, record: dict, made_from: str | None) -> str:
    """The 16-bit model that a checkpoint's metadata names, or where that is now."""
    recorded = record["model"]["source"]
    if not isinstance(recorded, str):
        raise UserError(
            f"{folder / METADATA_FILE} is damaged; quantize again with --overwrite, or delete it "
            "and name the model that the checkpoint was made from with --baseline"
        )
    if made_from is None or source_of(made_from) == source_of(recorded):
        return recorded
    if Path(recorded).is_absolute() and not Path(recorded).is_dir():
        say(f"{folder} was made from {recorded}, which is not there; {made_from} is taken for it")
        return made_from
    raise UserError(
        f"{folder} was made from {recorded}, not from {made_from}; leave --baseline out, or "
        f"quantize {made_from}"
    )


def baseline_of(model: str, folder: Path, results_dir: Path = RESULTS_FOLDER) -> Subject:
    """The 16-bit model with this id and these files. Raises UserError when it is quantized."""
    if is_quantized(folder):
        raise UserError(
            f"{folder} is quantized, so it is no baseline; give the 16-bit model it was made from "
            "with --baseline"
        )
    return Subject(folder, source_of(model), filed_as(model, results_dir), BASELINE)
