"""``attribute --prompts``: one model for many prompts, restarts, bad lines, workers, engines."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers import deadly_work
from helpers.commands import Result
from tiny_transcoders import make_set

import circuit_tracer_qk as ctqk
from circuit_tracer_qk.attribution.residual import model as residual_model
from circuit_tracer_qk.base.files import workplace
from circuit_tracer_qk.cli import main as cli
from circuit_tracer_qk.cli.prompts import engines, worker
from circuit_tracer_qk.cli.prompts.lines import Request, read_prompts
from circuit_tracer_qk.cli.prompts.progress import FOLDER, Marks
from circuit_tracer_qk.frontend.saving import Saver
from circuit_tracer_qk.frontend.server import next_free_port
from circuit_tracer_qk.graph_files import index as listing

Run = Callable[..., Result]
SMALL = ("--max_feature_nodes", 30, "--max_n_logits", 2)
PROMPTS = {
    "sally": "I met Aunt Sally. I like Aunt",
    "bob": "Uncle Bob met Aunt Mary. The next day Uncle",
    "small": 'The opposite of "small" is "',
    "banana": "The color of a banana is yellow?",
}
NO_FILE = "-d", "miniature-sae", "--graph_file_dir", "g"


def written(path: Path, *lines: Any) -> Path:
    """A file of prompts; bytes go in as they are."""
    path.write_bytes(
        b"\n".join(e if isinstance(e, bytes) else json.dumps(e).encode() for e in lines)
    )
    return path


def asked(names: Any = PROMPTS) -> list[dict[str, str]]:
    return [{"prompt": PROMPTS[name], "slug": name} for name in names]


def contents(*folders: Path) -> dict[Path, bytes]:
    """Every file a user sees, by its path in its folder."""
    found = {}
    for folder in folders:
        for path in sorted(folder.rglob("[!.]*")):
            name = path.relative_to(folder)
            if path.is_file() and FOLDER not in name.parts:
                found[folder.name / name] = path.read_bytes()
    return found


def slugs(folder: Path) -> list[str]:
    return [g["slug"] for g in json.loads((folder / "graph-metadata.json").read_bytes())["graphs"]]


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The loads of the residual model, which is made once for the whole file."""
    counted: list[Any] = []

    def load(*args: Any, **options: Any) -> ctqk.ResidualModel:
        counted.append(args)
        return kept(*map(str, args[:2]))

    monkeypatch.setattr(residual_model, "load_model", load)
    return counted


LOAD = residual_model.load_model


@cache
def kept(model: str, dictionaries: str) -> ctqk.ResidualModel:
    return LOAD(None if model == "None" else model, dictionaries)


# Lines --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"{", "it is not JSON"),
        (b"\xff", "it is not UTF-8"),
        (b"[" * 100_000, "it is not JSON"),
        ([], 'it is neither {"prompt": "..."} nor a string'),
        (3, "neither"),
        ({}, "prompt should be a text of valid Unicode that is not empty, found nothing"),
        ({"prompt": ["a"]}, "prompt should be a text of valid Unicode that is not empty, found ['a']"),
        ({"prompt": ""}, "found ''"),
        ("", "prompt should be a text of valid Unicode that is not empty"),
        ({"prompt": "a", "slug": "a/b"}, "the slug 'a/b' cannot name a graph"),
        ({"prompt": "a", "slug": None}, "slug should be a name, found nothing"),
        ({"prompt": "a", "slug": "first"}, "the slug 'first' is line 1's"),
        ({"prompt": "a", "slug": "my-file-0001"}, ""),
        ({"prompt": "a", "promt": "b"}, "promt is unknown here: known are prompt, slug,"),
        ({"prompt": "a", "max_n_logits": 0}, "max_n_logits should be a whole number from 1 on, found 0"),
        ({"prompt": "a", "max_n_logits": 2.0}, "max_n_logits should be a whole number from 1 on, found 2.0"),
        ({"prompt": "a", "max_feature_nodes": True}, "max_feature_nodes should be a whole number from 0 on, found True"),
        ({"prompt": "a", "node_threshold": 2}, "node_threshold should be a number from 0 to 1, found 2"),
        (b'{"prompt": "a", "edge_threshold": NaN}', "edge_threshold should be a number from 0 to 1, found nan"),
    ],
)  # fmt: skip
def test_lines(tmp_path: Path, line: Any, problem: str):
    path = written(
        tmp_path / "my file.jsonl", {"prompt": "x", "slug": "first"}, b" \r", line, "last"
    )
    requests, bad = read_prompts(path)
    assert [(r.line, r.slug) for r in requests if r.line != 3] == [
        (1, "first"),
        (4, "my-file-0004"),
    ]
    assert [b.line for b in bad] == ([3] if problem else [])
    assert not problem or problem in bad[0].problem


def test_lines_as_editors_and_other_systems_write_them(tmp_path: Path):
    path = tmp_path / "p.jsonl"
    path.write_bytes('﻿"a b"\r\n\r\n{"prompt": "ü\u2028", "desired_logit_prob": 0.5}\r\n'.encode())
    requests, bad = read_prompts(path, "run")
    assert not bad
    assert [(r.line, r.prompt, r.slug) for r in requests] == [
        (1, "a b", "run-0001"),
        (3, "ü\u2028", "run-0003"),
    ]
    assert requests[1].options == {"desired_logit_prob": 0.5}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("-p", "x", *NO_FILE), "-p and --prompts are both given"),
        (("-d", "miniature-sae"), "no output is named: give --graph_file_dir"),
        (("--graph_file_dir", "g"), "-d/--dictionaries is missing"),
        (("-d", "miniature-sae", "-o", "g.pt"), "-o/--graph_output_path is a folder"),
        (("-d", "miniature-sae", "-o", "file"), "-o/--graph_output_path is a folder"),
        (("-d", "miniature-sae", "-o", "file/g"), "cannot be written to"),
        (("-d", "miniature-sae", "-o", "g", "--server"), "--server needs --graph_file_dir"),
        ((*NO_FILE, "--workers", 0), "--workers is 0"),
        ((*NO_FILE, "--max_n_logits", 0), "--max_n_logits is 0"),
        ((*NO_FILE, "--node_threshold", 2), "--node_threshold is 2.0"),
        ((*NO_FILE, "--slug", "a/b"), "the slug 'a/b'"),
        ((*NO_FILE, "--np-model", "a/b"), "'a/b'"),
        (NO_FILE, "p.jsonl cannot be read"),
        (("-t", "x", "-o", "g", "--backend", "nnsight"), "--backend nnsight"),
    ],
)
def test_mistakes(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("in the way")
    assert message in run("attribute", "--prompts", "p.jsonl", *argv).refusal
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("flags", [("--workers", 2), ("--engine", "ray"), ("--force",)])
def test_flags_that_one_prompt_does_not_take(run: Run, flags):
    assert f"{flags[0]} is for a file" in run("attribute", "-p", "x", *NO_FILE, *flags).refusal


def test_an_engine_that_is_not_installed(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    refusal = run("attribute", "--prompts", "p", *NO_FILE, "--engine", "ray").refusal
    assert 'pip install "circuit-tracer-qk[ray]"' in refusal


def test_a_file_without_prompts_and_one_without_good_ones(
    run: Run, tmp_path: Path, loads: list[Any]
):
    path = written(tmp_path / "p.jsonl", b"", b"  ")
    flags = ("-d", "miniature-sae", "--graph_file_dir", tmp_path / "g")
    assert "has no prompts in it" in run("attribute", "--prompts", path, *flags).refusal
    written(path, {"prompt": ""}, b"{")
    done = run("attribute", "--prompts", path, *flags)
    assert (done.status, done.out) == (cli.MISTAKE, "2 prompts: 0 done, 2 failed\n")
    assert (
        "line 1 failed: prompt should be a text of valid Unicode that is not empty" in done.err
        and "line 2 failed" in done.err
    )
    assert not loads and not (tmp_path / "g").exists()


# Doing and doing again ----------------------------------------------------------------------------


def test_files_are_those_of_one_prompt_at_a_time(run: Run, tmp_path: Path, loads: list[Any]):
    path = written(tmp_path / "p.jsonl", *asked())
    many_, one = tmp_path / "many", tmp_path / "one"
    for folder in (many_, one):
        folder.mkdir()
    flags = ("-d", "miniature-sae", *SMALL)
    out = ("--graph_file_dir", many_ / "g", "-o", many_ / "pt")
    done = run("attribute", "--prompts", path, *flags, *out)
    assert (done.status, done.err, len(loads)) == (cli.DONE, "", 1)
    files = [
        f"graph written to {many_}/pt/{s}.pt, graph files written to {many_}/g/{s}.json"
        for s in PROMPTS
    ]
    assert done.out.splitlines() == [*files, "4 prompts: 4 done"]
    for slug, prompt in PROMPTS.items():
        names = ("--slug", slug, "--graph_file_dir", one / "g", "-o", one / "pt" / f"{slug}.pt")
        assert run("attribute", "-p", prompt, *flags, *names).status == cli.DONE
    assert contents(many_ / "g", many_ / "pt") == contents(one / "g", one / "pt")
    assert ctqk.load_graph(many_ / "pt" / "bob.pt").input_string.endswith(" day Uncle")


def test_lines_set_flags_for_themselves(run: Run, tmp_path: Path, loads: list[Any]):
    prompt = PROMPTS["small"]
    lines = [{"prompt": prompt}, {"prompt": prompt, "max_n_logits": 1, "node_threshold": 0.5}]
    path = written(tmp_path / "p.jsonl", *lines)
    flags = ("-d", "miniature-sae", *SMALL, "--desired_logit_prob", 0.9999999)
    assert run("attribute", "--prompts", path, *flags, "-o", tmp_path).status == cli.DONE
    logits = [len(ctqk.load_graph(tmp_path / f"p-000{i}.pt").logit_targets) for i in (1, 2)]
    assert logits == [2, 1]


class Again:
    """A finished run, and the same command again."""

    def __init__(self, run: Run, tmp_path: Path, loads: list[Any]) -> None:
        self.pages, self.saved, self.loads = tmp_path / "g", tmp_path / "pt", loads
        self.file = written(tmp_path / "p.jsonl", *asked(["sally", "bob"]))
        out = ("--graph_file_dir", self.pages, "-o", self.saved)
        self._run = partial(run, "attribute", "--prompts", self.file, *out)
        assert self().status == cli.DONE
        self.before = contents(self.pages, self.saved)

    def __call__(self, *flags: Any, d: str = "miniature-sae") -> Result:
        self.loads.clear()
        return self._run("-d", d, *(flags or SMALL))

    def redone(self, *flags: Any) -> list[str]:
        """Which prompts the command does again, all being well afterwards."""
        result = self(*flags)
        assert result.status == cli.DONE, result.err
        lines = result.out.splitlines()[:-1]
        assert len(self.loads) == bool(lines)
        assert sorted(slugs(self.pages)) == ["bob", "sally"]
        return [line.rpartition("/")[2].removesuffix(".json") for line in lines]


@pytest.fixture
def again(run: Run, tmp_path: Path, loads: list[Any]) -> Again:
    return Again(run, tmp_path, loads)


def test_finished_prompts_are_skipped(again: Again):
    times = {p: p.stat().st_mtime_ns for p in again.pages.rglob("*") if p.is_file()}
    result = again()
    assert result.out == "2 prompts: 0 done, 2 were finished before\n" and not again.loads
    assert times == {p: p.stat().st_mtime_ns for p in again.pages.rglob("*") if p.is_file()}


def test_torn_files_are_made_again(again: Again):
    other = json.loads((again.pages / FOLDER / "bob.json").read_bytes())["pages"]
    mine = json.loads((again.pages / FOLDER / "sally.json").read_bytes())["pages"]
    example = next(name for name in mine if name not in other)
    kinds = [
        again.saved / "sally.pt",
        again.saved / "sally.pt.qk.safetensors",
        again.pages / "sally.json",
        again.pages / example,
        again.pages / FOLDER / "sally.json",
    ]
    for path in kinds:
        whole = path.read_bytes()
        for torn in (whole[: len(whole) // 2], b"", None):
            path.unlink() if torn is None else path.write_bytes(torn)
            assert again.redone() == ["sally"], path
            assert path.read_bytes() == whole
    assert contents(again.pages, again.saved).keys() == again.before.keys()


def test_a_list_of_graphs_that_lost_some_is_repaired(again: Again):
    path = again.pages / "graph-metadata.json"
    path.write_text(json.dumps({"graphs": [{"slug": "mine"}], "more": 1}))
    assert again().status == cli.DONE and not again.loads
    assert slugs(again.pages) == ["mine", "sally", "bob"]
    path.write_text('{"graphs": [')
    assert "graph-metadata.json is damaged" in again().refusal


def test_other_work_is_done_again(again: Again, tmp_path: Path):
    assert again.redone("--max_feature_nodes", 20) == ["sally", "bob"]
    assert again.redone("--max_feature_nodes", 20, "-v") == []
    assert again.redone(*SMALL, "--dtype", "bf16") == ["sally", "bob"]
    assert again.redone() == ["sally", "bob"]
    assert again.redone(*SMALL, "--force") == ["sally", "bob"]
    assert contents(again.pages, again.saved).keys() >= again.before.keys()
    lines = asked(["sally", "bob"])
    written(again.file, lines[0], lines[1] | {"prompt": PROMPTS["banana"]})
    assert again.redone() == ["bob"]
    written(again.file, lines[0] | {"max_n_logits": 1}, lines[1] | {"prompt": PROMPTS["banana"]})
    assert again.redone() == ["sally"]


def test_other_dictionaries_are_other_work(
    run: Run, tmp_path: Path, loads: list[Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    copy = tmp_path / "saes"
    subprocess.run(["cp", "-r", residual_model.MINIATURE.parent / "sae", copy], check=True)
    written(tmp_path / "p.jsonl", *asked(["sally"]))

    def done() -> int:
        loads.clear()
        # results in the very folder of the dictionaries are none of these
        command = ("--prompts", "p.jsonl", "-d", "saes", "--graph_file_dir", "saes/g", *SMALL)
        model = ("-m", residual_model.MINIATURE)
        result = run("attribute", *command, *model)
        assert result.status == cli.DONE, result.err
        return len(loads)

    assert (done(), done()) == (1, 0)
    os.utime(copy / "layer_1.safetensors", (1, 1))
    assert (done(), done()) == (1, 0)


def test_what_the_page_saved_stays(run: Run, again: Again):
    from circuit_tracer_qk.frontend.static import Folder

    saver = Saver(Folder(again.pages, {".json": "application/json"}))
    saver.save("sally", json.dumps({"qParams": {"pinnedIds": ["1_2_3"], "nodes": []}}).encode())
    assert (again.pages / "sally.json").read_bytes() != again.before[Path("g/sally.json")]
    assert again.redone() == []
    # a graph of other options that somebody put in its place is not it
    out = ("--slug", "sally", "--graph_file_dir", again.pages, "--max_feature_nodes", 9)
    prompt = ("-d", "miniature-sae", "-p", PROMPTS["sally"])
    assert run("attribute", *prompt, *out).status == cli.DONE
    assert again.redone() == ["sally"]


def test_what_killed_runs_left_is_removed(again: Again):
    folders = (again.pages, again.saved, again.pages / FOLDER)
    for folder in folders:
        left = folder / ".sally.json.0123456789abcdef.tmp"
        left.mkdir()
        for name in ("lock", "0"):
            (left / name).write_text("half")
    (again.pages / FOLDER / "sally.json").unlink()
    with workplace(again.pages / "other.json") as kept:
        assert again.redone() == ["sally"]
        assert [p for p in again.pages.parent.rglob("*.tmp")] == [kept]


def test_bad_lines_do_not_stop_the_others(run: Run, tmp_path: Path, loads: list[Any]):
    long = " ".join(["Aunt Sally met Uncle Bob."] * 400)
    lines = [b"{", *asked(["sally"]), {"prompt": long, "slug": "long"}, "\ud800", *asked(["bob"])]
    path = written(tmp_path / "p.jsonl", *lines)
    flags = ("-d", "miniature-sae", *SMALL, "--graph_file_dir", tmp_path / "g")
    for done in ("2 done", "0 done, 2 were finished before"):
        result = run("attribute", "--prompts", path, *flags)
        assert result.status == cli.MISTAKE
        assert result.out.splitlines()[-1] == f"5 prompts: {done}, 3 failed"
        *said, last = result.err.splitlines()
        assert [line.split(": ")[1] for line in said] == [
            "line 1 failed",
            "line 4 failed",
            "line 3 (long) failed",
        ]
        assert "valid Unicode" in said[1] and "tokens" in said[2]
        assert last.startswith(
            f"circuit-tracer-qk: error: 3 of 5 prompts of {path} failed (lines 1, "
        )
        assert "the same command again" in last
    assert slugs(tmp_path / "g") == ["sally", "bob"]


def test_one_prompt_that_breaks_the_program_is_told_and_the_others_done(
    run: Run, tmp_path: Path, loads: list[Any], monkeypatch: pytest.MonkeyPatch
):
    real = worker.ResidualMaker.make

    def broken(self: Any, request: Any, args: Any) -> worker.Outcome:
        if request.slug == "bob":
            raise RuntimeError("CUDA out of memory.\nTried to allocate")
        return real(self, request, args)

    monkeypatch.setattr(worker.ResidualMaker, "make", broken)
    path = written(tmp_path / "p.jsonl", *asked(["bob", "sally"]))
    flags = ("-d", "miniature-sae", *SMALL, "--graph_file_dir", tmp_path / "g")
    result = run("attribute", "--prompts", path, *flags)
    assert result.status == cli.MISTAKE and "2 prompts: 1 done, 1 failed" in result.out
    assert "line 1 (bob) failed: RuntimeError: CUDA out of memory.\n" in result.err
    monkeypatch.setattr(worker.ResidualMaker, "make", real)
    result = run("attribute", "--prompts", path, *flags)
    assert result.status == cli.DONE and "1 done, 1 were finished before" in result.out


def test_what_no_prompt_can_do_without_ends_at_once(run: Run, tmp_path: Path):
    path = written(tmp_path / "p.jsonl", *asked())
    flags = ("--graph_file_dir", tmp_path / "g", "-d")
    result = run("attribute", "--prompts", path, *flags, tmp_path / "none")
    assert "does not exist" in result.refusal


def test_serving_at_the_end(
    run: Run, tmp_path: Path, loads: list[Any], monkeypatch: pytest.MonkeyPatch
):
    port, listed = next_free_port(18441), []

    def ask(seconds: float) -> None:
        url = f"http://127.0.0.1:{port}/data/graph-metadata.json"
        with urllib.request.urlopen(url, timeout=10) as answer:
            listed.append([g["slug"] for g in json.loads(answer.read())["graphs"]])
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", ask)
    path = written(tmp_path / "p.jsonl", *asked(["sally"]), b"{")
    flags = ("-d", "miniature-sae", *SMALL, "--graph_file_dir", tmp_path / "g")
    result = run("attribute", "--prompts", path, *flags, "--server", "--port", port)
    assert result.status == cli.MISTAKE and listed == [["sally"]]
    assert "1 of 2 prompts" in result.err.splitlines()[-1]


# Transcoders --------------------------------------------------------------------------------------


def test_transcoders(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from circuit_tracer_qk.plugin import host_command as explaining

    loaded: list[Any] = []
    real = explaining.load_transformer
    monkeypatch.setattr(
        explaining, "load_transformer", lambda *a, **k: loaded.append(a) or real(*a, **k)
    )
    sets = make_set(tmp_path / "set")
    many_, one = tmp_path / "many", tmp_path / "one"
    for folder in (many_ / "g", many_ / "pt", one / "g", one / "pt"):
        folder.mkdir(parents=True)
    lines = asked(["sally", "small"])
    path = written(tmp_path / "p.jsonl", lines[0], b"{", lines[1] | {"max_feature_nodes": 20})
    flags = ("-t", sets, *SMALL, "--max_n_logits", 1)
    out = ("--graph_file_dir", many_ / "g", "-o", many_ / "pt")
    done = run("attribute", "--prompts", path, *flags, *out)
    assert (done.status, len(loaded)) == (cli.MISTAKE, 1), done.err
    assert f"graph files written to {many_}/g/small.json\n3 prompts: 2 done, 1 failed" in done.out
    for slug, nodes in (("sally", 30), ("small", 20)):
        names = ("--slug", slug, "--graph_file_dir", one / "g", "-o", one / "pt" / f"{slug}.pt")
        argv = ("-p", PROMPTS[slug], *flags, "--max_feature_nodes", nodes, *names)
        assert run("attribute", *argv).status == cli.DONE
    assert contents(many_ / "g", many_ / "pt") == contents(one / "g", one / "pt")

    loaded.clear()
    (many_ / "pt" / "sally.pt").write_bytes(b"torn")
    done = run("attribute", "--prompts", path, *flags, *out)
    assert "1 done, 1 were finished before, 1 failed" in done.out and len(loaded) == 1
    assert contents(many_ / "pt") == contents(one / "pt")

    stock = ("--graph_file_dir", tmp_path / "stock", "--no-qk")
    done = run("attribute", "--prompts", path, *flags, *stock)
    assert done.status == cli.MISTAKE and slugs(tmp_path / "stock") == ["sally", "small"]
    assert "qk" not in json.loads((tmp_path / "stock" / "sally.json").read_bytes())
    assert not list(tmp_path.rglob("*.tmp"))

    os.utime(sets / "layer_1.safetensors", (1, 1))
    done = run("attribute", "--prompts", path, "-t", tmp_path / "no", "-o", tmp_path / "no-pt")
    assert done.err.splitlines()[-1].startswith("circuit-tracer-qk: error: the transcoders")
    done = run("attribute", "--prompts", path, *flags, "-o", many_ / "pt")
    assert "2 done" in done.out and "augment" in done.out


# Workers ------------------------------------------------------------------------------------------


def test_two_workers_one_of_which_is_killed(
    run: Run, tmp_path: Path, loads: list[Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as many as here: sums round in the same way
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    first, *others = asked()
    lines = [first, {"prompt": "Aunt", "slug": "doomed"}, b"{", *others]
    path = written(tmp_path / "p.jsonl", *lines)
    flags = ("attribute", "--prompts", path, "-d", "miniature-sae", *SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(worker, "work", deadly_work.attribute_or_die)
        out = ("--graph_file_dir", two / "g", "-o", two / "pt")
        done = run(*flags, *out, "--workers", 2)
    assert done.status == cli.MISTAKE and not loads
    assert done.out.splitlines()[-1] == "6 prompts: 4 done, 2 failed"
    *_, killed, last = done.err.splitlines()
    assert "line 2 (doomed) failed: its process was ended by SIGKILL" in killed
    assert "2 of 6 prompts" in last and "(lines 2, 3;" in last

    written(path, *asked())
    done = run(*flags, "--graph_file_dir", one / "g", "-o", one / "pt")
    assert done.status == cli.DONE
    ours, theirs = contents(one / "g", one / "pt"), contents(two / "g", two / "pt")
    lists = [json.loads(files.pop(Path("g/graph-metadata.json"))) for files in (ours, theirs)]
    assert ours == theirs
    by_slug = [sorted(found["graphs"], key=lambda g: g["slug"]) for found in lists]
    assert by_slug[0] == by_slug[1] and len(by_slug[0]) == 4
    # what the killed one could not do is done next time, and nothing else
    written(path, *lines)
    done = run(*flags, "--graph_file_dir", two / "g", "-o", two / "pt")
    assert "1 done, 4 were finished before, 1 failed" in done.out


@pytest.mark.parametrize("ended", ["interrupted", "killed"])
def test_a_run_that_is_ended_goes_on(run: Run, tmp_path: Path, loads: list[Any], ended: str):
    prompts = [
        f"Aunt {a} met Uncle {b}. I like Aunt" for a in ("Sally", "Mary") for b in ("Bob", "Tom")
    ]
    path = written(tmp_path / "p.jsonl", *prompts * 10)
    pages = tmp_path / "g"
    flags = [
        "attribute",
        "--prompts",
        path,
        "-d",
        "miniature-sae",
        *SMALL,
        "--graph_file_dir",
        pages,
    ]
    argv = [sys.executable, "-m", "circuit_tracer_qk", *map(str, flags), "--workers", "2"]
    # where tests run in the background of a script, processes would start deaf to interrupts
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    running = subprocess.Popen(
        argv, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    signal.signal(signal.SIGINT, before)
    while len(list((pages / FOLDER).glob("p-*.json"))) < 3:
        assert running.poll() is None
        time.sleep(0.01)
    workers = psutil.Process(running.pid).children(recursive=True)
    if ended == "interrupted":
        os.killpg(running.pid, signal.SIGINT)  # as a terminal does
    else:
        running.kill()
    out, err = running.communicate(timeout=60)
    assert not psutil.wait_procs(workers, timeout=30)[1]  # none is left behind
    finished = len(list((pages / FOLDER).glob("p-*.json")))
    assert 3 <= finished < 40
    if ended == "interrupted":
        assert running.returncode == cli.INTERRUPTED
        [line] = err.splitlines()
        assert "the same command goes on" in line
        assert len(slugs(pages)) == out.count("graph files written")
        assert not list(tmp_path.rglob("*.tmp"))
    for done in (f"{40 - finished} done, {finished} were finished before", "0 done, 40 were"):
        result = run(*flags)
        assert result.status == cli.DONE and done in result.out
    assert sorted(slugs(pages)) == [f"p-{i:04d}" for i in range(1, 41)]


def test_processes(tmp_path: Path):
    items = ["a", "deadly", tmp_path / "once", "b", "c"]
    found = dict(
        engines.in_processes(partial(deadly_work.set_up, "here"), deadly_work.do, items, 2)
    )
    assert isinstance(lost := found.pop("deadly"), engines.Lost) and "SIGKILL" in lost.reason
    assert found == {item: ("here", item) for item in items if item != "deadly"}
    for how, some, message in (
        ("dies", ["a"], "no worker is left.*give fewer --workers"),
        ("refuses", ["a"], "there is no model"),
        ("here", ["a", "last"], "no more of it"),
    ):
        with pytest.raises(ctqk.UserError, match=message):
            list(engines.in_processes(partial(deadly_work.set_up, how), deadly_work.do, some, 1))


def test_a_machine_with_another_folder_of_that_name_is_refused(tmp_path: Path):
    marks, requests = Marks(str(tmp_path), None, ""), [Request(1, "a", "a")]
    marks.prepare()
    (marks.folder / "id").write_text("the other machine's")
    set_up = partial(worker.set_up_worker, Namespace(verbose=False), marks, str(tmp_path), "x")
    process = engines.in_processes(set_up, worker.work, requests, 1)
    with pytest.raises(ctqk.UserError, match="is not the folder that it is here"):
        list(process)


def test_ray(run: Run, tmp_path: Path, loads: list[Any], monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("ray")
    here = Path(ctqk.__file__).parents[1]
    paths = os.pathsep.join([str(here), *filter(None, [os.environ.get("PYTHONPATH")])])
    monkeypatch.setenv("PYTHONPATH", paths)
    path = written(tmp_path / "p.jsonl", *asked(), b"{")
    flags = ("attribute", "--prompts", path, "-d", "miniature-sae", *SMALL, "--graph_file_dir")
    done = run(*flags, tmp_path / "g", "--engine", "ray", "--workers", 2)
    assert done.status == cli.MISTAKE and "5 prompts: 4 done, 1 failed" in done.out, done.err
    assert sorted(slugs(tmp_path / "g")) == sorted(PROMPTS) and not loads
    again = run(*flags, tmp_path / "g")
    assert "0 done, 4 were finished before" in again.out and not loads


# The list of graphs -------------------------------------------------------------------------------


def test_writers_of_one_list_lose_nothing(tmp_path: Path):
    def write(name: str) -> None:
        for i in range(10):
            listing.add_to_listing(tmp_path, [{"slug": f"{name}-{i}"}])

    threads = [threading.Thread(target=write, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(slugs(tmp_path)) == sorted(f"{name}-{i}" for name in "abc" for i in range(10))


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Path]:
    """A folder whose list another process writes."""
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom filelock import FileLock\n"
        "from circuit_tracer_qk.graph_files.index import LOCK\n"
        "with FileLock(Path(sys.argv[1], LOCK)):\n    print('locked', flush=True)\n    time.sleep(60)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", program, tmp_path], stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None and other.stdout.readline() == "locked\n"
    yield tmp_path
    other.kill()
    other.communicate()
    listing.add_to_listing(tmp_path, [{"slug": "b"}])  # the lock went with it
    assert slugs(tmp_path) == ["b"]


def test_a_list_that_stays_locked(locked: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(listing, "PATIENCE", 0.2)
    with pytest.raises(ctqk.UserError, match="has been locked for 0 s by another process"):
        listing.add_to_listing(locked, [{"slug": "a"}])
    assert not (locked / "graph-metadata.json").exists()
