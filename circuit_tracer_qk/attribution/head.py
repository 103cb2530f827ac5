"""How an attention head is written: ``(4, 0)`` in Python, ``L4H0`` in text."""

from __future__ import annotations

import re
from operator import index
from typing import Any

from circuit_tracer_qk.base.errors import UserError

Head = tuple[int, int]
"""(layer, head)."""

_NAME = re.compile(r"\s*L([0-9]{1,9})H([0-9]{1,9})\s*", re.ASCII | re.IGNORECASE)

HeadLike = Head | str
"""A head as ``(4, 0)`` or ``"L4H0"``."""


def head_name(head: Head) -> str:
    """The name of a head.

    >>> head_name((4, 0))
    'L4H0'
    """
    return f"L{head[0]}H{head[1]}"


def parse_head(head: Any) -> Head:
    """``(4, 0)``, an array of two, or ``"L4H0"`` as (layer, head).

    Raises:
        UserError: anything else.

    >>> parse_head("L4H0")
    (4, 0)
    """
    if isinstance(head, str) and (match := _NAME.fullmatch(head)):
        return int(match[1]), int(match[2])
    if not isinstance(head, str):
        try:
            layer, number = head.tolist() if hasattr(head, "tolist") else head
            if not isinstance(layer, bool) and not isinstance(number, bool):
                return index(layer), index(number)
        except (TypeError, ValueError):
            pass
    raise UserError(f"{head!r:.60} is no head: write (layer, head) or L4H0.")
