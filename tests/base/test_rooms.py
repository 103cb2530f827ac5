"""The rooms of the package import in one direction, and what starts often starts light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import circuit_tracer_qk as ctqk

PACKAGE = "circuit_tracer_qk"
FOLDER = Path(ctqk.__file__).parent

# A room imports from itself and from rooms above it in this list. The facade is the package's
# own __init__.py.
FACADE = "the facade"
ROOMS = [
    "base",
    "host",
    "model",
    "dictionaries",
    "attribution",
    "attribution.residual",
    "attribution.transcoder",
    "steering",
    "graph_files",
    "frontend",
    "plugin",
    FACADE,
    "cli",
]
APART = {"attribution.residual", "attribution.transcoder"}  # neither imports the other


def modules() -> dict[str, Path]:
    """Every module by its name inside the package; the package itself is ``""``."""
    names = {}
    for path in sorted(FOLDER.rglob("*.py")):
        parts = path.relative_to(FOLDER).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


MODULES = modules()


def room_of(module: str) -> str:
    """The room that a module lies in."""
    if module == "__main__":
        return "cli"
    holders = [r for r in ROOMS if module == r or module.startswith(f"{r}.")]
    return max(holders, key=len, default=FACADE)


def imported(source: str, module: str, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """(line, imported module) of every import of this package, wherever in the source it stands.

    Args:
        module: the name of the module that the source belongs to, for relative imports.
        is_package: whether it is an ``__init__.py``.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = (node.module or "").split(".") if node.module else []
            if node.level:
                above = [PACKAGE, *filter(None, module.split("."))]
                base = above[: len(above) - node.level + is_package] + base
            names = [".".join([*base, alias.name]) for alias in node.names]
        else:
            continue
        for name in names:
            package, _, inner = name.partition(".")
            if package != PACKAGE:
                continue
            # "from m import x": x may be a module, or a name in m
            yield node.lineno, inner if inner in MODULES else inner.rpartition(".")[0]


def is_wrong(importer: str, target: str) -> bool:
    """Whether the import of a module by another one runs up or sideways."""
    here, there = room_of(importer), room_of(target)
    return ROOMS.index(there) > ROOMS.index(here) or {here, there} == APART


def wrong_arrows(sources: dict[str, str]) -> list[str]:
    """The imports that run up or sideways, as "importer:line -> imported"."""
    return [
        f"{module or PACKAGE}:{line} -> {target or PACKAGE}"
        for module, source in sources.items()
        for line, target in imported(source, module, MODULES[module].name == "__init__.py")
        if is_wrong(module, target)
    ]


def test_every_module_lies_in_a_room() -> None:
    assert {m for m in MODULES if room_of(m) == FACADE} == {""}
    assert {room_of(module) for module in MODULES} == set(ROOMS)


def test_imports_run_in_one_direction() -> None:
    wrong = wrong_arrows({name: path.read_text() for name, path in MODULES.items()})
    assert not wrong


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("base.errors", "import circuit_tracer_qk.host.graph"),
        ("base.errors", "from circuit_tracer_qk import UserError"),
        ("base.errors", "from circuit_tracer_qk import host"),
        ("base.errors", "from .. import model"),
        ("base.errors", "from ..host.graph import Graph"),
        ("base", "from ..host import graph"),
        ("attribution.qk", "from circuit_tracer_qk.attribution import residual"),
        ("attribution.qk", "if TYPE_CHECKING:\n    from circuit_tracer_qk.frontend import page"),
        ("attribution.qk", "def f():\n    from circuit_tracer_qk.cli.main import main"),
        ("attribution.residual.qk", "from circuit_tracer_qk.attribution.transcoder import qk"),
        ("attribution.transcoder.qk", "from circuit_tracer_qk.attribution.residual.qk import x"),
        ("", "from circuit_tracer_qk.cli.main import main"),
    ],
)
def test_a_wrong_import_is_seen(module: str, source: str) -> None:
    assert wrong_arrows({module: source})


def test_a_right_import_is_not() -> None:
    source = "from circuit_tracer_qk.attribution.qk import x\nfrom . import graph\nimport torch"
    assert not wrong_arrows({"attribution.residual.qk": source})
    assert not wrong_arrows({"cli.main": "import circuit_tracer_qk as ctqk"})


HEAVY = ("torch", "transformers", "transformer_lens", "pydantic", "jaxtyping")


def loaded_by(program: str) -> list[str]:
    """Which of the heavy libraries a fresh process has loaded after a program."""
    ending = f"\nimport sys\nprint('LOADED', *(m for m in {HEAVY!r} if m in sys.modules))"
    run = subprocess.run(
        [sys.executable, "-c", program + ending], capture_output=True, text=True, check=True
    )
    return run.stdout.splitlines()[-1].split()[1:]


def test_the_frontend_loads_no_torch() -> None:
    frontend = [f"{PACKAGE}.{module}" for module in MODULES if room_of(module) == "frontend"]
    assert len(frontend) > 5
    assert "torch" not in loaded_by("\n".join(f"import {module}" for module in frontend))


def command(*argv: str, is_error: bool = False) -> str:
    """A program that runs the command line as the console script does."""
    return (
        "from circuit_tracer_qk.cli.main import main\n"
        f"try:\n    status = main({list(argv)!r})\nexcept SystemExit as end:\n    status = end.code\n"
        f"assert bool(status) == {is_error}, status"
    )


@pytest.mark.parametrize(
    "program",
    [
        f"import {PACKAGE}",
        command("--help"),
        command("attribute", "--help"),
        command("start-server", "--graph_file_dir", "absent", is_error=True),
        command("attribute", "-p", "x", "-t", "y", is_error=True),
        command("qk", "absent.pt", "--head", "L1H2", is_error=True),
        command("qk", "absent.pt", "--head", "L1H2", "-t", "x", is_error=True),
        command("augment", "absent.pt", "--slug", "a", "--graph_file_dir", ".", is_error=True),
        command("steer", "--edits", "absent.json", is_error=True),
        command("demo", "--no-such-flag", is_error=True),
    ],
    ids=[
        "import",
        "help",
        "help of a command",
        "no folder",
        "no output named",
        "no graph for qk",
        "no graph of transcoders for qk",
        "no graph for augment",
        "no edits for steer",
        "wrong flag",
    ],
)
def test_the_start_loads_nothing_heavy(program: str) -> None:
    assert not loaded_by(program)


def test_no_pattern_takes_the_digits_of_other_scripts() -> None:
    for path in FOLDER.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert r"\d" not in node.value, f"{path}:{node.lineno}: write [0-9]"


def test_circuit_tracer_is_touched_in_the_host_room_alone() -> None:
    for path in FOLDER.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == "circuit_tracer" for name in names):
                assert path.parent.name == "host", path
