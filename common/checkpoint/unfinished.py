"""An output in the making: a folder beside the real one, that one process at a time owns and a
later one can go on with.

`<output>.unfinished` holds the shards of the finished layers and `progress.json`: what is being
made (so that nothing else goes on with it) and the record of each finished layer. The lock is the
kernel's, so a killed process holds none.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from pathlib import Path

from common.base.errors import UserError
from common.base.files import read_json, replacing, unfinished_of
from common.base.progress import say

PROGRESS_FILE, LOCK_FILE = "progress.json", "lock"
# What a refusal to go on with other work begins with; the batch looks for it.
CANNOT_RESUME = "cannot resume"


class UnfinishedFolder:
    """The folder of one run. records: of the layers that are finished, by index; tuned: what tuning
    the scales of all layers found, where the shards have the new ones; earlier_seconds: how long
    the runs took that this one goes on with, from when they took the folder to their last finished
    layer.

    Args:
        output: where the finished checkpoint will be.
        fingerprint: what decides the result: options, model, data, versions, device.
        resume: go on with what is there.
    """

    def __init__(self, output: Path, fingerprint: dict, resume: bool):
        self.path = unfinished_of(output)
        # As it will be read back: without tuples and such.
        self.fingerprint = json.loads(json.dumps(fingerprint))
        self.resume = resume
        self.records: list[dict] = []
        self.tuned: dict | None = None
        self.earlier_seconds = 0.0
        self._begun = time.perf_counter()
        self._lock: int | None = None

    def open(self) -> None:
        """Take the folder: lock it, and empty it or read how far it is.

        Raises:
            UserError: another process has it, or it was begun with something else.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.path / LOCK_FILE, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._unlock()
            raise UserError(
                f"another process is writing {self.path}; wait for it or choose another --output"
            ) from None
        try:
            if self.resume:
                self._read_progress()
        except UserError:
            self._unlock()
            raise
        if not self.records:
            for file in self.path.iterdir():
                if file.name != LOCK_FILE:
                    shutil.rmtree(file) if file.is_dir() else file.unlink()
            self._write_progress()

    def _read_progress(self) -> None:
        file = self.path / PROGRESS_FILE
        if not file.is_file():
            say(f"nothing to resume at {self.path}; starting from the first layer")
            return
        progress = read_json(file, "start again without --resume")
        begun = progress.get("fingerprint", {})
        names = sorted({*begun, *self.fingerprint})
        changes = [
            f"{name} {begun.get(name)} then, {self.fingerprint.get(name)} now"
            for name in names
            if begun.get(name) != self.fingerprint.get(name)
        ]
        if changes:
            raise UserError(
                f"{CANNOT_RESUME} {self.path}: {'; '.join(changes)}; run it as it was begun, or "
                "without --resume to start again"
            )
        self.records, self.tuned = progress["layers"], progress.get("tuned")
        if self.records:
            self.earlier_seconds = progress.get("seconds", 0.0)
            say(f"resuming {self.path} after {len(self.records)} layers")

    def finish_layer(self, record: dict) -> None:
        """Note that one more layer is written; what was noted stays readable whenever the process
        ends.
        """
        self.records.append(record)
        self._write_progress()

    def drop_after(self, layers: int) -> None:
        """Forget the layers from index `layers` on: their files are not as they should be. With
        tuned scales no layer is of use without the others.
        """
        del self.records[0 if self.tuned else layers :]
        self.tuned = None
        self._write_progress()

    def exchange(self, files: list[tuple[Path, Path]], tuned: dict) -> None:
        """Let files take the places of others, with all that was tuned. Killed in between, which
        takes no time, there is nothing to go on with.
        """
        records = list(self.records)
        self.drop_after(0)
        for new, old in files:
            new.replace(old)
        self.records, self.tuned = records, tuned
        self._write_progress()

    def _write_progress(self) -> None:
        seconds = self.earlier_seconds + time.perf_counter() - self._begun
        with replacing(self.path / PROGRESS_FILE) as unfinished:
            unfinished.write_text(
                json.dumps(
                    {
                        "fingerprint": self.fingerprint,
                        "layers": self.records,
                        "seconds": round(seconds, 3),
                        **({"tuned": self.tuned} if self.tuned else {}),
                    }
                )
            )

    @staticmethod
    def clean(output: Path) -> None:
        """Take away what belongs to the making alone, once the folder has its real name: a run
        killed before can go on.
        """
        for file in (*output.glob(f"{PROGRESS_FILE}*"), output / LOCK_FILE):
            file.unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of the folder. With no layer finished there is nothing to go on with, and it is
        removed.
        """
        if self._lock is None:
            return
        if self.path.is_dir() and not self.records:
            shutil.rmtree(self.path, ignore_errors=True)
        elif self.path.is_dir():
            say(
                f"{self.path} holds {len(self.records)} finished layers: the same command with "
                f"--resume goes on from there"
            )
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
