"""Graph files: what circuit-tracer's page shows, with heads on links and QK attributions added.

``graph.schema.json`` describes the graph's file. Beside it lies, in the folder that its ``scan``
names, one file of examples for every feature that it mentions.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from circuit_tracer_qk import __version__, host
from circuit_tracer_qk.components import Component
from circuit_tracer_qk.errors import UserError
from circuit_tracer_qk.feature_files import folder_name, write_features
from circuit_tracer_qk.files import LISTING, check_folder, check_names, write_atomically
from circuit_tracer_qk.graph import EdgeParts, ResidualGraph, load_graph
from circuit_tracer_qk.qk import QKTable
from circuit_tracer_qk.tables import TOP_TERMS, Names, row_document, table_document
from circuit_tracer_qk.written import encode, rest, rounded

HEADS_LISTED, SHARE_LISTED = 8, 0.98  # a link's heads: the largest, up to this share of sum |total|
LINKS_EXPLAINED, HEADS_EXPLAINED = 3, 2  # every node's strongest links, their largest heads
PROJECTED = 10  # entries of each of a node's lists for Neuronpedia


def create_graph_files(
    graph: ResidualGraph | str | Path,
    slug: str,
    output_path: str | Path,
    node_threshold: float = 0.8,
    edge_threshold: float = 0.98,
    *,
    scan: str | None = None,
    qk: bool = True,
    max_tables: int = 512,
    max_bytes: int = 24 << 20,
    top_terms: int = TOP_TERMS,
    np_model: str | None = None,
) -> Path:
    """Write a graph for circuit-tracer's page, with head loadings and QK attributions.

    Every link's parts sum to its weight, every table's listed terms and ``rest`` to its score.
    Tables are written for the two largest heads (by |total|) of each node's three strongest
    cross-position links; then for further heads of cross-position links by |total|, while there
    are fewer than ``max_tables`` and they take less than ``max_bytes``.

    Args:
        graph: of :func:`circuit_tracer_qk.attribute`, or where one was saved.
        slug: names the file ``<slug>.json``.
        output_path: the folder, made if need be; the page server's data folder.
        scan: names the folder of the features' examples; the dictionaries' own if left out.
        node_threshold, edge_threshold: share of influence kept, as in circuit-tracer.
        qk: write QK attributions.
        max_tables, max_bytes: limits of the further tables.
        top_terms: how many terms of a table to list, by absolute value.
        np_model: write the scan and slug that Neuronpedia accepts, for this model id of its.

    Returns:
        The path of ``<slug>.json``.

    Raises:
        UserError: a slug, threshold or folder that cannot be used, or a file that cannot be
            written; files that were there before are then whole.
    """
    check_names(slug, np_model)
    for name, value in (("node_threshold", node_threshold), ("edge_threshold", edge_threshold)):
        if not 0 <= value <= 1:
            raise UserError(f"{name} is {value}: it must be between 0 and 1.")
    if isinstance(graph, str | Path):
        graph = load_graph(graph)
    folder = check_folder(output_path)
    _read_listing(folder)  # a damaged one is refused before any work
    scan_name = folder_name(graph, scan)

    kept = _prune(graph, node_threshold, edge_threshold)
    names = Names(graph.input_tokens.tolist(), {node.node_id for node in kept.nodes.values()})
    _mention_nodes(graph, kept, names)
    parts = graph.edges(kept.sources, kept.targets)
    model = host.Model(
        metadata=host.Metadata(
            slug=slug if np_model is None else slug.replace(".", "-"),
            scan=np_model or f"./graph_data/{scan_name}",
            transcoder_list=[],
            prompt_tokens=graph.record.token_strings,
            prompt=graph.input_string,
            node_threshold=node_threshold,
        ),
        qParams=host.QParams(pinnedIds=[], supernodes=[], linkType="both", clickedId="", sg_pos=""),
        nodes=list(kept.nodes.values()),
        links=[],
    )
    document = model.model_dump()
    document["metadata"]["info"] = {
        "generator": {"name": "circuit-tracer-qk", "version": __version__}
    }
    document["metadata"]["pruning_settings"] = {
        "node_threshold": node_threshold,
        "edge_threshold": edge_threshold,
    }
    document["links"] = _links(kept, parts)
    if qk:
        nodes = dict(zip(kept.nodes, document["nodes"], strict=True))
        document |= _attributions(
            graph, kept, parts, nodes, names, (max_tables, max_bytes), top_terms
        )
    path = folder / f"{slug}.json"
    data = encode(document, str(path))
    write_features(graph, folder / scan_name, names.features.values(), scan_name)
    write_atomically(path, data)
    # the local page finds the file by its name, also where Neuronpedia's slug differs
    _update_listing(folder, document["metadata"] | {"slug": slug})
    return path


# Nodes and links ----------------------------------------------------------------------------------


class _Kept(NamedTuple):
    """What pruning left of a graph.

    Attributes:
        nodes: by index in adjacency order.
        sources, targets: (n_links,) node indices, links in the adjacency's row order.
        weights: (n_links,) float64.
    """

    nodes: dict[int, host.Node]
    sources: Tensor
    targets: Tensor
    weights: Tensor


def _prune(graph: ResidualGraph, node_threshold: float, edge_threshold: float) -> _Kept:
    """circuit-tracer's pruning; unlinked features and errors and links of weight 0 are left out."""
    node_mask, edge_mask, influence = host.prune(graph, node_threshold, edge_threshold)
    edge_mask = edge_mask & (graph.adjacency_matrix != 0) & node_mask & node_mask[:, None]
    targets, sources = edge_mask.nonzero(as_tuple=True)
    n_always = graph.n_pos + len(graph.logit_targets)  # tokens and logits stay without links too
    used = torch.zeros_like(node_mask)
    used[targets] = used[sources] = used[-n_always:] = True
    return _Kept(
        nodes=_nodes(graph, used.nonzero().flatten().tolist(), influence.tolist()),
        sources=sources,
        targets=targets,
        weights=graph.adjacency_matrix[targets, sources].double().cpu(),
    )


def _nodes(
    graph: ResidualGraph, indices: list[int], influence: list[float]
) -> dict[int, host.Node]:
    """circuit-tracer's nodes. Errors have upstream's newer ids, which no feature's can equal."""
    record, n_pos, n_layers = graph.record, graph.n_pos, graph.record.heads.run.n_layers
    tokens = graph.n_features + n_layers * n_pos
    logits = tokens + n_pos
    # error slot 0 stands for checkpoint 1, or 0 in resid_pre sets; a node's layer is one less
    first_layer = -1 if record.resid_pre else 0
    selected = graph.active_features[graph.selected_features].tolist()
    activations = graph.activation_values[graph.selected_features].tolist()
    input_tokens = graph.input_tokens.tolist()
    probabilities = graph.logit_probabilities.tolist()

    def node(i: int) -> host.Node:
        share = rounded(influence[i]) if math.isfinite(influence[i]) else None
        if i < graph.n_features:
            layer, position, feature = selected[i]
            made = host.Node.feature_node(
                layer=layer,
                pos=position,
                feat_idx=feature,
                influence=share,
                activation=rounded(activations[i]),
            )
            return made.model_copy(update={"clerp": record.names(layer + 1, feature)})
        if i < tokens:
            slot, position = divmod(i - graph.n_features, n_pos)
            layer = slot + first_layer
            made = host.Node.error_node(layer=layer, pos=position, influence=share)
            ids = {"node_id": f"{layer}_-1_{position}", "jsNodeId": f"{layer}_-1-{position}"}
            return made.model_copy(update=ids)
        if i < logits:
            position = i - tokens
            return host.Node.token_node(
                pos=position, vocab_idx=input_tokens[position], influence=share
            )
        token, vocab_idx = graph.logit_targets[i - logits]
        return host.Node.logit_node(
            pos=n_pos - 1,
            vocab_idx=vocab_idx,
            token=token,
            target_logit=i == logits,
            token_prob=rounded(probabilities[i - logits]),
            num_layers=n_layers,
        )

    return {i: node(i) for i in indices}


def _mention_nodes(graph: ResidualGraph, kept: _Kept, names: Names) -> None:
    """Note the features that are nodes."""
    selected = graph.active_features[graph.selected_features].tolist()
    for i in kept.nodes:
        if i < graph.n_features:
            layer, _, feature = selected[i]
            names.mention(layer + 1, feature)


def _links(kept: _Kept, found: EdgeParts) -> list[dict[str, Any]]:
    """Links with what carried them.

    Identity: weight = residual + mlp + the listed heads' totals + head_loadings_rest, as written.
    """
    total = found.parts.total.double().cpu()
    size, order = total.abs().sort(dim=1, descending=True, stable=True)
    reached = size.cumsum(1)
    n_listed = (reached < SHARE_LISTED * reached[:, -1:]).sum(1) + 1
    n_listed = n_listed.clamp(HEADS_EXPLAINED, HEADS_LISTED).minimum((size > 0).sum(1))
    order = order[:, :HEADS_LISTED]
    of_head = total, found.parts.direct.cpu(), found.parts.pattern.cpu()
    by_head = [order, *(part.gather(1, order) for part in of_head)]
    columns = zip(
        kept.sources.tolist(),
        kept.targets.tolist(),
        kept.weights.tolist(),
        found.layer.tolist(),
        found.parts.residual.tolist(),
        found.parts.mlp.tolist(),
        n_listed.tolist(),
        zip(*(part.tolist() for part in by_head), strict=True),
        strict=True,
    )
    links = []
    for source, target, weight, layer, residual, mlp, n, carried in columns:
        weight, residual, mlp = rounded(weight), rounded(residual), rounded(mlp)
        listed = list(zip(*carried, strict=True))[:n]
        loadings = [[h, rounded(t), rounded(d), rounded(p)] for h, t, d, p in listed]
        links.append(
            {
                "source": kept.nodes[source].node_id,
                "target": kept.nodes[target].node_id,
                "weight": weight,
                "layer": None if layer < 0 else layer,
                "residual": residual,
                "mlp": mlp,
                "head_loadings": loadings,
                "head_loadings_rest": rest(weight, [residual, mlp, *(t for _, t, *_ in loadings)]),
            }
        )
    return links


# QK attributions ----------------------------------------------------------------------------------


class _Place(NamedTuple):
    """Where a table stands: one head's score of one key at one query."""

    layer: int
    head: int
    query: int
    key: int


def _attributions(
    graph: ResidualGraph,
    kept: _Kept,
    found: EdgeParts,
    nodes: dict[int, dict[str, Any]],
    names: Names,
    limits: tuple[int, int],
    top_terms: int,
) -> dict[str, Any]:
    """The document's ``qk`` and ``qk_only_nodes``; ``nodes`` get their ``qk_tracing_results``."""
    required, others = _places(kept, found)
    written = _Written(graph, names, top_terms)
    max_tables, max_bytes = limits
    outsiders: dict[str, dict[str, Any]] = {}
    # nodes that share a query share its tables, which are then let go
    by_query: dict[tuple[int, int], dict[int, list[_Place]]] = defaultdict(dict)
    for target, places in required.items():
        by_query[places[0].layer, places[0].query][target] = places

    n = len({place for places in required.values() for place in places})
    with tqdm(total=max(n, max_tables), desc="QK attributions", delay=2, disable=None) as progress:
        for targets in by_query.values():
            tables: dict[_Place, QKTable] = {}
            for place in dict.fromkeys(place for places in targets.values() for place in places):
                tables[place] = graph.qk(*place)
                written.add(place, written.draft(place, tables[place]))
                progress.update()
            for target, places in targets.items():
                results = _projection([tables[place] for place in places], names, outsiders)
                nodes[target]["qk_tracing_results"] = results
        for place in others:
            if len(written.tables) >= max_tables:
                break
            if place in written.tables:
                continue
            draft = written.draft(place, graph.qk(*place))
            if written.size + draft.size > max_bytes:
                break
            written.add(place, draft)
            progress.update()
    return {
        "qk": {
            "schema_version": 1,
            "graph_kind": "residual",
            "attributions": [written.tables[place] for place in sorted(written.tables)],
            "rows": [written.rows[place] for place in sorted(written.rows)],
        },
        "qk_only_nodes": outsiders,
    }


def _places(kept: _Kept, found: EdgeParts) -> tuple[dict[int, list[_Place]], list[_Place]]:
    """Which tables are wanted.

    Returns:
        By target, the places of its strongest links' largest heads; and every place that a kept
        cross-position link's head carried over, by its largest |total|.
    """
    layer, query, key = found.layer, found.query, found.key
    size = found.parts.total.abs()
    n_heads = size.shape[1]
    crossing = ((query != key) & (layer >= 0)).nonzero().flatten()
    strongest = crossing[kept.weights.to(size.device)[crossing].abs().argsort(descending=True)]
    largest = size.topk(min(HEADS_EXPLAINED, n_heads), dim=1)
    heads, sizes = largest.indices.tolist(), largest.values.tolist()
    where = list(zip(layer.tolist(), query.tolist(), key.tolist(), strict=True))
    targets = kept.targets.tolist()

    links: dict[int, list[int]] = defaultdict(list)
    for link in strongest.tolist():
        if len(links[targets[link]]) < LINKS_EXPLAINED:
            links[targets[link]].append(link)
    required: dict[int, list[_Place]] = {}
    for target, some in links.items():
        places = []
        for link in some:
            at_layer, at_query, at_key = where[link]
            for head, head_size in zip(heads[link], sizes[link], strict=True):
                if head_size > 0:
                    places.append(_Place(at_layer, head, at_query, at_key))
        if places:
            required[target] = list(dict.fromkeys(places))

    # every (link, head) as one number, so that the largest |total| of each place is one reduction
    n_pos = int(query.max()) + 1 if len(query) else 1
    head = torch.arange(n_heads, device=size.device)
    flat = (layer[crossing, None] * n_heads + head) * n_pos + query[crossing, None]
    flat = (flat * n_pos + key[crossing, None]).flatten()
    codes, at = flat.unique(return_inverse=True)
    best = size.new_zeros(len(codes)).scatter_reduce(0, at, size[crossing].flatten(), "amax")
    codes = codes[best.argsort(descending=True, stable=True)[: int((best > 0).sum())]]
    others = []
    for code in codes.tolist():
        code, at_key = divmod(code, n_pos)
        code, at_query = divmod(code, n_pos)
        at_layer, at_head = divmod(code, n_heads)
        others.append(_Place(at_layer, at_head, at_query, at_key))
    return required, others


class _Draft(NamedTuple):
    """A table that may be written, its row of scores if that is not written yet, and their size."""

    table: dict[str, Any]
    row: dict[str, Any] | None
    size: int


@dataclass
class _Written:
    """Tables and rows as they go to the file.

    Attributes:
        graph, names: what they are about.
        top_terms: terms listed per table.
        tables: by place.
        rows: by (layer, head, query).
        size: their bytes.
    """

    graph: ResidualGraph
    names: Names
    top_terms: int
    tables: dict[_Place, dict[str, Any]] = field(default_factory=dict)
    rows: dict[tuple[int, int, int], dict[str, Any]] = field(default_factory=dict)
    size: int = 0

    def draft(self, place: _Place, table: QKTable) -> _Draft:
        """What writing a table takes."""
        row = None
        if place[:3] not in self.rows:
            row = row_document(*place[:3], self.graph.qk_row(*place[:3]))
        pattern = float(self.graph.record.heads.run.pattern[place])
        made = table_document(table, pattern, self.names, self.top_terms)
        return _Draft(made, row, sum(len(encode(part)) for part in (made, row) if part))

    def add(self, place: _Place, draft: _Draft) -> None:
        """Write a table, and note the features that it mentions."""
        self.tables[place] = draft.table
        if draft.row is not None:
            self.rows[place[:3]] = draft.row
        self.size += draft.size
        for listed in (*draft.table["query_components"], *draft.table["key_components"]):
            if listed["kind"] == "feature":
                self.names.mention(listed["checkpoint"], listed["feature"])


def _projection(
    tables: Sequence[QKTable], names: Names, outsiders: dict[str, dict[str, Any]]
) -> dict[str, list[list[Any]]]:
    """A node's tables summed over heads, in the form that Neuronpedia's viewer shows.

    Args:
        tables: of one layer and query, so that their query components agree.
        outsiders: gets the components that are no nodes of the graph.
    """
    by_key: dict[int, list[QKTable]] = defaultdict(list)
    for table in tables:
        by_key[table.key_position].append(table)
    queries = tables[0].query
    keys = [c for same in by_key.values() for c in same[0].key]
    summed = [torch.stack([t.terms for t in same]).sum(0) for same in by_key.values()]
    terms = torch.cat(summed, 1).double().cpu()

    def top(values: Tensor) -> list[tuple[int, float]]:
        at = values.abs().topk(min(PROJECTED, len(values))).indices
        return list(zip(at.tolist(), values[at].tolist(), strict=True))

    def known(c: Component) -> str:
        node_id = names.node_id(c)
        if not names.is_node(c) and node_id not in outsiders:
            outsiders[node_id] = _outsider(c, names)
        return node_id

    return {
        "pair_wise_contributors": [
            [known(queries[i // len(keys)]), known(keys[i % len(keys)]), rounded(value)]
            for i, value in top(terms.flatten())
        ],
        "top_q_marginal_contributors": [
            [known(queries[i]), rounded(value)] for i, value in top(terms.sum(1))
        ],
        "top_k_marginal_contributors": [
            [known(keys[i]), rounded(value)] for i, value in top(terms.sum(0))
        ],
    }


def _outsider(c: Component, names: Names) -> dict[str, Any]:
    """A component that is no node of the graph, in the form of one, for Neuronpedia."""
    types = {"feature": "cross layer transcoder", "error": "mlp reconstruction error"}
    index = {"error": -1}.get(c.kind)
    if c.feature is not None:
        index = names.mention(c.checkpoint, c.feature)
    node_id = names.node_id(c)
    out = {
        "node_id": node_id,
        "jsNodeId": node_id,
        "feature": index,
        "feature_type": types.get(c.kind, "bias"),
        "layer": "E" if c.kind == "position" else str(c.checkpoint - 1),
        "ctx_idx": c.position,
        "clerp": c.label,
    }
    if c.activation is not None:
        out["activation"] = rounded(c.activation)
    return out


# Files --------------------------------------------------------------------------------------------


def _read_listing(folder: Path) -> dict[str, Any]:
    """The folder's list of graphs, empty where there is none.

    Raises:
        UserError: a file that is no such list.
    """
    path = folder / LISTING
    try:
        listing = json.loads(path.read_bytes())
        graphs = listing["graphs"]
        if not isinstance(graphs, list) or not all(isinstance(g, dict) for g in graphs):
            raise TypeError("graphs is no list of objects")
    except FileNotFoundError:
        return {"graphs": []}
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is damaged ({error}) and was left as it is: repair it, or remove it to "
            "start a new list of graphs."
        ) from error
    return listing


def _update_listing(folder: Path, metadata: dict[str, Any]) -> None:
    """Put a graph into the folder's list, in place of one with its slug."""
    listing = _read_listing(folder)
    others = [graph for graph in listing["graphs"] if graph.get("slug") != metadata["slug"]]
    write_atomically(folder / LISTING, encode(listing | {"graphs": [*others, metadata]}))
