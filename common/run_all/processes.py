"""Scripts run in processes that have everything imported: each is a fork of one that has done
nothing else, so that torch, transformers and lm-eval are imported once, not for every script.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from functools import cache
from multiprocessing import connection, forkserver, resource_tracker, util
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import IO, Protocol, cast

from common.base import interrupts

# What the process that is forked has imported.
_IMPORTED = "common.run_all.imported"
# Held while a process is started, and while one that has ended is asked for its exit code:
# configurations run in threads.
_starting = threading.Lock()


class Ended(Protocol):
    """A process that may have ended."""

    def wait(self) -> int:
        """Wait for it. Returns its exit code, below 0 the signal that killed it."""

    def kill(self) -> None:
        """End it."""


@contextmanager
def running(
    words: list[str], environment: dict[str, str], interpreter: Path | None = None
) -> Iterator[tuple[IO[str], Ended]]:
    """Run a script of the project with its arguments. Gives what it prints, errors too, and the
    process.

    Args:
        environment: what differs from this process's.
        interpreter: another environment's Python, by which it is run.
    """
    with _starting:
        context = None if interpreter else _forking()
    if context is None:
        with subprocess.Popen(
            [str(interpreter or sys.executable), *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            # Other libraries draw a bar for every layer, which in a log is a line each.
            env={**({"TQDM_DISABLE": "1"} if interpreter else {}), **os.environ, **environment},
        ) as process:
            assert process.stdout is not None
            yield process.stdout, process
        return
    reading, writing = context.Pipe(duplex=False)
    with reading, os.fdopen(os.dup(reading.fileno()), errors="replace") as output:
        with writing:
            child = context.Process(
                target=_run_script, args=(words, {**os.environ, **environment}, writing)
            )
            with _starting:
                child.start()
        yield output, _Child(child)


class _Child:
    """`Ended`, of a process of multiprocessing's."""

    def __init__(self, process):
        self._process = process

    def wait(self) -> int:
        connection.wait([self._process.sentinel])
        # Whoever starts a process asks all others for their exit codes, which only one can read:
        # the other would take it for 255.
        with _starting:
            self._process.join()
            return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()


def begin() -> ForkServerContext | None:
    """Start the process that others are forked from, if it is not there, without waiting for its
    imports. None where nothing can be forked.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return None
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([_IMPORTED])
    resource_tracker.ensure_running()  # first: it lets Ctrl-C through once it is started
    # Ctrl-C waits, and what is started inherits that, until `imported` lets it through: a Python
    # that starts would show where it was.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with chdir(Path(__file__).parents[2]):  # where it looks modules up
            forkserver.ensure_running()
        interrupts.remove_then(util.get_temp_dir())  # its socket is in it
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


@cache
def _forking() -> ForkServerContext | None:
    """How processes are forked; None where they cannot be, or cannot use the GPU, which is so when
    some package has touched it while it was imported.
    """
    # Not before `begin`.
    import torch

    from common.base.progress import say

    context = begin()
    if context is None:
        return None
    trial = context.Process(target=try_gpu, args=(torch.cuda.device_count() > 0,))
    try:
        trial.start()
    except (EOFError, OSError):
        reason = "what they import ended the process that would be forked"
    else:
        trial.join()
        if not trial.exitcode:
            return context
        reason = (
            "a fork cannot use the GPU, as where an installed package uses it when it is imported "
            "(torchao does)"
        )
    say(f"each script imports all libraries anew, which takes some 20 s: {reason}")
    return None


def try_gpu(wanted: bool) -> None:
    """In a child: end with exit code 1 where a GPU is wanted and cannot be used."""
    import torch

    try:
        if wanted:
            torch.zeros(1, device="cuda")
    except Exception:
        # Of any type; the exit code says it.
        sys.exit(1)


def _run_script(words: list[str], environment: dict[str, str], writing: Connection) -> None:
    """In the child: become the script."""
    interrupts.let_through()
    with writing:
        for descriptor in (1, 2):
            os.dup2(writing.fileno(), descriptor)
    for stream in (sys.stdout, sys.stderr):
        cast(io.TextIOWrapper, stream).reconfigure(line_buffering=True)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")
