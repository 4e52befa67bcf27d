"""What spares tests work that others do as well: which files run in one process, and long texts
that are encoded once.
"""

import atexit
import copy
import gc
from pathlib import Path

import pytest

# The files that take longest. Those in a line share what takes long to be there: a process that
# forks others, the batch's own, the demo model, for which two workers would wait.
LONG = (
    ("bad_input", "hub", "hub_data", "check", "others_checkpoints", "parallel", "checkpoint"),
    ("kernels",),
    ("batch", "peers", "processes", "unchanged", "reuse"),
    ("resume",),
    ("demo", "windows"),
    *((name,) for name in ("browser", "tables", "online", "decoding", "first_screen")),
    *((name,) for name in ("gguf_export", "numerics", "architecture", "identity", "tuning")),
)
PLACES = {f"test_{name}.py": place for place, names in enumerate(LONG) for name in names}


def pytest_collection_modifyitems(items):
    """They come first, so that no worker is left with one of them at the end."""
    items.sort(key=lambda item: PLACES.get(item.path.name, len(LONG)))


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """What is imported with the tests stays: that it is looked through for garbage again and again
    takes a tenth of their time.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()
        atexit.register(gc.unfreeze)  # or Triton would say that it is not taken down
        gc.set_threshold(5_000, 10, 20)  # what is left to look through is little


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Files of a line go to one worker."""
    from xdist.scheduler import LoadFileScheduling

    class Together(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return str(PLACES.get(Path(file).name, file))

    return Together(config, log) if config.option.dist == "loadfile" else None


@pytest.fixture(scope="session", autouse=True)
def long_texts_encoded_once():
    """The demo's text is long in a tiny tokenizer's tokens, and most evaluations of tiny models
    take a few windows of it: what the same tokenizer made of a long text is remembered.
    """
    from transformers import BatchEncoding, PreTrainedTokenizerFast

    def copied(content):
        # A million numbers one by one take long.
        flat = isinstance(content, list) and content and isinstance(content[0], int)
        return content.copy() if flat else copy.deepcopy(content)

    encode, known = PreTrainedTokenizerFast._encode_plus, {}

    def remembering(self, text, *arguments, **options):
        if not isinstance(text, str) or len(text) < 20_000:
            return encode(self, text, *arguments, **options)
        own = self.backend_tokenizer.to_str()
        key = own, text, repr(arguments), repr(sorted(options.items()))
        if key not in known:
            known[key] = encode(self, text, *arguments, **options)
        found = known[key]
        copies = {name: copied(content) for name, content in found.items()}
        return BatchEncoding(copies, found.encodings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PreTrainedTokenizerFast, "_encode_plus", remembering)
        yield


@pytest.fixture(scope="session", autouse=True)
def short_generations():
    """Nobody reads what tiny models say when they are verified."""
    from common import verification

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verification, "GENERATION_TOKENS", 4)
        yield


def leave_plots_empty(patch: pytest.MonkeyPatch) -> None:
    """analyze_results.py lays its plots out and leaves their files empty, as drawing takes most of
    its time.
    """
    from common.reporting import plots

    def save(figure, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        plots.plt.close(figure)

    patch.setattr(plots, "save", save)


@pytest.fixture
def undrawn(monkeypatch):
    """Plots are not drawn in this test."""
    leave_plots_empty(monkeypatch)


@pytest.fixture(scope="module")
def undrawn_module():
    """Plots are not drawn in this file, fixtures of the module included."""
    with pytest.MonkeyPatch.context() as patch:
        leave_plots_empty(patch)
        yield
