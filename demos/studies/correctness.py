"""Correctness: how the model tells a right statement from a wrong one.

The paper (section "Correctness circuits"): concordance and discordance heads compare colour and
object in their QK circuits; minus yellow plus red on the query side moves their attention and flips
Yes to No; the eigenvalues of their W_QK skew positive and negative.
"""

from __future__ import annotations

from random import Random
from statistics import mean, pstdev
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
import verdicts
from common import (
    BLUE,
    GREY,
    ORANGE,
    Case,
    Session,
    Study,
    bars_figure,
    between,
    corpus,
    ctqk,
    drawn,
    effects_figure,
    features,
    main,
    outcome,
    specific,
)
from torch import Tensor


class Claim(NamedTuple):
    """A right statement and a wrong one about an object.

    Attributes:
        right, wrong: the prompts; they differ in one word.
        thing: the object's token.
    """

    right: str
    wrong: str
    thing: str


def prompts(n: int, seed: int = 15) -> list[Claim]:
    """Statements of every wording."""
    random, found = Random(seed), []
    for attribute, thing, value in random.sample(corpus.FACT_LIST, len(corpus.FACT_LIST)):
        others = [
            v
            for v in corpus.VALUES[attribute]
            if v != value and thing not in corpus.FACTS[attribute][v].split()
        ]
        stem = corpus.STATEMENTS[len(found) % len(corpus.STATEMENTS)]

        def said(v: str) -> str:
            return stem.format(q=attribute, o=corpus.article(thing), v=v) + "?"  # noqa: B023

        found.append(Claim(said(value), said(random.choice(others)), f" {thing}"))
        if len(found) == n:
            break
    return found


def concordance(graph: ctqk.ResidualGraph, distance: int) -> list[list[float]]:
    """Per layer and head: sum Re(l) / sum |l| over the eigenvalues of W_Q R W_K^T.

    The norm's gain and centring are folded into both maps first; R turns queries by ``distance``
    positions against their keys, as rotary does (rows: z R).
    """
    heads, found = graph.record.heads, []
    for layer in range(graph.run.n_layers):
        block = heads.block(layer)

        def folded(W: Tensor) -> Tensor:
            W = W if block.ln1.w is None else W * block.ln1.w[:, None]  # noqa: B023
            return W - W.mean(0) if block.ln1.centred else W  # noqa: B023

        row = []
        for head in range(block.n_heads):
            turned = block.rotate(
                folded(block.W_Q[head]), torch.full((graph.cfg.d_model,), distance)
            )
            small = folded(block.W_K[block.group(head)]).T @ turned
            values = torch.linalg.eigvals(small.double())
            row.append(float(values.real.sum() / values.abs().sum()))
        found.append(row)
    return found


def name(head: tuple[int, int]) -> str:
    """(3, 2) as L3H2."""
    return f"L{head[0]}H{head[1]}"


def gains(
    model: ctqk.ResidualModel, claims: list[Claim], heads: list[tuple[int, int]]
) -> dict[tuple[int, int], list[tuple[float, float]]]:
    """Per head and claim, attention on the object in the right and in the wrong statement.

    The larger of what the value's token and the question mark pay it.
    """
    found: dict[tuple[int, int], list[tuple[float, float]]] = {head: [] for head in heads}
    for claim in claims:
        right, wrong = Session(model, claim.right), Session(model, claim.wrong)
        last, thing = len(right.token_strings) - 1, right.token_strings.index(claim.thing)
        for layer, head in heads:
            a, b = (
                float(s.parts.run.pattern[layer, head, last - 1 :, thing].max())
                for s in (right, wrong)
            )
            found[layer, head].append((a, b))
    return found


def steadiness(looks: list[tuple[float, float]]) -> float:
    """Mean over standard deviation of the attention gained by a right statement."""
    gained = [right - wrong for right, wrong in looks]
    return mean(gained) / (pstdev(gained) + 1e-9)


def run(model: ctqk.ResidualModel, n: int = 24) -> Study:
    """Correctness: heads that compare, the paper's swap, and what decides here."""
    study = Study(
        "correctness",
        "Correctness",
        "Concordance and discordance heads compare value and object; minus yellow plus red on the "
        "query side flips Yes to No; their W_QK eigenvalues skew positive and negative.",
        "All heads of layers 1 to 3; on the query side, at the value and at the question mark, the "
        "features of the right statement swapped for those of the wrong one (minus yellow, plus "
        "red; norms frozen). Effect: probability of Yes before minus after.",
        [],
    )
    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    every = [(layer, head) for layer in range(n_layers) for head in range(n_heads)]
    every_fact = prompts(len(corpus.FACT_LIST))
    reported, others = every_fact[:n], every_fact[n:]
    # chosen on other prompts, or the extremes of many heads would be reported as findings
    chosen_by = gains(model, others, every)
    later = [h for h in every if h[0] > 0]  # those that read features
    ordered = sorted(later, key=lambda h: -steadiness(chosen_by[h]))
    agree, differ = ordered[0], ordered[-1]
    looks = gains(model, reported, every)
    gain = {h: mean(a - b for a, b in v) for h, v in looks.items()}
    hidden: list[Case] = []
    after_swap: list[float] = []
    terms: dict[str, list[float]] = {}
    for i, prompt in enumerate(reported):
        right, wrong = Session(model, prompt.right), Session(model, prompt.wrong)
        last, thing = len(right.token_strings) - 1, right.token_strings.index(prompt.thing)
        edits = []
        for layer in range(1, n_layers):
            heads = [(layer, head) for head in range(n_heads)]
            for at in (last - 1, last):
                here, there = features(right, layer, at), features(wrong, layer, at)
                for f in sorted({*here, *there}):
                    step = there.get(f, 0.0) - here.get(f, 0.0)
                    if abs(step) > 0.5 * max(there.get(f, 0.0), here.get(f, 0.0)):
                        edits.append(ctqk.QKEdit(heads, "query", layer, f, at, inject=step))
        found = right.steer(edits, norms="frozen", controls=5, seed=i)
        study.cases.append(outcome(prompt.right, found, " Yes", no=found.probability(" No")))
        after_swap.append(float(found.patterns[agree][last - 1 :, thing].max()))
        for kind, own, other in (("right", right, wrong), ("wrong", wrong, right)):
            qk = ctqk.explain(prompt.right if kind == "right" else prompt.wrong, model)
            for head in (agree, differ):
                here, there = (features(s, head[0], last) for s in (own, other))
                table = qk.table(*head, last, thing)
                part = between(table, specific(here, [there]), features(own, head[0], thing))
                terms.setdefault(f"{name(head)}, {kind} value x object", []).append(part)
        # what decides here: one token hidden from block 0
        first = [(0, head) for head in range(n_heads)]

        def hide(at: int, answer: str, session: Session, heads=first) -> float:
            edit = ctqk.QKEdit(heads, "key", 0, "embedding", at, factor=0.0)
            done = session.steer(edit, norms="frozen", controls=0)
            return done.clean.probability(answer) - done.probability(answer)

        spared = [p for p in range(1, last - 1) if p != thing]
        hidden.append(
            Case(
                prompt.right,
                hide(thing, " Yes", right),
                [hide(p, " Yes", right) for p in spared],
                more={"no": hide(thing, " No", wrong)},
            )
        )
    index = concordance(ctqk.attribute(reported[0].right, model), 2)
    flat = sorted((index[h[0]][h[1]] for h in every), reverse=True)

    def about(head: tuple[int, int]) -> dict[str, Any]:
        value = index[head[0]][head[1]]
        rank = flat.index(value) + 1
        return {"head": name(head), "gain": gain[head], "index": value, "rank": rank}

    study.numbers = {
        "concordance_head": about(agree),
        "discordance_head": about(differ),
        "heads": len(every),
        "attention_on_object_right_minus_wrong": {name(h): gain[h] for h in every},
        "concordance_index": {name(h): index[h[0]][h[1]] for h in every},
        "value_by_object": {
            kind: mean(terms[f"{name(agree)}, {kind} value x object"])
            for kind in ("right", "wrong")
        },
        "swap_moves_attention": mean(after_swap) - mean(a for a, _ in looks[agree]),
        "object_hidden_from_block_0": {
            "yes": mean(c.effect for c in hidden),
            "no": mean(c.more["no"] for c in hidden),
            "other_tokens": mean(x for c in hidden for x in c.controls),
        },
    }
    study.shown, study.verdict = verdicts.correctness(study.document(), study.numbers)
    ordered = sorted(every, key=lambda h: -gain[h])
    figure, axis = plt.subplots(figsize=(6.0, 3.0))
    for head in every:
        x, y = index[head[0]][head[1]], gain[head]
        color = BLUE if head in ordered[:3] else ORANGE if head in ordered[-3:] else GREY
        axis.scatter(x, y, s=14, color=color)
        if color != GREY:
            axis.annotate(name(head), (x, y), textcoords="offset points", xytext=(4, 3), fontsize=8)
    axis.axhline(0, color="#cccccc", lw=0.8, zorder=0)
    axis.axvline(0, color="#cccccc", lw=0.8, zorder=0)
    axis.set_xlabel("concordance index of W_QK (offset 2)")
    axis.set_ylabel("attention on the object,\nright - wrong")
    shown = sorted({*ordered[:3], *ordered[-3:]}, key=lambda h: -gain[h])
    study.figures = [
        effects_figure(study, "probability of Yes, before - after", "One dot a run."),
        drawn(figure, "Every head: do its eigenvalues tell what it does? Named: the three that "
              "look more when the statement is right, and the three that look less."),
        bars_figure(
            {f"{name(h)}, {w} statement": [pair[i] for pair in looks[h]]
             for h in shown for i, w in enumerate(("right", "wrong"))},
            "attention on the object, from value or question mark",
            "The named heads on right and wrong statements: mean and sd.",
            (0, 1),
        ),
        bars_figure(
            terms,
            "part of the score, query = question mark, key = object",
            "Value features x object features in the heads chosen on other prompts: the one that "
            "looks more at the object when the statement is right, and the one that looks less.",
        ),
        effects_figure(
            Study("hidden", "", "", "", hidden),
            "probability of Yes, before - after",
            "Block 0 with one token hidden as a key: above the object, below the others.",
        ),
    ]  # fmt: skip
    return study


if __name__ == "__main__":
    main(run)
