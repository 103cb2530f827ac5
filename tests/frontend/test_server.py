"""The page's server over real sockets: what it gives, to whom, and what it keeps."""

from __future__ import annotations

import gzip
import http.client
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from helpers.serving import Reply, ask, port_of

import circuit_tracer_qk as ctqk
from circuit_tracer_qk import UserError
from circuit_tracer_qk.base.digests import file_name
from circuit_tracer_qk.cli import main as cli
from circuit_tracer_qk.frontend import listener, server
from circuit_tracer_qk.frontend import static as contents
from circuit_tracer_qk.frontend.handler import Handler
from circuit_tracer_qk.frontend.page import panel_folder, read_page
from circuit_tracer_qk.frontend.steer_requests import SteerRequest
from circuit_tracer_qk.host import cli as host_cli

SECRET = "the secret beside the folder"
DIGEST, OTHER_DIGEST = "0" * 32, "1" * 32
GRAPH = {"metadata": {"slug": "sally", "prompt": "Aunt “Sally” 🙂"}, "qParams": {"pinnedIds": []}}
LARGE = {"qParams": {}, "links": [{"source": f"{i}", "weight": i / 7} for i in range(40_000)]}
LARGE_TEXT = json.dumps(LARGE)
NEW = {"pinnedIds": "1_2_3,E_4_5", "supernodes": [["a", "1_2_3"]], "pruningThreshold": 0.5}


class FakeLive:
    """A live graph that answers with what it was asked."""

    digests = {"sally": DIGEST}
    steerable = ()

    def steer(self, slug: str, request: SteerRequest, before_run: Any = None) -> bytes:
        raise UserError(f"no model is in memory for {slug}")

    def table(self, slug: str, layer: int, head: int, query: int, key: int) -> bytes:
        if layer > 3:
            raise UserError(f"layer {layer} is out of range: 0 to 3.")
        if layer == 3:
            raise RuntimeError(SECRET)
        return json.dumps([slug, layer, head, query, key]).encode()

    def examples(self, scan: str, index: int) -> bytes | None:
        if index > 100:
            raise UserError(f"{SECRET} is damaged")
        return json.dumps({"scan": scan, "index": index}).encode() if index > 9 else None


Start = Callable[..., server.Server]


@pytest.fixture(autouse=True)
def stop_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of servers are stopped here."""
    monkeypatch.setattr(listener, "POLL_SECONDS", 0.005)


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """A folder as create_graph_files leaves it, with something secret beside it."""
    folder = tmp_path / "graphs"
    (folder / "scan").mkdir(parents=True)
    (folder / "scan" / "7.json").write_text('{"index": 7}')
    (folder / "graph-metadata.json").write_text('{"graphs": [{"slug": "sally"}]}')
    (folder / "sally.json").write_text(json.dumps(GRAPH))
    (folder / "large.json").write_text(LARGE_TEXT)
    (folder / "old.json.gz").write_bytes(gzip.compress(b"{}"))
    (folder / "notes.txt").write_text(SECRET)
    (folder / ".sally.json.0123.tmp").write_text(json.dumps(SECRET))
    (folder / "folder.json").mkdir()
    (tmp_path / "secret.json").write_text(json.dumps(SECRET))
    (folder / "out.json").symlink_to(tmp_path / "secret.json")
    (folder / "up").symlink_to(tmp_path)
    (folder / "circle.json").symlink_to(folder / "circle.json")
    (folder / "inner.json").symlink_to(folder / "sally.json")
    return folder


@pytest.fixture
def start(data_dir) -> Iterator[Start]:
    """Start servers that are stopped after the test."""
    with ExitStack() as running:

        def start(folder: Path = data_dir, **options: Any) -> server.Server:
            port = server.next_free_port(18032, options.get("host", "127.0.0.1"))
            started = server.serve(folder, port, **options)
            running.callback(started.stop)
            return started

        yield start


@pytest.fixture
def site(start) -> server.Server:
    """A server on the data folder, with a live graph."""
    return start(live=FakeLive())


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that another server listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def save(
    site: server.Server, parameters: Any, slug: str = "sally", more: Any = None, **headers: str
) -> Reply:
    body = json.dumps({"qParams": parameters} | (more or {}))
    return ask(
        site, f"/save_graph/{slug}", "POST", body, Content_Type="application/json", **headers
    )


def raw(site: server.Server, data: bytes) -> bytes:
    """Everything that comes back for some bytes."""
    with socket.create_connection(("127.0.0.1", port_of(site)), timeout=10) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        return rest(connection)


def rest(connection: socket.socket) -> bytes:
    """Everything that comes until the other side closes."""
    received = b""
    while chunk := connection.recv(1 << 16):
        received += chunk
    return received


def status(received: bytes) -> int:
    return int(received.split(b" ", 2)[1])


# What is served -----------------------------------------------------------------------------------


def test_page_and_graphs_are_served_until_stopped(data_dir):
    port = server.next_free_port(18032)
    running = ctqk.serve(data_dir, port=port)
    try:
        assert running.url == f"http://127.0.0.1:{port}"
        for path in ("/", "/index.html", "/index.html?slug=sally", "/%69ndex.html"):
            page = ask(running, path)
            assert page.body == read_page(host_cli.assets()).index
            assert page.headers["Content-Type"] == "text/html; charset=utf-8"
        assert ask(running, "/data/graph-metadata.json").json["graphs"][0]["slug"] == "sally"
        assert ask(running, "/graph_data/sally.json?x=../y").json == GRAPH
        assert ask(running, "/graph_data/inner.json").json == GRAPH
        assert ask(running, "/graph_data/scan/7.json").json == {"index": 7}
        old = ask(running, "/data/old.json.gz", Accept_Encoding="gzip")
        assert old.headers["Content-Type"] == "application/gzip"
        assert old.headers["Content-Encoding"] is None and gzip.decompress(old.body) == b"{}"
    finally:
        running.stop()
    running.stop()
    with pytest.raises(ConnectionError):
        ask(running, "/index.html")
    server.check_port(port)


@pytest.mark.parametrize(
    ("path", "kind"),
    [("util.js", "text/javascript"), ("style.css", "text/css"), ("attribution_graph/cg.css", "text/css")],
)  # fmt: skip
def test_stock_files_are_served(site, path, kind):
    answer = ask(site, f"/{path}")
    assert answer.body == (host_cli.assets() / path).read_bytes()
    assert answer.headers["Content-Type"] == f"{kind}; charset=utf-8"


def test_panel_files_are_served(site, tmp_path, monkeypatch, start):
    (tmp_path / "panel" / "lib").mkdir(parents=True)
    for name in ("panel.js", "panel.css", "README.md", "lib/d3.min.js", "lib/LICENSE.d3"):
        (tmp_path / "panel" / name).write_text(name)
    monkeypatch.setattr(server, "panel_folder", lambda: tmp_path / "panel")
    other = start()
    for name, kind in (
        ("panel.js", "javascript"),
        ("panel.css", "css"),
        ("lib/LICENSE.d3", "plain"),
    ):
        answer = ask(other, f"/qk/{name}")
        assert (answer.status, answer.body) == (200, name.encode())
        assert answer.headers["Content-Type"] == f"text/{kind}; charset=utf-8"
    assert {ask(other, f"/qk/{name}").status for name in ("README.md", "lib", "", "x.js")} == {404}


def test_source_checkout_has_its_panel_beside_the_package():
    assert panel_folder().name == "frontend_patch"


def test_folder_behind_a_link_is_served(start, data_dir, tmp_path):
    (tmp_path / "link").symlink_to(data_dir)
    assert ask(start(tmp_path / "link"), "/data/sally.json").json == GRAPH


def test_installed_files_may_be_links(start, monkeypatch, tmp_path):
    """As some installers leave them."""
    for path in host_cli.assets().rglob("*.*"):
        link = tmp_path / "linked" / path.relative_to(host_cli.assets())
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    monkeypatch.setattr(host_cli, "assets", lambda: tmp_path / "linked")
    assert ask(start(), "/util.js").status == 200


def test_config(site, start):
    expected = {
        "live": {"sally": DIGEST},
        "steerable": [],
        "online": False,
        "version": ctqk.__version__,
    }
    assert ask(site, "/qk/config.json").json == expected
    config = ask(start(online=True), "/qk/config.json").json
    assert config == expected | {"live": {}, "online": True}


def test_live_tables(site, start, caplog):
    query = "layer=1&head=2&query=9&key=4"
    assert ask(site, f"/qk/table/sally?digest={DIGEST}&{query}").json == ["sally", 1, 2, 9, 4]
    absent = ask(site, f"/qk/table/large?{query}")
    assert absent.status == 404 and "only its file" in absent.json["error"]
    assert ask(start(), f"/qk/table/sally?digest={DIGEST}&{query}").status == 404
    refused = ask(site, f"/qk/table/sally?digest={DIGEST}&layer=4&head=2&query=9&key=4")
    assert (refused.status, refused.json) == (422, {"error": "layer 4 is out of range: 0 to 3."})
    with caplog.at_level(logging.CRITICAL):
        failed = ask(site, f"/qk/table/sally?digest={DIGEST}&layer=3&head=2&query=9&key=4")
    assert failed.status == 500 and SECRET.encode() not in failed.body


def test_a_file_beside_whose_contents_do_not_fit_its_name(site, data_dir):
    (data_dir / "sally.qk").mkdir()
    name = file_name("L0H7", b'{"layer": 0}')
    path = data_dir / "sally.qk" / name
    path.write_bytes(b'{"layer": 0}')
    assert ask(site, f"/data/sally.qk/{name}").json == {"layer": 0}
    path.write_bytes(b'{"layer": 8}')
    refused = ask(site, f"/data/sally.qk/{name}")
    assert refused.status == 500 and f"sally.qk/{name} is damaged" in refused.body.decode()


@pytest.mark.parametrize(
    "query",
    ["", "layer=1&head=2&query=9", "layer=1&head=2&query=9&key=", "layer=1&head=2&query=9&key=-1",
     "layer=1&head=2&query=9&key=1.5", "layer=1&head=2&query=9&key=%D9%A3", "layer=1&head=2&query=9&key=1e3",
     "layer=1&head=2&query=9&key=4&key=5", "layer=1&head=2&query=9&key=4&more=1",
     "layer=1&head=2&query=9&key=99999999999"],
)  # fmt: skip
def test_malformed_numbers_are_refused(site, query):
    answer = ask(site, f"/qk/table/sally?digest={DIGEST}&{query}")
    assert answer.status == 400 and answer.json["error"]


@pytest.mark.parametrize(
    "given", ["", f"digest={OTHER_DIGEST}", "digest=", f"digest={DIGEST}&digest={DIGEST}"]
)
def test_a_request_about_another_graph_of_this_name_is_refused(site, given):
    for what in (
        f"table/sally?{given}&layer=1&head=2&query=9&key=4",
        f"steer/sally?{given}&heads=L1H2&factor=0",
    ):
        answer = ask(site, f"/qk/{what}")
        assert answer.status == 409 and "memory is another one" in answer.json["error"]


def test_without_a_digest_the_file_on_disk_says_what_is_asked_about(site, data_dir):
    table = "/qk/table/sally?layer=1&head=2&query=9&key=4"
    path = data_dir / "sally.json"
    for digest, status in (DIGEST, 200), (OTHER_DIGEST, 409):
        path.write_text(json.dumps(GRAPH | {"metadata": {"info": {"digest": digest}}}))
        assert ask(site, table).status == status


def test_live_examples_stand_in_for_files(site, start):
    assert ask(site, "/graph_data/scan/7.json").json == {"index": 7}
    assert ask(site, "/graph_data/scan/12.json").json == {"scan": "scan", "index": 12}
    assert ask(site, "/graph_data/other/12.json").json == {"scan": "other", "index": 12}
    for name in ("8.json", "-12.json", "12.js", "1.2.json", "101.json", "9" * 19 + ".json"):
        assert ask(site, f"/graph_data/scan/{name}").status == 404
    assert ask(start(), "/graph_data/scan/12.json").status == 404


@pytest.mark.parametrize(
    "path", ["/", "/data/sally.json", "/qk/config.json", "/util.js", "/absent"]
)
def test_headers_of_every_answer(site, path):
    answer = ask(site, path)
    assert answer.headers["Content-Security-Policy"] == read_page(host_cli.assets()).policy
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Referrer-Policy"] == "no-referrer"
    assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert answer.headers["Cache-Control"] == "no-cache"
    assert answer.headers["Access-Control-Allow-Origin"] is None
    assert int(answer.headers["Content-Length"]) == len(answer.body)
    assert "Python" not in answer.headers["Server"]
    head = ask(site, path, "HEAD")
    assert (head.status, head.body) == (answer.status, b"")
    assert {**head.headers, "Date": ""} == {**answer.headers, "Date": ""}


# Forms and versions -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accepted", "zipped"),
    [("gzip", True), ("GZIP, deflate", True), ("*", True), ("br;q=1, gzip;q=0.5", True),
     ("identity", False), ("gzip;q=0", False), ("gzip; q=0.000", False), ("*;q=0", False),
     ("gzip;q=0, *", False), ("", False)],
)  # fmt: skip
@pytest.mark.parametrize("name", ["large.json", "old.json.gz"])
def test_compression_is_what_the_client_allows(site, data_dir, name, accepted, zipped):
    answer = ask(site, f"/data/{name}", Accept_Encoding=accepted)
    compressible = name == "large.json"
    assert (answer.headers["Content-Encoding"] == "gzip") == (zipped and compressible)
    assert (answer.headers["Vary"] == "Accept-Encoding") == compressible
    body = gzip.decompress(answer.body) if zipped and compressible else answer.body
    assert body == (data_dir / name).read_bytes()


def test_small_files_are_not_compressed(site):
    assert ask(site, "/data/sally.json", Accept_Encoding="gzip").json == GRAPH


def test_large_files_are_compressed_once(site, data_dir, monkeypatch):
    compress, times = gzip.compress, []

    def counted(data: bytes, *args: Any, **options: Any) -> bytes:
        times.append(len(data))
        return compress(data, *args, **options)

    monkeypatch.setattr(gzip, "compress", counted)

    def fetch(_: int = 0) -> bytes:
        return gzip.decompress(ask(site, "/data/large.json", Accept_Encoding="gzip").body)

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(fetch, range(8))) == {(data_dir / "large.json").read_bytes()}
    assert len(times) == 1
    (data_dir / "large.json").write_text(json.dumps(LARGE | {"qParams": {"a": 1}}))
    assert json.loads(fetch())["qParams"] == {"a": 1}
    assert len(times) == 2


def test_compressed_files_are_kept_within_a_limit(monkeypatch):
    monkeypatch.setattr(contents, "KEPT_BYTES", 30_000)
    kept, reads = contents.Zipped(), []

    def file(i: int, data: bytes) -> contents.Content:
        def read() -> bytes:
            reads.append(i)
            return data

        return contents.Content("", len(data), read, "tag", Path(str(i)))

    files = [file(i, os.urandom(5000) + bytes(contents.LARGE_BYTES)) for i in range(6)]
    for content in [*files, *reversed(files)]:
        assert gzip.decompress(kept.read(content)) == content.read()
        reads.pop()
    again = reads[6:]  # those that were no longer kept
    assert reads[:6] == [0, 1, 2, 3, 4, 5] and again == sorted(again, reverse=True)
    assert 0 in again and not {4, 5} & set(again)  # each takes between 5,000 and 10,000


@pytest.mark.parametrize("path", ["/", "/data/large.json", "/data/sally.json", "/util.js"])
@pytest.mark.parametrize("coding", ["identity", "gzip"])
def test_what_the_client_has_is_not_sent_again(site, path, coding):
    tag = ask(site, path, Accept_Encoding=coding).headers["ETag"]
    assert tag[0] == tag[-1] == '"'
    for known in (tag, f"W/{tag}", f'"other", {tag}', "*"):
        answer = ask(site, path, If_None_Match=known, Accept_Encoding=coding)
        assert (answer.status, answer.body) == (304, b"")
        assert answer.headers["ETag"] == tag
    answer = ask(site, path, If_None_Match='"other"', Accept_Encoding=coding)
    assert answer.status == 200 and answer.body


def test_tag_changes_with_the_form_and_with_the_file(site, data_dir):
    def tag(coding: str) -> str:
        return ask(site, "/data/large.json", Accept_Encoding=coding).headers["ETag"]

    plain, zipped = tag("identity"), tag("gzip")
    assert plain != zipped
    assert ask(site, "/data/large.json", If_None_Match=zipped, Accept_Encoding="x").status == 200
    assert save(site, NEW, "large").status == 200
    assert {tag("identity"), tag("gzip")}.isdisjoint({plain, zipped})


# Where files may lie ------------------------------------------------------------------------------

OUTSIDE = [
    "/data/../secret.json",
    "/data/scan/../../secret.json",
    "/data/%2e%2e/secret.json",
    "/data/%2E./secret.json",
    "/data/%252e%252e/secret.json",
    "/data/%252e%252e%252fsecret.json",
    "/data/..%2fsecret.json",
    "/data/..%5csecret.json",
    "/data/..\\secret.json",
    "/data/..;/secret.json",
    "/data/..%00/secret.json",
    "/data/sally.json%00",
    "/data/sally.json%0a",
    "/data/./sally.json",
    "/data//sally.json",
    "/data/sally.json/",
    "/data/%c0%ae%c0%ae/secret.json",
    "/data/%ff.json",
    "/data/caf\u00e9.json",
    "/data/out.json",
    "/data/up/secret.json",
    "/data/up/graphs/sally.json/../../secret.json",
    "/data/circle.json",
    "/data/notes.txt",
    "/data/.sally.json.0123.tmp",
    "/data/%2esally.json.0123.tmp",
    "/data/folder.json",
    "/data/scan",
    "/data/scan/",
    "/data/",
    "/data",
    "/data//etc/hostname",
    "/data/%2fetc/hostname",
    "/graph_data/%2fetc/hostname",
    "/graph_data//etc/hostname",
    "/graph_data/../secret.json",
    "/graph_data/C:/secret.json",
    "/graph_data/" + "a" * 5000 + ".json",
    "/data/" + "a/" * 5000 + "x.json",
    "/../secret.json",
    "//../secret.json",
    "/%2e%2e/secret.json",
    "/..%2fsecret.json",
    "/../local_server.py",
    "/qk/../secret.json",
    "/qk/%2e%2e/pyproject.toml",
    "/qk/lib/../../pyproject.toml",
    "/qk/",
    "/qk",
    "/attribution_graph/",
    "/attribution_graph/../../local_server.py",
    "/README.md",
    "/addition/..%2f..%2flocal_server.py",
    "http://127.0.0.1/data/../secret.json",
    "http://127.0.0.1/data/sally.json",
    "data/sally.json",
    "*",
    "?",
    "",
]


@pytest.mark.parametrize("target", OUTSIDE)
def test_nothing_else_can_be_read(site, target):
    hostname = Path("/etc/hostname")
    for method in ("GET", "HEAD"):
        data = f"{method} {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        received = raw(site, data.encode())
        assert 400 <= status(received) < 500
        assert SECRET.encode() not in received and b"graphs" not in received
        assert b"Sally" not in received and b"Traceback" not in received
        if hostname.is_file():
            assert hostname.read_bytes() not in received


def test_a_slug_may_begin_with_a_dot(site, data_dir):
    (data_dir / ".sally.json").write_bytes((data_dir / "sally.json").read_bytes())
    assert ask(site, "/graph_data/.sally.json").status == 200


def test_features_of_local_transcoders(start, tmp_path):
    folder = tmp_path / "features"
    folder.mkdir()
    (folder / "layer_0.bin").write_bytes(bytes(range(100)))
    (folder / "index.json.gz").write_bytes(gzip.compress(b"[]"))
    (folder / "secret.txt").write_text(SECRET)
    site = start(features_dir=folder)
    assert ask(site, "/features/index.json.gz").body == gzip.compress(b"[]")
    assert ask(site, "/features/secret.txt").status == 404
    assert ask(site, "/features/../features/layer_0.bin").status == 404
    part = ask(site, "/features/layer_0.bin", Range="bytes=10-19")
    assert (part.status, part.body) == (206, bytes(range(10, 20)))
    assert part.headers["Content-Range"] == "bytes 10-19/100"
    assert ask(site, "/features/layer_0.bin", Range="bytes=90-500").body == bytes(range(90, 100))
    assert ask(site, "/features/layer_0.bin", Range="bytes=90-").body == bytes(range(90, 100))
    beyond = ask(site, "/features/layer_0.bin", Range="bytes=100-200")
    assert (beyond.status, beyond.headers["Content-Range"]) == (416, "bytes */100")
    for odd in ("bytes=-5", "bytes=0-1,3-4", "lines=1-2", "bytes=a-b"):  # as if it were not there
        assert ask(site, "/features/layer_0.bin", Range=odd).body == bytes(range(100))
    assert ask(start(), "/features/layer_0.bin").status == 404
    with pytest.raises(UserError, match="absent does not exist"):
        server.serve(tmp_path, server.next_free_port(18032), features_dir=tmp_path / "absent")


def test_pipes_are_not_opened(site, data_dir):
    os.mkfifo(data_dir / "pipe.json")
    assert ask(site, "/data/pipe.json").status == 404


def test_unreadable_file(site, data_dir, monkeypatch):
    def unreadable(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", unreadable)
    answer = ask(site, "/data/sally.json")
    assert answer.status == 404 and str(data_dir) not in answer.body.decode()


# Who may ask --------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:80", "LocalHost.:8032", "[::1]:1234", "x.localhost",
                                  "192.168.1.7:8032", "[fe80::1]", socket.gethostname()])  # fmt: skip
def test_names_of_this_machine(site, host):
    assert ask(site, "/data/sally.json", Host=host).status == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8032", "localhost.evil.example", "127.0.0.1.evil.example",
                                  "1.2.3", "[::x]", "notlocalhost"])  # fmt: skip
def test_other_names_are_refused(site, host):
    for method, path in (("GET", "/data/sally.json"), ("GET", "/"), ("POST", "/save_graph/sally")):
        answer = ask(site, path, method, Host=host)
        assert answer.status in (400, 403) and b"Sally" not in answer.body


@pytest.mark.parametrize("hosts", ["", "Host:\r\n", "Host: a b\r\n", "Host: localhost@evil.example\r\n",
                                   "Host: localhost\r\nHost: localhost\r\n"])  # fmt: skip
@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_one_host_is_needed(site, hosts, version):
    assert status(raw(site, f"GET / HTTP/{version}\r\n{hosts}\r\n".encode())) == 400


def test_name_given_as_host_is_known(start, monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "Machine.example")
    find = socket.getaddrinfo
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, *args, **options: find("127.0.0.1", *args, **options),
    )
    site = start(host="graphs.example")
    assert site.url.startswith("http://graphs.example:")
    for name in ("graphs.example", "machine.example", "machine"):
        assert ask(site, "/", Host=name).status == 200
    assert ask(site, "/", Host="other.example").status == 403


def test_other_origins_are_refused(site, data_dir):
    before = (data_dir / "sally.json").read_bytes()
    origins = ["http://evil.example", "null", "http://localhost:1", "https://127.0.0.1:1", ""]
    origins += ["file://", f"ftp://127.0.0.1:{port_of(site)}", f"{site.url}.evil.example"]
    for origin in origins:
        assert save(site, NEW, Origin=origin).status == 403
        assert ask(site, "/data/sally.json", Origin=origin).status == 403
    assert (data_dir / "sally.json").read_bytes() == before


def test_own_origin_is_taken_also_through_a_tunnel(site):
    assert save(site, NEW, Origin=site.url).status == 200
    assert save(site, NEW, Origin="http://localhost:5000", Host="localhost:5000").status == 200
    assert save(site, NEW, Origin="https://x.localhost", Host="X.localhost").status == 200


def test_other_sites_may_link_here_but_not_load(site):
    other = {"Sec_Fetch_Site": "cross-site"}
    for mode in ("no-cors", "cors", "websocket"):
        assert ask(site, "/data/sally.json", Sec_Fetch_Mode=mode, **other).status == 403
    assert ask(site, "/data/sally.json", **other).status == 403
    assert ask(site, "/", Sec_Fetch_Mode="navigate", **other).status == 200
    assert ask(site, "/", Sec_Fetch_Mode="cors", Sec_Fetch_Site="same-origin").status == 200


@pytest.mark.parametrize(
    "method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "POST"]
)
def test_other_methods_are_refused(site, method):
    answer = ask(site, "/data/sally.json", method)
    assert (answer.status, answer.headers["Allow"]) == (405, "GET, HEAD")
    answer = ask(site, "/save_graph/sally", "GET" if method == "POST" else method)
    assert (answer.status, answer.headers["Allow"]) == (405, "POST")


@pytest.mark.parametrize("data", [b"\r\n\r\n", b"nonsense\r\n\r\n", b"GET / HTTP/9\r\n\r\n", b"BREW / HTTP/1.1\r\nHost: localhost\r\n\r\n",
                                  b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\r\n\r\n",
                                  b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n"])  # fmt: skip
def test_damaged_requests(site, data):
    received = raw(site, data)
    assert received == b"" or (status(received) >= 400 and b"nosniff" in received)
    assert ask(site, "/").status == 200


# Saving -------------------------------------------------------------------------------------------


def test_save_replaces_the_parameters_and_nothing_else(site, data_dir):
    before = (data_dir / "sally.json").read_text(encoding="utf-8")
    answer = save(site, NEW)
    assert (answer.status, answer.json) == (200, {"saved": "sally"})
    text = (data_dir / "sally.json").read_text(encoding="utf-8")
    old, new = (
        json.dumps(p, separators=s) for p, s in ((GRAPH["qParams"], None), (NEW, (",", ":")))
    )
    assert before.count(old) == 1 and text == before.replace(old, new)  # to the byte
    assert ask(site, "/data/sally.json").json == GRAPH | {"qParams": NEW}
    left = [path.name for path in data_dir.iterdir() if path.name.endswith(".tmp")]
    assert left == [".sally.json.0123.tmp"]  # the fixture's own


def test_save_takes_what_the_page_sends(site, data_dir):
    parameters = {"pinnedIds": "", "clickedId": None, "clerps": '[["1","näme 🙂 \ud83d"]]', "n": 3,
                  "isTrue": True, "sg_pos": "", "supernodes": [["a", "b"], []]}  # fmt: skip
    assert save(site, parameters).status == 200
    assert json.loads((data_dir / "sally.json").read_bytes())["qParams"] == parameters


@pytest.mark.parametrize("digest", [DIGEST, None])
def test_a_file_of_another_graph_is_not_saved_into(site, data_dir, digest):
    """The page shows one graph, and its file holds another one by now."""
    path = data_dir / "sally.json"
    info = {} if digest is None else {"info": {"digest": digest}}
    path.write_text(json.dumps(GRAPH | {"metadata": info}))
    before = path.read_bytes()
    others = [{"digest": OTHER_DIGEST}, {"digest": [1]}, {"digest": None if digest else DIGEST}]
    for other in others:
        answer = save(site, NEW, more=other)
        assert answer.status == 409 and "replaced by another graph" in answer.json["error"]
    assert path.read_bytes() == before
    assert save(site, NEW, more={"digest": digest}).status == 200
    assert json.loads(path.read_bytes())["qParams"] == NEW


def test_graph_behind_a_link_within_the_folder_is_saved_there(site, data_dir):
    assert save(site, NEW, "inner").status == 200
    assert (data_dir / "inner.json").is_symlink()
    assert json.loads((data_dir / "sally.json").read_bytes())["qParams"] == NEW


@pytest.mark.parametrize("slug", ["absent", "graph-metadata", "..", "%2e%2e", "a/b", "a%2fb", "..%2fsecret", ".hidden",
                                  "out", "circle", "folder", "%00", "scan/7", "", "sally.json", "s%C3%A4lly"])  # fmt: skip
def test_only_graphs_of_the_folder_are_saved(site, data_dir, tmp_path, slug):
    def contents() -> dict[Path, bytes]:
        files = (path for path in tmp_path.rglob("*.json") if path.name != "circle.json")
        return {path: path.read_bytes() for path in files if path.is_file()}

    before = contents()
    assert save(site, NEW, slug).status in (400, 404)
    assert contents() == before


BODIES = [
    (b"", "is not JSON"),
    (b"{", "is not JSON"),
    (b"\xff\xfe", "is not JSON"),
    ('{"qParams": {}}'.encode("utf-16"), "is not JSON"),
    (b'{"qParams": {"a": NaN}}', "NaN is no number"),
    (b'{"qParams": {"a": -Infinity}}', "-Infinity is no number"),
    (b'{"qParams": {"a": 1e999}}', "infinite"),
    (b'{"qParams": {"a": ' + b"9" * 5000 + b"}}", "is not JSON"),
    (b"[" * 200_000, "nested too deeply"),
    (b'{"qParams": {"a": ' + b"[" * 9 + b"]" * 9 + b"}}", "nested more than 8"),
    (b'{"qParams": {"a": ' + b'{"a": ' * 500 + b"1" + b"}" * 500 + b"}}", "nested more than 8"),
    (b"[]", "must be"),
    (b"null", "must be"),
    (b'"qParams"', "must be"),
    (b"{}", "must be"),
    (b'{"qParams": null}', "must be"),
    (b'{"qParams": [1]}', "must be"),
    (b'{"qParams": "a"}', "must be"),
]


@pytest.mark.parametrize(("body", "reason"), BODIES)
def test_malformed_bodies_are_refused(site, data_dir, body, reason):
    before = (data_dir / "sally.json").read_bytes()
    answer = ask(site, "/save_graph/sally", "POST", body, Content_Type="application/json")
    assert answer.status == 400 and reason in answer.json["error"]
    assert (data_dir / "sally.json").read_bytes() == before


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "json"]
)
def test_only_json_is_saved(site, kind):
    """What a page elsewhere can send without being asked is refused by its type alone."""
    body = json.dumps({"qParams": NEW})
    assert ask(site, "/save_graph/sally", "POST", body, Content_Type=kind).status == 415
    assert ask(site, "/save_graph/sally", "POST", body).status == 415
    kind = "application/json; charset=utf-8"
    assert ask(site, "/save_graph/sally", "POST", body, Content_Type=kind).status == 200


def post(*headers: str, body: bytes = b"", connection: str = "close") -> bytes:
    lines = ["POST /save_graph/sally HTTP/1.1", "Host: localhost", f"Connection: {connection}"]
    return "\r\n".join([*lines, "Content-Type: application/json", *headers, "", ""]).encode() + body


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ((), 411),
        (("Transfer-Encoding: chunked",), 411),
        (("Transfer-Encoding: chunked", "Content-Length: 15"), 411),
        (("Content-Length: -1",), 400),
        (("Content-Length: +15",), 400),
        (("Content-Length: 15, 15",), 400),
        (("Content-Length: 15", "Content-Length: 16"), 400),
        (("Content-Length: \u0661",), 400),
        (("Content-Length: 99999999999999999999999",), 400),
        ((f"Content-Length: {(1 << 20) + 1}",), 413),
        (("Content-Length: 99999999999",), 413),
        (("Content-Length: 10000",), 400),  # more than comes
        (("Content-Length: 14",), 400),  # less than comes
    ],
)
def test_lengths_that_are_missing_or_lie(site, data_dir, headers, expected):
    before = (data_dir / "sally.json").read_bytes()
    received = raw(site, post(*headers, body=b'{"qParams": {}}'))
    assert status(received) == expected and b"Connection: close" in received
    assert received.count(b"HTTP/1.1") == 1
    assert (data_dir / "sally.json").read_bytes() == before


def test_oversized_body_is_answered_before_it_is_read(site):
    body = json.dumps({"qParams": {"a": "x" * (3 << 20)}})
    answer = ask(site, "/save_graph/sally", "POST", body, Content_Type="application/json")
    assert answer.status == 413 and "at most" in answer.json["error"]


def test_body_that_stalls_ends(start, monkeypatch):
    monkeypatch.setattr(Handler, "timeout", 0.3)
    site = start()
    with socket.create_connection(("127.0.0.1", port_of(site)), timeout=10) as connection:
        connection.sendall(post("Content-Length: 100", body=b'{"qPar', connection="keep-alive"))
        assert status(rest(connection)) == 408


def test_body_of_a_get_does_not_become_a_request(site):
    hidden = b"GET /data/sally.json HTTP/1.1\r\nHost: localhost\r\n\r\n"
    head = f"GET /util.js HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(hidden)}\r\n\r\n"
    assert raw(site, head.encode() + hidden).count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize(
    "damaged",
    [b"", b"[]", b"{", b'{"a": NaN}', b'{"a": 1e999}', b"\xff", b"[" * 100_000, b'{"a": ' * 5000],
)
def test_damaged_graph_file_is_left_as_it_is(site, data_dir, damaged):
    (data_dir / "sally.json").write_bytes(damaged)
    answer = save(site, NEW)
    assert answer.status == 422 and "damaged" in answer.json["error"]
    assert (data_dir / "sally.json").read_bytes() == damaged


def test_file_that_cannot_be_written_is_left_as_it_is(site, data_dir, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    before = (data_dir / "sally.json").read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    answer = save(site, NEW)
    assert answer.status == 500 and "is unchanged" in answer.json["error"]
    assert str(data_dir) not in answer.json["error"]
    assert (data_dir / "sally.json").read_bytes() == before


def test_concurrent_saves_leave_one_of_them_whole(site, data_dir):
    versions = [{"pinnedIds": f"{i}", "clerps": str(i) * 50_000} for i in range(24)]
    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda version: save(site, version), versions))
    assert {answer.status for answer in answers} == {200}
    document = json.loads((data_dir / "sally.json").read_bytes())
    assert document["qParams"] in versions
    assert document | {"qParams": None} == GRAPH | {"qParams": None}


SERVER_TO_KILL = """
import sys, time
from circuit_tracer_qk.frontend.server import next_free_port, serve
port = next_free_port(int(sys.argv[2]))
serve(sys.argv[1], port)
print(port, flush=True)
time.sleep(60)
"""


def test_kill_during_a_save_leaves_one_version_whole(data_dir):
    versions = [{"clerps": letter * 400_000} for letter in "ab"]
    whole = [LARGE | {"qParams": parameters} for parameters in versions]
    path = data_dir / "large.json"

    def save_until_killed(running: server.Server) -> None:
        with pytest.raises((ConnectionError, http.client.HTTPException)):
            for n in range(10_000):
                save(running, versions[n % 2], "large")

    for i in range(8):
        argv = [sys.executable, "-c", SERVER_TO_KILL, str(data_dir), str(18432 + 20 * i)]
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        running = server.Server(f"http://127.0.0.1:{int(process.stdout.readline())}", lambda: None)
        assert save(running, versions[0], "large").status == 200
        size, names = path.stat().st_size, set(os.listdir(data_dir))
        with ThreadPoolExecutor(1) as pool:
            saving = pool.submit(save_until_killed, running)
            while path.stat().st_size == size and set(os.listdir(data_dir)) <= names:
                assert not saving.done()
            time.sleep(0.0005 * i)  # from the first byte until after the exchange
            process.send_signal(signal.SIGKILL)
            saving.result()
        process.wait()
        process.stdout.close()
        assert json.loads(path.read_bytes()) in whole
        for name in set(os.listdir(data_dir)) - names:  # what a kill leaves is not served
            assert name.startswith(".")


# Many clients -------------------------------------------------------------------------------------


def test_many_clients_beside_idle_connections(site):
    with ExitStack() as held:
        for i in range(20):
            idle = held.enter_context(socket.create_connection(("127.0.0.1", port_of(site))))
            idle.sendall(b"GET /data/sal"[: i % 14])
        paths = ["/data/large.json", "/", "/util.js", "/graph_data/sally.json", "/qk/config.json"]
        begun = time.monotonic()
        with ThreadPoolExecutor(50) as pool:
            answers = list(pool.map(lambda i: ask(site, paths[i % len(paths)]), range(200)))
        assert {answer.status for answer in answers} == {200}
        assert time.monotonic() - begun < 10


def test_idle_connections_end(start, monkeypatch):
    monkeypatch.setattr(Handler, "timeout", 0.2)
    site = start()
    for sent in (b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", port_of(site)), timeout=10) as connection:
            connection.sendall(sent)
            while connection.recv(1 << 16):
                pass


def test_connections_are_limited(start, monkeypatch):
    monkeypatch.setattr(listener, "CONNECTIONS", 3)
    site = start()
    held = [socket.create_connection(("127.0.0.1", port_of(site)), timeout=10) for _ in range(4)]
    assert held[3].recv(1) == b""
    for connection in held:
        connection.close()


def test_one_connection_takes_many_requests(site):
    connection = http.client.HTTPConnection("127.0.0.1", port_of(site), timeout=10)
    connection.connect()
    first, begun = connection.sock, time.monotonic()
    body, kind = json.dumps({"qParams": NEW}), {"Content-Type": "application/json"}
    for _ in range(20):
        for method, path in (("GET", "/data/sally.json"), ("HEAD", "/"), ("GET", "/absent")):
            connection.request(method, path)
            connection.getresponse().read()
        connection.request("POST", "/save_graph/sally", body, kind)
        assert connection.getresponse().read()
    assert connection.sock is first
    assert time.monotonic() - begun < 2  # nothing waits for a packet to fill up
    connection.close()


def test_large_answer_to_a_slow_client_is_whole(start, monkeypatch, data_dir):
    """The timeout is for a client that takes nothing, not for one that takes long."""
    monkeypatch.setattr(Handler, "timeout", 0.5)
    (data_dir / "huge.json").write_bytes(b" " * (16 << 20))
    site, received = start(), 0
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        connection.connect(("127.0.0.1", port_of(site)))
        connection.sendall(b"GET /data/huge.json HTTP/1.0\r\nHost: localhost\r\n\r\n")
        while chunk := connection.recv(1 << 16):
            received += len(chunk)
            time.sleep(0.005)
    assert received > 16 << 20


def test_client_that_goes_away_is_no_error(site, capfd):
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", port_of(site))) as connection:
            linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"  # closes with a reset
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            connection.sendall(b"GET /data/large.json HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert ask(site, "/data/large.json").status == 200
    time.sleep(0.1)
    assert capfd.readouterr() == ("", "")


# Addresses and ends -------------------------------------------------------------------------------


def test_stop_closes_open_connections_and_frees_the_port(start, data_dir):
    site = start()
    port = port_of(site)
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(b"GET /data/sally.json HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.recv(1 << 16)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: site.stop(), range(4)))
        with pytest.raises(ConnectionError):
            ask(site, "/")
        again = server.serve(data_dir, port)
        assert ask(again, "/").status == 200
        again.stop()


def test_process_ends_although_a_server_runs(data_dir):
    program = SERVER_TO_KILL.replace("time.sleep(60)", "")
    argv = [sys.executable, "-c", program, str(data_dir), "18632"]
    result = subprocess.run(argv, capture_output=True, text=True, timeout=20)
    assert (result.returncode, result.stderr) == (0, "")


def test_serving_loads_no_torch(data_dir):
    program = (
        "import sys\nimport circuit_tracer_qk.frontend.server\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_missing_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="absent does not exist"):
        ctqk.serve(tmp_path / "absent")


def test_port_0_is_any_free_one(data_dir):
    sites = [ctqk.serve(data_dir, port=0) for _ in range(2)]
    try:
        assert len({port_of(site) for site in sites}) == 2
        assert all(ask(site, "/data/sally.json").json == GRAPH for site in sites)
        assert server.next_free_port(0) == 0
    finally:
        for site in sites:
            site.stop()


def test_start_server_takes_port_0(data_dir, monkeypatch, capsys):
    seen: list[str] = []

    def look(seconds: float) -> None:
        match = re.search(r"open (\S+?)/? ", capsys.readouterr().out)
        assert match is not None
        with urllib.request.urlopen(f"{match[1]}/data/sally.json", timeout=10) as answer:
            seen.append(json.load(answer))
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", look)
    assert cli.main(["start-server", "--graph_file_dir", str(data_dir), "--port", "0"]) == cli.DONE
    assert seen == [GRAPH]


def test_a_cell_run_twice_is_told_what_serves_there(data_dir):
    site = ctqk.serve(data_dir, port=0)
    with pytest.raises(
        UserError, match=rf"is in use: this process serves at {site.url} already.*\.stop\(\)"
    ):
        ctqk.serve(data_dir, port=port_of(site))
    site.stop()
    ctqk.serve(data_dir, port=port_of(site)).stop()


@pytest.mark.parametrize("port", [-1, 65536])
def test_port_out_of_range_is_refused(data_dir, port):
    with pytest.raises(UserError, match=f"port is {port}: it must be a whole number from 0"):
        ctqk.serve(data_dir, port=port)
    if port != 65536:
        with pytest.raises(UserError, match="port is "):
            server.next_free_port(port)


def test_taken_port_is_refused_and_the_next_one_found(data_dir, taken):
    with pytest.raises(UserError, match=f"port {taken} is in use"):
        ctqk.serve(data_dir, port=taken)
    assert taken < server.next_free_port(taken) <= server.LAST_PORT


def test_port_that_was_taken_meanwhile_is_refused(data_dir, taken, monkeypatch):
    monkeypatch.setattr(server, "check_port", lambda port, host: None)
    with pytest.raises(UserError, match=f"port {taken} is in use"):
        ctqk.serve(data_dir, port=taken)


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid", "a..b", "2001:db8::1"])
def test_host_of_another_machine_is_refused(data_dir, host, monkeypatch):
    if host.endswith("invalid"):  # asked of no name server
        monkeypatch.setattr(socket, "getaddrinfo", failing_lookup)
    for refused in (
        server.next_free_port,
        lambda *args: server.serve(data_dir, args[0], host=host),
    ):
        with pytest.raises(UserError, match="is no address of this machine"):
            refused(18032, host)


def failing_lookup(*args: Any, **options: Any) -> Any:
    raise socket.gaierror(socket.EAI_NONAME, "unknown")


@pytest.mark.skipif(sys.platform != "linux", reason="needs a second loopback address")
def test_only_the_given_address_is_listened_to(site):
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port_of(site)), timeout=10)


def test_addresses_that_others_reach():
    assert not any(map(server.is_public, ("127.0.0.1", "127.0.0.9", "localhost", "::1", "[::1]")))
    assert all(map(server.is_public, ("0.0.0.0", "::", "192.0.2.1", "2001:db8::1")))


def test_every_address(start):
    site = start(host="0.0.0.0")
    assert site.url == f"http://127.0.0.1:{port_of(site)}"
    assert urllib.request.urlopen(f"{site.url}/data/sally.json", timeout=10).status == 200


@pytest.mark.parametrize("host", ["::1", "[::1]", "::"])
def test_ipv6(start, host):
    try:
        site = start(host=host)
    except UserError:
        pytest.skip("this machine has no IPv6")
    assert site.url.startswith("http://127.0.0.1:" if host == "::" else "http://[::1]:")
    assert urllib.request.urlopen(f"{site.url}/data/sally.json", timeout=10).status == 200
