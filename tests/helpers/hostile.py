"""A graph file made by hand: its labels, tokens and examples are what an attacker would write.

Sums close, so that what the page shows can be held to the numbers here.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from circuit_tracer_qk.dictionaries.features import feature_index

SLUG = "hostile"
SCAN = "hostile-features"
IMAGE = "<img src=x onerror=\"window.pwned='label'\">"
LABELS = [
    IMAGE,
    "\"quotes\" 'single' `back` & &amp; </div><script>window.pwned='script'</script>",
    "שלום עולם (right to left) مرحبا",
    "long " * 60,
    "line\nbreak\ttab\r and \u2028 separator",
    "' onmouseover='window.pwned=1' x='",
    "{{constructor.constructor('window.pwned=2')()}} ${window.pwned=3}",
    "javascript:window.pwned=4",
]
TOKENS = ["<bos>", IMAGE, "\n", "מילה", "x" * 300, '"', " last"]
N_LAYERS, N_HEADS = 2, 12
QUERY = len(TOKENS) - 1


def write_hostile_graph(folder: Path) -> dict[str, Any]:
    """Write the graph, its listing and its features' examples; returns the document."""
    document = hostile_graph()
    (folder / f"{SLUG}.json").write_text(json.dumps(document), encoding="utf-8")
    listing = {"graphs": [document["metadata"]]}
    (folder / "graph-metadata.json").write_text(json.dumps(listing), encoding="utf-8")
    (folder / SCAN).mkdir(exist_ok=True)
    for layer in range(N_LAYERS):
        for i, label in enumerate(LABELS):
            index = feature_index(layer + 1, i)
            text = json.dumps(_examples(index, label), ensure_ascii=False)
            (folder / SCAN / f"{index}.json").write_text(text, encoding="utf-8")
    return document


def hostile_graph() -> dict[str, Any]:
    rng = random.Random(0)
    nodes = [_token(p) for p in range(len(TOKENS))]
    nodes += [
        _feature(layer, i, p)
        for layer in range(N_LAYERS)
        for i in range(len(LABELS))
        for p in (1, 3, QUERY)
    ]
    nodes += [_logit()]
    links = []
    for target in nodes:
        for source in nodes:
            if _reads(target, source):
                links.append(_link(source, target, rng))
    tables = [
        _table(layer, head, QUERY, key, rng)
        for layer in range(N_LAYERS)
        for head in range(3)
        for key in (1, 3)
    ]
    rows = [_row(layer, head, rng) for layer in range(N_LAYERS) for head in range(3)]
    for table in tables:
        row = next(r for r in rows if (r["layer"], r["head"]) == (table["layer"], table["head"]))
        table["score_capped"] = row["scores"][table["key"]]
        table["pattern"] = row["pattern"][table["key"]]
    return {
        "metadata": {
            "slug": SLUG,
            "scan": f"./graph_data/{SCAN}",
            "transcoder_list": [],
            "prompt_tokens": TOKENS,
            "prompt": "".join(TOKENS),
            "node_threshold": 1.0,
            "schema_version": 1,
        },
        "qParams": {
            "pinnedIds": [],
            "supernodes": [],
            "linkType": "both",
            "clickedId": "",
            "sg_pos": "",
        },
        "nodes": nodes,
        "links": links,
        "qk": {
            "schema_version": 1,
            "graph_kind": "residual",
            "attributions": tables,
            "rows": rows,
        },
        "qk_only_nodes": {},
    }


def _token(p: int) -> dict[str, Any]:
    return {
        "node_id": f"E_{p}_{p}",
        "jsNodeId": f"E_{p}-{p}",
        "feature": p,
        "layer": "E",
        "ctx_idx": p,
        "feature_type": "embedding",
        "clerp": "",
        "influence": 0.1,
        "is_target_logit": False,
        "token_prob": 0.0,
    }


def _feature(layer: int, i: int, p: int) -> dict[str, Any]:
    return {
        "node_id": f"{layer}_{i}_{p}",
        "jsNodeId": f"{layer}_{i}-{p}",
        "feature": feature_index(layer + 1, i),
        "layer": str(layer),
        "ctx_idx": p,
        "feature_type": "cross layer transcoder",
        "clerp": LABELS[i],
        "activation": 1.5 + i,
        "influence": 0.2,
        "is_target_logit": False,
        "token_prob": 0.0,
        "vis_link": "javascript:window.pwned='link'",
    }


def _logit() -> dict[str, Any]:
    return {
        "node_id": f"{N_LAYERS + 1}_7_{QUERY}",
        "jsNodeId": f"L_7-{QUERY}",
        "feature": 7,
        "layer": str(N_LAYERS + 1),
        "ctx_idx": QUERY,
        "feature_type": "logit",
        "clerp": f'Output "{IMAGE}" (p=0.500)',
        "is_target_logit": True,
        "token_prob": 0.5,
        "influence": 0.1,
        "isLogit": True,
    }


def _reads(target: dict[str, Any], source: dict[str, Any]) -> bool:
    at, reads = (-1 if node["layer"] == "E" else int(node["layer"]) for node in (source, target))
    reads -= 1
    if target["feature_type"] == "logit":
        return at == N_LAYERS - 1 and source["ctx_idx"] == target["ctx_idx"]
    return at == reads and source["ctx_idx"] <= target["ctx_idx"]


def _link(source: dict[str, Any], target: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    is_logit = target["feature_type"] == "logit"
    same = source["ctx_idx"] == target["ctx_idx"]
    residual, mlp = (rng.gauss(0, 2), 0.0) if is_logit else (0.0, 0.0)
    if same and not is_logit:
        residual, mlp = rng.gauss(0, 2), rng.gauss(0, 2)
    totals = [] if is_logit else [rng.gauss(0, 1) for _ in range(N_HEADS)]
    order = sorted(range(len(totals)), key=lambda h: -abs(totals[h]))
    if source["ctx_idx"] == 1:  # heads with tables first
        order = sorted(order, key=lambda h: h > 2)
    heads = [[h, totals[h], totals[h] * rng.uniform(-0.5, 1.5), rng.random()] for h in order[:8]]
    return {
        "source": source["node_id"],
        "target": target["node_id"],
        "weight": math.fsum([residual, mlp, *totals]),
        "layer": None if is_logit else int(target["layer"]),
        "residual": residual,
        "mlp": mlp,
        "head_loadings": heads,
        "head_loadings_rest": math.fsum(totals[h] for h in order[8:]),
    }


def _components(position: int, layer: int) -> list[dict[str, Any]]:
    listed = [
        {
            "kind": "feature",
            "checkpoint": layer,
            "feature": i,
            "position": position,
            "activation": 0.5 + i,
            "label": label,
            "id": feature_index(layer, i),
        }
        for i, label in enumerate(LABELS)
        if layer
    ]
    for component in listed:
        component["node_id"] = f"{layer - 1}_{component['feature']}_{position}"
    kinds = ("bias", "error") if layer else ("embedding",)
    for kind in kinds:
        listed.append(
            {
                "kind": kind,
                "checkpoint": layer,
                "feature": None,
                "position": position,
                "activation": None,
                "label": IMAGE if kind == "embedding" else "b_dec",
            }
        )
    return listed


def _table(layer: int, head: int, query: int, key: int, rng: random.Random) -> dict[str, Any]:
    queries, keys = _components(query, layer), _components(key, layer)
    values = [[rng.gauss(0, 3) for _ in keys] for _ in queries]
    for i, component in enumerate(queries):
        component["marginal"] = math.fsum(values[i])
    for j, component in enumerate(keys):
        component["marginal"] = math.fsum(row[j] for row in values)
    terms = [[i, j, value] for i, row in enumerate(values) for j, value in enumerate(row)]
    terms.sort(key=lambda term: -abs(term[2]))
    score = math.fsum(value for *_, value in terms)
    listed = terms[:50]
    blocks: dict[str, float] = {}
    for i, j, value in terms:
        name = f"{queries[i]['kind']}|{keys[j]['kind']}"
        blocks[name] = blocks.get(name, 0.0) + value
    return {
        "layer": layer,
        "head": head,
        "query": query,
        "key": key,
        "score": score,
        "query_components": queries,
        "query_rest": 0.0,
        "key_components": keys,
        "key_rest": 0.0,
        "terms": listed,
        "rest": score - math.fsum(value for *_, value in listed),
        "grid": values,
        "blocks": blocks,
    }


def _row(layer: int, head: int, rng: random.Random) -> dict[str, Any]:
    """Position 2 is masked."""
    scores: list[float | None] = [rng.gauss(0, 1) for _ in TOKENS]
    scores[2] = None
    powers = [0.0 if s is None else math.exp(s) for s in scores]
    pattern = [p / math.fsum(powers) for p in powers]
    return {"layer": layer, "head": head, "query": QUERY, "scores": scores, "pattern": pattern}


def _examples(index: int | None, label: str) -> dict[str, Any]:
    example = {
        "tokens": [label, IMAGE, "\n"],
        "tokens_acts_list": [1.0, 0.5, 0.0],
        "train_token_ind": 0,
        "is_repeated_datapoint": False,
    }
    return {
        "transcoder_id": SCAN,
        "index": index,
        "examples_quantiles": [{"quantile_name": IMAGE, "examples": [example]}],
        "top_logits": [IMAGE, label],
        "bottom_logits": [IMAGE],
        "act_min": 0.0,
        "act_max": 2.0,
        "quantile_values": [0.5, 1.0],
        "histogram": [1, 2, 3],
        "activation_frequency": 0.1,
    }
