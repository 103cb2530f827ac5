"""How many heads an intervention needs, with everything live and with other patterns frozen.

Heads that are not steered may take over from those that are (the paper's "hydra effect", section
"Induction"): the difference between the two curves is what they take over.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from random import Random

from torch import Tensor

from circuit_tracer_qk.attribution.head import Head, HeadLike, head_name, parse_head
from circuit_tracer_qk.attribution.residual.model import ResidualModel
from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.steering.edits import Edit, Edits, listed_edits
from circuit_tracer_qk.steering.options import DEFAULTS, Freeze, Norms, SteeringOptions
from circuit_tracer_qk.steering.results import HeadCurve
from circuit_tracer_qk.steering.steer import Session


def head_curve(
    model: ResidualModel,
    prompt: str | Tensor | list[int],
    edits: Edits,
    heads: Iterable[HeadLike],
    token: str | int,
    *,
    norms: Norms = DEFAULTS.norms,
    controls: int = 5,
    seed: int = DEFAULTS.seed,
) -> HeadCurve:
    """Steer the first 0, 1, 2, ... heads of a ranking.

    (Paper, "Induction": few heads taken away are made up for by others, the "hydra effect".)

    Args:
        model, prompt: as in :func:`circuit_tracer_qk.steer`.
        edits: each is made in those of its own heads that the ranking has reached.
        heads: ranked, as of :func:`circuit_tracer_qk.select_heads`.
        token: whose probability is wanted.
        norms: as in :func:`circuit_tracer_qk.steer`.
        controls: how many random orders of the same heads.
        seed: of those orders.

    Returns:
        Curves of len(heads) + 1 probabilities.

    Raises:
        UserError: no heads, or what :func:`circuit_tracer_qk.steer` refuses.

    >>> import circuit_tracer_qk as ctqk
    >>> heads = ["L1H2", "L1H7"]
    >>> edit = ctqk.QKEdit(heads, "key", features="L0/61", positions=6, factor=0)
    >>> prompt = "I always loved visiting Aunt Sally. Whenever I was feeling sad, Aunt"
    >>> ctqk.head_curve(ctqk.load_model(device="cpu"), prompt, edit, heads, " Sally", controls=1)
    HeadCurve of L1H2 L1H7, 1 random orders
      live    0.998 0.187 0.017
      frozen  0.998 0.830 0.055
    """
    options = SteeringOptions(norms=norms, controls=controls, seed=seed)
    session, listed = Session(model, prompt), listed_edits(edits)
    ranked = list(dict.fromkeys(parse_head(head) for head in heads))
    if not ranked:
        raise UserError("a curve needs at least one head.")
    edited = {head for edit in listed for head in edit.resolved.heads}
    for head in ranked:
        if head not in edited:
            raise UserError(
                f"no edit names the head {head_name(head)}, so steering it would change nothing: "
                "leave it out, or give an edit of it."
            )

    def curve(order: Sequence[Head], freeze: Freeze) -> list[float]:
        points = [clean]
        for n in range(1, len(order) + 1):
            reached = [e for edit in listed if (e := _within(edit, set(order[:n])))]
            run = session.steer(reached, freeze=freeze, norms=norms, controls=0)
            points.append(run.probability(token))
        return points

    clean = session.steer(listed, norms=norms, controls=0).clean.probability(token)
    orders = [Random(options.seed + i).sample(ranked, len(ranked)) for i in range(options.controls)]
    live, frozen = curve(ranked, "none"), curve(ranked, "patterns")
    return HeadCurve(ranked, live, frozen, [curve(order, "none") for order in orders])


def _within(edit: Edit, heads: set[Head]) -> Edit | None:
    """The edit in those of its heads that are allowed; None where there are none."""
    allowed = [head for head in edit.resolved.heads if head in heads]
    return replace(edit, heads=allowed) if allowed else None
