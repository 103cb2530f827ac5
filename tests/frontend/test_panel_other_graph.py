"""The page where the server's memory holds another graph than the file that is shown."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.browsing import Watch
from helpers.panel import PROMPT, Served, part, serve
from helpers.serving import ask
from playwright.sync_api import Page, expect

import circuit_tracer_qk as ctqk
from circuit_tracer_qk.cli import main as cli
from circuit_tracer_qk.frontend import server
from circuit_tracer_qk.plugin.live import LiveGraphs

OTHER_PROMPT = "Once upon a time Bob met Pamela. They went to the park, and Bob and"
SLUG = "demo-sae"


def demo(folder: Path, prompt: str) -> None:
    assert cli.main(["demo", "-p", prompt, "-o", str(folder), "--no-serve"]) == cli.DONE


@pytest.fixture(scope="module")
def model() -> ctqk.ResidualModel:
    return ctqk.load_model(device="cpu")


@pytest.fixture(scope="module")
def graph(model: ctqk.ResidualModel) -> ctqk.ResidualGraph:
    return ctqk.attribute(PROMPT, model)


@pytest.fixture
def demo_x(model, graph, tmp_path) -> Iterator[tuple[server.Server, Served]]:
    """What `demo -p X` serves until it is interrupted."""
    demo(tmp_path, PROMPT)
    running, served = serve(tmp_path, SLUG, live=LiveGraphs({SLUG: graph}, {SLUG: model}))
    yield running, served
    running.stop()


def written(served: Served) -> dict[str, Any]:
    return json.loads((served.folder / f"{SLUG}.json").read_bytes())


def place_of(table: dict[str, Any]) -> str:
    return f"L{table['layer']}H{table['head']}:q{table['query']}:k{table['key']}"


def unwritten(document: dict[str, Any]) -> str:
    tables = {place_of(table) for table in document["qk"]["attributions"]}
    return next(p for key in range(9) if (p := f"L0H7:q9:k{key}") not in tables)


def go_to(page: Page, place: str) -> None:
    page.locator(".qk-place").fill(place)
    page.locator(".qk-place").press("Enter")


def expect_only_what_was_written(page: Page, document: dict[str, Any]) -> None:
    expect(part(page, "other-graph")).to_contain_text("another one than the graph of this name")
    table = document["qk"]["attributions"][0]
    go_to(page, place_of(table))
    expect(part(page, "sum").first).to_have_attribute("data-value", str(table["score"]))
    page.locator(".qk-test-toggle").click()
    expect(part(page, "test-state")).to_contain_text("cannot run the model on this graph")
    expect(part(page, "test-run")).to_be_hidden()
    page.locator(".qk-test-toggle").click()
    go_to(page, unwritten(document))
    expect(page.locator(".qk-why > .qk-state")).to_contain_text("was not written")
    expect(part(page, "query-term").first).to_be_hidden()
    expect(part(page, "other-graph")).to_be_visible()


def test_demo_of_another_prompt_into_the_same_folder(watch: Watch, demo_x, capsys):
    """The first server showed the second graph with the first one's scores."""
    running, served = demo_x
    table = "layer=1&head=2&query=9&key=6"
    before = served.document["metadata"]["info"]["digest"]
    assert ask(running, f"/qk/table/{SLUG}?digest={before}&{table}").status == 200
    demo(served.folder, OTHER_PROMPT)
    document = written(served)
    answer = ask(
        running, f"/qk/table/{SLUG}?digest={document['metadata']['info']['digest']}&{table}"
    )
    assert answer.status == 409 and "another one" in answer.json["error"]
    page = watch.page
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(served.address())
    expect_only_what_was_written(page, document)
    assert not [url for url in asked if "/qk/table/" in url or "/qk/steer/" in url]


def test_a_page_that_was_open_before_keeps_its_own_graph(watch: Watch, demo_x, graph, capsys):
    """It shows the first graph, which is the one in memory; the file holds the second one."""
    _, served = demo_x
    page = watch.page
    place = unwritten(served.document)
    page.goto(served.address())
    expect(part(page, "other-graph")).to_be_hidden()
    demo(served.folder, OTHER_PROMPT)
    before = (served.folder / f"{SLUG}.json").read_bytes()
    go_to(page, place)
    layer, head, query, key = int(place[1]), int(place[3]), 9, int(place.rpartition("k")[2])
    score = graph.qk(layer, head, query, key).score
    expect(part(page, "sum").first).to_be_visible()
    shown = float(part(page, "sum").first.get_attribute("data-value") or "nan")
    assert shown == pytest.approx(score, rel=1e-5)
    watch.expected += ["409", "Error saving graph"]
    page.locator(".save-button").click()
    expect(page.locator(".qk-say")).to_contain_text("replaced by another graph")
    assert (served.folder / f"{SLUG}.json").read_bytes() == before


def test_a_page_is_told_when_the_server_is_another_one_by_now(
    watch: Watch, demo_x, model: ctqk.ResidualModel, capsys
):
    running, served = demo_x
    page = watch.page
    page.goto(served.address(qk=place_of(served.document["qk"]["attributions"][0])))
    page.locator(".qk-test-toggle").click()
    expect(part(page, "test-run")).to_be_visible()
    other = ctqk.attribute(OTHER_PROMPT, model)
    port = int(running.url.rpartition(":")[2])
    running.stop()
    again = server.serve(served.folder, port, live=LiveGraphs({SLUG: other}, {SLUG: model}))
    try:
        watch.expected.append("409")
        part(page, "test-run").click()
        expect(part(page, "test-state")).to_contain_text("cannot run the model on this graph")
        expect(part(page, "test-run")).to_be_hidden()
        page.locator(".qk-test-toggle").click()
        expect_only_what_was_written(page, served.document)
    finally:
        again.stop()


def test_a_file_that_does_not_say_which_graph_it_is_of(watch: Watch, demo_x):
    _, served = demo_x
    document = written(served)
    del document["metadata"]["info"]["digest"]
    (served.folder / f"{SLUG}.json").write_text(json.dumps(document), encoding="utf-8")
    page = watch.page
    page.goto(served.address())
    expect(part(page, "other-graph")).to_contain_text("does not say which graph it is of")
    go_to(page, unwritten(document))
    expect(page.locator(".qk-why > .qk-state")).to_contain_text("was not written")
    page.locator(".save-button").click()
    expect(page.locator(".save-button")).to_have_text("Saved!")
    assert "qk" in json.loads((served.folder / f"{SLUG}.json").read_bytes())["qParams"]


def test_a_busy_server_says_so_and_is_asked_again(watch: Watch, demo_x):
    _, served = demo_x
    page = watch.page
    busy = {"status": 503, "json": {"error": "the server is busy: try again."}}
    page.route("**/qk/table/**", lambda route: route.fulfill(**busy))
    watch.expected.append("503")
    page.goto(served.address())
    place = unwritten(served.document)
    go_to(page, place)
    expect(page.locator(".qk-why > .qk-state")).to_contain_text("the server is busy")
    page.unroute("**/qk/table/**")
    go_to(page, place_of(served.document["qk"]["attributions"][0]))
    go_to(page, place)
    expect(part(page, "query-term").first).to_be_visible()
    expect(page.locator(".qk-why > .qk-state")).to_be_hidden()
