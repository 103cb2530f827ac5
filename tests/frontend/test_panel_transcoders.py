"""The panel on transcoder graphs: block by block, by who delivered, and why a head looked there."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.browsing import Watch, opened
from helpers.panel import PROMPT, Served, number, part, serve, values
from playwright.sync_api import Browser, Locator, Page, expect
from tiny_transcoders import make_set

import circuit_tracer_qk as ctqk
from circuit_tracer_qk.plugin import host_command as explaining
from circuit_tracer_qk.plugin.live import LiveGraphs


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> ctqk.TranscoderGraph:
    import torch

    folder = make_set(tmp_path_factory.mktemp("tiny") / "set")
    model = explaining.load_replacement_model(None, str(folder), torch.float32)
    graph = ctqk.attribute(PROMPT, model, max_n_logits=3)
    assert isinstance(graph, ctqk.TranscoderGraph)
    return graph


@pytest.fixture(scope="module")
def live(graph: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("live")
    ctqk.create_graph_files(graph, "plt", folder, node_threshold=0.92)
    running, served = serve(folder, "plt", live=LiveGraphs({"plt": graph}))
    yield served
    running.stop()


def link_id(link: dict[str, Any]) -> str:
    return f"{link['source']}__{link['target']}"


def find(document: dict[str, Any], across: bool, blocks: int) -> dict[str, Any]:
    """The strongest link of a kind, of those that the page shows."""
    place = {node["node_id"]: node["ctx_idx"] for node in document["nodes"]}
    most = document["metadata"]["node_threshold"]
    shown = {n["node_id"] for n in document["nodes"] if (n["influence"] or 0) <= most}
    found = [
        link
        for link in document["links"]
        if {link["source"], link["target"]} <= shown
        and (place[link["source"]] != place[link["target"]]) == across
        and (len(link["head_loadings"]) >= blocks if blocks else not link["head_loadings"])
    ]
    return max(found, key=lambda link: abs(link["weight"]))


def open_link(page: Page, served: Served, link: dict[str, Any]) -> Locator:
    page.goto(served.address(clickedId=link["target"]))
    row = page.locator(f'.qk-panel [data-qk="edge"][data-link="{link_id(link)}"]')
    row.click()
    expect(page.locator(".qk-heads .qk-foot")).to_contain_text("sum = weight")
    return row


def sums(page: Page, of: str) -> tuple[float, float]:
    found = page.locator(f'.qk-panel [data-qk="sum"][data-of="{of}"]')
    whole, parts = found.get_attribute("data-value"), found.get_attribute("data-parts")
    assert whole is not None and parts is not None
    return float(whole), float(parts)


def test_every_cut_adds_up_to_the_weight(live: Served, watch: Watch):
    page = watch.page
    link = find(live.document, across=True, blocks=3)
    open_link(page, live, link)
    layers = [block["layer"] for block in link["head_loadings"]]
    cells = part(page, "layer")
    expect(cells).to_have_count(len(layers) + 1)
    assert cells.evaluate_all("all => all.map(d => d.dataset.layer)") == [
        "delivered",
        *map(str, layers),
    ]
    for at, total in enumerate(values(cells)):
        passed = link["attention_free"] if not at else link["head_loadings"][at - 1]["bypass"]
        assert total == pytest.approx(link["weight"] - passed, abs=1e-6)
    for at, layer in enumerate(["delivered", *layers]):
        cells.nth(at).click()
        expect(cells.nth(at)).to_have_attribute("aria-selected", "true")
        whole, parts = sums(page, "heads")
        assert whole == link["weight"]
        assert parts == pytest.approx(whole, abs=1e-5 * (1 + abs(whole)))
        shown = page.locator(".qk-heads .qk-row")
        written = [number(text) for text in shown.locator(".qk-value").all_inner_texts()]
        assert sum(written) == pytest.approx(whole, abs=2e-3)
        names = part(page, "head").locator(".qk-head-name").all_inner_texts()
        if layer == "delivered":
            expected = [f"L{at}H{head}" for at, head, _ in link["delivered_by"]]
        else:
            block = next(b for b in link["head_loadings"] if b["layer"] == layer)
            expected = [f"L{layer}H{head}" for head, *_ in block["heads"]]
        assert names == expected
    assert "never add them" in page.locator(".qk-layers").inner_text()


def test_a_head_is_explained_where_it_carried_most(live: Served, watch: Watch):
    page = watch.page
    link = find(live.document, across=True, blocks=3)
    open_link(page, live, link)
    best = max(
        (
            (abs(part), block["layer"], head, pairs[0])
            for block in link["head_loadings"]
            for head, part, pairs in block["heads"]
            if pairs[0][0] != pairs[0][1]
        ),
    )
    _, layer, head, (query, key, _) = best
    expect(page.locator(".qk-place")).to_have_value(f"L{layer}H{head}:q{query}:k{key}")
    table = next(
        t
        for t in live.document["qk"]["attributions"]
        if (t["layer"], t["head"], t["query"], t["key"]) == (layer, head, query, key)
    )
    expect(page.locator(".qk-why-head")).to_contain_text("looked from")
    assert number(page.locator(".qk-why-head .qk-note").inner_text()) == pytest.approx(
        table["score"], abs=1e-3
    )
    for side in ("query", "key"):
        whole, parts = sums(page, side)
        assert whole == table["score"] and parts == pytest.approx(whole, abs=1e-6)
    chosen = part(page, "head").and_(page.locator(".is-selected"))
    assert f"{key} → {query}" in chosen.inner_text()
    # components name where they come from; what is no node is there, too
    terms = page.locator(".qk-terms").inner_text()
    assert "from " in terms and "bias b_dec" in terms and "MLP where features are dropped" in terms
    page.locator(".qk-buttons button", has_text="pairs").click()
    whole, parts = sums(page, "pairs")
    assert parts == pytest.approx(whole, abs=1e-6)


def test_keys_address_and_delivered_heads(live: Served, watch: Watch):
    page = watch.page
    link = find(live.document, across=True, blocks=3)
    open_link(page, live, link)
    page.locator('.qk-panel [data-qk="layer"][data-layer="delivered"]').click()
    first, second = link["delivered_by"][:2]
    chosen = page.locator(".qk-place")
    assert chosen.input_value().startswith(f"L{first[0]}H{first[1]}:")
    page.locator('.qk-panel [data-qk="head"]').first.focus()
    page.keyboard.press("ArrowRight")
    assert chosen.input_value().startswith(f"L{second[0]}H{second[1]}:")
    before = chosen.input_value()
    page.reload()
    expect(page.locator(".qk-place")).to_have_value(before)
    cell = page.locator('.qk-panel [data-qk="layer"][data-layer="delivered"]')
    expect(cell).to_have_attribute("aria-selected", "true")
    # an address that names a head alone finds its block
    block = link["head_loadings"][0]
    head, _, ((query, key, _), *_) = block["heads"][0]
    place = f"L{block['layer']}H{head}:q{query}:k{key}"
    page.goto(live.address(clickedId=link["target"], qkEdge=link_id(link), qk=place))
    cell = page.locator(f'.qk-panel [data-qk="layer"][data-layer="{block["layer"]}"]')
    expect(cell).to_have_attribute("aria-selected", "true")


def test_arrows_walk_the_blocks_and_the_heads(live: Served, watch: Watch):
    page = watch.page
    link = find(live.document, across=True, blocks=3)
    open_link(page, live, link)
    cells, heads, place = part(page, "layer"), part(page, "head"), page.locator(".qk-place")
    first = link["head_loadings"][0]
    cells.first.click()
    cells.first.focus()
    page.keyboard.press("ArrowRight")
    expect(cells.nth(1)).to_be_focused()
    expect(cells.nth(1)).to_have_attribute("aria-selected", "true")
    expect(place).to_have_value(re.compile(f"^L{first['layer']}H{first['heads'][0][0]}:"))
    heads.first.focus()
    for at in (1, 2):  # the focus goes with the selection
        page.keyboard.press("ArrowRight")
        expect(heads.nth(at)).to_be_focused()
        expect(place).to_have_value(re.compile(f"^L{first['layer']}H{first['heads'][at][0]}:"))
    # without a head, the block stays in the address
    page.mouse.move(0, 0)
    page.keyboard.press("Escape")
    expect(place).to_have_value("")
    page.reload()
    expect(cells.nth(1)).to_have_attribute("aria-selected", "true")


def test_where_a_head_delivered_from_is_not_guessed(live: Served, watch: Watch):
    page = watch.page
    link = find(live.document, across=True, blocks=3)
    place = {node["node_id"]: node["ctx_idx"] for node in live.document["nodes"]}
    source, target = place[link["source"]], place[link["target"]]
    listed = {
        (block["layer"], head): [pair for pair in pairs if pair[0] == target]
        for block in link["head_loadings"]
        for head, _, pairs in block["heads"]
    }
    open_link(page, live, link)
    part(page, "layer").first.click()
    shown = part(page, "head").locator(".qk-attends").all_inner_texts()
    assert len(shown) == len(link["delivered_by"])
    for text, (layer, head, _) in zip(shown, link["delivered_by"], strict=True):
        key: int | str = "?"
        if layer == link["head_loadings"][0]["layer"]:
            key = source
        elif pairs := listed.get((layer, head)):
            key = pairs[0][1]
        expected = f"at {target}" if key == target else f"{key} → {target}"
        assert text.removesuffix(" …") == expected
    assert any(text.startswith("?") for text in shown)


def test_same_position_edges(live: Served, watch: Watch):
    page = watch.page
    link = find(live.document, across=False, blocks=1)
    open_link(page, live, link)
    page.locator('.qk-panel [data-qk="layer"][data-layer="delivered"]').click()
    free = page.locator('.qk-heads [data-part="free"]')
    assert number(free.inner_text().replace("no attention", "")) == pytest.approx(
        link["attention_free"], abs=1e-3
    )
    neighbours = find(live.document, across=False, blocks=0)
    page.goto(live.address(clickedId=neighbours["target"]))
    page.locator(f'.qk-panel [data-qk="edge"][data-link="{link_id(neighbours)}"]').click()
    expect(page.locator(".qk-heads")).to_contain_text("no attention lies between")
    expect(part(page, "layer")).to_have_count(0)


def test_filter_by_head(live: Served, watch: Watch):
    page = watch.page
    link = find(live.document, across=True, blocks=3)
    open_link(page, live, link)
    layer, head, _ = link["delivered_by"][0]
    page.locator(".qk-filter").fill(f"L{layer}H{head}")
    rows = page.locator('.qk-panel [data-qk="edge"]')
    assert link_id(link) in rows.evaluate_all("all => all.map(d => d.dataset.link)")
    page.locator(".qk-filter").fill("L9H9")
    expect(page.locator(".qk-edges")).to_contain_text("No edge matches")


def test_any_head_of_a_graph_in_memory(live: Served, graph: Any, watch: Watch):
    page = watch.page
    link = find(live.document, across=True, blocks=3)
    open_link(page, live, link)
    page.locator(".qk-place").fill("L2H3:q9:k4")
    page.locator(".qk-place").press("Enter")
    expect(page.locator(".qk-why-head")).to_contain_text("L2H3 looked from 9")
    shown = number(page.locator(".qk-why-head .qk-note").inner_text())
    assert shown == pytest.approx(graph.qk(2, 3, 9, 4).score, abs=1e-3)


def test_svg_of_a_cut(live: Served, watch: Watch, tmp_path: Path):
    page = watch.page
    link = find(live.document, across=True, blocks=3)
    open_link(page, live, link)
    with page.expect_download() as download:
        page.locator(".qk-save button", has_text="SVG").click()
    download.value.save_as(tmp_path / "heads.svg")
    text = (tmp_path / "heads.svg").read_text(encoding="utf-8")
    assert "at block L" in text and "bypass" in text and "edge weight" in text


def test_many_blocks_and_parts_of_nothing(live: Served, browser: Browser, tmp_path: Path):
    """Thirty blocks in a narrow window: nothing is cut off; heads without pairs do not break it."""
    document = json.loads(json.dumps(live.document))
    link = find(document, across=True, blocks=3)
    block = link["head_loadings"][-1]
    empty = {"heads": [[0, 0.0, []]], "rest": 0.0, "bypass": link["weight"]}
    link["head_loadings"] += [{"layer": block["layer"] + 1 + at, **empty} for at in range(27)]
    tables = [t for t in document["qk"]["attributions"] if t["query_components"]]
    for side in ("query", "key"):
        component = {"kind": "error", "label": "unselected features", "position": 1}
        table = next(t for t in tables if t["query"] > 1)
        table[f"{side}_components"].append({**component, "checkpoint": 1, "marginal": 0.0})
    (tmp_path / "plt.json").write_text(json.dumps(document))
    shutil.copy(live.folder / "graph-metadata.json", tmp_path)
    running, served = serve(tmp_path, "plt")
    try:
        with opened(browser, (1000, 800)) as watch:
            page = watch.page
            open_link(page, served, link)
            cells = part(page, "layer")
            expect(cells).to_have_count(len(link["head_loadings"]) + 1)
            cells.last.click()
            expect(cells.last).to_be_in_viewport()
            expect(page.locator(".qk-place")).to_have_value(
                re.compile(f"^L{block['layer'] + 27}H0:")
            )
            assert page.locator(".qk-cuts").evaluate("d => d.scrollWidth <= d.clientWidth")
            page.locator('.qk-panel [data-qk="layer"][data-layer="delivered"]').click()
            rows = page.locator(".qk-heads .qk-row")
            assert all(rows.evaluate_all("all => all.map(d => d.scrollWidth <= d.clientWidth)"))
            at = "L{layer}H{head}:q{query}:k{key}".format(**table)
            page.locator(".qk-place").fill(at)
            page.locator(".qk-place").press("Enter")
            named = page.locator(".qk-others .qk-row", has_text="unselected features")
            expect(named).to_have_count(2)
            expect(named.first).to_contain_text("from 1")
    finally:
        running.stop()


def test_a_graph_of_circuit_tracers_own_says_how_to_explain_it(
    live: Served, watch: Watch, tmp_path: Path
):
    document = json.loads(json.dumps(live.document))
    del document["qk"], document["qk_only_nodes"]
    for link in document["links"]:
        for name in ("head_loadings", "delivered_by", "attention_free"):
            del link[name]
    (tmp_path / "plt.json").write_text(json.dumps(document))
    listing = json.loads((live.folder / "graph-metadata.json").read_bytes())
    (tmp_path / "graph-metadata.json").write_text(json.dumps(listing))
    running, served = serve(tmp_path, "plt")
    try:
        watch.page.goto(served.address())
        expect(watch.page.locator(".qk-panel")).to_contain_text(
            "circuit-tracer-qk augment GRAPH.pt"
        )
    finally:
        running.stop()
