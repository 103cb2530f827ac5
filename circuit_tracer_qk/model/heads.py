"""The attention heads of a model on one frozen run.

    n(u)     ln1 with a frozen denominator                       :meth:`Heads.normed`
    q, k     of a component vector                               :meth:`Heads.image`
    v        n(u) W_V[g]                                         :meth:`Heads.value_path`
    write    post1(sum_h z_h W_O[h])                             :meth:`Heads.output_path`

(attribution/README.md, sections 2 and 3; paper, "QK attributions" and "Head loadings").
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuit_tracer_qk.model.attention import KEY, QUERY, AttentionBlock, Denominators
from circuit_tracer_qk.model.linear import LinearMap, Matrix, Split
from circuit_tracer_qk.model.norm import Norm, cast, rms
from circuit_tracer_qk.model.run import FrozenRun

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

IN_USE = 3  # blocks at a time across which edges are made, and cast once for all that is done there


class Heads:
    """The attention heads of a model on one frozen run.

    Weights stay in the model's dtype; a block is cast to the contraction dtype while in use.
    Projections are computed in the dtype of the vectors that they are given.

    Args:
        blocks: one :class:`AttentionBlock` a layer.
        run: the frozen run whose denominators are used.
    """

    def __init__(self, blocks: list[AttentionBlock], run: FrozenRun) -> None:
        self.blocks = blocks
        self.run = run
        self.everywhere = torch.arange(run.n_pos, device=run.residual.device)
        dtype = run.residual.dtype

        @lru_cache(maxsize=IN_USE)
        def block(layer: int) -> AttentionBlock:
            return cast(blocks[layer], dtype)

        @cache
        def taus(layer: int) -> tuple[Tensor, Tensor]:
            b = block(layer)
            n = b.ln1.apply(run.residual[layer], run.scale("ln1", layer))
            q = torch.einsum("pd,hde->phe", n, b.W_Q) + b.b_Q
            k = torch.einsum("pd,gde->pge", n, b.W_K) + b.b_K
            return rms(q, b.qk_eps), rms(k, b.qk_eps)

        @lru_cache(maxsize=IN_USE)
        def flat(layer: int) -> tuple[Matrix, Matrix]:
            """(d_model, n_kv * d_head) of all values, (n_heads * d_head, d_model) of all outputs."""
            b = block(layer)
            return Matrix(b.W_V.transpose(0, 1).flatten(1)), Matrix(b.W_O.flatten(0, 1))

        self.block = block
        self._flat = flat
        self._taus = taus
        self._constant_layers = [b.has_constant() for b in blocks]

    def normed(
        self, layer: int, u: Float[Tensor, "n d_model"], positions: Int[Tensor, " n"]
    ) -> Float[Tensor, "n d_model"]:
        """Component vectors as every head of a block reads them, after ln1."""
        scale = self.run.scale("ln1", layer)[positions].to(u.dtype)
        return self.block(layer).ln1.at(scale)(u)

    def image(
        self,
        layer: int,
        u: Float[Tensor, "n d_model"],
        positions: Int[Tensor, " n"],
        head: int | None,
        side: int,
    ) -> Float[Tensor, "n *heads d_head"]:
        """q(u) or k(u): what heads make of component vectors.

        Args:
            layer: the block; components are those of its checkpoint.
            u: component vectors.
            positions: where they stand.
            head: the query head (``side`` QUERY) or the key-value head (KEY); None for all.
            side: QUERY or KEY.
        """
        return self.projected(layer, self.normed(layer, u, positions), positions, head, side)

    def projected(
        self,
        layer: int,
        normed: Float[Tensor, "n d_model"],
        positions: Int[Tensor, " n"],
        head: int | None,
        side: int,
    ) -> Float[Tensor, "n *heads d_head"]:
        """:meth:`image` of vectors that :meth:`normed` gave, which heads share."""
        tau = self._tau(layer, positions, head, side)
        return self.block(layer).project(normed, positions, head, side, tau)

    def constants(
        self,
        layer: int,
        positions: Int[Tensor, " n"],
        head: int | None,
        side: int,
        dtype: torch.dtype | None = None,
    ) -> Float[Tensor, "n *heads d_head"]:
        """The image of ``b_ln W + b``, a term of kind "bias", at positions.

        Args:
            layer, positions, head, side: as in :meth:`image`.
            dtype: what to compute in; the run's if left out.
        """
        tau = self._tau(layer, positions, head, side)
        dtype = dtype or self.run.residual.dtype
        return self.block(layer).constant(positions, head, side, tau, dtype)

    def has_constants(self, layer: int) -> bool:
        """Whether the block's query or key map has a constant at all (Llama's has none)."""
        return self._constant_layers[layer]

    def whole(
        self, layer: int, side: int, dtype: torch.dtype | None = None
    ) -> Float[Tensor, "n_pos heads d_head"]:
        """q of all heads, or k of all key-value heads, of the whole residual stream."""
        constants = self.constants(layer, self.everywhere, None, side, dtype)
        x = self.run.residual[layer].to(constants.dtype)
        return self.image(layer, x, self.everywhere, None, side) + constants

    def denominators(
        self, layer: int, positions: Int[Tensor, " n"], head: int, side: int
    ) -> Denominators:
        """The run's own denominators at positions, of a query head or key-value head."""
        tau = self._tau(layer, positions, head, side)
        return Denominators(self.run.scale("ln1", layer)[positions], tau)

    def scores(self, layer: int) -> Float[Tensor, "n_heads n_pos n_pos"]:
        """Attention scores before soft-cap and mask, from whole vectors."""
        b = self.block(layer)
        q, k = self.whole(layer, QUERY), b.shared(self.whole(layer, KEY))
        return torch.einsum("qhe,khe->hqk", q, k) / b.attn_scale

    def value_path(self, layer: int, positions: Tensor | slice | None) -> LinearMap:
        """(..., d_model) -> (..., n_kv, d_head): what values are made of streams, biases aside.

        Args:
            layer: the block.
            positions: where the streams stand; None leaves out the division by ln1's denominator.
        """
        b, scale = self.block(layer), self.run.scale("ln1", layer)
        scale = scale.new_ones(1) if positions is None else scale[positions]
        return Split(b.n_kv) @ self._flat(layer)[0] @ b.ln1.at(scale)

    def output_path(self, layer: int, positions: Tensor | slice) -> LinearMap:
        """(..., n_heads, d_head) -> (..., d_model): what heads' outputs add to the stream.

        Args:
            layer: the block.
            positions: where it is added.
        """
        b, scale = self.block(layer), self.run.scale("ln1_post", layer)[positions]
        return b.post.at(scale) @ self._flat(layer)[1] @ Split(b.n_heads).T

    def _tau(
        self, layer: int, positions: Tensor, head: int | None, side: int
    ) -> Float[Tensor, "n ..."] | None:
        if self.blocks[layer].gain(side) is None:
            return None
        tau = self._taus(layer)[side][positions]
        return tau if head is None else tau[:, head]


def logit_directions(
    model: HookedTransformer, run: FrozenRun, columns: Float[Tensor, "n d_model"]
) -> Float[Tensor, "n d_model"]:
    """Demeaned unembedding columns mapped back through the frozen final norm.

    Args:
        model: the model.
        run: its frozen run.
        columns: demeaned columns, as circuit-tracer's ``AttributionTargets`` gives.

    Returns:
        The gradient of (logit - mean logit) at checkpoint n_layers, last position; the final logit
        soft-cap is ignored (attribution/README.md, section 3).
    """
    norm = cast(Norm.read(getattr(model, "ln_final", None)), run.residual.dtype)
    return norm.at(run.final_scale[-1].expand(len(columns))).vjp(columns.to(run.residual))
