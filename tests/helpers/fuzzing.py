"""Many random cases of one surface, the same ones for the same seed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

QUICK = 25  # cases of a test of ``make test``


def run_cases(
    config: pytest.Config, strategy: st.SearchStrategy[Any], check: Callable[[Any], None]
) -> None:
    """Check as many cases as ``--cases`` says, from ``--seed`` on."""
    number, start = int(config.getoption("--cases") or 1), int(config.getoption("--seed") or 0)
    unchecked: list[Any] = list(HealthCheck)

    @seed(start)
    @settings(
        max_examples=number,
        derandomize=False,
        database=None,
        deadline=None,
        suppress_health_check=unchecked,
    )
    @given(case=strategy)
    def every(case: Any) -> None:
        check(case)

    every()


ODD_TEXTS = [
    *("", " ", "\x00", "a\nb", "\u0663", "nan", "-1", "1e400", "\ud800", "\U0001f600", "x" * 300),
    *(
        "../x",
        "/dev/null",
        "/dev/zero",
        ".",
        "~nobody/x",
        "con",
        "a/b/c/d",
        "-",
        "--",
        "%s{}",
        "[1",
    ),
]
TEXTS = st.sampled_from(ODD_TEXTS) | st.text(max_size=12)
NUMBERS = (
    st.integers(-3, 20)
    | st.sampled_from([10**9, -(10**9), 2**63, 10**400])
    | st.floats(allow_nan=True, allow_infinity=True)
)
ANYTHING = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS | st.binary(max_size=4) | st.just(object()),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner),
    max_leaves=4,
)


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes of a file, somewhere changed."""
    at = draw(st.integers(0, max(len(data) - 1, 0)))
    length = draw(st.integers(0, 40))
    how = draw(st.sampled_from(["flip", "cut", "delete", "insert", "replace", "empty"]))
    if how == "flip":
        changed = bytearray(data)
        if changed:
            changed[at] ^= 1 << draw(st.integers(0, 7))
        return bytes(changed)
    if how == "cut":
        return data[:at]
    if how == "delete":
        return data[:at] + data[at + length :]
    if how == "empty":
        return b""
    new = draw(
        st.binary(max_size=8) | st.sampled_from([b"[" * 2000, b'"', b"\xff\xfe", b"NaN", b"-"])
    )
    return data[:at] + new + data[at + (len(new) if how == "replace" else 0) :]


@st.composite
def altered(draw: st.DrawFn, document: Any) -> Any:
    """A JSON document with one of its values, keys or entries changed."""
    if isinstance(document, dict) and document and draw(st.integers(0, 3)):
        key = draw(st.sampled_from(sorted(document)))
        how = draw(st.sampled_from(["into", "into", "drop", "rename"]))
        rest = {k: v for k, v in document.items() if k != key}
        if how == "drop":
            return rest
        if how == "rename":
            return rest | {draw(st.text(max_size=5)): document[key]}
        return document | {key: draw(altered(document[key]))}
    if isinstance(document, list) and document and draw(st.integers(0, 3)):
        at = draw(st.integers(0, len(document) - 1))
        return [*document[:at], draw(altered(document[at])), *document[at + 1 :]]
    plain = st.none() | st.booleans() | st.integers(-5, 10**12) | st.text(max_size=5)
    return draw(plain | st.floats() | st.lists(plain, max_size=2) | st.just({}) | st.just({"a": 1}))


def leftovers(folder: Path) -> list[str]:
    """What an unfinished writer leaves in a folder."""
    return sorted(path.name for path in folder.rglob(".*") if path.suffix == ".tmp")


@contextmanager
def one_sentence() -> Any:
    """Within, nothing but a refusal in one sentence may be raised."""
    import circuit_tracer_qk as ctqk

    try:
        yield
    except ctqk.UserError as error:
        message = str(error)
        assert message and len(message) < 1500 and "Traceback" not in message, message
