"""Graph files: the sums hold as written, the schema and the stock page's models accept them."""

from __future__ import annotations

import copy
import errno
import json
import math
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from circuit_tracer.frontend import feature_models, graph_models
from circuit_tracer.graph import prune_graph
from helpers.architectures import prompt_ids, save_tiny
from helpers.cases import build
from helpers.random_dictionaries import PRE, write_sae, write_wcc
from helpers.schema import SCHEMA, strict

import circuit_tracer_qk as ctqk
from circuit_tracer_qk.attribution.residual.graph import Edge, HeadLoadings
from circuit_tracer_qk.base import files
from circuit_tracer_qk.dictionaries.features import feature_index
from circuit_tracer_qk.host import graph as host
from circuit_tracer_qk.model.heads import Heads

BOB = (
    "Once upon a time, there was a little boy named Bob. He was very happy. One day, a man said, "
    '"Hello, B'
)


@dataclass
class Written:
    """A graph and its files."""

    graph: ctqk.ResidualGraph
    path: Path
    document: dict[str, Any]
    index: dict[str, int]  # node id -> adjacency index

    @cached_property
    def edges(self) -> list[Edge]:
        """What carried each link, from the graph."""
        links = self.document["links"]
        ends = ([self.index[link[end]] for link in links] for end in ("source", "target"))
        layer, query, key, parts = self.graph.edges(*ends)
        columns = zip(layer.tolist(), query.tolist(), key.tolist(), *parts, strict=True)
        return [
            Edge(
                weight=float(residual + mlp + total.sum()),
                residual=float(residual),
                mlp=float(mlp),
                layer=None if at < 0 else at,
                query=q,
                key=k,
                heads=HeadLoadings(total, direct, pattern),
            )
            for at, q, k, residual, mlp, total, direct, pattern in columns
        ]

    @property
    def features(self) -> Path:
        return self.path.parent / self.document["metadata"]["scan"].removeprefix("./graph_data/")


def write(graph: ctqk.ResidualGraph, folder: Path, **options: Any) -> Written:
    path = ctqk.create_graph_files(graph, "a.graph-1", folder, **options)
    return Written(graph, path, strict(path.read_bytes()), node_ids(graph))


def node_ids(graph: ctqk.ResidualGraph) -> dict[str, int]:
    """Every node's id, by the contract's rules."""
    selected = graph.active_features[graph.selected_features].tolist()
    ids = [f"{layer}_{feature}_{position}" for layer, position, feature in selected]
    first = -1 if graph.record.resid_pre else 0  # error slot i: checkpoint i or i + 1, less one
    n_layers, n_pos = graph.cfg.n_layers, graph.n_pos
    ids += [f"{first + i}_-1_{p}" for i in range(n_layers) for p in range(n_pos)]
    ids += [f"E_{token}_{p}" for p, token in enumerate(graph.input_tokens.tolist())]
    ids += [f"{n_layers + 1}_{target[1]}_{n_pos - 1}" for target in graph.logit_targets]
    assert len(set(ids)) == len(ids) == len(graph.adjacency_matrix)
    return {node_id: i for i, node_id in enumerate(ids)}


def attribute(folder: Path, name: str, kind: str) -> ctqk.ResidualGraph:
    hf_model = save_tiny(name, folder / "model")
    layers, d_model = list(range(hf_model.config.num_hidden_layers)), hf_model.config.hidden_size
    if kind == "wcc":
        write_wcc(folder / kind, d_model, layers)
    else:
        write_sae(folder / kind, d_model, layers, hook=PRE if kind == "pre" else "hook_resid_post")
    names = {str(layer): [f"L{layer} “{i}”" for i in range(24)] for layer in layers}
    (folder / kind / "labels.json").write_text(json.dumps(names), encoding="utf-8")
    with zipfile.ZipFile(folder / kind / "features.zip", "w") as archive:
        for feature in range(24):
            archive.writestr(f"{feature_index(1, feature)}.json", json.dumps({"index": feature}))
    model = ctqk.load_model(folder / "model", dictionaries=folder / kind, device="cpu")
    return ctqk.attribute(prompt_ids(name, 9), model, max_n_logits=3)


CASES = ["gpt2-pre", "gemma2-sae", "mistral-wcc", "stories-sae", "stories-wcc"]


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Any:
    made: dict[str, Written] = {}

    def get(case: str) -> Written:
        if case not in made:
            name, kind = case.split("-")
            folder = tmp_path_factory.mktemp(case)
            if name == "stories":
                shared: Path = request.getfixturevalue("shared") / "stories260K"
                if not shared.is_dir():
                    pytest.skip("needs stories260K")
                model = ctqk.load_model(shared / "model", dictionaries=shared / kind, device="cpu")
                made[case] = write(ctqk.attribute(BOB, model), folder / "out")
            else:
                graph = attribute(folder, name, kind)
                made[case] = write(graph, folder / "out", node_threshold=0.9, top_terms=12)
        return made[case]

    return get


@pytest.fixture(params=CASES)
def written(request: pytest.FixtureRequest, graphs: Any) -> Written:
    return graphs(request.param)


@pytest.fixture
def small(graphs: Any) -> ctqk.ResidualGraph:
    return graphs("gpt2-pre").graph


def close(value: float, expected: float, size: float = 0.0, rel: float = 1e-6) -> bool:
    """Whether two numbers agree, relative to the larger of ``expected`` and ``size``."""
    return abs(value - expected) <= rel * max(abs(expected), size, 1e-9)


def test_the_schema_itself():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_schema(written: Written):
    jsonschema.Draft202012Validator(SCHEMA).validate(written.document)
    hook = "resid_pre" if written.graph.record.resid_pre else None
    assert written.document["qk"].get("feature_hook") == hook


def test_stock_models_parse(written: Written):
    parsed = graph_models.Model.model_validate(written.document)
    assert len(parsed.nodes) == len(written.document["nodes"])
    listing = strict((written.path.parent / "graph-metadata.json").read_bytes())
    assert [graph["slug"] for graph in listing["graphs"]] == ["a.graph-1"]
    graph_models.Metadata.model_validate(listing["graphs"][0])


def test_nodes_are_circuit_tracers(written: Written):
    nodes = written.document["nodes"]
    indices = [written.index[node["node_id"]] for node in nodes]
    assert indices == sorted(indices)
    assert len({node["jsNodeId"] for node in nodes if node["feature"] == -1}) == sum(
        node["feature"] == -1 for node in nodes
    )
    n_features, kinds = written.graph.n_features, defaultdict(int)
    for node, i in zip(nodes, indices, strict=True):
        kinds[node["feature_type"]] += 1
        if i >= n_features:
            assert not node["clerp"] or node["feature_type"] == "logit"
            continue
        chosen = written.graph.selected_features[i]
        layer, position, feature = written.graph.active_features[chosen].tolist()
        assert (node["layer"], node["ctx_idx"]) == (str(layer), position)
        assert node["feature"] == feature_index(layer + 1, feature)
        assert node["clerp"] == written.graph.record.names(layer + 1, feature)
        assert close(node["activation"], float(written.graph.activation_values[chosen]))
    assert kinds["embedding"] == written.graph.n_pos
    assert kinds["logit"] == len(written.graph.logit_targets)
    assert kinds["mlp reconstruction error"] and kinds["cross layer transcoder"]
    assert all("(p=" in node["clerp"] for node in nodes if node["feature_type"] == "logit")


def test_links_are_those_kept(written: Written):
    settings = written.document["metadata"]["pruning_settings"]
    edges, errors = written.graph.adjacency_matrix, range(*written.graph.first_indices()[:2])
    without = edges.clone()
    without[:, errors] = 0  # the graph's own rule, explained influence; errors come beside it
    kept = prune_graph(host.with_edges(written.graph, without), **settings)
    mask = kept.edge_mask & kept.node_mask & kept.node_mask[:, None]
    expected = {(s, t) for t, s in (mask & (without != 0)).nonzero().tolist()}
    links = written.document["links"]
    found = {(written.index[k["source"]], written.index[k["target"]]) for k in links}
    assert {(s, t) for s, t in found if s not in errors} == expected
    assert len(links) == len(found)


def test_links_are_circuit_tracers_by_its_rule(tmp_path: Path):
    case = build("llama", tmp_path, "sae", torch.float32)
    graph = ctqk.attribute(case.ids, case.model, max_n_logits=2, select="circuit-tracer")
    kept = prune_graph(graph, 0.8, 0.98)
    mask = kept.edge_mask & kept.node_mask & kept.node_mask[:, None]
    expected = [float(w) for w in graph.adjacency_matrix[mask & (graph.adjacency_matrix != 0)]]
    links = strict(ctqk.create_graph_files(graph, "g", tmp_path / "files").read_bytes())["links"]
    assert [link["weight"] for link in links] == pytest.approx(expected, rel=1e-6)


def test_links_say_what_carried_them(written: Written):
    for i, (link, edge) in enumerate(zip(written.document["links"], written.edges, strict=True)):
        source, target = written.index[link["source"]], written.index[link["target"]]
        if i % 50 == 0:
            edge = written.graph.edge(source, target)
        loadings = link["head_loadings"]
        totals = [total for _, total, _, _ in loadings]
        parts = [link["residual"], link["mlp"], *totals, link["head_loadings_rest"]]
        assert close(math.fsum(parts), link["weight"])
        size = abs(edge.residual) + abs(edge.mlp) + float(edge.heads.total.abs().sum())
        assert close(link["weight"], float(written.graph.adjacency_matrix[target, source]))
        assert close(link["weight"], edge.weight, size, 1e-4)
        assert close(link["residual"], edge.residual, size)
        assert close(link["mlp"], edge.mlp, size, 1e-5)
        assert link["layer"] == edge.layer
        assert [abs(t) for t in totals] == sorted((abs(t) for t in totals), reverse=True)
        for head, total, direct, pattern in loadings:
            assert close(total, float(edge.heads.total[head]), size, 1e-5)
            assert close(direct, float(edge.heads.direct[head]), size, 1e-5)
            assert close(pattern, float(edge.heads.pattern[head]), 1.0)
        every = float(edge.heads.total.abs().sum())
        assert len(totals) == 8 or math.fsum(map(abs, totals)) >= 0.98 * every * (1 - 1e-6)


def test_required_tables_are_there(written: Written):
    present = {(t["layer"], t["head"], t["query"], t["key"]) for t in tables(written)}
    assert len(present) == len(list(tables(written)))
    into = defaultdict(list)
    for link, edge in zip(written.document["links"], written.edges, strict=True):
        if edge.query != edge.key:
            into[link["target"]].append(edge)
    assert into
    for edges in into.values():
        for edge in sorted(edges, key=lambda e: -abs(e.weight))[:3]:
            for head in edge.heads.total.abs().topk(2).indices.tolist():
                assert (edge.layer, head, edge.query, edge.key) in present


def tables(written: Written) -> Iterator[dict[str, Any]]:
    yield from written.document["qk"]["attributions"]


def test_tables_sum_and_agree(written: Written):
    for listed in tables(written):
        table = written.graph.qk(*(listed[name] for name in ("layer", "head", "query", "key")))
        size = float(table.terms.abs().sum())
        assert close(listed["score"], table.score)
        assert close(listed["score_capped"], table.score_capped)
        assert not table.masked
        values = [value for *_, value in listed["terms"]]
        assert close(math.fsum([*values, listed["rest"]]), listed["score"])
        assert close(math.fsum(listed["blocks"].values()), listed["score"], max(size, 1.0), 1e-5)
        for side, components, marginals in (
            ("query", table.query, table.query_marginal),
            ("key", table.key, table.key_marginal),
        ):
            entries = listed[f"{side}_components"]
            shown = [entry["marginal"] for entry in entries]
            assert close(math.fsum([*shown, listed[f"{side}_rest"]]), listed["score"])
            whole = {
                (c.kind, c.checkpoint, c.feature, c.label): i for i, c in enumerate(components)
            }
            at = [whole[e["kind"], e["checkpoint"], e["feature"], e["label"]] for e in entries]
            assert len(set(at)) == len(at)
            assert {i for i, c in enumerate(components) if c.kind != "feature"} <= set(at)
            for i, entry in zip(at, entries, strict=True):
                assert close(entry["marginal"], float(marginals[i]), size)
        sides = [table.query, table.key]
        places = [
            {(c.kind, c.checkpoint, c.feature, c.label): i for i, c in enumerate(side)}
            for side in sides
        ]
        for q, k, value in listed["terms"]:
            entry_q, entry_k = listed["query_components"][q], listed["key_components"][k]
            i = places[0][tuple(entry_q[n] for n in ("kind", "checkpoint", "feature", "label"))]
            j = places[1][tuple(entry_k[n] for n in ("kind", "checkpoint", "feature", "label"))]
            assert close(value, float(table.terms[i, j]), size)
        left_out = table.terms.numel() - len(values)
        if left_out:
            top = [abs(value) for *_, value in table.top(12)]
            assert [abs(v) for v in values[:12]] == pytest.approx(top, rel=1e-6)


def test_rows_give_the_pattern(written: Written):
    rows = {(r["layer"], r["head"], r["query"]): r for r in written.document["qk"]["rows"]}
    assert {(t["layer"], t["head"], t["query"]) for t in tables(written)} == set(rows)
    for row in rows.values():
        assert len(row["scores"]) == len(row["pattern"]) == row["query"] + 1
        powers = [0.0 if s is None else math.exp(s - max(filter(None, row["scores"]), default=0))
                  for s in row["scores"]]  # fmt: skip
        assert [p / sum(powers) for p in powers] == pytest.approx(row["pattern"], abs=1e-5)
    for table in tables(written):
        row = rows[table["layer"], table["head"], table["query"]]
        assert close(row["scores"][table["key"]], table["score_capped"], 1.0)
        assert row["pattern"][table["key"]] == table["pattern"]


def test_components_that_are_nodes_are_named(written: Written):
    nodes = {node["node_id"]: node for node in written.document["nodes"]}
    found = 0
    for table in tables(written):
        for entry in (*table["query_components"], *table["key_components"]):
            assert ("id" in entry) == (entry["feature"] is not None and entry["checkpoint"] > 0)
            if "node_id" in entry:
                found += 1
                node = nodes[entry["node_id"]]
                assert node["ctx_idx"] == entry["position"]
                if entry["kind"] == "feature":
                    assert node["feature"] == entry["id"]
            elif entry["kind"] == "feature":
                name = f"{entry['checkpoint'] - 1}_{entry['feature']}_{entry['position']}"
                assert name not in nodes
    assert found


def test_neuronpedias_projection(written: Written):
    nodes = {node["node_id"]: node for node in written.document["nodes"]}
    outsiders = written.document["qk_only_nodes"]
    assert not set(nodes) & set(outsiders)
    assert all(node["node_id"] == name for name, node in outsiders.items())
    traced = [node for node in nodes.values() if "qk_tracing_results" in node]
    assert traced
    for node in traced:
        for entries in node["qk_tracing_results"].values():
            assert entries and all(
                name in nodes or name in outsiders for *names, _ in entries for name in names
            )
    # one node in full: its marginals are sums over the tables of its strongest links
    node = traced[0]
    links = zip(written.document["links"], written.edges, strict=True)
    edges = [edge for link, edge in links if link["target"] == node["node_id"]]
    edges = sorted((e for e in edges if e.query != e.key), key=lambda e: -abs(e.weight))[:3]
    at = {
        (e.layer or 0, head, e.query, e.key)
        for e in edges
        for head in e.heads.total.abs().topk(2).indices.tolist()
    }
    total = torch.stack([written.graph.qk(*place).query_marginal for place in at]).sum(0)
    largest = float(total.abs().max())
    shown = node["qk_tracing_results"]["top_q_marginal_contributors"]
    assert abs(shown[0][1]) == pytest.approx(largest, rel=1e-5)


def test_every_feature_has_its_file(written: Written):
    mentioned = {
        node["feature"]
        for node in (*written.document["nodes"], *written.document["qk_only_nodes"].values())
        if node["feature_type"] == "cross layer transcoder"
    }
    for table in tables(written):
        for entry in (*table["query_components"], *table["key_components"]):
            mentioned |= {entry["id"]} if "id" in entry else set()
    assert {int(path.stem) for path in written.features.iterdir()} == mentioned - {None}
    stored = {feature_index(1, feature): feature for feature in range(24)}
    has_examples = (Path(written.graph.record.dictionary_folder or "") / "features.zip").exists()
    for path in written.features.iterdir():
        data = strict(path.read_bytes())
        if has_examples and int(path.stem) in stored:
            assert data == {"index": stored[int(path.stem)]}
        else:
            assert feature_models.Model.model_validate(data).examples_quantiles == []


def test_limits(small: ctqk.ResidualGraph, tmp_path: Path):
    required = write(small, tmp_path / "a", max_tables=0)
    more = write(small, tmp_path / "b")
    few = write(small, tmp_path / "c", max_bytes=0)
    n = len(list(tables(required)))
    assert 0 < n == len(list(tables(few))) <= len(list(tables(more)))


def test_without_qk(small: ctqk.ResidualGraph, tmp_path: Path):
    document = write(small, tmp_path, qk=False).document
    assert "qk" not in document and "qk_only_nodes" not in document
    assert all("qk_tracing_results" not in node for node in document["nodes"])
    assert all("head_loadings" in link for link in document["links"])
    jsonschema.Draft202012Validator(SCHEMA).validate(document)


def test_strictest_pruning(small: ctqk.ResidualGraph, tmp_path: Path):
    document = write(small, tmp_path, node_threshold=0.0, edge_threshold=0.0).document
    jsonschema.Draft202012Validator(SCHEMA).validate(document)


def test_neuronpedia_names(small: ctqk.ResidualGraph, tmp_path: Path):
    written = write(small, tmp_path, np_model="gemma-2-2b", scan="org/name@main")
    assert written.path.name == "a.graph-1.json"
    metadata = written.document["metadata"]
    assert (metadata["scan"], metadata["slug"]) == ("gemma-2-2b", "a-graph-1")
    assert (tmp_path / "org--name-main").is_dir()
    jsonschema.Draft202012Validator(SCHEMA).validate(written.document)


@pytest.mark.parametrize(
    "slug", ["", "a/b", "../a", ".", "..", "a b", "é", "graph-metadata", "a\n"]
)
def test_refuses_slugs(small: ctqk.ResidualGraph, tmp_path: Path, slug: str):
    with pytest.raises(ctqk.UserError, match="slug"):
        ctqk.create_graph_files(small, slug, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["node_threshold", "edge_threshold"])
@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_refuses_thresholds(small: ctqk.ResidualGraph, tmp_path: Path, name: str, value: float):
    thresholds: dict[str, Any] = {name: value}
    with pytest.raises(ctqk.UserError, match=name):
        ctqk.create_graph_files(small, "a", tmp_path, **thresholds)


def test_refuses_a_file_for_a_folder(small: ctqk.ResidualGraph, tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ctqk.UserError, match="file"):
            ctqk.create_graph_files(small, "a", place)
    assert (tmp_path / "file").read_text() == "mine"


def test_refuses_a_folder_that_is_read_only(
    small: ctqk.ResidualGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(files.os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(ctqk.UserError, match="cannot be written"):
        ctqk.create_graph_files(small, "a", tmp_path)
    assert not list(tmp_path.iterdir())


def test_keeps_other_graphs_in_the_list(small: ctqk.ResidualGraph, tmp_path: Path):
    listing = tmp_path / "graph-metadata.json"
    other = {"slug": "other", "scan": "s", "unknown": 1}
    listing.write_text(json.dumps({"graphs": [other, {"slug": "a"}], "more": 2}))
    ctqk.create_graph_files(small, "a", tmp_path)
    found = strict(listing.read_bytes())
    assert found["graphs"][0] == other and found["more"] == 2
    assert [graph["slug"] for graph in found["graphs"]] == ["other", "a"]


@pytest.mark.parametrize("damaged", ["", '{"graphs": [', "[]", '{"graphs": {}}', '{"graphs": [1]}'])
def test_refuses_a_damaged_list(small: ctqk.ResidualGraph, tmp_path: Path, damaged: str):
    listing = tmp_path / "graph-metadata.json"
    listing.write_text(damaged)
    with pytest.raises(ctqk.UserError, match="graph-metadata.json is damaged"):
        ctqk.create_graph_files(small, "a", tmp_path)
    assert listing.read_text() == damaged
    assert [path.name for path in tmp_path.iterdir()] == ["graph-metadata.json"]


# Sidecars


def sidecar_schema() -> dict[str, Any]:
    return {**SCHEMA["$defs"]["sidecar"], "$defs": SCHEMA["$defs"]}


def sidecars(written: Written) -> dict[str, dict[str, Any]]:
    """The sidecars that a graph's file names, by head."""
    named = written.document["qk"].get("sidecars", {})
    return {
        head: strict((written.path.parent / entry["file"]).read_bytes())
        for head, entry in named.items()
    }


def in_all(written: Written, name: str) -> list[dict[str, Any]]:
    """Tables or rows of a graph's file and its sidecars."""
    beside = (entry for sidecar in sidecars(written).values() for entry in sidecar[name])
    return [*written.document["qk"][name], *beside]


def place(entry: dict[str, Any]) -> tuple[int, ...]:
    return tuple(entry[name] for name in ("layer", "head", "query", "key") if name in entry)


def test_what_does_not_fit_lies_beside(small: ctqk.ResidualGraph, tmp_path: Path):
    whole = write(small, tmp_path / "whole")
    assert "sidecars" not in whole.document["qk"]
    assert [p.name for p in (tmp_path / "whole").iterdir() if p.suffix == ".qk"] == []
    size = whole.path.stat().st_size
    tables_size = len(json.dumps(whole.document["qk"], separators=(",", ":")))
    for room in (size - 1, size - tables_size // 2, 0):
        parts = write(small, tmp_path / str(room), max_file_bytes=room)
        assert parts.path.stat().st_size <= max(room, size - tables_size + 20_000)
        jsonschema.Draft202012Validator(SCHEMA).validate(parts.document)
        graph_models.Model.model_validate(parts.document)
        found = in_all(parts, "attributions")
        assert sorted(map(place, found)) == sorted(map(place, whole.document["qk"]["attributions"]))
        assert {place(t): t for t in found} == {place(t): t for t in tables(whole)}
        rows = {place(row): row for row in whole.document["qk"]["rows"]}
        assert {place(row): row for row in in_all(parts, "rows")} == rows
        for head, sidecar in sidecars(parts).items():
            jsonschema.Draft202012Validator(sidecar_schema()).validate(sidecar)
            entry = parts.document["qk"]["sidecars"][head]
            assert head == f"L{sidecar['layer']}H{sidecar['head']}"
            assert entry["tables"] == [[t["query"], t["key"]] for t in sidecar["attributions"]]
            own = {place(t)[:3] for t in sidecar["attributions"]}
            assert {place(row) for row in sidecar["rows"]} == own
        kept = {key: value for key, value in parts.document.items() if key != "qk"}
        assert kept == {key: value for key, value in whole.document.items() if key != "qk"}
        names = {path.name for path in parts.features.iterdir()}
        assert names == {path.name for path in whole.features.iterdir()}
    assert parts.document["qk"]["attributions"] == [] and sidecars(parts)


def test_the_most_wanted_tables_stay_in_the_file(small: ctqk.ResidualGraph, tmp_path: Path):
    whole = write(small, tmp_path / "whole", max_tables=10_000)
    required = {place(t) for t in tables(write(small, tmp_path / "few", max_tables=0))}
    room = whole.path.stat().st_size * 9 // 10
    parts = write(small, tmp_path / "parts", max_tables=10_000, max_file_bytes=room)
    assert sidecars(parts)
    assert required <= {place(t) for t in tables(parts)}


def beside(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.glob("*.qk/*")}


def named(written: Written) -> set[str]:
    return {entry["file"] for entry in written.document["qk"].get("sidecars", {}).values()}


def test_another_graph_leaves_no_stale_sidecars(small: ctqk.ResidualGraph, tmp_path: Path):
    first = write(small, tmp_path, max_file_bytes=0)
    assert beside(tmp_path) == named(first)
    other = ctqk.create_graph_files(small, "a.graph", tmp_path, max_file_bytes=0)
    others = {entry["file"] for entry in strict(other.read_bytes())["qk"]["sidecars"].values()}
    second = write(small, tmp_path, max_file_bytes=0, top_terms=3)
    assert named(second) and not named(second) & named(first)
    assert beside(tmp_path) == named(second) | others
    (tmp_path / "a.graph-1.qk" / "notes.txt").write_text("mine")
    write(small, tmp_path)
    assert beside(tmp_path) == {"a.graph-1.qk/notes.txt"} | others
    (tmp_path / "a.graph-1.qk" / "notes.txt").unlink()
    write(small, tmp_path)
    assert not (tmp_path / "a.graph-1.qk").exists()


def everything(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def killed(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize(
    ("fails", "error"),
    [(full, ctqk.UserError), (killed, KeyboardInterrupt)],
    ids=["full", "killed"],
)
@pytest.mark.parametrize("room", [10**9, 0], ids=["one file", "sidecars"])
def test_a_write_that_fails_changes_nothing(
    small: ctqk.ResidualGraph,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    fails: Any,
    error: type[BaseException],
    room: int,
):
    ctqk.create_graph_files(small, "a", tmp_path, max_file_bytes=room)
    before = everything(tmp_path)
    monkeypatch.setattr(files.os, call, fails)
    with pytest.raises(error) as caught:
        ctqk.create_graph_files(small, "a", tmp_path, node_threshold=0.5, max_file_bytes=room)
    if error is ctqk.UserError:
        assert "No space left" in str(caught.value)
        assert ("a.json" if room else "a.qk") in str(caught.value)
    assert everything(tmp_path) == before


def test_sidecars_in_place_without_their_graph_change_nothing(
    small: ctqk.ResidualGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ctqk.create_graph_files(small, "a", tmp_path, max_file_bytes=0)
    before = everything(tmp_path)
    replace_file = files.os.replace

    def fails_at_the_graph(source: Path, target: Path) -> None:
        full() if target.name == "a.json" else replace_file(source, target)

    monkeypatch.setattr(files.os, "replace", fails_at_the_graph)
    with pytest.raises(ctqk.UserError, match=r"a\.json"):
        ctqk.create_graph_files(small, "a", tmp_path, node_threshold=0.5, max_file_bytes=0)
    assert everything(tmp_path) == before
    ctqk.create_graph_files(small, "b", tmp_path / "new")  # one without sidecars before
    before = everything(tmp_path)
    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(ctqk.UserError):
        ctqk.create_graph_files(small, "b", tmp_path / "new", max_file_bytes=0, top_terms=3)
    assert everything(tmp_path) == before and not (tmp_path / "new" / "b.qk").exists()


def test_not_finite_is_refused(small: ctqk.ResidualGraph, tmp_path: Path):
    graph = copy.copy(small)
    vars(graph).pop("scores", None)
    run = replace(small.record.parts.run, residual=small.record.parts.run.residual * math.nan)
    parts = replace(small.record.parts, run=run)
    graph.record = replace(small.record, parts=parts, heads=Heads(small.record.heads.blocks, run))
    with pytest.raises(ctqk.UserError, match="NaN or infinite"):
        ctqk.create_graph_files(graph, "a", tmp_path)
    assert not (tmp_path / "a.json").exists()


def test_labels_of_any_kind(small: ctqk.ResidualGraph, tmp_path: Path):
    label = 'a "quote", <b>, \u2028, \ud800 half a pair'
    graph = copy.copy(small)
    graph.record = replace(small.record, names=lambda checkpoint, feature: label)
    vars(graph).pop("scores", None)
    document = write(graph, tmp_path).document
    assert label in {node["clerp"] for node in document["nodes"]}
    listed = (*document["qk"]["attributions"][0]["query_components"],)
    assert label in {entry["label"] for entry in listed}
