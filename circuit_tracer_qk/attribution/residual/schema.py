"""What must stand in the file beside a graph's ``.pt``, and whether it does.

The facts are checked by pydantic, the tensors against one table: name, dtype, shape, range. Sizes
that the facts do not tell are those of the first tensor that has them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError
from torch import Tensor

from circuit_tracer_qk.base import digests
from circuit_tracer_qk.base.selection import CIRCUIT_TRACER

FORMAT = "circuit-tracer-qk graph, version 3"
UNCHECKED = "circuit-tracer-qk graph, version 2"
"""The format before, which holds no digests: only its structure can be checked."""

TENSORS = ("q_gain", "k_gain", "cos", "sin")
"""Tensors of a block that may be absent; the facts then hold null."""


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class NormFacts(_Strict):
    """A norm without its tensors."""

    centred: bool
    present: bool
    eps: float = float("nan")  # older files do not have it


class BlockFacts(_Strict):
    """A block without its tensors."""

    q_gain: None = None
    k_gain: None = None
    cos: None = None
    sin: None = None
    qk_eps: FiniteFloat = Field(ge=0)
    adjacent_pairs: bool
    attn_scale: FiniteFloat = Field(gt=0)
    softcap: FiniteFloat = Field(ge=0)
    window: int | None = Field(ge=1)
    ln1: NormFacts
    post: NormFacts
    parallel: bool


class Facts(_Strict):
    """All that is no tensor."""

    format: str = UNCHECKED  # beside the facts in the oldest files
    blocks: list[BlockFacts] = Field(min_length=1)
    resid_pre: bool
    token_strings: list[str] = Field(min_length=2)
    dictionary_folder: str | None
    neuronpedia: dict[int, str] = {}
    select: Literal["circuit-tracer", "explained"] = CIRCUIT_TRACER
    names: list[tuple[int, int, str]]
    fingerprint: list[int] | None = Field(None, min_length=4, max_length=4)
    graph: str | None = None
    tensors: dict[str, str] | None = None
    digest: str | None = None

    @property
    def checked(self) -> bool:
        """Whether the file holds digests of its content."""
        return self.format == FORMAT


class Misfit(ValueError):
    """What is wrong with the file, as the second half of a sentence."""


def signed(facts: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The facts with the digests of all tensors, and last a digest of the facts themselves."""
    whole = {"format": FORMAT, **facts, "tensors": digests.of_tensors(tensors)}
    return {**whole, "digest": digests.of_text(json.dumps(whole))}


def read_facts(text: str) -> Facts:
    """The facts of a file.

    Raises:
        Misfit: naming the first that is wrong.
    """
    try:
        facts = Facts.model_validate_json(text)
    except ValidationError as error:
        problem = error.errors(include_input=False, include_url=False)[0]
        name = ".".join(map(str, problem["loc"]))
        named = f"the fact {name}" if name else "its facts"
        raise Misfit(f"{named} cannot be read: {problem['msg']}") from error
    needed = ("graph", "tensors", "digest") if facts.checked else ("fingerprint",)
    for name in needed:
        if getattr(facts, name) is None:
            raise Misfit(f"the fact {name} is missing")
    if facts.checked:
        content = json.loads(text)
        digest = content.pop("digest")
        if digests.of_text(json.dumps(content)) != digest:
            raise Misfit("its facts have changed since they were written")
    return facts


class _Rule(NamedTuple):
    """What a tensor must be.

    Attributes:
        name: a pattern; ``C``, ``K`` and ``L`` stand for a checkpoint, another and a block.
        dtype: "whole"; "run", float32 or float64 like the run; "float", any floating-point dtype.
        shape: its sizes by name; ``{0}`` is the first number of the tensor's name.
        low, high: the least and the largest value.
        optional: it may be absent.
    """

    name: str
    dtype: str
    shape: str
    low: float | None = None
    high: float | None = None
    optional: bool = False


_RULES = (
    _Rule("run.residual", "run", "checkpoints pos d_model"),
    _Rule("run.tokens", "whole", "pos", low=0),
    _Rule("run.mlp_input", "run", "layers pos d_model"),
    _Rule("run.embedding", "run", "pos d_model"),
    _Rule("run.position_embedding", "run", "pos d_model", optional=True),
    _Rule("run.pattern", "run", "layers heads pos pos", low=0, high=1.001),
    _Rule("run.scales.NORM", "run", "layers pos", low=0, optional=True),
    _Rule("run.final_scale", "run", "pos", low=0),
    _Rule("run.logits", "run", "d_vocab"),
    _Rule("features.activation", "run", "features"),
    _Rule("features.checkpoint", "whole", "features", low=0),
    _Rule("features.position", "whole", "features", low=0),
    _Rule("features.feature", "whole", "features", low=0),
    _Rule("features.row", "whole", "features", low=0),
    _Rule("biases.C", "run", "pos d_model"),
    _Rule("errors.C", "run", "pos d_model"),
    _Rule("decoders.C.K", "float", "distinct{0} d_model"),
    _Rule("blocks.L.W_Q", "float", "heads d_model d_head"),
    _Rule("blocks.L.W_K", "float", "kv_heads d_model d_head"),
    _Rule("blocks.L.W_V", "float", "kv_heads d_model d_head"),
    _Rule("blocks.L.W_O", "float", "heads d_head d_model"),
    _Rule("blocks.L.b_Q", "float", "heads d_head"),
    _Rule("blocks.L.b_K", "float", "kv_heads d_head"),
    _Rule("blocks.L.b_V", "float", "kv_heads d_head"),
    _Rule("blocks.L.b_O", "float", "d_model"),
    _Rule("blocks.L.q_gain", "float", "d_head", optional=True),
    _Rule("blocks.L.k_gain", "float", "d_head", optional=True),
    _Rule("blocks.L.cos", "float", "pos rotary{0}", optional=True),
    _Rule("blocks.L.sin", "float", "pos rotary{0}", optional=True),
    *(
        _Rule(f"blocks.L.{name}", "float", "d_model", optional=True)
        for name in ("ln1.w", "ln1.b", "post.w", "post.b")
    ),
    _Rule("record.target_pulls", "float", "targets d_model"),
    _Rule("record.logit_rows", "float", "logits d_model"),
    _Rule("record.bias_edges", "float", "targets pos"),
    _Rule("record.position_edges", "float", "targets pos", optional=True),
)
_WILD = {"C": "([0-9]{1,6})", "K": "([0-9]{1,6})", "L": "([0-9]{1,6})"}
_WILD["NORM"] = "(?:ln1|ln2|ln1_post|ln2_post)"
_DTYPES = {
    "whole": (torch.int64,),
    "run": (torch.float32, torch.float64),
    "float": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
}


def check_tensors(facts: Facts, tensors: Mapping[str, Tensor]) -> None:
    """Check every tensor: its name, dtype, shape and range, and its digest where there is one.

    Raises:
        Misfit: naming the first that is wrong.
    """
    _check_names(facts, tensors)
    sizes = {
        "layers": len(facts.blocks),
        "checkpoints": len(facts.blocks) + 1,
        "pos": len(facts.token_strings),
    }
    run_dtype = tensors["run.residual"].dtype
    for rule in _RULES:
        pattern = _pattern(rule)
        for name, tensor in tensors.items():
            if match := pattern.fullmatch(name):
                allowed = (run_dtype,) if rule.dtype == "run" else ()
                _check_tensor(rule, name, tensor, sizes, match.groups(), allowed)
    if sizes["heads"] % max(sizes["kv_heads"], 1) or not sizes["kv_heads"]:
        raise Misfit(f"blocks.0.W_K has {sizes['kv_heads']} heads for {sizes['heads']} of queries")
    if sizes["logits"] > sizes["targets"]:
        raise Misfit("record.target_pulls has fewer rows than record.logit_rows")
    if facts.tensors is not None:
        for name, digest in digests.of_tensors(tensors).items():
            if digest != facts.tensors[name]:
                raise Misfit(f"the tensor {name} has changed since it was written")
    else:
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise Misfit(f"the tensor {name} holds NaN or infinity")
    _check_ranges(tensors, sizes)


def _pattern(rule: _Rule) -> re.Pattern[str]:
    return re.compile(r"\.".join(_WILD.get(part, re.escape(part)) for part in rule.name.split(".")))


def _check_names(facts: Facts, tensors: Mapping[str, Tensor]) -> None:
    """That every tensor is there, and no other."""
    n_layers = len(facts.blocks)
    checkpoints = {n.split(".")[1] for n in tensors if re.fullmatch("(biases|errors).[0-9]+", n)}
    needed = {r.name for r in _RULES if not r.optional and not {"C", "L"} & {*r.name.split(".")}}
    for rule in _RULES:
        if not rule.optional and ".L." in rule.name:
            needed |= {rule.name.replace("L", str(layer), 1) for layer in range(n_layers)}
    for c in checkpoints:
        needed |= {f"biases.{c}", f"errors.{c}", f"decoders.{c}.{c}"}
    for layer, block in enumerate(facts.blocks):
        present = [name for name in TENSORS if name not in block.model_fields_set]
        needed |= {f"blocks.{layer}.{name}" for name in present}
        for name in block.model_fields_set & {*TENSORS}:
            if f"blocks.{layer}.{name}" in tensors:
                raise Misfit(f"the tensor blocks.{layer}.{name} is there, and its fact is null")
        for one, other in (("q_gain", "k_gain"), ("cos", "sin")):
            if (one in present) != (other in present):
                raise Misfit(f"block {layer} has only one of {one} and {other}")
    if "run.position_embedding" in tensors:
        needed.add("record.position_edges")
    if facts.tensors is not None:
        needed |= facts.tensors.keys()
    for name in sorted(needed - tensors.keys()):
        raise Misfit(f"the tensor {name} is missing")
    known = [_pattern(rule) for rule in _RULES]
    for name in tensors:
        numbers = [int(n) for n in re.findall(r"(?<=\.)[0-9]{1,6}(?=\.|$)", name)]
        beyond = max(numbers, default=0) > n_layers - name.startswith("blocks.")
        stray = name.startswith("decoders.") and name.split(".")[1] not in checkpoints
        extra = facts.tensors is not None and name not in facts.tensors
        plain = all(str(int(n)) == n for n in re.findall(r"(?<=\.)[0-9]+(?=\.|$)", name))
        match = any(pattern.fullmatch(name) for pattern in known)
        if not match or beyond or stray or extra or not plain:
            raise Misfit(f"the tensor {name[:80]!r} does not belong in it")


def _check_tensor(
    rule: _Rule,
    name: str,
    tensor: Tensor,
    sizes: dict[str, int],
    numbers: tuple[str, ...],
    allowed: tuple[torch.dtype, ...],
) -> None:
    """Dtype and shape of one tensor; sizes not known yet are learned from it."""
    if tensor.dtype not in _DTYPES[rule.dtype] or (allowed and tensor.dtype not in allowed):
        wanted = " or ".join(str(d).removeprefix("torch.") for d in allowed or _DTYPES[rule.dtype])
        raise Misfit(
            f"the tensor {name} should be of {wanted} and is of "
            f"{str(tensor.dtype).removeprefix('torch.')}"
        )
    axes = rule.shape.format(*numbers).split()
    if tensor.ndim == len(axes):
        for axis, size in zip(axes, tensor.shape, strict=True):
            sizes.setdefault(axis, size)
    expected = [sizes.get(axis, axis) for axis in axes]
    if list(tensor.shape) != expected:
        shape = ", ".join(map(str, expected))
        raise Misfit(
            f"the tensor {name} should be of shape [{shape}] and is of shape {list(tensor.shape)}"
        )


def _check_ranges(tensors: Mapping[str, Tensor], sizes: Mapping[str, int]) -> None:
    """That numbers can be what they stand for, and indices point at something."""
    for rule in _RULES:
        if rule.low is None:
            continue
        for name, tensor in tensors.items():
            if not _pattern(rule).fullmatch(name) or not tensor.numel():
                continue
            low, high = tensor.min().item(), tensor.max().item()
            if low < rule.low or (rule.high is not None and high > rule.high):
                raise Misfit(f"the tensor {name} holds numbers out of range ({low:g} to {high:g})")
    _check_below(tensors, "run.tokens", sizes["d_vocab"])
    _check_below(tensors, "features.position", sizes["pos"])
    checkpoint, row = tensors["features.checkpoint"], tensors["features.row"]
    known = sorted(int(name.split(".")[1]) for name in tensors if name.startswith("biases."))
    order = checkpoint * sizes["pos"] + tensors["features.position"]
    if bool((order.diff() < 0).any()):
        raise Misfit("the tensors features.checkpoint and features.position are not in order")
    for c in checkpoint.unique().tolist():
        if c not in known:
            raise Misfit(f"the tensor features.checkpoint names checkpoint {c}, which has no bias")
        if int(row[checkpoint == c].max()) >= sizes[f"distinct{c}"]:
            raise Misfit(f"the tensor features.row has rows that decoders.{c}.{c} has not")


def _check_below(tensors: Mapping[str, Tensor], name: str, end: int) -> None:
    if tensors[name].numel() and int(tensors[name].max()) >= end:
        raise Misfit(f"the tensor {name} holds {int(tensors[name].max())}, beyond {end - 1}")
