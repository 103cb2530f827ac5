"""A graph of the size of a large model's, made at random: for the page's speed and row limits."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from circuit_tracer_qk.dictionaries.features import feature_index

SLUG = "large"


def write_large_graph(folder: Path, n_links: int = 20_000, n_nodes: int = 2_500) -> dict[str, Any]:
    """Write a residual graph of 64 tokens and 26 layers; one node has a tenth of all inputs."""
    rng = random.Random(0)
    n_pos, n_layers, n_heads = 64, 26, 8
    tokens = ["<bos>", *(f" word{i}" for i in range(1, n_pos))]
    nodes = [_node("E", p, p, "embedding", p) for p in range(n_pos)]
    seen = set()
    while len(nodes) < n_nodes - 1:
        layer, feature, p = rng.randrange(n_layers), rng.randrange(16_384), rng.randrange(1, n_pos)
        if (layer, feature, p) not in seen:
            seen.add((layer, feature, p))
            index = feature_index(layer + 1, feature)
            nodes.append(_node(str(layer), feature, p, "cross layer transcoder", index))
    logit = _node(str(n_layers + 1), 5, n_pos - 1, "logit", 5) | {
        "clerp": 'Output " word" (p=0.900)',
        "is_target_logit": True,
    }
    features = sorted(nodes[n_pos:], key=lambda node: (int(node["layer"]), node["ctx_idx"]))
    hub = next(n for n in reversed(features) if n["layer"] == "20" and n["ctx_idx"] > 50)
    early = [n for n in features if int(n["layer"]) < 20 and n["ctx_idx"] <= hub["ctx_idx"]]
    pairs = {(source["node_id"], hub["node_id"]): (source, hub) for source in early}
    for source in features[-200:]:
        pairs[source["node_id"], logit["node_id"]] = source, logit
    while len(pairs) < n_links:
        source, target = rng.choice(nodes[:-1]), rng.choice(features)
        at = -1 if source["layer"] == "E" else int(source["layer"])
        if at < int(target["layer"]) and source["ctx_idx"] <= target["ctx_idx"]:
            pairs[source["node_id"], target["node_id"]] = source, target
    links = []
    for source, target in pairs.values():
        heads = [[h, rng.gauss(0, 1), rng.gauss(0, 1), rng.random()] for h in range(n_heads)]
        heads.sort(key=lambda head: -abs(head[1]))
        same = source["ctx_idx"] == target["ctx_idx"]
        residual = rng.gauss(0, 1) if same else 0.0
        links.append(
            {
                "source": source["node_id"],
                "target": target["node_id"],
                "weight": residual + sum(head[1] for head in heads),
                "layer": None if target is logit else int(target["layer"]),
                "residual": residual,
                "mlp": 0.0,
                "head_loadings": heads,
                "head_loadings_rest": 0.0,
            }
        )
    metadata = {
        "slug": SLUG,
        "scan": "org/transcoders",
        "transcoder_list": [],
        "prompt_tokens": tokens,
        "prompt": "".join(tokens),
        "node_threshold": 1.0,
        "schema_version": 1,
    }
    document = {
        "metadata": metadata,
        "qParams": {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": ""},
        "nodes": [*nodes, logit],
        "links": links,
        "qk": {"schema_version": 1, "graph_kind": "residual", "attributions": [], "rows": []},
        "qk_only_nodes": {},
    }
    (folder / f"{SLUG}.json").write_text(json.dumps(document), encoding="utf-8")
    listing = json.dumps({"graphs": [metadata]})
    (folder / "graph-metadata.json").write_text(listing, encoding="utf-8")
    return document | {"hub": hub["node_id"]}


def _node(layer: str, feature: int, p: int, kind: str, index: int | None) -> dict[str, Any]:
    return {
        "node_id": f"{layer}_{feature}_{p}",
        "jsNodeId": f"{layer}_{feature}-{p}",
        "feature": index,
        "layer": layer,
        "ctx_idx": p,
        "feature_type": kind,
        "clerp": "" if kind == "embedding" else f"feature {feature} of layer {layer}",
        "influence": 0.5,
        "activation": 1.0,
        "is_target_logit": False,
        "token_prob": 0.0,
    }
