"""A steered run as JSON: what was changed, what it did, and the controls beside it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from circuit_tracer_qk.attribution.head import head_name
from circuit_tracer_qk.steering.edits import Edit, ResolvedHeadEdit
from circuit_tracer_qk.steering.results import Spread, SteeredRun


def run_document(
    run: SteeredRun, tokens: Sequence[str | int] = (), queries: Iterable[int] = (), top: int = 10
) -> dict[str, Any]:
    """A steered run with its clean run and controls.

    Args:
        run: of :func:`circuit_tracer_qk.steer`.
        tokens: next tokens to report; without any, the likeliest clean and the likeliest steered.
        queries: query positions whose attention rows are wanted; without any, the last.
        top: how many predictions to list.

    Raises:
        UserError: a token that is none.
    """
    leading = dict.fromkeys([run.clean.top(1)[0][1], run.top(1)[0][1]])
    ids = [run.token_id(t) for t in tokens] or list(leading)
    queries = list(queries) or [len(run.token_strings) - 1]
    return {
        "prompt_tokens": run.token_strings,
        **run.options.conditions,
        "edits": [_edit(edit) for edit in run.edits],
        "changes": [
            {"head": head_name((layer, head)), "side": side, **c._asdict(), "name": c.name}
            for (layer, head, side), changes in run.changes.items()
            for c in changes
        ],
        "outputs": [
            {"head": head_name(head), "factors": list(factors)}
            for head, factors in run.outputs.items()
        ],
        "clean": {"top": run.clean.top(top)},
        "steered": {"top": run.top(top)},
        "tokens": [
            {
                "token": run.token_text(i),
                "id": i,
                "before": effect.before,
                "after": effect.after,
                "controls": _spread(effect.features),
                "head_controls": _spread(effect.heads),
            }
            for i in ids
            for effect in [run.effect(i)]
        ],
        "attention": [
            {
                "head": head_name(head),
                "query": query,
                "before": run.clean.patterns[head][query, : query + 1].tolist(),
                "after": run.patterns[head][query, : query + 1].tolist(),
            }
            for head in run.heads
            for query in queries
        ],
        "controls": [_control(control, ids) for control in run.controls],
        "head_controls": [_control(control, ids) for control in run.head_controls],
        "notes": list(run.notes),
    }


def _control(control: SteeredRun, ids: Sequence[int]) -> dict[str, Any]:
    heads = {(layer, head) for layer, head, _ in control.changes} | set(control.outputs)
    changes = [change for changes in control.changes.values() for change in changes]
    edited = {(c.checkpoint, c.component, c.position): c.name for c in changes}
    # errors and biases, which have no index, last
    order = sorted(edited, key=lambda c: (c[0], isinstance(c[1], str), *c[1:]))
    return {
        "heads": [head_name(head) for head in sorted(heads)],
        "features": order,
        "names": [edited[component] for component in order],
        "probabilities": [control.probability(i) for i in ids],
    }


def _spread(spread: Spread) -> dict[str, Any] | None:
    return spread._asdict() if spread.n else None


def _edit(edit: Edit) -> dict[str, Any]:
    """In the form that :func:`circuit_tracer_qk.steering.parse.read_edit` takes."""
    resolved = edit.resolved
    heads = [head_name(head) for head in resolved.heads]
    positions = None if resolved.positions is None else list(resolved.positions)
    if isinstance(resolved, ResolvedHeadEdit):
        return {"heads": heads, "positions": positions, "factor": resolved.factor}
    checkpoints, components = zip(*resolved.components, strict=True)
    one = len(set(checkpoints)) == 1
    return {
        "heads": heads,
        "side": resolved.side,
        "checkpoint": checkpoints[0] if one else None,
        "features": list(components if one else resolved.names),
        "names": list(resolved.names),
        "positions": positions,
        "inject" if resolved.injects else "factor": resolved.amount,
    }
