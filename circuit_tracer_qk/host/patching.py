"""circuit-tracer's entry points, replaced for a while and put back.

A replaced function is replaced in every module of circuit-tracer that holds it, so that
``from circuit_tracer import attribute`` finds it wherever it is imported from afterwards.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.base.yaml_files import read_yaml
from circuit_tracer_qk.host.cli import logging_kept

FUNCTIONS = {
    "attribute": "circuit_tracer.attribution.attribute",
    "create_graph_files": "circuit_tracer.utils.create_graph_files",
    "serve": "circuit_tracer.frontend.local_server",
    "load_transcoder_from_hub": "circuit_tracer.utils.hf_utils",
}
REPLACEMENT_MODEL = "circuit_tracer.replacement_model"
METHODS = ("from_pretrained", "from_pretrained_and_transcoders")  # of ReplacementModel

Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]
"""From what circuit-tracer has to what stands in for it."""


def replace(wraps: Mapping[str, Wrap]) -> ExitStack:
    """Replace entry points.

    Args:
        wraps: by name, of ``FUNCTIONS`` or ``METHODS``.

    Returns:
        What puts all of them back when it is closed or left.
    """
    with ExitStack() as undo:
        for name, wrap in wraps.items():
            original = entry_point(name)
            wrapper = wrap(original)
            if name in METHODS:
                home = import_module(REPLACEMENT_MODEL).ReplacementModel
                undo.callback(setattr, home, name, vars(home)[name])
                setattr(home, name, staticmethod(wrapper))
            else:
                _swap(original, wrapper)
                undo.callback(_swap, wrapper, original)
        return undo.pop_all()


def entry_point(name: str) -> Any:
    """circuit-tracer's own function or method of this name, as it stands now."""
    if name in METHODS:
        return getattr(import_module(REPLACEMENT_MODEL).ReplacementModel, name)
    return getattr(import_module(FUNCTIONS[name]), name)


def _swap(old: Any, new: Any) -> None:
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] != "circuit_tracer" or not isinstance(module, ModuleType):
            continue
        for attribute, value in list(vars(module).items()):
            if value is old:
                setattr(module, attribute, new)


def with_option(wrapper: Any, original: Callable[..., Any], name: str, default: Any) -> Any:
    """``wrapper`` under the original's name and signature, one keyword argument added."""
    signature = inspect.signature(original)
    added = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
    parameters = [p for p in signature.parameters.values() if p.name != name]
    last = parameters[-1:] if parameters and parameters[-1].kind == added.VAR_KEYWORD else []
    parameters = [*parameters[: len(parameters) - len(last)], added, *last]
    wrapper.__signature__ = signature.replace(parameters=parameters)
    return wrapper


def graph_files_arguments(
    original: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of a call of circuit-tracer's ``create_graph_files``, by the older names."""
    given = dict(inspect.signature(original).bind(*args, **options).arguments)
    if "scan_name" in given:  # in newer trees
        given["scan"] = given.pop("scan_name")
    return given


def run_command(arguments: list[str]) -> None:
    """The installed circuit-tracer's command line, as it is."""
    from circuit_tracer import __main__ as stock

    kept = sys.argv
    sys.argv = ["circuit-tracer", *arguments]
    try:
        with logging_kept():
            stock.main()
    finally:
        sys.argv = kept


def load_local_transcoders(folder: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Transcoders of a local folder, by circuit-tracer's own loaders, and their config.

    Args:
        folder: ``config.yaml`` and the ``.safetensors`` files that a hub repository has.
        **options: of ``load_transcoder_from_hub``.

    Raises:
        UserError: a folder without a config or with one that is none, or a layer that is missing.
    """
    from circuit_tracer.utils import hf_utils

    path = folder / "config.yaml"
    config = read_yaml(path, "model_kind: transcoder_set") if os.path.exists(path) else {}
    hooks = ("feature_input_hook", "feature_output_hook")
    for name in ("model_kind", *hooks, "scan", "model_name"):
        value = config.get(name)
        names = value if isinstance(value, list) and name == "scan" else [value]
        absent = value is None and name in ("scan", "model_name")
        if not absent and not all(isinstance(part, str) for part in names):
            raise UserError(
                f"{path} is no transcoder config: {name} should be a name, found "
                f"{value!r:.60}; a folder of transcoders has a config.yaml with "
                "model_kind, feature_input_hook and feature_output_hook, as a hub repository has."
            )
    kind = config["model_kind"]
    config: dict[str, Any] = {"repo_id": str(folder), "scan": folder.name} | config
    config.setdefault("scan_name", config["scan"])  # in newer trees
    if kind == "cross_layer_transcoder":
        from circuit_tracer.transcoder.cross_layer_transcoder import load_clt

        _n_layers(folder, "W_enc", "W_dec")
        known = inspect.signature(load_clt).parameters
        offered = options | {name: config[name] for name in (*hooks, "scan", "scan_name")}
        taken = {k: v for k, v in offered.items() if k in known}
        return load_clt(str(folder), **taken), config
    files = config.get("transcoders")
    if not files:
        files = [f"layer_{i}.safetensors" for i in range(_n_layers(folder, "layer"))]
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
        raise UserError(f"{path}: transcoders should be a list of files, found {files!r:.60}.")
    config["transcoders"] = [f if f.startswith("hf://") else str(folder / f) for f in files]
    for layer, file in enumerate(config["transcoders"]):
        if not file.startswith("hf://") and not os.path.isfile(file):
            raise UserError(
                f"{file}, layer {layer} of the transcoders, is missing: fetch it again."
            )
    known = inspect.signature(hf_utils.load_transcoders).parameters
    taken = {name: value for name, value in options.items() if name in known}
    return hf_utils.load_transcoders(config, **taken), config


def _n_layers(folder: Path, *stems: str) -> int:
    """How many layers a folder's ``STEM_N.safetensors`` are of.

    Raises:
        UserError: naming the file of a layer that is missing.
    """
    names = set(os.listdir(folder))
    found = (re.fullmatch(rf"(?:{'|'.join(stems)})_([0-9]+)\.safetensors", n) for n in names)
    n = 1 + max((int(match[1]) for match in found if match), default=0)
    for layer in range(n):
        for name in (f"{stem}_{layer}.safetensors" for stem in stems):
            if name not in names:
                raise UserError(
                    f"{folder / name}, layer {layer} of the transcoders, is missing: fetch it again."
                )
    return n


def replacement_model(transformer: Any, transcoders: Any) -> Any:
    """A TransformerLens model with transcoders in the place of its MLPs, as circuit-tracer does it.

    What circuit-tracer does wrongly with Gemma-3 is put right (:mod:`circuit_tracer_qk.host.gemma3`).
    """
    from circuit_tracer.replacement_model import replacement_model_transformerlens as home

    from circuit_tracer_qk.host import gemma3
    from circuit_tracer_qk.host.graph import check_layers, tokenize

    check_layers(transcoders, transformer.cfg.n_layers)
    own = gemma3.rotary_tables(transformer)
    transformer.__class__ = home.TransformerLensReplacementModel
    transformer._configure_replacement_model(transcoders)
    gemma3.put_back(transformer, own)
    cfg, tokenizer = transformer.cfg, transformer.tokenizer
    transformer.zero_positions = gemma3.zero_positions(cfg, tokenizer)
    name = gemma3.name_for_rules(cfg, tokenizer)
    if name != str(cfg.model_name):
        transformer.ensure_tokenized = lambda prompt: tokenize(prompt, tokenizer, cfg.device, name)
    return transformer
