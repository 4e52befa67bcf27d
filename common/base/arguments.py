"""The command line: a parser, and numbers for argparse's `type`, each of which raises its
ArgumentTypeError, in one line, for what is not one.
"""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError
from typing import NoReturn

DEFAULT_MODEL = "meta-llama/Llama-3.2-1B-Instruct"
# Of types to compute in, torch's.
DTYPE_NAMES = ("float32", "bfloat16", "float16")


class Parser(ArgumentParser):
    """Answers a mistake with one line, where argparse shows all options first."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (--help shows the options)\n")


def share(text: str) -> float:
    value = _real(text)
    if not 0 <= value <= 1:
        raise ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def positive(text: str) -> int:
    value = _whole(text)
    if value < 1:
        raise ArgumentTypeError(f"{text} is not a positive number")
    return value


def not_negative(text: str) -> int:
    value = _whole(text)
    if value < 0:
        raise ArgumentTypeError(f"{text} is negative")
    return value


def two_or_more(text: str) -> int:
    value = _whole(text)
    if value < 2:
        raise ArgumentTypeError(f"{text} is less than 2")
    return value


def gibibytes(text: str) -> float:
    value = _real(text)
    if not 0 < value < float("inf"):
        raise ArgumentTypeError(f"{text} is not a positive number of GiB")
    return value


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ArgumentTypeError(f"{text} is not a whole number") from None


def _real(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ArgumentTypeError(f"{text} is not a number") from None
