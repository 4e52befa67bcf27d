"""Scripts in processes that need not import the largest libraries: each is a fork of one that has
imported them, and nothing that reads the settings of the hub or belongs to this project. What it
runs finds its environment as in a process that was started with it.

As a script it is that process: it reads a line of JSON for each run and answers with one.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from functools import cache
from pathlib import Path
from types import ModuleType

# What transformers, datasets and lm-eval take from others.
LIBRARIES = (
    "torch._dynamo",
    "torch.distributed.tensor",
    "sklearn.metrics",
    "pandas",
    "pyarrow.parquet",
    "scipy.stats",
    "chardet",
    "gguf",
    "httpx",
    "jinja2",
    "loguru",
    "pydantic",
)
# They read the environment when they are imported.
NOT_THOSE = {"huggingface_hub", "transformers", "datasets", "common"}
SECONDS = 600


class Forks:
    """The process."""

    def __init__(self):
        words = [sys.executable, str(Path(__file__).resolve())]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen(words, text=True, **pipes)

    def run(
        self, words: list[str], cwd: Path, environment: dict[str, str]
    ) -> subprocess.CompletedProcess:
        """What `python *words` gives in a folder, with this environment and no other.

        Args:
            words: a script and its arguments, or -c and code, or -m and a module.
        """
        with tempfile.TemporaryDirectory() as folder:
            files = [str(Path(folder, name)) for name in ("out", "err")]
            code = self._answer(words, str(cwd), environment, files, SECONDS)
            out, err = (Path(file).read_text() for file in files)
        return subprocess.CompletedProcess(words, code, out, err)

    def start(self, words: list[str], cwd: Path, environment: dict[str, str]) -> None:
        """As `run`, of a script that is not waited for; what it prints is lost."""
        self._answer(words, str(cwd), environment, [os.devnull] * 2, 0)

    def _answer(self, *asked) -> int:
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()


@cache
def forks() -> Forks:
    """Of this process, for as long as it lives."""
    found = Forks()
    atexit.register(found.close)
    return found


def become(
    words: list[str], cwd: str, environment: dict[str, str], files: list[str], seconds: int
) -> None:
    """In the fork: run a script, as Python does, for at most so many seconds; 0 for as long as it
    takes.
    """
    opened = [os.open(file, os.O_WRONLY | os.O_CREAT) for file in files]
    for descriptor, file in enumerate([os.open(os.devnull, os.O_RDONLY), *opened]):
        os.dup2(file, descriptor)
    signal.alarm(seconds)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    first, *rest = words
    if first == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.path.insert(0, "")
        sys.modules["__main__"] = main = ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), vars(main))
    elif first == "-m":
        sys.argv = rest
        sys.path.insert(0, "")
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(first).parent))
        runpy.run_path(first, run_name="__main__")


def ended(*asked) -> int:
    """`become`, and the exit code that Python ends with. What all forks have is not taken down."""
    code: int | str | None = 0
    try:
        become(*asked)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code or 0


def serve() -> None:
    sys.path.pop(0)  # this folder, which no script finds there
    gc.disable()
    for name in LIBRARIES:
        importlib.import_module(name)
    early = NOT_THOSE & {name.split(".")[0] for name in sys.modules}
    assert not early, f"imported before there is an environment for them: {early}"
    gc.freeze()  # or each fork would go over what all of them have
    gc.enable()
    for line in sys.stdin:
        *asked, seconds = json.loads(line)
        child = os.fork()
        if child == 0:
            os._exit(ended(*asked, seconds))
        waited_for = os.waitpid(child, 0)[1] if seconds else 0
        print(os.waitstatus_to_exitcode(waited_for), flush=True)


if __name__ == "__main__":
    serve()
    os._exit(0)
