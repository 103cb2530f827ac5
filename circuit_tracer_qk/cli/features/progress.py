"""How far long work is: a bar on a terminal, a line now and then where there is none."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from tqdm import tqdm

SAID_EVERY = 30.0  # seconds between two lines
SHOWN: dict[str, Any] = {"leave": False, "delay": 2, "disable": None}
"""How bars are shown: after two seconds, and only on a terminal."""


class Step(Protocol):
    """What says that one more is done."""

    def __call__(self) -> None: ...


@contextmanager
def progress_of(name: str, total: int, done: int = 0) -> Iterator[Step]:
    """Within, the function given says after each of ``total`` steps that it is done.

    On a terminal a bar shows it; elsewhere stderr gets a line every half a minute.
    """
    said = time.monotonic()
    with tqdm(desc=name, total=total, initial=done, **SHOWN) as bar:

        def step() -> None:
            nonlocal done, said
            done += 1
            bar.update(1)
            if bar.disable and time.monotonic() - said >= SAID_EVERY:
                said = time.monotonic()
                print(f"{name}: {done} of {total}", file=sys.stderr, flush=True)

        yield step
