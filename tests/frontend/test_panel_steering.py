"""The panel's "Test it", in a real browser: a component is scaled, and what the model says then."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.browsing import Watch, opened
from helpers.panel import PROMPT, Served, part, selection, serve, values
from playwright.sync_api import Browser, Locator, Page, Route, expect

import circuit_tracer_qk as ctqk
from circuit_tracer_qk.plugin.live import LiveGraphs

PLACE = "L1H2:q14:k6"
FEATURE = 61  # of checkpoint 1, at " Sally"


@pytest.fixture(scope="module")
def model() -> ctqk.ResidualModel:
    """Not the server's own: models are hooked while they run, and these run beside each other."""
    return ctqk.load_model(device="cpu")


@pytest.fixture(scope="module")
def graph(model: ctqk.ResidualModel) -> ctqk.ResidualGraph:
    return ctqk.attribute(PROMPT, model)


@pytest.fixture(scope="module")
def live(graph: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("live")
    ctqk.create_graph_files(graph, "sally", folder)
    graphs = LiveGraphs({"sally": graph}, {"sally": ctqk.load_model(device="cpu")})
    running, served = serve(folder, "sally", live=graphs)
    yield served
    running.stop()


@pytest.fixture(scope="module")
def unloaded(graph: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The graph in memory without its model."""
    folder = tmp_path_factory.mktemp("unloaded")
    ctqk.create_graph_files(graph, "sally", folder)
    running, served = serve(folder, "sally", live=LiveGraphs({"sally": graph}))
    yield served
    running.stop()


def edge(document: dict[str, Any]) -> dict[str, str]:
    """The strongest edge from " Sally" into the last token through block 1."""
    place = {node["node_id"]: node["ctx_idx"] for node in document["nodes"]}
    link = max(
        (
            link
            for link in document["links"]
            if (place[link["source"]], place[link["target"]]) == (6, 14) and link["layer"] == 1
        ),
        key=lambda link: abs(link["weight"]),
    )
    return {"clickedId": link["target"], "qkEdge": f"{link['source']}__{link['target']}"}


def opened_test(page: Page, served: Served, place: str = PLACE) -> Locator:
    """The page at a head, its test opened."""
    page.goto(served.address(**edge(served.document), qk=place))
    expect(part(page, "key-term").first).to_be_visible()
    toggle = page.locator(".qk-test-toggle")
    expect(toggle).to_have_attribute("aria-expanded", "false")
    expect(part(page, "test-run")).to_be_hidden()
    toggle.click()
    return part(page, "test-state")


def feature_option(side: str = "key", feature: int = FEATURE) -> str:
    return f"{side},feature,1,{feature}"


def set_factor(page: Page, factor: float) -> None:
    part(page, "test-factor").evaluate(
        "(d, value) => { d.value = value; d.dispatchEvent(new Event('input')); d.dispatchEvent(new Event('change')) }",
        factor,
    )


def predictions(page: Page) -> list[tuple[int, float, float]]:
    found = part(page, "test-prediction").evaluate_all(
        "all => all.map(d => [+d.dataset.id, +d.dataset.before, +d.dataset.after])"
    )
    return [(i, before, after) for i, before, after in found]


def expected(run: ctqk.SteeredRun) -> list[tuple[int, float, float]]:
    ids = dict.fromkeys(i for of in (run.clean, run) for _, i, _ in of.top(3))
    return [(i, run.clean.probability(i), run.probability(i)) for i in ids]


def wait_for(page: Page, run: ctqk.SteeredRun) -> None:
    """Until the run is what is shown, to the last digit."""
    wanted = [list(row) for row in expected(run)]
    page.wait_for_function(
        """wanted => JSON.stringify(wanted) == JSON.stringify([...document.querySelectorAll('[data-qk=test-prediction]')]
          .map(d => [+d.dataset.id, +d.dataset.before, +d.dataset.after]))""",
        arg=wanted,
    )


# What is run and shown ----------------------------------------------------------------------------


def test_a_key_feature_removed(watch: Watch, live: Served, graph: Any, model: Any):
    page = watch.page
    asked: list[str] = []
    page.on("request", lambda r: asked.append(r.url) if "/qk/steer/" in r.url else None)
    opened_test(page, live)
    expect(page.locator(".qk-test-of")).to_have_value(feature_option())
    expect(part(page, "test-factor")).to_have_value("0")
    assert not asked and not predictions(page)
    part(page, "test-run").click()

    edit = ctqk.QKEdit("L1H2", "key", 1, FEATURE, 6, factor=0.0)
    run = ctqk.steer(model, graph.input_tokens, edit, norms="frozen")
    wait_for(page, run)
    assert len(asked) == 1
    score = part(page, "test-score")
    before, after = (float(score.get_attribute(f"data-{n}") or "nan") for n in ("before", "after"))
    assert (
        before
        == float(run.clean.scores[1, 2][14, 6])
        == pytest.approx(graph.qk(1, 2, 14, 6).score, rel=1e-5)
    )
    assert after == float(run.scores[1, 2][14, 6])
    marginal = next(
        value
        for value, label in zip(
            values(part(page, "key-term")),
            part(page, "key-term").locator(".qk-name").all_text_contents(),
            strict=True,
        )
        if label == f"L0/{FEATURE}"
    )
    assert before - after == pytest.approx(marginal, rel=1e-4)
    pattern = part(page, "test-key").evaluate_all(
        "all => all.map(d => [+d.dataset.before, +d.dataset.after])"
    )
    rows = (of.patterns[1, 2][14].tolist() for of in (run.clean, run))
    assert pattern == [list(pair) for pair in zip(*rows, strict=True)]
    effect = run.effect(run.clean.top(1)[0][1])
    for name, spread in (("features", effect.features), ("heads", effect.heads)):
        row = page.locator(f'[data-qk="test-controls"][data-of="{name}"]')
        shown = row.evaluate("d => ['n', 'mean', 'std', 'low', 'high'].map(e => +d.dataset[e])")
        assert shown == list(spread)
        expect(row).to_contain_text(f"{spread.mean:.3f} ± {spread.std:.3f}")
        expect(row.locator("svg path")).to_have_count(spread.n + 1)
    for note in run.notes:
        expect(page.locator(".qk-test-result")).to_contain_text(note)
    first = part(page, "test-prediction").first
    expect(first).to_contain_text("Sally")
    expect(first).to_contain_text(f"{effect.after - effect.before:+.3f}")
    expect(part(page, "test-state")).to_be_hidden()


def test_settings_are_what_is_run(watch: Watch, live: Served, graph: Any, model: Any):
    page = watch.page
    opened_test(page, live)

    def run(edit: Any, **options: Any) -> ctqk.SteeredRun:
        return ctqk.steer(model, graph.input_tokens, edit, controls=0, **options)

    set_factor(page, 1.5)  # letting go of the slider is asking
    expect(page.locator(".qk-test-value")).to_have_text("×1.5")
    edit = ctqk.QKEdit("L1H2", "key", 1, FEATURE, 6, factor=1.5)
    wait_for(page, run(edit, norms="frozen"))
    page.locator(".qk-test-norms").select_option("live")
    wait_for(page, run(edit))
    page.get_by_label("freeze other heads").check()
    wait_for(page, run(edit, freeze="patterns"))
    page.locator(".qk-test-where").select_option("all")
    wait_for(page, run(ctqk.QKEdit("L1H2", "key", 1, FEATURE, factor=1.5), freeze="patterns"))
    page.locator(".qk-test-where").select_option("here")

    heads = part(page, "head").evaluate_all("all => all.map(d => +d.dataset.head)")
    page.locator(".qk-test-scope").select_option("layer")
    edit = ctqk.QKEdit([(1, h) for h in sorted({2, *heads})], "key", 1, FEATURE, 6, factor=1.5)
    wait_for(page, run(edit, freeze="patterns"))
    page.locator(".qk-test-scope").select_option("head")

    page.locator(".qk-test-of").select_option("query,error,1,")
    edit = ctqk.QKEdit("L1H2", "query", 1, "error", 14, factor=1.5)
    wait_for(page, run(edit, freeze="patterns"))
    expect(page.locator(".qk-test-result")).to_contain_text("no other features to compare")
    expect(page.locator('[data-qk="test-controls"][data-of="features"]')).to_contain_text("none")
    page.locator(".qk-test-of").select_option("output")
    wait_for(page, run(ctqk.HeadEdit("L1H2", 1.5, 14), freeze="patterns"))


def test_a_term_is_chosen_by_its_row(watch: Watch, live: Served):
    page = watch.page
    opened_test(page, live)
    row = part(page, "query-term").nth(1)
    row.locator(".qk-activation").click()
    expect(row).to_have_class(re.compile("is-tested"))
    chosen = page.locator(".qk-test-of").input_value()
    assert chosen.startswith("query,feature,1,")
    expect(page.locator(".qk-test-where option").first).to_contain_text("at 14 “")
    expect(part(page, "test-prediction")).to_have_count(0)
    # the same one in another table, where there is nothing to show yet
    part(page, "test-run").click()
    expect(part(page, "test-prediction").first).to_be_visible()
    part(page, "key-position").nth(5).click()
    expect(page.locator(".qk-why-head")).to_contain_text("to 5 “")
    expect(page.locator(".qk-test-of")).to_have_value(chosen)
    expect(part(page, "test-prediction")).to_have_count(0)


def test_answers_to_what_is_no_longer_asked_are_dropped(
    watch: Watch, live: Served, graph: Any, model: Any
):
    page = watch.page
    held: list[Route] = []
    page.route("**/qk/steer/**", lambda route: held.append(route))
    state = opened_test(page, live)
    part(page, "test-run").click()
    expect(state).to_have_text("running …")
    for factor in (0.5, -0.5, 2):
        set_factor(page, factor)
    page.wait_for_timeout(50)
    assert len(held) == 1  # one at a time
    held[0].continue_()
    expect(state).to_have_text("running …")
    page.wait_for_function(
        "() => performance.getEntriesByType('resource').some(d => d.name.includes('/qk/steer/'))"
    )
    while len(held) < 2:
        page.wait_for_timeout(10)
    assert not predictions(page) and "factor=2&" in held[1].request.url
    held[1].continue_()
    edit = ctqk.QKEdit("L1H2", "key", 1, FEATURE, 6, factor=2.0)
    wait_for(page, ctqk.steer(model, graph.input_tokens, edit, norms="frozen", controls=0))
    assert len(held) == 2
    # another head is chosen while one runs
    set_factor(page, 0.25)
    while len(held) < 3:
        page.wait_for_timeout(10)
    part(page, "head").first.click()
    expect(part(page, "test-prediction")).to_have_count(0)
    held[2].continue_()
    page.wait_for_timeout(200)
    expect(part(page, "test-prediction")).to_have_count(0)
    expect(state).to_be_hidden()


def test_keys(watch: Watch, live: Served):
    page = watch.page
    page.goto(live.address(**edge(live.document), qk=PLACE))
    part(page, "key-term").nth(2).focus()
    page.keyboard.press("t")
    factor = part(page, "test-factor")
    expect(factor).to_be_focused()
    expect(part(page, "key-term").nth(2)).to_have_class(re.compile("is-tested"))
    for key in ("[", "]", "m", "t", "ArrowRight", "ArrowUp", "ArrowLeft"):
        page.keyboard.press(key)
    assert selection(page) == PLACE
    expect(factor).to_have_value("0.25")
    expect(page.locator(".qk-why [role=tab].active")).to_have_text("marginals")
    expect(part(page, "test-prediction").first).to_be_visible()
    page.locator(".qk-test-norms").press("Enter")
    page.keyboard.press("Escape")
    expect(factor).to_be_hidden()
    expect(page.locator(".qk-test-toggle")).to_be_focused()
    assert selection(page) == PLACE
    page.keyboard.press("t")
    expect(factor).to_be_focused()


@pytest.mark.parametrize("size", [(1500, 900), (1000, 800)])
def test_terms_stay_in_view(browser: Browser, live: Served, size: tuple[int, int]):
    with opened(browser, size) as watch:
        page = watch.page
        opened_test(page, live)
        part(page, "test-run").click()
        expect(part(page, "test-prediction").first).to_be_visible()
        boxes = {
            name: page.locator(name).first.evaluate(
                "d => { var b = d.getBoundingClientRect(); return [b.top, b.bottom, b.left, b.right] }"
            )
            for name in (".qk-attention", ".qk-body", ".qk-test", ".qk-bottom", ".qk-panel")
        }
        order = [boxes[n] for n in (".qk-attention", ".qk-body", ".qk-test", ".qk-bottom")]
        for above, below in zip(order, order[1:], strict=False):
            assert above[1] <= below[0] + 1
        assert boxes[".qk-body"][1] - boxes[".qk-body"][0] > 110
        for side in ("query", "key"):  # a feature and all that is none, of either side
            for row in (part(page, f"{side}-term").first, part(page, f"{side}-term").last):
                top, bottom = row.evaluate(
                    "d => { var b = d.getBoundingClientRect(); return [b.top, b.bottom] }"
                )
                assert boxes[".qk-body"][0] <= top and bottom <= boxes[".qk-body"][1]
        wide = page.locator(".qk-test, .qk-test-table")
        assert all(
            wide.evaluate_all("all => all.map(d => d.scrollWidth <= d.parentNode.clientWidth)")
        )
        page.locator(".qk-test-toggle").click()
        expect(page.locator(".qk-heatmap .qk-grid")).to_be_visible()


# Where nothing can be run -------------------------------------------------------------------------


def test_what_steering_refuses_is_said(watch: Watch, live: Served):
    page = watch.page
    watch.expected.append("422")
    sentence = "the miniature is tired: let it rest."
    answer = {"status": 422, "json": {"error": sentence}}
    page.route("**/qk/steer/**", lambda route: route.fulfill(**answer))
    state = opened_test(page, live)
    part(page, "test-run").click()
    expect(state).to_have_text(sentence)
    expect(part(page, "test-prediction")).to_have_count(0)
    page.unroute("**/qk/steer/**")
    watch.expected.append("ERR_FAILED")
    page.route("**/qk/steer/**", lambda route: route.abort())
    part(page, "test-run").click()
    expect(state).to_contain_text("server does not answer")
    page.unroute("**/qk/steer/**")
    part(page, "test-run").click()
    expect(part(page, "test-prediction").first).to_be_visible()
    expect(state).to_be_hidden()


@pytest.mark.parametrize("config", ["served", "older", "none"])
def test_no_model_in_memory(watch: Watch, unloaded: Served, config: str):
    page = watch.page
    if config == "older":
        old = {"live": ["sally"], "online": False, "version": "0.1.0"}
        page.route("**/qk/config.json", lambda route: route.fulfill(json=old))
    if config == "none":
        watch.expected.append("404")
        page.route(
            "**/qk/config.json", lambda route: route.fulfill(status=404, body="no such file")
        )
    state = opened_test(page, unloaded)
    expect(state).to_contain_text("No model is in memory")
    expect(state.locator("code").first).to_contain_text("--server")
    expect(state.locator("code").last).to_have_text("circuit-tracer-qk demo")
    expect(part(page, "test-run")).to_be_hidden()
    inside = "d => d.scrollHeight <= d.clientHeight"
    assert page.locator(".qk-test").evaluate(inside)
    page.locator(".qk-test-toggle").press("t")
    expect(page.locator(".qk-test-toggle")).to_be_focused()


def test_graphs_of_transcoders(watch: Watch, live: Served, tmp_path: Path):
    document = json.loads(json.dumps(live.document))
    document["qk"]["graph_kind"] = "transcoder"
    folder = shutil.copytree(live.folder, tmp_path / "graphs")
    (folder / "sally.json").write_text(json.dumps(document))
    running, served = serve(folder, "sally")
    try:
        table = document["qk"]["attributions"][0]
        state = opened_test(watch.page, served, "L{layer}H{head}:q{query}:k{key}".format(**table))
        expect(state).to_contain_text("Steering is for residual graphs")
        expect(state.locator("code")).to_contain_text("-d DICTIONARIES")
        expect(part(watch.page, "test-run")).to_be_hidden()
    finally:
        running.stop()


def test_without_a_table_there_is_nothing_to_test(watch: Watch, live: Served):
    page = watch.page
    page.goto(live.address(**edge(live.document), qk=PLACE))
    expect(page.locator(".qk-test-toggle")).to_be_visible()
    page.locator(".qk-place").focus()
    page.keyboard.press("Escape")
    page.locator(".qk-panel").focus()
    page.keyboard.press("Escape")
    expect(page.locator(".qk-place")).to_have_value("")
    expect(page.locator(".qk-test-toggle")).to_be_hidden()
    page.keyboard.press("t")
    expect(page.locator(".qk-test-toggle")).to_be_hidden()
