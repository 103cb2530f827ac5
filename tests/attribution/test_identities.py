"""Every identity of attribution/README.md, sections 1 to 3, over every architecture.

Each compares the package (TransformerLens, closed forms) with ``reference.py`` (Hugging Face
weights, autograd) and ``random_dictionaries.decomposition`` (the files, position by position), in
float64 to 1e-10 and in float32 to 1e-5 of the sum of |terms|, on random weights, gains and biases.
"""

from __future__ import annotations

import math

import pytest
import torch
from circuit_tracer.graph import compute_graph_scores, compute_influence, prune_graph
from helpers.cases import ARCHITECTURES, Case, Named, build
from helpers.errors import record_error
from torch import Tensor

import circuit_tracer_qk as ctqk
from circuit_tracer_qk.attribution.residual import qk

ALL = list(ARCHITECTURES)
F64, F32 = 1e-10, 1e-5


def _params() -> list[tuple[str, str, str]]:
    """Every architecture with SAEs in float64 and float32; the other kinds of sets in float64."""
    params = [(name, "sae", dtype) for name in ALL for dtype in ("float64", "float32")]
    params += [(name, "wcc", "float64") for name in ALL]
    params += [(name, kind, "float64") for name in ("gpt2", "gemma2") for kind in ("pre", "topk")]
    return params


@pytest.fixture(scope="module", params=_params(), ids="-".join)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    name, kind, dtype = request.param
    folder = tmp_path_factory.mktemp("case")
    return build(name, folder, kind, getattr(torch, dtype))


def _close(case: Case, identity: str, ours: Tensor, theirs: Tensor, scale: float | Tensor) -> None:
    """Hold ``ours`` to ``theirs``; ``scale`` is the sum of |terms| that the numbers come from."""
    dtype = case.graph.record.parts.run.residual.dtype
    limit = F64 if dtype == torch.float64 else F32
    scale = torch.as_tensor(scale, dtype=torch.float64).clamp_min(1e-30)
    error = float(((ours.double() - theirs.double()).abs() / scale).max())
    short = "f64" if dtype == torch.float64 else "f32"
    record_error(f"{identity} {short}", case.name, error)
    assert error <= limit, f"{identity}: {error:.1e}"


def _f64(value: float | list[float]) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


# Section 1


def test_components_sum_to_the_residual_stream(case: Case) -> None:
    """x_c[p] = sum_i a_i v_i + b_c + e_c, and every part is the independently computed one."""
    parts = case.graph.record.parts
    for c in range(case.n_layers + 1):
        ours = _our_components(case, c)
        theirs = case.vectors(c)
        assert ours.keys() == theirs.keys()
        total = torch.zeros_like(case.run.residual[c])
        size = torch.zeros(len(case.ids), dtype=torch.float64)
        for name, vector in ours.items():
            total[name.position] += vector.double()
            size[name.position] += vector.double().norm()
        worst = size.max()
        _close(case, "components sum", total, case.run.residual[c], worst)
        names = list(ours)
        _close(
            case,
            "each component",
            torch.stack([ours[n] for n in names]),
            torch.stack([theirs[n] for n in names]),
            worst,
        )
    assert bool((parts.features.position > 0).all()), "no features at the BOS position"


def _our_components(case: Case, c: int) -> dict[Named, Tensor]:
    parts = case.graph.record.parts
    checkpoint = parts.at(c)
    vectors = checkpoint.vectors()
    names = []
    kinds = ("feature", "bias", "error", "embedding", "position")
    for kind, node, position in zip(
        checkpoint.kind.tolist(),
        checkpoint.node.tolist(),
        checkpoint.position.tolist(),
        strict=True,
    ):
        if kinds[kind] == "feature":
            reads = int(parts.features.checkpoint[node])
            names.append(Named("feature", position, reads, int(parts.features.feature[node])))
        else:
            names.append(Named(kinds[kind], position, c, -1))
    return dict(zip(names, vectors, strict=True))


# Section 2


def test_terms_are_projected_normalised_rotated_dots(case: Case) -> None:
    """T[u, u'] = q(u) . k(u') / scale, term by term; they sum to the score."""
    ref, run, n = case.reference, case.run, len(case.ids)
    for layer, head, query, key in _some_pairs(case):
        table = case.graph.qk(layer, head, query, key)
        vectors = case.vectors(layer)
        sides = []
        for listed, p, project in (
            (table.query, query, ref.q_vector),
            (table.key, key, ref.k_vector),
        ):
            named = [
                Named(u.kind, u.position, u.checkpoint, -1 if u.feature is None else u.feature)
                for u in listed
            ]
            images = []
            for name, component in zip(named, listed, strict=True):
                constant = component.label.startswith("b_") and component.label != "b_dec"
                u = torch.empty(0) if constant else vectors[name]
                images.append(project(run, layer, head, p, u, const=constant))
            # nothing left out, nothing listed twice
            assert len(set(zip(named, (c.label for c in listed), strict=True))) == len(listed)
            here = {name for name in vectors if name.position == p}
            assert {m for m, c in zip(named, listed, strict=True) if m in here} == here
            sides.append(torch.stack(images))
        theirs = sides[0] @ sides[1].T / ref.attn_scale
        scale = theirs.abs().sum()
        score = run.scores[layer][head, query, key]
        _close(case, "QK terms", table.terms, theirs, scale)
        _close(case, "QK terms sum to the score", table.terms.sum(), score, scale)
        _close(case, "score", _f64(table.score), score, scale)
        capped = run.capped[layer][head, query, key]
        _close(case, "score after soft-cap", _f64(table.score_capped), capped, scale)
        _close(case, "marginals", table.query_marginal, theirs.sum(1), scale)
        _close(case, "marginals", table.key_marginal, theirs.sum(0), scale)
        _close(case, "block totals", _f64(sum(table.blocks.values())), score, scale)
        assert table.masked == (not bool(run.mask[layer][query, key]))
        size = min(20, table.terms.numel())
        values = _f64([value for *_, value in table.top(20)])
        expected = theirs.flatten()[theirs.abs().flatten().topk(size).indices]
        _close(case, "top terms", values, expected, scale)
        assert n > query >= key


def test_softmax_of_the_row_is_the_pattern(case: Case) -> None:
    """Soft-cap, window and mask included; the BOS key stays in the row."""
    for layer in range(case.n_layers):
        for head in range(case.reference.n_heads):
            for query in (0, 3, len(case.ids) - 1):
                row = case.graph.qk_row(layer, head, query)
                theirs = case.run.pattern[layer][head, query, : query + 1]
                _close(case, "pattern", row.pattern, theirs, 1.0)
                _close(case, "softmax(row) = pattern", row.scores.softmax(0), theirs, 1.0)
                masked = ~case.run.mask[layer][query, : query + 1]
                assert bool((row.scores[masked] == -math.inf).all())
                assert bool((row.pattern[masked] == 0).all())


def test_top_terms_of_many_tables_are_the_tables(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All pairs of all heads, a few tables at a time."""
    monkeypatch.setattr(qk, "BATCH_BYTES", 4000)
    n_pos, layer, wanted = len(case.ids), case.n_layers - 1, 400
    places = [
        qk.Place(layer, head, query, key)
        for head in range(case.reference.n_heads)
        for query in range(0, n_pos, 3)
        for key in range(query, -1, -3)
    ]
    seen = []
    for (layer, head, query), found in case.graph.qk_tops(places, wanted):
        for at, key in enumerate(found.keys.tolist()):
            seen.append((layer, head, query, key))
            table = case.graph.qk(layer, head, query, key)
            n = min(wanted, table.terms.numel())
            rows, columns = found.query_index[at, :n], found.key_index[at, :n]
            scale = table.terms.abs().sum()
            assert len({*zip(rows.tolist(), columns.tolist(), strict=True)}) == n
            _close(
                case, "top terms of many", found.values[at, :n], table.terms[rows, columns], scale
            )
            sizes = table.terms.abs().flatten().topk(n).values
            _close(case, "top terms of many", found.values[at, :n].abs(), sizes, scale)
            assert bool((found.values[at, n:] == 0).all() and (found.key_index[at, n:] == -1).all())
            _close(case, "scores of many", found.scores[at], _f64([table.score]), scale)
    assert seen == sorted(places)


def test_top_terms_over_all_keys_are_the_tables(case: Case) -> None:
    """The batched path gives each key's own table."""
    layer, query = case.n_layers - 1, len(case.ids) - 1
    for head in range(case.reference.n_heads):
        top = case.graph.qk_top(layer, head, query, 15)
        for at, key in enumerate(top.keys.tolist()):
            table = case.graph.qk(layer, head, query, key)
            scale = table.terms.abs().sum()
            value = table.terms[top.query_index[at], top.key_index[at]]
            _close(case, "batched top terms", top.values[at], value, scale)
            sizes = table.terms.abs().flatten().topk(15).values
            _close(case, "batched top terms", top.values[at].abs(), sizes, scale)
            _close(case, "batched scores", top.scores[at], _f64(table.score), scale)


def _some_pairs(case: Case) -> list[tuple[int, int, int, int]]:
    last = len(case.ids) - 1
    pairs = [(last, last - 3), (last, 0), (5, 5), (7, 2), (0, 0)]
    heads = range(case.reference.n_heads)
    return [
        (layer, heads[(layer + i) % len(heads)], *pair)
        for layer in range(case.n_layers)
        for i, pair in enumerate(pairs)
    ]


# Section 3


def test_every_part_of_an_edge_is_autograds(case: Case) -> None:
    """residual, mlp and each head's total and direct part, against gradients of one block."""
    for target, name, checkpoint, y in _some_targets(case):
        if checkpoint > case.n_layers:
            continue
        layer = checkpoint - 1
        paths = case.reference.path_gradients(case.run, layer, y, name.position)
        direct = case.reference.path_gradients(case.run, layer, y, name.position, direct=True)
        sources = case.vectors(layer, tokens=True)
        nodes = {s: node for s in sources if (node := case.node(s)) is not None}
        listed = list(nodes)
        parts = case.graph.edges([nodes[s] for s in listed], [target] * len(listed))
        v = torch.stack([sources[s] for s in listed])
        p = torch.tensor([s.position for s in listed])
        total = torch.einsum("hpd,pd->ph", paths.heads[:, p], v)
        straight = torch.einsum("hpd,pd->ph", direct.heads[:, p], v)
        residual, mlp = (paths.residual[p] * v).sum(1), (paths.mlp[p] * v).sum(1)
        weight = residual + mlp + total.sum(1)
        scale = max(weight.abs().max(), residual.abs().max(), mlp.abs().max(), total.abs().max())
        found = parts.parts
        _close(case, "edge: residual part", found.residual, residual, scale)
        _close(case, "edge: MLP part", found.mlp, mlp, scale)
        _close(case, "edge: head loadings", found.total, total, scale)
        _close(case, "edge: direct loadings", found.direct, straight, scale)
        ours = found.residual + found.mlp + found.total.sum(1)
        _close(case, "edge: weight", ours, weight, scale)
        across = p != name.position
        _close(
            case, "cross-position edge = heads", found.total[across].sum(1), weight[across], scale
        )
        row = case.graph.adjacency_matrix[target, [nodes[s] for s in listed]]
        error = float((row.double() - weight).abs().max() / scale)
        record_error("adjacency (float32)", case.name, error)
        assert error <= F32
        assert bool((parts.query == name.position).all()) and bool((parts.layer == layer).all())
        pattern = case.run.pattern[layer][:, name.position, p].T
        _close(case, "edge: pattern", found.pattern, pattern, 1.0)


def test_edges_into_a_target_are_complete(case: Case) -> None:
    """Features, decoder biases, errors and positions sum to <gradient, x_c>."""
    g = case.graph
    for target, name, checkpoint, y in _some_targets(case):
        own = checkpoint > case.n_layers
        layer = case.n_layers if own else checkpoint - 1
        x = case.run.residual[layer]
        if own:
            whole, scale = y @ x[-1], (y.abs() * x[-1].abs()).sum()
        else:
            paths = case.reference.path_gradients(case.run, layer, y, name.position)
            gradient = paths.residual + paths.mlp + paths.heads.sum(0)
            whole, scale = (gradient * x).sum(), (gradient.abs() * x.abs()).sum()
        row = (
            target
            if target < g.n_features
            else target - len(g.adjacency_matrix) + len(g.bias_edges)
        )
        ours = g.adjacency_matrix[target].double().sum() + g.bias_edges[row].double().sum()
        if g.position_edges is not None:
            ours = ours + g.position_edges[row].double().sum()
        scale = max(float(scale), float(g.adjacency_matrix[target].abs().sum()))
        error = float((ours - whole).abs()) / scale
        record_error("completeness (float32)", case.name, error)
        assert error <= F32


def test_logit_edges_use_the_demeaned_column_through_the_frozen_norm(case: Case) -> None:
    g = case.graph
    ref = [case.reference.logit_direction(case.run, t.vocab_idx) for t in g.logit_targets]
    theirs = torch.stack(ref)
    _close(case, "logit direction", g.record.logit_rows, theirs, theirs.abs().max())
    first = len(g.adjacency_matrix) - len(g.logit_targets)
    edge = g.edge(g.n_features + (case.n_layers - 1) * g.n_pos + g.n_pos - 1, first)
    own = case.n_layers in case.sites
    assert edge.layer == (None if own else case.n_layers - 1)
    if own:
        assert edge.weight == edge.residual and edge.mlp == 0 and not edge.heads.total.any()


@pytest.mark.parametrize("select", ["circuit-tracer", "explained"])
def test_influence_is_circuit_tracers(case: Case, select: str) -> None:
    """One sweep equals the iterated influence of the full adjacency, and picks the same nodes.

    Explained influence is that of the adjacency without errors.
    """
    from circuit_tracer_qk.attribution.residual.influence import Sweep

    g, record = case.graph, case.graph.record
    A = g.adjacency_matrix.double()
    if select == "explained":
        A[:, slice(*g.first_indices()[:2])] = 0
    n_logits = len(g.logit_targets)
    weights = torch.zeros(len(A), dtype=torch.float64)
    weights[-n_logits:] = g.logit_probabilities.double()
    normalised = A.abs() / A.abs().sum(1, keepdim=True).clamp_min(1e-10)
    theirs = compute_influence(normalised, weights)[: len(A) - n_logits]
    sweep = Sweep(
        case.model.transformer,
        record.parts,
        record.heads,
        record.logit_rows,
        record.resid_pre,
        7,
        False,
        select,
    )
    ours = sweep.influence(g.logit_probabilities.to(record.logit_rows))
    error = float((ours.double() - theirs).abs().max() / theirs.max())
    record_error(f"influence, {select} (float32)", case.name, error)
    assert error <= F32
    few = ctqk.attribute(
        case.ids, case.model, max_n_logits=3, max_feature_nodes=30, batch_size=9, select=select
    )
    kept = set(few.selected_features.tolist())
    n = g.n_features
    order = theirs[:n].argsort(descending=True)
    sure = [i for i in order[:30].tolist() if theirs[i] > theirs[order[30]] * (1 + 1e-4)]
    assert kept >= set(sure)
    rows = [*few.selected_features.tolist(), *range(n, len(A))]
    assert torch.allclose(
        few.adjacency_matrix, g.adjacency_matrix[rows][:, rows], atol=1e-5, rtol=1e-4
    )


def test_circuit_tracers_pruning_and_scores_work(case: Case) -> None:
    pruned = prune_graph(case.graph)
    assert bool(pruned.node_mask.any()) and bool(pruned.edge_mask.any())
    assert all(0 <= score <= 1 for score in compute_graph_scores(case.graph))
    assert case.graph.adjacency_matrix.dtype == torch.float32
    first = case.graph.active_features[:, 0] == 0
    tokens = case.graph.n_features + case.n_layers * case.graph.n_pos
    columns = case.graph.adjacency_matrix[: case.graph.n_features][
        first, tokens : tokens + case.graph.n_pos
    ]
    assert bool(columns.any(1).all()), "first-checkpoint features have their token edges"


def _some_targets(case: Case) -> list[tuple[int, Named, int, Tensor]]:
    """(node, name, checkpoint written at, a_t v_t) of a few features at each checkpoint, a logit.

    A logit that reads its own checkpoint is given as checkpoint n_layers + 1.
    """
    out = []
    for c, site in case.sites.items():
        own = [key for key in site.activations if key[1] == c]
        for key in own[:: max(1, len(own) // 3)] if c > 0 else []:
            name = Named("feature", key[0], c, key[2])
            out.append((case.node(name), name, c, site.features[key]))
    g = case.graph
    node = len(g.adjacency_matrix) - len(g.logit_targets)
    name = Named("logit", g.n_pos - 1, case.n_layers, g.logit_targets[0].vocab_idx)
    direction = case.reference.logit_direction(case.run, name.feature)
    own = 1 if case.n_layers in case.sites else 0
    return [*out, (node, name, case.n_layers + own, direction)]
