"""Public functions with values of any kind: a result, or one sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.fuzzing import ANYTHING, TEXTS, leftovers, one_sentence, run_cases
from hypothesis import strategies as st

import circuit_tracer_qk as ctqk

pytestmark = pytest.mark.filterwarnings("ignore")

PROMPT = "I met Aunt Sally. I like Aunt"
INDEX = st.integers(-2, 16) | ANYTHING | st.sampled_from([np.int64(1), torch.tensor(2)])
NODES = st.lists(st.integers(-2, 900), max_size=3) | ANYTHING | st.just(torch.tensor([3, 700]))
HEADS = st.sampled_from(["L1H2", (1, 2), [(0, 0), "L1H1"], "L9H9", "L1H", (1, 2, 3)]) | ANYTHING
FEATURES = st.sampled_from(["L0/61", ["L0/61", "in/3"], 61, "bias", "all", "L9/1"]) | ANYTHING
SIDE = st.sampled_from(["query", "key"]) | ANYTHING
FACTOR = st.sampled_from([0, 0.5, -1, None]) | ANYTHING


def optional(**strategies: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=strategies)


EDIT = st.fixed_dictionaries(
    {"heads": HEADS, "side": SIDE, "features": FEATURES},
    optional={"checkpoint": INDEX, "positions": NODES, "factor": FACTOR, "inject": FACTOR},
)


@pytest.fixture(scope="module")
def model() -> ctqk.ResidualModel:
    return ctqk.load_model(device="cpu")


@pytest.fixture(scope="module")
def graph(model: ctqk.ResidualModel) -> ctqk.ResidualGraph:
    return ctqk.attribute(PROMPT, model, max_feature_nodes=60)


def surface(
    model: ctqk.ResidualModel, graph: ctqk.ResidualGraph, folder: Path
) -> st.SearchStrategy[Callable[[], Any]]:
    """Calls of every public function."""
    table = graph.qk(1, 2, 6, 3)

    def call(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        given = st.tuples(*args) if args else st.just(())
        keywords = options.pop("keywords", st.just({}))
        return st.tuples(given, keywords).map(lambda g: (function, *g))

    def edited(function: Callable[..., Any], *more: Any) -> Any:
        made = st.lists(EDIT, min_size=1, max_size=2)
        how = optional(
            norms=st.sampled_from(["live", "frozen"]) | ANYTHING,
            freeze=st.sampled_from(["none", "patterns"]) | ANYTHING,
            controls=st.integers(-1, 2) | ANYTHING,
            seed=ANYTHING,
        )

        def run(edits: Any, rest: Any, **options: Any) -> Any:
            options.setdefault("controls", 0)
            return function(model, PROMPT, [ctqk.QKEdit(**e) for e in edits], *rest, **options)

        return st.tuples(st.tuples(made, st.tuples(*more)), how).map(lambda g: (run, *g))

    files = optional(
        node_threshold=st.floats(0, 1) | ANYTHING,
        edge_threshold=st.floats(0, 1) | ANYTHING,
        qk=st.booleans() | ANYTHING,
        max_tables=st.integers(0, 5) | ANYTHING,
        max_bytes=ANYTHING,
        top_terms=st.integers(1, 5) | ANYTHING,
        max_file_bytes=ANYTHING,
        np_model=ANYTHING,
        scan=ANYTHING,
    )
    attributed = optional(
        max_n_logits=st.integers(1, 3) | ANYTHING,
        desired_logit_prob=st.floats(0, 1) | ANYTHING,
        batch_size=st.integers(1, 64) | ANYTHING,
        attribution_targets=st.just([" Sally"]) | st.just([3, 4]) | ANYTHING,
        select=st.sampled_from(["explained", "circuit-tracer"]) | ANYTHING,
        verbose=ANYTHING,
    ).map(lambda o: {"max_feature_nodes": 20} | o)
    prompt = st.just(PROMPT) | st.lists(st.integers(-2, 600), max_size=6) | ANYTHING
    return st.one_of(
        call(graph.qk, INDEX, INDEX, INDEX, INDEX),
        call(graph.qk_row, INDEX, INDEX, INDEX),
        call(graph.qk_top, INDEX, INDEX, INDEX, INDEX),
        call(lambda places, n: list(graph.qk_tops(places, n)), st.lists(NODES, max_size=2), INDEX),
        call(graph.edge, INDEX, INDEX),
        call(graph.edges, NODES, NODES),
        call(graph.strongest, NODES, INDEX, INDEX),
        call(table.top, INDEX),
        call(ctqk.carriers, st.just(graph), keywords=optional(query=INDEX, key=INDEX, node=INDEX)),
        call(
            ctqk.select_heads,
            st.just(graph),
            keywords=optional(query=INDEX, key=INDEX, count=INDEX, share=FACTOR),
        ),
        call(lambda **edit: ctqk.QKEdit(**edit), keywords=EDIT),
        call(ctqk.HeadEdit, HEADS, FACTOR, NODES),
        call(ctqk.attribute, prompt, st.just(model), keywords=attributed),
        call(ctqk.explain, prompt, st.just(model)),
        edited(ctqk.steer),
        edited(ctqk.sweep, NODES | st.just([0, 1])),
        edited(ctqk.generate, st.integers(1, 2) | ANYTHING),
        call(ctqk.create_graph_files, st.just(graph), TEXTS, st.just(folder), keywords=files),
        call(ctqk.create_graph_files, ANYTHING, st.just("s"), st.just(folder)),
        call(ctqk.load_graph, ANYTHING),
        call(ctqk.load_dictionaries, ANYTHING),
        call(ctqk.load_model, ANYTHING, st.just("miniature-sae")),
        call(lambda port, host: ctqk.serve(folder, port, host=host).stop(), ANYTHING, ANYTHING),
    )


def test_public_functions(
    model: ctqk.ResidualModel,
    graph: ctqk.ResidualGraph,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "graphs"

    def check(case: Any) -> None:
        function, args, keywords = case
        with one_sentence():
            function(*args, **keywords)
        assert not leftovers(tmp_path)

    run_cases(request.config, surface(model, graph, folder), check)
