"""``graph.show()``: the graph's page in a notebook, served from its process."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.serving import ask

import circuit_tracer_qk as ctqk
from circuit_tracer_qk.attribution import shown

PROMPT = "I always loved visiting Aunt Sally. Whenever I was feeling sad, Aunt"


@pytest.fixture(scope="module")
def model() -> ctqk.ResidualModel:
    return ctqk.load_model(device="cpu")


@pytest.fixture(scope="module")
def graph(model: ctqk.ResidualModel) -> ctqk.ResidualGraph:
    return ctqk.attribute(PROMPT, model, max_feature_nodes=60)


@pytest.fixture
def page(graph) -> Iterator[ctqk.ShownGraph]:
    page = graph.show()
    yield page
    page.stop()


def server_of(page: ctqk.ShownGraph) -> ctqk.Server:
    return ctqk.Server(page.url.partition("/index.html")[0], page.stop)


def test_the_page_is_served_and_answers_for_any_head(graph, page) -> None:
    server = server_of(page)
    assert page.url == f"{server.url}/index.html?slug=graph"
    assert ask(server, "/index.html?slug=graph").status == 200
    assert ask(server, "/graph_data/graph.json").json["metadata"]["slug"] == "graph"
    table = ask(server, "/qk/table/graph?layer=0&head=0&query=3&key=1")
    score = graph.qk(0, 0, 3, 1).score
    assert table.json["table"]["score"] == pytest.approx(score, rel=1e-6)


def test_a_graph_shown_twice_is_served_once(graph, page) -> None:
    again = graph.show(height=400)
    assert (again.url, again.folder) == (page.url, page.folder)
    assert 'height="400"' in again._repr_html_() and 'height="400"' not in page._repr_html_()


def test_stopping_frees_the_port_and_removes_the_temporary_folder(graph) -> None:
    page = graph.show()
    assert (page.folder / "graph.json").is_file()
    page.stop()
    page.stop()
    assert not page.folder.exists()
    with pytest.raises(ConnectionError):
        ask(server_of(page), "/")
    again = graph.show()  # opens anew
    assert ask(server_of(again), "/").status == 200
    again.stop()


def test_files_in_a_named_folder_stay_and_the_model_can_steer(graph, model, tmp_path: Path) -> None:
    page = graph.show(tmp_path / "g", "sally", model=model)
    assert page.folder == tmp_path / "g" and page.url.endswith("?slug=sally")
    assert "sally" in json.dumps(ask(server_of(page), "/qk/config.json").json["steerable"])
    page.stop()
    assert (tmp_path / "g" / "sally.json").is_file()


def test_a_notebook_shows_a_frame_and_elsewhere_the_address_is_printed(
    graph, page, capsys, monkeypatch
) -> None:
    graph.show()
    assert capsys.readouterr().out == f"{page.url}\n"
    shell = SimpleNamespace(kernel=None)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    graph.show()
    assert capsys.readouterr().out == ""
    assert page._repr_html_().startswith(f'<iframe src="{page.url}" ')
    assert repr(page) == f"ShownGraph({page.url})"


def test_what_cannot_be_shown_is_refused_and_leaves_nothing(graph, tmp_path: Path) -> None:
    with pytest.raises(ctqk.UserError, match="slug"):
        graph.show(tmp_path / "g", "no slug")
    other = ctqk.load_model(dictionaries="miniature-wcc", device="cpu")
    with pytest.raises(ctqk.UserError, match="give the model that made it"):
        graph.show(tmp_path / "g", model=other)
    assert not (tmp_path / "g").exists()


def test_without_the_package_whole_a_sentence_says_so(graph, monkeypatch) -> None:
    monkeypatch.setattr(shown, "opener", None)
    with pytest.raises(ctqk.UserError, match="import circuit_tracer_qk"):
        graph.show()
