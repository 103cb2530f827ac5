"""The native format: circuit-tracer's tensor names, with a ``config.yaml`` beside them.

``config.yaml`` has ``model_kind``, ``layers`` and ``feature_input_hook`` (or ``checkpoints`` in
their place); for every entry i of that list there are

- ``residual_sae_set``: ``layer_{i}.safetensors`` with ``W_enc`` and ``W_dec`` [d_dict, d_model],
  ``b_enc``, ``b_dec`` and, for JumpReLU, ``activation_function.threshold``;
- ``weakly_causal_crosscoder``: ``W_enc_{i}.safetensors`` with ``W_enc_{i}``, ``b_enc_{i}``,
  ``b_dec_{i}`` and, for JumpReLU, ``threshold_{i}``; ``W_dec_{i}.safetensors`` with ``W_dec_{i}``
  [d_dict, sites from i on, d_model].

Files numbered 0..n-1 are read in the list's order where they are not numbered by entry.
``activation: topk`` with ``k`` makes a set TopK.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, NonNegativeInt, model_validator
from torch import Tensor
from tqdm import tqdm

from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.base.validation import validate
from circuit_tracer_qk.base.yaml_files import read_yaml
from circuit_tracer_qk.dictionaries.dictionary import (
    ACAUSAL_REASON,
    RESID_POST,
    RESID_PRE,
    SAE,
    WCC,
    Dictionary,
)
from circuit_tracer_qk.dictionaries.dictionary_set import DictionarySet
from circuit_tracer_qk.dictionaries.files import Files, joined
from circuit_tracer_qk.dictionaries.layouts.layout import Hints, Layout, scan_of, wanted
from circuit_tracer_qk.dictionaries.tensors import mapped, validate_tensors

CONFIG = "config.yaml"
_TRANSCODER_KINDS = ("transcoder_set", "cross_layer_transcoder")
_ACAUSAL_KINDS = ("crosscoder", "acausal_crosscoder")
_BESIDE = ("labels.json", "features.zip")


def _known_kind(kind: object) -> object:
    if kind in _TRANSCODER_KINDS:
        raise ValueError(
            f"model_kind {kind} is no residual dictionary; give transcoders with "
            "-t/--transcoder_set instead"
        )
    if kind in _ACAUSAL_KINDS:
        raise ValueError(f"model_kind {kind}: {ACAUSAL_REASON}")
    return kind


_Kind = Annotated[
    Literal["residual_sae_set", "weakly_causal_crosscoder"], BeforeValidator(_known_kind)
]
_Entries = Annotated[
    list[NonNegativeInt] | None,
    Field(min_length=1, description="a list of integers, counted from 0"),
]


class _Config(BaseModel):
    """What ``config.yaml`` says; the keys that are not here change nothing."""

    model_config = ConfigDict(strict=True, protected_namespaces=())

    model_kind: _Kind = Field(description=f"{SAE} or {WCC}")
    layers: _Entries = None
    checkpoints: _Entries = None
    feature_input_hook: Literal["hook_resid_pre", "hook_resid_post"] | None = Field(
        None, description=f"{RESID_PRE} or {RESID_POST}"
    )
    feature_output_hook: Any = None
    activation: Literal["relu", "jumprelu", "topk"] | None = Field(
        None, description="relu, jumprelu or topk"
    )
    k: Any = None
    scan: str | None = Field(None, description="a name")
    model_name: str | None = Field(None, description="a name")

    @property
    def entries(self) -> list[int]:
        """As listed: layers, or checkpoints."""
        return self.layers or self.checkpoints or []

    @property
    def shift(self) -> int:
        """The checkpoint of an entry minus the entry."""
        return 1 if self.layers and self.feature_input_hook == RESID_POST else 0

    @model_validator(mode="after")
    def _fits_together(self) -> _Config:
        entries, key = self.entries, "checkpoints" if self.checkpoints else "layers"
        if self.layers and self.checkpoints:
            raise ValueError("it has both layers and checkpoints; keep one of them")
        if not entries:
            raise ValueError("layers should be a list of integers, found nothing")
        for entry in entries:
            if entries.count(entry) > 1:
                raise ValueError(f"{key} holds {entry} twice; list each once")
        if self.model_kind == WCC and entries != sorted(entries):
            raise ValueError(f"{key} should ascend, found {entries}; the decoders' sites follow it")
        if self.checkpoints and self.feature_input_hook is None:
            self.feature_input_hook = RESID_PRE if 0 in entries else RESID_POST
        hook, output = self.feature_input_hook, self.feature_output_hook
        if hook is None:
            raise ValueError(
                f"feature_input_hook should be {RESID_PRE} or {RESID_POST}, found nothing"
            )
        if output not in (None, hook):
            raise ValueError(
                f"feature_output_hook {output!r} differs from feature_input_hook {hook!r}; "
                "residual dictionaries write where they read"
            )
        if self.activation != "topk":
            self.k = None
        elif type(self.k) is not int or self.k < 1:
            raise ValueError(f"activation topk needs k, an integer of at least 1, found {self.k!r}")
        return self


def _load(files: Files, folder: str, hints: Hints) -> DictionarySet:
    """Read a set, its tensors mapped into memory.

    Raises:
        UserError: the dictionaries cannot be had or are not what their config says.
    """
    config = _read_config(files, folder)  # refuse other kinds before their weights are fetched
    numbers = _file_numbers(files, folder, config)
    if config.model_kind == SAE:  # a crosscoder is needed whole
        kept = wanted((entry + config.shift for entry in numbers), hints)
        numbers = {c - config.shift: numbers[c - config.shift] for c in kept}
    stored = {entry: _layout(config.model_kind, number) for entry, number in numbers.items()}
    beside = [name for name in _BESIDE if joined(folder, name) in files.names]
    every = [name for parts in stored.values() for name, _ in parts]
    files.fetch(joined(folder, name) for name in (*every, *beside))
    config_path = files.get(joined(folder, CONFIG))

    by_checkpoint: dict[int, Dictionary] = {}
    d_model: int | None = None
    bar = tqdm(sorted(stored.items()), "Loading dictionaries", leave=False, delay=2, disable=None)
    for entry, parts in bar:
        at = entry + config.shift
        t = _read_tensors(files, folder, config, entry, parts, d_model)
        d_model = len(t["b_dec"])
        decoders = {at: t["W_dec"]}
        if config.model_kind == WCC:
            sites = [c + config.shift for c in config.entries if c >= entry]
            decoders = {c: t["W_dec"][:, s] for s, c in enumerate(sites)}
        by_checkpoint[at] = Dictionary(
            at,
            t["W_enc"],
            t["b_enc"],
            t["b_dec"],
            decoders,
            threshold=t.get("threshold"),
            k=config.k,
            title=f"entry {entry} of {files.title}",
        )
    return DictionarySet(
        kind=config.model_kind,
        hook=config.feature_input_hook or RESID_POST,
        scan=hints.scan or config.scan or scan_of(files),
        model_name=hints.model_name or config.model_name,
        by_checkpoint=by_checkpoint,
        folder=config_path.parent,
        entries={entry + config.shift: number for entry, number in numbers.items()},
    )


LAYOUT = Layout("native", (CONFIG,), read_set=_load)


def _read_config(files: Files, folder: str) -> _Config:
    """Read and check ``config.yaml``, except for what the weights have to say about it."""
    path = files.get(joined(folder, CONFIG))
    config = read_yaml(path, f"model_kind: {SAE}")
    if "activation_function" in config:  # an older name
        config = {"activation": config["activation_function"]} | config
    return validate(_Config, config, f"{path}: ")


def _file_numbers(files: Files, folder: str, config: _Config) -> dict[int, int]:
    """The number in the file names of each entry."""
    stem = "layer" if config.model_kind == SAE else "W_enc"
    pattern = re.compile(re.escape(joined(folder, stem)) + r"_(0|[1-9][0-9]*)\.safetensors")
    matches = (pattern.fullmatch(name) for name in files.names)
    present = {int(match[1]) for match in matches if match}
    missing = sorted(set(config.entries) - present)
    if not missing:
        return {i: i for i in config.entries}
    if present == set(range(len(config.entries))):
        return {entry: number for number, entry in enumerate(config.entries)}
    raise UserError(
        f"{joined(files.title, joined(folder, f'{stem}_{missing[0]}.safetensors'))} is missing: "
        f"config.yaml lists {config.entries} and the folder has {sorted(present)}; add the "
        "file or correct the list"
    )


def _layout(kind: str, number: int) -> list[tuple[str, dict[str, str]]]:
    """The files of one entry, each with the stored name of every tensor it should hold."""
    if kind == SAE:
        names = {name: name for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
        names["threshold"] = "activation_function.threshold"
        return [(f"layer_{number}.safetensors", names)]
    names = {name: f"{name}_{number}" for name in ("W_enc", "b_enc", "b_dec", "threshold")}
    return [
        (f"W_enc_{number}.safetensors", names),
        (f"W_dec_{number}.safetensors", {"W_dec": f"W_dec_{number}"}),
    ]


def _read_tensors(
    files: Files,
    folder: str,
    config: _Config,
    entry: int,
    parts: list[tuple[str, dict[str, str]]],
    d_model: int | None,
) -> dict[str, Tensor]:
    """One entry's tensors as stored, checked, as W_enc, W_dec, b_enc, b_dec and threshold.

    Raises:
        UserError: naming the file and the tensor that is wrong.
    """
    tensors: dict[str, Tensor] = {}
    titles: dict[str, str] = {}
    for name, names in parts:
        path = files.get(joined(folder, name))
        tensors |= _read_file(path, names, config.activation)
        titles |= {ours: f"the tensor {stored} of {path}" for ours, stored in names.items()}
    sizes = {} if d_model is None else {"model": d_model}
    spec = {"W_enc": "dict model", "W_dec": "dict model", "b_enc": "dict", "b_dec": "model"}
    if config.model_kind == WCC:
        sizes["sites"] = sum(i >= entry for i in config.entries)
        spec["W_dec"] = "dict sites model"
    if "threshold" in tensors and tensors["threshold"].numel() == 1:
        tensors["threshold"] = tensors["threshold"].reshape(1).repeat(len(tensors["b_enc"]))
    every, decoders = len(config.entries), tensors["W_dec"]
    n_sites = sizes.get("sites", every)
    if n_sites != every and decoders.ndim == 3 and decoders.shape[1] == every:
        raise UserError(
            f"{titles['W_dec']} has {every} sites where {n_sites} are left, decoders at every site:"
            f" {ACAUSAL_REASON}"
        )
    return validate_tensors(titles, tensors, spec, {"threshold": "dict"}, sizes=sizes)


def _read_file(path: Path, names: dict[str, str], activation: str | None) -> dict[str, Tensor]:
    """The tensors of one file, of which only the threshold may be absent."""
    if not path.is_file():
        raise UserError(f"{path} is missing; add the file or correct config.yaml")
    tensors = mapped(path)
    for name, stored in names.items():
        if stored not in tensors and (name != "threshold" or activation == "jumprelu"):
            has = ", ".join(sorted(tensors)) or "no tensors"
            raise UserError(f"{path} lacks the tensor {stored}; it has {has}")
    unknown = sorted(set(tensors) - set(names.values()))
    if unknown:
        raise UserError(
            f"{path} has the unknown tensor {unknown[0]}; expected are {', '.join(names.values())}"
        )
    if activation in ("relu", "topk") and names.get("threshold") in tensors:
        raise UserError(
            f"{path} has the tensor {names['threshold']}, but config.yaml says activation "
            f"{activation}; remove one of them"
        )
    return {name: tensors[stored] for name, stored in names.items() if stored in tensors}
