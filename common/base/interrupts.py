"""Ctrl-C while libraries are imported. Native code in the middle of it aborts, or swallows the
exception, and a traceback out of some library tells nobody anything.
"""

from __future__ import annotations

import os
import shutil
import signal

# Of a process that Ctrl-C has ended, as shells have it.
CODE = 130

_folders: list[str] = []


def end_at_once() -> None:
    """From here on Ctrl-C ends the process without an exception. Where it is ignored, as in what a
    script runs in the background, it stays so.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def remove_then(folder: str) -> None:
    """Remove a folder, too, where Ctrl-C ends the process at once: nothing else would."""
    _folders.append(folder)


def raise_again() -> None:
    """From here on it is a KeyboardInterrupt again, for what cleans up."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def let_through() -> None:
    """In a new process: Ctrl-C is a KeyboardInterrupt, whatever it was while libraries were
    imported; ignored it stays.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _end(*_) -> None:
    os.write(2, b"interrupted\n")
    for folder in _folders:
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(CODE)
