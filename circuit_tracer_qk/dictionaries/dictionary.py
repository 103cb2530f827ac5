"""Dictionaries of the residual stream: residual SAEs and weakly causal crosscoders.

Both are one thing here: features that read one checkpoint and have decoder vectors at one or more
checkpoints. A residual SAE decodes at the checkpoint it reads; a feature of a weakly causal
crosscoder (WCC) at that one and every later one of its set. Checkpoint c is the residual stream
entering block c, so hook_resid_pre of block l is checkpoint l and hook_resid_post is l + 1.

Weights may lie in memory-mapped files: an encoder is read through in pieces, of a decoder only the
rows of active features are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
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

    >>> import torch
    >>> from circuit_tracer_qk import load_dictionaries
    >>> dictionary = load_dictionaries("miniature-sae").by_checkpoint[1]
    >>> dictionary.encode(torch.zeros(3, 128)).shape
    torch.Size([3, 512])
    >>> dictionary.vectors(1, torch.tensor([61, 177])).shape
    torch.Size([2, 128])

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
        encoder: another library's encoder, (n_pos, d_model) -> (n_pos, d_dict), in place of the
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
    encoder: Callable[[Tensor], Tensor] | None = None
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
        acts = self._activations(z) if self.encoder is None else self.encoder(z).to(x.dtype)
        return acts if scale is None else acts * scale

    def _activations(self, z: Tensor) -> Tensor:
        """(n_pos, d_dict) from the stream in the dictionary's units."""
        if self.subtract is not None:
            z = z - like(self.subtract, z)
        pre = self._linear(z)
        # a sum is many times quicker to look at, and finite only where all is
        if not bool(pre.sum().isfinite()) and not bool(pre.isfinite().all()):
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
        """What one unit of activation of each feature writes at a checkpoint, in the model's units.

        Args:
            checkpoint: one of ``decoders``.
            features: (n,) indices; only these rows are read.

        Returns:
            (n, d_model)

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
        """What the dictionary reconstructs without any feature, in the model's units.

        Args:
            x: the residual stream at ``checkpoint``, (n_pos, d_model).

        Returns:
            (n_pos, d_model)
        """
        _, scale, shift = self.units.of(x)
        b_dec = like(self.b_dec, x).expand_as(x)
        b_dec = b_dec if scale is None else b_dec * scale
        return b_dec if shift is None else b_dec + shift

    @property
    def why_not_plain(self) -> str | None:
        """Why the features cannot be said in plain weights; None where they can."""
        if self.encoder is not None:
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
            UserError: they cannot be said in plain weights (:attr:`why_not_plain`).
        """
        if self.why_not_plain is not None:
            raise UserError(f"{self.title} {self.why_not_plain}: plain weights cannot say that.")
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
