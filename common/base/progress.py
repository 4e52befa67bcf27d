"""Progress with time left: a bar on a terminal, plain lines when the output is piped."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from tqdm import tqdm

from common.base import parallel

Item = TypeVar("Item")

SECONDS_BETWEEN_LINES = 10.0


def say(text: str) -> None:
    """Print one line above any bar that is on the screen; of several processes the first does."""
    if not parallel.first():
        return
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def track(
    items: Iterable[Item],
    description: str,
    unit: str = "it",
    total: int | None = None,
    quick: int = 0,
) -> Iterator[Item]:
    """Iterate over `items` and show how far it is and how many seconds are left.

    Args:
        items: what to iterate over; `total` is its length where it has none of its own.
        description: what is being worked on, such as "layers".
        unit: the name of one item.
        quick: how many of the first are done in next to no time, as layers that are taken over
            are: they say nothing of how long the others take. A bar forgets them by itself.
    """
    if not parallel.first():
        yield from items
        return
    total = len(items) if total is None and isinstance(items, Sized) else total
    if sys.stderr.isatty():
        yield from tqdm(items, desc=description, unit=unit, total=total, dynamic_ncols=True)
        return
    start = last = slow = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if done <= quick:
            slow = now
        if now - last >= SECONDS_BETWEEN_LINES and total and done < total:
            last = now
            left = ""
            if done > quick:
                left = f", about {(now - slow) / (done - quick) * (total - done):.0f} s left"
            print(
                f"  {description}: {done}/{total} {unit}, {now - start:.0f} s so far{left}",
                file=sys.stderr,
                flush=True,
            )
    if total:
        print(
            f"  {description}: {total} {unit} in {time.monotonic() - start:.1f} s",
            file=sys.stderr,
            flush=True,
        )
