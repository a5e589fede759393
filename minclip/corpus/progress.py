"""Progress of long work: a bar on a terminal, a line a minute elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

LOG_SECONDS = 60


@contextlib.contextmanager
def reporting(progress: bool, total: int, done: int, unit: str) -> Iterator[Callable[[int], object]]:
    """Yield a function advance(count) that reports how many more units are done.

    Shows a bar on a terminal, prints a line a minute elsewhere, and does nothing where progress is False.
    """
    if not progress:
        yield lambda count: None
    elif sys.stderr.isatty():
        from tqdm import tqdm  # here, because it takes time to import

        with tqdm(total=total, initial=done, unit=f" {unit}", unit_scale=True) as bar:
            yield bar.update
    else:
        yield Log(total, done, unit).advance


class Log:
    """Print to standard error, once a minute, how much is done and how long the rest takes."""

    def __init__(self, total: int, done: int, unit: str):
        self.total, self.done, self.unit = total, done, unit
        self.first, self.start = done, time.monotonic()
        self.printed = self.start

    def advance(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.printed < LOG_SECONDS:
            return
        self.printed = now
        from tqdm import tqdm  # here, because it takes time to import

        rate = (self.done - self.first) / (now - self.start)
        left = tqdm.format_interval((self.total - self.done) / rate)
        print(
            f"{self.done:,} of {self.total:,} {self.unit}, {rate:,.0f} {self.unit}/s, {left} left",
            file=sys.stderr,
            flush=True,
        )
