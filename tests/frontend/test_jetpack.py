"""jetpack.js and the libraries beside it: each function, and circuit-tracer's page with them.

The page is the installed one without our panel, its external scripts replaced by our copies.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import pytest
from helpers.browsing import Watch, opened
from playwright.sync_api import Locator, Page, expect

import circuit_tracer_qk as ctqk
from circuit_tracer_qk.frontend.page import INDEX, LOCAL_SCRIPTS, panel_folder
from circuit_tracer_qk.host import cli as host_cli

PROMPT = "I always loved visiting Aunt Sally. Whenever I was feeling sad, Aunt"
EMPTY_PAGE = """<!DOCTYPE html>
<meta charset='utf-8'>
<link rel='icon' href='data:,'>
<body style='margin: 0'>
<script src='./qk/lib/d3.min.js'></script>
<script src='./qk/jetpack.js'></script>
"""
MARKUP = "node => node.outerHTML"


class Handler(SimpleHTTPRequestHandler):
    """Folders by the beginning of their addresses, and pages by their whole addresses."""

    def __init__(self, folders: Mapping[str, Path], pages: Mapping[str, str], *args: Any):
        self.folders, self.pages = folders, pages
        super().__init__(*args)

    def translate_path(self, path: str) -> str:
        path = unquote(urlsplit(path).path)
        beginning = next(b for b in self.folders if path.startswith(b))
        return str(self.folders[beginning] / path.removeprefix(beginning))

    def do_GET(self) -> None:
        html = self.pages.get(urlsplit(self.path).path)
        if html is None:
            return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        self.wfile.write(html.encode())

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def serving(folders: Mapping[str, Path], pages: Mapping[str, str]) -> Iterator[str]:
    handler = partial(Handler, folders, pages)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}/"
        httpd.shutdown()


def stock_page() -> str:
    """circuit-tracer's page as it is, only with our copies of its external scripts."""

    def local(script: re.Match[str]) -> str:
        name = script["name"]
        copy = next(c for pattern, c in LOCAL_SCRIPTS.items() if re.fullmatch(pattern, name))
        return f"<script src='./qk/{copy}'></script>" if copy else ""

    html = (Path(host_cli.assets()) / INDEX).read_text()
    html = html.replace("<title>", "<link rel='icon' href='data:,'>\n<title>")
    return re.sub(r"<script src='https:[^']*/(?P<name>[^/']+)'></script>", local, html)


@pytest.fixture(scope="module")
def empty() -> Iterator[str]:
    """The address of a page with d3 and jetpack.js and nothing else."""
    with serving({"/qk/": panel_folder(), "/": Path("/nowhere")}, {"/": EMPTY_PAGE}) as url:
        yield url


@pytest.fixture
def page(watch: Watch, empty: str) -> Page:
    """That page, opened."""
    watch.page.set_viewport_size({"width": 1280, "height": 900})
    watch.page.goto(empty)
    return watch.page


def test_libraries_are_the_packages_files():
    """Byte for byte, as the folder's README lists them."""
    folder = panel_folder() / "lib"
    listed = dict(re.findall(r"`(\S+\.js)`.*?`([0-9a-f]{64})`", (folder / "README.md").read_text()))
    found = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*.js")}
    assert found == listed and len(found) == 3
    for name in found:
        assert (folder / f"LICENSE-{name.split('.')[0]}.txt").read_text().strip()


def test_append_makes_classes_and_an_id(page: Page):
    markup = page.evaluate("""() => {
        var body = d3.select('body')
        body.append('section.a.b-c#d_e').append('p')
        body.append('div#only.later')
        body.append('i').append(() => document.createElement('b'))
        return ['section', 'div', 'i'].map(d => body.select(d).node().outerHTML)
    }""")
    assert markup == [
        '<section class="a b-c" id="d_e"><p></p></section>',
        '<div class="later" id="only"></div>',
        "<i><b></b></i>",
    ]


def test_append_keeps_namespaces_and_data(page: Page):
    found = page.evaluate("""() => {
        var g = d3.select('body').append('svg.chart').datum({x: 3}).append('g.axis')
        var created = []
        d3.select('body').selectAll('u').data([1, 2]).enter().append('u.each')
          .each(function(d, i){ created.push([this.className, d, i]) })
        return {
          svg: g.node().namespaceURI,
          datum: g.append('text.label').datum(),
          inHtml: d3.select('body').append('svg:svg').append('foreignObject').append('xhtml:p.x').node().namespaceURI,
          created,
        }
    }""")
    assert found == {
        "svg": "http://www.w3.org/2000/svg",
        "datum": {"x": 3},
        "inHtml": "http://www.w3.org/1999/xhtml",
        "created": [["each", 1, 0], ["each", 2, 1]],
    }


def test_select_append_appends_once(page: Page):
    markup = page.evaluate("""() => {
        var sel = d3.select('body').appendMany('div', ['a', 'b'])
        sel.filter(d => d == 'b').append('p').append('span.x.y').text('there')
        sel.selectAppend('span.x.y').attr('title', d => d)
        sel.selectAppend('span.x.y').selectAppend('i#z')
        return sel.nodes().map(d => d.innerHTML)
    }""")
    assert markup == [
        '<span class="x y" title="a"><i id="z"></i></span>',
        '<p><span class="x y" title="b">there<i id="z"></i></span></p>',
    ]


def test_append_many_takes_arrays_iterables_and_functions(page: Page):
    found = page.evaluate("""() => {
        var body = d3.select('body')
        var text = sel => sel.nodes().map(d => d.textContent)
        body.append('ul').append('li').text('before')
        var first = d3.select('ul').appendMany('li.many', [1, 2]).text(d => d)
        var again = d3.select('ul').appendMany('li.many', new Set([3])).text(d => d)
        var rows = body.appendMany('tr', [{cells: ['a', 'b']}, {cells: new Map([['c', 4]])}])
        var cells = rows.appendMany('td', d => d.cells.values()).text((d, i) => `${d}${i}`)
        return {
          list: text(d3.selectAll('li')),
          sizes: [first.size(), again.size(), body.appendMany('p', []).size()],
          cells: text(cells),
          parents: cells.nodes().map(d => d.parentNode.cells.length),
          data: cells.data(),
        }
    }""")
    assert found == {
        "list": ["before", "1", "2", "3"],
        "sizes": [2, 1, 0],
        "cells": ["a0", "b1", "40"],
        "parents": [2, 2, 1],
        "data": ["a", "b", 4],
    }


def test_parent_is_each_parent_once_with_its_own_datum(page: Page):
    found = page.evaluate("""() => {
        var rows = d3.select('body').appendMany('div', ['x', 'y'])
        var parents = rows.appendMany('i', [1, 2]).parent()
        parents.append('b').text(d => d)
        return [parents.size(), rows.nodes().map(d => d.lastChild.textContent), d3.select(document).parent().size()]
    }""")
    assert found == [2, ["x", "y"], 0]


ATTRIBUTES = {
    "strokeWidth": "stroke-width",
    "strokeDasharray": "stroke-dasharray",
    "textAnchor": "text-anchor",
    "dominantBaseline": "dominant-baseline",
    "markerMid": "marker-mid",
    "fontSize": "font-size",
    "fontFamily": "font-family",
    "fillOpacity": "fill-opacity",
    "stopColor": "stop-color",
    "clipPath": "clip-path",
    "ariaLabel": "aria-label",
    "dataKey": "data-key",
    "viewBox": "viewBox",
    "preserveAspectRatio": "preserveAspectRatio",
    "gradientUnits": "gradientUnits",
    "gradientTransform": "gradientTransform",
    "spreadMethod": "spreadMethod",
    "markerWidth": "markerWidth",
    "refX": "refX",
    "textLength": "textLength",
    "stroke-width": "stroke-width",
    "aria-label": "aria-label",
    "class": "class",
    "d": "d",
    "x1": "x1",
}


def test_names_of_attributes(page: Page):
    found = page.evaluate(
        """names => names.map(name => {
            var g = d3.select('body').append('svg').append('g').at({[name]: 1})
            return [Array.from(g.node().attributes, d => d.name), g.at(name)]
        })""",
        list(ATTRIBUTES),
    )
    assert found == [[[attribute], "1"] for attribute in ATTRIBUTES.values()]


def test_attributes_by_value_function_and_null(page: Page):
    markup = page.evaluate("""() => {
        var sel = d3.select('body').append('svg').appendMany('rect', [3, null])
          .at({width: d => d, strokeWidth: (d, i) => i, lang: function(){ return this.tagName }})
          .at('fillOpacity', .5).at({lang: (d, i) => i ? null : 'x'})
        return sel.nodes().map(d => d.outerHTML)
    }""")
    assert markup == [
        '<rect width="3" stroke-width="0" lang="x" fill-opacity="0.5"></rect>',
        '<rect stroke-width="1" fill-opacity="0.5"></rect>',
    ]


STYLES = [
    ("width", 5, "width: 5px;"),
    ("marginTop", -2.5, "margin-top: -2.5px;"),
    ("fontSize", 11, "font-size: 11px;"),
    ("borderRadius", 4, "border-radius: 4px;"),
    ("flexBasis", 4, "flex-basis: 4px;"),
    ("letterSpacing", 1, "letter-spacing: 1px;"),
    ("opacity", 0.4, "opacity: 0.4;"),
    ("opacity", 0, "opacity: 0;"),
    ("zIndex", 3, "z-index: 3;"),
    ("zIndex", 1e6, "z-index: 1000000;"),
    ("flexGrow", 2, "flex-grow: 2;"),
    ("flexShrink", 0, "flex-shrink: 0;"),
    ("fontWeight", 700, "font-weight: 700;"),
    ("lineHeight", 1.3, "line-height: 1.3;"),
    ("order", 2, "order: 2;"),
    ("columnCount", 2, "column-count: 2;"),
    ("columns", 2, "columns: 2;"),
    ("fillOpacity", 0.5, "fill-opacity: 0.5;"),
    ("strokeOpacity", 0.5, "stroke-opacity: 0.5;"),
    ("zoom", 2, "zoom: 2;"),
    ("--own-name", 7, "--own-name: 7;"),
    ("font-variant-numeric", "tabular-nums", "font-variant-numeric: tabular-nums;"),
    ("WebkitTextStrokeWidth", 2, "-webkit-text-stroke-width: 2px;"),
    ("padding", "2px 3%", "padding: 2px 3%;"),
]


def test_styles(page: Page):
    """By a value, a function, and a name and a value."""
    found = page.evaluate(
        """styles => styles.map(([name, value]) => [
            sel => sel.st({[name]: value}),
            sel => sel.st({[name]: d => d.value}),
            sel => sel.st(name, value),
        ].map(fn => d3.select('body').append('div').datum({value}).call(fn).attr('style')))""",
        [style[:2] for style in STYLES],
    )
    assert found == [[style] * 3 for *_, style in STYLES]


def test_styles_are_read_and_taken_away(page: Page):
    found = page.evaluate("""() => {
        var sel = d3.select('body').append('div').st({width: 12, top: 3, display: 'none'})
        var before = [sel.st('width'), sel.st('display')]
        sel.st({top: null, display: d => ''})
        return [...before, sel.attr('style')]
    }""")
    assert found == ["12px", "none", "width: 12px;"]


def test_translate_in_svg_and_html(page: Page):
    found = page.evaluate("""() => {
        var body = d3.select('body')
        var svg = body.append('svg').datum([1, 2]), g = svg.append('g'), div = body.append('div').datum([7, 8])
        var read = d => [d.getAttribute('transform'), d.style.transform]
        var mixed = d3.selectAll([g.node(), div.node()]).translate(d => d)
        var out = [...mixed.nodes().map(read)]
        mixed.translate([-.5, 0]); out.push(...mixed.nodes().map(read))
        g.translate(4, 0); out.push(read(g.node()))
        g.translate(-16, 1); out.push(read(g.node()))
        div.translate((d, i) => d[1] + i, 1); out.push(read(div.node()))
        return out
    }""")
    assert found == [
        ["translate(1,2)", ""],
        [None, "translate(7px, 8px)"],
        ["translate(-0.5,0)", ""],
        [None, "translate(-0.5px, 0px)"],
        ["translate(4,0)", ""],
        ["translate(0,-16)", ""],
        [None, "translate(0px, 8px)"],
    ]


def test_methods_return_the_selection(page: Page):
    assert page.evaluate("""() => {
        var sel = d3.select('body')
        return [sel.at({title: 1}), sel.at('title', 2), sel.st({top: 1}), sel.st('top', 2),
          sel.translate([0, 0]), sel.html('x'), sel.html('')].every(d => d === sel)
    }""")


def test_nest_by_keeps_order_and_keys(page: Page):
    found = page.evaluate("""() => {
        var a = {id: 'a'}, b = {id: 'b'}
        var byObject = d3.nestBy([{s: b, v: 1}, {s: a, v: 2}, {s: b, v: 3}], d => d.s)
        return {
          byNumber: d3.nestBy([10, 2, 30, 4], d => d % 10).map(d => [d.key, [...d]]),
          byObject: byObject.map(d => [d.key.id, d.length, d.map(e => e.v)]),
          none: d3.nestBy([], d => d),
          clamp: [d3.clamp(0, -1, 5), d3.clamp(0, 9, 5), d3.clamp(0, 2, 5), d3.clamp(20, 3, -10)],
        }
    }""")
    assert found == {
        "byNumber": [[0, [10, 30]], [2, [2]], [4, [4]]],
        "byObject": [["b", 2, [1, 3]], ["a", 1, [2]]],
        "none": [],
        "clamp": [0, 5, 2, 20],
    }


def test_conventions_fill_their_container(page: Page):
    found = page.evaluate("""() => {
        var sel = d3.select('body').append('div').st({width: 400, height: 300, marginLeft: 50})
        var c = d3.conventions({sel, margin: {left: 30, bottom: 85}, layers: 'sccd'})
        c.layers[1].fillStyle = 'rgb(255, 0, 0)'
        c.layers[1].fillRect(0, 0, 10, 10)
        var pixel = (x, y) => [...c.layers[1].canvas.getContext('2d').getImageData(x, y, 1, 1).data]
        var place = node => {
          var {x, y, width, height} = node.getBoundingClientRect()
          return [x, y, width, height]
        }
        return {
          sizes: [c.width, c.height, c.totalWidth, c.totalHeight, c.margin],
          scales: [c.x.range(), c.y.range()],
          children: Array.from(sel.node().children, d => d.tagName),
          places: Array.from(sel.node().children, place),
          origin: c.svg.attr('transform'),
          same: c.svg === c.layers[0] && c.sel === sel,
          pixels: [pixel(31, 21), pixel(29, 21)],
        }
    }""")
    assert found == {
        "sizes": [350, 195, 400, 300, {"top": 20, "right": 20, "bottom": 85, "left": 30}],
        "scales": [[0, 350], [195, 0]],
        "children": ["svg", "CANVAS", "CANVAS", "DIV"],
        "places": [*[[50, 0, 400, 300]] * 3, [80, 20, 350, 195]],
        "origin": "translate(30,20)",
        "same": True,
        "pixels": [[255, 0, 0, 255], [0, 0, 0, 0]],
    }


def test_conventions_of_given_sizes(page: Page):
    found = page.evaluate("""() => {
        var sizes = options => {
          var c = d3.conventions({sel: d3.select('body').append('div').st({width: 70, height: 10}), ...options})
          return [c.width, c.height, c.totalWidth, c.totalHeight, c.layers.length]
        }
        return [
          sizes({width: 300, height: 200, margin: {left: 0, top: 0, right: 0, bottom: 0}}),
          sizes({width: 100, height: 50}),
          sizes({totalWidth: 100, totalHeight: 60, layers: 'sd'}),
          sizes({width: 100}),
          sizes({}),
        ]
    }""")
    assert found == [
        [300, 200, 300, 200, 1],
        [100, 50, 140, 90, 1],
        [60, 20, 100, 60, 2],
        [100, 0, 140, 10, 1],
        [30, 0, 70, 10, 1],
    ]


def test_canvas_is_sharp_on_dense_screens(browser, empty: str):
    with opened(browser) as watch:
        cdp = watch.page.context.new_cdp_session(watch.page)
        size = {"width": 800, "height": 600, "mobile": False, "deviceScaleFactor": 2}
        cdp.send("Emulation.setDeviceMetricsOverride", size)
        watch.page.goto(empty)
        found = watch.page.evaluate("""() => {
            var sel = d3.select('body').append('div').st({width: 100, height: 80})
            var [ctx] = d3.conventions({sel, layers: 'c', margin: {left: 0, top: 10}}).layers
            var {a, d, e, f} = ctx.getTransform(), {width, height, offsetWidth} = ctx.canvas
            return [a, d, e, f, width, height, offsetWidth]
        }""")
    assert found == [2, 2, 0, 20, 200, 160, 100]


def test_axes_are_drawn_with_what_the_page_sets(page: Page):
    found = page.evaluate("""() => {
        var sel = d3.select('body').append('div').st({width: 240, height: 140})
        var c = d3.conventions({sel, layers: 'ss'})
        c.x.domain([0, 1]); c.xAxis.ticks(2)
        c.y = d3.scaleBand(['a', 'b'], [c.height, 0])
        c.yAxis = d3.axisLeft(c.y).tickFormat(d => 'row ' + d)
        c.drawAxis(c.layers[1])
        var ticks = axis => c.layers[1].selectAll(`.axis.${axis} text`).nodes().map(d => d.textContent)
        return [ticks('x'), ticks('y'), c.layers[1].select('.axis.x').attr('transform'), c.svg.selectAll('g').size()]
    }""")
    assert found == [["0.0", "0.5", "1.0"], ["row a", "row b"], "translate(0,100)", 0]


def test_tooltip_follows_the_pointer(page: Page):
    page.evaluate("""() => {
        d3.select('body').append('div.tooltip.tooltip-hidden').st({position: 'fixed', width: 100})
        d3.select('body').appendMany('div.box', [{name: '<i>x</i>', n: 2}])
          .st({position: 'fixed', left: 300, top: 200, width: 50, height: 50})
          .call(d3.attachTooltip, d3.select('.tooltip'), [d => d.name, d => 'n = ' + d.n])
    }""")
    tooltip = page.locator(".tooltip")
    page.mouse.move(320, 220)
    expect(tooltip).not_to_have_class(re.compile("tooltip-hidden"))
    expect(tooltip.locator("div")).to_have_text(["<i>x</i>", "n = 2"])
    page.mouse.move(330, 230)
    box = tooltip.bounding_box()
    assert box is not None and (box["x"], box["y"]) == (280, 250)
    page.mouse.move(10, 10)
    expect(tooltip).to_have_class(re.compile("tooltip-hidden"))


HARMLESS = [
    ("plain & text", "plain &amp; text"),
    ("Feature&nbsp;1", "Feature&nbsp;1"),
    ("<div>a: <b>1</b></div><div>b</div>", "<div>a: <b>1</b></div><div>b</div>"),
    ("<code>x</code><br><i class='k'>y</i>", '<code>x</code><br><i class="k">y</i>'),
    (
        '<a style="color: inherit;" href="x.html" target="_blank">F</a>'
        '<span style="font-size: 0.9em; color: #777;">Act</span>',
        '<a style="color: inherit" href="x.html" target="_blank">F</a>'
        '<span style="color: rgb(119, 119, 119); font-size: 0.9em">Act</span>',
    ),
    ("<a href=https://a.example/b?c=1>F</a>", '<a href="https://a.example/b?c=1">F</a>'),
    ("<a href=#x>F</a><a href=/y rel=up>G</a>", '<a href="#x">F</a><a href="/y" rel="up">G</a>'),
]


def test_html_of_the_page_stays(page: Page):
    script = "htmls => htmls.map(d => d3.select('body').append('div').html(d).html())"
    written, shown = zip(*HARMLESS, strict=True)
    assert page.evaluate(script, written) == list(shown)


def test_html_getter_emptying_and_functions(page: Page):
    found = page.evaluate("""() => {
        var sel = d3.select('body').appendMany('p', ['<b>x</b>', '<img>', null, 3])
        sel.append('u')
        var shown = sel.html((d, i) => d).nodes().map(d => d.innerHTML)
        var getter = sel.html()
        var emptied = ['', null, undefined].map(d => d3.select('p').html('<b>y</b>').html(d).node().innerHTML)
        return [shown, getter, emptied]
    }""")
    assert found == [["<b>x</b>", "&lt;img&gt;", "", "3"], "<b>x</b>", [""] * 3]


ATTACKS = [
    "<img src=x onerror=window.pwned=1>",
    "<IMG SRC='x' ONERROR='window.pwned=1'>",
    "<img/src=x/onerror=window.pwned=1>",
    "<svg onload=window.pwned=1>",
    "<svg><script>window.pwned=1</script></svg>",
    "<script>window.pwned=1</script>",
    "<iframe src='javascript:parent.pwned=1'></iframe>",
    "<iframe srcdoc='<script>parent.pwned=1</script>'></iframe>",
    "<object data=x></object><embed src=x><video src=x onerror=window.pwned=1></video>",
    "<link rel=stylesheet href=x><meta http-equiv=refresh content='0;url=x'><base href=x>",
    "<style>@import 'x'</style>",
    "<form action=x><button formaction=javascript:window.pwned=1>b</button></form>",
    "<template><img src=x onerror=window.pwned=1></template>",
    "<math><mtext><table><mglyph><style><img src=x onerror=window.pwned=1></style></mglyph></table>",
    "<details open ontoggle=window.pwned=1>x</details>",
    "<bos> and </s>",
    "<!-- <img src=x onerror=window.pwned=1> -->",
    "<![CDATA[<img src=x onerror=window.pwned=1>]]>",
    "<?x <img src=x onerror=window.pwned=1> ?>",
    "<a\x0bhref=javascript:window.pwned=1>x",
    "<abbr onclick=window.pwned=1>x</abbr>",
    "a < b > c <",
]


def test_html_of_other_elements_is_shown_as_its_text(page: Page):
    """Literally, and nothing of it is loaded or run."""
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    found = page.evaluate(
        """attacks => attacks.map(attack => {
            var node = d3.select('body').append('div').html(`before ${attack} after`).node()
            return [node.textContent, node.children.length]
        })""",
        ATTACKS,
    )
    page.wait_for_timeout(100)
    assert found == [[f"before {attack} after", 0] for attack in ATTACKS]
    assert page.evaluate("window.pwned") is None
    assert requests == []


ATTRIBUTE_ATTACKS = [
    "<b onclick=window.pwned=1 onmouseover=window.pwned=1>x</b>",
    "<b id=visState name=init>x</b>",
    "<div style='position: fixed; inset: 0; background: url(x)'>x</div>",
    "<div style='color: red; background-image: url(x)'>x</div>",
    "<a ping=x download>x</a>",
    "<a href='javascript:window.pwned=1'>x</a>",
    "<a href='JaVa&#x09;Script:window.pwned=1'>x</a>",
    "<a href='&#1;javascript:window.pwned=1'>x</a>",
    "<a href=' javascript&colon;window.pwned=1'>x</a>",
    "<a href='data:text/html,<script>window.pwned=1</script>'>x</a>",
    "<a href='vbscript:x'>x</a>",
    "<a href='file:///etc'>x</a>",
    "<a href='blob:x'>x</a>",
    "<a xlink:href='javascript:window.pwned=1'>x</a>",
]


def test_html_keeps_no_other_attribute(page: Page):
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    found = page.evaluate(
        """attacks => attacks.map(attack => {
            var node = d3.select('body').append('div').html(attack).node().firstChild
            node.click()
            return [node.textContent, Array.from(node.attributes, d => `${d.name}=${d.value}`).join()]
        })""",
        ATTRIBUTE_ATTACKS,
    )
    page.wait_for_timeout(100)
    assert {text for text, _ in found} == {"x"}
    assert {attributes for _, attributes in found} == {"", "style=", "style=color: red"}
    assert page.evaluate("window.pwned") is None
    assert requests == []


def test_html_breaking_out_of_the_pages_attributes(page: Page):
    """As the title of a feature is made, from its address and label."""
    found = page.evaluate(
        """([url, label]) => {
            var sel = d3.select('body').append('div')
              .html(`Feature <a style="color: inherit;" href="${url}" target="_blank">${label}</a>`)
            var names = Array.from(sel.node().querySelectorAll('*'), d => [d.localName, d.getAttributeNames()])
            return [names, sel.node().textContent]
        }""",
        [
            'x" onclick="window.pwned=1" autofocus onfocus="window.pwned=2"><img src=x onerror=pwned=3>',
            "</a></div></body><script>window.pwned=4</script>",
        ],
    )
    assert found[0] == [["a", ["style", "href"]]]
    assert "<img src=x onerror=pwned=3>" in found[1] and "<script>" in found[1]
    assert page.evaluate("window.pwned") is None


def test_html_in_svg_is_svg(page: Page):
    """The page's gradient works, and nothing else comes in with it."""
    found = page.evaluate("""() => {
        var svg = d3.select('body').append('svg').at({width: 20, height: 20})
        svg.append('defs').html(`
          <linearGradient id='g' x1='0' x2='2' gradientUnits='userSpaceOnUse' spreadMethod='repeat' onclick='x'>
            <stop offset='0' stop-color='#f0f' /><stop offset='70%' stop-color='#f0f' />
          </linearGradient>
          <image href='x' onerror='window.pwned=1' /><b>bold</b></svg><img src=x onerror=window.pwned=1>`)
        var nodes = Array.from(svg.select('defs').node().querySelectorAll('*'))
        svg.append('rect').at({width: 9, height: 9, fill: 'url(#g)'})
        return [
          nodes.map(d => [d.tagName, d.namespaceURI == svg.node().namespaceURI, d.getAttributeNames()]),
          nodes[0].x2.baseVal.value, getComputedStyle(nodes[1]).stopColor,
        ]
    }""")
    gradient = ["id", "x1", "x2", "gradientUnits", "spreadMethod"]
    stop = ["stop", True, ["offset", "stop-color"]]
    assert found == [[["linearGradient", True, gradient], stop, stop], 2, "rgb(255, 0, 255)"]
    assert page.evaluate("window.pwned") is None


# circuit-tracer's page


class Stock(NamedTuple):
    """The served page, and of its graph what the page shows."""

    url: str
    tokens: list[str]
    nodes: list[dict[str, Any]]
    links: list[dict[str, Any]]

    def ids(self, kind: str) -> list[str]:
        return [n["node_id"] for n in self.nodes if n["feature_type"] == kind]

    def linked(self, node_id: str) -> list[str]:
        """Every node at the other end of a node's links."""
        ends = [(k["source"], k["target"]) for k in self.links]
        return [b if a == node_id else a for a, b in ends if node_id in (a, b)]


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> Iterator[Stock]:
    folder = tmp_path_factory.mktemp("stock")
    graph = ctqk.attribute(PROMPT, ctqk.load_model(device="cpu"))
    ctqk.create_graph_files(graph, "sally", folder)
    folders = {"/qk/": panel_folder(), "/data/": folder, "/graph_data/": folder}
    assets = {"/": Path(host_cli.assets())}
    with serving(folders | assets, {"/": stock_page()}) as url:
        document = json.loads((folder / "sally.json").read_bytes())
        metadata = document["metadata"]
        nodes = {n["node_id"]: n for n in document["nodes"] if is_shown(n, metadata)}
        links = [k for k in document["links"] if k["source"] in nodes and k["target"] in nodes]
        yield Stock(url, metadata["prompt_tokens"], [*nodes.values()], links)


def is_shown(node: dict[str, Any], metadata: dict[str, Any]) -> bool:
    """Whether the page shows a node: its slider starts at the graph's own threshold."""
    always = node["feature_type"] in ("embedding", "logit")
    return always or (node["influence"] or 0) <= metadata["node_threshold"]


@pytest.fixture
def drawn(watch: Watch, stock: Stock) -> Page:
    """The page with the graph drawn."""
    watch.page.set_viewport_size({"width": 1280, "height": 900})
    watch.page.goto(stock.url)
    expect(watch.page.locator(".link-graph text.node").first).to_be_attached()
    return watch.page


def data(locator: Locator, field: str = "nodeId") -> list[Any]:
    """A field of the data that d3 keeps with elements."""
    return locator.evaluate_all("(nodes, field) => nodes.map(d => d.__data__[field])", field)


def graph_node(page: Page, node_id: str) -> Locator:
    handle = page.locator(".link-graph text.node")
    return handle.nth(data(handle).index(node_id))


def middle(locator: Locator) -> tuple[float, float]:
    box = locator.bounding_box()
    assert box is not None
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def inked(page: Page) -> list[bool]:
    """Of each canvas of the link graph, whether anything is drawn on it."""
    return page.locator(
        ".link-graph canvas"
    ).evaluate_all("""nodes => nodes.map(d =>
        new Uint32Array(d.getContext('2d').getImageData(0, 0, d.width, d.height).data.buffer).some(e => e))""")


def test_every_node_is_drawn_in_its_row_and_column(drawn: Page, stock: Stock):
    nodes = drawn.locator(".link-graph text.node")
    assert sorted(data(nodes)) == sorted(n["node_id"] for n in stock.nodes)
    names = ["feature_type", "layer", "ctx_idx"]
    places = nodes.evaluate_all(
        """(nodes, names) => nodes.map(d => {
            var {x, y, width, height} = d.getBoundingClientRect()
            return [...names.map(e => d.__data__[e]), x + width/2, y + height/2]
        })""",
        names,
    )
    rows: dict[float, list[float]] = {}
    columns: dict[int, list[float]] = {}
    for kind, layer, at, x, y in places:
        row = math.inf if kind == "logit" else -1 if layer == "E" else float(layer)
        rows.setdefault(row, []).append(y)
        columns.setdefault(at, []).append(x)
    assert all(max(ys) - min(ys) < 4 for ys in rows.values())  # glyphs differ by a little
    means = [sum(ys) / len(ys) for _, ys in sorted(rows.items())]
    assert means == sorted(means, reverse=True) and len(means) > 3
    ordered = [columns[at] for at in sorted(columns)]
    assert all(max(a) < min(b) for a, b in zip(ordered, ordered[1:], strict=False))
    graph = drawn.locator(".link-graph").bounding_box()
    assert graph is not None
    assert all(graph["x"] < x < graph["x"] + graph["width"] for *_, x, _ in places)
    assert all(graph["y"] < y < graph["y"] + graph["height"] - 85 for *_, y in places)


def test_axis_and_tokens(drawn: Page, stock: Stock):
    svg = drawn.locator(".link-graph > svg").first
    labels = svg.locator(".axis.y text")
    assert labels.all_text_contents() == ["Emb", "", "L1", "", "L3", ""]
    emb = labels.first
    embedding = middle(graph_node(drawn, stock.ids("embedding")[0]))
    assert abs(middle(emb)[1] - embedding[1]) < 6 and middle(emb)[0] < embedding[0]
    l1 = next(n["node_id"] for n in stock.nodes if n["layer"] == "1")
    assert abs(middle(labels.nth(2))[1] - middle(graph_node(drawn, l1))[1]) < 6
    at = sorted(n["ctx_idx"] for n in stock.nodes if n["feature_type"] == "embedding")
    tokens = svg.locator(".prompt-token text")
    assert tokens.all_text_contents() == [stock.tokens[i] for i in at]
    assert set(tokens.evaluate_all("ts => ts.map(d => d.getAttribute('transform'))")) == {
        "rotate(-45)"
    }
    boxes = [tokens.nth(i).bounding_box() for i in range(len(at))]
    assert all(box is not None and box["y"] > embedding[1] for box in boxes)


def test_a_click_selects_a_node(drawn: Page, stock: Stock):
    logit = stock.ids("logit")[0]
    drawn.mouse.click(*middle(graph_node(drawn, logit)))
    expect(graph_node(drawn, logit)).to_have_class(re.compile(r"\bclicked\b"))
    assert f"clickedId={logit}" in drawn.url
    rows = drawn.locator(".node-connections .input .feature-row")
    assert sorted(data(rows)) == sorted(stock.linked(logit))
    weights = [float(t) for t in rows.locator(".weight").all_text_contents()]
    by_source = {k["source"]: k["weight"] for k in stock.links if k["target"] == logit}
    for node_id, shown in zip(data(rows), weights, strict=True):
        assert abs(shown - by_source[node_id]) < 1e-3
    assert inked(drawn) == [False, False, True, True]
    drawn.mouse.click(*middle(graph_node(drawn, logit)))
    expect(graph_node(drawn, logit)).not_to_have_class(re.compile(r"\bclicked\b"))
    assert inked(drawn) == [False] * 4


def test_hover_shows_tooltip_and_examples(drawn: Page, stock: Stock):
    features = stock.ids("cross layer transcoder")
    node = next(n for n in stock.nodes if n["node_id"] == features[0])
    tooltip = drawn.locator(".tooltip")
    expect(tooltip).to_have_class(re.compile("tooltip-hidden"))
    drawn.mouse.move(*middle(graph_node(drawn, node["node_id"])))
    expect(tooltip).not_to_have_class(re.compile("tooltip-hidden"))
    expect(tooltip).to_have_text(node["clerp"])
    detail = drawn.locator(".feature-detail")
    expect(detail.locator(".feature-title")).to_contain_text(f"L{node['layer']}/")
    link = detail.locator(".feature-title a")
    assert link.get_attribute("target") == "_blank"
    expect(detail.locator(".example-quantile").first).to_be_visible()
    assert detail.locator(".ctx-container .token").count() > 10
    assert detail.locator(".feature-example-logits .token").count() > 4
    drawn.mouse.move(2, 2)
    expect(tooltip).to_have_class(re.compile("tooltip-hidden"))


def test_pinned_nodes_are_laid_out(drawn: Page, stock: Stock):
    source = stock.linked(stock.ids("logit")[0])[0]
    pinned = [source, stock.ids("logit")[0], *stock.ids("embedding")[:1]]
    for node_id in pinned:
        x, y = middle(graph_node(drawn, node_id))
        drawn.keyboard.down("Control")
        drawn.mouse.click(x, y)
        drawn.keyboard.up("Control")
    nodes = drawn.locator(".subgraph .supernode-container")
    assert sorted(data(nodes)) == sorted(pinned)
    assert drawn.locator(".link-graph text.node.pinned").count() == len(pinned)
    assert inked(drawn)[1]
    paths = drawn.locator(".subgraph path.link-path")
    assert paths.count() == sum(
        k["source"] in pinned and k["target"] in pinned for k in stock.links
    )
    assert all("NaN" not in d for d in paths.evaluate_all("ps => ps.map(d => d.getAttribute('d'))"))
    places = {d: middle(nodes.nth(i)) for i, d in enumerate(data(nodes))}
    assert len(set(places.values())) == len(pinned)
    assert places[pinned[1]][1] < places[source][1], "outputs are above their inputs"
    assert [*map(bool, data(nodes, "dagrePositioned"))] == [True] * len(pinned)
    expect(drawn.locator(".subgraph .checkbox-container label")).to_have_text(["sticky", "dagrefy"])


def test_a_pinned_node_is_dragged(drawn: Page, stock: Stock):
    logit = stock.ids("logit")[0]
    drawn.goto(f"{stock.url}?pinnedIds={logit}")
    node = drawn.locator(".subgraph .supernode-container")
    handle = node.locator(".member-circles")
    expect(handle).to_be_visible()
    x, y = middle(handle)
    drawn.mouse.move(x, y)
    drawn.mouse.down()
    drawn.mouse.move(x + 60, y + 40, steps=4)
    drawn.mouse.up()
    moved = middle(handle)
    assert abs(moved[0] - x - 60) < 3 and abs(moved[1] - y - 40) < 3


def test_cells_are_moved_and_resized(drawn: Page):
    cell = drawn.locator(".grid-item", has=drawn.locator(".node-connections"))
    cell.hover()
    handle = cell.locator(".resize-handle")
    before, (x, y) = cell.bounding_box(), middle(handle)
    drawn.mouse.move(x, y)
    drawn.mouse.down()
    drawn.mouse.move(x - 150, y, steps=4)
    drawn.mouse.up()
    after = cell.bounding_box()
    assert before is not None and after is not None
    assert after["width"] < before["width"] - 50
    assert (after["x"], after["y"]) == (before["x"], before["y"])


def test_the_graph_is_drawn_anew_when_the_window_changes(drawn: Page):
    graph = drawn.locator(".link-graph")
    width = graph.evaluate("d => d.querySelector('canvas').offsetWidth")
    drawn.wait_for_timeout(600)  # the page looks at most twice a second
    drawn.set_viewport_size({"width": 1920, "height": 1080})
    drawn.wait_for_function(
        "width => document.querySelector('.link-graph canvas').offsetWidth > width * 1.3", arg=width
    )
    assert graph.locator("canvas").count() == 4
    assert graph.evaluate("d => d.offsetWidth == d.querySelector('canvas').offsetWidth")
