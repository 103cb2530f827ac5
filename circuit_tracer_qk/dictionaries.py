"""Dictionaries of the residual stream: residual SAEs and weakly causal crosscoders.

Both are one thing here: features that read one checkpoint and have decoder vectors at one or more
checkpoints. A residual SAE decodes at the checkpoint it reads; a feature of a weakly causal
crosscoder (WCC) at that one and every later one of its set. Checkpoint c is the residual stream
entering block c, so hook_resid_pre of block l is checkpoint l and hook_resid_post is l + 1.

The folder format is described with :func:`load_dictionaries`.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from math import isqrt
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from circuit_tracer_qk.errors import UserError

SAE = "residual_sae_set"
WCC = "weakly_causal_crosscoder"
RESID_PRE = "hook_resid_pre"
RESID_POST = "hook_resid_post"

_MINIATURE = Path(__file__).parent / "miniature"
BUILT_IN = {"miniature-sae": _MINIATURE / "sae", "miniature-wcc": _MINIATURE / "wcc"}

_TRANSCODER_KINDS = ("transcoder_set", "cross_layer_transcoder")
_ACAUSAL_KINDS = ("crosscoder", "acausal_crosscoder")
_HUB_ID = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)
_WEIGHTS = ["layer_*.safetensors", "W_enc_*.safetensors", "W_dec_*.safetensors"]


@dataclass(frozen=True, eq=False)
class Dictionary:
    """The features that read one checkpoint.

    Attributes:
        checkpoint: the checkpoint the features read.
        W_enc: encoder, (d_dict, d_model).
        b_enc: encoder bias, (d_dict,).
        b_dec: decoder bias of this checkpoint, (d_model,).
        decoders: decoder vectors, (d_dict, d_model), by the checkpoint they write to; never an
            earlier one than ``checkpoint``.
        threshold: JumpReLU's thresholds, (d_dict,).
        k: TopK's number of features per position.
        gain, b_mag: a gated SAE's magnitudes, (d_dict,) each: ``relu(gain * W_enc x + b_mag)`` where
            the pre-activation (with ``b_enc``, its gate's bias) is positive.
    """

    checkpoint: int
    W_enc: Tensor
    b_enc: Tensor
    b_dec: Tensor
    decoders: dict[int, Tensor]
    threshold: Tensor | None = None
    k: int | None = None
    gain: Tensor | None = None
    b_mag: Tensor | None = None

    def encode(self, x: Tensor) -> Tensor:
        """Activations of the features, computed in ``x``'s dtype.

        JumpReLU with ``threshold``, the k largest pre-activations of each position followed by
        ReLU with ``k``, gated magnitudes with ``gain``, plain ReLU without any. ``b_dec`` is not
        subtracted from ``x``.

        Args:
            x: the residual stream at ``checkpoint``, (n_pos, d_model).

        Returns:
            (n_pos, d_dict)
        """
        pre = F.linear(x, self.W_enc.to(x.dtype), self.b_enc.to(x.dtype))
        if self.threshold is not None:
            return pre * (pre > self.threshold.to(x.dtype))
        if self.k is not None:
            values, indices = pre.topk(self.k, dim=-1)
            return torch.zeros_like(pre).scatter(-1, indices, values.relu())
        if self.gain is not None and self.b_mag is not None:
            magnitude = (pre - self.b_enc.to(x.dtype)) * self.gain.to(x.dtype)
            return (magnitude + self.b_mag.to(x.dtype)).relu() * (pre > 0)
        return pre.relu()


def feature_index(checkpoint: int, feature: int) -> int | None:
    """The Cantor index of (checkpoint - 1, feature), by which circuit-tracer's page knows a feature.

    Features of checkpoint 0 have none.
    """
    x, y = checkpoint - 1, feature
    return None if x < 0 else (x + y) * (x + y + 1) // 2 + y


def indexed_feature(index: int) -> tuple[int, int]:
    """The (checkpoint, feature) that a Cantor index stands for."""
    diagonal = (isqrt(8 * index + 1) - 1) // 2
    feature = index - diagonal * (diagonal + 1) // 2
    return diagonal - feature + 1, feature


@dataclass(frozen=True, eq=False)
class FeatureExamples:
    """The features' JSON in a dictionary folder: ``features.zip``, else ``features/``.

    Files are named by :func:`feature_index`.
    """

    folder: Path

    def read(self, checkpoint: int, feature: int) -> bytes | None:
        """One feature's JSON as stored, None without one.

        Raises:
            UserError: ``features.zip`` cannot be read.
        """
        index = feature_index(checkpoint, feature)
        if index is None:
            return None
        if self._archive is not None:
            try:
                return self._archive.read(f"{index}.json")
            except KeyError:
                pass
            except zipfile.BadZipFile as error:
                raise UserError(f"{self.folder / 'features.zip'} is damaged: {error}") from error
        path = self.folder / "features" / f"{index}.json"
        return path.read_bytes() if path.is_file() else None

    @cached_property
    def _archive(self) -> zipfile.ZipFile | None:
        path = self.folder / "features.zip"
        if not path.is_file():
            return None
        try:
            return zipfile.ZipFile(path)
        except zipfile.BadZipFile as error:
            raise UserError(f"{path} is not a zip archive: {error}") from error


@dataclass(frozen=True, eq=False)
class DictionarySet:
    """Dictionaries at several checkpoints of one model, with their features' labels and examples.

    Attributes:
        kind: "residual_sae_set" or "weakly_causal_crosscoder".
        hook: "hook_resid_post" or "hook_resid_pre", the hook the set's layers are counted by.
        scan: the name under which features are shown.
        model_name: the model the set was trained on, where the folder tells.
        by_checkpoint: the dictionaries, by ascending checkpoint.
        folder: where the features and labels lie.
        entries: the number in each checkpoint's file names and in ``labels.json``; checkpoint - 1
            for the checkpoints left out.
    """

    kind: str
    hook: str
    scan: str
    model_name: str | None
    by_checkpoint: dict[int, Dictionary]
    folder: Path | None = None
    entries: dict[int, int] = field(default_factory=dict)

    @property
    def checkpoints(self) -> tuple[int, ...]:
        """The checkpoints that have a dictionary, ascending."""
        return tuple(self.by_checkpoint)

    @property
    def d_model(self) -> int:
        """Width of the residual stream the set was trained on."""
        return next(iter(self.by_checkpoint.values())).W_enc.shape[1]

    def check_fits(self, d_model: int, n_layers: int) -> None:
        """Check that a model has these dictionaries' checkpoints and width.

        Raises:
            UserError: naming the checkpoint, the tensor and what was expected and found.
        """
        for checkpoint, dictionary in self.by_checkpoint.items():
            d_dict, width = dictionary.W_enc.shape
            if width != d_model:
                raise UserError(
                    f"the dictionary at checkpoint {checkpoint} does not fit the model: W_enc "
                    f"should be {_show((d_dict, d_model))} and is {_show((d_dict, width))}; use "
                    "dictionaries trained on this model"
                )
            if checkpoint > n_layers:
                raise UserError(
                    f"the dictionary at checkpoint {checkpoint} does not fit the model: with "
                    f"n_layers = {n_layers} the checkpoints of W_enc are expected in 0 to "
                    f"{n_layers}, found {checkpoint}; use dictionaries trained on this model"
                )

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> DictionarySet:
        """The same set with every tensor on ``device`` and, where given, in ``dtype``."""

        def moved(dictionary: Dictionary) -> Dictionary:

            def optional(tensor: Tensor | None) -> Tensor | None:
                return None if tensor is None else tensor.to(device, dtype)

            return replace(
                dictionary,
                W_enc=dictionary.W_enc.to(device, dtype),
                b_enc=dictionary.b_enc.to(device, dtype),
                b_dec=dictionary.b_dec.to(device, dtype),
                decoders={c: W.to(device, dtype) for c, W in dictionary.decoders.items()},
                threshold=optional(dictionary.threshold),
                gain=optional(dictionary.gain),
                b_mag=optional(dictionary.b_mag),
            )

        return replace(self, by_checkpoint={c: moved(d) for c, d in self.by_checkpoint.items()})

    def label(self, checkpoint: int, feature: int) -> str:
        """The feature's label from ``labels.json``, "" when it has none.

        Raises:
            UserError: ``labels.json`` is not a mapping from file numbers to lists of labels.
        """
        labels = self._labels.get(str(self.entries.get(checkpoint, checkpoint - 1)), [])
        return (labels[feature] or "") if 0 <= feature < len(labels) else ""

    def examples(self, checkpoint: int, feature: int) -> bytes | None:
        """The feature's JSON, None without one; see :class:`FeatureExamples`.

        Raises:
            UserError: ``features.zip`` cannot be read.
        """
        return None if self._examples is None else self._examples.read(checkpoint, feature)

    @cached_property
    def _examples(self) -> FeatureExamples | None:
        return None if self.folder is None else FeatureExamples(self.folder)

    @cached_property
    def _labels(self) -> dict[str, list[str | None]]:
        path = None if self.folder is None else self.folder / "labels.json"
        if path is None or not path.is_file():
            return {}
        try:
            labels = json.loads(path.read_bytes())
        except ValueError as error:
            raise UserError(f"{path} is not valid JSON: {error}") from error
        if not isinstance(labels, dict) or not all(
            isinstance(v, list) and all(isinstance(name, str | None) for name in v)
            for v in labels.values()
        ):
            raise UserError(f'{path} should map layers to lists of labels: {{"0": ["label", ...]}}')
        return labels


@dataclass(frozen=True)
class _Config:
    """What ``config.yaml`` says, checked."""

    kind: str
    hook: str
    entries: tuple[int, ...]  # as listed: layers, or checkpoints
    shift: int  # checkpoint of an entry minus the entry
    activation: str | None
    k: int | None
    scan: str | None
    model_name: str | None


def load_dictionaries(
    ref: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> DictionarySet:
    """Load residual SAEs or a weakly causal crosscoder in circuit-tracer's tensor names.

    The folder holds ``config.yaml`` with ``model_kind``, ``layers`` and ``feature_input_hook`` (or
    ``checkpoints`` in their place) and, for every entry i of that list,

    - ``residual_sae_set``: ``layer_{i}.safetensors`` with ``W_enc`` and ``W_dec`` [d_dict,
      d_model], ``b_enc``, ``b_dec`` and, for JumpReLU, ``activation_function.threshold``;
    - ``weakly_causal_crosscoder``: ``W_enc_{i}.safetensors`` with ``W_enc_{i}``, ``b_enc_{i}``,
      ``b_dec_{i}`` and, for JumpReLU, ``threshold_{i}``; ``W_dec_{i}.safetensors`` with
      ``W_dec_{i}`` [d_dict, sites from i on, d_model].

    Files numbered 0..n-1 are taken in the list's order where they are not numbered by entry.
    ``activation: topk`` with ``k`` makes a set TopK.

    Args:
        ref: a built-in name ("miniature-sae", "miniature-wcc"), a local folder, or a hub id
            ``org/name[@revision]``.
        device: where the weights go.
        dtype: what they are cast to.

    Raises:
        UserError: the dictionaries cannot be had or are not what their config says.
    """
    folder, hub_id = _find(ref)
    if hub_id is not None:
        folder = _download(hub_id, ["config.yaml"])
        _read_config(folder)  # refuse other kinds before their weights are downloaded
        folder = _download(hub_id, ["config.yaml", "labels.json", "features.zip", *_WEIGHTS])
    config = _read_config(folder)
    numbers = _file_numbers(folder, config)

    by_checkpoint: dict[int, Dictionary] = {}
    d_model: int | None = None
    files = tqdm(
        sorted(numbers.items()), "Loading dictionaries", leave=False, delay=2, disable=None
    )
    for entry, number in files:
        tensors = _read_tensors(folder, config, entry, number, d_model)
        d_model = len(tensors["b_dec"])
        tensors = {name: t.to(device=device, dtype=dtype) for name, t in tensors.items()}
        sites = [c + config.shift for c in config.entries if config.kind == WCC and c >= entry]
        by_checkpoint[entry + config.shift] = Dictionary(
            checkpoint=entry + config.shift,
            W_enc=tensors["W_enc"],
            b_enc=tensors["b_enc"],
            b_dec=tensors["b_dec"],
            decoders=(
                {c: tensors["W_dec"][:, s].contiguous() for s, c in enumerate(sites)}
                if config.kind == WCC
                else {entry + config.shift: tensors["W_dec"]}
            ),
            threshold=tensors.get("threshold"),
            k=config.k,
        )
    return DictionarySet(
        kind=config.kind,
        hook=config.hook,
        scan=config.scan or hub_id or folder.resolve().name,
        model_name=config.model_name,
        by_checkpoint=by_checkpoint,
        folder=folder,
        entries={entry + config.shift: number for entry, number in numbers.items()},
    )


def _show(shape: tuple[int, ...]) -> str:
    return str(list(shape))


def _find(ref: str | Path) -> tuple[Path, str | None]:
    """The local folder that ``ref`` names, and the hub id if it is to be had from the hub."""
    if isinstance(ref, str) and ref in BUILT_IN:
        folder = BUILT_IN[ref]
        if not folder.is_dir():
            raise UserError(f"this installation lacks the built-in dictionaries {ref}; reinstall")
        return folder, None
    folder = Path(ref).expanduser()
    if folder.is_dir():
        return folder, None
    if isinstance(ref, str) and not folder.exists() and _HUB_ID.fullmatch(ref):
        return folder, ref
    problem = "is not a folder" if folder.exists() else "does not exist"
    raise UserError(
        f"the dictionary folder {ref} {problem}; give a folder with config.yaml, a hub id "
        f"org/name[@revision], or one of {', '.join(BUILT_IN)}"
    )


def _download(hub_id: str, patterns: list[str]) -> Path:
    repo, _, revision = hub_id.partition("@")
    try:
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=patterns))
    except (OSError, HFValidationError) as error:
        reason = re.split(r"\.?\s*\n|\.\s", f"{error} ")[0].strip() or type(error).__name__
        raise UserError(
            f"{hub_id} is no local folder and cannot be had from the Hugging Face hub ({reason}); "
            "check the id and the network, or download it elsewhere and give the folder"
        ) from error


def _read_config(folder: Path) -> _Config:
    """Read and check ``config.yaml``, except for what the weights have to say about it."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(
            f"{folder} has no config.yaml; dictionary folders describe themselves there"
        )
    try:
        config = yaml.safe_load(path.read_bytes())
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not valid YAML: {reason}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} should be a mapping such as `model_kind: {SAE}`")

    kind = config.get("model_kind")
    if kind in _TRANSCODER_KINDS:
        raise UserError(
            f"{path}: model_kind {kind} is no residual dictionary; give transcoders with "
            "-t/--transcoder_set instead"
        )
    if kind in _ACAUSAL_KINDS:
        raise UserError(f"{path}: model_kind {kind}: {ACAUSAL_REASON}")
    if kind not in (SAE, WCC):
        raise UserError(f"{path}: unknown model_kind {kind!r}; known are {SAE} and {WCC}")

    key = "checkpoints" if "checkpoints" in config else "layers"
    if "checkpoints" in config and "layers" in config:
        raise UserError(f"{path} has both layers and checkpoints; keep one of them")
    entries = _read_entries(path, key, config.get(key))
    hook = _read_hook(path, key, entries, config)
    activation, k = _read_activation(path, config)
    for name in ("scan", "model_name"):
        if not isinstance(config.get(name), str | None):
            raise UserError(f"{path}: {name} should be a name, found {config[name]!r}")
    if kind == WCC and list(entries) != sorted(entries):
        raise UserError(
            f"{path}: {key} should ascend, found {list(entries)}; the decoders' sites follow it"
        )
    return _Config(
        kind=kind,
        hook=hook,
        entries=entries,
        shift=1 if key == "layers" and hook == RESID_POST else 0,
        activation=activation,
        k=k,
        scan=config.get("scan"),
        model_name=config.get("model_name"),
    )


ACAUSAL_REASON = (
    "acausal crosscoders decode to sites before the one they read, so that a feature would cause "
    f"what precedes it; use a {WCC}, whose decoders start at the encoder's site"
)


def _read_entries(path: Path, key: str, entries: Any) -> tuple[int, ...]:
    if not isinstance(entries, list) or not entries or any(type(i) is not int for i in entries):
        found = "nothing" if entries is None else repr(entries)
        raise UserError(f"{path}: {key} should be a list of integers, found {found}")
    if min(entries) < 0:
        raise UserError(f"{path}: {key} holds {min(entries)}; {key} are counted from 0")
    repeated = [i for i in entries if entries.count(i) > 1]
    if repeated:
        raise UserError(f"{path}: {key} holds {repeated[0]} twice; list each once")
    return tuple(entries)


def _read_hook(path: Path, key: str, entries: tuple[int, ...], config: Mapping[str, Any]) -> str:
    hook = config.get("feature_input_hook")
    if hook is None and key == "checkpoints":
        hook = RESID_PRE if 0 in entries else RESID_POST
    if hook not in (RESID_PRE, RESID_POST):
        raise UserError(
            f"{path}: feature_input_hook should be {RESID_PRE} or {RESID_POST}, found {hook!r}"
        )
    output = config.get("feature_output_hook", hook)
    if output != hook:
        raise UserError(
            f"{path}: feature_output_hook {output!r} differs from feature_input_hook {hook!r}; "
            "residual dictionaries write where they read"
        )
    return hook


def _read_activation(path: Path, config: Mapping[str, Any]) -> tuple[str | None, int | None]:
    activation = config.get("activation", config.get("activation_function"))
    if activation not in (None, "relu", "jumprelu", "topk"):
        raise UserError(
            f"{path}: unknown activation {activation!r}; known are relu, jumprelu and topk"
        )
    if activation != "topk":
        return activation, None
    k = config.get("k")
    if type(k) is not int or k < 1:
        raise UserError(f"{path}: activation topk needs k, an integer of at least 1, found {k!r}")
    return activation, k


def _file_numbers(folder: Path, config: _Config) -> dict[int, int]:
    """The number in the file names of each entry."""
    stem = "layer" if config.kind == SAE else "W_enc"
    pattern = re.compile(rf"{stem}_(0|[1-9][0-9]*)\.safetensors")
    matches = (pattern.fullmatch(path.name) for path in folder.iterdir())
    present = {int(match[1]) for match in matches if match}
    missing = sorted(set(config.entries) - present)
    if not missing:
        return {i: i for i in config.entries}
    if present == set(range(len(config.entries))):
        return {entry: number for number, entry in enumerate(config.entries)}
    raise UserError(
        f"{folder / f'{stem}_{missing[0]}.safetensors'} is missing: config.yaml lists "
        f"{list(config.entries)} and the folder has {sorted(present)}; add the file or correct "
        "the list"
    )


def _layout(folder: Path, kind: str, number: int) -> list[tuple[Path, dict[str, str]]]:
    """The files of one entry, each with the stored name of every tensor it should hold."""
    if kind == SAE:
        names = {name: name for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
        names["threshold"] = "activation_function.threshold"
        return [(folder / f"layer_{number}.safetensors", names)]
    names = {name: f"{name}_{number}" for name in ("W_enc", "b_enc", "b_dec", "threshold")}
    return [
        (folder / f"W_enc_{number}.safetensors", names),
        (folder / f"W_dec_{number}.safetensors", {"W_dec": f"W_dec_{number}"}),
    ]


def _read_tensors(
    folder: Path, config: _Config, entry: int, number: int, d_model: int | None
) -> dict[str, Tensor]:
    """One entry's tensors as stored, checked, as W_enc, W_dec, b_enc, b_dec and threshold.

    Args:
        folder: the dictionary folder.
        config: its config.
        entry: the layer or checkpoint as listed.
        number: the number in its file names.
        d_model: the width of the entries before, None for the first.

    Raises:
        UserError: naming the file and the tensor that is wrong.
    """
    tensors: dict[str, Tensor] = {}
    titles: dict[str, str] = {}
    for path, names in _layout(folder, config.kind, number):
        tensors |= _read_file(path, names, config.activation)
        titles |= {name: f"the tensor {stored} of {path}" for name, stored in names.items()}

    n_sites = sum(i >= entry for i in config.entries) if config.kind == WCC else None
    expected = _expected_shapes(tensors, n_sites, d_model)
    (d_dict,) = expected["b_enc"]
    if "threshold" in tensors and tensors["threshold"].numel() == 1:
        tensors["threshold"] = tensors["threshold"].reshape(1).repeat(d_dict)
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        if shape != expected[name]:
            wrong = f"{titles[name]} should be {_show(expected[name])} and is {_show(shape)}"
            if name == "W_dec" and shape == (d_dict, len(config.entries), *expected["b_dec"]):
                raise UserError(f"{wrong}, decoders at every site: {ACAUSAL_REASON}")
            hint = "; it is stored transposed" if shape == expected[name][::-1] else ""
            raise UserError(wrong + hint)
        if not tensor.is_floating_point():
            raise UserError(
                f"{titles[name]} should hold floating-point numbers, not {tensor.dtype}"
            )
        if not tensor.isfinite().all():
            raise UserError(
                f"{titles[name]} holds NaN or infinite values; it was damaged or overflowed"
            )
    if config.k is not None and config.k > d_dict:
        raise UserError(
            f"{folder / 'config.yaml'}: k should be at most {d_dict}, the number of features at "
            f"{entry}, and is {config.k}"
        )
    return tensors


def _read_file(path: Path, names: dict[str, str], activation: str | None) -> dict[str, Tensor]:
    """The tensors of one file, of which only the threshold may be absent."""
    if not path.is_file():
        raise UserError(f"{path} is missing; add the file or correct config.yaml")
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is truncated or no safetensors file ({error}); fetch it again"
        ) from error
    for name, stored in names.items():
        if stored not in found and (name != "threshold" or activation == "jumprelu"):
            has = ", ".join(sorted(found)) or "no tensors"
            raise UserError(f"{path} lacks the tensor {stored}; it has {has}")
    unknown = sorted(set(found) - set(names.values()))
    if unknown:
        raise UserError(
            f"{path} has the unknown tensor {unknown[0]}; expected are {', '.join(names.values())}"
        )
    if activation in ("relu", "topk") and names.get("threshold") in found:
        raise UserError(
            f"{path} has the tensor {names['threshold']}, but config.yaml says activation "
            f"{activation}; remove one of them"
        )
    return {name: found[stored] for name, stored in names.items() if stored in found}


def _expected_shapes(
    tensors: Mapping[str, Tensor], n_sites: int | None, d_model: int | None
) -> dict[str, tuple[int, ...]]:
    """The shapes that agree with most of the tensors, so that the odd one out can be named.

    Args:
        tensors: one entry's tensors.
        n_sites: how many sites a WCC's decoders should have, None for an SAE.
        d_model: the width if it is known.
    """

    def shapes(d_dict: int, d_model: int) -> dict[str, tuple[int, ...]]:
        return {
            "W_enc": (d_dict, d_model),
            "W_dec": (d_dict, d_model) if n_sites is None else (d_dict, n_sites, d_model),
            "b_enc": (d_dict,),
            "b_dec": (d_model,),
            "threshold": (d_dict,),
        }

    def agreement(expected: dict[str, tuple[int, ...]]) -> int:
        ends = ((tuple(t.shape), expected[name]) for name, t in tensors.items())
        return sum(s[:1] + s[-1:] == e[:1] + e[-1:] for s, e in ends)

    rows = [t.shape[0] for name in ("b_enc", "W_enc", "W_dec") if (t := tensors[name]).ndim]
    columns = [t.shape[-1] for name in ("b_dec", "W_enc", "W_dec") if (t := tensors[name]).ndim]
    if d_model is not None:
        columns = [d_model]
    return max((shapes(*size) for size in product(rows, columns)), key=agreement)
