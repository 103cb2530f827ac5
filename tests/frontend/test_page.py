"""The page: nothing from elsewhere, the panel in its place, and changed pages refused by name."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
from pathlib import Path

import pytest

from circuit_tracer_qk import UserError
from circuit_tracer_qk.frontend.page import (
    EXAMPLE_HOSTS,
    INDEX,
    LAST_STOCK_SCRIPT,
    MARKERS,
    PANEL_SCRIPTS,
    panel_folder,
    read_page,
)
from circuit_tracer_qk.host import cli as host_cli

LOADED = re.compile(r"<(?:script|link)\b[^>]*?(?:src|href)=['\"]?([^'\" >]+)")


@pytest.fixture
def assets(tmp_path: Path) -> Path:
    """A copy of the installed page, to be changed."""
    return Path(shutil.copytree(host_cli.assets(), tmp_path / "assets"))


def edit(assets: Path, old: str, new: str, name: str = INDEX) -> None:
    path = assets / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def loaded(html: bytes) -> list[str]:
    """What a page loads, in order."""
    return LOADED.findall(html.decode())


def test_everything_is_loaded_from_here():
    html = read_page(host_cli.assets()).index
    assert b"http:" not in html and b"https:" not in html and b"'//" not in html
    names = [name for name in loaded(html) if name != "data:,"]
    assert all(name.startswith("./") for name in names)
    assert len(names) == len(set(names))
    for name in ("lib/d3.min.js", "jetpack.js", "lib/dagre.min.js", "lib/pako.min.js"):
        assert f"./qk/{name}" in names
    assert not [name for name in names if "hotserver" in name or "npy" in name]


def test_panel_is_loaded_after_what_it_builds_on_and_before_the_start():
    html = read_page(host_cli.assets()).index
    names = loaded(html)
    at = names.index(f"./{LAST_STOCK_SCRIPT}") + 1
    assert names[at:] == [f"./qk/{name}" for name in PANEL_SCRIPTS]
    assert html.index(b"./qk/mount.js") < html.index(b"window.init()")
    styles = [name for name in names if name.endswith(".css")]
    assert styles[-1] == "./qk/panel.css"


def test_stock_page_is_otherwise_unchanged():
    def without_loading(html: bytes) -> list[str]:
        text = re.sub(r"<(script)\b[^>]*src=[^>]*></script>|<link\b[^>]*>", "", html.decode())
        return [line for line in text.splitlines() if line]

    stock = (host_cli.assets() / INDEX).read_bytes()
    assert without_loading(read_page(host_cli.assets()).index) == without_loading(stock)


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_policy_allows_the_inline_script_and_no_other(assets, newline):
    text = (assets / INDEX).read_text()
    (assets / INDEX).write_bytes(text.replace("\n", newline).encode())
    page = read_page(assets)
    codes = re.findall(rb"<script>(.*?)</script>", page.index, re.S)
    assert len(codes) == 1 and b"window.init" in codes[0]
    digest = base64.b64encode(hashlib.sha256(codes[0]).digest()).decode()
    directives = dict(part.split(" ", 1) for part in page.policy.split("; "))
    assert directives["script-src"] == f"'self' 'sha256-{digest}'"
    assert directives["default-src"] == directives["base-uri"] == "'none'"
    assert directives["connect-src"] == "'self'"
    assert "\r" not in page.policy and b"\r" not in page.index


def test_hosts_of_examples_are_allowed_on_request():
    offline, online = (read_page(host_cli.assets(), online=online) for online in (False, True))
    assert online.index == offline.index
    joined = " ".join(EXAMPLE_HOSTS)
    assert online.policy == offline.policy.replace(
        "connect-src 'self'", f"connect-src 'self' {joined}"
    )


@pytest.mark.parametrize(
    ("file", "marker"), [(file, marker) for file, markers in MARKERS.items() for marker in markers]
)
def test_page_without_a_marker_is_refused(assets, file, marker):
    edit(assets, marker, "something_else", file)
    with pytest.raises(UserError, match="page has changed") as caught:
        read_page(assets)
    assert f"{marker} is missing in {file}" in str(caught.value)


@pytest.mark.parametrize("file", MARKERS)
def test_page_without_a_file_is_refused(assets, file):
    (assets / file).unlink()
    with pytest.raises(UserError, match=f"{file} is missing"):
        read_page(assets)


D3 = "https://transformer-circuits.pub/2025/attribution-graphs/static_js/lib/d3.js"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (D3, "//cdn.example/d3.v7.min.js"),
        (D3, "HTTP://cdn.example/lib/d3.v7.js?x=1"),
        (f"src='{D3}'", 'defer integrity="sha384-x" src="https://cdn.example/d3.min.js"'),
        (f"src='{D3}'", "src=https://cdn.example/d3.js"),
    ],
)
def test_scripts_are_known_by_name(assets, old, new):
    edit(assets, old, new)
    html = read_page(assets).index
    assert b"./qk/lib/d3.min.js" in html and b"cdn.example" not in html


@pytest.mark.parametrize(
    ("new", "named"),
    [
        ("<script src='https://cdn.example/three.js'></script>", "https://cdn.example/three.js"),
        ('<script async src="//cdn.example/d3-sankey.js"></script>', "//cdn.example/d3-sankey.js"),
        ("<script src=http://cdn.example/dagre-d3.js></script>", "http://cdn.example/dagre-d3.js"),
        ("<link href='https://cdn.example/a.css' rel='stylesheet'>", "https://cdn.example/a.css"),
        ("<script src='data:text/javascript,1'></script>", "data:text/javascript,1"),
    ],
)
def test_unknown_external_files_are_refused_by_name(assets, new, named):
    edit(assets, "<div class='cg'></div>", f"<div class='cg'></div>\n{new}")
    with pytest.raises(UserError, match="this release does not know its") as caught:
        read_page(assets)
    assert named in str(caught.value)


def test_page_rewritten_by_hand(assets):
    """Other quotes, order of attributes and no styles of its own."""
    text = re.sub(r"<link[^>]*>", "", (assets / INDEX).read_text())
    (assets / INDEX).write_text(text.replace("src='./", 'charset="utf-8" src="./').replace(
        ".js'></script>", '.js"></script>'
    ).replace("src='https", 'src="https'))  # fmt: skip
    names = loaded(read_page(assets).index)
    assert names[:2] == ["data:,", "./qk/panel.css"]
    assert names[-len(PANEL_SCRIPTS) :] == [f"./qk/{name}" for name in PANEL_SCRIPTS]


def test_missing_page_is_refused(monkeypatch):
    monkeypatch.setattr(host_cli, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="installed without its page"):
        host_cli.assets()


def test_every_file_that_the_page_loads_is_there():
    missing = []
    for name in loaded(read_page(host_cli.assets()).index):
        folder = panel_folder() if name.startswith("./qk/") else host_cli.assets()
        if (
            name != "data:,"
            and not (folder / name.removeprefix("./").removeprefix("qk/")).is_file()
        ):
            missing.append(name)
    assert missing == []
