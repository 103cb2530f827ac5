"""The attention layer of one block: its facts, and the queries and keys that it makes.

    q(u) = Rot_p[(n(u) W_Q[h]) w_qn / tau_q]
    k(u) = Rot_p[(n(u) W_K[g]) w_kn / tau_k]

with n(u) the frozen ln1 (attribution/README.md, section 2). Keys are grouped: head ``h`` reads
key-value head ``g = h // (n_heads // n_kv)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuit_tracer_qk.model.linear import Shared
from circuit_tracer_qk.model.norm import Norm, rms

QUERY, KEY = 0, 1  # the sides of a QK circuit


class Denominators(NamedTuple):
    """What a block's queries or keys are divided by.

    Attributes:
        scale: (n,) of ln1.
        tau: (n,) of one head's QK-norm; None without QK-norm.
    """

    scale: Float[Tensor, " n"]
    tau: Float[Tensor, " n"] | None


@dataclass(frozen=True, eq=False)
class AttentionBlock:
    """The attention layer of one block.

    Attributes:
        W_Q, W_O: (n_heads, d_model, d_head), (n_heads, d_head, d_model).
        W_K, W_V: (n_kv, d_model, d_head).
        b_Q: (n_heads, d_head); b_K, b_V: (n_kv, d_head); b_O: (d_model,).
        q_gain, k_gain: (d_head,) gains of the QK-norm; None without QK-norm.
        qk_eps: the QK-norm's epsilon.
        cos, sin: (n_ctx, rotary_dim) tables of *this block's* rotary; None without rotary.
        adjacent_pairs: rotary turns pairs (0, 1), (2, 3), ... rather than (i, i + rotary_dim / 2).
        attn_scale: what scores are divided by.
        softcap: C of ``C tanh(s / C)``; 0 for none.
        window: a query sees its last ``window`` keys, itself included; None for all.
        ln1, post: norm before, and frozen norm after attention (Gemma).
        parallel: attention and MLP both read the block's checkpoint.
    """

    W_Q: Float[Tensor, "n_heads d_model d_head"]
    W_K: Float[Tensor, "n_kv d_model d_head"]
    W_V: Float[Tensor, "n_kv d_model d_head"]
    W_O: Float[Tensor, "n_heads d_head d_model"]
    b_Q: Float[Tensor, "n_heads d_head"]
    b_K: Float[Tensor, "n_kv d_head"]
    b_V: Float[Tensor, "n_kv d_head"]
    b_O: Float[Tensor, " d_model"]
    q_gain: Float[Tensor, " d_head"] | None
    k_gain: Float[Tensor, " d_head"] | None
    qk_eps: float
    cos: Float[Tensor, "n_ctx rotary_dim"] | None
    sin: Float[Tensor, "n_ctx rotary_dim"] | None
    adjacent_pairs: bool
    attn_scale: float
    softcap: float
    window: int | None
    ln1: Norm
    post: Norm
    parallel: bool

    @classmethod
    def read(cls, block: Any, n_pos: int | None = None) -> AttentionBlock:
        """The facts of a TransformerLens block; rotary tables cut to ``n_pos`` positions."""
        attn, cfg = block.attn, block.attn.cfg
        grouped = hasattr(attn, "_W_K") and not cfg.ungroup_grouped_query_attention
        kv = (attn._W_K, attn._W_V, attn._b_K, attn._b_V) if grouped else None
        W_K, W_V, b_K, b_V = kv or (attn.W_K, attn.W_V, attn.b_K, attn.b_V)
        q_norm, k_norm = getattr(attn, "q_norm", None), getattr(attn, "k_norm", None)
        rotary = cfg.positional_embedding_type == "rotary"
        return cls(
            W_Q=attn.W_Q.data,
            W_K=W_K.data,
            W_V=W_V.data,
            W_O=attn.W_O.data,
            b_Q=attn.b_Q.data,
            b_K=b_K.data,
            b_V=b_V.data,
            b_O=attn.b_O.data,
            q_gain=None if q_norm is None else q_norm.w.data,
            k_gain=None if k_norm is None else k_norm.w.data,
            qk_eps=float(cfg.eps),
            cos=attn.rotary_cos[:n_pos] if rotary else None,
            sin=attn.rotary_sin[:n_pos] if rotary else None,
            adjacent_pairs=bool(getattr(cfg, "rotary_adjacent_pairs", False)),
            attn_scale=float(attn.attn_scale),
            softcap=float(max(cfg.attn_scores_soft_cap, 0.0)),
            window=int(cfg.window_size) if attn.attn_type == "local" else None,
            ln1=Norm.read(block.ln1),
            post=Norm.read(getattr(block, "ln1_post", None)),
            parallel=bool(cfg.parallel_attn_mlp),
        )

    @property
    def n_heads(self) -> int:
        return self.W_Q.shape[0]

    @property
    def n_kv(self) -> int:
        return self.W_K.shape[0]

    def group(self, head: int) -> int:
        """The key-value head that ``head`` reads."""
        return head // (self.n_heads // self.n_kv)

    @property
    def shared(self) -> Shared:
        """From what key-value heads hold to what each query head reads."""
        return Shared(self.n_heads // self.n_kv)

    def rotate(
        self, x: Float[Tensor, "n *heads d_head"], positions: Int[Tensor, " n"]
    ) -> Float[Tensor, "n *heads d_head"]:
        """Rotary embedding of projected vectors at their positions."""
        if self.cos is None or self.sin is None:
            return x
        width = self.cos.shape[1]
        shape = (len(positions), *[1] * (x.ndim - 2), width)
        turned, rest = x[..., :width], x[..., width:]
        if self.adjacent_pairs:
            flipped = torch.stack([-turned[..., 1::2], turned[..., ::2]], -1).flatten(-2)
        else:
            first, second = turned.chunk(2, -1)
            flipped = torch.cat([-second, first], -1)
        cos, sin = (t[positions].view(shape).to(x.dtype) for t in (self.cos, self.sin))
        return torch.cat([turned * cos + flipped * sin, rest], -1)

    def project(
        self,
        normed: Float[Tensor, "n d_model"],
        positions: Int[Tensor, " n"],
        head: int | None,
        side: int,
        tau: Float[Tensor, "n ..."] | None,
    ) -> Float[Tensor, "n *heads d_head"]:
        """q(u) or k(u) of vectors that went through ln1: the one place where they are made.

        Args:
            normed: vectors after ln1, without its bias.
            positions: where they stand.
            head: the query head (``side`` QUERY) or the key-value head (KEY); None for all.
            side: QUERY or KEY.
            tau: what the QK-norm divides by; None without QK-norm.
        """
        W = self._weight(side)
        if head is None:
            image = torch.einsum("nd,hde->nhe", normed, W.to(normed.dtype))
        else:
            image = normed @ W[head].to(normed.dtype)
        return self._after_projection(image, positions, side, tau)

    def constant(
        self,
        positions: Int[Tensor, " n"],
        head: int | None,
        side: int,
        tau: Float[Tensor, "n ..."] | None,
        dtype: torch.dtype,
    ) -> Float[Tensor, "n *heads d_head"]:
        """The image of ``b_ln W + b``: what the map of a zero stream is, kind "bias"."""
        constant = self._constant(head, side, dtype)
        constant = constant.expand(len(positions), *constant.shape)
        return self._after_projection(constant, positions, side, tau)

    def live(
        self, x: Float[Tensor, "n d_model"], positions: Int[Tensor, " n"], head: int, side: int
    ) -> Float[Tensor, "n d_head"]:
        """One head's queries or keys of whole streams, every norm recomputed."""
        scale, tau = self.denominators(x, head, side)
        image = self.project(self.ln1.at(scale)(x), positions, head, side, tau)
        return image + self.constant(positions, head, side, tau, x.dtype)

    def denominators(self, x: Float[Tensor, "n d_model"], head: int, side: int) -> Denominators:
        """Of ln1 and of the QK-norm on streams ``x``, as the model computes them.

        Args:
            head: the query head (``side`` QUERY) or key-value head (KEY).
        """
        scale = self.ln1.denominator(x)
        if self.gain(side) is None:
            return Denominators(scale, None)
        whole = self.ln1.at(scale)(x) @ self._weight(side)[head].to(x.dtype)
        return Denominators(scale, rms(whole + self._constant(head, side, x.dtype), self.qk_eps))

    def gain(self, side: int) -> Float[Tensor, " d_head"] | None:
        """The QK-norm's gain; None without QK-norm."""
        return (self.q_gain, self.k_gain)[side]

    def has_constant(self) -> bool:
        """Whether the query or key map has a constant at all (Llama's has none)."""
        biases = self.ln1.b, self.b_Q, self.b_K
        return any(b is not None and bool(b.any()) for b in biases)

    def value_bias(self) -> Float[Tensor, "n_kv d_head"]:
        """What the value path adds whatever the residual stream holds: b_ln1 W_V + b_V."""
        if self.ln1.b is None:
            return self.b_V
        return self.b_V + torch.einsum("d,gde->ge", self.ln1.b, self.W_V)

    def _after_projection(
        self, image: Tensor, positions: Tensor, side: int, tau: Tensor | None
    ) -> Tensor:
        """QK-norm with given denominators, then rotary."""
        gain = self.gain(side)
        if gain is not None and tau is not None:
            image = image * gain.to(image.dtype) / tau.to(image.dtype)[..., None]
        return self.rotate(image, positions)

    def _weight(self, side: int) -> Tensor:
        return (self.W_Q, self.W_K)[side]

    def _constant(self, head: int | None, side: int, dtype: torch.dtype) -> Tensor:
        """(d_head,), or (n_heads, d_head) for all: what the projection of a zero stream is."""
        at = slice(None) if head is None else head
        bias = (self.b_Q, self.b_K)[side][at].to(dtype)
        if self.ln1.b is None:
            return bias
        W = self._weight(side)[at].to(dtype)
        return bias + torch.einsum("d,...de->...e", self.ln1.b.to(dtype), W)

    def cap(self, scores: Tensor) -> Tensor:
        """The scores after the soft-cap."""
        return self.softcap * torch.tanh(scores / self.softcap) if self.softcap else scores

    def first_key(self, query: int) -> int:
        """The earliest key that ``query`` can see."""
        return 0 if self.window is None else max(0, query - self.window + 1)

    def visible(self, n_pos: int, device: torch.device) -> Bool[Tensor, "n_pos n_pos"]:
        """True where row's query sees column's key."""
        p = torch.arange(n_pos, device=device)
        causal = p[:, None] >= p[None]
        return causal if self.window is None else causal & (p[None] > p[:, None] - self.window)
