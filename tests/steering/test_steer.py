"""Steering, held against an independent steered forward pass over every architecture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cases import ARCHITECTURES, Case, build
from helpers.errors import record_error
from helpers.steered_reference import SteeredReference, steered
from torch import Tensor

import circuit_tracer_qk as ctqk
from circuit_tracer_qk.base.feature_names import feature_name
from circuit_tracer_qk.steering.controls import matched
from circuit_tracer_qk.steering.options import Freeze, SteeringOptions
from circuit_tracer_qk.steering.parse import read_edit
from circuit_tracer_qk.steering.resolve import Changed
from circuit_tracer_qk.steering.steer import Session
from circuit_tracer_qk.steering.to_json import run_document

ALL = list(ARCHITECTURES)
MODES = [(f, n) for f in ("none", "patterns") for n in ("frozen", "live")]


def _params() -> list[tuple[str, str, str]]:
    params = [(name, "sae", "float64") for name in ALL]
    params += [(name, "wcc", "float64") for name in ("gpt2", "gemma2", "qwen3")]
    return [*params, ("llama", "pre", "float64"), *((name, "sae", "float32") for name in ALL)]


@pytest.fixture(scope="module", params=_params(), ids="-".join)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    name, kind, dtype = request.param
    return build(name, tmp_path_factory.mktemp("case"), kind, getattr(torch, dtype))


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return build("gemma2", tmp_path_factory.mktemp("case"))


def _active(case: Case, layer: int, position: int, n: int) -> list[tuple[int, int, float]]:
    """The n largest features that block ``layer`` reads there: (checkpoint, feature, activation)."""
    found = [
        (c.activation or 0.0, c.checkpoint, c.feature)
        for c in case.graph.scores.components(layer, position, side=1)
        if c.kind == "feature"
    ]
    largest = sorted(found, reverse=True)[:n]
    return [(checkpoint, feature or 0, activation) for activation, checkpoint, feature in largest]


def _where(case: Case, layer: int, at_least: int = 2) -> int:
    """The last position with features at that block."""
    n = len(case.ids)
    return next(p for p in reversed(range(1, n)) if len(_active(case, layer, p, 9)) >= at_least)


def _absent(case: Case, checkpoint: int, position: int) -> int:
    here = {f for c, f, _ in _active(case, checkpoint, position, 99) if c == checkpoint}
    return next(f for f in range(99) if f not in here)


def _vector(case: Case, layer: int, checkpoint: int, feature: int) -> Tensor:
    """A decoder vector, as the files have it."""
    return case.model.dictionaries.by_checkpoint[checkpoint].decoders[layer][feature].double()


def _edits(case: Case) -> tuple[list[ctqk.QKEdit], dict[tuple[int, int, str], Tensor]]:
    """Edits of both sides, of several heads and layers, and what they add to which stream."""
    n_pos, width = len(case.ids), case.reference.W_E.shape[1]
    edits, moves = [], {}

    def edit(
        heads: Sequence[tuple[int, int]], side: Any, position: int, c: int, f: int, **how: float
    ) -> None:
        edits.append(ctqk.QKEdit(heads, side, c, f, [position], **how))
        for layer, head in heads:
            held = [a for cc, ff, a in _active(case, layer, position, 999) if (cc, ff) == (c, f)]
            before = sum(held)
            after = before * how["factor"] if "factor" in how else before + how["inject"]
            move = moves.setdefault((layer, head, side), torch.zeros(n_pos, width).double())
            move[position] += (after - before) * _vector(case, layer, c, f)

    last = case.n_layers - 1
    for layer in (1, last):
        p = _where(case, layer)
        (c, f, _), (c2, f2, a2) = _active(case, layer, p, 2)
        edit([(layer, 0)], "query", p, c, f, factor=-1.5)
        edit([(layer, 0), (layer, 1)], "key", p, c2, f2, factor=0.0)
        edit([(layer, 1)], "key", 2, layer, _absent(case, layer, 2), inject=1.3 * a2)
        edit(
            [(layer, case.reference.n_heads - 1)],
            "query",
            n_pos - 1,
            layer,
            _absent(case, layer, n_pos - 1),
            inject=a2,
        )
    return edits, moves


def _close(case: Case, what: str, ours: Tensor, theirs: Tensor, factor: float = 1.0) -> None:
    f64 = case.model.cfg.dtype == torch.float64
    error = float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())
    record_error(f"{what} {'f64' if f64 else 'f32'}", case.name, error)
    assert error <= factor * (1e-10 if f64 else 1e-4), f"{what}: {error:.1e}"


def _expected(case: Case, moves: dict, freeze: Any, norms: Any, **more) -> SteeredReference:
    keep = case.run if freeze == "patterns" else None
    return steered(
        case.reference, case.ids, moves, frozen_norms=norms == "frozen", keep=keep, **more
    )


@pytest.mark.parametrize("freeze, norms", MODES)
def test_a_steered_run_is_the_independent_one(case: Case, freeze: Any, norms: Any) -> None:
    """Queries and keys, scaled and injected, in several heads of two layers, through the cap."""
    edits, moves = _edits(case)
    run = ctqk.steer(case.model, case.ids, edits, freeze=freeze, norms=norms, controls=0)
    expected = _expected(case, moves, freeze, norms)
    assert {(layer, head) for layer, head, _ in moves} == set(run.heads)
    for layer, head in run.heads:
        _close(case, "steered scores", run.scores[layer, head], expected.scores[layer][head])
        _close(case, "steered patterns", run.patterns[layer, head], expected.pattern[layer][head])
    _close(case, "steered logits", run.logits, expected.logits[-1])
    _close(case, "clean logits", run.clean.logits, case.run.logits[-1])
    change = (expected.logits[-1] - case.run.logits[-1]).abs().max() / case.run.logits.abs().max()
    assert float(change) > 1e-3, "the edits do something"
    assert (run.freeze, run.norms) == (freeze, norms)


@pytest.mark.parametrize("factor", [0.0, -2.0])
@pytest.mark.parametrize("side", ["query", "key"])
def test_with_frozen_norms_scores_change_by_the_marginal(
    case: Case, side: Any, factor: float
) -> None:
    layer, head = case.n_layers - 1, 1
    p = _where(case, layer)
    (c, f, _), *_ = _active(case, layer, p, 1)
    edit = ctqk.QKEdit((layer, head), side, c, f, p, factor=factor)
    run = ctqk.steer(case.model, case.ids, edit, norms="frozen", controls=0)
    change = run.scores[layer, head] - run.clean.scores[layer, head]
    for q in range(len(case.ids)):
        for k in range(q + 1):
            expected, size = 0.0, float(run.scores[layer, head].abs().max())
            if p == (q if side == "query" else k):
                table = case.graph.qk(layer, head, q, k)
                parts = table.query if side == "query" else table.key
                marginal = table.query_marginal if side == "query" else table.key_marginal
                at = [i for i, x in enumerate(parts) if (x.checkpoint, x.feature) == (c, f)]
                expected = (factor - 1) * float(marginal[at[0]])
            wide = case.model.cfg.dtype == torch.float64
            assert abs(float(change[q, k]) - expected) <= (1e-10 if wide else 1e-5) * size


def test_both_sides_of_a_pair(case: Case) -> None:
    """(m_q - 1)(m_k - 1) T joins the two marginals where query and key are both edited."""
    layer, head = 1, 0
    q = _where(case, layer)
    k = next(p for p in range(1, q) if _active(case, layer, p, 1))
    (cq, fq, _), (ck, fk, _) = _active(case, layer, q, 1)[0], _active(case, layer, k, 1)[0]
    edits = [
        ctqk.QKEdit((layer, head), "query", cq, fq, q, factor=3.0),
        ctqk.QKEdit((layer, head), "key", ck, fk, k, factor=-1.0),
    ]
    run = ctqk.steer(case.model, case.ids, edits, norms="frozen", controls=0)
    change = float((run.scores[layer, head] - run.clean.scores[layer, head])[q, k])
    table = case.graph.qk(layer, head, q, k)
    row = [i for i, x in enumerate(table.query) if (x.checkpoint, x.feature) == (cq, fq)][0]
    column = [i for i, x in enumerate(table.key) if (x.checkpoint, x.feature) == (ck, fk)][0]
    expected = 2 * table.query_marginal[row] - 2 * table.key_marginal[column]
    expected = float(expected - 4 * table.terms[row, column])
    limit = 1e-10 if case.model.cfg.dtype == torch.float64 else 1e-4
    assert abs(change - expected) <= limit * float(table.terms.abs().sum())


@pytest.mark.parametrize("freeze, norms", MODES)
def test_factor_one_is_the_clean_run_bit_for_bit(case: Case, freeze: Any, norms: Any) -> None:
    layer = case.n_layers - 1
    p = _where(case, layer)
    features = [f for c, f, _ in _active(case, layer, p, 9) if c == layer] or [
        _active(case, layer, p, 1)[0][1]
    ]
    reads = layer if len(features) > 1 else _active(case, layer, p, 1)[0][0]
    edits = [
        ctqk.QKEdit([(layer, 0), (layer, 1)], "key", reads, features, p, factor=1.0),
        ctqk.QKEdit([(layer, 0)], "query", layer, "all", factor=1.0),
        ctqk.HeadEdit([(layer, 1)], 1.0),
    ]
    run = ctqk.steer(case.model, case.ids, edits, freeze=freeze, norms=norms, controls=3)
    plain = case.model.transformer(torch.tensor([case.ids]))[0, -1]
    assert torch.equal(run.logits, plain.to(run.logits)) and torch.equal(run.clean.logits, plain)
    for head in run.heads:
        assert torch.equal(run.patterns[head], run.clean.patterns[head])
        assert torch.equal(run.scores[head], run.clean.scores[head])
    assert not run.changes and not run.controls


@pytest.mark.parametrize("norms", ["frozen", "live"])
def test_injecting_and_then_removing_is_the_clean_run(case: Case, norms: Any) -> None:
    f = _absent(case, 1, 3)
    heads = [(1, 0), (1, 1)]
    inject = ctqk.QKEdit(heads, "key", 1, f, 3, inject=2.5)
    for undo in ({"factor": 0.0}, {"inject": -2.5}):
        edits = [inject, ctqk.QKEdit(heads, "key", 1, f, 3, **undo)]
        run = ctqk.steer(case.model, case.ids, edits, norms=norms, controls=0)
        assert torch.equal(run.logits, run.clean.logits)
    alone = ctqk.steer(case.model, case.ids, inject, norms=norms, controls=0)
    assert not torch.equal(alone.logits, alone.clean.logits)


def test_all_components_removed_leaves_the_constant(case: Case) -> None:
    """q(0) = b_ln W_Q + b_Q, so a score is const . k(whole): the row of the table named so."""
    layer, head, q = case.n_layers - 1, case.reference.n_heads - 1, len(case.ids) - 1
    edit = ctqk.QKEdit((layer, head), "query", layer, "all", q, factor=0.0)
    run = ctqk.steer(case.model, case.ids, edit, norms="frozen", controls=0)
    for k in range(len(case.ids)):
        table = case.graph.qk(layer, head, q, k)
        constant = [i for i, x in enumerate(table.query) if x.label.startswith("b_Q")]
        expected = float(table.query_marginal[constant].sum())
        size = float(table.terms.abs().sum())
        limit = 1e-10 if case.model.cfg.dtype == torch.float64 else 1e-5
        assert abs(float(run.scores[layer, head][q, k]) - expected) <= limit * size
    whole = ctqk.QKEdit((layer, head), "query", layer, "all", q, factor=0.0)
    live = ctqk.steer(case.model, case.ids, whole, norms="live", controls=0)
    move = torch.zeros_like(case.run.residual[layer])
    move[q] = -case.run.residual[layer][q]
    expected = _expected(case, {(layer, head, "query"): move}, "none", "live")
    # the norm of a stream that is all but zero: rounding is divided by sqrt(eps)
    _close(case, "all removed, live", live.logits, expected.logits[-1], factor=100)


class Watched:
    """Everything that a layer's attention reads and scores, in the latest pass."""

    def __init__(self, case: Case, layer: int) -> None:
        self.case, self.layer, self.seen = case, layer, {}

    def __enter__(self) -> dict[str, Tensor]:
        def keep(x: Tensor, hook) -> None:
            self.seen[hook.name.split(".")[-1]] = x[0].clone()

        at = f"blocks.{self.layer}.attn."
        names = [f"{at}{hook}" for hook in ("hook_v", "hook_pattern", "hook_q", "hook_k")]
        self.hooks = self.case.model.transformer.hooks(fwd_hooks=[(n, keep) for n in names])
        self.hooks.__enter__()
        return self.seen

    def __exit__(self, *error) -> None:
        self.hooks.__exit__(*error)


def test_values_and_other_heads_are_untouched(case: Case) -> None:
    """Also the other query heads of a key-value group: keys are edited per query head."""
    layer = case.n_layers - 1
    p = _where(case, layer)
    (c, f, _), *_ = _active(case, layer, p, 1)
    edit = ctqk.QKEdit((layer, 0), "key", c, f, p, factor=-3.0)
    with Watched(case, layer) as seen:
        run = ctqk.steer(case.model, case.ids, edit, controls=0)
    during = dict(seen)
    with Watched(case, layer) as seen:
        case.model.transformer(torch.tensor([case.ids]))
    for name in ("hook_v", "hook_q", "hook_k"):
        assert torch.equal(during[name], seen[name])
    same = [torch.equal(a, b) for a, b in zip(during["hook_pattern"], seen["hook_pattern"])]
    assert same == [False] + [True] * (len(same) - 1)
    changed = run.scores[layer, 0] != run.clean.scores[layer, 0]
    assert changed.any(0).nonzero().flatten().tolist() == [p]


def test_frozen_patterns_are_the_clean_ones_bit_for_bit(case: Case) -> None:
    edits, _ = _edits(case)
    heads = {head for edit in edits for head in edit.heads}
    seen: dict[str, Tensor] = {}

    def keep(x: Tensor, hook) -> None:
        seen[hook.name] = x[0].clone()

    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(case.n_layers)]
    with case.model.transformer.hooks(fwd_hooks=[(name, keep) for name in names]):
        case.model.transformer(torch.tensor([case.ids]))
    session = Session(case.model, case.ids)
    watch = [(layer, h) for layer in range(case.n_layers) for h in range(case.reference.n_heads)]
    ran = session.engine(SteeringOptions(freeze="patterns")).run(session.resolve(edits), watch)
    for layer, head in watch:
        same = torch.equal(ran.patterns[layer, head], seen[names[layer]][head])
        assert same == ((layer, head) not in heads)
    run = ctqk.steer(case.model, case.ids, edits, freeze="patterns", controls=0)
    assert torch.equal(ran.logits, run.logits)


def test_a_head_scaled_away_writes_nothing(case: Case) -> None:
    layer, n = 1, len(case.ids)
    edits = [ctqk.HeadEdit((layer, 0), 0.0), ctqk.HeadEdit((layer, 1), 2.0, positions=[-1])]
    factors = {(layer, 0): torch.zeros(n), (layer, 1): torch.ones(n)}
    factors[layer, 1][-1] = 2.0
    freezes: tuple[Freeze, ...] = ("none", "patterns")
    for freeze in freezes:
        run = ctqk.steer(case.model, case.ids, edits, freeze=freeze, controls=2)
        expected = _expected(case, {}, freeze, "live", outputs=factors)
        _close(case, "scaled heads", run.logits, expected.logits[-1])
        assert not run.controls, "no feature is edited"
        assert all(set(c.outputs) != set(factors) for c in run.head_controls)


@pytest.mark.parametrize("freeze, norms", MODES)
def test_cached_generation_is_uncached_generation(case: Case, freeze: Any, norms: Any) -> None:
    """With edits held on at prompt positions, at every position, and on heads' outputs."""
    layer = case.n_layers - 1
    edits, _ = _edits(case)
    (c, f, _), *_ = _active(case, layer, _where(case, layer), 1)
    held = [
        ctqk.QKEdit((layer, 0), "query", c, f, factor=-2.0),
        ctqk.QKEdit((layer, 1), "key", layer, _absent(case, layer, 2), inject=3.0),
        ctqk.HeadEdit((1, 1), 0.5),
    ]
    session = Session(case.model, case.ids)
    options = {"freeze": freeze, "norms": norms, "controls": 0}
    cached = session.generate([*edits, *held], 6, cached=True, **options)
    whole = session.generate([*edits, *held], 6, cached=False, **options)
    assert cached.steered == whole.steered and cached.clean == whole.clean
    assert len(cached.clean.tokens) == 6


@pytest.mark.parametrize("norms", ["frozen", "live"])
def test_generation_holds_prompt_keys_for_later_queries(case: Case, norms: Any) -> None:
    """Live q . stored k(f): the continuation is the reference's, token by token, greedily."""
    layer = case.n_layers - 1
    p = _where(case, layer)
    (c, f, a), *_ = _active(case, layer, p, 1)
    edit = ctqk.QKEdit([(layer, 0), (layer, 1)], "key", c, f, p, factor=-8.0)
    found = ctqk.generate(case.model, case.ids, edit, 6, norms=norms, controls=0)
    ids = list(case.ids)
    while len(ids) < len(case.ids) + 6:
        move = torch.zeros(len(ids), case.reference.W_E.shape[1]).double()
        move[p] = -9.0 * a * _vector(case, layer, c, f)
        moves = {(layer, head, "key"): move for head in (0, 1)}
        run = steered(case.reference, ids, moves, frozen_norms=norms == "frozen")
        ids.append(int(run.logits[-1].argmax()))
    assert found.steered.tokens == ids[len(case.ids) :]


def test_sweeps_pass_through_the_clean_run(gemma: Case) -> None:
    edits, _ = _edits(gemma)
    swept = ctqk.sweep(gemma.model, gemma.ids, edits, [1, 0, -1], controls=2)
    clean, full, twice = swept.runs
    assert torch.equal(clean.logits, clean.clean.logits)
    # injected activations are multiplied with 1 - factor, factors are replaced
    assert {c.after for changes in full.changes.values() for c in changes if c.before} == {0.0}
    for place, changes in full.changes.items():
        for once, both in zip(changes, twice.changes[place], strict=True):
            assert both.after == pytest.approx(2 * once.after if not once.before else -once.before)
    token = int(clean.logits.argmax())
    assert [e.after for e in swept.effects(token)] == [r.probability(token) for r in swept.runs]


def test_a_swap_is_a_removal_and_an_injection(gemma: Case) -> None:
    layer = 1
    p = _where(gemma, layer)
    (c, f, a), *_ = _active(gemma, layer, p, 1)
    g = _absent(gemma, layer, p)
    edits = ctqk.swap((layer, 0), "query", c, remove=f, inject=g, activation=a, positions=p)
    run = ctqk.steer(gemma.model, gemma.ids, edits, controls=0)
    gone, put = run.changes[layer, 0, "query"]
    assert gone == Changed(c, f, p, pytest.approx(a), 0.0)  # type: ignore[arg-type]
    assert put == Changed(c, g, p, 0.0, pytest.approx(a))  # type: ignore[arg-type]


def test_controls_are_matched_and_distinct(gemma: Case) -> None:
    """Other features of the same position and ratio, in the same heads; other heads."""
    layer = 1
    p = _where(gemma, layer, at_least=6)
    (c, f, a), *_ = _active(gemma, layer, p, 1)
    edit = ctqk.QKEdit([(layer, 0), (layer, 2)], "key", c, f, p, factor=0.25)
    run = ctqk.steer(gemma.model, gemma.ids, edit, controls=4, seed=3)
    assert len(run.controls) == 4
    known: dict = {(x[0], x[1]): x[2] for x in _active(gemma, layer, p, 99)}
    seen = set()
    for control in run.controls:
        assert set(control.changes) == set(run.changes)
        places = list(control.changes.values())
        assert places[0] == places[1] and len(places[0]) == 1
        (changed,) = places[0]
        seen.add(changed.component)
        assert changed.position == p and changed.component != f
        assert changed.before == pytest.approx(known[changed.checkpoint, changed.component])
        assert changed.after == pytest.approx(0.25 * changed.before)
    assert len(seen) == 4
    again = ctqk.steer(gemma.model, gemma.ids, edit, controls=4, seed=3)
    for one, other in zip(run.controls, again.controls, strict=True):
        assert one.changes == other.changes and torch.equal(one.logits, other.logits)
    assert {tuple(sorted(h[1] for h in c.changes)) for c in run.head_controls} == {(1, 3)}
    assert any("only 1 sets of other heads" in note for note in run.notes)
    effect = run.effect(5)
    assert effect.features.n == 4 and effect.features.low <= effect.features.mean
    assert effect.before == run.clean.probability(5) and effect.after == run.probability(5)


def test_injections_are_controlled_by_absent_features(gemma: Case) -> None:
    layer, p = 1, 4
    edit = ctqk.QKEdit((layer, 0), "key", layer, _absent(gemma, layer, p), p, inject=2.0)
    run = ctqk.steer(gemma.model, gemma.ids, edit, controls=6)
    here = {f for c, f, _ in _active(gemma, layer, p, 99)}
    found = [c for run in run.controls for c in run.changes[layer, 0, "key"]]
    assert len(found) == 6 and all(c.before == 0 and c.after == 2 for c in found)
    assert not {c.component for c in found} & here


REFUSALS = {
    "no head L9H0": dict(heads=(9, 0)),
    "'L4' is no head": dict(heads="L4"),
    "no dictionary at checkpoint 40": dict(checkpoint=40),
    "(L1/0) have no decoder vector at checkpoint 1": dict(checkpoint=2),
    "no feature 100000 at checkpoint 1 (L0/100000)": dict(features=100000),
    "position 99 is out of range": dict(positions=99),
    "positions are empty": dict(positions=[]),
    "features are []": dict(features=[]),
    "'weather' is no component": dict(features="weather"),
    "no component of kind 'embedding'": dict(features="embedding"),
    "side is 'value'": dict(side="value"),
    "has neither": dict(factor=None),
    "has both": dict(inject=1.0),
    "not a finite number": dict(factor=float("nan")),
    "'error' cannot be injected": dict(features="error", factor=None, inject=1.0),
    "checkpoint 'x' is not a whole number": dict(checkpoint="x"),
    "factor 1000": dict(factor=10**400),
    "no part of what layer 1 reads": dict(checkpoint=2, features="error"),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_edits_that_mean_nothing_are_refused(gemma: Case, message: str) -> None:
    given = dict(heads=(1, 0), side="key", checkpoint=1, features=0, positions=1, factor=0.0)
    with pytest.raises(ctqk.UserError) as refusal:
        ctqk.steer(gemma.model, gemma.ids, ctqk.QKEdit(**{**given, **REFUSALS[message]}))  # type: ignore
    assert message in str(refusal.value)


def test_a_factor_of_what_is_not_there_is_refused(gemma: Case) -> None:
    f = _absent(gemma, 1, 3)
    here = _active(gemma, 1, 3, 1)[0][1]
    with pytest.raises(
        ctqk.UserError, match=f"L0/{f} .feature {f} of .* is not active at position 3.*L0/{here}"
    ):
        ctqk.steer(gemma.model, gemma.ids, ctqk.QKEdit((1, 0), "key", 1, f, 3, factor=0.0))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(freeze="all"), "freeze is 'all'"),
        (dict(norms="dead"), "norms is 'dead'"),
        (dict(controls=-1), "controls is -1"),
        (dict(controls=2.0), "controls is 2.0"),
    ],
)
def test_options_are_checked(gemma: Case, options: dict, message: str) -> None:
    edit = ctqk.HeadEdit((1, 0), 0.0)
    with pytest.raises(ctqk.UserError, match=message):
        ctqk.steer(gemma.model, gemma.ids, edit, **options)


def test_controls_that_do_not_exist_are_refused_before_any_run(gemma: Case) -> None:
    """The usual number is a wish; a larger one says how many there are, however large it is."""
    edit, runs = ctqk.HeadEdit((1, 0), 0.0), []
    session = Session(gemma.model, gemma.ids)
    for n in (21, 100_000, 10**30):
        with pytest.raises(ctqk.UserError, match="0 sets of other features and 3 of other heads"):
            session.steer(edit, controls=n, before_run=lambda: runs.append(1))
    assert not runs
    assert len(session.steer(edit, controls=20).head_controls) == 3
    f = _active(gemma, 1, 3, 1)[0][1]
    feature = ctqk.QKEdit((1, 0), "key", 1, f, 3, factor=0.0)
    with pytest.raises(ctqk.UserError, match="controls is 100000.*ask for at most") as refusal:
        session.steer(feature, controls=100_000)
    most = int(str(refusal.value).rstrip(".").split()[-1])
    assert len(session.steer(feature, controls=most).controls) == most


def test_what_is_no_edit_or_no_token_is_refused(gemma: Case) -> None:
    with pytest.raises(ctqk.UserError, match="nothing to steer"):
        ctqk.steer(gemma.model, gemma.ids, [])
    with pytest.raises(ctqk.UserError, match="dict is no edit"):
        ctqk.steer(gemma.model, gemma.ids, [{}])  # type: ignore[list-item]
    run = ctqk.steer(gemma.model, gemma.ids, ctqk.HeadEdit((1, 0), 0.0), controls=0)
    with pytest.raises(ctqk.UserError, match="out of range"):
        run.probability(97)
    with pytest.raises(ctqk.UserError, match="no tokenizer"):
        run.probability(" a")
    with pytest.raises(ctqk.UserError, match="context is 64"):
        ctqk.generate(gemma.model, gemma.ids, ctqk.HeadEdit((1, 0), 0.0), 60)
    with pytest.raises(ctqk.UserError, match="controls is -2"):
        ctqk.generate(gemma.model, gemma.ids, ctqk.HeadEdit((1, 0), 0.0), 2, controls=-2)
    with pytest.raises(ctqk.UserError, match="at tokens that are still to be generated"):
        ctqk.generate(gemma.model, gemma.ids, ctqk.QKEdit((1, 0), "key", 1, "error", factor=0), 2)


def test_any_heads_pattern_can_be_asked_for(gemma: Case) -> None:
    """Of the run, its clean run and its controls; iterating gives the steered heads."""
    p = _where(gemma, 1)
    (c, f, _), *_ = _active(gemma, 1, p, 1)
    edit = ctqk.QKEdit((1, 0), "key", c, f, p, factor=-2.0)
    run = ctqk.steer(gemma.model, gemma.ids, edit, freeze="patterns", controls=1)
    assert list(run.patterns) == list(run.clean.patterns) == [(1, 0)]
    expected = _expected(gemma, {}, "none", "live")
    for layer in range(gemma.n_layers):
        for head in range(gemma.reference.n_heads):
            clean = run.clean.patterns[layer, head]
            assert torch.allclose(clean, expected.pattern[layer][head], atol=1e-12)
            assert torch.equal(run.patterns[layer, head], clean) == ((layer, head) != (1, 0))
            assert run.scores[layer, head].shape == clean.shape
    (control,) = run.head_controls
    assert control.clean.patterns[control.heads[-1]].shape == clean.shape


def test_a_head_is_asked_for_by_its_name_too(gemma: Case) -> None:
    run = ctqk.steer(gemma.model, gemma.ids, ctqk.HeadEdit("L1H0", factor=0), controls=0)
    both: list[Any] = [run.patterns, run.scores]  # any key may be asked for
    for maps in both:
        for written in ("L1H0", (1, 0), torch.tensor([1, 0])):
            assert written in maps and torch.equal(maps[written], maps[1, 0])
            assert maps.get(written) is maps[1, 0]
        assert "L0H0" not in maps and maps["L0H0"].shape == maps[1, 0].shape  # not steered
        for absent, name in ((9, 0), "L9H0"), ("L9H0", "L9H0"), ("L1", "L1"), (7, "7"):
            assert absent not in maps and maps.get(absent) is None
            with pytest.raises(KeyError, match=name):
                maps[absent]


def test_arrays_and_tensors_are_taken_for_lists(gemma: Case) -> None:
    import numpy as np

    plain = ctqk.QKEdit([(1, 0), (1, 2)], "key", 1, [3, 4], [5, 6], factor=0.0)
    kinds: tuple[Any, ...] = (torch.tensor, np.array)
    for kind in kinds:
        pairs = kind([[1, 0], [1, 2]])
        assert ctqk.QKEdit(pairs, "key", 1, kind([3, 4]), kind([5, 6]), factor=0.0) == plain
        assert ctqk.HeadEdit(kind([1, 2]), 0.5, kind(3)) == ctqk.HeadEdit((1, 2), 0.5, 3)
    assert ctqk.QKEdit(iter(["L1H0", "L1H2"]), "key", 1, range(3, 5), (5, 6), factor=0.0) == plain


def test_what_all_names_again_is_edited_once(gemma: Case) -> None:
    p = _where(gemma, 1)
    f = _active(gemma, 1, p, 1)[0][1]
    edit = ctqk.QKEdit((1, 0), "key", 1, [f, "error", "all"], p, factor=0.5)
    run = ctqk.steer(gemma.model, gemma.ids, edit, controls=0)
    for changed in run.changes[1, 0, "key"]:
        assert changed.after == pytest.approx(0.5 * changed.before)


def test_controls_of_a_generation_hold_as_the_edit_does(gemma: Case) -> None:
    session = Session(gemma.model, gemma.ids)
    p = _where(gemma, 1)
    (c, f, _), *_ = _active(gemma, 1, p, 1)
    edits = [ctqk.QKEdit((1, 0), "key", c, f, factor=-3.0), ctqk.HeadEdit((1, 1), 0.0)]
    found = session.generate(edits, 3, controls=2)
    assert len(found.controls) == 2 and len(found.head_controls) == 1 and found.notes
    plan = session.resolve(edits)
    controls = matched(plan, gemma.model.dictionaries, session.parts, 2, 0)
    for control in controls.features:
        ((place, held),) = control.held.items()
        assert (place.layer, place.head, place.side) == (1, 0, "key")
        assert held[0].features != ((c, f),) and held[0].apply(1.0) == -3.0
        assert control.held_outputs == {(1, 1): 0.0}
    (other,) = controls.heads
    assert {(s.layer, s.head) for s in other.held} | set(other.held_outputs) == {(1, 2), (1, 3)}


def test_controls_that_would_be_weaker_edits_are_not_run(gemma: Case) -> None:
    p = _where(gemma, 1, at_least=4)
    features = [f for c, f, _ in _active(gemma, 1, p, 99) if c == 1]
    most = ctqk.QKEdit((1, 0), "key", 1, features[:-1], p, factor=0.0)
    run = ctqk.steer(gemma.model, gemma.ids, most, controls=4)
    assert not run.controls and any("too few for a control" in note for note in run.notes)
    # a layer without other heads does not take the others' controls away
    every = ctqk.QKEdit([(1, h) for h in range(4)], "key", 1, features[0], p, factor=0.0)
    run = ctqk.steer(gemma.model, gemma.ids, [every, ctqk.HeadEdit((2, 0), 0.0)], controls=3)
    assert {h for c in run.head_controls for h in c.outputs} == {(2, 1), (2, 2), (2, 3)}
    assert any("every head of layer 1" in note for note in run.notes)


def test_half_precision_is_steered_too(tmp_path: Path) -> None:
    """Deltas are computed in float64 whatever the model's dtype, and factor 1 stays exact."""
    case = build("gemma2", tmp_path)
    model = ctqk.load_model(
        tmp_path / "model", dictionaries=tmp_path / "sae", dtype=torch.bfloat16, device="cpu"
    )
    p = _where(case, 1)
    features = [f for *_, f, _ in _active(case, 1, p, 9)]
    del features
    for norms in ("frozen", "live"):
        same = ctqk.QKEdit((1, 0), "key", 1, "all", p, factor=1.0)
        run = ctqk.steer(model, case.ids, same, norms=norms, controls=0)
        assert torch.equal(run.logits, run.clean.logits)
        gone = ctqk.QKEdit((1, 0), "key", 1, "all", p, factor=0.0)
        run = ctqk.steer(model, case.ids, gone, norms=norms, controls=2)
        assert run.logits.isfinite().all() and not torch.equal(run.logits, run.clean.logits)


# Names of features


def test_names_and_indices_say_the_same_edit() -> None:
    plain = ctqk.QKEdit((1, 0), "key", 1, [3, 4], 5, factor=0.0)
    for features in (["L0/3", "L0/4"], ["L0/3", "L0/4", "L0/3"], ("l0/3", " L0/4")):
        assert ctqk.QKEdit((1, 0), "key", features=features, positions=5, factor=0.0) == plain
    assert ctqk.QKEdit((1, 0), "key", 1, ["L0/3", 4], 5, factor=0.0) == plain
    assert (plain.features, plain.resolved.names) == ((3, 4), ("L0/3", "L0/4"))
    mixed = ctqk.QKEdit((1, 0), "key", features=["L0/3", "in/5"], factor=0.0)
    assert (mixed.checkpoint, mixed.features) == (None, ("L0/3", "in/5"))
    assert mixed.resolved.components == ((1, 3), (0, 5))
    assert replace(mixed, factor=2.0).resolved.components == mixed.resolved.components
    away, put = ctqk.swap("L1H0", "key", remove="L0/3", inject="in/5", activation=2, positions=5)
    assert away == ctqk.QKEdit((1, 0), "key", 1, 3, 5, factor=0.0)
    assert put == ctqk.QKEdit((1, 0), "key", 0, 5, 5, inject=2.0)


@pytest.mark.parametrize(
    "features, checkpoint, message",
    [
        ("L0/3", 2, "L0/3 is feature 3 of checkpoint 1, and the edit says checkpoint 2"),
        (3, None, "an edit of 3 lacks checkpoint: .* which is L0/3 at checkpoint 1"),
        (["L0/3", "error"], None, "an edit of 'error' lacks checkpoint: write checkpoint=1,"),
        ("bias", None, "write checkpoint=1, the layer of its heads"),
        ("L5attn/61", None, "a feature of an attention graph"),
        ("L0-3", None, "names, such as L0/61"),
    ],
)
def test_names_that_mean_nothing_are_refused(features, checkpoint, message) -> None:
    with pytest.raises(ctqk.UserError, match=message):
        ctqk.QKEdit((1, 0), "key", checkpoint, features, factor=0.0)


def test_one_edit_of_several_checkpoints(tmp_path: Path) -> None:
    """A crosscoder's features of two checkpoints, both read by one block; held in generation too."""
    case = build("gemma2", tmp_path, "wcc")
    layer = case.n_layers - 1
    p = _where(case, layer, at_least=9)
    largest = {c: f for c, f, _ in reversed(_active(case, layer, p, 99))}
    assert len(largest) > 1
    components = list(largest.items())[:2]
    one = ctqk.QKEdit((layer, 0), "key", features=[feature_name(*x) for x in components], factor=-2)
    two = [ctqk.QKEdit((layer, 0), "key", c, f, factor=-2) for c, f in components]
    session = Session(case.model, case.ids)
    run, same = (session.steer(edits, controls=2) for edits in (one, two))
    assert torch.equal(run.logits, same.logits) and run.changes == same.changes
    assert [set(c.changes) for c in run.controls] == [set(run.changes)] * 2
    held, same = (session.generate(edits, 4, controls=0) for edits in (one, two))
    assert held.steered == same.steered
    document = run_document(run, [5])
    [edit] = document["edits"]
    assert edit["features"] == edit["names"] == list(one.resolved.names)
    assert read_edit(edit) == one


def test_a_run_prints_in_a_few_lines(gemma: Case) -> None:
    """Without a tokenizer tokens have no text, so the miniature's examples show more."""
    p = _where(gemma, 1)
    (c, f, _), *_ = _active(gemma, 1, p, 1)
    edits = [ctqk.QKEdit((1, 0), "key", c, f, p, factor=x) for x in (-1.0, 0.5, 2.0, 3.0, 4.0)]
    run = ctqk.steer(gemma.model, gemma.ids, edits, controls=2)
    text = repr(run)
    assert f"key of L1H0 at {p}: {feature_name(c, f)} x -1\n" in text and "and 2 more" in text
    assert "2 with other features, 2 with other heads" in text and len(text.splitlines()) <= 8
    assert "nothing, or a control" in repr(run.clean)
    swept = ctqk.sweep(gemma.model, gemma.ids, edits[:1], [1, 0], controls=0)
    assert len(repr(swept).splitlines()) == 3
    held = ctqk.generate(gemma.model, gemma.ids, edits[:1], 2, controls=0)
    assert len(repr(held).splitlines()) == 4
