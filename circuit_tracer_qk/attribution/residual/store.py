"""What a graph keeps beyond circuit-tracer's own fields, in memory and on disk.

A graph's ``.pt`` is circuit-tracer's; beside it lies a safetensors file (no pickle) with the run,
the components, the attention weights and the targets' rows, so that a loaded graph gives every
head loading and every QK table bit for bit, without the model.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from circuit_tracer_qk.attribution.residual.decompose import ActiveFeatures, Decomposition
from circuit_tracer_qk.attribution.residual.schema import (
    FORMAT,
    UNCHECKED,
    Facts,
    Misfit,
    check_tensors,
    read_facts,
    signed,
)
from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.base.memory import is_full
from circuit_tracer_qk.base.selection import CIRCUIT_TRACER
from circuit_tracer_qk.model.attention import AttentionBlock
from circuit_tracer_qk.model.heads import Heads
from circuit_tracer_qk.model.norm import Norm
from circuit_tracer_qk.model.run import FrozenRun


class UncheckedWarning(UserWarning):
    """A saved graph whose content cannot be checked."""


@dataclass(frozen=True, eq=False)
class Record:
    """What a graph keeps beyond circuit-tracer's own fields: enough to explain any edge or score.

    Attributes:
        parts: the components of every checkpoint.
        heads: the model's heads on the run.
        target_pulls: (n_selected + n_logits, d_model) ``M^T y`` of every target.
        logit_rows: (n_logits, d_model) directions of the logits at checkpoint n_layers.
        bias_edges: (n_selected + n_logits, n_pos) edges from the decoder bias at each position.
        position_edges: the same from learned position embeddings; None without them.
        resid_pre: error slot i stands for checkpoint i rather than i + 1.
        token_strings: the prompt's tokens as text.
        names: (checkpoint, feature) -> label.
        dictionary_folder: where feature examples lie; None if nowhere.
        neuronpedia: checkpoint -> Neuronpedia's id of its dictionary, where it has one.
        select: the rule by which the graph's nodes were chosen.
    """

    parts: Decomposition
    heads: Heads
    target_pulls: Tensor
    logit_rows: Tensor
    bias_edges: Tensor
    position_edges: Tensor | None
    resid_pre: bool
    token_strings: list[str]
    names: Callable[[int, int], str]
    dictionary_folder: str | None
    neuronpedia: dict[int, str] = field(default_factory=dict)
    select: str = CIRCUIT_TRACER


def record_bytes(record: Record, graph: str) -> bytes:
    """A record as a safetensors file.

    Args:
        record: what to save.
        graph: the digest of the graph that it belongs to.
    """
    tensors, facts = _flatten(record)
    # clones: safetensors refuses tensors that share memory
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    # in one entry: safetensors writes several in an order that differs from call to call
    metadata = {"facts": json.dumps(signed({**facts, "graph": graph}, tensors))}
    return save(tensors, metadata)


def load_record(path: Path, device: str | torch.device) -> tuple[Record, Facts]:
    """A saved record and its facts, all that is in them checked.

    Raises:
        UserError: a file that is missing, damaged or of another kind.
    """
    if not os.path.isfile(path):
        raise UserError(
            f"there is no {path}, so the graph's heads are not known: keep it beside the .pt, or "
            "make the graph again with circuit-tracer-qk; graphs of transcoders are explained by "
            "`circuit-tracer-qk augment` or circuit_tracer_qk.explain_graph."
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except Exception as error:  # a damaged header raises nearly anything
        if is_full(error):
            raise
        raise UserError(f"{path} is damaged ({_line(error)}): make the graph again.") from error
    text = metadata.get("facts", "{}")
    kind = metadata.get("format") or _kind(text)
    if kind not in (FORMAT, UNCHECKED):
        raise UserError(
            f"{path} is of kind {kind!r:.60} and this version reads {FORMAT!r}: "
            "make the graph again, or use the version that wrote it."
        )
    try:
        facts = read_facts(text)
        check_tensors(facts, tensors)
    except Misfit as error:
        raise UserError(f"{path} is damaged ({_line(error)}): make the graph again.") from error
    if not facts.checked:
        warnings.warn(
            f"{path} was written by an older version and holds no digests: its form was checked, "
            "its numbers cannot be; save the graph again.",
            UncheckedWarning,
            stacklevel=4,
        )
    moved = {name: tensor.to(device) for name, tensor in tensors.items()}
    return _rebuild(moved, facts), facts


def _kind(text: str) -> Any:
    """The format that some facts name; None where they cannot be read."""
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return facts.get("format") if isinstance(facts, dict) else None


def _line(error: Exception) -> str:
    """An error as a part of a sentence."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _flatten(record: Record) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A record as flat tensors and JSON facts; :func:`_rebuild` is its inverse."""
    parts, features = record.parts, record.parts.features
    tensors = {f"run.{name}": t for name, t in parts.run.tensors().items()}
    for name in ("checkpoint", "position", "feature", "activation", "row"):
        tensors[f"features.{name}"] = getattr(features, name)
    tensors |= {f"decoders.{c}.{k}": t for (c, k), t in features.decoders.items()}
    tensors |= {f"biases.{c}": t for c, t in parts.biases.items()}
    tensors |= {f"errors.{c}": t for c, t in parts.errors.items()}
    blocks = []
    for layer, block in enumerate(record.heads.blocks):
        named, plain = _block_out(block)
        tensors |= {f"blocks.{layer}.{name}": t for name, t in named.items()}
        blocks.append(plain)
    for name in ("target_pulls", "logit_rows", "bias_edges", "position_edges"):
        value = getattr(record, name)
        if value is not None:
            tensors[f"record.{name}"] = value
    known = sorted(set(zip(features.checkpoint.tolist(), features.feature.tolist(), strict=True)))
    facts = {
        "blocks": blocks,
        "resid_pre": record.resid_pre,
        "token_strings": record.token_strings,
        "dictionary_folder": record.dictionary_folder,
        "neuronpedia": {str(c): name for c, name in record.neuronpedia.items()},
        "select": record.select,
        "names": [[c, f, record.names(c, f)] for c, f in known],
    }
    return tensors, facts


def _rebuild(tensors: dict[str, Tensor], facts: Facts) -> Record:
    def group(prefix: str) -> dict[str, Tensor]:
        start = prefix + "."
        return {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}

    decoders = {}
    for name, tensor in group("decoders").items():
        c, k = name.split(".")
        decoders[int(c), int(k)] = tensor
    # a file's order is that of text, in which 10 comes before 2
    biases, errors = ({int(c): t for c, t in group(name).items()} for name in ("biases", "errors"))
    run = FrozenRun.from_tensors(group("run"))
    parts = Decomposition(
        run=run,
        features=ActiveFeatures(**group("features"), decoders=dict(sorted(decoders.items()))),
        biases={c: biases[c] for c in sorted(biases)},
        errors={c: errors[c] for c in sorted(errors)},
    )
    blocks = [
        _block_in(group(f"blocks.{layer}"), block.model_dump())
        for layer, block in enumerate(facts.blocks)
    ]
    names = {(c, f): label for c, f, label in facts.names}
    return Record(
        parts=parts,
        heads=Heads(blocks, run),
        **({"position_edges": None} | group("record")),  # type: ignore[arg-type]
        resid_pre=facts.resid_pre,
        token_strings=facts.token_strings,
        names=lambda checkpoint, feature: names.get((checkpoint, feature), ""),
        dictionary_folder=facts.dictionary_folder,
        neuronpedia=facts.neuronpedia,
        select=facts.select,
    )


def _block_out(block: AttentionBlock) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A block's tensors by name and the rest as plain values; norms under their own name."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for f in fields(block):
        value = getattr(block, f.name)
        if isinstance(value, Norm):
            plain[f.name] = {name: getattr(value, name) for name in ("centred", "present", "eps")}
            pairs = {f"{f.name}.w": value.w, f"{f.name}.b": value.b}
            tensors |= {name: t for name, t in pairs.items() if t is not None}
        elif isinstance(value, Tensor):
            tensors[f.name] = value
        else:
            plain[f.name] = value
    return tensors, plain


def _block_in(tensors: dict[str, Tensor], plain: dict[str, Any]) -> AttentionBlock:
    values: dict[str, Any] = {}
    for name, value in plain.items():
        if isinstance(value, dict):
            weights = tensors.pop(f"{name}.w", None), tensors.pop(f"{name}.b", None)
            value = Norm(*weights, **value)
        values[name] = value
    values |= tensors
    return AttentionBlock(**values)
