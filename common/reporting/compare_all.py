"""Every configuration of a model against its baseline. What was compared before is remembered:
resampling takes most of the time that tables take, and a documented run's records never change.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path

from common.base.errors import UserError
from common.base.files import json_or_none, write_json
from common.base.progress import say
from common.reporting.comparison import Comparison, compare_samples, other_samples
from common.results.documents import (
    ModelResults,
    has_samples,
    samples_by_task,
    samples_digest,
)
from common.results.hashes import code_hash
from common.results.identity import incomparable, other_data

REMEMBERED = "comparisons.json"
_ENTRY = "common.reporting.comparison"


class Remembered:
    """Values by a key that names all they depend on; of the code, what compares and the tasks.

    Args:
        file: None remembers nothing.
    """

    def __init__(self, file: Path | None = None):
        self.file = file
        self._known = (json_or_none(file) or {}) if file else {}
        self._used: dict[str, dict] = {}
        self._code = [code_hash(), code_hash(entry=_ENTRY, beside=())] if file else []

    def key(self, *parts: object) -> str:
        """parts: what JSON can hold."""
        return hashlib.sha256(json.dumps([self._code, parts]).encode()).hexdigest()

    def get(self, key: str) -> dict | None:
        return self._known.get(key)

    def put(self, key: str, value: dict) -> None:
        """Also what was got and is still good: what is not put is forgotten."""
        self._used[key] = value

    def save(self) -> None:
        if self.file and self._used != self._known:
            write_json(self.file, self._used)


def compare_all(
    results_dir: Path, results: ModelResults, remembered: Remembered | None = None
) -> dict[str, list[Comparison]]:
    """Every evaluated configuration of a model against its baseline; without those that were
    evaluated under other conditions, and without the tasks of a configuration that were evaluated
    on other data. What is `remembered` of the same records is not computed again.
    """
    remembered, model = remembered or Remembered(), results.name
    found: dict[str, list[Comparison]] = {}
    if "baseline" not in results.documents or not has_samples(results_dir, model, "baseline"):
        return found
    for name in results.configurations():
        if (
            name == "baseline"
            or name not in results.documents
            or not has_samples(results_dir, model, name)
        ):
            continue
        documents = results.documents["baseline"], results.documents[name]
        try:
            if reasons := incomparable(*documents):
                raise UserError(
                    f"measured with {'; '.join(reasons)} than the baseline: evaluate both again"
                )
            stale, compared = _compare_records(
                results_dir, model, name, other_data(*documents), remembered
            )
        except UserError as error:
            say(f"{model} {name}: no comparison ({error})")
            continue
        if stale:
            say(
                f"{model} {name}: no comparison of {', '.join(stale)} (of other data than the "
                "baseline's: evaluate both again)"
            )
        if compared:
            found[name] = compared
    return found


def _compare_records(
    results_dir: Path, model: str, name: str, other: list[str], remembered: Remembered
) -> tuple[list[str], list[Comparison]]:
    """The tasks that are left out, those of `other` data among them, and the comparisons of the
    rest.
    """
    digests = [samples_digest(results_dir, model, one) for one in ("baseline", name)]
    key = remembered.key(digests, other)
    if (known := remembered.get(key)) is not None:
        with suppress(KeyError, TypeError, ValueError):
            found = known["stale"], [Comparison.of_kept(one) for one in known["comparisons"]]
            remembered.put(key, known)
            return found
    baseline = samples_by_task(results_dir, model, "baseline")
    samples = samples_by_task(results_dir, model, name)
    stale = sorted({*other, *other_samples(baseline, samples)})
    fresh = {task: rows for task, rows in samples.items() if task not in stale}
    compared = compare_samples(baseline, fresh)
    remembered.put(key, {"stale": stale, "comparisons": [one.kept() for one in compared]})
    return stale, compared
