"""What a command prints, and what it lets through of logs, warnings and what libraries print."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from circuit_tracer_qk.base.errors import UserError

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
        for once in ("stands in front of the prompt", "lack the factor of Gemma-3"):
            warnings.filterwarnings("default", f".* {once}")
        show = warnings.showwarning

        def one_line(message: Any, category: type[Warning], *rest: Any) -> None:
            if category.__name__ in WARNINGS:
                print(f"{program}: warning: {message}", file=sys.stderr)
            elif category.__name__ in ("FirstTokenWarning", "EmbeddingScaleWarning"):
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


@contextlib.contextmanager
def any_text() -> Iterator[None]:
    """Within, what a stream's encoding does not have is escaped, and a closed stream takes all."""
    with contextlib.ExitStack() as put_back:
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream is None:  # closed before the process began
                nowhere = put_back.enter_context(open(os.devnull, "w", encoding="utf-8"))
                setattr(sys, name, nowhere)
                put_back.callback(setattr, sys, name, None)
            elif isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
                stream.reconfigure(errors="backslashreplace")
                put_back.callback(stream.reconfigure, errors="strict")
        yield


def show(lines: Sequence[str] = ()) -> None:
    """Print lines, at once, after whatever was printed before.

    Raises:
        UserError: they cannot be written.
        BrokenPipeError: nobody reads them.
    """
    try:
        print(*lines, sep="\n", end="\n" if lines else "", flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        discard_stdout()
        raise UserError(
            f"what is printed cannot be written ({error.strerror}): print it elsewhere."
        ) from error


def discard_stdout() -> None:
    """Let what is still to be printed go nowhere, so that the process ends quietly."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def silence_stdout() -> contextlib.AbstractContextManager[Any]:
    """Keep what libraries print off stdout, where the result goes."""
    return contextlib.redirect_stdout(io.StringIO())
