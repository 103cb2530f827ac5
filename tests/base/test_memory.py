"""Whatever a library says of full memory, a user reads one sentence."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch

import circuit_tracer_qk as ctqk
from circuit_tracer_qk.base.memory import fitting


def _system() -> None:
    raise OSError(errno.ENOMEM, "Cannot allocate memory")


def _gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")


FULL: dict[str, tuple[Callable[[], object], str]] = {
    "python": (lambda: bytearray(2**62), ""),
    "numpy": (lambda: np.zeros((2**30, 2**20)), "(8.00 PiB more were asked for)"),
    "torch": (lambda: torch.empty(2**45, dtype=torch.uint8), "(3.28e+04 GiB more were asked for)"),
    "sizes": (lambda: torch.empty(2**40, 2**40), ""),
    "gpu": (_gpu, "(2.00 GiB more were asked for)"),
    "system": (_system, ""),
}


@pytest.mark.parametrize("kind", FULL)
def test_full_memory_is_one_sentence(kind: str):
    allocate, asked = FULL[kind]
    work = fitting("the table", "ask for fewer heads")(allocate)
    with pytest.raises(ctqk.UserError) as refusal:
        work()
    expected = f"the table does not fit into memory {asked}".strip()
    assert str(refusal.value) == f"{expected}: ask for fewer heads."


def test_other_errors_and_the_sentence_of_what_is_within_go_through():
    for error in (
        RuntimeError("shapes differ"),
        OSError(2, "none"),
        KeyError("x"),
        ctqk.UserError("x"),
    ):
        with pytest.raises(type(error)) as raised, fitting("the graph", "shorten it"):
            raise error
        assert raised.value is error
    with pytest.raises(ctqk.UserError, match="the table does"), fitting("the graph", "shorten it"):
        with fitting("the table", "ask for fewer heads"):
            raise MemoryError


SCRIPT = """
import resource
import circuit_tracer_qk as ctqk
model = ctqk.load_model(device="cpu")
ctqk.attribute("I met Aunt Sally", model)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (20 << 20), -1))
try:
    ctqk.attribute([1] + [3 + i % 50 for i in range(model.cfg.n_ctx - 1)], model)
except ctqk.UserError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux how much memory is used")
def test_a_prompt_too_long_for_the_memory():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300
    )
    assert "this prompt's graph does not fit into memory" in done.stdout, done.stderr
    assert "give a shorter prompt" in done.stdout
