"""The served page: files on the address it gives, ports, and stopping."""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

import circuit_tracer_qk as ctqk
from circuit_tracer_qk import UserError, server


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """A folder as create_graph_files leaves it."""
    (tmp_path / "graph-metadata.json").write_text('{"graphs": [{"slug": "sally"}]}')
    (tmp_path / "sally.json").write_text('{"qParams": {}}')
    return tmp_path


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that another server listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def read(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read()


def test_page_and_graphs_are_served_until_stopped(data_dir):
    port = server.next_free_port(18032)
    running = ctqk.serve(data_dir, port=port)
    try:
        assert running.url.endswith(f":{port}")
        assert b"<!DOCTYPE html>" in read(f"{running.url}/index.html")
        listed = json.loads(read(f"{running.url}/data/graph-metadata.json"))
        assert listed["graphs"][0]["slug"] == "sally"
        assert json.loads(read(f"{running.url}/data/sally.json")) == {"qParams": {}}
    finally:
        running.stop()
    running.stop()
    with pytest.raises(urllib.error.URLError):
        read(f"{running.url}/index.html")
    server.check_port(port)


def test_missing_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="absent does not exist"):
        ctqk.serve(tmp_path / "absent")


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_port_out_of_range_is_refused(data_dir, port):
    with pytest.raises(UserError, match=f"port {port} is out of range"):
        ctqk.serve(data_dir, port=port)
    if port != 65536:
        with pytest.raises(UserError, match="out of range"):
            server.next_free_port(port)


def test_taken_port_is_refused_and_the_next_one_found(data_dir, taken):
    with pytest.raises(UserError, match=f"port {taken} is in use"):
        ctqk.serve(data_dir, port=taken)
    assert taken < server.next_free_port(taken) <= server.LAST_PORT


def test_port_that_was_taken_meanwhile_is_refused(data_dir, taken, monkeypatch):
    monkeypatch.setattr(server, "_bind", lambda port: None)
    with pytest.raises(UserError, match=f"port {taken} is in use"):
        ctqk.serve(data_dir, port=taken)
