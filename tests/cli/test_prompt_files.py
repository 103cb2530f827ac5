"""Files of prompts of other kinds, and names that other systems take for one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.cases import build

import circuit_tracer_qk as ctqk
from circuit_tracer_qk.base.files import check_case, check_names
from circuit_tracer_qk.cli.prompts.lines import read_prompts

PROMPT = json.dumps({"prompt": "I like Aunt", "slug": "a"})


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (
            f"[{PROMPT}, {PROMPT}]".encode(),
            "is a JSON array: give --prompts one JSON object a line",
        ),
        (f"[\n{PROMPT},\n{PROMPT}\n]\n".encode(), "is a JSON array"),
        (PROMPT.encode("utf-16"), "is not UTF-8 text .UTF-16, perhaps.: save it as UTF-8"),
        (PROMPT.encode("utf-16-le"), "is not UTF-8 text .UTF-16, perhaps.: save it as UTF-8"),
        (b"I like Aunt\nI met Aunt Sally\n", "is plain text: give --prompts one JSON object"),
    ],
)
def test_another_kind_of_file_is_said_once(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    with pytest.raises(ctqk.UserError, match=problem) as refused:
        read_prompts(path)
    assert str(refused.value).count("prompts.jsonl") == 1


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + PROMPT.encode())
    [request], bad = read_prompts(path)
    assert request.slug == "a" and not bad


def test_a_key_that_stands_twice_is_a_bad_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "I met", "prompt": "I like"}\n' + PROMPT)
    [request], [bad] = read_prompts(path)
    assert request.slug == "a"
    assert bad == (1, "the key 'prompt' stands twice in it: keep one")


def test_names_that_differ_in_capitals_only_are_one(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(PROMPT + "\n" + PROMPT.replace('"a"', '"A"'))
    [request], [bad] = read_prompts(path)
    assert (request.slug, bad.line) == ("a", 2) and "the slug 'A' is line 1's" in bad.problem
    (tmp_path / "Sally.json").touch()
    with pytest.raises(ctqk.UserError, match="has Sally.json, and sally.json would be the same"):
        check_case(tmp_path, "sally.json")
    check_case(tmp_path, "Sally.json")  # itself


@pytest.mark.parametrize("slug", ["CON", "nul", "aux.txt", "Com1", "lpt9.a.b", "graph."])
def test_names_that_windows_keeps_for_itself_are_refused(slug: str) -> None:
    with pytest.raises(ctqk.UserError, match="no file's name on Windows"):
        check_names(slug, None)


@pytest.mark.parametrize("slug", ["console", "com10", "nul-1", "a.con", "COM"])
def test_names_that_only_look_like_those_are_taken(slug: str) -> None:
    check_names(slug, None)


def test_a_graph_does_not_take_the_name_of_another(tmp_path: Path) -> None:
    case = build("gpt2", tmp_path, "sae", torch.float32)
    ctqk.create_graph_files(case.graph, "Sally", tmp_path / "graphs")
    with pytest.raises(ctqk.UserError, match=r"has Sally\.json"):
        ctqk.create_graph_files(case.graph, "sally", tmp_path / "graphs")
    assert not (tmp_path / "graphs" / "sally.json").exists()
