"""What does not fit into memory, said in one sentence: what was too large, and the way out."""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Iterator

from circuit_tracer_qk.base.errors import UserError

_FULL = re.compile(
    r"can(?:'t|not) allocate memory|unable to allocate|not enough memory|out of memory"
    r"|storage size calculation overflowed",
    re.IGNORECASE,
)
_ASKED = re.compile(r"\ballocate:? ([0-9.]+) ?(bytes|[KMGTPE]i?B)\b")


@contextlib.contextmanager
def fitting(what: str, way_out: str) -> Iterator[None]:
    """``with`` it, or as a decorator: what the libraries say of full memory becomes one sentence.

    Args:
        what: is too large, where nothing within says it more closely.
        way_out: what to do then.

    Raises:
        UserError: an allocation failed.

    >>> with fitting("the table", "ask for fewer heads"):
    ...     raise MemoryError
    Traceback (most recent call last):
    circuit_tracer_qk.base.errors.UserError: the table does not fit into memory: ask for fewer heads.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_full(error):
            raise
        raise too_large(what, way_out, error) from error


def is_full(error: BaseException) -> bool:
    """Whether an error says that memory is full, as Python, NumPy, torch or the system put it."""
    full = isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
    return full or (isinstance(error, RuntimeError) and _FULL.search(str(error)) is not None)


def too_large(what: str, way_out: str, error: BaseException) -> UserError:
    """The sentence, with how much was asked for where the error says it."""
    asked = _ASKED.search(str(error))
    number, unit = asked.groups() if asked else ("", "")
    if unit == "bytes":
        number, unit = f"{float(number) / 2**30:.3g}", "GiB"
    more = f" ({number} {unit} more were asked for)" if asked else ""
    return UserError(f"{what} does not fit into memory{more}: {way_out}.")
