"""What each architecture does between two checkpoints: every such fact is in this module.

A block is read from TransformerLens once into plain tensors (:class:`AttentionBlock`,
:class:`MLPBlock`) and from then on is a handful of linear maps with frozen denominators:

    n(u)    = linearised ln1                                            :meth:`Norm.linear`
    q(u)    = Rot_p[(n(u) W_Q[h]) w_qn / tau_q]                         :meth:`Heads.queries`
    k(u)    = Rot_p[(n(u) W_K[g]) w_kn / tau_k]                         :meth:`Heads.keys`
    v(u)    = n(u) W_V[g]                                               :meth:`Heads.values`
    z(g)    = post1^T(g) W_O[h]^T                                       :meth:`Heads.pull_output`
    M^T y   = pull-back through post2 . MLP . ln2                  :meth:`MLPBlock.read_back`, ...

(method, sections 2 and 3; paper, "QK attributions" and "Head loadings"). Keys are grouped: head
``h`` reads key-value head ``g = h // (n_heads // n_kv)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.model.run import FrozenRun, contraction_dtype, freeze

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

# Elementwise activations; anything else (SoLU is a softmax) would need its own Jacobian.
ELEMENTWISE = {
    *("relu", "gelu", "silu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "quick_gelu", "sigmoid")
}
IN_USE = 3  # blocks at a time across which edges are made, and cast once for all that is done there


@dataclass(frozen=True, eq=False)
class Norm:
    """A norm with a frozen denominator, as a linear map.

    Attributes:
        w: (d,) gain; None where it is one (folded).
        b: (d,) bias; None where there is none.
        centred: LayerNorm subtracts the mean, RMSNorm does not.
        present: False stands for a model without this norm: the identity.
        eps: what its denominator adds to the mean square.
    """

    w: Tensor | None = None
    b: Tensor | None = None
    centred: bool = False
    present: bool = False
    eps: float = 0.0

    @classmethod
    def read(cls, module: torch.nn.Module | None) -> Norm:
        """The norm of a TransformerLens module, by what the module is."""
        if module is None or isinstance(module, torch.nn.Identity):
            return cls()
        name = type(module).__name__
        if name not in {"LayerNorm", "LayerNormPre", "RMSNorm", "RMSNormPre"}:
            raise UserError(
                f"This model has a norm of kind {name}, which is not supported exactly: use a "
                "model with LayerNorm or RMSNorm."
            )
        return cls(
            _data(getattr(module, "w", None)),
            _data(getattr(module, "b", None)),
            centred=name.startswith("Layer"),
            present=True,
            eps=float(module.eps),  # type: ignore[arg-type]
        )

    def linear(self, u: Tensor, scale: Tensor) -> Tensor:
        """(..., d) image of ``u`` without the bias; ``scale`` (...,) is the denominator."""
        if not self.present:
            return u
        u = (u - u.mean(-1, keepdim=True) if self.centred else u) / scale[..., None]
        return u if self.w is None else u * self.w

    def denominator(self, x: Tensor) -> Tensor:
        """(...,) what the norm divides (..., d) streams ``x`` by when it is not frozen."""
        if not self.present:
            return x.new_ones(x.shape[:-1])
        return _rms(x - x.mean(-1, keepdim=True) if self.centred else x, self.eps)

    def pull(self, g: Tensor, scale: Tensor) -> Tensor:
        """The transpose of :meth:`linear`: <g, linear(u)> = <pull(g), u>."""
        if not self.present:
            return g
        g = (g if self.w is None else g * self.w) / scale[..., None]
        return g - g.mean(-1, keepdim=True) if self.centred else g

    def apply(self, x: Tensor, scale: Tensor) -> Tensor:
        """The norm itself, bias included."""
        y = self.linear(x, scale)
        return y if self.b is None else y + self.b


def _cast(block: Any, dtype: torch.dtype) -> Any:
    """The same frozen dataclass with every floating tensor in ``dtype`` (no copy if it is)."""
    changed = {}
    for f in fields(block):
        value = getattr(block, f.name)
        if isinstance(value, Norm):
            changed[f.name] = _cast(value, dtype)
        elif isinstance(value, Tensor) and value.is_floating_point():
            changed[f.name] = value.to(dtype)
    return replace(block, **changed)


class Denominators(NamedTuple):
    """What a block's queries or keys are divided by.

    Attributes:
        scale: (n,) of ln1.
        tau: (n,) of one head's QK-norm; None without QK-norm.
    """

    scale: Tensor
    tau: Tensor | None


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

    W_Q: Tensor
    W_K: Tensor
    W_V: Tensor
    W_O: Tensor
    b_Q: Tensor
    b_K: Tensor
    b_V: Tensor
    b_O: Tensor
    q_gain: Tensor | None
    k_gain: Tensor | None
    qk_eps: float
    cos: Tensor | None
    sin: Tensor | None
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

    def expand(self, grouped: Tensor) -> Tensor:
        """(..., n_kv, d_head) -> (..., n_heads, d_head), a head reading its group's."""
        return grouped.repeat_interleave(self.n_heads // self.n_kv, dim=-2)

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotary embedding of projected vectors: x (n, ..., d_head), positions (n,)."""
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

    def denominators(self, x: Tensor, head: int, side: int) -> Denominators:
        """Of ln1 and of the QK-norm on streams ``x`` (n, d_model), as the model computes them.

        Args:
            head: the query head (``side`` 0) or key-value head (``side`` 1).
        """
        scale = self.ln1.denominator(x)
        if (self.q_gain, self.k_gain)[side] is None:
            return Denominators(scale, None)
        n = self.ln1.linear(x, scale)
        whole = n @ self._weight(side)[head].to(x.dtype) + self._constant(head, side, x.dtype)
        return Denominators(scale, _rms(whole, self.qk_eps))

    def image(self, u: Tensor, positions: Tensor, head: int, side: int, by: Denominators) -> Tensor:
        """(n, d_head): q(u) (``side`` 0) or k(u) (``side`` 1) of one head, denominators given."""
        projected = self.ln1.linear(u, by.scale) @ self._weight(side)[head].to(u.dtype)
        return self._turned(projected, positions, side, by)

    def live(self, x: Tensor, positions: Tensor, head: int, side: int) -> Tensor:
        """(n, d_head): one head's queries or keys of whole streams, every norm recomputed."""
        by = self.denominators(x, head, side)
        constant = self._constant(head, side, x.dtype).expand(len(x), -1)
        turned = self._turned(constant, positions, side, by)
        return self.image(x, positions, head, side, by) + turned

    def _turned(self, x: Tensor, positions: Tensor, side: int, by: Denominators) -> Tensor:
        gain = (self.q_gain, self.k_gain)[side]
        if gain is not None and by.tau is not None:
            x = x * gain.to(x.dtype) / by.tau[..., None]
        return self.rotate(x, positions)

    def _weight(self, side: int) -> Tensor:
        return (self.W_Q, self.W_K)[side]

    def _constant(self, head: int, side: int, dtype: torch.dtype) -> Tensor:
        """(d_head,) what the projection of a zero stream is: b_ln W + b."""
        bias = (self.b_Q, self.b_K)[side][head].to(dtype)
        if self.ln1.b is None:
            return bias
        return bias + self.ln1.b.to(dtype) @ self._weight(side)[head].to(dtype)

    def cap(self, scores: Tensor) -> Tensor:
        """The scores after the soft-cap."""
        return self.softcap * torch.tanh(scores / self.softcap) if self.softcap else scores

    def first_key(self, query: int) -> int:
        """The earliest key that ``query`` can see."""
        return 0 if self.window is None else max(0, query - self.window + 1)

    def visible(self, n_pos: int, device: torch.device) -> Tensor:
        """(n_pos, n_pos) True where row's query sees column's key."""
        p = torch.arange(n_pos, device=device)
        causal = p[:, None] >= p[None]
        return causal if self.window is None else causal & (p[None] > p[:, None] - self.window)


@dataclass(frozen=True, eq=False)
class MLPBlock:
    """The MLP of one block between its two frozen norms.

    Plain: ``act(n W_in + b_in) W_out + b_out`` with ``n = ln2(x)``.
    Gated: ``(act(n W_gate + b_gate) * (n W_in + b_up) + b_in) W_out + b_out``; TransformerLens
    adds a gated MLP's ``b_in`` after the product, and only Llama's ``mlp_bias`` has the other two.
    """

    W_in: Tensor
    W_out: Tensor
    W_gate: Tensor | None
    b_in: Tensor
    b_out: Tensor
    b_gate: Tensor | None
    b_up: Tensor | None
    act: Callable[[Tensor], Tensor]
    ln2: Norm
    post: Norm

    @classmethod
    def read(cls, block: Any) -> MLPBlock | None:
        """The facts of a TransformerLens block; None where it has no MLP."""
        if block.attn.cfg.attn_only:
            return None
        mlp = block.mlp
        if type(mlp).__name__ not in {"MLP", "GatedMLP", "BiasedGatedMLP"}:
            raise UserError(
                f"This model's MLP is of kind {type(mlp).__name__} (mixture of experts or "
                "quantised), whose local Jacobian is not supported exactly: use a dense model."
            )
        return cls(
            W_in=mlp.W_in.data,
            W_out=mlp.W_out.data,
            W_gate=_data(getattr(mlp, "W_gate", None)),
            b_in=mlp.b_in.data,
            b_out=mlp.b_out.data,
            b_gate=_data(getattr(mlp, "b_gate", None)),
            b_up=_data(getattr(mlp, "b_up", None)),
            act=mlp.act_fn,
            ln2=Norm.read(block.ln2),
            post=Norm.read(getattr(block, "ln2_post", None)),
        )

    def output(self, x: Tensor, scale: Tensor, post_scale: Tensor) -> Tensor:
        """(n_pos, d_model): what the MLP adds to the residual stream at input ``x``."""
        n = self.ln2.apply(x, scale)
        if self.W_gate is None:
            hidden = self.act(n @ self.W_in + self.b_in)
        else:
            gate, linear = self._gated(n)
            hidden = self.act(gate) * linear + self.b_in
        return self.post.apply(hidden @ self.W_out + self.b_out, post_scale)

    def _gated(self, n: Tensor) -> tuple[Tensor, Tensor]:
        """The gate before its activation, and what it multiplies."""
        assert self.W_gate is not None
        gate, linear = n @ self.W_gate, n @ self.W_in
        return (
            gate if self.b_gate is None else gate + self.b_gate,
            linear if self.b_up is None else linear + self.b_up,
        )

    def _slope(self, pre: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():  # whatever the caller's mode
            pre = pre.detach().clone().requires_grad_()
            return torch.autograd.grad(self.act(pre).sum(), pre)[0]

    def read_back(self, y: Tensor, post_scale: Tensor) -> Tensor:
        """(n, d_mlp): gradients (n, d_model) at the block's output, at the MLP's hidden layer.

        ``post_scale`` (n,) is the post-norm's denominator of each row; the result is linear in
        ``y / post_scale``, so rows along one decoder vector share it up to a factor.
        """
        return self.post.pull(y, post_scale) @ self.W_out.T

    def slopes(self, x: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        """Derivatives of the hidden layer by what each of :meth:`readers` gives it.

        Args:
            x: (n_pos, d_model) the MLP's input.
            scale: (n_pos,) frozen denominators of ln2.

        Returns:
            (n_pos, d_mlp) each. The derivative is the MLP's true local one; the norms'
            denominators are constants (method, section 3).
        """
        n = self.ln2.apply(x, scale)
        if self.W_gate is None:
            return (self._slope(n @ self.W_in + self.b_in),)
        gate, linear = self._gated(n)
        return linear * self._slope(gate), self.act(gate)

    @property
    def readers(self) -> tuple[Tensor, ...]:
        """(d_model, d_mlp) each: what reads the normed stream, in the order of the slopes."""
        return (self.W_in,) if self.W_gate is None else (self.W_gate, self.W_in)


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
        dtype = run.residual.dtype

        @lru_cache(maxsize=IN_USE)
        def block(layer: int) -> AttentionBlock:
            return _cast(blocks[layer], dtype)

        @cache
        def taus(layer: int) -> tuple[Tensor, Tensor]:
            b = block(layer)
            n = b.ln1.apply(run.residual[layer], run.scale("ln1", layer))
            q = torch.einsum("pd,hde->phe", n, b.W_Q) + b.b_Q
            k = torch.einsum("pd,gde->pge", n, b.W_K) + b.b_K
            return _rms(q, b.qk_eps), _rms(k, b.qk_eps)

        @lru_cache(maxsize=IN_USE)
        def flat(layer: int) -> tuple[Tensor, Tensor]:
            """(d_model, n_kv * d_head) of all values, (n_heads * d_head, d_model) of all outputs."""
            b = block(layer)
            return b.W_V.transpose(0, 1).flatten(1), b.W_O.flatten(0, 1)

        self.block = block
        self._flat = flat
        self._taus = taus
        self._constant_layers = [
            any(t is not None and bool(t.any()) for t in (b.ln1.b, b.b_Q, b.b_K)) for b in blocks
        ]

    def queries(self, layer: int, u: Tensor, positions: Tensor, head: int | None = None) -> Tensor:
        """q(u): images of component vectors on the query side.

        Args:
            layer: the block l; components are those of checkpoint l.
            u: (n, d_model) vectors.
            positions: (n,) their positions.
            head: one head, or None for all.

        Returns:
            (n, d_head), or (n, n_heads, d_head) for all heads.
        """
        return self.projected(layer, self.normed(layer, u, positions), positions, head, 0)

    def keys(self, layer: int, u: Tensor, positions: Tensor, group: int | None = None) -> Tensor:
        """k(u): images of component vectors on the key side, by key-value head.

        Returns:
            (n, d_head), or (n, n_kv, d_head) for all key-value heads.
        """
        return self.projected(layer, self.normed(layer, u, positions), positions, group, 1)

    def normed(self, layer: int, u: Tensor, positions: Tensor) -> Tensor:
        """(n, d_model): component vectors as every head of a block reads them, after ln1."""
        scale = self.run.scale("ln1", layer)[positions].to(u.dtype)
        return self.block(layer).ln1.linear(u, scale)

    def projected(
        self, layer: int, normed: Tensor, positions: Tensor, head: int | None, side: int
    ) -> Tensor:
        """What heads make of vectors that :meth:`normed` gave, which they share.

        Args:
            head: the query head (side 0) or the key-value head (side 1); None for all.

        Returns:
            As :meth:`queries` and :meth:`keys`.
        """
        b = self.block(layer)
        image = _project(normed, (b.W_Q, b.W_K)[side], head)
        return self._finish(layer, image, positions, head, side)

    def constants(
        self, layer: int, positions: Tensor, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """The images of (b_ln W + b_Q) and (b_ln W + b_K): terms of kind "bias".

        Args:
            layer: the block.
            positions: (n,) where rotary turns them.
            dtype: what to compute in; the run's if left out.

        Returns:
            (n, n_heads, d_head) and (n, n_kv, d_head).
        """
        b = self.block(layer)
        images = []
        for side, (W, bias) in enumerate(((b.W_Q, b.b_Q), (b.W_K, b.b_K))):
            constant = bias.to(dtype or bias.dtype)
            if b.ln1.b is not None:
                b_ln = b.ln1.b.to(constant.dtype)
                constant = constant + torch.einsum("d,hde->he", b_ln, W.to(constant.dtype))
            constant = constant.expand(len(positions), *constant.shape)
            images.append(self._finish(layer, constant, positions, None, side))
        return images[0], images[1]

    def has_constants(self, layer: int) -> bool:
        """Whether the block's query or key map has a constant at all (Llama's has none)."""
        return self._constant_layers[layer]

    def _finish(
        self, layer: int, x: Tensor, positions: Tensor, head: int | None, side: int
    ) -> Tensor:
        """QK-norm with frozen denominators, then rotary: what follows the projection."""
        b = self.block(layer)
        gain = (b.q_gain, b.k_gain)[side]
        if gain is not None:
            tau = self._taus(layer)[side][positions].to(x.dtype)
            x = x * gain / (tau if head is None else tau[:, head])[..., None]
        return b.rotate(x, positions)

    def whole(self, layer: int, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """q and k of the whole residual stream, (n_pos, n_heads, d_head) and (n_pos, n_kv, ...)."""
        everywhere = torch.arange(self.run.n_pos, device=self.run.residual.device)
        q_const, k_const = self.constants(layer, everywhere, dtype)
        x = self.run.residual[layer].to(q_const.dtype)
        return (
            self.queries(layer, x, everywhere) + q_const,
            self.keys(layer, x, everywhere) + k_const,
        )

    def frozen(self, layer: int, positions: Tensor, head: int, side: int) -> Denominators:
        """The run's own denominators at positions, of a query head (0) or key-value head (1)."""
        tau = None
        if (self.blocks[layer].q_gain, self.blocks[layer].k_gain)[side] is not None:
            tau = self._taus(layer)[side][positions, head]
        return Denominators(self.run.scale("ln1", layer)[positions], tau)

    def scores(self, layer: int) -> Tensor:
        """(n_heads, n_pos, n_pos) attention scores before soft-cap and mask, from whole vectors."""
        b = self.block(layer)
        q, k = self.whole(layer)
        return torch.einsum("qhe,khe->hqk", q, b.expand(k)) / b.attn_scale

    def values(self, layer: int, u: Tensor, positions: Tensor | None) -> Tensor:
        """v(u): (n, n_kv, d_head), the value path's reading of component vectors.

        Without positions, before the division by ln1's denominator there.
        """
        b = self.block(layer)
        scale = u.new_ones(1) if positions is None else self.run.scale("ln1", layer)[positions]
        n = b.ln1.linear(u, scale)
        return (n @ self._flat(layer)[0]).unflatten(1, (b.n_kv, -1))

    def value_bias(self, layer: int) -> Tensor:
        """(n_kv, d_head): what the value path adds whatever the residual stream holds."""
        return _value_bias(self.block(layer))

    def pull_output(self, layer: int, g: Tensor, positions: Tensor) -> Tensor:
        """(n, n_heads, d_head): gradients at the attention write, pulled to each head's output.

        <g, post1(sum_h z_h W_O[h])> = sum_h <pull_output(g)[h], z_h>
        """
        b = self.block(layer)
        g = b.post.pull(g, self.run.scale("ln1_post", layer)[positions])
        return (g @ self._flat(layer)[1].T).unflatten(1, (b.n_heads, -1))


def _data(parameter: Tensor | None) -> Tensor | None:
    """A weight without its gradient, which nothing here is differentiated by."""
    return None if parameter is None else parameter.data


def _rms(x: Tensor, eps: float) -> Tensor:
    return (x.pow(2).mean(-1) + eps).sqrt()


def _project(n: Tensor, W: Tensor, head: int | None) -> Tensor:
    if head is not None:
        return n @ W[head].to(n.dtype)
    return torch.einsum("nd,hde->nhe", n, W.to(n.dtype))


def read_blocks(model: HookedTransformer, n_pos: int | None = None) -> list[AttentionBlock]:
    """Every block's attention, refusing what cannot be done exactly.

    Raises:
        UserError: the architecture's name and the reason.
    """
    refuse_unsupported(model)
    return [AttentionBlock.read(block, n_pos) for block in model.blocks]


def refuse_unsupported(model: HookedTransformer) -> None:
    """Refuse, by name, architectures whose scores or Jacobians this module does not reproduce.

    Raises:
        UserError: the reason and the way out.
    """
    cfg: Any = model.cfg
    refuse_attention(model)
    _refuse(
        cfg,
        {
            "a mixture of experts": bool(getattr(cfg, "num_experts", None)),
            f"the activation {cfg.act_fn}, which is not elementwise": (
                not cfg.attn_only and cfg.act_fn not in ELEMENTWISE
            ),
        },
    )


def refuse_attention(model: HookedTransformer) -> None:
    """Refuse, by name, attention whose scores this module does not reproduce.

    Raises:
        UserError: the reason and the way out.
    """
    cfg: Any = model.cfg
    attn: Any = model.blocks[0].attn
    reasons = {
        f"{cfg.positional_embedding_type} position bias in its scores": (
            cfg.positional_embedding_type not in {"standard", "rotary"}
        ),
        "bidirectional attention": cfg.attention_dir != "causal",
        "attention sinks": hasattr(attn, "sinks"),
        "a QK-norm over whole query vectors": (
            getattr(attn, "q_norm", None) is not None and not getattr(cfg, "use_qk_norm", False)
        ),
        "4-bit weights": bool(getattr(cfg, "load_in_4bit", False)),
    }
    _refuse(cfg, reasons)


def _refuse(cfg: Any, reasons: dict[str, bool]) -> None:
    for reason, holds in reasons.items():
        if holds:
            raise UserError(
                f"{cfg.model_name} ({cfg.original_architecture}) has {reason}, which cannot be "
                "attributed exactly: use a GPT-2, Pythia, Llama, Mistral, Qwen2, Qwen3, Gemma-2 or "
                "Gemma-3 model."
            )


@torch.no_grad()
def check_patterns(heads: Heads, name: str, exact: bool) -> None:
    """Rebuild a run's attention patterns from this module's maps and compare.

    Args:
        heads: the heads on the run.
        name: the model's.
        exact: its weights are in float32 or more.

    Raises:
        UserError: a pattern differs by more than 1e-3 (.3 where the model rounds).
    """
    run, limit = heads.run, 1e-3 if exact else 0.3
    for layer in range(run.n_layers):
        block = heads.block(layer)
        visible = block.visible(run.n_pos, run.residual.device)
        scores = block.cap(heads.scores(layer)).masked_fill(~visible, -torch.inf)
        off = float((scores.softmax(-1) - run.pattern[layer]).abs().max())
        if not off <= limit:
            raise UserError(
                f"{name} computes something this package does not reproduce: the pattern of layer "
                f"{layer} differs by {off:.1e} (limit {limit:.0e}); its scores cannot be taken "
                "apart."
            )


@torch.no_grad()
def check_exact(model: HookedTransformer) -> None:
    """Rebuild a short run's patterns and block outputs from this module's maps and compare.

    Catches at load time any architecture whose facts were read wrongly, rather than in a graph.

    Raises:
        UserError: a pattern or a block's output differs by more than 1e-3 of its scale (a model
            given in half precision, whose own rounding moves patterns: .3 and .05).
    """
    cfg = model.cfg
    exact = cfg.dtype in (torch.float32, torch.float64)
    tolerance = 1e-3 if exact else 0.05
    n = min(16, cfg.n_ctx)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(cfg.d_vocab, (n,), generator=generator).to(model.W_E.device)
    run = freeze(model, tokens)
    blocks = read_blocks(model, n)
    heads = Heads(blocks, run)
    everywhere = torch.arange(n, device=tokens.device)

    def compare(what: str, ours: Tensor, theirs: Tensor) -> None:
        difference = float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30))
        if not difference <= tolerance:
            raise UserError(
                f"{cfg.model_name} ({cfg.original_architecture}) computes something this package "
                f"does not reproduce: {what} differs by {difference:.1e} of its scale (limit "
                f"{tolerance:.0e}); the architecture is not supported."
            )

    check_patterns(heads, f"{cfg.model_name} ({cfg.original_architecture})", exact)
    embedding = run.embedding
    if run.position_embedding is not None:
        embedding = embedding + run.position_embedding
    compare("the embedding at checkpoint 0", embedding, run.residual[0])
    for layer, source in enumerate(model.blocks):
        b = heads.block(layer)
        v = b.expand(heads.values(layer, run.residual[layer], everywhere) + _value_bias(b))
        z = torch.einsum("hqk,khe->qhe", run.pattern[layer], v)
        write = torch.einsum("qhe,hed->qd", z, b.W_O) + b.b_O
        out = run.residual[layer] + b.post.apply(write, run.scale("ln1_post", layer))
        mlp = read_mlp(source, run.residual.dtype)
        if mlp is not None:
            out = out + mlp.output(
                run.mlp_input[layer], run.scale("ln2", layer), run.scale("ln2_post", layer)
            )
        compare(f"the output of block {layer}", out, run.residual[layer + 1])


def _value_bias(b: AttentionBlock) -> Tensor:
    """(n_kv, d_head): what the value path adds whatever the residual stream holds."""
    return b.b_V if b.ln1.b is None else b.b_V + torch.einsum("d,gde->ge", b.ln1.b, b.W_V)


def read_mlp(block: Any, dtype: torch.dtype) -> MLPBlock | None:
    """A block's MLP in the contraction dtype; None where there is none."""
    mlp = MLPBlock.read(block)
    return None if mlp is None else _cast(mlp, dtype)


def logit_directions(model: HookedTransformer, run: FrozenRun, columns: Tensor) -> Tensor:
    """(n, d_model): demeaned unembedding columns mapped back through the frozen final norm.

    Args:
        columns: (n, d_model) demeaned columns, as circuit-tracer's ``AttributionTargets`` gives.

    The result is the gradient of (logit - mean logit) at checkpoint n_layers, last position; the
    final logit soft-cap is ignored (method, section 3).
    """
    norm = _cast(Norm.read(getattr(model, "ln_final", None)), run.residual.dtype)
    return norm.pull(columns.to(run.residual), run.final_scale[-1].expand(len(columns)))


__all__ = [
    "AttentionBlock",
    "Heads",
    "MLPBlock",
    "Norm",
    "check_exact",
    "check_patterns",
    "contraction_dtype",
    "logit_directions",
    "read_blocks",
    "read_mlp",
    "refuse_attention",
    "refuse_unsupported",
]
