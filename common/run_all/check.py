"""run_all_quantization.sh --check: what on this machine would stop or slow the batch.

Facts are gathered here and judged in `check_lines`.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

import psutil
import torch

from common.base import machine
from common.base.errors import UserError
from common.base.machine import Driver
from common.base.progress import say
from common.kernels.dispatch import triton_problem
from common.model.demo import DEMO_NAME
from common.model.source import MODELS_FOLDER, hub_errors, load_config
from common.model.tensors import TensorReader
from common.run_all import check_lines as judge
from common.run_all.check_lines import DEMO_BYTES, FAIL, PASS, WARN, Line, ModelFacts
from common.text.data import locate_rows

REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements.txt"


def model_facts(model: str, timeout: float = 10) -> ModelFacts:
    """Where the files of a --model are. Nothing is fetched; a hub is asked whether it would.

    Args:
        timeout: seconds that the hub has for each of two answers.
    """
    folder = MODELS_FOLDER / DEMO_NAME / "baseline" if model == "demo" else Path(model)
    if model == "demo" and not (folder / "config.json").is_file():
        return ModelFacts(
            "demo: built on first use, from a package of 93 MB", DEMO_BYTES, DEMO_BYTES
        )
    try:
        if folder.is_dir():
            load_config(folder)
            return ModelFacts(str(folder), TensorReader(folder).total_bytes())
        if _names_a_folder(model):
            return ModelFacts(
                "", problem=f"model folder {model} does not exist; give a folder, a hub id, or demo"
            )
        return _hub_facts(model, timeout)
    except UserError as error:
        return ModelFacts("", problem=str(error))


def _names_a_folder(model: str) -> bool:
    return Path(model).is_dir() or model.startswith((".", "/", "~")) or model.count("/") != 1


def _hub_facts(model: str, timeout: float) -> ModelFacts:
    """As `model_facts`, of a hub id. Raises UserError where the hub would not give it."""
    from huggingface_hub import (
        HfApi,
        constants,
        get_hf_file_metadata,
        hf_hub_url,
        try_to_load_from_cache,
    )

    with hub_errors(model):
        config = try_to_load_from_cache(model, "config.json")
    if isinstance(config, str):
        try:
            return ModelFacts(
                f"{model}, in the cache", TensorReader(Path(config).parent).total_bytes()
            )
        except UserError:
            pass  # fetched in part
    if constants.HF_HUB_OFFLINE:
        raise UserError(
            f"{model} is not in the cache and HF_HUB_OFFLINE is set; unset it, or give a local "
            "folder"
        )
    with hub_errors(model):
        get_hf_file_metadata(hf_hub_url(model, "config.json"), timeout=timeout)
        files = HfApi().model_info(model, files_metadata=True, timeout=timeout).siblings or []
    weights = [file for file in files if re.fullmatch(r"model.*\.safetensors", file.rfilename)]
    size = sum(file.size or 0 for file in weights)
    return ModelFacts(f"{model}, on the hub, access granted", size or None, size)


def lines(
    model: str,
    device: str,
    data_root: Path | None,
    thorough: bool,
    samples: Iterable[tuple] = (),
) -> Iterator[Line]:
    """Look at this machine.

    Args:
        model, device, data_root: the batch's options.
        thorough: also what takes seconds: ask the driver, compile a kernel, wait longer for the
            hub.
        samples: rows to look for, as `data.locate_rows` takes them, the data set's address first.
    """
    facts = model_facts(model, timeout=10 if thorough else 3)
    usable = device != "cpu" and torch.cuda.is_available()
    yield judge.python_line(sys.version_info, sys.executable)
    yield judge.packages_line(REQUIREMENTS.read_text(), _installed)
    yield judge.disk_line(shutil.disk_usage(Path.cwd()).free, facts)
    memory = psutil.virtual_memory()
    yield judge.memory_line(
        memory.total, memory.available, facts, "cuda" if usable else "cpu", machine.is_wsl()
    )
    obstacle = machine.obstacle(machine.look()) if device != "cpu" and not usable else None
    smi = machine.find_smi() if usable else None
    yield from judge.device_lines(
        device,
        usable,
        obstacle,
        machine.ask_driver(smi) if smi and thorough else Driver(),
        machine.ask_gpu(smi, _first_visible()) if smi else None,
        facts,
        torch.cuda.get_arch_list(),
    )
    if usable:
        compiler = judge.compiler_line(machine.missing_for_triton(*machine.look_for_compiler()))
        yield compiler
        if thorough and compiler.state == PASS:
            yield judge.triton_line(triton_problem())
    yield judge.model_line(facts)
    places, problems = _look_for(samples, data_root)
    yield judge.data_line(model == "demo" and data_root is None, data_root, places, problems)


def report(model: str, device: str, data_root: Path | None, samples: Iterable[tuple]) -> int:
    """Show everything that was looked at. Returns the exit code: 1 if something stops the batch."""
    blocked = 0
    for line in lines(model, device, data_root, thorough=True, samples=samples):
        say(line.text())
        blocked += line.state == FAIL
    say("This would stop a run: see FAIL above." if blocked else "Nothing here stops a run.")
    return int(blocked > 0)


def show_problems(model: str, device: str, data_root: Path | None) -> None:
    """Show what would stop or slow a batch, if anything.

    Raises:
        UserError: the device, the model's folder or --data-root cannot be used. What a hub says now
            it may say otherwise when it is asked for files.
    """
    certain = {"Card", "Data", *(["Model"] if _names_a_folder(model) else [])}
    found = [
        line
        for line in lines(model, device, data_root, thorough=False)
        if line.state in (WARN, FAIL)
    ]
    for line in found:
        if line.name in certain and line.state == FAIL:
            raise UserError("; ".join(filter(None, (line.found, line.mend))))
    for line in found:
        say(line.text())
    if found:
        say("(--check shows all that was looked at)")


def evaluation_samples(
    limit: int | None, data_root: Path | None, told: argparse.Namespace
) -> list[tuple]:
    """The rows that an evaluation on real data sets reads, as `lines` takes them.

    Args:
        told: what the evaluation is told: its tasks, and other data sets for some.
    """
    from common.tasks.task import all_tasks

    found = []
    for task in all_tasks():
        if task.name in told.tasks and (rows := task.reads(limit, data_root)):
            address, *sample = rows
            found.append((getattr(told, f"{task.name}_data") or address, *sample))
    return found


def _look_for(samples: Iterable[tuple], data_root: Path | None) -> tuple[dict[str, str], list[str]]:
    """Where rows are, by data set, and what is said of those that are nowhere."""
    places, problems = {}, []
    for address, *sample in samples if data_root is None or data_root.is_dir() else ():
        try:
            places[address] = locate_rows(address, data_root, *sample)
        except UserError as error:
            problems.append(str(error))
    return places, problems


def _first_visible() -> str:
    return (os.environ.get("CUDA_VISIBLE_DEVICES") or "0").split(",")[0]


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
