"""What a reference to dictionaries may lack, and vectors stored as matrices of one row."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.random_dictionaries import write_sae
from safetensors.torch import load_file, save_file

import circuit_tracer_qk as ctqk


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_sae(tmp_path / "sets" / "mine", 16, [0, 1, 2])
    return tmp_path / "sets" / "mine"


def test_a_missing_layer_of_a_local_set_is_not_looked_for_on_the_hub(folder: Path) -> None:
    with pytest.raises(ctqk.UserError) as refused:
        ctqk.load_dictionaries("sets/mine/layer_7")
    message = str(refused.value)
    assert message.startswith(
        "the dictionary folder sets/mine/layer_7 does not exist (sets/mine has"
    )
    assert "layer_0.safetensors" in message and "hub (" not in message


def test_a_name_that_may_be_on_the_hub_says_what_is_here(folder: Path) -> None:
    with pytest.raises(
        ctqk.UserError, match=r"cannot be had from.*; the local folder sets has mine"
    ):
        ctqk.load_dictionaries("sets/other")


def test_a_missing_file_of_a_set_is_named(folder: Path) -> None:
    (folder / "layer_1.safetensors").unlink()
    with pytest.raises(ctqk.UserError, match=r"layer_1\.safetensors is missing: config.yaml lists"):
        ctqk.load_dictionaries("sets/mine")


def test_vectors_of_one_row_are_vectors(folder: Path) -> None:
    plain = ctqk.load_dictionaries(folder)
    for path in folder.glob("layer_*.safetensors"):
        tensors = load_file(path)
        tensors = {name: t[None] if t.ndim == 1 else t for name, t in tensors.items()}
        save_file(tensors, path)
    stored = ctqk.load_dictionaries(folder)
    for c in plain.checkpoints:
        one, other = plain.by_checkpoint[c], stored.by_checkpoint[c]
        assert one.b_dec.equal(other.b_dec) and one.b_enc.equal(other.b_enc)
