"""What the page asks to have steered, read from the query of its address.

Plain values, so that the server needs no torch to read them; what they mean for a model, and
whether it has them, is :mod:`circuit_tracer_qk.steering.steer`'s to say.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Literal
from urllib.parse import parse_qsl

from circuit_tracer_qk.frontend.answers import Refusal

MOST_HEADS, MOST_FEATURES, MOST_POSITIONS, MOST_CONTROLS = 256, 256, 1024, 50
LARGEST_FACTOR, LARGEST_ACTIVATION = 100, 1_000_000
KINDS = ("all", "bias", "embedding", "error", "position")
"""What may stand in place of a feature's index."""

_NAMES = (
    *("heads", "side", "checkpoint", "features", "positions", "factor", "inject"),
    *("norms", "freeze", "controls", "seed", "query"),
)
_OF_A_SIDE = ("checkpoint", "features", "inject")
_WHOLE = re.compile(r"[0-9]{1,9}")
_DECIMAL = re.compile(r"-?[0-9]{1,9}(\.[0-9]{1,17})?")
_HEAD = re.compile(r"L([0-9]{1,4})H([0-9]{1,4})")


@dataclass(frozen=True)
class SteerRequest:
    """One edit and how to run it: of features in heads' QK circuits, or of heads' outputs.

    Attributes:
        heads: (layer, head) of every head.
        side: "query" or "key"; None for the heads' outputs.
        checkpoint, features, positions, factor, inject: as in :class:`~circuit_tracer_qk.QKEdit`.
        norms, freeze, controls, seed: as in :func:`circuit_tracer_qk.steer`.
        query: the position whose attention rows are wanted; None for the last.
    """

    heads: tuple[tuple[int, int], ...]
    side: Literal["query", "key"] | None = None
    checkpoint: int | None = None
    features: tuple[int | str, ...] = ()
    positions: tuple[int, ...] | None = None
    factor: float | None = None
    inject: float | None = None
    norms: Literal["live", "frozen"] = "live"
    freeze: Literal["none", "patterns"] = "none"
    controls: int = 20
    seed: int = 0
    query: int | None = None


def read_request(query: str) -> SteerRequest:
    """The request that a query string is.

    Raises:
        Refusal: something is missing, malformed, given twice or not known.
    """
    pairs = parse_qsl(query, keep_blank_values=True)
    given = dict(pairs)
    unknown = sorted(set(given) - set(_NAMES))
    if unknown or len(pairs) != len(given):
        raise _refused(f"what can be given, each once, is {', '.join(_NAMES)}")
    if "heads" not in given:
        raise _refused("heads is missing: such as L1H2,L1H3")
    if ("factor" in given) == ("inject" in given):
        raise _refused("either factor or inject must be given")
    if "side" not in given and any(name in given for name in _OF_A_SIDE):
        raise _refused("side is missing: query or key; only heads' outputs have none")
    values: dict[str, Any] = {"heads": _list("heads", given["heads"], _head, MOST_HEADS)}
    if "side" in given:
        values["side"] = _one_of("side", given["side"], ("query", "key"))
        for name in ("checkpoint", "features"):
            if name not in given:
                raise _refused(f"{name} is missing: a side's edit needs it")
        values["features"] = _list("features", given["features"], _feature, MOST_FEATURES)
    if "positions" in given:
        values["positions"] = _list("positions", given["positions"], _position, MOST_POSITIONS)
    for name in ("checkpoint", "controls", "seed", "query"):
        if name in given:
            values[name] = _whole(name, given[name])
    if values.get("controls", 0) > MOST_CONTROLS:
        raise _refused(f"controls must be at most {MOST_CONTROLS}")
    for name, largest in (("factor", LARGEST_FACTOR), ("inject", LARGEST_ACTIVATION)):
        if name in given:
            values[name] = _decimal(name, given[name], largest)
    for name, known in (("norms", ("live", "frozen")), ("freeze", ("none", "patterns"))):
        if name in given:
            values[name] = _one_of(name, given[name], known)
    return SteerRequest(**values)


def _refused(reason: str) -> Refusal:
    return Refusal(HTTPStatus.BAD_REQUEST, f"{reason}.")


def _list(name: str, text: str, read: Any, most: int) -> tuple[Any, ...]:
    found = tuple(read(part) for part in text.split(",", most))
    if len(found) > most:
        raise _refused(f"{name} can be at most {most}")
    if len(set(found)) < len(found):
        raise _refused(f"{name} must be different ones")
    return found


def _head(text: str) -> tuple[int, int]:
    found = _HEAD.fullmatch(text)
    if found is None:
        raise _refused("heads must be written as L1H2,L1H3")
    return int(found[1]), int(found[2])


def _feature(text: str) -> int | str:
    if text in KINDS:
        return text
    if not _WHOLE.fullmatch(text):
        raise _refused(f"features must be whole numbers from 0 on, or {', '.join(KINDS)}")
    return int(text)


def _position(text: str) -> int:
    return _whole("positions", text)


def _whole(name: str, text: str) -> int:
    if not _WHOLE.fullmatch(text):
        raise _refused(f"{name} must be a whole number from 0 on")
    return int(text)


def _decimal(name: str, text: str, largest: float) -> float:
    if not _DECIMAL.fullmatch(text) or abs(float(text)) > largest:
        raise _refused(f"{name} must be a decimal number from -{largest} to {largest}")
    return float(text)


def _one_of(name: str, text: str, known: tuple[str, str]) -> Any:
    if text not in known:
        raise _refused(f"{name} must be {known[0]} or {known[1]}")
    return text
