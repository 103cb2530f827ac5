"""What a command leaves behind."""

from __future__ import annotations

from circuit_tracer_qk.cli import main as cli


class Result:
    """What one command left behind."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err

    @property
    def refusal(self) -> str:
        """The message of a mistake, checked to be one line with status 2 and nothing else."""
        assert (self.status, self.out) == (cli.MISTAKE, "")
        [line] = self.err.splitlines()
        assert line.startswith("circuit-tracer-qk: error: ")
        return line
