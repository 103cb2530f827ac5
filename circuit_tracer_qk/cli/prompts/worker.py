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
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.base.files import LISTING, beside, put_in_place, workplace
from circuit_tracer_qk.cli.loading import attribute_prompt, files_options, torch_dtype
from circuit_tracer_qk.cli.output import log_output, silence_stdout
from circuit_tracer_qk.cli.prompts.progress import Marks, Outcome

if TYPE_CHECKING:
    from circuit_tracer_qk.cli.prompts.lines import Request

log = logging.getLogger(__name__)

_WHILE_IT_LIVES = ExitStack()  # what a worker's process keeps to its end
OURS = ("prompts", "workers", "engine", "force", "server", "port")
"""Flags of ``attribute`` that circuit-tracer's own command must not get."""

MODEL = "from_pretrained_and_transcoders"


class CannotLoad(UserError):
    """No prompt can be done."""


class Maker(ABC):
    """Makes the files of prompts, with one model for all of them."""

    def __init__(self, args: Namespace, marks: Marks) -> None:
        self.args, self.marks = args, marks

    @abstractmethod
    def make(self, request: Request, args: Namespace) -> Outcome:
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

    def make(self, request: Request, args: Namespace) -> Outcome:
        from circuit_tracer_qk.graph_files.create import write_graph_files

        graph, outcome = attribute_prompt(args, self.model), Outcome()
        if self.marks.saved is not None:
            path = self.marks.saved / f"{request.slug}.pt"
            graph.to_pt(path)
            outcome.saved = [path, beside(path)]
        if self.marks.pages is not None:
            options = files_options(args)
            written = write_graph_files(graph, request.slug, self.marks.pages, **options)
            outcome.pages = [written.page, *written.sidecars, *written.examples]
            outcome.listed = written.listed
        return outcome


class TranscoderMaker(Maker):
    """Transcoder graphs, by circuit-tracer's own command, whose model is loaded once."""

    def __init__(self, args: Namespace, marks: Marks) -> None:
        super().__init__(args, marks)
        self._loaded: dict[str, Any] = {}

    def make(self, request: Request, args: Namespace) -> Outcome:
        from circuit_tracer_qk.graph_files.sidecars import remove_others
        from circuit_tracer_qk.host.cli import flags_of
        from circuit_tracer_qk.host.patching import run_command
        from circuit_tracer_qk.plugin.host_command import explaining

        pages, saved, name = self.marks.pages, self.marks.saved, f"{request.slug}.pt"
        # written aside: the command lists its graph, and does not write its .pt in one step, in
        # which it notes the file's name
        moved: dict[Path, Path] = {}
        outcome = Outcome()
        with ExitStack() as asides:
            page, graph = (
                target and asides.enter_context(workplace(target)) / "files"
                for target in (pages and pages / f"{request.slug}.json", saved and saved / name)
            )
            args.graph_file_dir, args.slug = page and str(page), page and request.slug  # together
            args.graph_output_path = graph and str(graph / name)
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
            if graph and saved:
                outcome.saved = [saved / name]
                moved[graph / name] = saved / name
            if page and pages:
                [outcome.listed] = json.loads((page / LISTING).read_bytes())["graphs"]
                files = [f for f in page.rglob("[!.]*") if f.is_file() and f.name != LISTING]
                # the graph's file names the others: it comes last
                files.sort(key=lambda file: (file.parent == page, file))
                outcome.pages = [pages / file.relative_to(page) for file in files]
                moved |= zip(files, outcome.pages, strict=True)
            put_in_place(moved)
        if pages is not None:
            kept = [file.relative_to(pages).as_posix() for file in outcome.pages]
            remove_others(pages, request.slug, kept)
        if run.problem is not None:
            outcome.problem = f"these files are circuit-tracer's own, without heads: {run.problem}"
        return outcome

    def _kept(self) -> AbstractContextManager[Any]:
        """Within, circuit-tracer gets the transcoders and the model that it loaded before."""
        from circuit_tracer_qk.host.patching import replace

        names = ("load_transcoder_from_hub", MODEL)
        return replace({name: partial(self._once, name) for name in names})

    def _once(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        from circuit_tracer_qk.attribution.transcoder.graph import check_model

        def load(*args: Any, **options: Any) -> Any:
            if name not in self._loaded:
                try:
                    self._loaded[name] = original(*args, **options)
                    if name == MODEL and self.args.qk and self.marks.pages:
                        check_model(self._loaded[name])
                except UserError as error:
                    raise CannotLoad(str(error)) from error
            return self._loaded[name]

        return load


def set_up(args: Namespace, marks: Marks) -> Maker:
    """What does all prompts.

    Raises:
        UserError: the model or the dictionaries cannot be loaded.
    """
    kind = ResidualMaker if args.transcoder_set is None else TranscoderMaker
    with silence_stdout():
        return kind(args, marks)


def set_up_worker(args: Namespace, marks: Marks, home: str, program: str) -> Maker:
    """The same in a process of its own, perhaps on another machine.

    Args:
        args: the parsed arguments.
        marks: prepared.
        home: the working directory.
        program: its name, for warnings.

    Raises:
        UserError: as there; or the machine does not have the folder of the results.
    """
    if os.path.isdir(home):
        os.chdir(home)
    sys.stderr = _NoTerminal(sys.stderr.fileno())  # progress bars are the first process's
    _WHILE_IT_LIVES.enter_context(log_output(program, args.verbose))
    if not marks.here():
        raise UserError(
            f"{marks.folder.parent} on {socket.gethostname()} is not the folder that it is here: "
            "name one that all machines share."
        )
    return set_up(args, marks)


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
    outcome = Outcome()
    with warnings.catch_warnings(record=True) as warned, silence_stdout():
        try:
            maker.marks.remove(request)
            outcome = maker.make(request, args)
            if not outcome.problem:
                maker.marks.write(request, outcome)
        except CannotLoad:
            raise
        except UserError as error:
            outcome.problem = str(error)
        except Exception as error:  # one prompt's, whatever it is: the others are done
            log.warning("%s", request.slug, exc_info=True)
            first = (str(error).strip().splitlines() or [""])[0]
            outcome.problem = f"{type(error).__name__}: {first}"
    outcome.warnings = [str(warning.message) for warning in warned]
    return outcome
