"""Graph files of transcoder graphs: the sums hold as written, at every block."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import circuit_tracer
import jsonschema
import pytest
import torch
from circuit_tracer.frontend import graph_models
from circuit_tracer.graph import prune_graph
from helpers.architectures import prompt_ids, save_tiny
from helpers.random_transcoders import PLACES, replacement_model
from helpers.schema import SCHEMA, strict

import circuit_tracer_qk as ctqk

CASES = ["gpt2-relu", "gemma2-topk", "qwen3-clt", "neox-skip", "llama-clt-skip"]


@dataclass
class Written:
    """A graph and its file."""

    model: Any
    graph: ctqk.TranscoderGraph
    document: dict[str, Any]
    index: dict[str, int]  # node id -> adjacency index


@pytest.fixture(scope="module", params=CASES)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    name, kind = request.param.split("-", 1)
    folder = tmp_path_factory.mktemp(request.param)
    save_tiny(name, folder / "model")
    model = replacement_model(folder / "model", kind, *PLACES["mlp.hook_in"])
    graph = ctqk.attribute(
        prompt_ids(name, 10), model, max_n_logits=2, max_feature_nodes=40, batch_size=16
    )
    assert isinstance(graph, ctqk.TranscoderGraph)
    path = ctqk.create_graph_files(graph, "tiny", folder / "graphs", node_threshold=0.9)
    return Written(model, graph, strict(path.read_bytes()), node_ids(graph))


def node_ids(graph: ctqk.TranscoderGraph) -> dict[str, int]:
    selected = graph.active_features[graph.selected_features].tolist()
    ids = [f"{layer}_{feature}_{position}" for layer, position, feature in selected]
    n_layers, n_pos = graph.cfg.n_layers, graph.n_pos
    ids += [f"{layer}_-1_{p}" for layer in range(n_layers) for p in range(n_pos)]
    ids += [f"E_{token}_{p}" for p, token in enumerate(graph.input_tokens.tolist())]
    ids += [f"{n_layers + 1}_{target[1]}_{n_pos - 1}" for target in graph.logit_targets]
    assert len(set(ids)) == len(ids) == len(graph.adjacency_matrix)  # error ids never collide
    return {node_id: i for i, node_id in enumerate(ids)}


def test_schema_and_stock_models(written: Written):
    jsonschema.Draft202012Validator(SCHEMA).validate(written.document)
    parsed = graph_models.Model.model_validate(written.document)
    assert parsed.metadata.scan == "random"
    assert written.document["qk"]["graph_kind"] == "transcoder"


def test_links_are_those_kept(written: Written):
    kept = prune_graph(written.graph, 0.9, 0.98)
    mask = kept.edge_mask & kept.node_mask & kept.node_mask[:, None]
    A = written.graph.adjacency_matrix
    expected = {(s, t) for t, s in (mask & (A != 0)).nonzero().tolist()}
    found = {(written.index[d["source"]], written.index[d["target"]]) for d in links(written)}
    assert found == expected
    for link in links(written):
        weight = float(A[written.index[link["target"]], written.index[link["source"]]])
        assert link["weight"] == pytest.approx(weight, rel=1e-6)


def links(written: Written) -> list[dict[str, Any]]:
    assert len(written.document["links"]) > 50
    return written.document["links"]


def test_every_cut_sums_to_the_weight(written: Written):
    nodes = {node["node_id"]: node for node in written.document["nodes"]}
    n_layers, parallel = written.graph.cfg.n_layers, bool(written.model.cfg.parallel_attn_mlp)
    for link in links(written):
        source, target = nodes[link["source"]], nodes[link["target"]]
        first = -1 if source["layer"] == "E" else int(source["layer"])
        is_logit = target["feature_type"] == "logit"
        last = n_layers - 1 if is_logit else int(target["layer"]) - parallel
        expected = list(range(first + 1, last + 1))
        assert [block["layer"] for block in link["head_loadings"]] == expected
        for block in link["head_loadings"]:
            parts = [part for _, part, _ in block["heads"]]
            total = block["bypass"] + block["rest"] + sum(parts)
            assert total == pytest.approx(link["weight"], abs=1e-9)
            assert [abs(p) for p in parts] == sorted((abs(p) for p in parts), reverse=True)
            for _, part, pairs in block["heads"]:
                assert pairs
                assert all(0 <= key <= query < written.graph.n_pos for query, key, _ in pairs)
        across = source["ctx_idx"] != target["ctx_idx"]
        if across:
            assert link["attention_free"] == 0
        if across and len(expected) == 1:
            (block,) = link["head_loadings"]
            assert abs(block["bypass"]) <= 1e-5 * abs(link["weight"])
        values = [value for *_, value in link["delivered_by"]]
        assert link["attention_free"] + sum(values) == pytest.approx(
            link["weight"], abs=1e-5 * (abs(link["weight"]) + sum(map(abs, values)))
        )
        assert all(layer in expected for layer, _, _ in link["delivered_by"])


def test_listed_parts_are_the_split(written: Written):
    some = links(written)[::7]
    ends = ([written.index[link[end]] for link in some] for end in ("source", "target"))
    sources, targets = ends
    found = written.graph.split(sources, targets)
    scale = float(written.graph.adjacency_matrix.abs().max())
    for e, link in enumerate(some):
        for block in link["head_loadings"]:
            parts = found.through[e, block["layer"]]
            largest = parts.abs().sort(descending=True).values
            for rank, (head, part, _) in enumerate(block["heads"]):
                assert part == pytest.approx(float(parts[head]), abs=1e-6 * scale)
                assert abs(part) == pytest.approx(float(largest[rank]), abs=1e-6 * scale)


def test_required_tables_are_there(written: Written):
    tables = {
        (t["layer"], t["head"], t["query"], t["key"]): t
        for t in written.document["qk"]["attributions"]
    }
    by_target = defaultdict(list)
    nodes = {node["node_id"]: node for node in written.document["nodes"]}
    for link in links(written):
        if nodes[link["source"]]["ctx_idx"] != nodes[link["target"]]["ctx_idx"]:
            by_target[link["target"]].append(link)
    n = 0
    for target, some in by_target.items():
        for link in sorted(some, key=lambda d: -abs(d["weight"]))[:3]:
            heads = [(b["layer"], *h) for b in link["head_loadings"] for h in b["heads"]]
            for layer, head, _, pairs in sorted(heads, key=lambda h: -abs(h[2]))[:2]:
                assert (layer, head, *pairs[0][:2]) in tables
                n += 1
        assert "qk_tracing_results" in nodes[target]
    assert n > 20
    for table in tables.values():
        total = sum(value for *_, value in table["terms"]) + table["rest"]
        assert total == pytest.approx(table["score"], abs=1e-9)
        for side in ("query", "key"):
            marginals = [c["marginal"] for c in table[f"{side}_components"]]
            total = sum(marginals) + table[f"{side}_rest"]
            assert total == pytest.approx(table["score"], abs=1e-9)
        ids = [c["node_id"] for c in table["query_components"] if "node_id" in c]
        assert len(set(ids)) == len(ids)
        assert all(node_id in nodes for node_id in ids)


def test_tables_in_the_file_are_the_graphs_own(written: Written):
    for table in written.document["qk"]["attributions"][::9]:
        exact = written.graph.qk(table["layer"], table["head"], table["query"], table["key"])
        size = float(exact.terms.abs().sum())
        assert table["score"] == pytest.approx(exact.score, rel=1e-6)
        named = {
            (c.kind, c.checkpoint, c.feature, c.position, c.label): float(value)
            for c, value in zip(exact.query, exact.query_marginal, strict=True)
        }
        for c in table["query_components"]:
            key = (c["kind"], c["checkpoint"], c["feature"], c["position"], c["label"])
            assert c["marginal"] == pytest.approx(named[key], abs=1e-5 * size)
        largest = [value for *_, value in exact.top(5) if value]
        listed = [value for *_, value in table["terms"][:5]]
        assert listed == pytest.approx(largest, abs=1e-5 * size)


def test_without_qk_and_with_a_list_of_transcoders(written: Written, tmp_path: Path):
    path = ctqk.create_graph_files(
        written.graph, "plain", tmp_path, qk=False, scan=["org/a", "org/b"]
    )
    document = strict(path.read_bytes())
    jsonschema.Draft202012Validator(SCHEMA).validate(document)
    assert "qk" not in document and "digest" in document["metadata"]["info"]
    assert any(link["delivered_by"] for link in document["links"])
    assert document["metadata"]["transcoder_list"] == ["org/a", "org/b"]
    assert document["metadata"]["scan"].startswith("custom-")
    assert [p.name for p in sorted(tmp_path.glob("[!.]*"))] == ["graph-metadata.json", "plain.json"]


def test_what_is_delivered_by_many_heads_is_cut_with_its_rest(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from circuit_tracer_qk.attribution.transcoder import links as transcoder_links

    monkeypatch.setattr(transcoder_links, "DELIVERED", 2)
    monkeypatch.setattr(transcoder_links, "DELIVERED_IN_ALL", 0)
    path = ctqk.create_graph_files(written.graph, "cut", tmp_path, qk=False)
    document = json.loads(path.read_bytes())
    jsonschema.Draft202012Validator(SCHEMA).validate(document)
    cut = [d for d in document["links"] if len(d["delivered_by"]) == 3]
    assert cut and all(d["delivered_by"][-1][:2] == [None, None] for d in cut)
    for link in cut:
        values = [value for *_, value in link["delivered_by"]]
        size = abs(link["weight"]) + sum(map(abs, values))
        total = link["attention_free"] + sum(values)
        assert total == pytest.approx(link["weight"], abs=1e-5 * size)


def test_same_graph_with_and_without(tmp_path: Path):
    save_tiny("llama", tmp_path)
    model = replacement_model(tmp_path, "relu", *PLACES["mlp.hook_in"])
    options: dict[str, Any] = {"max_n_logits": 2, "max_feature_nodes": 30, "batch_size": 16}
    stock = circuit_tracer.attribute(prompt_ids("llama", 9), model, **options)
    plain = ctqk.attribute(prompt_ids("llama", 9), model, qk=False, **options)
    ours = ctqk.attribute(prompt_ids("llama", 9), model, **options)
    assert type(plain) is circuit_tracer.Graph
    for graph in (plain, ours):
        assert torch.equal(graph.adjacency_matrix, stock.adjacency_matrix)
        assert torch.equal(graph.selected_features, stock.selected_features)
    stock.to_pt(str(tmp_path / "stock.pt"))
    loaded = circuit_tracer.Graph.from_pt(str(tmp_path / "stock.pt"))
    again = ctqk.explain_graph(loaded, model)
    assert isinstance(ours, ctqk.TranscoderGraph)
    assert again.qk(1, 1, 6, 3).score == ours.qk(1, 1, 6, 3).score
    ours.to_pt(str(tmp_path / "ours.pt"))  # a plain graph again
    assert type(circuit_tracer.Graph.from_pt(str(tmp_path / "ours.pt"))) is circuit_tracer.Graph


def test_refusals(tmp_path: Path):
    save_tiny("llama", tmp_path)
    model = replacement_model(tmp_path, "relu", *PLACES["mlp.hook_in"])
    other = replacement_model(tmp_path, "jumprelu", *PLACES["mlp.hook_in"])
    options: dict[str, Any] = {"max_n_logits": 2, "max_feature_nodes": 30, "batch_size": 16}
    graph = ctqk.attribute(prompt_ids("llama", 9), model, **options)
    assert isinstance(graph, ctqk.TranscoderGraph)
    with pytest.raises(ctqk.UserError, match="another model or other transcoders"):
        ctqk.explain_graph(graph, other)
    changed = ctqk.explain_graph(graph, model)
    changed.adjacency_matrix = graph.adjacency_matrix * 1.01
    with pytest.raises(ctqk.UserError, match="other edges than circuit-tracer"):
        ctqk.explain_graph(changed, model)
    backend = SimpleNamespace(transcoders=[], blocks=[torch.nn.Linear(2, 2)])  # Hugging Face's
    for no_model in (object(), backend):
        with pytest.raises(ctqk.UserError, match="no replacement model"):
            ctqk.explain_graph(graph, no_model)
    with pytest.raises(ctqk.UserError, match="no replacement model"):
        ctqk.attribute(prompt_ids("llama", 9), backend)
    with pytest.raises(ctqk.UserError, match="is no source"):
        graph.split([len(graph.adjacency_matrix) - 1], [0])
    with pytest.raises(ctqk.UserError, match="is no target"):
        graph.split([0], [graph.n_features])
    from circuit_tracer.attribution.targets import CustomTarget

    target = CustomTarget("direction", 0.5, torch.randn(model.cfg.d_model))
    odd = ctqk.attribute(
        prompt_ids("llama", 9), model, attribution_targets=[target], qk=False, batch_size=16
    )
    with pytest.raises(ctqk.UserError, match="no tokens"):
        ctqk.explain_graph(odd, model)
