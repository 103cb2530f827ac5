"""The ``>>>`` examples of every docstring in the package, run as written.

An example may use these names without making them:

    ctqk     the package
    torch    as imported
    prompt   "I always loved visiting Aunt Sally. Whenever I was feeling sad, Aunt"
    model    ctqk.load_model(), the bundled miniature with its dictionaries
    graph    ctqk.attribute(prompt, model)
    tmp      a temporary folder, as text; each docstring has one of its own

Examples of one docstring share what they make; those of another start from the list above. ``...``
in an expected output stands for any text, and white space counts as one blank.
"""

from __future__ import annotations

import doctest
import pkgutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import circuit_tracer_qk as ctqk

PROMPT = "I always loved visiting Aunt Sally. Whenever I was feeling sad, Aunt"
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def examples() -> list[doctest.DocTest]:
    """Every docstring with an example, of every module of the package."""
    deep, flat = doctest.DocTestFinder(), doctest.DocTestFinder(recurse=False)
    tests: list[doctest.DocTest] = []
    for info in pkgutil.walk_packages(ctqk.__path__, f"{ctqk.__name__}."):
        if info.name.endswith("__main__"):
            continue
        module = import_module(info.name)
        tests += flat.find(module, info.name)
        for name, value in vars(module).items():
            if callable(value) and getattr(value, "__module__", "") == info.name:
                # module=False: what jaxtyping wrapped counts as the module's too
                tests += deep.find(value, f"{info.name}.{name}", False, vars(module))
    return sorted((test for test in tests if test.examples), key=lambda test: test.name)


@pytest.fixture(scope="module")
def ready() -> dict[str, Any]:
    """What every example finds ready."""
    model = ctqk.load_model()
    graph = ctqk.attribute(PROMPT, model)
    return {"ctqk": ctqk, "torch": torch, "prompt": PROMPT, "model": model, "graph": graph}


@pytest.mark.parametrize("example", examples(), ids=lambda example: example.name)
def test_an_example_prints_what_it_says(
    example: doctest.DocTest,
    ready: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    example.globs = {**example.globs, **ready, "tmp": str(tmp_path)}
    report: list[str] = []
    doctest.DocTestRunner(optionflags=OPTIONS).run(example, out=report.append)
    assert not report, "".join(report)


def test_examples_are_found() -> None:
    names = {example.name.rpartition(".")[2] for example in examples()}
    assert {"feature_name", "parse_feature_name"} <= names
