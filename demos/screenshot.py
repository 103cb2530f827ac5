"""Draw the README's pictures: ``panel.png`` and ``page.png``, the miniature's story as the page shows
it, and ``transcoders.png``, the same prompt in a graph of tiny transcoders, and
``steer.png``, a feature of it put to the test.

Needs Chromium or Chrome and Playwright (``pip install -e .[test]``); downloads nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from importlib import import_module
from pathlib import Path

from playwright.sync_api import Browser, Page, Playwright, sync_playwright

import circuit_tracer_qk as ctqk
from circuit_tracer_qk.attribution.pruning import edge_influence
from circuit_tracer_qk.cli import highlights
from circuit_tracer_qk.cli import main as cli
from circuit_tracer_qk.frontend import server
from circuit_tracer_qk.plugin.live import LiveGraphs

PROMPT = "I always loved visiting Aunt Sally. Whenever I was feeling sad, Aunt"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


CAPTIONS = {
    ".qk-edges .qk-title": "1",
    ".qk-heads .qk-title": "2",
    ".qk-why-head .qk-title": "3",
    ".qk-block:nth-child(1) .qk-title": "4",
    ".qk-block:nth-child(2) .qk-title": "5",
}
LEGEND = (
    "After “{prompt}” the model says “{answer}”.",
    "1 the features that made it say so, and from which token   2 the heads that carried one of "
    "them here   3 why this head looked there: a score that features explain, those of the token "
    "that looks (4) times those of the token looked at (5)",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", default=Path(__file__).parent, type=Path)
    args = parser.parse_args()
    model = ctqk.load_model()
    graph = ctqk.attribute(PROMPT, model)
    influence = edge_influence(graph)
    look = highlights.first_look(graph, influence)
    answer = model.tokenizer.decode([highlights.predictions(graph, 1)[0][0]]).strip()
    with tempfile.TemporaryDirectory() as folder:
        ctqk.create_graph_files(graph, "sally", folder)
        running = ctqk.serve(
            folder,
            port=server.next_free_port(8041),
            live=LiveGraphs({"sally": graph}, {"sally": model}),
        )
        query = "&".join(f"{k}={v}" for k, v in ({"slug": "sally"} | look).items())
        try:
            draw(f"{running.url}/index.html?{query}", args.output, answer)
            steered = {"slug": "sally"} | look | {"qk": "L1H2:q14:k6"}
            query = "&".join(f"{k}={v}" for k, v in steered.items())
            draw_test(f"{running.url}/index.html?{query}", args.output)
        finally:
            running.stop()
    with tempfile.TemporaryDirectory() as folder:
        draw_transcoders(Path(folder), args.output)


def draw_transcoders(folder: Path, output: Path) -> None:
    """Save the panel of a transcoder graph, made by the command line as the README says."""
    sys.path.insert(0, str(Path(__file__).parent))
    tiny = import_module("tiny_transcoders").make_set(folder / "tiny")
    flags = ["-t", str(tiny), "-p", PROMPT, "--slug", "sally"]
    cli.main(["attribute", *flags, "--graph_file_dir", str(folder / "graphs"), "--qk"])
    look = highlights.first_transcoder_look(
        json.loads((folder / "graphs" / "sally.json").read_bytes())
    )
    running = ctqk.serve(folder / "graphs", port=server.next_free_port(8041))
    query = "&".join(f"{k}={v}" for k, v in ({"slug": "sally"} | look).items())
    try:
        with sync_playwright() as playwright:
            browser = launched(playwright)
            page = opened(browser, f"{running.url}/index.html?{query}", (1280, 900), 2, False)
            page.mouse.move(5, 400)
            page.locator(".qk-panel").screenshot(path=output / "transcoders.png")
            browser.close()
    finally:
        running.stop()
    print(f"{output / 'transcoders.png'} written")


def launched(playwright: Playwright) -> Browser:
    """The machine's own browser."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        raise SystemExit("there is no Chromium or Chrome on this machine: install one.")
    return playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])


def draw(address: str, folder: Path, answer: str) -> None:
    """Save what browser windows show once the panel is filled: the whole page, and the panel."""
    with sync_playwright() as playwright:
        browser = launched(playwright)
        page = opened(browser, address, (1920, 960), 1)
        page.screenshot(path=folder / "page.png")
        page = opened(browser, address, (1280, 1060), 2)
        legend = [LEGEND[0].format(prompt=PROMPT, answer=answer), LEGEND[1]]
        page.evaluate(ANNOTATE, [legend, CAPTIONS])
        page.locator(".qk-panel").screenshot(path=folder / "panel.png")
        browser.close()
    print(f"{folder / 'page.png'} and {folder / 'panel.png'} written")


def draw_test(address: str, folder: Path) -> None:
    """Save the panel with the largest key-side feature of a head removed from its QK circuit."""
    with sync_playwright() as playwright:
        browser = launched(playwright)
        page = opened(browser, address, (1280, 1020), 2)
        page.locator("[data-qk=key-term]").first.focus()
        page.keyboard.press("t")
        page.locator("[data-qk=test-run]").click()
        page.locator("[data-qk=test-prediction]").first.wait_for()
        page.wait_for_timeout(300)
        page.locator(".qk-panel").screenshot(path=folder / "steer.png")
        browser.close()
    print(f"{folder / 'steer.png'} written")


def opened(
    browser: Browser, address: str, size: tuple[int, int], scale: int, examples: bool = True
) -> Page:
    width, height = size
    page = browser.new_page(viewport={"width": width, "height": height}, device_scale_factor=scale)
    page.goto(address)
    page.locator("[data-qk=key-term]").first.wait_for()
    if examples:
        page.locator(".feature-detail .ctx-container").first.wait_for()
    page.wait_for_timeout(500)  # the drawings settle
    return page


ANNOTATE = """([legend, captions]) => {
  var panel = d3.select('.qk-panel').style('grid-template-rows', 'auto minmax(0, 30%) minmax(0, 1fr) auto')
  var head = panel.insert('div', ':first-child').style('padding', '4px 0 6px').style('line-height', 1.5)
  head.append('div').style('font-size', '13px').style('font-weight', 600).text(legend[0])
  head.append('div').style('color', '#444').text(legend[1])
  Object.entries(captions).forEach(([selector, text]) => panel.select(selector).insert('span', ':first-child')
    .text(text).attr('style', 'flex:none; display:inline-block; width:15px; margin-right:4px; border-radius:8px;' +
      'background:#06c; color:#fff; font-size:10px; line-height:15px; text-align:center'))
}"""


if __name__ == "__main__":
    main()
