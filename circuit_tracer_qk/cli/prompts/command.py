"""``attribute --prompts``: its arguments, and the order of work over a file of prompts."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Generator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.base.files import check_names
from circuit_tracer_qk.cli.prompts import engines, worker
from circuit_tracer_qk.cli.prompts.progress import Marks, Outcome, work_of
from circuit_tracer_qk.graph_files.index import add_to_listing, read_listing

if TYPE_CHECKING:
    from circuit_tracer_qk.cli.prompts.lines import Request

LISTED_EVERY = 5.0  # seconds between two writings of the list of graphs
IRRELEVANT = (
    *("prompts", "prompt", "slug", "graph_output_path", "graph_file_dir", "force", "workers"),
    *("engine", "server", "port", "host", "online", "verbose", "command", "features_dir"),
    "host_dtypes",
)
"""Flags that no graph hangs on."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that ``attribute`` takes for many prompts."""
    add = parser.add_argument
    add(
        "--prompts",
        metavar="FILE",
        help='Many prompts in place of -p: one JSON object a line, {"prompt": "...", "slug": "..."}, '
        "where slug, max_n_logits, desired_logit_prob, max_feature_nodes, node_threshold, "
        "edge_threshold may be left out. The model is loaded once; "
        "-o/--graph_output_path is a folder for SLUG.pt; the same command again does what is not "
        "finished.",
    )
    add(
        "--workers",
        type=int,
        metavar="N",
        help="With --prompts: processes, each with a model of its own (default: 1; on Ray one a "
        "GPU, or a machine).",
    )
    add(
        "--engine",
        choices=engines.ENGINES,
        default="local",
        help="With --prompts: where they are, this machine or a Ray cluster whose machines share "
        "the folders (default: local).",
    )
    add("--force", action="store_true", help="With --prompts: do finished prompts again.")


def wanted(args: argparse.Namespace) -> bool:
    """Whether a file of prompts was given.

    Raises:
        UserError: neither it nor a prompt, or both, or flags that are for it alone.
    """
    if args.prompts is not None:
        if args.prompt is not None:
            raise UserError("-p and --prompts are both given: give one of them.")
        return True
    if args.prompt is None:
        raise UserError(
            "the following arguments are required: -p/--prompt, or --prompts for a file of them; "
            "see `circuit-tracer-qk attribute --help`"
        )
    given = {
        "--workers": args.workers is not None,
        "--engine": args.engine != "local",
        "--force": args.force,
    }
    for flag, is_given in given.items():
        if is_given:
            raise UserError(
                f"{flag} is for a file of prompts: give --prompts FILE, or leave it out."
            )
    return False


def check(args: argparse.Namespace) -> None:
    """Refuse what can be refused before the file is read; ``~`` is taken for what it means.

    Raises:
        UserError: what, and the way out.
    """
    for name in ("graph_output_path", "graph_file_dir"):
        if (value := getattr(args, name)) is not None:
            setattr(args, name, str(Path(value).expanduser()))
    saved, pages = args.graph_output_path, args.graph_file_dir
    if saved is None and pages is None:
        raise UserError(
            "no output is named: give --graph_file_dir for graph files, or -o/--graph_output_path "
            "for a folder of .pt files."
        )
    if saved is not None and (saved.endswith(".pt") or os.path.isfile(saved)):
        raise UserError(
            f"with --prompts -o/--graph_output_path is a folder, for SLUG.pt of every line: {saved} "
            "is a file."
        )
    if args.server and pages is None:
        raise UserError("--server needs --graph_file_dir: give it too.")
    if args.slug is not None or args.np_model is not None:
        check_names("x" if args.slug is None else args.slug, args.np_model)
    engines.check(args.engine)


def run(args: argparse.Namespace, program: str) -> UserError | None:
    """Do what is not finished.

    Args:
        args: the parsed arguments, checked.
        program: its name, for what is said on stderr.

    Returns:
        What to say at the end of a run in which some lines failed.

    Raises:
        UserError: nothing can be done: the file, the model, the engine, the list of graphs.
    """
    from circuit_tracer_qk.cli.prompts.lines import read_prompts

    path = Path(args.prompts).expanduser()
    requests, bad = read_prompts(path, args.slug)
    report = _Report(program, path, len(requests) + len(bad))
    for line, problem in bad:
        report.failed(line, problem)
    arguments = {k: v for k, v in vars(args).items() if k not in IRRELEVANT}
    outputs = [Path(p) for p in (args.graph_file_dir, args.graph_output_path) if p]
    work = work_of(arguments, (args.model, args.dictionaries, args.transcoder_set), outputs)
    marks = Marks(args.graph_file_dir, args.graph_output_path, work)
    listing = _Listing(marks.pages)
    left: list[Request] = []
    for request in requests:
        listed = None if args.force else marks.find(request)
        if listed is None:
            left.append(request)
        else:
            listing.repair(listed)
    report.finished = len(requests) - len(left)
    try:
        if left:
            marks.prepare()
            bar = tqdm(total=len(left), desc="Prompts", leave=False, delay=2, disable=None)
            with bar, closing(_results(args, marks, left, program)) as results:
                for request, outcome in results:
                    bar.update()
                    report.add(request, outcome, marks.pages)
                    listing.add(outcome.listed)
    except KeyboardInterrupt:
        report.interrupted()
        raise
    finally:
        listing.write()
    report.end()
    if args.transcoder_set is not None and args.qk and marks.pages is None and report.done:
        print(
            "heads go into graph files: give --graph_file_dir too, or later "
            f"`{program} augment {marks.saved}/SLUG.pt -t {args.transcoder_set} ...`"
        )
    sys.stdout.flush()
    return report.failure()


def _results(
    args: argparse.Namespace, marks: Marks, requests: list[Request], program: str
) -> Generator[tuple[Request, Outcome], None, None]:
    """Every prompt with what came of it, as they are done."""
    set_up = partial(worker.set_up_worker, args, marks, os.getcwd(), program)
    if args.engine == "ray":
        results = engines.on_ray(set_up, worker.work, requests, args.workers)
    elif args.workers in (None, 1):
        set_up = partial(worker.set_up, args, marks)
        results = engines.in_this_process(set_up, worker.work, requests)
    else:
        results = engines.in_processes(set_up, worker.work, requests, args.workers)
    with closing(results):
        for request, outcome in results:
            lost = isinstance(outcome, engines.Lost)
            yield request, Outcome(problem=outcome.reason) if lost else outcome


class _Listing:
    """The list of graphs, written by this process alone, now and then: it names every graph."""

    def __init__(self, folder: Path | None) -> None:
        graphs = [] if folder is None else read_listing(folder)["graphs"]
        self._folder, self._known = folder, {graph.get("slug"): graph for graph in graphs}
        self._new: dict[str, dict[str, Any]] = {}
        self._written = time.monotonic()

    def repair(self, listed: dict[str, Any]) -> None:
        """Name a finished graph if the list does not."""
        if listed and self._known.get(listed["slug"]) != listed:
            self._new[listed["slug"]] = listed

    def add(self, listed: dict[str, Any] | None) -> None:
        """Name a graph, if there are graph files."""
        if listed is not None:
            self._new[listed["slug"]] = listed
        if time.monotonic() - self._written > LISTED_EVERY:
            self.write()

    def write(self) -> None:
        """Name all on the disk."""
        if self._folder is not None and self._new:
            add_to_listing(self._folder, self._new.values())
        self._new, self._written = {}, time.monotonic()


class _Report:
    """What is said of a run: a line for each prompt, and the account at the end."""

    def __init__(self, program: str, path: Path, total: int) -> None:
        self.program, self._path, self._total = program, path, total
        self.finished = self.done = 0
        self._failed: list[int] = []
        self._warned: set[str] = set()

    def add(self, request: Request, outcome: Outcome, pages: Path | None) -> None:
        """A prompt is done, or failed."""
        for warning in outcome.warnings:
            if warning in self._warned:  # what holds of other prompts too is said once
                continue
            self._warned.add(warning)
            self._say(f"warning: line {request.line} ({request.slug}): {warning}")
        if outcome.problem:
            return self.failed(request.line, outcome.problem, f" ({request.slug})")
        self.done += 1
        files = [f"graph written to {outcome.saved[0]}"] if outcome.saved else []
        files += [f"graph files written to {pages}/{request.slug}.json"] if outcome.pages else []
        tqdm.write(", ".join(files))
        sys.stdout.flush()

    def failed(self, line: int, problem: str, name: str = "") -> None:
        """A line failed."""
        self._failed.append(line)
        self._say(f"line {line}{name} failed: {problem}")

    def _say(self, text: str) -> None:
        tqdm.write(f"{self.program}: {' '.join(text.split())}", file=sys.stderr)
        sys.stderr.flush()

    def interrupted(self) -> None:
        """Ctrl+C."""
        self._say(
            f"interrupted: {self.done + self.finished} of {self._total} prompts are finished; the "
            "same command goes on with the others"
        )

    def end(self) -> None:
        """The account."""
        before = f", {self.finished} were finished before" if self.finished else ""
        failed = f", {len(self._failed)} failed" if self._failed else ""
        print(f"{self._total} prompts: {self.done} done{before}{failed}")

    def failure(self) -> UserError | None:
        """What to end with where lines failed."""
        if not self._failed:
            return None
        lines = sorted(self._failed)
        listed = ", ".join(map(str, lines[:10])) + (", ..." if len(lines) > 10 else "")
        return UserError(
            f"{len(lines)} of {self._total} prompts of {self._path} failed (line{'s'[: len(lines) > 1]} "
            f"{listed}; why is said above): mend them and give the same command again, which skips "
            "what is finished."
        )
