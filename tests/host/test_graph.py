"""Loading a graph's ``.pt``: nothing in it runs, and what is none is one sentence."""

from __future__ import annotations

import fractions
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cases import build

import circuit_tracer_qk as ctqk
from circuit_tracer_qk.cli import main as cli
from circuit_tracer_qk.host import graph as host


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    build("gpt2", folder, "sae", torch.float32, n=5).graph.to_pt(folder / "g.pt")
    return folder / "g.pt"


class Touches:
    """An object whose pickle creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def refusal(path: Path, trust: bool = False) -> str:
    with pytest.raises(ctqk.UserError) as caught:
        host.load_graph(path, trust=trust)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and str(path) in message
    return message


def test_loading_runs_no_code(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path, made = tmp_path / "g.pt", tmp_path / "made"
    torch.save(torch.load(saved, weights_only=False) | {"scan": Touches(made)}, path)
    assert "pathlib" in refusal(path) and "--trust" in refusal(path)
    companion = Path(f"{saved}.qk.safetensors").read_bytes()
    Path(f"{path}.qk.safetensors").write_bytes(companion)
    with pytest.raises(ctqk.UserError, match="could run code"):
        ctqk.load_graph(path)
    files = ["--slug", "s", "--graph_file_dir", str(tmp_path / "graphs")]
    for command in (["qk", str(path), "--head", "L0H0"], ["augment", str(path), *files]):
        assert cli.main(command) == cli.MISTAKE
        assert "could run code" in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(ctqk.UserError, match="could run code"):
        ctqk.create_graph_files(path, "s", tmp_path / "graphs")
    assert not made.exists()


def test_trust_loads_objects_of_other_classes(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "g.pt"
    content = torch.load(saved, weights_only=False)
    content["cfg"].extra = fractions.Fraction(1, 2)
    torch.save(content, path)
    assert "fractions.Fraction" in refusal(path)
    back = host.load_graph(path, trust=True)
    assert torch.equal(back.adjacency_matrix, content["adjacency_matrix"])
    Path(f"{path}.qk.safetensors").write_bytes(Path(f"{saved}.qk.safetensors").read_bytes())
    assert ctqk.load_graph(path, trust=True).n_pos == 5
    assert cli.main(["qk", str(path), "--head", "L0H0", "--trust"]) == cli.DONE
    assert "score" in capsys.readouterr().out


def test_what_is_no_graph(saved: Path, tmp_path: Path):
    path = tmp_path / "g.pt"
    content, data = torch.load(saved, weights_only=False), saved.read_bytes()
    assert "there is no graph file" in refusal(path)
    for content_bytes in (b"", b"nonsense", data[: len(data) // 2]):
        path.write_bytes(content_bytes)
        assert "is no graph file, or damaged" in refusal(path)
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    path.write_bytes(flipped)
    assert "damaged" in refusal(path)
    torch.save(content, path, _use_new_zipfile_serialization=False)
    assert "is no graph file" in refusal(path)
    import zipfile

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "text")
    assert "damaged" in refusal(path)
    for other in ({"layer.weight": torch.zeros(2)}, [1, 2], torch.zeros(3), {}):
        torch.save(other, path)
        assert "is no graph of circuit-tracer" in refusal(path)
    fields: dict[str, Any] = {
        "adjacency_matrix": content["adjacency_matrix"][:-1],
        "active_features": content["active_features"][:, :2],
        "selected_features": content["selected_features"] + 10**6,
        "activation_values": content["activation_values"][:1],
        "input_tokens": "text",
        "logit_targets": [],
        "logit_probabilities": torch.zeros(99),
        "cfg": None,
        "input_string": 7,
    }
    for name, value in fields.items():
        torch.save(content | {name: value}, path)
        assert f"is no whole graph: {name}" in refusal(path)
    torch.save(content | {"another": 1}, path)
    assert "another" in refusal(path)


def test_tokens_that_decode_to_nothing_are_shown_by_their_ids() -> None:
    class Silent:
        def decode(self, ids: list[int]) -> str:
            return "" if ids == [7] else f"t{ids[0]}"

    text_of = host.token_texts(Silent(), 10)
    assert (text_of(7), text_of(torch.tensor(3))) == ("<7>", "t3")
    assert host.token_texts(None, 10)(7) == "<7>"
