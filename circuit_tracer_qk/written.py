"""How numbers and documents are written: seven digits, sums that close, JSON without NaN."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from circuit_tracer_qk.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def rounded(value: float) -> float:
    """A number with seven significant digits, what float32 holds."""
    return float(f"{value:.7g}")


def rounded_all(values: Tensor) -> list[Any]:
    """:func:`rounded` of every number of a tensor, as nested lists, in a fraction of the time."""
    import numpy as np  # here, since the page's server needs this module and no numbers

    x = values.detach().cpu().double().numpy()
    with np.errstate(all="ignore"):
        digits = 6 - np.floor(np.log10(np.abs(x)))
        scale = 10.0 ** np.abs(digits)
        up, down = np.round(x * scale) / scale, np.round(x / scale) * scale
    close = np.where(digits >= 0, up, down)
    # powers of ten beyond these are no exact floats, and 0 and NaN have no digits
    exact = (np.abs(digits) <= 22) & np.isfinite(close)
    if not exact.all():
        close[~exact] = [rounded(value) for value in x[~exact].tolist()]
    return close.tolist()


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


def encode(document: Any, name: str = "the graph") -> bytes:
    """Compact UTF-8 JSON.

    Raises:
        UserError: a number that JSON cannot hold.
    """
    try:
        text = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except ValueError as error:
        raise UserError(
            f"{name} cannot be written: the graph holds NaN or infinite numbers; run the model in "
            "float32."
        ) from error
    # half a surrogate pair, which a damaged label may hold, becomes the escape that JSON has for it
    return text.encode("utf-8", "backslashreplace")
