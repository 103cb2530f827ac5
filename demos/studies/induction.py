"""Induction: a title seen before calls for the name that followed it.

The paper (section "Induction"): query-side features of the title meet key-side "this is the name of
an Aunt" features on the name, beside key-side "a name" features; taking the former away, in the QK
circuit alone, ends the copying but not the talk of names; previous-token heads wrote them.
"""

from __future__ import annotations

from statistics import mean
from typing import NamedTuple

import verdicts
from common import (
    Session,
    Study,
    bars_figure,
    between,
    corpus,
    ctqk,
    curves_figure,
    effects_figure,
    features,
    main,
    outcome,
    specific,
    sums,
)

from circuit_tracer_qk.attribution.head import parse_head

FACTORS = [1.0, 0.5, 0.0, -0.5, -1.0]
OTHER_TITLES = ("Uncle", "Captain", "Professor", "Judge", "Nurse", "Cousin", "Aunt")


class Copied(NamedTuple):
    """An induction prompt.

    Attributes:
        text, answer: the prompt and the name.
        title: the title that it ends with.
        key: position of the name after the title's first mention.
    """

    text: str
    answer: str
    title: str
    key: int


def prompts(n: int, seed: int = 11) -> list[Copied]:
    """Held-out pairs of title and one-word name; every second prompt mentions other people too."""
    stream = corpus.Corpus(seed)
    found: list[Copied] = []
    while len(found) < n:
        prompt = stream.induction_prompt(len(found) % 2 == 1)
        tokens = ["<bos>", *corpus.tokenize(prompt.text)[0]]
        title = tokens[-1].strip()
        pairs = zip(tokens, tokens[1:], strict=False)
        at = [i for i, (a, b) in enumerate(pairs) if (a.strip(), b) == (title, prompt.answer)]
        if at:
            found.append(Copied(prompt.text, prompt.answer, title, at[0] + 1))
    return found


def with_title(model, prompt: Copied, at: int) -> list[Session]:
    """The prompt with other titles in one place."""
    tokens = ["<bos>", *corpus.tokenize(prompt.text)[0]]
    others = [t for t in OTHER_TITLES if t != prompt.title and t not in prompt.text][:5]
    sessions = []
    for title in others:
        changed = list(tokens)
        changed[at] = changed[at].replace(prompt.title, title)
        sessions.append(Session(model, "".join(changed[1:])))
    return sessions


def tags(session: Session, model, prompt: Copied, layers: list[int]) -> dict[int, list[int]]:
    """By layer, the features of the name's token that depend on the title before it."""
    swapped = with_title(model, prompt, prompt.key - 1)
    return {
        layer: specific(
            features(session, layer, prompt.key),
            [features(other, layer, prompt.key) for other in swapped],
        )
        for layer in layers
    }


def largest(graph, place: tuple[int, int, int, int], some: list[int], n: int) -> list[int]:
    """The ``n`` key-side features of a group that add most to a score."""
    return sorted(some, key=lambda f: -sums(graph, place, "key", [f]))[:n]


def edits(heads, tagged: dict[int, list[int]], key: int, factor: float) -> list[ctqk.QKEdit]:
    """The tag features scaled on the key side, in each layer's chosen heads."""
    return [
        ctqk.QKEdit([h for h in heads if h[0] == layer], "key", layer, some, key, factor=factor)
        for layer, some in tagged.items()
        if some
    ]


def run(model: ctqk.ResidualModel, n: int = 24) -> Study:
    """Induction: the key-side "name after this title" features carry the copy."""
    study = Study(
        "induction",
        "Induction",
        'Query-side title features meet key-side "name after that title" features; without them '
        "the copy ends and generic names follow; previous-token heads wrote them.",
        "The three heads that carried most from the name to the last token; on their key side, at "
        "the name, the two features that depend on the title before it and add most to the "
        "largest head's score, removed (factor 0, norms frozen, everything else live). Effect: "
        "probability of the name before minus after.",
        [],
    )
    curves: list[list[float]] = []
    control_curves: list[list[float]] = []
    names = [f" {name}" for name in corpus.NAMES]
    score: dict[str, list[float]] = {
        name: []
        for name in (
            "title x name-after-title",
            "other query features x name-after-title",
            "title x other key features",
            "everything else",
        )
    }
    writers: dict[str, list[float]] = {}
    kept_names, previous, everywhere = [], [], []
    for prompt in prompts(n):
        graph = ctqk.attribute(prompt.text, model)
        session, last = Session(model, prompt.text), graph.n_pos - 1
        heads = ctqk.select_heads(graph, query=last, key=prompt.key, count=3)
        heads = [h for h in heads if h[0] > 0]  # block 0 reads embeddings, not features
        tagged = tags(session, model, prompt, sorted({layer for layer, _ in heads}))
        chosen = {
            layer: largest(graph, (*head, last, prompt.key), some, 2)
            for layer, some in tagged.items()
            for head in [next(h for h in heads if h[0] == layer)]
        }
        curve, control_curve = [], []
        for factor in FACTORS:
            made = edits(heads, chosen, prompt.key, factor)
            found = session.steer(made, norms="frozen", controls=20 if factor == 0 else 6)
            curve.append(found.probability(prompt.answer))
            runs = found.controls or (found.clean,)
            control_curve.append(mean(r.probability(prompt.answer) for r in runs))
            if factor == 0:
                study.cases.append(
                    outcome(
                        prompt.text,
                        found,
                        prompt.answer,
                        says=found.top(1)[0][0],
                        heads=heads,
                        features=chosen,
                    )
                )
        curves.append(curve)
        control_curves.append(control_curve)
        kept_names.append(sum(found.probability(name) for name in names))
        # why the largest head looked there
        place = (*heads[0], last, prompt.key)
        table, tag = graph.qk(*place), tagged[heads[0][0]]
        own = features(session, place[0], last)
        swapped = with_title(model, prompt, last)
        title = specific(own, [features(other, place[0], last) for other in swapped])
        rest = set(features(session, place[0], prompt.key)) - set(tag)
        parts = [
            between(table, title, tag),
            between(table, set(own) - set(title), tag),
            between(table, title, rest),
        ]
        for values, part in zip(score.values(), [*parts, table.score - sum(parts)], strict=True):
            values.append(part)
        # who wrote the tags: edges into them from the token before
        layer = heads[0][0]
        active = graph.active_features.tolist()
        nodes = [
            i
            for i, at in enumerate(graph.selected_features.tolist())
            if active[at][0] == layer - 1
            and active[at][1] == prompt.key
            and active[at][2] in tagged[layer]
        ]
        carried: dict[str, float] = {}
        for node in nodes:
            for c in ctqk.carriers(graph, node=node):
                name = f"L{c.layer}H{c.head}"
                carried[name] = carried.get(name, 0.0) + c.influence
        total = sum(carried.values())
        if total:
            for name, value in carried.items():
                writers.setdefault(name, []).append(value / total)
            best = max(carried, key=lambda name: carried[name])
            layer, head = parse_head(best)
            previous.append(float(graph.run.pattern[layer, head, prompt.key, prompt.key - 1]))
            one_back = graph.run.pattern[layer, head].diagonal(-1)[1:]  # without the BOS
            everywhere.append(float(one_back.mean()))
    document = study.document()
    top = sorted(writers.items(), key=lambda item: -sum(item[1]))[:4]
    study.numbers = {
        "factors": FACTORS,
        "probability_by_factor": [mean(c[i] for c in curves) for i in range(len(FACTORS))],
        "controls_by_factor": [mean(c[i] for c in control_curves) for i in range(len(FACTORS))],
        "any_name_after": mean(kept_names),
        "score": {name: mean(values) for name, values in score.items()},
        "writers": {name: sum(values) / n for name, values in top},
        "writers_look_at_the_token_before": mean(previous),
        "and_so_at_every_position": mean(everywhere),
    }
    study.shown, study.verdict = verdicts.induction(document, study.numbers)
    study.figures = [
        effects_figure(study, "probability of the name, before - after", "One dot a run."),
        curves_figure(
            FACTORS,
            {"the two tag features": curves, "two other features": control_curves},
            ("factor of the features on the key side", "probability of the name"),
            "Mean and standard deviation over prompts; factor 1 is the clean run.",
        ),
        bars_figure(
            score,
            "part of the score (query: last token, key: the name)",
            "Why the head looked at the name: parts by key-side component, mean and sd.",
        ),
        bars_figure(
            {name: values + [0.0] * (n - len(values)) for name, values in top},
            "share of what reached the tag features from other tokens",
            "Which heads wrote the tags.",
            (0, 1),
        ),
    ]
    return study


if __name__ == "__main__":
    main(run)
