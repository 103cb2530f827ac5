"""Multiple choice: how the model finds the right option.

The paper (section "Multiple Choice"): "correct answer" features on the right option's key meet the
query that needs an answer, "false statement" features on the others inhibit, the query bias helps;
inhibiting the former, and injecting them at another option, flips the letter.
"""

from __future__ import annotations

from random import Random
from statistics import mean
from typing import NamedTuple

import verdicts
from common import (
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
    sums,
)

LETTERS = "ABC"
CORRECT = '"correct" features of the right option'
FALSE = '"false" features of the wrong options'
BIAS = 'query bias x "correct"'
LAYER = 3  # the block whose heads read the verdict, found by its influence on every prompt


class Choice(NamedTuple):
    """A question with three options.

    Attributes:
        text: asks about an object.
        right: index of the right option.
        elsewhere: the same options, asked about an object for which another one is right, by that
            option's index.
    """

    text: str
    right: int
    elsewhere: dict[int, str]


def prompts(n: int, seed: int = 14) -> list[Choice]:
    """Questions whose options are all right for some other object with the same article."""
    random, found = Random(seed), []
    facts = [fact for fact in corpus.FACT_LIST if fact[0] != "sound"]
    while len(found) < n:
        attribute, thing, value = random.choice(facts)
        wrong = [
            v
            for v in corpus.VALUES[attribute]
            if v != value and thing not in corpus.FACTS[attribute][v].split()
        ]
        options = [value, *random.sample(wrong, 2)]
        random.shuffle(options)
        right = options.index(value)
        if right != len(found) % 3:  # every letter as often
            continue
        listed = " ".join(f"({x}) {o}" for x, o in zip(LETTERS, options, strict=True))

        def asked(thing: str) -> str:
            name = corpus.article(thing)
            return f"What is the {attribute} of {name}? {listed} Answer: ("  # noqa: B023

        text, length = asked(thing), len(corpus.tokenize(asked(thing))[0])
        elsewhere = {}
        for i, option in enumerate(options):
            for other in corpus.FACTS[attribute][option].split():
                fits = other not in corpus.FACTS[attribute][value].split()
                if i != right and fits and len(corpus.tokenize(asked(other))[0]) == length:
                    elsewhere.setdefault(i, asked(other))
        if len(elsewhere) == 2:
            found.append(Choice(text, right, elsewhere))
    return found


def run(model: ctqk.ResidualModel, n: int = 24) -> Study:
    """Multiple choice: "correct answer" features, and the paper's three steerings."""
    study = Study(
        "choice",
        "Multiple choice",
        'Key-side "correct answer" features draw attention to the right option, "false" features '
        "and the query bias shape it; down on the right answer, and up on another, flips the "
        "letter accordingly.",
        "The heads of the last block that carried the right option's value to the last token; on "
        "their key side, at that value, the two strongest features that vanish when another "
        "option is right, scaled by -1 (norms frozen). Effect: probability of the right letter "
        "before minus after.",
        [],
    )
    scores: dict[str, list[float]] = {CORRECT: [], FALSE: [], BIAS: []}
    steered: dict[str, list[list[float]]] = {}
    letters: dict[str, list[tuple[int, int, float]]] = {"down": [], "up on another": []}
    attention: dict[str, list[float]] = {"on the right option": [], "on the other, injected": []}
    attention["on the other, before"] = []
    for i, prompt in enumerate(prompts(n)):
        session = Session(model, prompt.text)
        others = {j: Session(model, text) for j, text in prompt.elsewhere.items()}
        graph = ctqk.attribute(prompt.text, model)
        tokens, last = session.token_strings, graph.n_pos - 1
        at = [p + 1 for p, token in enumerate(tokens) if token == ")"][:3]
        right = prompt.right
        found = ctqk.carriers(graph, query=last, key=at[right])
        found = [c for c in found if c.layer == LAYER]
        heads = [(c.layer, c.head) for c in found if c.influence > 0.1 * found[0].influence]
        own = features(session, LAYER, at[right])
        correct = specific(own, [features(o, LAYER, at[right]) for o in others.values()])
        if not correct or not heads:
            continue
        place = (*heads[0], last)
        table = graph.qk(*place, at[right])
        columns = [k for k, c in enumerate(table.key) if c.feature in set(correct)]
        bias = [q for q, c in enumerate(table.query) if c.kind == "bias"]
        scores[CORRECT].append(float(table.key_marginal[columns].sum()))
        scores[BIAS].append(float(table.terms[bias][:, columns].sum()))
        for j, other in others.items():
            false = specific(features(session, LAYER, at[j]), [features(other, LAYER, at[j])])
            wrong = graph.qk(*place, at[j])
            columns = [k for k, c in enumerate(wrong.key) if c.feature in set(false)]
            scores[FALSE].append(float(wrong.key_marginal[columns].sum()))
        strongest = sorted(correct, key=lambda f: -sums(graph, (*place, at[right]), "key", [f]))[:2]
        down = ctqk.QKEdit(heads, "key", LAYER, strongest, at[right], factor=-1.0)
        first = session.steer(down, norms="frozen", controls=20, seed=i)
        study.cases.append(
            outcome(prompt.text, first, LETTERS[right], right=LETTERS[right], heads=heads)
        )
        said = [first.probability(x) for x in LETTERS]
        letters["down"].append((right, right, said[right]))
        steered.setdefault(f"down, right answer {LETTERS[right]}", []).append(said)
        every = [(LAYER, head) for head in range(model.cfg.n_heads)]
        for j, other in others.items():
            # what the option's own key would hold if it were right, and not what it holds now
            here, there = features(session, LAYER, at[j]), features(other, LAYER, at[j])
            move = [
                ctqk.QKEdit(every, "key", LAYER, f, at[j], inject=there.get(f, 0) - here.get(f, 0))
                for f in sorted({*here, *there})
                if abs(there.get(f, 0) - here.get(f, 0))
                > 0.4 * max(there.get(f, 0), here.get(f, 0))
            ]
            away = ctqk.QKEdit(every, "key", LAYER, correct, at[right], factor=-1.0)
            up = session.steer([away, *move], norms="frozen", controls=0)
            said = [up.probability(x) for x in LETTERS]
            letters["up on another"].append((right, j, said[j]))
            steered.setdefault(f"up on {LETTERS[j]}", []).append(said)
            best = max(every, key=lambda h: float(up.clean.patterns[h][last, at[right]]))  # noqa: B023
            attention["on the right option"].append(float(up.clean.patterns[best][last, at[right]]))
            attention["on the other, before"].append(float(up.clean.patterns[best][last, at[j]]))
            attention["on the other, injected"].append(float(up.patterns[best][last, at[j]]))
    document = study.document()

    def flips(name: str, wanted: str | None = None) -> float:
        rows = [p for right, j, p in letters[name] if wanted is None or LETTERS[j] == wanted]
        return mean(rows)

    by_right = {
        x: mean(p for right, _, p in letters["down"] if LETTERS[right] == x) for x in LETTERS
    }
    by_target = {x: flips("up on another", x) for x in LETTERS}
    study.numbers = {
        "scores": {name: mean(values) for name, values in scores.items()},
        "right_letter_after_down": by_right,
        "letter_after_up_on_it": by_target,
        "letters_after": {
            name: [mean(row[i] for row in rows) for i in range(3)]
            for name, rows in sorted(steered.items())
        },
        "attention_of_the_largest_head": {name: mean(v) for name, v in attention.items()},
    }
    study.shown, study.verdict = verdicts.choice(document, study.numbers)
    study.figures = [
        effects_figure(study, "probability of the right letter, before - after", "One dot a run."),
        bars_figure(
            scores, "part of the score of the largest head", "Why the head looks where it does."
        ),
        bars_figure(
            {
                f"{name}: says {LETTERS[i]}": [row[i] for row in rows]
                for name, rows in sorted(steered.items())
                for i in range(3)
            },
            "probability",
            "What the model says after each steering: mean and sd over prompts.",
            (0, 1),
        ),
    ]
    return study


if __name__ == "__main__":
    main(run)
