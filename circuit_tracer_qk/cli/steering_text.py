"""A steered run as text for a terminal, 100 columns wide."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence

from circuit_tracer_qk.attribution.head import head_name
from circuit_tracer_qk.base.one_line import one_line
from circuit_tracer_qk.cli.text import WIDTH, cut_line, token_name, wrap
from circuit_tracer_qk.steering.edits import QKEdit
from circuit_tracer_qk.steering.resolve import Changed
from circuit_tracer_qk.steering.results import Effect, Generation, Spread, SteeredRun, Swept

MOST_CHANGES = 12
MOST_HEADS = 12
Label = Callable[[int, int], str]


def change_lines(run: SteeredRun, label: Label) -> list[str]:
    """What was edited, and under which conditions."""
    lines = ["edited"]
    groups: dict[tuple[str, Changed], list[str]] = {}
    for (layer, head, side), changes in run.changes.items():
        for change in changes:
            groups.setdefault((side, change), []).append(head_name((layer, head)))
    both_forms: dict[str, None] = {}
    for (side, c), heads in list(groups.items())[:MOST_CHANGES]:
        shown, amount = c.name, f"x {c.after:g}"
        if not isinstance(c.component, str):
            shown = one_line(f"{c.name} {label(c.checkpoint, c.component)}", WIDTH)
            amount = f"{c.before:.4g} -> {c.after:.4g}"
            both_forms[f"{c.name} (checkpoint {c.checkpoint}, feature {c.component})"] = None
        at = token_name(run.token_strings, c.position)
        lines.append(cut_line(f"  {side:5} of {' '.join(heads)}: {amount:18} at {at}  {shown}"))
    if len(groups) > MOST_CHANGES:
        lines.append(f"  and {len(groups) - MOST_CHANGES} more")
    lines += wrap(both_forms)
    for head, factors in run.outputs.items():
        values = ", ".join(f"{f:g}" for f in sorted({f for f in factors if f != 1}))
        count = sum(f != 1 for f in factors)
        lines.append(f"  output of {head_name(head)} x {values} at {count} positions")
    if len(lines) == 1:
        lines.append("  nothing: this is the clean run")
    # from the edited heads outwards
    return [*lines, "; ".join(reversed(run.options.sentences))]


def effect_lines(run: SteeredRun, tokens: Sequence[int]) -> list[str]:
    """Next tokens before and after, and after in the controls."""
    lines = ["next token          clean   steered    change   other features        other heads"]
    for i in tokens:
        effect = run.effect(i)
        change = effect.after - effect.before
        lines.append(
            f"  {one_line(repr(run.token_text(i)), 16):16}  {effect.before:.4f}    {effect.after:.4f}   "
            f"{change:+.4f}   {_spread(effect.features):20}  {_spread(effect.heads)}".rstrip()
        )
    effect = run.effect(tokens[0])
    lines += [
        f"controls, mean +- sd of probabilities after them: {effect.features.n} with other features "
        f"of the same",
        f"positions in the same heads, {effect.heads.n} with the same features in other heads of "
        "the same layers",
    ]
    return [*lines, *note_lines(run.notes)]


def note_lines(notes: Sequence[str]) -> list[str]:
    """What the controls could not match, whole."""
    texts = (f"note: {note}" for note in notes)
    return [line for text in texts for line in textwrap.wrap(text, WIDTH, subsequent_indent="  ")]


def _spread(spread: Spread) -> str:
    return f"{spread.mean:.4f} +- {spread.std:.4f}" if spread.n else "none"


def attention_lines(run: SteeredRun) -> list[str]:
    """The attention of steered heads from the last token, where it moved most."""
    last = len(run.token_strings) - 1
    lines = [f"attention from {token_name(run.token_strings, last)}, where it moved most"]
    for head in run.heads[:MOST_HEADS]:
        before, after = run.clean.patterns[head][last], run.patterns[head][last]
        moved = (after - before).abs().topk(min(3, last + 1)).indices.tolist()
        cells = [
            f"{one_line(token_name(run.token_strings, k), 20)}: {before[k]:.3f} -> {after[k]:.3f}"
            for k in moved
            if float((after - before)[k].abs()) > 5e-4
        ]
        first, *rest = wrap(cells or ["unmoved"], indent=" " * 9)
        lines += [f"  {head_name(head):6} {first[9:]}", *rest]
    if len(run.heads) > MOST_HEADS:
        lines.append(f"  and {len(run.heads) - MOST_HEADS} heads more (--json has all)")
    return lines


def sweep_lines(swept: Swept, token: int) -> list[str]:
    """One token's probability by factor, beside the controls'."""
    name = swept.runs[0].token_text(token)
    lines = [f"factor   p({name!r})   other features        other heads           likeliest"]
    for factor, run in zip(swept.factors, swept.runs, strict=True):
        effect: Effect = run.effect(token)
        text, _, p = run.top(1)[0]
        lines.append(
            f"  {factor:+5.2f}  {effect.after:.4f}  {'':{max(0, len(repr(name)) - 5)}}"
            f"  {_spread(effect.features):20}  {_spread(effect.heads):20}  {text!r} {p:.4f}"
        )
    lines.append("factor 1 is the clean run; it stands in place of every edit's own factor")
    if any(isinstance(e, QKEdit) and e.inject is not None for run in swept.runs for e in run.edits):
        lines.append("what an edit injects is multiplied with 1 - factor: whole at factor 0")
    return lines


def generation_lines(generation: Generation) -> list[str]:
    """The prompt's continuations: clean, steered and of the controls."""
    continuations = [("clean", generation.clean), ("steered", generation.steered)]
    continuations += [("other features", c) for c in generation.controls]
    continuations += [("other heads", c) for c in generation.head_controls]
    return [
        "continued, greedily",
        *(cut_line(f"  {name:14}  {continued.text!r}") for name, continued in continuations),
        *note_lines(generation.notes),
    ]
