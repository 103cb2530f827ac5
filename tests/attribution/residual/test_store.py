"""Saved graphs that are damaged: one sentence, or exactly the same numbers."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cases import Case, build
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import circuit_tracer_qk as ctqk
from circuit_tracer_qk.base import digests
from circuit_tracer_qk.cli import main as cli

Tensors = dict[str, Tensor]
Facts = dict[str, Any]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return build("gpt2", tmp_path_factory.mktemp("case"), "sae", torch.float32, n=5)


@pytest.fixture(scope="module")
def saved(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "g.pt"
    case.graph.to_pt(path)
    return path


def companion(path: Path) -> Path:
    return Path(f"{path}.qk.safetensors")


def parts_of(path: Path) -> tuple[Tensors, Facts]:
    with safe_open(companion(path), "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        return tensors, json.loads(file.metadata()["facts"])


def write(path: Path, tensors: Tensors, facts: Any) -> None:
    text = facts if isinstance(facts, str) else json.dumps(facts)
    save_file(tensors, companion(path), {"facts": text})


def sign(facts: Facts, tensors: Tensors) -> None:
    """Make the digests fit, as only a writer would."""
    facts["tensors"] = digests.of_tensors(tensors)
    facts.pop("digest", None)
    facts["digest"] = digests.of_text(json.dumps(facts))


def older(facts: Facts, graph: ctqk.ResidualGraph) -> Facts:
    """The facts as the version without digests wrote them."""
    rows = graph.adjacency_matrix.float().contiguous().view(torch.int32).sum(1)
    places = torch.arange(1, len(rows) + 1)
    fingerprint = [len(rows), int(rows.sum()), int((rows * places).sum()), graph.n_pos]
    facts = {k: v for k, v in facts.items() if k not in ("graph", "tensors", "digest")}
    facts["format"] = "circuit-tracer-qk graph, version 2"
    return facts | {"fingerprint": fingerprint}


def refusal(path: Path) -> str:
    with warnings.catch_warnings(), pytest.raises(ctqk.UserError) as caught:
        warnings.simplefilter("ignore")
        ctqk.load_graph(path)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and str(path) in message
    return message


def same(one: ctqk.ResidualGraph, other: ctqk.ResidualGraph) -> bool:
    a, b = (graph.qk_row(1, 0, 4).scores for graph in (one, other))
    edges = [
        torch.cat([p.flatten() for p in g.edges(*g.adjacency_matrix.nonzero().T.flip(0)).parts])
        for g in (one, other)
    ]
    return (
        torch.equal(one.adjacency_matrix, other.adjacency_matrix)
        and torch.equal(a, b)
        and torch.equal(*edges)
        and one.token_strings == other.token_strings
    )


def copy(saved: Path, folder: Path) -> Path:
    path = folder / "g.pt"
    for source in (saved, companion(saved)):
        (folder / source.name).write_bytes(source.read_bytes())
    return path


@seed(19)
@settings(
    max_examples=60,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_damage_is_one_sentence_or_changes_nothing(
    case: Case, saved: Path, tmp_path: Path, data: st.DataObject
):
    path = copy(saved, tmp_path)
    damaged = data.draw(st.sampled_from([path, companion(path)]))
    content = bytearray(damaged.read_bytes())
    # in a companion's header, in a torch archive's directory, anywhere
    ends = st.one_of(
        st.integers(0, 4000), st.integers(len(content) - 4000, len(content) - 1)
    ) | st.integers(0, len(content) - 1)
    at = data.draw(ends)
    if data.draw(st.booleans()):
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del content[at:]
    damaged.write_bytes(content)
    try:
        back = ctqk.load_graph(path)
    except ctqk.UserError as error:
        assert len(str(error).splitlines()) == 1 and path.name in str(error)
    else:
        assert same(back, case.graph)


@seed(19)
@settings(
    max_examples=60,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_a_tensor_of_another_form_is_named(saved: Path, tmp_path: Path, data: st.DataObject):
    """Also where the digests fit."""
    path = copy(saved, tmp_path)
    tensors, facts = parts_of(path)
    name = data.draw(st.sampled_from(sorted(tensors)))
    t = tensors[name]
    other: dict[str, Callable[[], Tensor | None]] = {
        "deleted": lambda: None,
        "retyped": lambda: t.to(torch.int32),
        "half": lambda: t.half() if t.dtype == torch.int64 else t.to(torch.int64),
        "short": lambda: t[:-1],
        "long": lambda: torch.cat([t, t[:1]]),
        "flat": lambda: t[None],
        "empty": lambda: t[:0],
    }
    changed = other[data.draw(st.sampled_from(sorted(other)))]()
    if changed is None:
        del tensors[name]
    else:
        tensors[name] = changed.contiguous().clone()
    if data.draw(st.booleans()):
        sign(facts, tensors)
    write(path, tensors, facts)
    try:
        ctqk.load_graph(path)
    except ctqk.UserError as error:
        assert len(str(error).splitlines()) == 1 and str(path) in str(error)
    else:  # a tensor that may be absent, in a file that a writer signed
        assert changed is None and name.rpartition(".")[2] in ("w", "b") or "scales" in name


@pytest.mark.parametrize("value", [float("nan"), 1e9, 0.5])
@pytest.mark.parametrize("name", ["run.residual", "blocks.1.W_Q", "decoders.1.1", "run.logits"])
def test_a_changed_number_is_named(saved: Path, tmp_path: Path, name: str, value: float):
    path = copy(saved, tmp_path)
    tensors, facts = parts_of(path)
    tensors[name].view(-1)[3] = value
    write(path, tensors, facts)
    assert f"the tensor {name} has changed" in refusal(path)


@pytest.mark.parametrize(
    "name",
    "format blocks resid_pre token_strings dictionary_folder names graph tensors digest".split(),
)
@pytest.mark.parametrize("value", ["absent", 7, None, [], {}, [[1]], "x"])
def test_a_changed_fact_is_refused(saved: Path, tmp_path: Path, name: str, value: Any):
    path = copy(saved, tmp_path)
    tensors, facts = parts_of(path)
    if value == "absent":
        del facts[name]
    elif facts[name] == value:
        return
    else:
        facts[name] = value
    write(path, tensors, facts)
    assert "damaged" in refusal(path) or name == "format"


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, "7", '{"format": 1e999}', "NaN"])
def test_facts_that_are_none(saved: Path, tmp_path: Path, text: str):
    path = copy(saved, tmp_path)
    write(path, parts_of(path)[0], text)
    refusal(path)


def test_files_without_digests_load_with_a_note(
    case: Case, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = copy(saved, tmp_path)
    tensors, facts = parts_of(path)
    facts = older(facts, case.graph)
    write(path, tensors, facts)
    with pytest.warns(UserWarning, match="holds no digests"):
        assert same(ctqk.load_graph(path), case.graph)
    assert cli.main(["qk", str(path), "--head", "L0H0"]) == cli.DONE
    [note] = capsys.readouterr().err.splitlines()
    assert note.startswith("circuit-tracer-qk: warning: ") and "holds no digests" in note
    cases: list[tuple[str, Tensor, str]] = [
        ("run.tokens", torch.full((5,), 10**6), "run.tokens holds 1000000"),
        ("run.residual", torch.full_like(tensors["run.residual"], torch.nan), "NaN or infinity"),
        ("run.pattern", tensors["run.pattern"] + 2, "run.pattern holds numbers out of range"),
        ("features.row", tensors["features.row"] + 10**6, "features.row has rows"),
        ("features.checkpoint", tensors["features.checkpoint"] + 50, "names checkpoint"),
        ("features.position", tensors["features.position"].flip(0), "not in order"),
        ("features.activation", tensors["features.activation"] * 2, "different graphs"),
        ("errors.1", tensors["errors.1"][:-1], r"errors.1 should be of shape"),
        ("errors.1", tensors["errors.1"].double(), "errors.1 should be of float32"),
        ("errors.77", tensors["errors.1"].clone(), "biases.77 is missing"),
        ("more", tensors["errors.1"].clone(), "'more' does not belong"),
    ]
    for name, tensor, message in cases:
        write(path, tensors | {name: tensor.contiguous()}, facts)
        assert message in refusal(path), name
    for name in ("run.tokens", "blocks.0.b_V", "decoders.2.2", "record.target_pulls"):
        write(path, {n: t for n, t in tensors.items() if n != name}, facts)
        assert f"the tensor {name} is missing" in refusal(path)
    wrong: dict[str, Any] = {"attn_scale": 0.0, "qk_eps": "x", "window": -1, "ln1": None, "cos": 1}
    for fact, value in wrong.items():
        blocks = [facts["blocks"][0] | {fact: value}, *facts["blocks"][1:]]
        write(path, tensors, facts | {"blocks": blocks})
        assert f"the fact blocks.0.{fact}" in refusal(path)


@pytest.mark.parametrize(
    "field", ["input_tokens", "active_features", "activation_values", "logit_probabilities"]
)
def test_every_field_of_the_pt_is_tied(saved: Path, tmp_path: Path, field: str):
    path = copy(saved, tmp_path)
    content = torch.load(path, weights_only=False)
    content[field] = content[field].clone()
    content[field].view(-1)[0] += 1
    torch.save(content, path)
    assert "different graphs" in refusal(path)


def test_text_and_targets_of_the_pt_are_tied(saved: Path, tmp_path: Path):
    path = copy(saved, tmp_path)
    content = torch.load(path, weights_only=False)
    target = content["logit_targets"][0]
    changes = {
        "input_string": "another",
        "scan": "another",
        "vocab_size": 5,
        "logit_targets": [target._replace(vocab_idx=0), *content["logit_targets"][1:]],
    }
    for name, value in changes.items():
        torch.save(content | {name: value}, path)
        assert "different graphs" in refusal(path), name
    torch.save(content, path)  # saved again as it was
    ctqk.load_graph(path)
