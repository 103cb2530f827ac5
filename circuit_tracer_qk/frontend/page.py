"""circuit-tracer's page with our panel added and every script from this machine.

Made from the files of the installed circuit-tracer, none of which is changed.
"""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.base.package import ROOT

INDEX = "index.html"
LAST_STOCK_SCRIPT = "attribution_graph/init-cg.js"
"""What our scripts build on is loaded once this one is; the page starts right after it."""

PANEL_STYLE = "panel.css"
PANEL_SCRIPTS = (
    "format.js",
    "page.js",
    "data.js",
    "examples.js",
    "edges.js",
    "layers.js",
    "heads.js",
    "attention.js",
    "terms.js",
    "heatmap.js",
    "steer.js",
    "save.js",
    "panel.js",
    "mount.js",
)
"""The panel's scripts, in the order in which they are loaded."""

LOCAL_SCRIPTS = {
    r"d3(\.v[0-9]+)?(\.min)?\.js": "lib/d3.min.js",
    r"(d3-)?jetpack[\w.-]*\.js": "jetpack.js",
    r"dagre([._-]?v?[0-9.]+)?(\.min)?\.js": "lib/dagre.min.js",
    r"pako[\w.-]*\.js": "lib/pako.min.js",
    r"hotserver-client-ws\.js|npy[\w.-]*\.js": None,  # reloading on edits, a format not in use
}
"""By the name of an external script: ours in its place, None for those that nothing needs."""

MARKERS = {
    INDEX: (
        "src='./util.js'",
        f"src='./{LAST_STOCK_SCRIPT}'",
        "./data/graph-metadata.json",
        "class='cg'",
    ),
    "util.js": ("window.util =",),
    "attribution_graph/util-cg.js": ("window.utilCg =", "showTooltip"),
    LAST_STOCK_SCRIPT: (
        "window.initCg =",
        "window.initGridsnap({",
        "initCgNodeConnections",
        "gridData",
    ),
    "attribution_graph/gridsnap/init-gridsnap.js": ("window.initGridsnap =",),
    "attribution_graph/init-cg-node-connections.js": ("window.initCgNodeConnections =",),
    "attribution_graph/init-cg-feature-detail.js": ("window.initCgFeatureDetail =",),
    "feature_examples/init-feature-examples.js": ("window.initFeatureExamples =",),
}
"""By file: what the panel relies on. Quotes are compared as single ones."""

EXAMPLE_HOSTS = (
    "https://huggingface.co",
    "https://*.huggingface.co",
    "https://*.hf.co",
    "https://d1fk9w8oratjix.cloudfront.net",
)
"""Where circuit-tracer's page looks for feature examples that no local folder holds."""

FRAMED_BY = ("http://localhost:*", "http://127.0.0.1:*", "vscode-webview:")
"""What may show the page in a frame: notebooks on this machine."""

_SCRIPT = re.compile(r"<script\b(?P<attributes>[^>]*)>(?P<code>.*?)</script\s*>", re.I | re.S)
_LINK = re.compile(r"<link\b(?P<attributes>[^>]*)>", re.I)
_ATTRIBUTE = r"""(?<![\w-]){name}\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s"'>]+))"""


@dataclass(frozen=True)
class Page:
    """The page and what it may load.

    Attributes:
        index: its HTML in UTF-8.
        policy: the Content-Security-Policy that its scripts and data fit in.
    """

    index: bytes
    policy: str


def panel_folder() -> Path:
    """Where the panel's files lie: in the package, or beside it in a source checkout.

    Raises:
        UserError: at neither place.
    """
    for folder in (ROOT / "frontend_patch", ROOT.parent / "frontend_patch"):
        if folder.is_dir():
            return folder
    raise UserError("the panel's files (frontend_patch) are missing: install the package again.")


def read_page(assets: Path, *, online: bool = False) -> Page:
    """The installed circuit-tracer's page, with our panel.

    Args:
        assets: the installed page's folder.
        online: allow circuit-tracer's own hosts of feature examples.

    Raises:
        UserError: a page that this release does not know.
    """
    _check_markers(assets)
    html = re.sub("\r\n?", "\n", _text(assets, INDEX))  # as browsers read it before they hash
    html = _add_panel(_make_local(html))
    return Page(html.encode(), _policy(html, online))


def _check_markers(assets: Path) -> None:
    for name, markers in MARKERS.items():
        text = _text(assets, name).replace('"', "'")
        for marker in markers:
            if marker not in text:
                raise _changed(f"{marker} is missing in {name}")


def _text(assets: Path, name: str) -> str:
    try:
        return (assets / name).read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise _changed(f"{name} is missing or cannot be read") from error


def _changed(what: str) -> UserError:
    return UserError(
        f"circuit-tracer's page has changed: {what}; update circuit-tracer-qk, or show the graphs "
        "without its panel with `circuit-tracer start-server`."
    )


def _make_local(html: str) -> str:
    """Put our copies in place of external scripts."""
    for link in _LINK.finditer(html):
        address = _attribute(link, "href")
        if _is_external(address) and "stylesheet" in _attribute(link, "rel").lower():
            raise _changed(f"this release does not know its stylesheet {address}")

    def local(script: re.Match[str]) -> str:
        address = _attribute(script, "src")
        if not _is_external(address):
            return script[0]
        copy = _local_copy(address)
        return "" if copy is None else _script(copy)

    return _SCRIPT.sub(local, html)


def _local_copy(address: str) -> str | None:
    name = urlsplit(address).path.rpartition("/")[2]
    for pattern, copy in LOCAL_SCRIPTS.items():
        if re.fullmatch(pattern, name):
            return copy
    raise _changed(f"this release does not know its script {address}")


def _add_panel(html: str) -> str:
    """Our style after the last style, our scripts before the one that starts the page."""
    style = f"<link rel='stylesheet' href='./qk/{PANEL_STYLE}'>"
    styles = [link for link in _LINK.finditer(html) if "stylesheet" in _attribute(link, "rel")]
    if styles:
        html = f"{html[: styles[-1].end()]}\n{style}{html[styles[-1].end() :]}"
    else:
        html = _SCRIPT.sub(lambda script: f"{style}\n{script[0]}", html, count=1)
    # in the head: else every visit asks for an icon that is not there
    html = _LINK.sub(lambda link: f"<link rel='icon' href='data:,'>\n{link[0]}", html, count=1)
    for script in _SCRIPT.finditer(html):
        if _attribute(script, "src").removeprefix("./") == LAST_STOCK_SCRIPT:
            at = script.end()
            return "\n".join((html[:at], *map(_script, PANEL_SCRIPTS))) + html[at:]
    raise _changed(f"the script {LAST_STOCK_SCRIPT} is missing in {INDEX}")


def _script(name: str) -> str:
    return f"<script src='./qk/{name}'></script>"


def _attribute(tag: re.Match[str], name: str) -> str:
    """The value of a tag's attribute, empty without one."""
    match = re.search(_ATTRIBUTE.format(name=name), tag["attributes"], re.I)
    return next(filter(None, match.groups()), "").strip() if match else ""


def _is_external(address: str) -> bool:
    return re.match(r"//|[a-z][a-z0-9+.-]*:", address, re.I) is not None


def _policy(html: str, online: bool) -> str:
    """The Content-Security-Policy of a page: its own inline scripts, everything else from here."""
    inline = [script["code"] for script in _SCRIPT.finditer(html) if not _attribute(script, "src")]
    digests = (hashlib.sha256(code.encode()).digest() for code in inline)
    hashes = [f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests]
    directives = {
        "default-src": ["'none'"],
        "script-src": ["'self'", *hashes],
        "style-src": ["'self'", "'unsafe-inline'"],
        "img-src": ["'self'", "data:"],
        "connect-src": ["'self'", *(EXAMPLE_HOSTS if online else ())],
        "font-src": ["'self'"],
        "base-uri": ["'none'"],
        "form-action": ["'none'"],
        "frame-ancestors": ["'self'", *FRAMED_BY],
    }
    return "; ".join(" ".join((name, *values)) for name, values in directives.items())
