"""One configuration of the batch: quantize, verify, evaluate, each in a process of its own."""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from common.base.errors import UserError
from common.base.files import json_or_none, unfinished_of, write_json
from common.base.progress import say
from common.checkpoint.unfinished import CANNOT_RESUME
from common.checkpoint.writer import METADATA_FILE
from common.model.source import MODELS_FOLDER
from common.results.documents import CONFIGURATIONS, STATUS_FILE
from common.results.hashes import checkpoint_hash
from common.results.naming import source_of
from common.results.reuse import WITHOUT_EFFECT, changed_sources, made_from
from common.run_all.processes import running

_REASON_LENGTH = 200


@dataclass
class Batch:
    """What all configurations of a run share."""

    model: str
    name: str
    results: Path
    overwrite: bool
    device: list[str]
    dtype: str
    evaluation: list[str]
    # By method, the options that its script is told.
    passed_on: dict[str, list[str]]
    status: dict[str, dict] = field(default_factory=dict)
    # GPUs that no configuration is using; None without --gpus, when nothing is said about which to
    # use.
    free: queue.Queue[str] | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def gpu(self) -> Iterator[dict[str, str]]:
        """While open a GPU belongs to the caller; gives the environment that lets processes see
        that one alone.
        """
        if self.free is None:
            yield {}
            return
        gpu = self.free.get()
        try:
            yield {"CUDA_VISIBLE_DEVICES": gpu}
        finally:
            self.free.put(gpu)

    def note(self, configuration: str, state: str, reason: str = "", **more) -> None:
        """Record the state of a configuration, where analyze_results.py finds it, and whose it is.
        How its checkpoint was made is kept.
        """
        with self.lock:
            file = self.results / self.name / STATUS_FILE
            # Another batch, of other configurations, may have written there meanwhile.
            self.status = {**self.status, **(json_or_none(file) or {})}
            before = self.status.get(configuration, {})
            kept = {"made": before["made"]} if "made" in before else {}
            self.status[configuration] = {
                "state": state,
                **({"reason": reason} if reason else {}),
                "source": source_of(self.model),
                **kept,
                **more,
            }
            write_json(file, self.status)

    def quantization_options(self, method: str) -> list[str]:
        """What a method's script is told that decides a checkpoint's weights."""
        words = [word for word in self.passed_on.get(method, []) if not _has_no_effect(word)]
        return [*words, *(["--dtype", self.dtype] if self.dtype != "auto" else [])]


def _has_no_effect(word: str) -> bool:
    """Whether this is a flag that changes nothing in a checkpoint."""
    name = word.removeprefix("--").removeprefix("no-").replace("-", "_")
    return word.startswith("--") and name in WITHOUT_EFFECT


class StepFailed(Exception):
    """A step of a configuration ended with an error; the message is its line."""


def step(
    title: str,
    words: list[str],
    log: Path,
    gpu: dict[str, str],
    interpreter: Path | None = None,
) -> str:
    """`run_logged`, showing the script's output and, at the end, how long it took.

    Args:
        gpu: environment that says which GPU to use; lines are shown with the configuration's name
            when it says so.
    """
    prefix = f"[{log.stem}] " if gpu else ""
    say(f"{prefix}--- {title}")

    def show(line: str) -> None:
        sys.stdout.write(prefix + line)
        sys.stdout.flush()

    began = time.monotonic()
    wrecked = run_logged(words, log, gpu, interpreter, show)
    say(f"{prefix}--- {title}: {time.monotonic() - began:.0f} s")
    return wrecked


def run_logged(
    words: list[str],
    log: Path,
    environment: dict[str, str],
    interpreter: Path | None = None,
    show: Callable[[str], object] = lambda line: None,
) -> str:
    """Run one script, keeping its output in `log`. Raises StepFailed with its error line. Returns
    its first warning of something wrecked, the worst.

    Args:
        words: its name and arguments.
        environment: what differs from this process's.
        interpreter: another environment's Python.
        show: is given every line as it comes.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    last, raised, error, wrecked, in_traceback = "", "", "", "", False
    # Line by line: whoever looks into it sees how far the script is.
    with (
        log.open("a", buffering=1) as file,
        running(words, environment, interpreter) as (output, process),
    ):
        for line in output:
            show(line)
            file.write(line)
            last = line.strip() or last
            if line.startswith("Traceback ("):
                in_traceback = True
            elif in_traceback and not line[0].isspace():
                # What was raised; libraries may explain it in further lines.
                raised, in_traceback = line.strip(), False
            if line.startswith(("error: ", "FAIL")):
                error = line.strip().removeprefix("error: ")
            if line.startswith("warning: ") and " is wrecked" in line:
                wrecked = wrecked or line.strip().removeprefix("warning: ")
        code = process.wait()
    if code:
        if code < 0:
            error = error or f"killed by signal {-code}" + (
                " (out of memory?)" if code == -9 else ""
            )
        raise StepFailed((error or raised or last or f"exit code {code}")[:_REASON_LENGTH])
    return wrecked


def run_configuration(batch: Batch, configuration: str) -> bool:
    """Quantize, verify and evaluate one configuration. Returns whether all went well."""
    wanted = CONFIGURATIONS[configuration]
    folder = MODELS_FOLDER / batch.name / configuration
    log = Path("logs") / batch.name / f"{configuration}.log"
    say(f"=== {configuration}")
    if batch.overwrite or not folder.is_dir():
        log.unlink(missing_ok=True)
    verified = batch.status.get(configuration, {}).get("verified")
    batch.note(configuration, "running")
    try:
        with batch.gpu() as gpu:
            verified = _run_steps(batch, configuration, folder, log, gpu, verified)
    except (StepFailed, UserError) as failure:
        say(f"=== {configuration} failed: {failure}")
        batch.note(
            configuration, "warning" if folder.is_dir() and wanted else "failed", str(failure)
        )
        return False
    batch.note(configuration, "done", **({"verified": verified} if verified else {}))
    return True


def _run_steps(
    batch: Batch,
    configuration: str,
    folder: Path,
    log: Path,
    gpu: dict[str, str],
    verified: str | None,
) -> str | None:
    """Quantize what is not there yet, verify, evaluate. Returns the hash of the checkpoint that was
    verified.

    Args:
        verified: the hash of the one that an earlier run verified.
    Raises:
        StepFailed: a step ended with an error, what is there was made with other options, or a part
            of it is wrecked.
    """
    wanted = CONFIGURATIONS[configuration]
    evaluate = [*batch.device, *batch.evaluation, "--results-dir", str(batch.results)]
    evaluate += [] if batch.overwrite else ["--reuse"]
    if wanted is None:
        step(
            "evaluate",
            ["common/baseline.py", "--model", batch.model, *evaluate],
            log,
            gpu,
        )
        return None
    method, bits = wanted
    found = None if batch.overwrite or (folder / METADATA_FILE).is_file() else _hash(batch, folder)
    if found:
        _check_made(batch, configuration, method, folder, found)
        say(f"{folder} is finished, with the same options; there is nothing to resume")
    else:
        words = [f"quantize_{method}.py", "--model", batch.model, "--bits", str(bits)]
        words += ["--output", str(folder), *batch.device, *batch.passed_on.get(method, [])]
        # What is there is not made again: --resume ends at once, or refuses it for its options.
        begun = not folder.is_dir() and unfinished_of(folder).is_dir()
        new = batch.overwrite or not folder.is_dir()
        extra = ["--overwrite"] if batch.overwrite else []
        if not extra and (begun or folder.is_dir()):
            extra = ["--resume"]
        try:
            wrecked = step("quantize", [*words, *extra], log, gpu)
        except StepFailed as failure:
            # What was begun, and not finished, with other options is worth less than these.
            if not begun or CANNOT_RESUME not in str(failure):
                raise
            say(f"{configuration}: started again, as {failure}")
            wrecked = step("quantize", words, log, gpu)
        if new and (folder / METADATA_FILE).is_file():
            batch.note(configuration, "running", made={})  # not what one before it was
        else:
            found = _note_made(batch, configuration, method, folder, wrecked)
    # Noted where there is no metadata for verification to read it from.
    if reason := batch.status[configuration].get("made", {}).get("wrecked"):
        raise StepFailed(reason)
    if found is None or found != verified or batch.overwrite:
        words = ["verify_model.py", "--model-path", str(folder), *batch.device]
        step("verify", words, log, gpu)
    else:
        say(f"{configuration}: verified before")
    words = ["common/evaluation.py", "--model-path", str(folder), "--baseline", batch.model]
    try:
        step("evaluate", [*words, *evaluate], log, gpu)
    finally:
        if found is None:
            # The evaluation has hashed the checkpoint beside other work, and its files were old
            # enough by then for that to be remembered.
            found = _note_made(batch, configuration, method, folder, None)
    return found


def _note_made(
    batch: Batch, configuration: str, method: str, folder: Path, wrecked: str | None
) -> str | None:
    """Note what a checkpoint is made with, and return its hash.

    Args:
        wrecked: the part of it that is, as its script said.
    """
    found = _hash(batch, folder)
    made: dict = {"checkpoint": found, "options": batch.quantization_options(method)}
    if found and not (folder / METADATA_FILE).is_file():
        made.update(made_from=made_from(batch.model, method, batch.results), wrecked=wrecked)
    batch.note(configuration, "running", made=made)
    return found


def _hash(batch: Batch, folder: Path) -> str | None:
    """The hash of a checkpoint; None where there is none, or a broken one, as a later step says."""
    try:
        return checkpoint_hash(folder, batch.results) if folder.is_dir() else None
    except UserError:
        return None


def _check_made(batch: Batch, configuration: str, method: str, folder: Path, found: str) -> None:
    """Refuse a checkpoint without metadata unless it is known to be made with the same options.

    Args:
        found: the checkpoint's hash.
    Raises:
        StepFailed: naming the way out.
    """
    made, asked = (
        batch.status.get(configuration, {}).get("made", {}),
        batch.quantization_options(method),
    )
    if made.get("checkpoint") != found:
        reason = "it is not known what it was made with"
    elif made.get("options") != asked:
        both = made.get("options", []), asked
        then, now = (" ".join(words) or "the defaults" for words in both)
        reason = f"it was made with {then}, not {now}"
    elif changes := changed_sources(
        made.get("made_from", {}), made_from(batch.model, method, batch.results)
    ):
        reason = f"it was made with {', '.join(changes)}"
    else:
        return
    raise StepFailed(
        f"{folder} has no metadata and {reason}; --overwrite makes it again; to keep it, "
        "move it away first"
    )
