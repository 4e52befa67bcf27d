"""A configuration of another library in the batch: quantized and evaluated in the environment that
holds those libraries, beside the one that everything else runs in.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from common.base.errors import UserError
from common.base.libraries import INTERPRETER
from common.base.progress import say
from common.model.source import MODELS_FOLDER
from common.results.peers import PEERS
from common.run_all.passed_on import parted
from common.run_all.steps import Batch, StepFailed, step

SCRIPT = "benchmarks/quantize_peer.py"
_SET_UP = "common/setup_environment.sh"
# Options of the batch, and of those that it passes on, that the script takes.
_TAKEN = (
    "device",
    "data-root",
    "group-size",
    "calib-data",
    "calib-samples",
    "calib-length",
    "seed",
)


def set_up_environment() -> None:
    """Make the environment where it is not there or not up to date. Raises UserError where it
    cannot be made.
    """
    command = f"source {_SET_UP} requirements.txt && setup_peers"
    if Path(_SET_UP).is_file() and subprocess.run(["bash", "-c", command]).returncode:
        raise UserError(
            "the environment of the other libraries (.peers) could not be set up, for the reason "
            "above; mend that, or leave --with-peers out"
        )
    check_environment()


def check_environment() -> None:
    """Raises UserError where there is none."""
    if not INTERPRETER.is_file():
        raise UserError(
            "--with-peers needs the environment of the other libraries, which "
            "bash run_all_quantization.sh --with-peers sets up"
        )


def taken(words: list[str]) -> list[str]:
    """Of options passed on, those that the script takes, with their values."""
    return [
        word
        for option in parted(words)
        if option[0].removeprefix("--").partition("=")[0] in _TAKEN
        for word in option
    ]


def run_peer(batch: Batch, name: str, passed_on: list[str]) -> bool:
    """Quantize and evaluate one configuration of another library. Returns whether all went well;
    where not, the status says why and the batch goes on.

    Args:
        passed_on: all options that the batch passes on to scripts.
    """
    folder = MODELS_FOLDER / batch.name / name
    log = Path("logs") / batch.name / f"{name}.log"
    say(f"=== {name}: {PEERS[name].title}")
    if batch.overwrite or not folder.is_dir():
        log.unlink(missing_ok=True)
    batch.note(name, "running")
    again = ["--overwrite"] if batch.overwrite else []
    quantize = [SCRIPT, name, "--model", batch.model, "--output", str(folder)]
    quantize += [*taken([*batch.device, *passed_on]), *again]
    evaluate = ["common/evaluation.py", "--model-path", str(folder), "--baseline", batch.model]
    evaluate += ["--name", name, *batch.device, *batch.evaluation]
    evaluate += ["--results-dir", str(batch.results), *([] if again else ["--reuse"])]
    try:
        with batch.gpu() as gpu:
            step("quantize", quantize, log, gpu, INTERPRETER)
            step("evaluate", evaluate, log, gpu, INTERPRETER)
    except StepFailed as failure:
        say(f"=== {name} failed: {failure}")
        batch.note(name, "failed", str(failure))
        return False
    batch.note(name, "done")
    return True
