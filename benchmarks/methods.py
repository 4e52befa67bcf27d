"""The six methods and the options that tests and benchmarks give them."""

from __future__ import annotations


def method_options(
    group_size: int | None = None, iterations: int | None = None, **own: list[str]
) -> dict[str, list[str]]:
    """Options by method: a group size for those that have one, AdaRound's iterations; the methods'
    own defaults where they are None.

    Args:
        own: by method, options beside those. Raises KeyError for a method that there is not.
    """
    groups = [] if group_size is None else ["--group-size", str(group_size)]
    learning = [] if iterations is None else ["--iterations", str(iterations)]
    options = {
        "gptq": [*groups],
        "awq": [*groups],
        "hqq": [*groups],
        "smoothquant": [],
        "adaround": [*groups, *learning],
        "quarot": [*groups],
    }
    for method, words in own.items():
        options[method] += words
    return options
