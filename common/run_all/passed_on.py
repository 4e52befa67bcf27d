"""What the batch does not know itself: options that it passes on to the evaluation and to the
methods' scripts.
"""

from __future__ import annotations

import argparse
import importlib
from typing import Protocol, cast

from common.base.errors import UserError
from common.base.progress import say
from common.evaluation import add_evaluation_arguments
from common.walk.method import Method

# Options of the batch that it gives every script as they are, where they were given.
HANDED_ON = ("device", "device_memory", "dtype", "data_root")
# All that the batch itself gives a script; of two the last would count, for each configuration
# alike.
_OWN_OPTIONS = ("model", "bits", "output", "overwrite", *HANDED_ON)


class MethodScript(Protocol):
    """What the batch asks a method's script."""

    def argument_parser(self) -> argparse.ArgumentParser: ...

    def method(self, options: argparse.Namespace) -> Method:
        """The method as it is with the options that the parser read."""


def method_script(method: str) -> MethodScript:
    """The script of a method."""
    return cast(MethodScript, importlib.import_module(f"quantize_{method}"))


def of_evaluation(words: list[str]) -> tuple[list[str], list[str], argparse.Namespace]:
    """Options that are passed on, parted: those that the evaluation takes, the others, and what the
    evaluation is told by the first.

    Raises:
        UserError: a value that it does not take.
    """
    # Abbreviated, --data would be a method's --data-root.
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    add_evaluation_arguments(parser)
    _refuse_instead(parser, "common/evaluation.py")
    taken: list[str] = []
    others: list[str] = []
    for option in parted(words):
        (others if parser.parse_known_args(option)[1] else taken).extend(option)
    return taken, others, parser.parse_args(taken)


def share_out(words: list[str], methods: set[str]) -> dict[str, list[str]]:
    """What is passed on to each method: the options that its script takes. A line says which are
    left out for which.

    Raises:
        UserError: an option that no script takes.
    """
    shared: dict[str, list[str]] = {method: [] for method in sorted(methods)}
    left_out = []
    for option in parted(words):
        refusals = {
            method: refusal
            for method in shared
            if (refusal := _refusal(method, option)) is not None
        }
        if len(refusals) == len(shared):
            unknown = (
                f"unknown option {' '.join(option)}: neither the batch nor the evaluation nor a "
                "method script that it runs has it; see --help of run_all_quantization.sh, "
                "common/evaluation.py and of those"
            )
            raise UserError(next(filter(None, refusals.values()), unknown))
        for method in shared.keys() - refusals.keys():
            shared[method] += option
        if refusals:
            left_out.append(f"{' '.join(option)} for {', '.join(refusals)}")
    if left_out:
        say(f"options left out where a script does not take them: {'; '.join(left_out)}")
    return shared


def parted(words: list[str]) -> list[list[str]]:
    """Words parted into options, each with its value where that is a word of its own."""
    parted: list[list[str]] = []
    for word in words:
        if word.startswith("--") or not parted:
            parted.append([])
        parted[-1].append(word)
    return parted


def _refusal(method: str, option: list[str]) -> str | None:
    """Why a method's script does not take an option's value, empty where it has no such option;
    None if it takes it.
    """
    parser = method_script(method).argument_parser()
    _refuse_instead(parser, f"quantize_{method}.py")
    # Only parsing knows --bits=3 and --bit 3 for what they are.
    parser.set_defaults(**dict.fromkeys(_OWN_OPTIONS))
    try:
        found, unknown = parser.parse_known_args(option)
        if own := [name for name in _OWN_OPTIONS if getattr(found, name) is not None]:
            return (
                f"{' '.join(option)} cannot be passed on: the batch itself tells each script "
                f"its --{own[0].replace('_', '-')}; see --help for what it takes, or run "
                f"quantize_{method}.py on its own"
            )
        return "" if unknown else None
    except UserError as error:
        return str(error)


def _refuse_instead(parser: argparse.ArgumentParser, script: str) -> None:
    """Let a script's parser raise UserError where it would end the process."""

    def refuse(message: str):
        raise UserError(f"{message} (it is passed to {script}, whose --help lists its options)")

    parser.error = refuse  # type: ignore[method-assign]  # argparse offers no other way
