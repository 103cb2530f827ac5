"""YAML files that others wrote: what is read, what is refused, and how soon."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

import circuit_tracer_qk as ctqk
from circuit_tracer_qk.base.yaml_files import LONGEST, read_yaml

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)
REFUSED = {
    "bomb": (BOMB, "has more than 100000 values, its aliases written out"),
    "itself": ("a: &a [*a]", "has more than 100000 values"),
    "long": ("a: " + "x" * LONGEST, "it has more than"),
    "deep": ("a: " + "{a: " * 5000, "is not valid YAML"),
    "syntax": ("a: [1", "is not valid YAML"),
    "object": ("a: !!python/object:os.system 1", "is not valid YAML"),
    "tag": ("a: !!timestamp x", "is not valid YAML"),
    "date": ("a: 2001-99-99", "is not valid YAML"),
    "digits": ("a: 0x" + "f" * 9000, "is not valid YAML"),
    "list": ("[1]", "should be a mapping such as `k: 1`"),
    "empty": ("", "should be a mapping"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_sentence_at_once(tmp_path: Path, name: str):
    text, message = REFUSED[name]
    path = tmp_path / "config.yaml"
    path.write_text(text)
    start = time.monotonic()
    with pytest.raises(ctqk.UserError, match=message) as refusal:
        read_yaml(path, "k: 1")
    assert time.monotonic() - start < 10
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)


def test_aliases_are_read(tmp_path: Path):
    path = tmp_path / "config.yaml"
    path.write_text("in: &hook hook_resid_post\nout: *hook\n")
    assert read_yaml(path, "k: 1") == {"in": "hook_resid_post", "out": "hook_resid_post"}


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
def test_dictionaries_whose_config_is_no_regular_file(tmp_path: Path, kind: str, linked: bool):
    """A FIFO waits for a writer and a device never ends: neither is opened."""
    config = tmp_path / "set" / "config.yaml"
    config.parent.mkdir()
    place = tmp_path / "elsewhere" if linked else config
    if kind == "fifo":
        os.mkfifo(place)
    elif kind == "folder":
        place.mkdir()
    else:
        place = Path("/dev/zero")
    if place != config:
        config.symlink_to(place)
    with pytest.raises(ctqk.UserError, match="config.yaml"):
        ctqk.load_dictionaries(config.parent)
