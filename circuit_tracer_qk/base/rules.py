"""What options may be, said once for Python, the command line, lines of prompts and the server.

Loads nothing, because every surface needs it. A rule is found by the option's public name, so that
``--max_n_logits``, ``max_n_logits=`` and the key of a line of prompts are checked alike.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any

from circuit_tracer_qk.base.errors import UserError


@dataclass(frozen=True)
class Rule:
    """What one option may be.

    Attributes:
        kind: int, float, bool, str (not empty) or Path (a text that is not empty does, too).
        low, high: the smallest and the largest number.
        optional: None is allowed.
    """

    kind: type
    low: float | None = None
    high: float | None = None
    optional: bool = False

    @property
    def words(self) -> str:
        """What completes "it must be"."""
        named = {
            int: "a whole number",
            float: "a finite number",
            bool: "True or False",
            str: "a text that is not empty",
            Path: "a path that is not empty",
        }[self.kind]
        if self.high is not None:
            named = named.replace("finite ", "")
            return f"{named} from {self.low} to {self.high}"
        return named if self.low is None else f"{named} from {self.low} on"

    def checked(self, value: Any, called: str) -> Any:
        """The value as a plain one, if it is allowed.

        Args:
            value: as given; numbers of numpy and torch do.
            called: the option's name where it was given.

        Raises:
            UserError: it is not.
        """
        if value is None and self.optional:
            return None
        plain = self._plain(value)
        bounded = (
            plain is not None
            and (self.low is None or plain >= self.low)
            and (self.high is None or plain <= self.high)
        )
        if bounded:
            return plain
        given = f"{value!r:.60}"
        raise UserError(f"{called} is {given}: it must be {self.words}.")

    def _plain(self, value: Any) -> Any:
        """The value in its kind; None where it is of another."""
        if self.kind is bool:
            return value if isinstance(value, bool) else None
        if self.kind is str:
            return value if isinstance(value, str) and value else None
        if self.kind is Path:
            return value if isinstance(value, str | Path) and str(value) else None
        return whole(value) if self.kind is int else finite(value)


def whole(value: Any) -> int | None:
    """A whole number of any library; None where it is none: True, 2.0 and "3" are none."""
    try:
        return None if isinstance(value, bool) else index(value)
    except TypeError:
        return None


def finite(value: Any) -> float | None:
    """A finite number of any library; None where it is none: True, nan and "3" are none."""
    if isinstance(value, bool | str | bytes):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None
    return number if math.isfinite(number) else None


SHARE, COUNT, FLAG, TEXT = Rule(float, 0, 1), Rule(int, 1), Rule(bool), Rule(str)
OPTIONAL_TEXT, OPTIONAL_PATH = Rule(str, optional=True), Rule(Path, optional=True)

RULES: Mapping[str, Rule] = {
    "batch_size": COUNT,
    "budget": Rule(int, 1, optional=True),
    "count": Rule(int, 1, optional=True),
    "data_dir": Rule(Path),
    "desired_logit_prob": SHARE,
    "dictionaries": OPTIONAL_PATH,
    "edge_threshold": SHARE,
    "edits": OPTIONAL_PATH,
    "factor": Rule(float),
    "features_dir": OPTIONAL_PATH,
    "force": FLAG,
    "generate": Rule(int, 1, optional=True),
    "graph_file_dir": OPTIONAL_PATH,
    "graph_output_path": OPTIONAL_PATH,
    "folder": OPTIONAL_PATH,
    "graph": OPTIONAL_PATH,
    "host": TEXT,
    "json": OPTIONAL_PATH,
    "max_bytes": Rule(int, 0),
    "max_feature_nodes": Rule(int, 0, optional=True),
    "max_file_bytes": Rule(int, 0),
    "max_n_logits": COUNT,
    "max_new_tokens": COUNT,
    "max_tables": Rule(int, 0),
    "max_texts": Rule(int, 1, optional=True),
    "model": OPTIONAL_PATH,
    "n": COUNT,
    "node_threshold": SHARE,
    "np_model": OPTIONAL_TEXT,
    "online": FLAG,
    "output": OPTIONAL_PATH,
    "output_path": Rule(Path),
    "path": Rule(Path),
    "port": Rule(int, 0, 65535),
    "prompts": OPTIONAL_PATH,
    "qk": FLAG,
    "ref": Rule(Path),
    "slug": OPTIONAL_TEXT,
    "texts": Rule(Path),
    "top": COUNT,
    "top_terms": COUNT,
    "transcoder_set": OPTIONAL_PATH,
    "verbose": FLAG,
    "workers": Rule(int, 1, optional=True),
}
"""The rule of every option, by the name that it has on every surface."""


def check(**values: Any) -> dict[str, Any]:
    """Options of a call in Python, as plain values.

    Raises:
        UserError: naming the first that is not allowed, and what it must be.
    """
    return {name: RULES[name].checked(value, name) for name, value in values.items()}


def check_flags(flags: Mapping[str, str], values: Mapping[str, Any]) -> None:
    """Options of the command line.

    Args:
        flags: option -> the flag as it is typed.
        values: option -> what was parsed.

    Raises:
        UserError: as :func:`check`.
    """
    for name, flag in flags.items():
        if name in RULES and values.get(name) is not None:
            RULES[name].checked(values[name], flag)


def read_whole(text: str) -> int:
    """A whole number as it is typed: ASCII digits alone.

    Raises:
        ValueError: it is none.
    """
    if not re.fullmatch(r"[+-]?[0-9]{1,18}", text):
        raise ValueError(text)
    return int(text)


def read_number(text: str) -> float:
    """A finite decimal number as it is typed, in ASCII.

    Raises:
        ValueError: it is none.
    """
    if not re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?", text):
        raise ValueError(text)
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


read_whole.__name__, read_number.__name__ = "int", "float"  # argparse says "invalid int value"


def listed(value: Any, called: str, words: str) -> list[Any]:
    """The items of a list, a tuple or another collection that is no text.

    Raises:
        UserError: it is none.
    """
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise UserError(f"{called} is {value!r:.60}: give {words}.")
    return list(value)
