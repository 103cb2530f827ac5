"""Edits as text: what the command line takes, and the lists of a steered run's JSON."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from circuit_tracer_qk.attribution.head import Head
from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.base.files import read_file
from circuit_tracer_qk.base.json_text import unique_keys
from circuit_tracer_qk.base.rules import read_number
from circuit_tracer_qk.steering.edits import Edit, HeadEdit, QKEdit

KEYS = ("side", "heads", "checkpoint", "features", "positions", "factor", "inject")
EDITS_BYTES = 2**26  # how long a file of edits may be
EXAMPLE = "side=key heads=L1H2,L1H7 features=L0/61,L0/177 positions=6 factor=0"
_CHOICE = re.compile(
    r"([0-9]{1,9}|[0-9]{1,9}(?:\.[0-9]+)?%)@(?:q(-?[0-9]{1,9}))?:?(?:k(-?[0-9]{1,9}))?",
    re.ASCII | re.IGNORECASE,
)


class HeadChoice(NamedTuple):
    """Heads that a graph is asked for: ``4@q14:k6``, or ``80%@q14:k6``.

    Attributes:
        count, share: one of them.
        query, key: positions whose edges count; None for any.
    """

    count: int | None
    share: float | None
    query: int | None
    key: int | None


ChooseHeads = Callable[[HeadChoice], list[Head]]


def parse_edit(text: str, choose: ChooseHeads) -> Edit:
    """An edit from ``name=value`` parts; without a side, heads' outputs are scaled.

    Args:
        text: such as :data:`EXAMPLE`.
        choose: finds the heads that a :class:`HeadChoice` asks for.

    Raises:
        UserError: a part that is unknown, missing, doubled or no number.

    >>> parse_edit("heads=L1H2 factor=0", lambda choice: [])
    HeadEdit(heads=((1, 2),), factor=0.0, positions=None)
    """
    parts: dict[str, str] = {}
    for part in text.split():
        name, equals, value = part.partition("=")
        if not equals or name not in KEYS or not value:
            raise UserError(
                f"{part!r:.60} in the edit {text!r:.120} is not understood: write parts such as {EXAMPLE}."
            )
        if name in parts:
            raise UserError(f"the edit {text!r:.120} names {name} twice.")
        parts[name] = value
    if "heads" not in parts:
        raise UserError(f"the edit {text!r:.120} names no heads: write parts such as {EXAMPLE}.")
    document: dict[str, Any] = parts | {"heads": _chosen(parts["heads"], choose)}
    for name in {"features", "positions"} & parts.keys():
        document[name] = [_whole_or_text(x) for x in parts[name].split(",") if x]
    for name in {"factor", "inject"} & parts.keys():
        with contextlib.suppress(ValueError):  # what is no number is refused by the edit itself
            document[name] = read_number(parts[name])
    if "checkpoint" in parts:
        document["checkpoint"] = _whole_or_text(parts["checkpoint"])
    return read_edit(document, f"the edit {text!r:.120}")


def read_edit(document: Any, called: str = "an edit") -> Edit:
    """An edit from the form it has in JSON.

    Args:
        document: the JSON object; ``names``, which a steered run writes beside ``features``, may
            stand in their place.
        called: what error messages call it.

    Raises:
        UserError: a field that is unknown or missing, or an edit that means nothing.
    """
    if not isinstance(document, dict):
        raise UserError(f"{called} is no JSON object with heads, side and features.")
    document = dict(document)
    names = document.pop("names", None)
    unknown = sorted(set(document) - set(KEYS))
    if unknown:
        raise UserError(
            f"{called} has the unknown part {unknown[0]:.60}; known are {', '.join(KEYS)}."
        )
    if "features" not in document and names is not None:
        document["features"], names = names, None
    for name in ("heads", "features") if "side" in document else ("heads", "factor"):
        if name not in document:
            raise UserError(
                f"{called} lacks {name}: an edit of the QK circuit has a side, heads and features; "
                "one of heads' outputs has heads and a factor."
            )
    if "side" not in document:
        extra = sorted(set(document) - {"heads", "factor", "positions"})
        if extra:
            raise UserError(f"{called} has {extra[0]:.60} but no side: add side=query or side=key.")
        return HeadEdit(**document)
    edit = QKEdit(**document)
    if names is not None and names != list(edit.resolved.names):
        raise UserError(f"{called} has names that are not those of its features: leave one out.")
    return edit


def read_edits(path: str | Path) -> list[Edit]:
    """The edits of a JSON file: a list of them, or a steered run with ``edits``.

    Raises:
        UserError: a file that cannot be read as such.
    """
    try:
        content = read_file(path, EDITS_BYTES).decode()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text: {error}.") from error
    try:
        document = json.loads(content, object_pairs_hook=unique_keys)
    except UserError as error:  # a key that stands twice
        raise UserError(f"{path}: {error}.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON: {error}.") from error
    if isinstance(document, dict):
        document = document.get("edits")
    if not isinstance(document, list) or not document:
        raise UserError(f"{path} holds no edits: write a list of them, or give a run's own JSON.")
    return [read_edit(edit, f"edit {i} of {path}") for i, edit in enumerate(document, 1)]


def _chosen(text: str, choose: ChooseHeads) -> list[Any]:
    heads: list[Any] = []
    for part in (x for x in text.split(",") if x):
        choice = _CHOICE.fullmatch(part)
        if choice is None:
            heads.append(part)
            continue
        number, *positions = choice.groups()
        share = float(number[:-1]) / 100 if number.endswith("%") else None
        query, key = (None if text is None else int(text) for text in positions)
        heads += choose(HeadChoice(int(number) if share is None else None, share, query, key))
    return heads


def _whole_or_text(text: str) -> int | str:
    return int(text) if re.fullmatch("-?[0-9]{1,18}", text) else text
