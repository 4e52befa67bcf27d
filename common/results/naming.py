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
from common.checkpoint.foreign import could_be_ours
from common.checkpoint.writer import METADATA_FILE, is_quantized
from common.model.demo import DEMO_NAME
from common.model.located import find_model, is_gguf
from common.model.source import MODELS_FOLDER
from common.results.documents import CONFIGURATIONS, RESULTS_FOLDER, STATUS_FILE

BASELINE = "baseline"
_RESERVED = (BASELINE, STATUS_FILE.removesuffix(".json"))


@dataclass(frozen=True)
class Subject:
    """A model to evaluate.

    folder: its files, or its one GGUF file. source: the 16-bit model that it is or was made from: a
    hub id, a folder's full path, or demo.
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
    model: str | Path,
    made_from: str | None = None,
    results_dir: Path = RESULTS_FOLDER,
    name: str | None = None,
) -> Subject:
    """What a model is: quantized, by us or others, or a baseline.

    Args:
        model: as `find_model` takes it.
        made_from: the 16-bit model of a quantized one, where that does not say it or names a folder
            that is no longer there.
        name: under which a quantized one is filed; by default the last part of its id or folder, or
            the GGUF file's name.
    Raises:
        UserError: no model, a quantized one that does not say what it was made from, or one that
            says it was made from another model than `made_from`; a name that cannot be used.
    """
    folder = find_model(model)
    record = metadata.read(folder)
    # Read in any case: a damaged configuration is to be said before any work.
    quantized = is_gguf(folder) or is_quantized(folder)
    if record is None and not quantized:
        if name is not None:
            raise UserError(
                f"{model} is not quantized, so it is filed as baseline; leave --name out"
            )
        if made_from is not None:
            raise UserError(
                f"{model} is not quantized, so it is a baseline itself; leave --baseline out"
            )
        return baseline_of(str(model), folder, results_dir)
    source = made_from if record is None else _recorded_source(folder, record, made_from)
    if source is None:
        raise UserError(
            f"{model} is quantized but does not say what it was made from; name its 16-bit model "
            "with --baseline"
        )
    configuration = _configuration(model, folder, name, record)
    return Subject(folder, source_of(source), filed_as(source, results_dir), configuration)


def _configuration(model: str | Path, folder: Path, name: str | None, record: dict | None) -> str:
    """The name that a quantized model is filed under. Raises UserError for one that will not do.

    Args:
        record: its metadata, if it has any.
    """
    found = name
    if found is None:
        whole = folder.stem if is_gguf(folder) else folder.resolve().name
        found = whole if Path(model).exists() or is_gguf(folder) else str(model).split("/")[-1]
    if (
        found in CONFIGURATIONS
        and found != BASELINE
        and not _is_ours(folder, record, found, name is not None)
    ):
        raise UserError(
            f"{model} is not this project's {found}, whose results that name is kept for; "
            + ("give another" if name else "rename the folder, or evaluate it with another")
            + f" --name, such as theirs-{found}"
        )
    if found in _RESERVED:
        raise UserError(
            f"{model} is quantized, and {found}.json is kept for something else; "
            + ("name it with --name, or rename the folder" if name is None else "give another name")
        )
    if not found or found.startswith(".") or set(found) & set("/\\|"):
        raise UserError(f"{found!r} cannot be the name of a file; give another --name")
    return found


def _is_ours(folder: Path, record: dict | None, configuration: str, named: bool) -> bool:
    """Whether a folder holds our own checkpoint of a configuration. Its metadata says so; one that
    was saved without lies where those of the batch do, or has our format and, on its own, the name.

    Args:
        named: the name was given.
    """
    method, bits = CONFIGURATIONS[configuration] or ("", 0)
    if record is None:
        place = folder.resolve()
        usual = place.name == configuration and place.parent.parent == MODELS_FOLDER.resolve()
        return could_be_ours(folder) and (usual or not named)
    own = "library" not in record and record.get("method") == method
    return own and (record.get("grid") or {}).get("bits") == bits


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
    if _is_gone(recorded):
        say(f"{folder} was made from {recorded}, which is not there; {made_from} is taken for it")
        return made_from
    if _is_gone(made_from):
        raise UserError(
            f"there is no folder {made_from}; leave --baseline out, as {folder} says that it was "
            f"made from {recorded}"
        )
    raise UserError(
        f"{folder} was made from {recorded}, not from {made_from}; leave --baseline out, or "
        f"quantize {made_from}"
    )


def _is_gone(model: str) -> bool:
    """Whether this names a folder from the root on that is not there."""
    return Path(model).is_absolute() and not Path(model).is_dir()


def baseline_of(model: str, folder: Path, results_dir: Path = RESULTS_FOLDER) -> Subject:
    """The 16-bit model with this id and these files. Raises UserError when it is quantized."""
    if is_quantized(folder):
        raise UserError(
            f"{folder} is quantized, so it is no baseline; give the 16-bit model it was made from "
            "with --baseline"
        )
    return Subject(folder, source_of(model), filed_as(model, results_dir), BASELINE)
