"""The whole comparison as a user with a real Llama runs it: with a hub, then without it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT
from stub_data import build_datasets
from stub_hub import COMMIT, StubHub
from stub_llama import write_llama

MODEL = "meta-llama/Llama-3.2-1B-Instruct"
CONFIGURATIONS = ("baseline", "gptq-4bit", "hqq-4bit", "smoothquant-8bit")
COMMAND = ["bash", "run_all_quantization.sh", "--only", ",".join(CONFIGURATIONS), "--limit", "8"]
# What a comparison cannot give twice.
MEASURED = {"seconds"}
# Bytes of each data set that were sent when this was written, in MB; half as much again is allowed.
# The ends of files are fetched in pieces of 64 KB at least.
SENT = {
    "HuggingFaceH4/ultrachat_200k": 4.48,
    "nvidia/OpenMathInstruct-2": 0.33,
    "rajpurkar/squad_v2": 0.52,
    "allenai/ai2_arc": 0.053,
    "Salesforce/wikitext": 0.171,
}


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A copy of the project without results, with this environment."""
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    copy = tmp_path_factory.mktemp("project")
    for name in names:
        if (
            not name.startswith("results/")
            and (ROOT / name).is_file()
            and not name.startswith(".venv")
        ):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    (copy / ".venv").symlink_to((ROOT / ".venv").resolve())
    return copy


def batch(project: Path, *more: str, **environment: str) -> str:
    """Run the batch; of the hub's variables only those given are set. Returns what it printed."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    result = subprocess.run(
        [*COMMAND, *more],
        cwd=project,
        capture_output=True,
        text=True,
        timeout=3000,
        env={**clean, "CUDA_VISIBLE_DEVICES": "", **environment},
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "Traceback" not in result.stdout + result.stderr
    return result.stdout


def scores(project: Path) -> dict[str, dict]:
    """What was found for every configuration and task, without times."""
    found = {}
    for configuration in CONFIGURATIONS:
        document = json.loads(
            (project / "results/Llama-3.2-1B-Instruct" / f"{configuration}.json").read_text()
        )
        found[configuration] = {
            task: {key: value for key, value in summary.items() if key not in MEASURED}
            for task, summary in document["tasks"].items()
        }
    return found


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_with_a_hub_and_then_without(project, tmp_path):
    """Nothing is set but where the hub is; README is regenerated. The second run has no hub."""
    served, home = tmp_path / "served", tmp_path / "home"
    write_llama(served / "models" / MODEL)
    build_datasets(served / "datasets", articles=200)
    with StubHub(served) as hub:
        address = hub.environment(home)["HF_ENDPOINT"]
        batch(project, HF_ENDPOINT=address, HF_HOME=str(home))
        sent = hub.by_repository.copy()
    readme = (project / "README.md").read_text()
    # The local run comes before the documented one of another model.
    results = readme[readme.index("### Llama-3.2-1B-Instruct (local run)") :]
    results = results[: results.index("(documented run)")]
    assert results.count("✅ Done") == len(CONFIGURATIONS)
    assert f"rajpurkar/squad_v2/squad_v2:validation@{COMMIT[:7]})" in results
    first = scores(project)
    for configuration in CONFIGURATIONS:
        for task, summary in first[configuration].items():
            assert summary["data"].endswith(f"@{COMMIT}"), (configuration, task)
    check_traffic(sent, served)
    # With nothing to do, and with everything to do again.
    batch(project, HF_ENDPOINT=address, HF_HOME=str(home), HF_HUB_OFFLINE="1")
    batch(project, "--overwrite", HF_ENDPOINT=address, HF_HOME=str(home), HF_HUB_OFFLINE="1")
    assert scores(project) == first


def check_traffic(sent: dict[str, int], served: Path) -> None:
    """The model once, without Meta's own form; of the data no more than is needed, large splits in
    part.
    """
    stored = {
        path: sum(file.stat().st_size for file in (served / path).rglob("*") if file.is_file())
        for path in (
            "models/" + MODEL,
            "datasets/nvidia/OpenMathInstruct-2",
            "datasets/HuggingFaceH4/ultrachat_200k",
        )
    }
    print("bytes sent:", sent, "stored:", stored)
    original = (served / "models" / MODEL / "original/consolidated.00.pth").stat().st_size
    assert sent.pop(MODEL) <= stored["models/" + MODEL] - original
    for name, share in (("HuggingFaceH4/ultrachat_200k", 0.8), ("nvidia/OpenMathInstruct-2", 0.5)):
        assert sent[name] < share * stored[f"datasets/{name}"]
    assert sent.keys() == SENT.keys()
    assert all(size < 1.5e6 * SENT[name] for name, size in sent.items()), sent
