"""circuit-tracer's own entry points with heads, and put back as they were."""

from __future__ import annotations

import inspect
import json
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import circuit_tracer
import pytest
import torch
from helpers.architectures import prompt_ids, save_tiny
from helpers.random_transcoders import replacement_model

import circuit_tracer_qk as ctqk
from circuit_tracer_qk.frontend.server import next_free_port
from circuit_tracer_qk.host.patching import FUNCTIONS, METHODS

OPTIONS: dict[str, Any] = {"max_n_logits": 2, "max_feature_nodes": 30, "batch_size": 16}


def held() -> dict[str, Any]:
    """Everything that circuit-tracer's modules hold under an entry point's name."""
    from circuit_tracer.replacement_model import ReplacementModel

    found = {
        f"{module}.{name}": vars(sys.modules[module])[name]
        for module in list(sys.modules)
        for name in FUNCTIONS
        if module.partition(".")[0] == "circuit_tracer" and name in vars(sys.modules[module])
    }
    return found | {name: vars(ReplacementModel)[name] for name in METHODS}


@pytest.fixture
def enabled() -> Iterator[None]:
    import circuit_tracer.__main__  # noqa: F401  (all its modules, before and after alike)
    import circuit_tracer.frontend.local_server
    import circuit_tracer.utils.create_graph_files  # noqa: F401

    circuit_tracer.attribute  # noqa: B018  (loaded on first use)
    before = held()
    ctqk.enable()
    ctqk.enable()  # changes nothing
    try:
        yield
    finally:
        ctqk.disable()
        ctqk.disable()
    after = held()
    assert {name: id(value) for name, value in before.items()} == {
        name: id(after[name]) for name in before
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("model")
    save_tiny("llama", folder)
    return replacement_model(folder, "relu")


def test_attribute_takes_qk(enabled: None, model: Any):
    from circuit_tracer import attribute

    ids = prompt_ids("llama", 9)
    plain: Any = attribute(ids, model, **OPTIONS)
    assert type(plain) is circuit_tracer.Graph
    explained: Any = attribute(prompt=ids, model=model, qk=True, **OPTIONS)  # type: ignore
    assert isinstance(explained, ctqk.TranscoderGraph)
    assert torch.equal(plain.adjacency_matrix, explained.adjacency_matrix)
    assert "qk" in inspect.signature(attribute).parameters
    ctqk.disable()
    assert "qk" not in inspect.signature(circuit_tracer.attribute).parameters
    with pytest.raises(TypeError, match="qk"):
        circuit_tracer.attribute(ids, model, qk=True, **OPTIONS)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="qk"):  # a name imported meanwhile
        attribute(ids, model, qk=True, **OPTIONS)  # type: ignore[call-arg]
    assert type(attribute(ids, model, **OPTIONS)) is circuit_tracer.Graph


def test_residual_backend_files_and_server(enabled: None, tmp_path: Path):
    from circuit_tracer import ReplacementModel, attribute
    from circuit_tracer.frontend.local_server import serve
    from circuit_tracer.utils import create_graph_files

    miniature = Path(ctqk.__file__).parent / "miniature" / "model"
    model: Any = ReplacementModel.from_pretrained(
        str(miniature),
        "miniature-sae",
        backend="residual",  # type: ignore[arg-type]
    )
    assert isinstance(model, ctqk.ResidualModel)
    some: Any = model
    graph: Any = attribute("I met Aunt Sally. I like Aunt", some, max_feature_nodes=60)
    assert isinstance(graph, ctqk.ResidualGraph)
    create_graph_files(
        graph_or_path=graph, slug="sally", output_path=str(tmp_path), node_threshold=0.6
    )
    document = json.loads((tmp_path / "sally.json").read_bytes())
    assert document["qk"]["graph_kind"] == "residual"
    server = serve(data_dir=str(tmp_path), port=next_free_port(18200))
    try:
        url: Any = server.url  # type: ignore[attr-defined]
        with urllib.request.urlopen(f"{url}/qk/config.json") as response:
            assert json.load(response)["live"] == {"sally": document["metadata"]["info"]["digest"]}
    finally:
        server.stop()


def test_other_graphs_are_left_to_circuit_tracer(enabled: None, model: Any, tmp_path: Path):
    from circuit_tracer.utils import create_graph_files

    graph = circuit_tracer.attribute(prompt_ids("llama", 9), model, **OPTIONS)
    graph.cfg.tokenizer_name = str(Path(ctqk.__file__).parent / "miniature" / "model")
    create_graph_files(graph, "plain", str(tmp_path))
    document = json.loads((tmp_path / "plain.json").read_bytes())
    assert "qk" not in document and "head_loadings" not in document["links"][0]
