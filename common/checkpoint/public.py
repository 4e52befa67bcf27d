"""What of a checkpoint's metadata and results may be shown to others: no paths of this machine."""

from __future__ import annotations

import shlex
from pathlib import Path

from common.model.source import model_name

# Options of a quantize script that decide nothing in the checkpoint, and those that matter only
# where there is calibration.
OF_THIS_MACHINE = (
    "output",
    "overwrite",
    "gguf",
    "resume",
    "save_metadata",
    "data_root",
    "device",
    "device_memory",
)
OF_CALIBRATION = ("calib_data", "calib_samples", "calib_length", "seed")


def without_path(text: str) -> str:
    """A path on this machine by its last name alone; anything else as it is."""
    path = Path(text).expanduser()
    return path.name if path.is_absolute() or text.startswith(".") or path.exists() else text


def without_paths(record: dict) -> dict:
    """A checkpoint's metadata without paths of this machine. A model's folder keeps a leading
    slash: it is a folder still, which is not to be found here, and no id on the hub.
    """
    made, options = record["model"], record["options"]
    source = made["source"]
    if source != "demo" and (Path(source).is_absolute() or Path(source).exists()):
        source = f"/{model_name(source)}"
    shown = {
        name: without_path(value) if isinstance(value, str) else value
        for name, value in options.items()
    }
    shown.update(model=source, output=None, data_root=None)
    calibration = record["calibration"]
    if calibration:
        calibration = {**calibration, "data": without_path(calibration["data"])}
    return {
        **record,
        "model": {**made, "source": source},
        "options": shown,
        "calibration": calibration,
    }


def command(record: dict) -> str:
    """The command that makes a checkpoint again, from its metadata: every option that decides
    something, also those left at their defaults, which may be others one day.
    """
    words = ["python", f"quantize_{record['method']}.py"]
    left_out = {*OF_THIS_MACHINE, *(() if record["calibration"] else OF_CALIBRATION)}
    options = {**record["options"], "dtype": record["compute_dtype"]}
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if name in left_out or value is None:
            continue
        if name == "symmetric":
            words.append("--symmetric" if value else "--asymmetric")
        elif isinstance(value, bool):
            words.append(flag if value else f"--no-{flag.removeprefix('--')}")
        else:
            words += [flag, shlex.quote(str(value).lstrip("/"))]
    return " ".join(words)
