"""Antonyms: how the model knows that the opposite is asked for.

The paper (section "Antonyms"): query-side "opposite" features steer attention to the word; inhibiting
them turns antonyms into synonyms or the word itself, key-side inhibition does so less.
"""

from __future__ import annotations

from random import Random
from statistics import mean
from typing import NamedTuple

import verdicts
from common import (
    Case,
    Session,
    Study,
    bars_figure,
    corpus,
    ctqk,
    effects_figure,
    features,
    main,
    outcome,
    specific,
)

# asking for the antonym, the same asking for the synonym, and the word that says so
WORDINGS = (
    ('An antonym of "{w}" is "', 'A synonym of "{w}" is "', " antonym"),
    ('The opposite of "{w}" is "', 'A word similar to "{w}" is "', " opposite"),
    (
        'A word that means the opposite of "{w}" is "',
        'A word that means the same as "{w}" is "',
        " opposite",
    ),
    (
        'The antonym of the word "{w}" is "',
        'The synonym of the word "{w}" is "',
        " antonym",
    ),
)


class Asked(NamedTuple):
    """A prompt for an antonym.

    Attributes:
        text, other: asking for the antonym, for the synonym.
        word, antonym, synonym: what is asked about, and the two answers.
        cue: the token that says that an opposite is asked for.
    """

    text: str
    other: str
    word: str
    antonym: str
    synonym: str
    cue: str


def prompts(n: int, seed: int = 13) -> list[Asked]:
    """Words and wordings in turn."""
    words = Random(seed).sample(list(corpus.RELATIONS), n)
    found = []
    for i, word in enumerate(words):
        text, other, cue = WORDINGS[i % len(WORDINGS)]
        antonym, synonym = corpus.RELATIONS[word]
        found.append(Asked(text.format(w=word), other.format(w=word), word, antonym, synonym, cue))
    return found


def run(model: ctqk.ResidualModel, n: int = 24) -> Study:
    """Antonyms: query-side "opposite" features, key-side tags, and the cue itself."""
    study = Study(
        "antonyms",
        "Antonyms",
        'Inhibiting query-side "opposite" features turns antonyms into synonyms or the word '
        "itself; inhibiting key-side features does so less.",
        "Every head of layers 1 to 3 that carried something into the last token (95 % of the "
        "influence); on their query side, at the last token, the features that the wording for "
        "synonyms lacks, scaled by -1 (norms frozen). Effect: probability of the antonym before "
        "minus after.",
        [],
    )
    said: dict[str, list[tuple[float, float, float]]] = {}
    hidden: list[Case] = []
    for i, prompt in enumerate(prompts(n)):
        session, other = Session(model, prompt.text), Session(model, prompt.other)
        graph = ctqk.attribute(prompt.text, model)
        tokens = session.token_strings
        last, word, cue = graph.n_pos - 1, tokens.index(prompt.word), tokens.index(prompt.cue)
        heads = [h for h in ctqk.select_heads(graph, query=last, share=0.95) if h[0] > 0]
        layers = sorted({layer for layer, _ in heads})

        def edits(side: str, at: int, elsewhere: int, factor: float) -> list[ctqk.QKEdit]:
            made = []
            for layer in layers:  # noqa: B023
                own = features(session, layer, at)  # noqa: B023
                some = specific(own, [features(other, layer, elsewhere)])  # noqa: B023
                mine = [h for h in heads if h[0] == layer]  # noqa: B023
                if some:
                    made.append(ctqk.QKEdit(mine, side, layer, some, at, factor=factor))  # type: ignore
            return made

        def note(name: str, found: ctqk.SteeredRun) -> None:
            answers = (prompt.antonym, prompt.synonym, prompt.word)  # noqa: B023
            said.setdefault(name, []).append(tuple(map(found.probability, answers)))  # type: ignore

        query = edits("query", last, len(other.token_strings) - 1, -1.0)
        found = session.steer(query, norms="frozen", controls=20, seed=i)
        study.cases.append(outcome(prompt.text, found, prompt.antonym))
        note("clean", found.clean)
        note('query side, "opposite" features x -1', found)
        key = edits("key", word, other.token_strings.index(prompt.word), -1.0)
        if key:
            found = session.steer(key, norms="frozen", controls=0)
        note('key side, "its opposite is asked" features x -1', found if key else found.clean)
        # what the miniature does instead: the cue hidden as a key of block 0, against other tokens
        every = [(0, head) for head in range(model.cfg.n_heads)]

        def hide(at: int) -> ctqk.SteeredRun:
            edit = ctqk.QKEdit(every, "key", 0, "embedding", at, factor=0.0)  # noqa: B023
            return session.steer(edit, norms="frozen", controls=0)  # noqa: B023

        found = hide(cue)
        note("the cue hidden from block 0", found)
        spared = [p for p in range(1, last) if p not in (cue, word)]
        runs = [hide(p) for p in spared]
        hidden.append(
            Case(
                prompt.text,
                found.clean.probability(prompt.antonym) - found.probability(prompt.antonym),
                [r.clean.probability(prompt.antonym) - r.probability(prompt.antonym) for r in runs],
            )
        )
    document = study.document()
    controls = [x for case in hidden for x in case.controls]
    study.numbers = {
        "antonym_synonym_word": {
            name: [mean(row[i] for row in rows) for i in range(3)] for name, rows in said.items()
        },
        "cue_hidden": {
            "effect": mean(case.effect for case in hidden),
            "other_tokens_hidden": mean(controls),
            "other_tokens": len(controls),
        },
    }
    study.shown, study.verdict = verdicts.antonyms(document, study.numbers)
    rows = {}
    for name, values in said.items():
        for i, answer in enumerate(("antonym", "synonym", "the word")):
            rows[f"{name}: {answer}"] = [v[i] for v in values]
    instead = Study("hidden", "", "", "", hidden)
    study.figures = [
        effects_figure(study, "probability of the antonym, before - after", "One dot a run."),
        bars_figure(rows, "probability", "What the model says: mean and sd over prompts.", (0, 1)),
        effects_figure(
            instead,
            "probability of the antonym, before - after",
            "Block 0 with one token hidden as a key: above the cue, below every other token but "
            "the word itself.",
        ),
    ]
    return study


if __name__ == "__main__":
    main(run)
