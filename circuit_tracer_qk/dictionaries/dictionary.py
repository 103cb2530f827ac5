"""Dictionaries of the residual stream: residual SAEs and weakly causal crosscoders.

Both are one thing here: features that read one checkpoint and have decoder vectors at one or more
checkpoints. A residual SAE decodes at the checkpoint it reads; a feature of a weakly causal
crosscoder (WCC) at that one and every later one of its set. Checkpoint c is the residual stream
entering block c, so hook_resid_pre of block l is checkpoint l and hook_resid_post is l + 1.

Weights may lie in memory-mapped files: an encoder is read through in pieces, of a decoder only the
rows of active features are.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import isqrt
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from circuit_tracer_qk.base.errors import UserError

SAE = "residual_sae_set"
WCC = "weakly_causal_crosscoder"
RESID_PRE = "hook_resid_pre"
RESID_POST = "hook_resid_post"

ACAUSAL_REASON = (
    "acausal crosscoders decode to sites before the one they read, so that a feature would cause "
    f"what precedes it; use a {WCC}, whose decoders start at the encoder's site"
)

_PIECE = 2**24  # encoder weights converted at a time: 64 MB of float32


class Scaled(NamedTuple):
    """A residual stream as a dictionary was trained to see it.

    Attributes:
        x: (n_pos, d_model), what is encoded.
        scale: (n_pos, 1), what the reconstruction is multiplied with; None for 1.
        shift: (n_pos, 1), what is added to it afterwards; None for 0.
    """

    x: Tensor
    scale: Tensor | None
    shift: Tensor | None


@dataclass(frozen=True)
class Units:
    """How a dictionary's input was normalised in training, and its output taken back.

    Attributes:
        normalised: None, or SAELens' names: "constant_norm_rescale" (every vector has norm
            sqrt(d_model)) or "layer_norm" (mean 0, standard deviation 1).
        factor: what the input is multiplied with besides.
        centred: whether it was trained on a model whose writing weights are centred. The stream of
            such a model is this one without its mean over d_model, position by position.
    """

    normalised: str | None = None
    factor: float = 1.0
    centred: bool = False

    @property
    def constant(self) -> bool:
        """Whether every position is treated alike, so that weights can take it in."""
        return self.normalised is None and not self.centred

    def of(self, x: Tensor) -> Scaled:
        """The stream in these units; ``scale`` and ``shift`` lead back to the model's own.

        ``factor`` is not in ``scale``: decoder vectors are divided by it once and for all.
        """
        scale = shift = None
        if self.centred or self.normalised == "layer_norm":
            shift = x.mean(-1, keepdim=True)
            x = x - shift
        if self.normalised == "layer_norm":
            scale = x.std(-1, keepdim=True)
            x = x / (scale + 1e-5)
        elif self.normalised == "constant_norm_rescale":
            scale = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
            x = x / scale
        return Scaled(x * self.factor if self.factor != 1 else x, scale, shift)


@dataclass(frozen=True, eq=False)
class Dictionary:
    """The features that read one checkpoint.

    At every position the stream is, in the model's own units and exactly,

        x = sum_i encode(x)_i vectors(c, i) + bias(x) + error

    whatever normalisation the dictionary was trained with.

    Attributes:
        checkpoint: the checkpoint the features read.
        W_enc: encoder, (d_dict, d_model), as stored.
        b_enc: encoder bias, (d_dict,).
        b_dec: decoder bias of this checkpoint, (d_model,).
        decoders: decoder vectors as stored, (d_dict, d_model), by the checkpoint they write to;
            never an earlier one than ``checkpoint``. :meth:`vectors` are what features write.
        threshold: JumpReLU's thresholds, (d_dict,).
        k: TopK's number of features per position.
        gain, b_mag: a gated SAE's magnitudes, (d_dict,) each: ``relu(gain * W_enc x + b_mag)`` where
            the pre-activation (with ``b_enc``, its gate's bias) is positive.
        subtract: (d_model,), what the encoder takes from its input.
        encoder_scale: (d_dict,), what pre-activations are multiplied with.
        decoder_scale: (d_dict,), what decoder vectors are multiplied with.
        units: what the dictionary was trained to see.
        own: the encoder of another library, (n_pos, d_model) -> (n_pos, d_dict), in place of the
            fields above.
        title: the name for messages.
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
    subtract: Tensor | None = None
    encoder_scale: Tensor | None = None
    decoder_scale: Tensor | None = None
    units: Units = Units()
    own: Callable[[Tensor], Tensor] | None = None
    title: str = ""

    def __post_init__(self) -> None:
        if self.k is not None and not 1 <= self.k <= len(self.b_enc):
            raise UserError(
                f"{self.title or f'checkpoint {self.checkpoint}'}: k should be at most "
                f"{len(self.b_enc)}, its number of features, and at least 1, and is {self.k}."
            )

    def encode(self, x: Tensor) -> Tensor:
        """Activations of the features in the model's units, computed in ``x``'s dtype.

        JumpReLU with ``threshold``, the k largest pre-activations of each position followed by
        ReLU with ``k``, gated magnitudes with ``gain``, plain ReLU without any.

        Args:
            x: the residual stream at ``checkpoint``, (n_pos, d_model).

        Returns:
            (n_pos, d_dict)

        Raises:
            UserError: the encoder holds NaN or infinite values.
        """
        z, scale, _ = self.units.of(x)
        acts = self._activations(z) if self.own is None else self.own(z).to(x.dtype)
        return acts if scale is None else acts * scale

    def _activations(self, z: Tensor) -> Tensor:
        """(n_pos, d_dict) from the stream in the dictionary's units."""
        if self.subtract is not None:
            z = z - like(self.subtract, z)
        pre = self._linear(z)
        if not bool(pre.isfinite().all()):
            raise UserError(
                f"the encoder of {self.title or f'checkpoint {self.checkpoint}'} gives NaN or "
                "infinite values: it was damaged or overflowed."
            )
        gate = pre + like(self.b_enc, z)
        if self.encoder_scale is not None:
            gate = gate * like(self.encoder_scale, z)
        if self.threshold is not None:
            return gate * (gate > like(self.threshold, z))
        if self.k is not None:
            values, indices = gate.topk(self.k, dim=-1)
            return torch.zeros_like(gate).scatter(-1, indices, values.relu())
        if self.gain is not None and self.b_mag is not None:
            return (pre * like(self.gain, z) + like(self.b_mag, z)).relu() * (gate > 0)
        return gate.relu()

    def _linear(self, z: Tensor) -> Tensor:
        """(n_pos, d_dict) without bias; weights of another dtype or device come in pieces."""
        W = self.W_enc
        if W.dtype == z.dtype and W.device == z.device:
            return F.linear(z, W)
        pre = z.new_empty(len(z), len(W))
        rows = max(1, _PIECE // W.shape[1])
        for start in range(0, len(W), rows):
            piece = slice(start, start + rows)
            pre[:, piece] = F.linear(z, like(W[piece], z))
        return pre

    def vectors(self, checkpoint: int, features: Tensor) -> Tensor:
        """(n, d_model): what one unit of activation of each feature writes at a checkpoint.

        Args:
            checkpoint: one of ``decoders``.
            features: (n,) indices; only these rows are read.

        Raises:
            UserError: they hold NaN or infinite values.
        """
        decoder = self.decoders[checkpoint]
        at = features.to(decoder.device)
        rows = decoder[at]
        if not bool(rows.isfinite().all()):
            raise UserError(
                f"decoder vectors of {self.title or f'checkpoint {self.checkpoint}'} hold NaN or "
                "infinite values: the file was damaged or overflowed."
            )
        if self.decoder_scale is None:
            return rows
        scale = self.decoder_scale[at]
        dtype = torch.promote_types(rows.dtype, scale.dtype)
        return rows.to(dtype) * scale.to(dtype)[:, None]

    def bias(self, x: Tensor) -> Tensor:
        """(n_pos, d_model): what the dictionary reconstructs without any feature."""
        _, scale, shift = self.units.of(x)
        b_dec = like(self.b_dec, x).expand_as(x)
        b_dec = b_dec if scale is None else b_dec * scale
        return b_dec if shift is None else b_dec + shift

    @property
    def not_plain(self) -> str | None:
        """Why the features cannot be said in plain weights; None where they can."""
        if self.own is not None:
            return "is encoded by another library's code"
        if self.gain is not None:
            return "is gated"
        if self.units.constant:
            return None
        how = self.units.normalised or "centring"
        return f"normalises every position by itself ({how})"

    def folded(self) -> Dictionary:
        """The same features in plain weights of the model's units: encoder, biases, decoders.

        Raises:
            UserError: they cannot be said in plain weights (:attr:`not_plain`).
        """
        if self.not_plain is not None:
            raise UserError(f"{self.title} {self.not_plain}: plain weights cannot say that.")
        W_enc, b_enc = self.W_enc.to(self.b_enc.dtype), self.b_enc
        if self.subtract is not None:
            b_enc = b_enc - W_enc @ self.subtract.to(W_enc)
        if self.units.factor != 1:
            W_enc = W_enc * self.units.factor
        if self.encoder_scale is not None:
            W_enc, b_enc = W_enc * self.encoder_scale[:, None], b_enc * self.encoder_scale
        every = torch.arange(len(b_enc))
        return replace(
            self,
            W_enc=W_enc,
            b_enc=b_enc,
            decoders={c: self.vectors(c, every) for c in self.decoders},
            subtract=None,
            encoder_scale=None,
            decoder_scale=None,
            units=Units(),
        )

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> Dictionary:
        """The same dictionary with every tensor on ``device`` and, where given, in ``dtype``."""

        def moved(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: moved(tensor) for key, tensor in value.items()}
            if not isinstance(value, Tensor):
                return value
            return (value if dtype is None else value.to(dtype)).to(device)

        return replace(self, **{name: moved(value) for name, value in vars(self).items()})


def like(tensor: Tensor, x: Tensor) -> Tensor:
    """In ``x``'s dtype, then on its device: not every device has every dtype."""
    return tensor.to(x.dtype).to(x.device)


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
        neuronpedia: the id on Neuronpedia of each checkpoint's dictionary, such as
            "gemma-2-2b/12-gemmascope-res-16k", where the set has them.
    """

    kind: str
    hook: str
    scan: str
    model_name: str | None
    by_checkpoint: dict[int, Dictionary]
    folder: Path | None = None
    entries: dict[int, int] = field(default_factory=dict)
    neuronpedia: dict[int, str] = field(default_factory=dict)

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
                    f"should be {[d_dict, d_model]} and is {[d_dict, width]}; use "
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
        moved = {c: d.to(device, dtype) for c, d in self.by_checkpoint.items()}
        return replace(self, by_checkpoint=moved)

    @property
    def n_weights(self) -> int:
        """How many numbers its encoders and decoders hold."""
        tensors = [t for d in self.by_checkpoint.values() for t in (d.W_enc, *d.decoders.values())]
        return sum(t.numel() for t in tensors)

    def label(self, checkpoint: int, feature: int) -> str:
        """The feature's label from ``labels.json``, "" when it has none.

        Raises:
            UserError: ``labels.json`` is not a mapping from file numbers to lists of labels.
        """
        labels = self.labels.get(str(self.entries.get(checkpoint, checkpoint - 1)), [])
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
    def labels(self) -> dict[str, list[str | None]]:
        """The names of features in ``labels.json``, by the number of the file they are in."""
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
