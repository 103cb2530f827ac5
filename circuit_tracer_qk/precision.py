"""Products in float32 mean float32: TensorFloat-32 and its kin only where they are asked for.

Terms cancel: a score is a small difference of large sums, and TensorFloat-32 keeps 10 bits of each
factor. torch's own setting may be any when this package is called, and is put back afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ContextDecorator, contextmanager
from contextvars import ContextVar
from threading import RLock
from typing import Any

import torch

_ASKED: ContextVar[bool] = ContextVar("_ASKED", default=False)


@contextmanager
def tf32() -> Iterator[None]:
    """Inside it torch's own setting holds (``torch.set_float32_matmul_precision``).

    Quicker on GPUs that have it; sums then hold to about 1e-3 of the sum of |terms|.
    """
    token = _ASKED.set(True)
    try:
        yield
    finally:
        _ASKED.reset(token)


class _Switches:
    """torch's switches, by the interface that they were set with: it refuses a mixture."""

    def read(self) -> Any:
        found = [getattr(place, "fp32_precision", None) for place in self._places()]
        try:
            older = torch.get_float32_matmul_precision()
        except RuntimeError:  # set with the newer one
            return found
        agrees = (older == "highest") == all(value in ("ieee", "none") for value in found)
        return older if agrees or None in found else found

    def write(self, value: Any) -> None:
        if isinstance(value, str):
            torch.set_float32_matmul_precision(value)
            return
        for place, setting in zip(self._places(), value, strict=True):
            place.fp32_precision = setting

    def exact(self, now: Any) -> Any:
        return "highest" if isinstance(now, str) else ["ieee"] * len(now)

    def _places(self) -> list[Any]:
        mkldnn = getattr(torch.backends, "mkldnn", None)
        return [torch.backends.cuda.matmul, getattr(mkldnn, "matmul", None)]


class _Exactly(ContextDecorator):
    """The switches are the process's: the first to come sets them, the last to go restores."""

    def __init__(self) -> None:
        self._lock, self._depth, self._before = RLock(), 0, None
        self._switches = _Switches()

    def __enter__(self) -> None:
        if _ASKED.get():
            return
        with self._lock:
            if not self._depth:
                self._before = self._switches.read()
                self._switches.write(self._switches.exact(self._before))
            self._depth += 1

    def __exit__(self, *error: object) -> None:
        if _ASKED.get():
            return
        with self._lock:
            self._depth -= 1
            if not self._depth:
                self._switches.write(self._before)


exactly = _Exactly()
"""``@exactly`` or ``with exactly:`` float32 products are float32 products."""
