"""Every command that writes, killed before and after each of its changes, and on a full disk.

What can be read then is one whole old or new state, the next run succeeds, and nothing is left over.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers import killing

import circuit_tracer_qk as ctqk
from circuit_tracer_qk.base.files import LISTING, companion_of
from circuit_tracer_qk.cli import main as cli
from circuit_tracer_qk.dictionaries.features import archive_of
from circuit_tracer_qk.frontend.saving import Saver
from circuit_tracer_qk.frontend.static import Folder

OLD, NEW = "I met Aunt Sally. I like Aunt", "Uncle Bob met Aunt Mary. The next day Uncle"
SMALL = ("--max_feature_nodes", 30, "--max_n_logits", 2)
EDIT = "side=key heads=L1H2 features=L0/61 factor=0"
SAES = "miniature-sae"
STEP = 6  # of the changes, so many are left out between two in `make test`; of renames none


class Command(NamedTuple):
    """A command that writes.

    Attributes:
        make: does it in a folder, "old" or "new"; returns the exit status.
        read: what can be read of it there; raises where that is torn.
    """

    make: Callable[[Path, str], int]
    read: Callable[[Path], Any]


def command_line(*argv: object) -> int:
    return cli.main([str(arg) for arg in argv])


def prompt_of(which: str) -> str:
    return {"old": OLD, "new": NEW}[which]


def saved(folder: Path) -> Any:
    path = folder / "graph.pt"
    if not path.exists():
        return None
    graph = ctqk.load_graph(path)
    return graph.input_string, graph.token_strings


def page(folder: Path) -> Any:
    """A folder of graph files: all that a file names is there."""
    if not (folder / LISTING).exists():
        return None
    documents = {}
    for entry in json.loads((folder / LISTING).read_bytes())["graphs"]:
        data = (folder / f"{entry['slug']}.json").read_bytes()
        document = json.loads(data)
        for sidecar in document["qk"].get("sidecars", {}).values():
            content = (folder / sidecar["file"]).read_bytes()
            assert hashlib.sha256(content).hexdigest()[:8] in sidecar["file"]
        scan = folder / document["metadata"]["scan"].removeprefix("./graph_data/")
        for node in document["nodes"]:
            if node["feature_type"] == "cross layer transcoder":
                json.loads((scan / f"{node['feature']}.json").read_bytes())
        documents[entry["slug"]] = hashlib.sha256(data).hexdigest()
    return documents


def converted(folder: Path) -> Any:
    if not (folder / "set").exists():
        return None
    return ctqk.load_dictionaries(folder / "set").checkpoints


def described(folder: Path) -> Any:
    if not (folder / "labels.json").exists():
        return None
    archive = archive_of(folder)
    return tuple(
        hashlib.sha256(path.read_bytes()).hexdigest() for path in (folder / "labels.json", archive)
    )


def steered(folder: Path) -> Any:
    path = folder / "run.json"
    return json.loads(path.read_bytes())["prompt"] if path.exists() else None


def attribute(folder: Path, which: str) -> int:
    out = ("-o", folder / "graph.pt", "--slug", "a", "--graph_file_dir", folder)
    return command_line("attribute", "-d", SAES, "-p", prompt_of(which), *SMALL, *out)


def augment(folder: Path, which: str) -> int:
    graph = inputs() / f"{which}.pt"
    return command_line("augment", graph, "--slug", "a", "--graph_file_dir", folder)


def describe(folder: Path, which: str) -> int:
    texts = ("--texts", inputs() / f"{which}.txt", "--checkpoints", 2, "--no-logits")
    return command_line("features", "-d", SAES, *texts, "-o", folder, "--force")


def save(folder: Path, which: str) -> int:
    if not (folder / "a.json").exists():
        augment(folder, "old")
    body = json.dumps({"qParams": {"pinnedIds": [which], "supernodes": []}}).encode()
    try:
        Saver(Folder(folder, {".json": "application/json"})).save("a", body)
    except Exception as error:
        print(f"error: {error}", file=killing.sys.stderr)
        return cli.MISTAKE
    return cli.DONE


def sidecars(folder: Path, which: str) -> int:
    try:
        ctqk.create_graph_files(graph_of(prompt_of(which)), "a", folder, max_file_bytes=0)
    except ctqk.UserError as error:
        print(f"error: {error}", file=killing.sys.stderr)
        return cli.MISTAKE
    return cli.DONE


COMMANDS = {
    "attribute": Command(attribute, lambda folder: (saved(folder), page(folder))),
    "demo": Command(
        lambda folder, which: command_line(
            "demo", "--no-serve", "-p", prompt_of(which), "-o", folder
        ),
        page,
    ),
    "augment": Command(augment, page),
    "sidecars": Command(sidecars, page),
    "steer": Command(
        lambda folder, which: command_line(
            *("steer", "-d", SAES, "-p", prompt_of(which), "--edit", EDIT),
            *("--controls", 0, "--json", folder / "run.json"),
        ),
        steered,
    ),
    "convert": Command(
        lambda folder, which: command_line("convert", SAES, folder / "set"), converted
    ),
    "features": Command(describe, described),
    "save": Command(save, page),
}
MODEL = ctqk.load_model
ATTRIBUTE = ctqk.attribute


@cache
def model() -> ctqk.ResidualModel:
    return MODEL(None, SAES)


@cache
def graph_of(prompt: str) -> ctqk.ResidualGraph:
    return ATTRIBUTE(prompt, model(), max_feature_nodes=30, max_n_logits=2)


_inputs: list[Path] = []


def inputs() -> Path:
    """A folder with graphs and texts to read."""
    return _inputs[-1]


@pytest.fixture(scope="module", autouse=True)
def ready(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A model and graphs that every run of a command finds made."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("inputs")
    for which in ("old", "new"):
        graph_of(prompt_of(which)).to_pt(folder / f"{which}.pt")
        (folder / f"{which}.txt").write_text(f"{prompt_of(which)}\n\nAnother {which} text.")
    _inputs.append(folder)
    patched = pytest.MonkeyPatch()
    patched.setattr(ctqk, "load_model", lambda *args, **options: model())
    patched.setattr(ctqk, "attribute", lambda prompt, *args, **options: graph_of(prompt))
    yield
    patched.undo()


def temporaries(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.endswith((".tmp", ".part"))]


def places(changes: list[str], whole: bool) -> list[int]:
    """Before which changes a run ends: before and after every rename, and some of the others."""
    n = len(changes)
    if whole:
        return list(range(n))
    renames = {i for i, change in enumerate(changes) if change == "os.rename"}
    if len(renames) > 4:  # many examples of features
        renames = {min(renames), *sorted(renames)[-3:]}
    near = renames | {i + 1 for i in renames}
    return sorted({i for i in near if i < n} | set(range(0, n, max(STEP, n // 3))))


@pytest.mark.parametrize("first", ["nothing", "old"])
@pytest.mark.parametrize("fault", [killing.KILL, killing.FULL])
@pytest.mark.parametrize("name", COMMANDS)
def test_one_whole_state_is_there_whatever_happens(
    name: str, fault: str, first: str, tmp_path: Path, request: pytest.FixtureRequest
):
    command = COMMANDS[name]
    before, folder = tmp_path / "before", tmp_path / "folder"
    before.mkdir()
    if name == "convert":  # to a new folder only
        first = "nothing"
    if first == "old" or name == "save":
        assert command.make(before, "old") == 0

    def start() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(before, folder)

    start()
    old = command.read(folder)
    end = killing.run(lambda: command.make(folder, "new"), folder)
    assert end.status == 0, end.err
    new = command.read(folder)
    assert new != old and not temporaries(folder)
    states = [old, new]
    if isinstance(new, tuple) and name == "attribute":  # two results, one after the other
        states.append((new[0], old[1]))
    if name in ("attribute", "demo", "augment", "sidecars") and first == "nothing":
        states.append(None)
    for at in places(
        end.changes,
        bool(request.config.getoption("--all")),
    ):
        start()
        faulty = killing.run(lambda: command.make(folder, "new"), folder, fault, at)
        where = f"{name}, {fault} before change {at}, {end.changes[at]}: {faulty.err}"
        assert command.read(folder) in states, where
        if fault == killing.FULL and faulty.status != 0:  # what is only tidied needs no room
            assert faulty.status == cli.MISTAKE, where
            assert "error: " in faulty.err and len(faulty.err.strip().splitlines()) == 1, where
            left = {path.name for path in temporaries(folder)} - {".features.part"}
            assert not left or "go with it are in their places" in faulty.err, where
        elif fault == killing.KILL:
            assert faulty.status == -9, where
        again = killing.run(lambda: command.make(folder, "new"), folder)
        if name == "convert" and command.read(folder) == new and again.status == cli.MISTAKE:
            assert "exists already" in again.err
        else:
            assert again.status == 0, f"{where} {again.err}"
        assert command.read(folder) == new and not temporaries(folder), where
        if name == "attribute":
            plain = folder / "graph.pt.qk.safetensors"
            assert companion_of(folder / "graph.pt", plain) == plain and plain.is_file()
