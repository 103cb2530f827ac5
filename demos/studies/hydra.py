"""Hydra: how many heads an intervention needs, live and with the other heads' patterns frozen.

The paper (section "Induction", footnote): steering has to cover many heads, perhaps because others
take over; with their patterns frozen fewer than half as many are needed.
"""

from __future__ import annotations

from statistics import mean

import verdicts
from common import (
    Case,
    Session,
    Study,
    bars_figure,
    ctqk,
    curves_figure,
    effects_figure,
    main,
)
from induction import edits, prompts, tags


def run(model: ctqk.ResidualModel, n: int = 24) -> Study:
    """Hydra: heads needed to end the copy, live against frozen."""
    study = Study(
        "hydra",
        "Hydra",
        "With the patterns of heads that are not steered frozen, fewer than half as many heads "
        "have to be steered for the same effect.",
        'Removing the "name after this title" features on the key side of the first 0, 1, 2, ... '
        "heads in the order of what they carried from the name to the last token (norms frozen). "
        "Effect: heads needed for half of the full effect, live minus frozen (positive is what the "
        "paper saw); controls: the same heads in random orders, live, minus the ranked order.",
        [],
        unit="heads",
        control_name="random orders",
    )
    most = model.cfg.n_heads
    live, frozen, shuffled = [], [], []
    needs: dict[str, list[float]] = {"live": [], "patterns frozen": [], "live, random order": []}
    for prompt in prompts(n, seed=16):
        graph, session = ctqk.attribute(prompt.text, model), Session(model, prompt.text)
        ranked = ctqk.select_heads(graph, query=graph.n_pos - 1, key=prompt.key, share=1.0)
        ranked = [h for h in ranked if h[0] > 0][:most]
        tagged = tags(session, model, prompt, sorted({layer for layer, _ in ranked}))
        made = edits(ranked, tagged, prompt.key, 0.0)
        ranked = [h for h in ranked if tagged[h[0]]]
        curve = ctqk.head_curve(
            model, prompt.text, made, ranked, prompt.answer, norms="frozen", controls=5
        )
        counts = [curve.needed(points) for points in (curve.live, curve.frozen)]
        others = [curve.needed(points) for points in curve.random]
        if counts[0] is None:
            continue  # all heads together did nothing here

        def padded(points: list[float]) -> list[float]:
            return points + [points[-1]] * (most + 1 - len(points))

        live.append(padded(curve.live))
        frozen.append(padded(curve.frozen))
        shuffled.append(padded([mean(p[i] for p in curve.random) for i in range(len(curve.live))]))
        limit = len(ranked) + 1  # not reached with all of them
        a, b = (limit if c is None else c for c in counts)
        needs["live"].append(a)
        needs["patterns frozen"].append(b)
        random = [limit if c is None else c for c in others]
        needs["live, random order"].append(mean(random))
        study.cases.append(
            Case(
                prompt.text,
                float(a - b),
                [float(r - a) for r in random],
                more={"live": a, "frozen": b},
            )
        )
    document = study.document()
    m = {name: mean(values) for name, values in needs.items()}
    study.numbers = {
        "heads_needed": m,
        "probability_by_heads_live": [mean(c[i] for c in live) for i in range(most + 1)],
        "probability_by_heads_frozen": [mean(c[i] for c in frozen) for i in range(most + 1)],
        "prompts_where_frozen_needs_fewer": mean(c.effect > 0 for c in study.cases),
        "prompts_where_frozen_needs_more": mean(c.effect < 0 for c in study.cases),
    }
    study.shown, study.verdict = verdicts.hydra(document, study.numbers)
    x = list(range(most + 1))
    study.figures = [
        curves_figure(
            x,
            {
                "everything live": live,
                "other patterns frozen": frozen,
                "live, random order": shuffled,
            },
            ("heads steered", "probability of the name"),
            "Mean and standard deviation over prompts, heads in the order of what they carried.",
        ),
        bars_figure(needs, "heads needed for half of the effect", "Mean and sd over prompts."),
        effects_figure(
            study, "heads needed, difference", "Above live - frozen; below random - ranked order."
        ),
    ]
    return study


if __name__ == "__main__":
    main(run)
