"""Settings and facilities that every test shares."""

from __future__ import annotations

import os

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")
os.environ.update(OMP_NUM_THREADS="1")  # tiny tensors: more threads only wait for each other

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from helpers.shapes import check_shapes
from jaxtyping import install_import_hook

# before any module of these is imported
_WITH_SHAPES = ["circuit_tracer_qk.model", "circuit_tracer_qk.attribution"]
install_import_hook(_WITH_SHAPES, f"{check_shapes.__module__}.{check_shapes.__qualname__}")

import pytest
from helpers import browsing, sampling
from helpers.architectures import ARCHITECTURES
from helpers.commands import Result
from helpers.errors import record_error, worst_errors
from helpers.fuzzing import QUICK
from hypothesis import settings

from circuit_tracer_qk.cli import main as cli

# the same examples every time, on a machine that may be busy
settings.register_profile("suite", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("suite")

left_out: list[int] = []  # how many cases each process left out of the matrices


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--all``: every case of every matrix; ``--cases`` and ``--seed`` of ``tests/fuzz``."""
    parser.addoption("--all", action="store_true", help="run the matrices whole, not a sample")
    parser.addoption("--cases", type=int, default=QUICK, help="random cases of each fuzz test")
    parser.addoption("--seed", type=int, default=0, help="where the random cases begin")


@pytest.hookimpl(trylast=True)  # of what -k and -m leave
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without ``--all``, keep a sample of every large matrix."""
    if config.getoption("--all"):
        return
    items[:], others = sampling.sample(items)
    config.hook.pytest_deselected(items=others)
    left_out.append(len(others))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """One of several processes (``-n``) hands what it found to the one that prints."""
    output: dict[str, Any] | None = getattr(session.config, "workeroutput", None)
    if output is not None:
        found = [(*key, error) for key, error in worst_errors.items()]
        output.update(worst_errors=found, skipped=browsing.skipped, left_out=left_out)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """The one that prints takes it."""
    output = getattr(node, "workeroutput", {})
    for found in output.get("worst_errors", ()):
        record_error(*found)
    browsing.skipped += output.get("skipped", ())
    left_out.extend(output.get("left_out", ()))


@pytest.fixture(name="record_error", scope="session")
def record_error_fixture() -> Callable[[str, str, float], None]:
    """``record_error`` for tests that take it as a fixture."""
    return record_error


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models and dictionaries beside the repository; skips without it."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip(f"needs {folder.name}/ beside the repository")
    return folder


@pytest.fixture
def run(capsys):
    """Run a command in this process."""

    def run(*argv: object) -> Result:
        status = cli.main([str(arg) for arg in argv])
        return Result(status, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def browser() -> Iterator[browsing.Browser]:
    """The system's browser; skips without one, fails instead in CI."""
    with browsing.launched() as browser:
        yield browser


@pytest.fixture
def watch(browser: browsing.Browser) -> Iterator[browsing.Watch]:
    """A page in a wide window: no console error and no request to another machine may come of it."""
    with browsing.opened(browser) as watch:
        yield watch


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what was left out, and the worst errors: identities down, architectures across."""
    option = terminalreporter.config.getoption
    terminalreporter.write_line(
        f"random cases: --cases {option('--cases')} --seed {option('--seed')}"
    )
    for line in dict.fromkeys(browsing.skipped):
        terminalreporter.write_line(line)
    n_left_out = max(left_out, default=0)  # every process leaves out the same
    if n_left_out:
        terminalreporter.write_line(
            f"{n_left_out} cases of large matrices were left out: a seeded sample ran that touches "
            "every row and column; `make test-all` (pytest --all) runs all"
        )
    if not worst_errors:
        return
    identities = list(dict.fromkeys(identity for identity, _ in worst_errors))
    architectures = [name for name in ARCHITECTURES if any(name == a for _, a in worst_errors)]
    first = max(map(len, identities))
    widths = [max(len(architecture), 7) for architecture in architectures]
    terminalreporter.section("worst errors")
    header = (a.rjust(w) for a, w in zip(architectures, widths, strict=True))
    terminalreporter.write_line("  ".join([" " * first, *header]))
    for identity in identities:
        cells = (
            (f"{worst_errors[identity, a]:.1e}" if (identity, a) in worst_errors else "-").rjust(w)
            for a, w in zip(architectures, widths, strict=True)
        )
        terminalreporter.write_line("  ".join([identity.ljust(first), *cells]))
