"""circuit-tracer's command line as another release of it may be."""

from __future__ import annotations

import argparse

import pytest
from circuit_tracer import __main__ as stock

from circuit_tracer_qk.host.cli import known_parser


def replace_command(
    monkeypatch: pytest.MonkeyPatch, command: str, **more: dict[str, object]
) -> None:
    """Give one command of the installed circuit-tracer the flags of 0.5.0 and some more.

    Args:
        command: "attribute" or "start-server".
        more: the name of a flag, without its dashes -> arguments of ``add_argument``.
    """

    def main() -> None:
        parser = argparse.ArgumentParser()
        commands = parser.add_subparsers(dest="command")
        flags = commands.add_parser(command, parents=[known_parser(command)])
        for name, options in more.items():
            flags.add_argument(f"--{name}", **options)  # type: ignore[arg-type]
        parser.parse_args()

    monkeypatch.setattr(stock, "main", main)
