"""What the six studies share: prompts, features told apart by counterfactuals, results, figures."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from io import StringIO
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import matplotlib

matplotlib.use("svg")  # no display, and text that stays text
import matplotlib.pyplot as plt  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1] / "miniature"))
import corpus  # noqa: E402

import circuit_tracer_qk as ctqk  # noqa: E402
from circuit_tracer_qk.steering.resolve import active_at  # noqa: E402
from circuit_tracer_qk.steering.results import SteeredRun  # noqa: E402
from circuit_tracer_qk.steering.steer import Session  # noqa: E402

plt.rcParams.update(
    {
        "svg.fonttype": "none",
        "svg.hashsalt": "circuit-tracer-qk",  # the same figure, the same file
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.constrained_layout.use": True,
    }
)
BLUE, GREY, ORANGE, GREEN = "#2166ac", "#999999", "#d6604d", "#4d9221"
FEATURES = "other features, same position"
HEADS = "same features, other heads"


@dataclass
class Case:
    """One prompt's outcome.

    Attributes:
        prompt: its text.
        effect: what the intervention took from the answer: probability before minus after.
        controls, head_controls: the same of every control.
        more: further numbers of this prompt.
    """

    prompt: str
    effect: float
    controls: list[float] = field(default_factory=list)
    head_controls: list[float] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)


@dataclass
class Figure:
    """A chart with the sentence that says how to read it."""

    caption: str
    svg: str


@dataclass
class Study:
    """What a study found.

    Attributes:
        name: short, as in the report's file names.
        title: for people.
        claim: what the paper saw.
        intervention: what was done, in which heads, on which side; and what "effect" is.
        cases: one a prompt.
        verdict: in words.
        shown: "yes", "partly" or "no": whether the miniature shows what the paper saw.
        numbers: everything else that the verdict rests on.
        figures: to look at.
        unit: of effects.
        control_name: what the controls are.
    """

    name: str
    title: str
    claim: str
    intervention: str
    cases: list[Case]
    verdict: str = ""
    shown: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)
    figures: list[Figure] = field(default_factory=list)
    unit: str = "probability"
    control_name: str = FEATURES

    def document(self) -> dict[str, Any]:
        """The study for ``report.json``, without its figures."""
        effects = [case.effect for case in self.cases]
        controls = [c for case in self.cases for c in case.controls]
        heads = [c for case in self.cases for c in case.head_controls]
        return {
            "name": self.name,
            "title": self.title,
            "claim": self.claim,
            "intervention": self.intervention,
            "prompts": len(self.cases),
            "unit": self.unit,
            "controls_are": self.control_name,
            "effect": mean(effects),
            "spread": pstdev(effects),
            "controls": len(controls),
            "controls_effect": mean(controls),
            "controls_spread": pstdev(controls),
            "head_controls": len(heads),
            "head_controls_effect": mean(heads) if heads else None,
            "head_controls_spread": pstdev(heads) if heads else None,
            "shown": self.shown,
            "verdict": self.verdict,
            "numbers": self.numbers,
            "cases": [asdict(case) for case in self.cases],
        }


def outcome(prompt: str, run: SteeredRun, answer: str, **more: Any) -> Case:
    """A run's effect on its answer, beside its controls'."""
    before = run.clean.probability(answer)
    return Case(
        prompt,
        before - run.probability(answer),
        [before - control.probability(answer) for control in run.controls],
        [before - control.probability(answer) for control in run.head_controls],
        {"before": before, "after": run.probability(answer), **more},
    )


def features(session: Session, layer: int, position: int) -> dict[int, float]:
    """Feature -> activation of the residual SAE that block ``layer`` reads, at a position."""
    return {f: a for _, f, a in active_at(session.parts, layer, position)}


def specific(
    own: dict[int, float], others: Sequence[dict[int, float]], share: float = 0.5
) -> list[int]:
    """Features that depend on what the counterfactual prompts change.

    Args:
        own: features of the prompt, at a position.
        others: of prompts that differ in one respect, at the same position.
        share: a feature is specific if it keeps less than this of its activation, on average.
    """
    return [f for f, a in own.items() if mean(other.get(f, 0.0) for other in others) < share * a]


def position(tokens: Sequence[str], token: str, start: int = 0) -> int:
    """The first position of a token, from ``start`` on."""
    return tokens.index(token, start)


def sums(
    graph: ctqk.ResidualGraph, place: tuple[int, int, int, int], side: str, group: Iterable[int]
) -> float:
    """What a group of features of one side adds to a score."""
    table = graph.qk(*place)
    parts = table.query if side == "query" else table.key
    marginal = table.query_marginal if side == "query" else table.key_marginal
    wanted = set(group)
    at = [i for i, part in enumerate(parts) if part.feature in wanted]
    return float(marginal[at].sum())


def between(table: ctqk.QKTable, query: Iterable[int], key: Iterable[int]) -> float:
    """What query-side features add to a score together with key-side features."""
    rows, columns = (
        [i for i, part in enumerate(parts) if part.feature in wanted]
        for parts, wanted in ((table.query, set(query)), (table.key, set(key)))
    )
    return float(table.terms[rows][:, columns].sum())


# Figures


def drawn(figure: Any, caption: str) -> Figure:
    """A matplotlib figure as SVG that needs no other file."""
    out = StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    plt.close(figure)
    svg = out.getvalue()
    return Figure(caption, svg[svg.index("<svg") :])


def effects_figure(study: Study, what: str, caption: str) -> Figure:
    """Every prompt's effect beside the controls': the figure that each study opens with."""
    rows = [("intervention", [c.effect for c in study.cases], BLUE)]
    rows.append((study.control_name, [x for c in study.cases for x in c.controls], GREY))
    heads = [x for c in study.cases for x in c.head_controls]
    if heads:
        rows.append((HEADS, heads, GREY))
    figure, axis = plt.subplots(figsize=(6.4, 0.6 + 0.45 * len(rows)))
    for y, (_, values, color) in enumerate(reversed(rows)):
        # spread over the row by rank, not at random, so that the file stays the same
        jitter = [y + 0.3 * ((i * 0.618) % 1 - 0.5) for i in range(len(values))]
        axis.scatter(values, jitter, s=7, color=color, alpha=0.5, linewidths=0)
        axis.plot([mean(values)] * 2, [y - 0.32, y + 0.32], color=color, lw=2)
    axis.set_yticks(range(len(rows)), [f"{name} (n={len(v)})" for name, v, _ in reversed(rows)])
    axis.axvline(0, color="#cccccc", lw=0.8, zorder=0)
    axis.set_xlabel(what)
    return drawn(figure, caption)


def curves_figure(
    x: Sequence[float], curves: dict[str, list[list[float]]], labels: tuple[str, str], caption: str
) -> Figure:
    """Means over prompts with their standard deviation, against a factor or a count."""
    colors = [BLUE, ORANGE, GREEN, GREY, "#762a83"]
    figure, axis = plt.subplots(figsize=(5.2, 2.8))
    for (name, rows), color in zip(curves.items(), colors, strict=False):
        middle = [mean(row[i] for row in rows) for i in range(len(x))]
        around = [pstdev([row[i] for row in rows]) for i in range(len(x))]
        axis.plot(x, middle, color=color, marker="o", ms=3, label=name)
        low = [max(0.0, m - s) for m, s in zip(middle, around, strict=True)]
        high = [min(1.0, m + s) for m, s in zip(middle, around, strict=True)]
        axis.fill_between(x, low, high, color=color, alpha=0.12, linewidth=0)
    axis.set_xlabel(labels[0])
    axis.set_ylabel(labels[1])
    axis.set_ylim(-0.03, 1.03)
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return drawn(figure, caption)


def bars_figure(
    rows: dict[str, list[float]], what: str, caption: str, limits: tuple[float, float] | None = None
) -> Figure:
    """Means over prompts with their standard deviation, one bar a row."""
    figure, axis = plt.subplots(figsize=(6.4, 0.5 + 0.3 * len(rows)))
    names = list(rows)[::-1]
    middle = [mean(rows[name]) for name in names]
    around = [pstdev(rows[name]) for name in names]
    colors = [BLUE if m >= 0 else ORANGE for m in middle]
    axis.barh(range(len(names)), middle, xerr=around, color=colors, ecolor="#555555", height=0.6)
    axis.set_yticks(range(len(names)), names)
    axis.axvline(0, color="#555555", lw=0.8)
    if limits:
        axis.set_xlim(*limits)
    axis.set_xlabel(what)
    return drawn(figure, caption)


def write(study: Study, folder: Path) -> None:
    """A study's own JSON and figures."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(study.document(), indent=1, ensure_ascii=False, allow_nan=False)
    (folder / f"{study.name}.json").write_text(text + "\n", encoding="utf-8")
    for number, figure in enumerate(study.figures, 1):
        path = folder / f"{study.name}-{number}.svg"
        path.write_text(figure.svg, encoding="utf-8")


def main(run: Callable[..., Study]) -> None:
    """Run one study as a script: its verdict on the terminal, its files in ``studies/``."""
    import argparse

    parser = argparse.ArgumentParser(description=run.__doc__)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--out", type=Path, default=Path("studies"))
    args = parser.parse_args()
    study = run(ctqk.load_model(), args.prompts)
    write(study, args.out)
    print(f"{study.title}: shown: {study.shown}\n{study.verdict}")


__all__ = [
    "BLUE",
    "FEATURES",
    "Case",
    "Figure",
    "GREY",
    "ORANGE",
    "Session",
    "Study",
    "bars_figure",
    "between",
    "corpus",
    "ctqk",
    "curves_figure",
    "drawn",
    "effects_figure",
    "features",
    "main",
    "outcome",
    "position",
    "specific",
    "sums",
    "write",
]
