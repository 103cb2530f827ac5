"""Attributing many prompts with one model: what a worker loads, and what it does with a prompt."""

from __future__ import annotations

import io
import json
import logging
import os
import socket
import sys
import warnings
from abc import ABC, abstractmethod
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.base.files import LISTING, put_in_place, workplace
from circuit_tracer_qk.cli.loading import torch_dtype
from circuit_tracer_qk.cli.output import log_output, silence_stdout
from circuit_tracer_qk.cli.prompts.progress import Marks

if TYPE_CHECKING:
    from circuit_tracer_qk.cli.prompts.lines import Request

log = logging.getLogger(__name__)

_WHILE_IT_LIVES = ExitStack()  # what a worker's process keeps to its end
OURS = ("prompts", "workers", "engine", "force", "server", "port")
"""Flags of ``attribute`` that circuit-tracer's own command must not get."""


@dataclass(frozen=True)
class Plan:
    """What all prompts of a run have in common.

    Attributes:
        args: the parsed arguments.
        work: of :func:`circuit_tracer_qk.cli.prompts.progress.work_of`.
        home: the working directory.
        folder_id: of :meth:`Marks.prepare`.
    """

    args: Namespace
    work: str
    home: str
    folder_id: str = ""

    def marks(self) -> Marks:
        """Where prompts are marked as finished."""
        pages, saved = self.args.graph_file_dir, self.args.graph_output_path
        return Marks(
            None if pages is None else Path(pages),
            None if saved is None else Path(saved),
            self.work,
        )


class Made(NamedTuple):
    """One prompt's files.

    Attributes:
        pages: in the folder of the graph files.
        saved: in the folder of the ``.pt`` files.
        listed: what the list of graphs should say; None without graph files.
        problem: what is wrong with them; "" for nothing.
    """

    pages: list[Path]
    saved: list[Path]
    listed: dict[str, Any] | None
    problem: str = ""


class Outcome(NamedTuple):
    """What came of one prompt.

    Attributes:
        said: its files, in words.
        listed: what the list of graphs should say.
        problem: why it failed; "" where it did not.
        warnings: what to know about it.
    """

    said: str
    listed: dict[str, Any] | None
    problem: str
    warnings: list[str]


class CannotLoad(UserError):
    """No prompt can be done."""


class Maker(ABC):
    """Makes the files of prompts, with one model for all of them."""

    def __init__(self, args: Namespace, marks: Marks) -> None:
        self.args, self.marks = args, marks

    @abstractmethod
    def make(self, request: Request, args: Namespace) -> Made:
        """The files of one prompt.

        Args:
            request: the prompt.
            args: the flags, with those that its line sets.

        Raises:
            UserError: they cannot be made.
        """


class ResidualMaker(Maker):
    """Residual graphs."""

    def __init__(self, args: Namespace, marks: Marks) -> None:
        super().__init__(args, marks)
        from circuit_tracer_qk.attribution.residual.attribution import check_graph_set
        from circuit_tracer_qk.attribution.residual.model import load_model

        self.model = load_model(args.model, args.dictionaries, dtype=torch_dtype(args.dtype))
        check_graph_set(self.model.dictionaries, self.model.cfg.n_layers)

    def make(self, request: Request, args: Namespace) -> Made:
        from circuit_tracer_qk.attribution.residual.store import beside
        from circuit_tracer_qk.graph_files.create import write_graph_files
        from circuit_tracer_qk.plugin.attribute import attribute

        graph = attribute(
            request.prompt,
            self.model,
            max_n_logits=args.max_n_logits,
            desired_logit_prob=args.desired_logit_prob,
            batch_size=args.batch_size,
            max_feature_nodes=args.max_feature_nodes,
            verbose=args.verbose,
        )
        made = Made([], [], None)
        if self.marks.saved is not None:
            path = self.marks.saved / f"{request.slug}.pt"
            graph.to_pt(path)
            made = made._replace(saved=[path, beside(path)])
        if self.marks.pages is not None:
            written = write_graph_files(
                graph,
                request.slug,
                self.marks.pages,
                args.node_threshold,
                args.edge_threshold,
                qk=args.qk,
                np_model=args.np_model,
            )
            pages = [written.page, *written.sidecars, *written.examples]
            made = made._replace(pages=pages, listed=written.listed)
        return made


class TranscoderMaker(Maker):
    """Transcoder graphs, by circuit-tracer's own command, whose model is loaded once."""

    def __init__(self, args: Namespace, marks: Marks) -> None:
        super().__init__(args, marks)
        self._loaded: dict[str, Any] = {}

    def make(self, request: Request, args: Namespace) -> Made:
        from circuit_tracer_qk.graph_files.sidecars import remove_others
        from circuit_tracer_qk.host.cli import flags_of
        from circuit_tracer_qk.host.patching import run_command
        from circuit_tracer_qk.plugin.host_command import explaining

        pages, saved = self.marks.pages, self.marks.saved
        # written aside: the command lists its graph, and does not write its .pt in one step, in
        # which it notes the file's name
        moved: dict[Path, Path] = {}
        made = Made([], [], None)
        with ExitStack() as asides:
            page, graph = (
                None if target is None else asides.enter_context(workplace(target)) / "files"
                for target in (
                    pages and pages / f"{request.slug}.json",
                    saved and saved / f"{request.slug}.pt",
                )
            )
            args.graph_file_dir = None if page is None else str(page)
            args.slug = None if page is None else request.slug  # which it takes together
            args.graph_output_path = None if graph is None else str(graph / f"{request.slug}.pt")
            flags = flags_of("attribute", args, leave_out=OURS)
            if graph is not None:
                graph.mkdir()
            try:
                with explaining(args.qk and page is not None, args.np_model) as run, self._kept():
                    run_command(["attribute", *flags])
            except SystemExit as error:
                raise CannotLoad(
                    "circuit-tracer's own command refuses these flags: try them with -p and one "
                    "prompt."
                ) from error
            if graph is not None and saved is not None:
                moved[graph / f"{request.slug}.pt"] = saved / f"{request.slug}.pt"
                made = made._replace(saved=list(moved.values()))
            if page is not None and pages is not None:
                [listed] = json.loads((page / LISTING).read_bytes())["graphs"]
                files = [f for f in page.rglob("[!.]*") if f.is_file() and f.name != LISTING]
                # the graph's file names the others: it comes last
                files.sort(key=lambda file: (file.parent == page, file))
                inside = {file: pages / file.relative_to(page) for file in files}
                made = made._replace(pages=list(inside.values()), listed=listed)
                moved |= inside
            put_in_place(moved)
        if pages is not None:
            kept = [file.relative_to(pages).as_posix() for file in made.pages]
            remove_others(pages, request.slug, kept)
        if run.problem is not None:
            problem = f"these files are circuit-tracer's own, without heads: {run.problem}"
            return made._replace(problem=problem)
        return made

    @contextmanager
    def _kept(self) -> Iterator[None]:
        """Within, circuit-tracer gets the transcoders and the model that it loaded before."""
        from circuit_tracer_qk.host.patching import replace

        def once(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
            def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
                def load(*args: Any, **options: Any) -> Any:
                    if name not in self._loaded:
                        try:
                            self._loaded[name] = original(*args, **options)
                            self._check(name)
                        except UserError as error:
                            raise CannotLoad(str(error)) from error
                    return self._loaded[name]

                return load

            return wrap

        names = ("load_transcoder_from_hub", "from_pretrained_and_transcoders")
        put_back = replace({name: once(name) for name in names})
        try:
            yield
        finally:
            put_back()

    def _check(self, name: str) -> None:
        """Refuse a model that no prompt can be explained with."""
        if name == "from_pretrained_and_transcoders" and self.args.qk and self.marks.pages:
            from circuit_tracer_qk.attribution.transcoder.graph import check_model

            check_model(self._loaded[name])


def set_up(plan: Plan) -> Maker:
    """What does all prompts.

    Raises:
        UserError: the model or the dictionaries cannot be loaded.
    """
    kind = ResidualMaker if plan.args.transcoder_set is None else TranscoderMaker
    with silence_stdout():
        return kind(plan.args, plan.marks())


def set_up_worker(plan: Plan, program: str) -> Maker:
    """The same in a process of its own, perhaps on another machine.

    Raises:
        UserError: as there; or the machine does not have the folder of the results.
    """
    if os.path.isdir(plan.home):
        os.chdir(plan.home)
    sys.stderr = _NoTerminal(sys.stderr.fileno())  # progress bars are the first process's
    _WHILE_IT_LIVES.enter_context(log_output(program, plan.args.verbose))
    marks = plan.marks()
    if not marks.here(plan.folder_id):
        raise UserError(
            f"{marks.folder.parent} on {socket.gethostname()} is not the folder that it is here: "
            "name one that all machines share."
        )
    return set_up(plan)


class _NoTerminal(io.TextIOWrapper):
    """Writes to a file descriptor, and is no terminal even where that is one."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(
            os.fdopen(os.dup(descriptor), "wb"), "utf-8", "replace", line_buffering=True
        )

    def isatty(self) -> bool:
        return False


def work(maker: Maker, request: Request) -> Outcome:
    """Do one prompt and mark it as finished.

    Raises:
        UserError: no prompt can be done.
    """
    args = Namespace(**vars(maker.args) | request.options)
    args.prompt, args.slug = request.prompt, request.slug
    made, problem = None, ""
    with warnings.catch_warnings(record=True) as warned, silence_stdout():
        try:
            maker.marks.remove(request)
            made = maker.make(request, args)
            problem = made.problem
            if not problem:
                maker.marks.write(request, made.pages, made.saved, made.listed)
        except CannotLoad:
            raise
        except UserError as error:
            problem = str(error)
        except Exception as error:  # one prompt's, whatever it is: the others are done
            log.warning("%s", request.slug, exc_info=True)
            first = (str(error).strip().splitlines() or [""])[0]
            problem = f"{type(error).__name__}: {first}"
    said = []
    if made is not None and made.saved:
        said.append(f"graph written to {made.saved[0]}")
    if made is not None and made.pages:
        said.append(f"graph files written to {maker.marks.pages}/{request.slug}.json")
    notes = [str(warning.message) for warning in warned]
    return Outcome(", ".join(said), made and made.listed, problem, notes)
