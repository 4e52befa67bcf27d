"""How much of a GPU's memory is in use, as its driver tells it."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time


class Driver:
    """The GPU's memory in use, in GiB, by nvidia-smi; None where there is none."""

    def __init__(self):
        self.now = self.peak = None
        if shutil.which("nvidia-smi"):
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
            words = [
                "nvidia-smi",
                "-i",
                visible,
                "--query-gpu=memory.used",
                "--format=csv,noheader,nounits",
                "-lms",
                "50",
            ]
            self._process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
            threading.Thread(target=self._read, daemon=True).start()
            time.sleep(1)

    def _read(self) -> None:
        for line in self._process.stdout:
            if line.strip().isdigit():
                self.now = int(line) / 1024
                self.peak = max(self.peak or 0.0, self.now)

    def settle(self) -> float | None:
        """Wait until an earlier process's memory is free, begin a new peak. Returns what is in
        use."""
        before = None
        for _ in range(20):
            if self.now is None or (before is not None and self.now >= before):
                break
            before = self.now
            time.sleep(0.3)
        self.peak = self.now
        return self.now

    def stop(self) -> None:
        if self.now is not None:
            self._process.terminate()
