"""The command line: which commands there are, and how one of them ends."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import circuit_tracer_qk
from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.base.memory import fitting
from circuit_tracer_qk.base.one_line import one_line
from circuit_tracer_qk.base.rules import check_flags, read_number, read_whole
from circuit_tracer_qk.cli import (
    attribute,
    augment,
    convert,
    demo,
    dictionaries,
    qk,
    start_server,
    steer,
)
from circuit_tracer_qk.cli.arguments import PROGRAM, add_verbose
from circuit_tracer_qk.cli.features import command as features
from circuit_tracer_qk.cli.output import any_text, discard_stdout, log_output, show

DONE, MISTAKE, INTERRUPTED, PIPE_CLOSED = 0, 2, 130, 141
COMMANDS = {
    "demo": demo,
    "attribute": attribute,
    "augment": augment,
    "qk": qk,
    "steer": steer,
    "dictionaries": dictionaries,
    "convert": convert,
    "features": features,
    "start-server": start_server,
}
"""Each has HELP, DESCRIPTION, perhaps EPILOG, ``add_arguments(parser)`` and ``run(args)``, and imports what
takes time (torch, the model, circuit-tracer) only when it runs."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments; the process's own if left out.

    Returns:
        The exit status: 0 done, 2 for a mistake of the user's (its last line on stderr says what
        and the way out), 130 interrupted, 141 where nobody reads what is printed.
    """
    with any_text():
        return _run(sys.argv[1:] if argv is None else list(argv))


def _run(argv: list[str]) -> int:
    """Run one command, whose output can be written whatever is in it."""
    try:
        args = command_line(argv[0] if argv else "").parse_args(argv)
        full = fitting(f"what {args.command} works on", "give less at a time, or free memory")
        with full, log_output(PROGRAM, args.verbose):
            COMMANDS[args.command].run(args)
        show()
    except UserError as error:
        print(f"{PROGRAM}: error: {one_line(str(error))}", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # `| head` has read enough
        discard_stdout()
        return PIPE_CLOSED
    except OSError as error:  # what the system refuses and nothing within foresaw
        named = error.filename or "a temporary file"
        problem = (
            f"{named} cannot be used ({error.strerror or error}): give another place, or free it"
        )
        print(f"{PROGRAM}: error: {one_line(problem)}.", file=sys.stderr)
        return MISTAKE
    return DONE


READ_AS: dict[Any, Callable[[str], Any]] = {int: read_whole, float: read_number}
"""Python's own reading takes digits of any script, underscores and nan."""


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, unknown = super().parse_known_args(args, namespace)
        flags = {a.dest: "/".join(a.option_strings) or a.dest for a in self._actions}
        check_flags(flags, vars(parsed))
        return parsed, unknown

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")


def command_line(command: str) -> argparse.ArgumentParser:
    """The parser of the whole command line.

    Args:
        command: the command that is run; only its arguments are added, because some commands read
            theirs from circuit-tracer, which takes time.
    """
    parser = _Parser(
        prog=PROGRAM,
        description="Why attention heads looked where they looked: QK attributions and head "
        "loadings for circuit-tracer's attribution graphs.",
    )
    version = f"{PROGRAM} {circuit_tracer_qk.__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        # a flag of ours takes the place of circuit-tracer's
        subparser = commands.add_parser(name, help=module.HELP, conflict_handler="resolve")
        subparser.description = module.DESCRIPTION
        subparser.epilog = getattr(module, "EPILOG", None)
        if name == command:
            module.add_arguments(subparser)
            add_verbose(subparser)
            for action in subparser._actions:  # circuit-tracer's among them
                action.type = READ_AS.get(action.type, action.type)
    return parser
