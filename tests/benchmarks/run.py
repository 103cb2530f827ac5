"""How fast this package is, as one table: `make bench`, or

    python tests/benchmarks/run.py [PART ...] [--threads N] [--repeats R] [--device cuda] [--json F]

Parts: edges, tables, runs, long, files, startup, loading (all if none is named), and `whole`, a graph of 2,048
tokens, which takes minutes. Every number is the median of warm repeats, with the least and the
most; every ratio is of two sides measured in turns within this run. A floor is what a stage's
matrix products take at this machine's measured rate, or its bytes at its measured bandwidth.

Nothing here is a test. Ask for no more threads than there are idle cores: on a busy machine a ratio
says as much about its neighbours as about this package.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import edges
import files
import loading
import long
import measuring
import runs
import shapes
import startup
import tables
import torch
from measuring import Ceilings, Row

PARTS = ("edges", "tables", "runs", "long", "files", "startup", "loading", "whole")
EDGE_TOKENS = (32, 128)


def measured(parts: list[str], ceilings: Ceilings, repeats: int) -> Iterator[list[Row]]:
    """The rows of each part as they come."""
    if "edges" in parts:
        for n_pos in EDGE_TOKENS:
            yield edges.measure(n_pos, ceilings, repeats)
    if "tables" in parts:
        for shape in tables.SHAPES:
            yield tables.measure(*shape, ceilings, repeats)
    if "runs" in parts:
        for name in shapes.SHAPES:
            yield runs.measure(name, ceilings, repeats)
    alone: dict[str, Callable[[], list[Row]]] = {
        "long": lambda: long.measure(ceilings, repeats),
        "files": lambda: files.measure(repeats=repeats),
        "startup": lambda: startup.measure(repeats),
        "loading": loading.measure,
        "whole": whole,
    }
    for name, measure in alone.items():
        if name in parts:
            yield measure()


def whole() -> list[Row]:
    """The long graph in a process of its own, whose peak memory is its own."""
    command = [sys.executable, str(Path(long.__file__)), str(torch.get_num_threads())]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [Row(**row) for row in json.loads(out)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", help=", ".join(PARTS))
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", type=Path, help="write the numbers there too")
    arguments = parser.parse_args()
    unknown = [part for part in arguments.parts if part not in PARTS]
    if unknown:
        parser.error(f"no part is called {unknown[0]}: {', '.join(PARTS)}")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", message="(?s).*FVU above 1")  # random dictionaries
    ceilings = Ceilings(arguments.device)
    about = measuring.machine(arguments.device, ceilings, arguments.repeats)
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print("median (least - most)", flush=True)
    rows: list[Row] = []
    parts = arguments.parts or [part for part in PARTS if part != "whole"]
    for some in measured(parts, ceilings, arguments.repeats):
        print(*some, sep="\n", flush=True)
        rows += some
        if arguments.json:  # part by part: what a later one breaks off is not lost
            about = measuring.machine(arguments.device, ceilings, arguments.repeats)
            document = about | {"rows": [row.document() for row in rows]}
            arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
