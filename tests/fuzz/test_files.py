"""Damaged files: what is read is what was written, or one sentence says that it is not."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.cases import Case, build
from helpers.fuzzing import altered, damaged, one_sentence, run_cases

import circuit_tracer_qk as ctqk
from circuit_tracer_qk.cli.prompts.lines import read_prompts
from circuit_tracer_qk.dictionaries.catalogue import MINIATURES
from circuit_tracer_qk.dictionaries.features import FeatureExamples, indexed_feature, read_labels
from circuit_tracer_qk.steering.parse import read_edits

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return build("llama", tmp_path_factory.mktemp("fuzzed"), "sae", torch.float32, n=5)


def fuzz_file(
    config: pytest.Config, path: Path, use: Callable[[], object], document: Any = None
) -> None:
    """Damage one file again and again, and read it each time; at the end it is as it was."""
    data = path.read_bytes()
    changed = damaged(data)
    if document is not None:
        write = yaml.safe_dump if path.suffix == ".yaml" else json.dumps
        changed |= altered(document).map(lambda d: write(d).encode())

    def check(content: bytes) -> None:
        path.write_bytes(content)
        with one_sentence():
            use()

    try:
        run_cases(config, changed, check)
    finally:
        path.write_bytes(data)


@pytest.mark.parametrize("name", ["g.pt", "g.pt.qk.safetensors"])
def test_saved_graphs(
    name: str, case: Case, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    graph = case.graph
    graph.to_pt(tmp_path / "g.pt")
    scores = [graph.qk(1, 0, 4, k).score for k in range(5)]

    def load() -> None:
        back = ctqk.load_graph(tmp_path / "g.pt")
        assert torch.equal(back.adjacency_matrix, graph.adjacency_matrix)
        assert torch.equal(back.run.residual, graph.run.residual)
        assert [back.qk(1, 0, 4, k).score for k in range(5)] == scores
        assert back.record.token_strings == graph.record.token_strings

    fuzz_file(request.config, tmp_path / name, load)


@pytest.mark.parametrize("name", ["config.yaml", "layer_1.safetensors"])
def test_dictionaries(name: str, case: Case, request: pytest.FixtureRequest) -> None:
    folder = case.model.dictionaries.folder
    assert folder is not None
    path = folder / name
    document = yaml.safe_load(path.read_bytes()) if name.endswith(".yaml") else None
    fuzz_file(request.config, path, lambda: ctqk.load_dictionaries(folder), document)


def test_models(case: Case, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    assert case.model.dictionaries.folder is not None
    folder = case.model.dictionaries.folder.parent / "model"
    path = folder / "config.json"
    fuzz_file(
        request.config,
        path,
        lambda: ctqk.load_model(folder, case.model.dictionaries),
        json.loads(path.read_bytes()),
    )


def test_labels(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    path = tmp_path / "labels.json"
    document = {"0": ["a", None, "\u65e5"], "1": ["b"]}
    path.write_text(json.dumps(document))
    fuzz_file(request.config, path, lambda: read_labels(path), document)


def test_examples(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    path = tmp_path / "features.zip"
    with zipfile.ZipFile(MINIATURES["miniature-sae"] / "features.zip") as old:
        names = old.namelist()[:3]
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
            for name in names:
                new.writestr(name, old.read(name))
    whole: dict[str, Any] = {}

    def read(first: bool = False) -> None:
        examples = FeatureExamples(tmp_path)
        for name in names:
            found = examples.read(*indexed_feature(int(Path(name).stem)))
            if first:
                whole[name] = found
            else:
                assert found is None or found == whole[name]

    read(True)
    fuzz_file(request.config, path, read)


def test_prompts(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    path = tmp_path / "prompts.jsonl"
    document = {"prompt": "I met", "slug": "a", "max_n_logits": 3, "node_threshold": 0.5}
    path.write_text(json.dumps(document) + '\n"I like"\n')
    fuzz_file(request.config, path, lambda: read_prompts(path), document)


def test_edits(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    path = tmp_path / "edits.json"
    document = [
        {"heads": ["L1H2"], "side": "key", "features": ["L0/61"], "factor": 0, "positions": [3]},
        {"heads": [[1, 2]], "factor": 0.5},
    ]
    path.write_text(json.dumps(document))
    fuzz_file(request.config, path, lambda: read_edits(path), document)


def test_lists_of_graphs(case: Case, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    ctqk.create_graph_files(case.graph, "a", tmp_path, qk=False)
    path = tmp_path / "graph-metadata.json"
    document = json.loads(path.read_bytes())

    def write() -> None:
        ctqk.create_graph_files(case.graph, "b", tmp_path, qk=False)
        slugs = [entry.get("slug") for entry in json.loads(path.read_bytes())["graphs"]]
        assert "b" in slugs

    fuzz_file(request.config, path, write, document)
