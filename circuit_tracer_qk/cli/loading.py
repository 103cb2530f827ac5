"""What commands work on: a model with its dictionaries, a prompt, a saved graph."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import circuit_tracer_qk
from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.cli.arguments import DEMO_PROMPT, check_prompt
from circuit_tracer_qk.cli.output import silence_stdout

if TYPE_CHECKING:
    import torch

    from circuit_tracer_qk.attribution.residual.graph import ResidualGraph
    from circuit_tracer_qk.attribution.residual.model import ResidualModel
    from circuit_tracer_qk.attribution.transcoder.graph import TranscoderGraph


def torch_dtype(name: str) -> torch.dtype:
    """The dtype that ``--dtype`` names."""
    import torch

    return getattr(torch, name)


def load_model(
    args: argparse.Namespace, ref: Path | None = None, checkpoints: Sequence[int] | None = None
) -> ResidualModel:
    """The model of ``-m``, ``-d`` and ``--dtype``.

    Args:
        args: the parsed arguments.
        ref: the dictionaries, in place of those of ``-d``.
        checkpoints: the dictionaries to load; all if left out.
    """
    dtype, ref = torch_dtype(args.dtype), ref or args.dictionaries
    with silence_stdout():
        return circuit_tracer_qk.load_model(args.model, ref, dtype=dtype, checkpoints=checkpoints)


def load_prompt_and_model(
    args: argparse.Namespace, checkpoints: Sequence[int] | None = None
) -> tuple[str, ResidualModel]:
    """The prompt and the model to run it on; without both, the miniature and the demo's prompt."""
    prompt = args.prompt
    if args.dictionaries is None:
        if args.model is not None:
            raise UserError("-m is given without -d/--dictionaries: name the dictionaries too.")
        prompt = DEMO_PROMPT if prompt is None else prompt
    if prompt is None:
        raise UserError("-p/--prompt is missing: give the prompt to explain.")
    check_prompt(prompt)
    return prompt, load_model(args, checkpoints=checkpoints)


def attribute_prompt(args: argparse.Namespace, model: ResidualModel) -> ResidualGraph:
    """The graph of ``-p`` with the flags of ``attribute``."""
    names = (
        *("max_n_logits", "desired_logit_prob", "batch_size", "max_feature_nodes"),
        *("verbose", "select"),
    )
    options = {name: getattr(args, name) for name in names}
    with silence_stdout():
        return circuit_tracer_qk.attribute(args.prompt, model, **options)


def files_options(args: argparse.Namespace) -> dict[str, Any]:
    """What ``create_graph_files`` takes from the flags of ``attribute`` and ``augment``."""
    names = ("node_threshold", "edge_threshold", "qk", "np_model")
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def check_graph(path: Path) -> None:
    """Refuse a saved graph that is not there."""
    if not os.path.isfile(path):
        raise UserError(f"there is no graph file {path}: give the .pt that was saved.")


def explain_saved_graph(args: argparse.Namespace, path: Path) -> TranscoderGraph:
    """A saved graph of circuit-tracer's, explained with ``-m``, ``-t`` and ``--dtype``."""
    from circuit_tracer_qk.host import graph as host
    from circuit_tracer_qk.plugin import host_command

    if args.transcoder_set is None:
        raise UserError(
            "-t/--transcoder_set is missing: name the transcoders that the graph was made with."
        )
    check_graph(path)
    stock = host.load_graph(path, trust=args.trust)
    with silence_stdout():
        model = host_command.load_replacement_model(
            args.model, args.transcoder_set, torch_dtype(args.dtype)
        )
        return circuit_tracer_qk.explain_graph(stock, model)
