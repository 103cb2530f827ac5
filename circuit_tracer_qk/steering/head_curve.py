"""How many heads an intervention needs, with everything live and with other patterns frozen.

Heads that are not steered may take over from those that are (the paper's "hydra effect", section
"Induction"): the difference between the two curves is what they take over.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from random import Random
from typing import NamedTuple

from torch import Tensor

from circuit_tracer_qk.attribution.residual.model import ResidualModel
from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.steering.edits import Edit, Head, HeadEdit, HeadLike, QKEdit, parse_head
from circuit_tracer_qk.steering.results import Norms
from circuit_tracer_qk.steering.steer import Session


class HeadCurve(NamedTuple):
    """A token's probability as more and more heads are steered.

    Attributes:
        heads: in the order in which they were added; point n steers the first n.
        live: len(heads) + 1 probabilities, everything downstream live.
        frozen: the same with the patterns of heads that are not steered frozen.
        random: per control, the live curve with the same heads added in a random order.
    """

    heads: list[Head]
    live: list[float]
    frozen: list[float]
    random: list[list[float]]

    def needed(self, curve: Sequence[float], share: float = 0.5) -> int | None:
        """The fewest heads that take away ``share`` of what all of them take away, if any do."""
        start, end = self.live[0], min(self.live[-1], self.frozen[-1])
        if end >= start:
            return None
        limit = start - share * (start - end)
        return next((n for n, p in enumerate(curve) if p <= limit), None)


def head_curve(
    model: ResidualModel,
    prompt: str | Tensor | list[int],
    edits: Edit | Iterable[Edit],
    heads: Iterable[HeadLike],
    token: str | int,
    *,
    norms: Norms = "live",
    controls: int = 5,
    seed: int = 0,
) -> HeadCurve:
    """Steer the first 0, 1, 2, ... heads of a ranking.

    Args:
        model, prompt: as in :func:`circuit_tracer_qk.steer`.
        edits: each is made in those of its own heads that the ranking has reached.
        heads: ranked, as of :func:`circuit_tracer_qk.select_heads`.
        token: whose probability is wanted.
        norms: as in :func:`circuit_tracer_qk.steer`.
        controls: how many random orders of the same heads.
        seed: of those orders.

    Raises:
        UserError: no heads, or what :func:`circuit_tracer_qk.steer` refuses.
    """
    session = Session(model, prompt)
    given: tuple[Edit, ...] = (edits,) if isinstance(edits, QKEdit | HeadEdit) else tuple(edits)
    ranked = list(dict.fromkeys(parse_head(head) for head in heads))
    if not ranked:
        raise UserError("a curve needs at least one head.")
    edited = {head for edit in given for head in edit.heads}
    for layer, head in ranked:
        if (layer, head) not in edited:
            raise UserError(
                f"no edit names the head L{layer}H{head}, so steering it would change nothing: "
                "leave it out, or give an edit of it."
            )

    def curve(order: Sequence[Head], freeze: str) -> list[float]:
        points = []
        for n in range(len(order) + 1):
            some = [edit for e in given if (edit := _within(e, set(order[:n])))]
            if not some:
                points.append(clean)
                continue
            run = session.steer(some, freeze=freeze, norms=norms, controls=0)  # type: ignore
            points.append(run.probability(token))
        return points

    clean = session.steer(given, norms=norms, controls=0).clean.probability(token)
    shuffled = [Random(seed + i).sample(ranked, len(ranked)) for i in range(controls)]
    return HeadCurve(
        ranked,
        curve(ranked, "none"),
        curve(ranked, "patterns"),
        [curve(order, "none") for order in shuffled],
    )


def _within(edit: Edit, heads: set[Head]) -> Edit | None:
    """The edit in those of its heads that are allowed; None where there are none."""
    mine = [head for head in edit.heads if head in heads]
    if not mine:
        return None
    if isinstance(edit, HeadEdit):
        return HeadEdit(mine, edit.factor, edit.positions)
    how = {"factor": edit.factor} if edit.inject is None else {"inject": edit.inject}
    return QKEdit(mine, edit.side, edit.checkpoint, edit.features, edit.positions, **how)
