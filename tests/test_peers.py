"""The batch with other libraries, and benchmarks/quantize_peer.py, of which stubs stand here."""

import importlib.metadata
import json
import sys

import pytest
from batch_stand_ins import NOTE
from conftest import ROOT, assert_user_error, run_script

from common.results.peers import PEERS

EVALUATION = ROOT / "common/evaluation.py"
SMALL = ["--data", "demo", "--limit", 2, "--windows", 2, "--window-length", 48]
SMALL += ["--tasks", "arc,perplexity"]

PEER = (
    NOTE + "name = a[1]; folder = pathlib.Path(a[a.index('--output') + 1])\n"
    "if name == 'autoround-4bit':\n"
    "    print('error: auto-round cannot be used: no luck', file=sys.stderr); sys.exit(2)\n"
    "folder.mkdir(parents=True, exist_ok=True)"
)


def test_the_batch_with_other_libraries(batch):
    """One works, one fails; each is given the options that it takes, and a state."""
    from common.base.errors import UserError

    only = ["--only", "baseline,hqq-4bit,rtn-4bit,autoround-4bit", "--seed=3", "--group-size", "64"]
    with pytest.raises(SystemExit):
        batch(*only)  # not without --with-peers
    with pytest.raises(UserError, match="--with-peers sets up"):
        batch("--with-peers", *only)
    (batch.folder / "benchmarks").mkdir()
    (batch.folder / "benchmarks/quantize_peer.py").write_text(PEER)
    python = batch.folder / ".peers/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho "$@" >> theirs\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    assert batch("--with-peers", *only, "--device", "cpu", "--dtype", "float32") == 1
    status = json.loads((batch.folder / "results/tiny/status.json").read_text())
    states = {name: (one["state"], one.get("reason")) for name, one in status.items()}
    assert states["rtn-4bit"] == ("done", None)
    assert states["autoround-4bit"] == ("failed", "auto-round cannot be used: no luck")
    assert states["hqq-4bit"] == ("done", None)
    theirs = (batch.folder / "theirs").read_text().splitlines()
    output = "models/tiny/rtn-4bit"
    assert theirs[0] == (
        f"benchmarks/quantize_peer.py rtn-4bit --model owner/tiny --output {output} "
        "--device cpu --seed=3 --group-size 64"
    )
    assert theirs[1].startswith(f"common/evaluation.py --model-path {output} --baseline owner/tiny")
    assert "--name rtn-4bit --device cpu --dtype float32" in theirs[1]
    assert [line.split()[0] for line in theirs[2:]] == ["benchmarks/quantize_peer.py"]
    calls = (batch.folder / "calls").read_text()
    assert "quantize_hqq.py" in calls  # by our own environment
    assert not any("quantize_hqq" in line for line in theirs)


def test_options_are_checked_before_the_environment_is_made(batch):
    """Which takes minutes. What goes wrong with it is said in one line."""
    from common.base.errors import UserError

    set_up = batch.folder / "common/setup_environment.sh"
    set_up.write_text("setup_peers() { touch made; return $(cat code); }")
    (batch.folder / "code").write_text("1")
    for mistake in (["--windows", "x"], ["--grup-size", "64"], ["--device", "cpu", "--seed", "x"]):
        with pytest.raises(UserError):
            batch("--with-peers", *mistake)
        assert not (batch.folder / "made").exists()
    with pytest.raises(UserError, match=r"\(.peers\) could not be set up, for the reason above"):
        batch("--with-peers", "--windows", "2")
    assert (batch.folder / "made").exists() and not (batch.folder / "calls").exists()


def pretend_installed(monkeypatch):
    """As if hqq 1.2 were installed. Other packages keep their versions: datasets decides by dill's,
    once, how it pickles.
    """
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "1.2" if name == "hqq" else version(name)
    )


@pytest.fixture
def peer(tiny, tmp_path, monkeypatch):
    """Run quantize_peer.py on the tiny model with a library that leaves it as it is."""
    import peers

    def untouched(work):
        model = work.load()
        with work.watch("quantize"):
            return peers.Quantized(model, model.save_pretrained, (1000, 600, 800))

    monkeypatch.setitem(peers.PEERS, "hqq-package-4bit", untouched)
    pretend_installed(monkeypatch)

    def run(*words, name="hqq-package-4bit"):
        words = [name, "--model", tiny, "--output", tmp_path / "theirs", *words]
        return run_script(ROOT / "benchmarks/quantize_peer.py", *words, "--device", "cpu")

    return run


def test_a_library_is_run_and_its_checkpoint_evaluated(peer, tiny, tmp_path):
    first = peer()
    assert first.returncode == 0, first.stderr
    record = json.loads((tmp_path / "theirs/quantization_metadata.json").read_text())
    assert record["library"] == {"name": "hqq", "version": "1.2"}
    assert record["calibration"] is None and record["grid"] == {"bits": 4, "group_size": 64}
    assert {"load", "quantize", "write", "total"} <= set(record["seconds"])
    assert record["bits_per_weight"]["coded"] == 6 and record["bytes"]["quantized_weights"] == 1000
    assert "is finished, with the same options" in peer().stdout
    assert_user_error(peer("--seed", 1), "another options", "--overwrite")
    assert peer("--seed", 1, "--overwrite").returncode == 0
    words = ["--model-path", tmp_path / "theirs", "--results-dir", tmp_path / "results", *SMALL]
    result = run_script(EVALUATION, *words)
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "results" / tiny.name / "theirs.json").read_text())
    assert found["quantization"]["library"]["name"] == "hqq"
    assert found["tasks"]["perplexity"]["divergence"]["kl_mean"] == pytest.approx(0, abs=1e-6)
    compared = run_script(ROOT / "compare_to_baseline.py", "--quantized", *words[1:])
    assert compared.returncode == 0, compared.stderr
    verified = run_script(ROOT / "verify_model.py", "--model-path", tmp_path / "theirs")
    assert verified.returncode == 2 and "Traceback" not in verified.stderr


def test_mistakes_about_a_library(peer, tmp_path, monkeypatch):
    import peers

    assert_user_error(peer("--bits", 3), "hqq-package-4bit quantizes to 4 bits")
    assert_user_error(peer("--group-size", "channel"), "--group-size")

    def fails(work):
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setitem(peers.PEERS, "hqq-package-4bit", fails)
    assert_user_error(peer(), "hqq failed: RuntimeError: no kernel (test_peers.py:")
    assert not (tmp_path / "theirs").exists() and not (tmp_path / "theirs.unfinished").exists()
    monkeypatch.undo()
    missing = peer(name="bitsandbytes-nf4")
    assert_user_error(
        missing, "bitsandbytes, which is not installed", "--with-peers", "'bitsandbytes=="
    )
    (tmp_path / "theirs").mkdir()
    pretend_installed(monkeypatch)
    assert_user_error(peer(), "exists already")


def test_every_configuration_of_theirs_has_a_function():
    import peers

    assert list(peers.PEERS) == list(PEERS)
