"""circuit-tracer's own entry points with heads: ``enable()`` and ``disable()``.

While enabled, in this process, circuit-tracer's

- ``attribute(..., qk=True)`` explains the graph that it makes, and attributes residual models;
- ``ReplacementModel.from_pretrained(..., backend="residual")`` loads a residual model, and a
  Gemma-3 has the rotary tables of each of its layers;
- ``create_graph_files`` writes explained graphs with their heads and QK attributions;
- ``serve`` shows them with the panel, and answers for any head of those still in memory.

All else stays as it was.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from threading import Lock
from typing import Any
from weakref import WeakValueDictionary

from circuit_tracer_qk.attribution.graph import ExplainedGraph
from circuit_tracer_qk.attribution.residual.model import ResidualModel, load_model
from circuit_tracer_qk.attribution.transcoder.graph import check_model, explain_graph
from circuit_tracer_qk.base.files import beside, companion_of
from circuit_tracer_qk.frontend import server
from circuit_tracer_qk.graph_files import create as export
from circuit_tracer_qk.host import graph as host
from circuit_tracer_qk.host.gemma3 import names_gemma_3
from circuit_tracer_qk.host.patching import graph_files_arguments, replace, with_option
from circuit_tracer_qk.plugin.attribute import attribute as attribute_any
from circuit_tracer_qk.plugin.host_command import load_exactly
from circuit_tracer_qk.plugin.live import LiveGraphs

_lock = Lock()
_put_back: ExitStack | None = None
_written: WeakValueDictionary[tuple[str, str], ExplainedGraph] = WeakValueDictionary()
"""Graphs in memory by the folder and slug of their files."""


def enable() -> None:
    """Let circuit-tracer's own entry points take ``qk=True`` and ``backend="residual"``.

    Functions imported before stay as they were. A second call changes nothing.

    >>> import circuit_tracer
    >>> ctqk.enable()
    >>> circuit_tracer.attribute(prompt, model).kind
    'residual'
    >>> ctqk.disable()
    """
    global _put_back
    with _lock:
        if _put_back is None:
            wraps = {
                "attribute": _attribute,
                "create_graph_files": _create_graph_files,
                "serve": _serve,
                "from_pretrained": _from_pretrained,
                "from_pretrained_and_transcoders": _gemma_3,
            }
            _put_back = replace(wraps)


def disable() -> None:
    """Undo :func:`enable`, wherever circuit-tracer holds its entry points.

    >>> ctqk.disable()  # does nothing where nothing is enabled
    """
    global _put_back
    with _lock:
        if _put_back is not None:
            _put_back.close()
            _put_back = None


def _enabled() -> bool:
    return _put_back is not None


def _attribute(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def attribute(prompt: Any, model: Any, *args: Any, **options: Any) -> Any:
        if not _enabled():  # a name that was imported meanwhile
            return original(prompt, model, *args, **options)
        qk = options.pop("qk", False)
        if isinstance(model, ResidualModel):
            return attribute_any(prompt, model, *args, **options)
        if qk:
            check_model(model)  # before the work
            prompt = host.prompt_ids(prompt, model)
        graph = original(prompt, model, *args, **options)
        return explain_graph(graph, model) if qk else graph

    return with_option(attribute, original, "qk", False)


def _create_graph_files(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def create_graph_files(*args: Any, **options: Any) -> Any:
        if not _enabled():
            return original(*args, **options)
        qk = options.pop("qk", True)
        given = graph_files_arguments(original, args, options)
        graph = given.pop("graph_or_path")
        is_ours = isinstance(graph, ExplainedGraph)
        if not is_ours and not (
            isinstance(graph, str | Path) and os.path.isfile(companion_of(graph, beside(graph)))
        ):
            return original(*args, **options)
        path = export.create_graph_files(graph, **given, qk=qk)
        if is_ours:
            _written[str(path.parent.resolve()), given["slug"]] = graph
        return None

    return with_option(create_graph_files, original, "qk", True)


def _serve(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def serve(*args: Any, **options: Any) -> Any:
        given = dict(signature.bind_partial(*args, **options).arguments)
        if not _enabled() or given.pop("frontend_dir", None) is not None:
            return original(*args, **options)
        folder = str(Path(given["data_dir"]).resolve())
        graphs = {slug: graph for (at, slug), graph in _written.items() if at == folder}
        return server.serve(**given, live=LiveGraphs(graphs) if graphs else None)

    return serve


def _gemma_3(original: Callable[..., Any]) -> Callable[..., Any]:
    """circuit-tracer's loading, but of Gemma-3, whose rotary tables it mixes up."""
    signature, exactly = inspect.signature(original), load_exactly(original)

    @functools.wraps(original)
    def from_pretrained_and_transcoders(*args: Any, **options: Any) -> Any:
        given = signature.bind(*args, **options).arguments
        ours = _enabled() and names_gemma_3(str(given["model_name"]))
        return (exactly if ours else original)(*args, **options)

    return from_pretrained_and_transcoders


def _from_pretrained(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def from_pretrained(*args: Any, **options: Any) -> Any:
        given = signature.bind_partial(*args, **options).arguments
        if not _enabled() or given.get("backend") != "residual":
            return original(*args, **options)
        taken = {name: given[name] for name in ("dtype", "device") if name in given}
        return load_model(given.get("model_name"), given.get("transcoder_set"), **taken)

    return from_pretrained
