"""How numbers and documents are written: seven digits, sums that close, JSON without NaN."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

from circuit_tracer_qk.errors import UserError


def rounded(value: float) -> float:
    """A number with seven significant digits, what float32 holds."""
    return float(f"{value:.7g}")


def rest(whole: float, listed: Iterable[float]) -> float:
    """What is missing from ``listed``, as written, to ``whole``, as written."""
    return float(f"{math.fsum((whole, *(-value for value in listed))):.12g}")


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
