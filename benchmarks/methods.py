"""The six methods with the options that tests and benchmarks give all of them alike."""

from __future__ import annotations


def method_options(
    group_size: int | None = None, iterations: int | None = None
) -> dict[str, list[str]]:
    """Options by method: a group size for those that have one, AdaRound's iterations; the methods'
    own defaults where they are None.
    """
    groups = [] if group_size is None else ["--group-size", str(group_size)]
    learning = [] if iterations is None else ["--iterations", str(iterations)]
    return {
        "gptq": [*groups],
        "awq": [*groups],
        "hqq": [*groups],
        "smoothquant": [],
        "adaround": [*groups, *learning],
        "quarot": [*groups],
    }
