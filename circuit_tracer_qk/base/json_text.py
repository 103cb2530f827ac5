"""How numbers and documents are written: seven digits, sums that close, JSON without NaN."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from circuit_tracer_qk.base.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An ``object_pairs_hook`` of JSON that people write.

    Raises:
        UserError: a key stands there twice, of which Python would keep the last.
    """
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise UserError(f"the key {key!r:.60} stands twice in it: keep one")
        content[key] = value
    return content


def rounded(value: float) -> float:
    """A number with seven significant digits, what float32 holds."""
    return float(f"{value:.7g}")


def rounded_all(values: Tensor) -> list[Any]:
    """:func:`rounded` of every number of a tensor, as nested lists, in a fraction of the time."""
    import numpy as np  # here, since the page's server needs this module and no numbers

    x = values.detach().cpu().double().numpy()
    with np.errstate(all="ignore"):
        digits = 6 - np.floor(np.log10(np.abs(np.where(x == 0, 1, x))))
        scale = 10.0 ** np.abs(digits)
        close = np.where(digits >= 0, np.round(x * scale) / scale, np.round(x / scale) * scale)
    # powers of ten beyond these are no exact floats, and NaN has no digits
    exact = (np.abs(digits) <= 22) & np.isfinite(close)
    if not exact.all():
        close[~exact] = [rounded(value) for value in x[~exact].tolist()]
    return close.tolist()


def numbers(values: Sequence[float]) -> str:
    """Finite numbers in JSON with commas between them, as :func:`rounded` has them."""
    return _numbers(len(values)) % tuple(values)


@lru_cache(maxsize=1024)
def _numbers(n: int) -> str:
    return ",".join(["%.7g"] * n)


def rest(whole: float, listed: Iterable[float]) -> float:
    """What is missing from ``listed``, as written, to ``whole``, as written."""
    return float(f"{math.fsum((whole, *(-value for value in listed))):.12g}")


@contextmanager
def without_collection() -> Iterator[None]:
    """Build large documents without Python's search for cycles, which walks all their lists."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Encoded(NamedTuple):
    """A part of a document that is JSON already."""

    data: bytes

    @classmethod
    def listed(cls, parts: Iterable[bytes]) -> Encoded:
        """The list of some such parts."""
        return cls(b"[" + b",".join(parts) + b"]")


_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def encode(document: Any, name: str = "the graph") -> bytes:
    """Compact UTF-8 JSON; values of nested objects may be :class:`Encoded`.

    Raises:
        UserError: a number that JSON cannot hold.
    """
    if isinstance(document, Encoded):
        return document.data
    if isinstance(document, dict) and _holds_encoded(document):
        pairs = (encode(key) + b":" + encode(value, name) for key, value in document.items())
        return b"{" + b",".join(pairs) + b"}"
    try:
        return to_bytes(_ENCODER.encode(document))
    except ValueError as error:
        raise not_finite(name) from error


def _holds_encoded(document: dict[str, Any]) -> bool:
    return any(
        isinstance(value, Encoded) or (isinstance(value, dict) and _holds_encoded(value))
        for value in document.values()
    )


def to_text(value: Any) -> str:
    """JSON in pieces, for :func:`to_bytes`.

    Raises:
        ValueError: a number that JSON cannot hold.
    """
    return _ENCODER.encode(value)


def to_bytes(text: str) -> bytes:
    """JSON as it is written."""
    # half a surrogate pair, which a damaged label may hold, becomes the escape that JSON has for it
    return text.encode("utf-8", "backslashreplace")


def not_finite(name: str = "the graph") -> UserError:
    """What to say of a graph that holds numbers which JSON cannot."""
    return UserError(
        f"{name} cannot be written: the graph holds NaN or infinite numbers; run the model in "
        "float32."
    )
