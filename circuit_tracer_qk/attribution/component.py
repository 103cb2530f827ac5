"""One named part of the residual stream, whatever graph it is a part of."""

from __future__ import annotations

from typing import NamedTuple

from circuit_tracer_qk.base.feature_names import checkpoint_name, feature_name
from circuit_tracer_qk.base.one_line import one_line

KINDS = ("feature", "bias", "error", "embedding", "position")
FEATURE, BIAS, ERROR, EMBEDDING, POSITION = range(5)
LABEL_WIDTH = 40


class Component(NamedTuple):
    """One named part of the residual stream at one position.

    Attributes:
        kind: one of ``KINDS``.
        checkpoint: the one that the feature reads; for the other kinds, the one decomposed.
        feature: its index in its dictionary; None for the other kinds.
        position: its token position.
        activation: the feature's; None for the other kinds.
        label: what a feature is about, "" if that is not known; the part's name for other kinds.

    >>> Component("feature", 1, 61, 6, 3.2, "a name")
    Component(L0/61 @6 "a name" 3.2)
    """

    kind: str
    checkpoint: int
    feature: int | None
    position: int
    activation: float | None
    label: str

    @property
    def name(self) -> str:
        """ "L0/61" for a feature ("in/61" at checkpoint 0), "L0 error" for the other kinds."""
        if self.feature is None:
            return f"{checkpoint_name(self.checkpoint)} {self.kind}"
        return feature_name(self.checkpoint, self.feature)

    def __repr__(self) -> str:
        parts = [self.name, f"@{self.position}"]
        if self.label not in ("", self.kind):
            blank = " " if self.label.startswith(" ") else ""  # a part of a token
            parts.append(f'"{blank}{one_line(self.label, LABEL_WIDTH)}"')
        if self.activation is not None:
            parts.append(f"{self.activation:.4g}")
        return f"Component({' '.join(parts)})"
