"""Memory on the host: the process's, as Linux tells it, and what is left."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path

import psutil

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident(peak: bool = False) -> int:
    """Bytes of resident memory now, or the most since the process began or `growth` was called.

    Raises:
        OSError: the system does not tell.
    """
    name = "VmHWM" if peak else "VmRSS"
    found = re.search(rf"^{name}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    if not found:
        raise OSError(f"{_STATUS} does not tell")
    return int(found[1]) * 1024


def available() -> int:
    """Bytes that processes can still take before others have to give some back."""
    return psutil.virtual_memory().available


def growth(work: Callable[[], object]) -> int | None:
    """Bytes by which the process's resident memory grows at most while `work` runs.

    None where the system does not tell.
    """
    try:
        # Freed memory that the allocator keeps would be used again without any growth.
        ctypes.CDLL(None).malloc_trim(0)
        _CLEAR.write_text("5")  # the peak starts again from here
        before = resident()
        work()
        return max(0, resident(peak=True) - before)
    except (OSError, AttributeError):
        return None
