"""Labels and tokens come from anywhere and are shown on one clean line."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from circuit_tracer_qk.base.one_line import one_line


@given(st.text(), st.integers(2, 50))
def test_every_text_becomes_one_line_that_can_be_printed(text: str, width: int) -> None:
    line = one_line(text, width)
    assert len(line) <= width and line.isprintable()
    line.encode()  # no lone surrogates


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a name", "a name"),
        ("two\n lines\t", "two lines"),
        ("red\x1b[31m", r"red\x1b[31m"),
        ("\ud800", r"\ud800"),
        ("\u202eback", r"\u202eback"),
        ("caf\u00e9 \u65e5\u672c it's", "caf\u00e9 \u65e5\u672c it's"),
    ],
)
def test_what_can_be_read_stays_and_the_rest_is_escaped(text: str, line: str) -> None:
    assert one_line(text) == line
