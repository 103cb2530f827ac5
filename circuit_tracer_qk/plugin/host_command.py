"""Runs of circuit-tracer's own command line whose graphs are explained, and its models from folders."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from circuit_tracer_qk.attribution.graph import ExplainedGraph
from circuit_tracer_qk.attribution.transcoder import graph as transcoder
from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.base.memory import is_full, too_large
from circuit_tracer_qk.graph_files import create as export
from circuit_tracer_qk.host import gemma3, patching
from circuit_tracer_qk.host import graph as host
from circuit_tracer_qk.model.huggingface import TOO_LARGE, first_line, is_gguf
from circuit_tracer_qk.model.load import load_transformer


@dataclass
class Run:
    """What one run of circuit-tracer's own command line made.

    Attributes:
        graph: the explained graph; None where it was not asked for or could not be.
        problem: why it could not be explained after it was made.
    """

    graph: transcoder.TranscoderGraph | None = None
    problem: UserError | None = None


@contextmanager
def explaining(qk: bool, np_model: str | None = None) -> Iterator[Run]:
    """Within, circuit-tracer explains the graph that it makes, and takes local folders too.

    What can be refused is refused before the graph is made; what is found wrong afterwards leaves
    circuit-tracer's own files, without heads.

    Args:
        qk: explain.
        np_model: Neuronpedia's model id, for the files.

    Raises:
        UserError: transcoders or a model that cannot be loaded, or graphs that are not done
            exactly.
    """
    run = Run()

    def attribute(original: Callable[..., Any]) -> Callable[..., Any]:
        def attribute(*args: Any, **options: Any) -> Any:
            given = inspect.signature(original).bind(*args, **options).arguments
            model = given["model"]
            if qk:
                transcoder.check_model(model)
            graph = original(**given | {"prompt": host.prompt_ids(given["prompt"], model)})
            if qk:
                try:
                    run.graph = transcoder.explain_graph(graph, model)
                except UserError as problem:
                    run.problem = problem
            return run.graph or graph

        return attribute

    def create_graph_files(original: Callable[..., Any]) -> Callable[..., Any]:
        def create_graph_files(*args: Any, **options: Any) -> Any:
            given = patching.graph_files_arguments(original, args, options)
            if not isinstance(given["graph_or_path"], ExplainedGraph):
                return original(*args, **options)
            return export.create_graph_files(given.pop("graph_or_path"), **given, np_model=np_model)

        return create_graph_files

    wraps = {
        "attribute": attribute,
        "create_graph_files": create_graph_files,
        "load_transcoder_from_hub": _load_transcoders,
        "from_pretrained_and_transcoders": load_exactly,
    }
    with patching.replace(wraps):
        yield run


def _load_transcoders(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def load(*args: Any, **options: Any) -> Any:
        given = dict(signature.bind(*args, **options).arguments)
        reference = given.pop("hf_ref")
        try:
            if os.path.isdir(reference):
                return patching.load_local_transcoders(Path(reference), **given)
            return original(*args, **options)
        except UserError:
            raise
        except Exception as error:  # hubs, files and tensors fail in any way
            if is_full(error):
                raise too_large(f"{reference}, a set of transcoders,", TOO_LARGE, error) from error
            raise UserError(
                f"the transcoders {reference} cannot be loaded ({first_line(error)}): give a hub "
                "id org/name[@revision] that can be reached, or a local folder with their files."
            ) from error

    return load


def load_exactly(original: Callable[..., Any]) -> Callable[..., Any]:
    """circuit-tracer's loading of a replacement model, which takes folders and Gemma-3 exactly.

    What goes to TransformerLens beside the dtype and the device is left to circuit-tracer.
    """
    signature = inspect.signature(original)

    def load(*args: Any, **options: Any) -> Any:
        given = dict(signature.bind(*args, **options).arguments)
        name, backend = given["model_name"], given.get("backend", "transformerlens")
        ours = os.path.isdir(name) or is_gguf(Path(name)) or gemma3.names_gemma_3(name)
        try:
            if ours and backend == "transformerlens" and not given.get("kwargs"):
                taken = {k: given[k] for k in ("dtype", "device") if k in given}
                return patching.replacement_model(
                    load_transformer(name, **taken), given["transcoders"]
                )
            return original(*args, **options)
        except UserError:
            raise
        except Exception as error:
            if is_full(error):
                raise too_large(f"the model {name}", TOO_LARGE, error) from error
            raise UserError(
                f"the model {name} cannot be loaded with these transcoders ({first_line(error)}): "
                "give with -m the model that they were made for."
            ) from error

    return load


def load_replacement_model(model: str | None, transcoders: str, dtype: torch.dtype) -> Any:
    """circuit-tracer's replacement model, from hub ids or local folders.

    Args:
        model: the model; from the transcoders' config if left out.
        transcoders: their hub id ``org/name[@revision]`` or folder.
        dtype: of the weights.

    Raises:
        UserError: either cannot be loaded, or no model is named.
    """
    with explaining(qk=False):
        loaded, config = patching.entry_point("load_transcoder_from_hub")(transcoders, dtype=dtype)
        model = model or config.get("model_name")
        if not model:
            raise UserError("-m/--model is missing: the transcoders' config names no model_name.")
        return patching.entry_point("from_pretrained_and_transcoders")(
            model_name=model, transcoders=loaded, dtype=dtype
        )
