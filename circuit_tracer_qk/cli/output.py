"""What a command prints, and what it lets through of logs, warnings and what libraries print."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

WARNINGS = ("ReconstructionWarning", "UncheckedWarning", "ErrorShareWarning")


@contextlib.contextmanager
def log_output(program: str, verbose: bool) -> Iterator[None]:
    """Within, logs and warnings are shown if ``verbose``, else ours of numbers and first tokens alone.

    Args:
        program: the name that a warning of ours begins with.
        verbose: of ``--verbose``.
    """
    level, disabled = logging.root.level, logging.root.manager.disable
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    with warnings.catch_warnings():
        if verbose:
            logging.root.addHandler(handler)
            logging.root.setLevel(logging.INFO)
        else:
            warnings.simplefilter("ignore")
            logging.disable(logging.CRITICAL)
        for ours in (
            "FVU above 1",
            "holds no digests",
            "errors take",
        ):  # a number may be meaningless
            warnings.filterwarnings("always", f"(?s).*{ours}")
        warnings.filterwarnings("default", ".* stands in front of the prompt")  # said once
        show = warnings.showwarning

        def one_line(message: Any, category: type[Warning], *rest: Any) -> None:
            if category.__name__ in WARNINGS:
                print(f"{program}: warning: {message}", file=sys.stderr)
            elif category.__name__ == "FirstTokenWarning":
                print(f"{program}: note: {message}", file=sys.stderr)
            else:
                show(message, category, *rest)

        warnings.showwarning = one_line
        try:
            yield
        finally:
            logging.root.removeHandler(handler)
            logging.root.setLevel(level)
            logging.disable(disabled)


def silence_stdout() -> contextlib.AbstractContextManager[Any]:
    """Keep what libraries print off stdout, where the result goes."""
    return contextlib.redirect_stdout(io.StringIO())


def show(lines: Sequence[str]) -> None:
    """Print lines, at once."""
    print(*lines, sep="\n", flush=True)
