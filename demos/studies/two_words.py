"""Two-word names: independent interactions side by side.

The paper (section "Multiple parallel QK interactions"): at "Aunt Mary Sue ... Aunt Mary", query-side
"Mary" meets key-side "after Mary", and "name of an Aunt" meets itself, with weak cross terms, so the
matrix of QK attributions has rank 2 at least.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import NamedTuple

import torch
import verdicts
from common import (
    Session,
    Study,
    bars_figure,
    between,
    corpus,
    ctqk,
    effects_figure,
    features,
    main,
    outcome,
    specific,
)

PAIRS = ("first x after-first", "title x after-title", "first x after-title", "title x after-first")


class Copied(NamedTuple):
    """A prompt that ends with a title and the first word of a name.

    Attributes:
        text, answer: the prompt and the name's second word.
        tokens: with the BOS.
        key: position of the second word at the first mention.
    """

    text: str
    answer: str
    tokens: list[str]
    key: int


def prompts(n: int, seed: int = 12) -> list[Copied]:
    """Held-out two-word names; every second prompt mentions other people too."""
    stream = corpus.Corpus(seed)
    found: list[Copied] = []
    while len(found) < n:
        prompt = stream.induction_prompt(len(found) % 2 == 1, 1, 2)
        tokens = ["<bos>", *corpus.tokenize(prompt.text)[0]]
        triples = zip(tokens, tokens[1:], tokens[2:], strict=False)
        wanted = (tokens[-2].strip(), tokens[-1], prompt.answer)
        at = [i for i, (a, b, c) in enumerate(triples) if (a.strip(), b, c) == wanted]
        if at:
            found.append(Copied(prompt.text, prompt.answer, tokens, at[0] + 2))
    return found


def swapped(
    model: ctqk.ResidualModel, prompt: Copied, at: int, words: Sequence[str]
) -> list[Session]:
    """The prompt with other words at one position."""
    old = prompt.tokens[at].strip()
    sessions = []
    for word in [w for w in words if f" {w}" not in prompt.tokens and w not in prompt.tokens][:5]:
        changed = list(prompt.tokens)
        changed[at] = changed[at].replace(old, word)
        sessions.append(Session(model, "".join(changed[1:])))
    return sessions


def run(model: ctqk.ResidualModel, n: int = 24) -> Study:
    """Two-word names: at least two independent interactions, with weak cross terms."""
    study = Study(
        "two_words",
        "Two-word names",
        'Query-side "Mary" meets key-side "after Mary", and title features meet "after that '
        'title", independently: rank 2 at least, and weak cross terms.',
        "The five heads that carried most from the second word to the last token; on their key "
        "side, at the second word, the features that depend on the first word or on the title, "
        "removed (norms frozen). Effect: probability of the second word before minus after.",
        [],
    )
    terms: dict[str, list[float]] = {name: [] for name in PAIRS}
    ranks, shares = [], []
    alone: dict[str, list[float]] = {}
    for prompt in prompts(n):
        graph, session = ctqk.attribute(prompt.text, model), Session(model, prompt.text)
        last, key = graph.n_pos - 1, prompt.key
        heads = [h for h in ctqk.select_heads(graph, query=last, key=key, count=5) if h[0] > 0]
        layer = heads[0][0]
        heads = [h for h in heads if h[0] == layer]
        table = graph.qk(*heads[0], last, key)
        names, titles = list(corpus.NAMES), list(corpus.TITLES)

        def depends(position: int, at: int, words: Sequence[str]) -> list[int]:
            others = swapped(model, prompt, at, words)  # noqa: B023
            own = features(session, layer, position)  # noqa: B023
            return specific(own, [features(o, layer, position) for o in others])  # noqa: B023

        after_first = depends(key, key - 1, names)
        after_title = [f for f in depends(key, key - 2, titles) if f not in after_first]
        first = depends(last, last, names)
        title = [f for f in depends(last, last - 1, titles) if f not in first]
        groups = ((first, after_first), (title, after_title), (first, after_title))
        for name, (q, k) in zip(PAIRS, (*groups, (title, after_first)), strict=True):
            terms[name].append(between(table, q, k))
        rows = [i for i, c in enumerate(table.query) if c.kind == "feature"]
        columns = [i for i, c in enumerate(table.key) if c.kind == "feature"]
        s = torch.linalg.svdvals(table.terms[rows][:, columns].double())
        energy = s.pow(2) / s.pow(2).sum()
        shares.append([float(energy[:r].sum()) for r in (1, 2, 3, 4)])
        ranks.append(float(s.sum().pow(2) / s.pow(2).sum()))

        def scaled(some: list[int], factor: float, controls: int = 0) -> ctqk.SteeredRun:
            edit = ctqk.QKEdit(heads, "key", layer, some, key, factor=factor)  # noqa: B023
            return session.steer(edit, norms="frozen", controls=controls)  # noqa: B023

        every = after_first + after_title
        found = scaled(every, 0.0, controls=20)
        study.cases.append(outcome(prompt.text, found, prompt.answer, heads=heads))
        for name, some in (("first", after_first), ("title", after_title), ("both", every)):
            for factor in (0.0, -1.0):
                lost = 0.0
                if some:
                    found = scaled(some, factor)
                    before = found.clean.probability(prompt.answer)
                    lost = before - found.probability(prompt.answer)
                alone.setdefault(f"after-{name} x {factor:g}", []).append(lost)
    document = study.document()
    size = {name: mean(map(abs, values)) for name, values in terms.items()}
    study.numbers = {
        "terms": {name: mean(values) for name, values in terms.items()},
        "size_of_terms": size,
        "own": list(PAIRS[:2]),
        "energy_of_rank_1_to_4": [mean(s[i] for s in shares) for i in range(4)],
        "effective_rank": mean(ranks),
        "effect_alone_and_together": {name: mean(values) for name, values in alone.items()},
    }
    study.shown, study.verdict = verdicts.two_words(document, study.numbers)
    study.figures = [
        effects_figure(study, "probability of the second word, before - after", "One dot a run."),
        bars_figure(
            terms,
            "part of the score (query: last token, key: second word)",
            "Own pairs above, crossed pairs below: mean and standard deviation over prompts.",
        ),
        bars_figure(
            alone,
            "probability of the second word, before - after",
            "Either group of key-side features alone and together, by factor.",
        ),
        bars_figure(
            {f"rank {i + 1}": [s[i] for s in shares] for i in range(4)},
            "share of the squared feature x feature terms",
            "What low-rank approximations of the table hold.",
            (0, 1),
        ),
    ]
    return study


if __name__ == "__main__":
    main(run)
