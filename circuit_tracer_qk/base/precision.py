"""Products in float32 mean float32: TensorFloat-32 and its kin only where they are asked for.

Terms cancel: a score is a small difference of large sums, and TensorFloat-32 keeps 10 bits of each
factor. torch's own setting may be any when this package is called, and is put back afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ContextDecorator, contextmanager
from contextvars import ContextVar
from threading import RLock, local
from typing import Any, NamedTuple

import torch

_ASKED: ContextVar[bool] = ContextVar("_ASKED", default=False)


@contextmanager
def tf32() -> Iterator[None]:
    """Inside it torch's own setting holds (``torch.set_float32_matmul_precision``), in this thread.

    Quicker on GPUs that have it; sums then hold to about 1e-3 of the sum of |terms|.

    >>> with ctqk.tf32():
    ...     fast = ctqk.attribute(prompt, model)
    """
    token = _ASKED.set(True)
    try:
        yield
    finally:
        _ASKED.reset(token)


class _Switches(NamedTuple):
    """torch's switches: by its older interface, None where it refuses, and by its newer one, place
    by place, None where there is none. It refuses the older after the newer has been used."""

    older: str | None
    newer: tuple[str | None, ...]

    @classmethod
    def read(cls) -> _Switches:
        try:
            older = torch.get_float32_matmul_precision()
        except RuntimeError:
            older = None
        return cls(older, tuple(getattr(place, "fp32_precision", None) for place in _places()))

    @property
    def exact(self) -> bool:
        """Whether products are exact as it is, which leaves nothing to do or to put back."""
        return self.older in ("highest", None) and set(self.newer) <= {"ieee", "none", None}

    def make_exact(self) -> None:
        """Write what was read as if it asked for exact products, by the same interface."""
        if self.older not in ("highest", None):
            torch.set_float32_matmul_precision("highest")
        for place, setting in zip(_places(), _Switches.read().newer, strict=True):
            if setting not in ("ieee", "none", None):
                place.fp32_precision = "ieee"

    def put_back(self) -> None:
        """Make the switches what was read."""
        if self.older not in ("highest", None):
            torch.set_float32_matmul_precision(self.older)
        now = _Switches.read().newer
        for place, setting, is_now in zip(_places(), self.newer, now, strict=True):
            if setting is not None and setting != is_now:
                place.fp32_precision = setting


def _places() -> tuple[Any, Any]:
    mkldnn = getattr(torch.backends, "mkldnn", None)
    return torch.backends.cuda.matmul, getattr(mkldnn, "matmul", None)


class _Exactly(ContextDecorator):
    """The switches are the process's: the first to come sets them, the last to go restores."""

    def __init__(self) -> None:
        self._lock, self._depth = RLock(), 0
        self._before: _Switches | None = None
        self._thread = local()

    def __enter__(self) -> None:
        if not hasattr(self._thread, "entries"):
            self._thread.entries = []
        counts = not _ASKED.get()
        self._thread.entries.append(counts)
        if not counts:
            return
        with self._lock:
            if not self._depth:
                before = _Switches.read()
                self._before = None if before.exact else before
                if self._before is not None:
                    before.make_exact()
            self._depth += 1

    def __exit__(self, *error: object) -> None:
        if not self._thread.entries.pop():
            return
        with self._lock:
            self._depth -= 1
            if not self._depth and self._before is not None:
                self._before.put_back()


exactly = _Exactly()
"""``@exactly`` or ``with exactly:`` float32 products are float32 products."""
