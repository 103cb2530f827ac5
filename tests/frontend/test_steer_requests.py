"""Steering over the server: what is answered, what is refused, and what it says then."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, cast

import pytest
from helpers.panel import PROMPT
from helpers.serving import Reply, ask

import circuit_tracer_qk as ctqk
from circuit_tracer_qk import UserError
from circuit_tracer_qk.attribution.head import parse_head
from circuit_tracer_qk.base.package import ROOT
from circuit_tracer_qk.cli import main as cli
from circuit_tracer_qk.frontend import server
from circuit_tracer_qk.frontend.answers import Refusal
from circuit_tracer_qk.frontend.steer_requests import SteerRequest, read_request
from circuit_tracer_qk.plugin import live
from circuit_tracer_qk.plugin.live import LiveGraphs
from circuit_tracer_qk.steering.options import OPTIONS, SteeringOptions
from circuit_tracer_qk.steering.steer import Session
from circuit_tracer_qk.steering.to_json import run_document

FEATURE, POSITION = 61, 6  # of checkpoint 1, at " Sally"
EDIT = f"heads=L1H2&side=key&checkpoint=1&features={FEATURE}&positions={POSITION}&factor=0"


@pytest.fixture(scope="module")
def model() -> ctqk.ResidualModel:
    return ctqk.load_model(device="cpu")


@pytest.fixture(scope="module")
def graph(model: ctqk.ResidualModel) -> ctqk.ResidualGraph:
    return ctqk.attribute(PROMPT, model, max_n_logits=1)


@pytest.fixture(scope="module")
def site(model: Any, graph: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    graphs = LiveGraphs({"sally": graph, "alone": graph}, {"sally": model})
    folder = tmp_path_factory.mktemp("graphs")
    running = server.serve(folder, server.next_free_port(18_300), live=graphs)
    yield running
    running.stop()


def steer(site: server.Server, query: str, slug: str = "sally") -> Reply:
    digest = ask(site, "/qk/config.json").json["live"].get(slug)
    return ask(site, f"/qk/steer/{slug}?digest={digest}&{query}")


# What is answered ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "edit", "options"),
    [
        (EDIT, ctqk.QKEdit("L1H2", "key", 1, FEATURE, POSITION, 0.0), {}),
        (
            "heads=L1H2,L1H3&side=query&checkpoint=1&features=error,84&factor=-0.25&norms=frozen"
            "&freeze=patterns&controls=3&seed=7",
            ctqk.QKEdit(["L1H2", "L1H3"], "query", 1, ["error", 84], None, -0.25),
            {"norms": "frozen", "freeze": "patterns", "controls": 3, "seed": 7},
        ),
        (
            "heads=L2H0&side=key&checkpoint=2&features=5&positions=3,4&inject=12.5&controls=0",
            ctqk.QKEdit("L2H0", "key", 2, 5, [3, 4], inject=12.5),
            {"controls": 0},
        ),
        (
            "heads=L1H2&side=key&features=L0/61,L0/177&factor=0&controls=0",
            ctqk.QKEdit("L1H2", "key", 1, [61, 177], factor=0),
            {"controls": 0},
        ),
        ("heads=L1H2,L1H7&factor=0&positions=14", ctqk.HeadEdit(["L1H2", "L1H7"], 0.0, 14), {}),
    ],
)
def test_an_answer_is_what_steer_says(site, model, graph, query, edit, options):
    answer = steer(site, query + "&query=13")
    assert answer.status == 200
    document = answer.json
    assert re.fullmatch("[0-9a-f]{64}", document.pop("digest"))
    run = ctqk.steer(model, graph.input_tokens, edit, **options)
    for row in document["attention"]:
        head = parse_head(row["head"])
        for name, of in (("before", run.clean), ("after", run)):
            assert row.pop(f"scores_{name}") == of.scores[head][13, :14].tolist()
    leading = [i for of in (run.clean, run) for _, i, _ in of.top(3)]
    tokens = list(dict.fromkeys(leading))
    assert document == json.loads(json.dumps(run_document(run, tokens, [13])))
    assert document["tokens"][0]["before"] == run.clean.top(1)[0][2]
    assert document["edits"] and document["attention"][0]["query"] == 13


def test_frozen_norms_move_the_score_by_the_marginal(site, graph):
    table = graph.qk(1, 2, 14, POSITION)
    at = next(i for i, c in enumerate(table.key) if c.feature == FEATURE)
    document = steer(site, EDIT + "&norms=frozen&controls=0").json
    [row] = document["attention"]
    before, after = (row[f"scores_{name}"][POSITION] for name in ("before", "after"))
    assert before == pytest.approx(table.score, rel=1e-5)
    assert before - after == pytest.approx(float(table.key_marginal[at]), rel=1e-4)


def test_one_session_and_each_answer_once(site, model, graph, monkeypatch):
    made: list[Any] = []
    runs: list[int] = []

    class Counted(Session):
        def __init__(self, *args: Any) -> None:
            made.append(args)
            super().__init__(*args)

        def steer(self, *args: Any, **options: Any) -> Any:
            runs.append(threading.get_ident())
            return super().steer(*args, **options)

    monkeypatch.setattr("circuit_tracer_qk.steering.steer.Session", Counted)
    monkeypatch.setattr(live, "KEPT_ANSWERS", 2)
    graphs = LiveGraphs({"sally": graph}, {"sally": model})
    requests = [read_request(f"{EDIT}&controls=0&seed={seed}") for seed in (0, 1)] * 4
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda request: graphs.steer("sally", request), requests))
    assert len(made) == 1 and len(runs) == 2
    assert answers == [answers[0], answers[1]] * 4
    for request in requests[:2]:  # threads end in any order
        graphs.steer("sally", request)
    graphs.steer("sally", read_request(f"{EDIT}&controls=0&seed=2"))  # the oldest is let go
    graphs.steer("sally", requests[1])
    assert len(runs) == 3
    graphs.steer("sally", requests[0])
    assert len(made) == 1 and len(runs) == 4


def test_tables_do_not_wait_for_a_run(graph, model, monkeypatch):
    graphs = LiveGraphs({"sally": graph}, {"sally": model})
    begun, ended = threading.Event(), threading.Event()
    steer_once = Session.steer

    def slow(*args: Any, **options: Any) -> ctqk.SteeredRun:
        begun.set()
        assert ended.wait(60)
        return steer_once(*args, **options)

    monkeypatch.setattr(Session, "steer", slow)
    with ThreadPoolExecutor(2) as pool:
        try:
            run = pool.submit(graphs.steer, "sally", read_request(EDIT + "&controls=0"))
            assert begun.wait(60)
            assert pool.submit(graphs.table, "sally", 1, 2, 14, 6).result(60)
            assert not run.done()
        finally:
            ended.set()
        assert run.result(60)


def test_the_page_is_told_what_can_be_steered(site):
    config = ask(site, "/qk/config.json").json
    assert (list(config["live"]), config["steerable"]) == (["sally", "alone"], ["sally"])


def test_attribute_keeps_its_model_in_memory(monkeypatch, tmp_path, capsys):
    port = server.next_free_port(18_360)
    configs: list[dict[str, Any]] = []

    def look(seconds: float) -> None:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/qk/config.json") as answer:
            configs.append(json.load(answer))
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", look)
    argv = ["-d", "miniature-sae", "-p", PROMPT, "--slug", "sally", "--max_n_logits", "1"]
    argv += ["--graph_file_dir", str(tmp_path), "--server", "--port", str(port)]
    assert cli.main(["attribute", *argv]) == cli.DONE
    assert configs[0]["steerable"] == ["sally"]


def test_controls_that_mix_features_and_errors_are_documented(site):
    """Names and indices do not compare."""
    answer = steer(site, EDIT.replace(str(FEATURE), f"error,{FEATURE}") + "&controls=2")
    assert answer.status == 200
    for control in answer.json["controls"]:
        assert [1, "error", POSITION] in control["features"]


# What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        (EDIT.replace("L1H2", "L9H2"), "there is no head L9H2"),
        (EDIT.replace("checkpoint=1", "checkpoint=0"), "no dictionary at checkpoint 0"),
        (EDIT.replace("checkpoint=1", "checkpoint=2"), "no decoder vector at checkpoint 1"),
        (EDIT.replace("61", "511"), "is not active at position 6"),
        (EDIT.replace("61", "512"), "there is no feature 512"),
        (EDIT.replace("61", "embedding"), "no component of kind 'embedding'"),
        (EDIT.replace("positions=6", "positions=15"), "position 15 is out of range"),
        (EDIT.replace("factor", "inject").replace("61", "bias"), "cannot be injected"),
        (EDIT.replace("61", "L1/61"), "the edit says checkpoint 1"),
        (EDIT.replace("61", "L0attn/61"), "a feature of an attention graph"),
        (EDIT + "&query=15", "query 15 is out of range"),
        ("heads=L1H8&factor=0", "there is no head L1H8"),
    ],
)
def test_what_steering_refuses(site, query, reason):
    answer = steer(site, query)
    assert answer.status == 422 and reason in answer.json["error"]


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ("", "heads is missing"),
        (EDIT + "&more=1", "what can be given"),
        (EDIT + "&factor=0", "each once"),
        (EDIT + "&inject=1", "either factor or inject"),
        (EDIT.replace("&factor=0", ""), "either factor or inject"),
        (EDIT.replace("side=key&", ""), "side is missing"),
        ("heads=L1H2&inject=1", "side is missing"),
        (EDIT.replace("side=key", "side=value"), "side must be query or key"),
        (EDIT.replace("checkpoint=1&", ""), "checkpoint is missing"),
        (EDIT.replace("checkpoint=1&", "").replace("=61", "=L0/61,5"), "checkpoint is missing"),
        (EDIT.replace("features=61&", ""), "features is missing"),
        *((EDIT.replace("L1H2", heads), "heads must be") for heads in
          ("", "L1H2,", "L1H2, L1H3", "l1h2", "L-1H2", "L١H2", "L12345H0", "(1,2)", "L1H2,L01H2")),
        (EDIT.replace("L1H2", ",".join(f"L{i}H0" for i in range(257))), "at most 256"),
        *((EDIT.replace("=61", f"={features}"), "features must be") for features in
          ("", "61,", "-1", "6e1", "feature", "61,61", "1234567890")),
        *((EDIT.replace("positions=6", f"positions={positions}"), "positions must be") for positions in
          ("", "-1", "6,6", "6;7", "1.0")),
        *((EDIT.replace("factor=0", f"factor={factor}"), "factor must be a decimal number") for factor in
          ("", "nan", "inf", "-inf", "1e3", "100.01", "-101", "+1", ".5", "1.", "0x1", "1_0", "999999999")),
        (EDIT.replace("factor=0", "inject=1000001"), "inject must be a decimal number"),
        (EDIT + "&norms=warm", "norms must be live or frozen"),
        (EDIT + "&freeze=all", "freeze must be none or patterns"),
        (EDIT + "&controls=51", "controls must be .*at most 50"),
        *((f"{EDIT}&{name}=-1", f"{name} must be a whole number") for name in ("controls", "seed", "query")),
        (EDIT.replace("checkpoint=1", "checkpoint="), "checkpoint must be a whole number"),
    ],
)  # fmt: skip
def test_malformed_requests_are_refused(query, reason):
    with pytest.raises(Refusal, match=reason) as refused:
        read_request(query)
    assert refused.value.status == 400


def test_malformed_requests_are_refused_over_the_server(site):
    for query in (EDIT + "&controls=51", EDIT.replace("factor=0", "factor=1e400"), ""):
        answer = steer(site, query)
        assert answer.status == 400 and answer.json["error"].endswith(".")
    assert ask(site, f"/qk/steer/sally?{EDIT}", "POST").status == 405


def test_what_is_left_out(model):
    request = read_request("heads=L1H2&side=key&checkpoint=1&features=3&factor=100.0")
    edit = ctqk.QKEdit("L1H2", "key", 1, 3, factor=100.0)
    assert request == SteerRequest(edit, SteeringOptions(), None)


def test_no_model_in_memory(site, tmp_path):
    answer = steer(site, EDIT, "alone")
    assert answer.status == 422
    assert "no model is in memory" in answer.json["error"] and "--server" in answer.json["error"]
    assert steer(site, EDIT, "another").status == 404
    files = server.serve(tmp_path, server.next_free_port(18_350))
    try:
        assert steer(files, EDIT).status == 404
    finally:
        files.stop()


def test_a_graph_of_transcoders_and_models_of_other_graphs(graph, model):
    transcoders = cast(
        Any, SimpleNamespace(kind="transcoder", writes_examples=False, input_tokens=[0])
    )
    graphs = LiveGraphs({"plt": transcoders})
    with pytest.raises(UserError, match="steering is for residual graphs"):
        graphs.steer("plt", read_request(EDIT))
    with pytest.raises(UserError, match="steering is for residual graphs"):
        LiveGraphs({"plt": transcoders}, {"plt": model})
    with pytest.raises(UserError, match="no graph of that name"):
        LiveGraphs({"sally": graph}, {"sam": model})
    other = cast(Any, SimpleNamespace(scan="another-set"))
    with pytest.raises(UserError, match="another-set: give the model that made it"):
        LiveGraphs({"sally": graph}, {"sally": other})


@pytest.mark.parametrize(
    ("module", "absent"), [("steer_requests", "torch"), ("routes", "torch"), ("routes", "pydantic")]
)
def test_requests_are_read_without_torch(module, absent):
    """The server of plain files starts at once."""
    code = f"import sys, circuit_tracer_qk.frontend.{module}; sys.exit({absent!r} in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT.parent)


def test_the_page_knows_the_options_as_they_are_defined():
    """Its request names each of them; its controls offer the values that are allowed."""
    script = (ROOT.parent / "frontend_patch" / "steer.js").read_text(encoding="utf-8")
    for option in OPTIONS:
        assert re.search(rf"^      {option.name}: ", script, re.MULTILINE), option.name
    assert f"var nControls = {SteeringOptions().controls}\n" in script
    values = {option.name: option.values for option in OPTIONS if option.values}
    offered = re.search(r"addSelect\('norms'.*option', \[(.*?)\]\)", script)
    assert offered and sorted(re.findall(r"'(\w+)'", offered[1])) == sorted(values["norms"])
    checked = re.search(r"set\(\{freeze: this.checked \? '(\w+)' : '(\w+)'", script)
    assert checked and sorted(checked.groups()) == sorted(values["freeze"])
