"""One name for a feature on every surface: page, terminal, CSV, Python and steering.

    L0/61     feature 61 of node layer 0, as in circuit-tracer's node ids: checkpoint 1
    in/61     feature 61 of checkpoint 0, which has no node layer

The case of the letters does not matter (``l0/61`` and ``IN/61`` are read too), and numbers are
written with the digits 0 to 9: those of other scripts, full-width or circled ones are refused.
A node's layer is its checkpoint minus one, whether a set was trained at ``resid_post`` of that
layer or at ``resid_pre`` of the next; the block whose input a checkpoint is has the checkpoint's
own number.
"""

from __future__ import annotations

import re

from circuit_tracer_qk.base.errors import UserError

_NAME = re.compile(
    r"\s*(?:(in)|L([0-9]{1,9})(attn|mlp)?)/([0-9]{1,9})\s*", re.ASCII | re.IGNORECASE
)


def checkpoint_name(checkpoint: int) -> str:
    """A checkpoint as names begin with it: "L0" for checkpoint 1, "in" for checkpoint 0."""
    return f"L{checkpoint - 1}" if checkpoint else "in"


def feature_name(checkpoint: int, feature: int) -> str:
    """The name of a feature.

    Args:
        checkpoint: the one that the feature reads.
        feature: its index there.

    >>> feature_name(1, 61), feature_name(0, 61)
    ('L0/61', 'in/61')
    """
    return f"{checkpoint_name(checkpoint)}/{feature}"


def is_feature_name(text: str) -> bool:
    """Whether a text has the form of a feature's name."""
    return _NAME.fullmatch(text) is not None


def parse_feature_name(text: str) -> tuple[int, int]:
    """(checkpoint, feature) of a feature's name.

    Raises:
        UserError: a text that is no name, or the name of a feature of an attention graph.

    >>> parse_feature_name("L0/61"), parse_feature_name("in/61")
    ((1, 61), (0, 61))
    """
    match = _NAME.fullmatch(text)
    if match is None:
        raise UserError(
            f"{text!r} is no feature: write its name, such as L0/61 (in/61 at the model's input)."
        )
    at_input, layer, site, feature = match.groups()
    if site is not None:
        raise UserError(
            f"{text!r} names a feature of an attention graph, which does not exist here: features "
            "of residual dictionaries are named as L0/61."
        )
    return (0 if at_input else int(layer) + 1), int(feature)
