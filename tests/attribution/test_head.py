"""How a head is written."""

from __future__ import annotations

import numpy as np
import pytest

from circuit_tracer_qk import UserError
from circuit_tracer_qk.attribution.head import head_name, parse_head


@pytest.mark.parametrize("head", ["L4H0", " l4h0 ", (4, 0), [4, 0], np.array([4, 0])])
def test_every_form_of_a_head_is_read(head) -> None:
    assert parse_head(head) == (4, 0) and head_name(parse_head(head)) == "L4H0"


@pytest.mark.parametrize(
    "head",
    [
        "",
        "L4",
        "4H0",
        "L-1H0",
        "L\u0664H0",
        "L\uff14H0",
        "L4H\u2460",
        "L" + "9" * 5000 + "H0",
        (4,),
        4,
    ],
)
def test_what_is_no_head_is_refused(head) -> None:
    with pytest.raises(UserError, match=r"is no head: write \(layer, head\) or L4H0"):
        parse_head(head)
