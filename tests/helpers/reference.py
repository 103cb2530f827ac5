"""An independent forward pass: Hugging Face weights, plain tensors, float64.

The package computes with TransformerLens and closed forms. This file shares no code with it: it
reads a Hugging Face state dict and configuration, runs the model explicitly, and leaves every
derivative to autograd. `test_reference.py` holds it against Hugging Face's own eager attention.

In shapes: P positions, d residual width, H query heads, G key-value heads, e head width, V tokens.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


@dataclass
class Norm:
    """LayerNorm ("layer"), RMSNorm ("rms") or nothing ("none"), with its denominator kept apart."""

    kind: str
    gain: Tensor
    bias: Tensor
    eps: float

    def denominator(self, x: Tensor) -> Tensor:
        """What the norm divides by at x (..., d): a tensor (...)."""
        if self.kind == "none":
            return torch.ones_like(x[..., 0])
        return (self._centred(x).pow(2).mean(-1) + self.eps).sqrt()

    def linear(self, x: Tensor, denominator: Tensor) -> Tensor:
        """The norm of x (..., d) at a given denominator (...), without its bias: linear in x."""
        return self._centred(x) / denominator[..., None] * self.gain

    def __call__(self, x: Tensor, denominator: Tensor) -> Tensor:
        """The norm of x (..., d) at a given denominator (...)."""
        return self.linear(x, denominator) + self.bias

    def _centred(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if self.kind == "layer" else x


@dataclass
class Block:
    """One block's weights. Every matrix is (in, out); a bias that the model lacks is zero."""

    ln1: Norm
    ln2: Norm
    post1: Norm  # after attention, before its write (Gemma)
    post2: Norm  # after the MLP, before its write (Gemma)
    q_norm: Norm  # QK-norm (Qwen3, Gemma-3)
    k_norm: Norm
    W_Q: Tensor  # (H, d, e)
    b_Q: Tensor  # (H, e)
    W_K: Tensor  # (G, d, e)
    b_K: Tensor  # (G, e)
    W_V: Tensor  # (G, d, e)
    b_V: Tensor  # (G, e)
    W_O: Tensor  # (H, e, d)
    b_O: Tensor  # (d,)
    gate: tuple[Tensor, Tensor] | None  # weight (d, m), bias (m,)
    up: tuple[Tensor, Tensor]
    down: tuple[Tensor, Tensor]
    activation: Callable[[Tensor], Tensor]
    inv_freq: Tensor  # (r / 2,): the first r of the e dimensions rotate; r = 0 without rotary
    window: int | None  # keys k > q - window are visible

    def heads_write(self, n: Tensor, pattern: Tensor) -> Tensor:
        """The attention write before post1, (P, d); head h reads its own row of n (H, P, d)."""
        per_group = self.W_Q.shape[0] // self.W_V.shape[0]
        W_V, b_V = (t.repeat_interleave(per_group, 0) for t in (self.W_V, self.b_V))
        z = pattern @ (n @ W_V + b_V[:, None])  # (H, P, e)
        return (z @ self.W_O).sum(0) + self.b_O

    def mlp(self, n: Tensor) -> Tensor:
        """The MLP between its two norms: (P, d) -> (P, d)."""
        hidden = n @ self.up[0] + self.up[1]
        if self.gate is None:
            hidden = self.activation(hidden)
        else:
            hidden = self.activation(n @ self.gate[0] + self.gate[1]) * hidden
        return hidden @ self.down[0] + self.down[1]


@dataclass
class Run:
    """What one forward pass computed; lists are indexed by layer, `residual` by checkpoint."""

    residual: list[Tensor] = field(default_factory=list)  # n_layers + 1 of (P, d)
    resid_mid: list[Tensor] = field(default_factory=list)  # (P, d), what ln2 reads
    scores: list[Tensor] = field(default_factory=list)  # (H, P, P), before soft-cap and mask
    capped: list[Tensor] = field(default_factory=list)  # (H, P, P), after the soft-cap
    mask: list[Tensor] = field(default_factory=list)  # (P, P) bool, True where the key is visible
    pattern: list[Tensor] = field(default_factory=list)  # (H, P, P)
    ln1: list[Tensor] = field(default_factory=list)  # denominators, (P,); 1 where there is no norm
    ln2: list[Tensor] = field(default_factory=list)
    post1: list[Tensor] = field(default_factory=list)
    post2: list[Tensor] = field(default_factory=list)
    tau_q: list[Tensor] = field(default_factory=list)  # (P, H); 1 without QK-norm
    tau_k: list[Tensor] = field(default_factory=list)  # (P, G)
    final: Tensor = field(init=False)  # (P,)
    logits: Tensor = field(init=False)  # (P, V), after the final soft-cap


class PathGradients(NamedTuple):
    """A target's gradient with respect to a block's input, split by the path it takes."""

    residual: Tensor  # (P, d)
    mlp: Tensor  # (P, d), past attention and through the MLP
    heads: Tensor  # (H, P, d), through each head's values


class Reference:
    """A Hugging Face causal language model in plain tensors.

    Args:
        hf_model: GPT-2, GPT-NeoX, Llama, Mistral, Qwen2, Qwen3, Gemma-2 or Gemma-3 (text).
        dtype: what everything is computed in.
    """

    def __init__(self, hf_model: PreTrainedModel, dtype: torch.dtype = torch.float64) -> None:
        config = hf_model.config
        state = {k: v.detach().to(dtype, copy=True) for k, v in hf_model.state_dict().items()}
        self.n_layers: int = config.num_hidden_layers
        self.n_heads: int = config.num_attention_heads
        self.n_kv_heads: int = getattr(config, "num_key_value_heads", self.n_heads)
        self.d_head: int = _d_head(config)
        self.attn_scale: float = math.sqrt(getattr(config, "query_pre_attn_scalar", self.d_head))
        self.softcap: float | None = getattr(config, "attn_logit_softcapping", None)
        self.final_softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self.parallel: bool = getattr(config, "use_parallel_residual", False)
        load = _Loader(config, state)
        self.W_E, self.W_pos, self.W_U = load.embeddings()  # (V, d), (max P, d), (d, V)
        self.blocks = [load.block(layer) for layer in range(self.n_layers)]
        self.final_norm = load.final_norm()

    def run(self, ids: list[int]) -> Run:
        """The clean forward pass on a prompt of P token ids."""
        run, n_pos = Run(), len(ids)
        positions = torch.arange(n_pos)[:, None]
        distance = positions - positions.T
        x = self.W_E[ids] + self.W_pos[:n_pos]
        for block in self.blocks:
            run.residual.append(x)
            run.ln1.append(block.ln1.denominator(x))
            n = block.ln1(x, run.ln1[-1])
            q = torch.einsum("pd,hde->phe", n, block.W_Q) + block.b_Q
            k = torch.einsum("pd,gde->pge", n, block.W_K) + block.b_K
            run.tau_q.append(block.q_norm.denominator(q))
            run.tau_k.append(block.k_norm.denominator(k))
            q = rotate(block.q_norm(q, run.tau_q[-1]), positions, block.inv_freq)
            k = rotate(block.k_norm(k, run.tau_k[-1]), positions, block.inv_freq)
            k = k.repeat_interleave(self.n_heads // self.n_kv_heads, 1)
            run.scores.append(torch.einsum("qhe,khe->hqk", q, k) / self.attn_scale)
            run.capped.append(softcap(run.scores[-1], self.softcap))
            run.mask.append((distance >= 0) & (distance < (block.window or n_pos)))
            run.pattern.append(run.capped[-1].masked_fill(~run.mask[-1], -math.inf).softmax(-1))
            write = block.heads_write(n.expand(self.n_heads, -1, -1), run.pattern[-1])
            run.post1.append(block.post1.denominator(write))
            write = block.post1(write, run.post1[-1])
            run.resid_mid.append(x if self.parallel else x + write)
            run.ln2.append(block.ln2.denominator(run.resid_mid[-1]))
            mlp = block.mlp(block.ln2(run.resid_mid[-1], run.ln2[-1]))
            run.post2.append(block.post2.denominator(mlp))
            x = x + write + block.post2(mlp, run.post2[-1])
        run.residual.append(x)
        run.final = self.final_norm.denominator(x)
        run.logits = softcap(self.final_norm(x, run.final) @ self.W_U, self.final_softcap)
        return run

    def q_vector(
        self, run: Run, layer: int, head: int, position: int, u: Tensor, const: bool = False
    ) -> Tensor:
        """q(u) of method.md, section 2: q(u) . k(u') / attn_scale is the pair's part of the score.

        Args:
            run: the clean run that norm denominators are taken from.
            layer: the block.
            head: the query head.
            position: where u lies, and the rotary position.
            u: (..., d), a part of residual[layer][position].
            const: ignore u and map what biases contribute, b_ln W_Q + b_Q.

        Returns:
            (..., e), or (e,) with const.
        """
        block = self.blocks[layer]
        if const:
            q = block.ln1.bias @ block.W_Q[head] + block.b_Q[head]
        else:
            q = block.ln1.linear(u, run.ln1[layer][position]) @ block.W_Q[head]
        q = block.q_norm.linear(q, run.tau_q[layer][position, head])
        return rotate(q, torch.tensor(position), block.inv_freq)

    def k_vector(
        self, run: Run, layer: int, head: int, position: int, u: Tensor, const: bool = False
    ) -> Tensor:
        """k(u): as `q_vector`, for the keys that query head `head` reads."""
        block = self.blocks[layer]
        group = head // (self.n_heads // self.n_kv_heads)
        if const:
            k = block.ln1.bias @ block.W_K[group] + block.b_K[group]
        else:
            k = block.ln1.linear(u, run.ln1[layer][position]) @ block.W_K[group]
        k = block.k_norm.linear(k, run.tau_k[layer][position, group])
        return rotate(k, torch.tensor(position), block.inv_freq)

    def block_frozen(self, run: Run, layer: int, x: Tensor) -> Tensor:
        """The block's output (P, d) as a function of its input x (P, d), differentiable.

        Attention patterns and the denominators of all norms stay as in `run`; the MLP is live.
        Equals residual[layer + 1] at x = residual[layer], where its derivative defines the edges:
        a_t v_t . d block_frozen(x)[p_t] / d x[p_s] . a_s v_s.
        """
        return self._block(run, layer, x, x, x.expand(self.n_heads, -1, -1), False)

    def path_gradients(
        self, run: Run, layer: int, target: Tensor, position: int, direct: bool = False
    ) -> PathGradients:
        """Gradient of target . block output[position] at the clean input, path by path.

        Contracted with a_s v_s at p_s this is an edge's residual, mlp and head parts. The paths sum
        to the gradient of `block_frozen`.

        Args:
            run: the clean run.
            layer: the block crossed.
            target: (d,), a_t v_t or a logit's direction.
            position: p_t.
            direct: heads without their way through the same block's MLP (the paper's formula).
        """
        x = run.residual[layer]
        residual, mlp = x.clone().requires_grad_(), x.clone().requires_grad_()
        heads = x.repeat(self.n_heads, 1, 1).requires_grad_()
        out = self._block(run, layer, residual, mlp, heads, direct)
        gradients = torch.autograd.grad(target @ out[position], (residual, mlp, heads))
        return PathGradients(*gradients)

    def logit_direction(self, run: Run, token: int) -> Tensor:
        """Gradient (d,) of logit[token] - mean logit in residual[n_layers] at the last position.

        The final norm's denominator is frozen and the final soft-cap ignored.
        """
        x = run.residual[-1][-1].clone().requires_grad_()
        logits = self.final_norm(x, run.final[-1]) @ self.W_U
        return torch.autograd.grad(logits[token] - logits.mean(), x)[0]

    def _block(
        self, run: Run, layer: int, residual: Tensor, mlp: Tensor, heads: Tensor, direct: bool
    ) -> Tensor:
        """`block_frozen` with one copy of the input for each path: (P, d), (P, d), (H, P, d)."""
        block = self.blocks[layer]
        write = block.heads_write(block.ln1(heads, run.ln1[layer]), run.pattern[layer])
        write = block.post1(write, run.post1[layer])
        mid = mlp if self.parallel else mlp + (write.detach() if direct else write)
        mlp_write = block.post2(block.mlp(block.ln2(mid, run.ln2[layer])), run.post2[layer])
        return residual + write + mlp_write


class _Loader:
    """Reads the three families of Hugging Face state dicts: GPT-2, GPT-NeoX, Llama and its kin."""

    def __init__(self, config: PretrainedConfig, state: dict[str, Tensor]) -> None:
        self.config, self.state = config, state
        self.family = {"gpt2": "gpt2", "gpt_neox": "neox"}.get(config.model_type, "llama")
        self.gemma = config.model_type.startswith("gemma")

    def embeddings(self) -> tuple[Tensor, Tensor, Tensor]:
        """Token embedding as added to the stream, position embedding or zero, unembedding."""
        name = {"gpt2": "transformer.wte", "neox": "gpt_neox.embed_in"}
        W_E = self.state[name.get(self.family, "model.embed_tokens") + ".weight"]
        W_U = self.state["embed_out.weight" if self.family == "neox" else "lm_head.weight"].T
        if self.gemma:
            W_E = W_E * math.sqrt(W_E.shape[1])
        W_pos = W_E.new_zeros(self.config.max_position_embeddings, W_E.shape[1])
        return W_E, self.state.get("transformer.wpe.weight", W_pos), W_U

    def final_norm(self) -> Norm:
        name = {"gpt2": "transformer.ln_f", "neox": "gpt_neox.final_layer_norm"}
        return self._norm(name.get(self.family, "model.norm"))

    def block(self, layer: int) -> Block:
        H, e = self.config.num_attention_heads, _d_head(self.config)
        keys = ("activation_function", "hidden_activation", "hidden_act")
        activation = next(getattr(self.config, key) for key in keys if hasattr(self.config, key))
        at, gate, post1, post2 = f"model.layers.{layer}.", None, "", ""
        if self.family == "gpt2":
            at = f"transformer.h.{layer}."
            W, b = self._linear(at + "attn.c_attn")  # columns: q, k, v; then heads
            q, k, v = zip(W.chunk(3, 1), b.chunk(3), strict=True)
            ln1, ln2, out, up, down = "ln_1", "ln_2", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"
        elif self.family == "neox":
            at = f"gpt_neox.layers.{layer}."
            W, b = self._linear(at + "attention.query_key_value")  # columns: heads; then q, k, v
            W, b = W.unflatten(1, (H, 3, e)), b.unflatten(0, (H, 3, e))
            q, k, v = ((W[:, :, i].flatten(1), b[:, i].flatten()) for i in range(3))
            ln1, ln2, out = "input_layernorm", "post_attention_layernorm", "attention.dense"
            up, down = "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"
        else:
            q, k, v = (self._linear(f"{at}self_attn.{x}_proj") for x in "qkv")
            ln1, ln2, out = "input_layernorm", "post_attention_layernorm", "self_attn.o_proj"
            up, down, gate = "mlp.up_proj", "mlp.down_proj", self._linear(at + "mlp.gate_proj")
            if self.gemma:
                ln2, post1 = "pre_feedforward_layernorm", "post_attention_layernorm"
                post2 = "post_feedforward_layernorm"
        (W_Q, b_Q), (W_K, b_K), (W_V, b_V) = (
            (W.unflatten(1, (-1, e)).transpose(0, 1), b.unflatten(0, (-1, e))) for W, b in (q, k, v)
        )
        W_O, b_O = self._linear(at + out)
        inv_freq, window = self._position_facts(layer)
        return Block(
            ln1=self._norm(at + ln1),
            ln2=self._norm(at + ln2),
            post1=self._norm(at + post1),
            post2=self._norm(at + post2),
            q_norm=self._norm(at + "self_attn.q_norm", e),
            k_norm=self._norm(at + "self_attn.k_norm", e),
            W_Q=W_Q,
            b_Q=b_Q,
            W_K=W_K,
            b_K=b_K,
            W_V=W_V,
            b_V=b_V,
            W_O=W_O.unflatten(0, (H, e)),
            b_O=b_O,
            gate=gate,
            up=self._linear(at + up),
            down=self._linear(at + down),
            activation=ACTIVATIONS[activation],
            inv_freq=inv_freq,
            window=window,
        )

    def _linear(self, name: str) -> tuple[Tensor, Tensor]:
        """Weight (in, out) and bias (out,). GPT-2 stores (in, out), the others (out, in)."""
        weight = self.state[name + ".weight"]
        weight = weight if self.family == "gpt2" else weight.T
        return weight, self.state.get(name + ".bias", weight.new_zeros(weight.shape[1]))

    def _norm(self, name: str, width: int | None = None) -> Norm:
        """The norm called `name`, or one that does nothing where the model has none."""
        one = next(iter(self.state.values())).new_ones(width or self.config.hidden_size)
        gain = self.state.get(name + ".weight")
        if gain is None:
            return Norm("none", one, 0 * one, 0.0)
        bias = self.state.get(name + ".bias", 0 * gain)
        if self.family != "llama":
            eps = getattr(self.config, "layer_norm_epsilon", None) or self.config.layer_norm_eps
            return Norm("layer", gain, bias, eps)
        return Norm("rms", 1 + gain if self.gemma else gain, bias, self.config.rms_norm_eps)

    def _position_facts(self, layer: int) -> tuple[Tensor, int | None]:
        """The block's rotary frequencies (float64) and its attention window."""
        config, width = self.config, _d_head(self.config)
        if self.family == "gpt2":
            return torch.zeros(0, dtype=torch.float64), None
        if self.family == "neox":
            width = int(width * config.rotary_pct)
            return _inv_freq(width, config.rotary_emb_base), None
        layer_types = getattr(config, "layer_types", None)
        local = layer_types is None or layer_types[layer] == "sliding_attention"
        window = getattr(config, "sliding_window", None) if local else None
        if config.model_type == "gemma3_text" and local:
            return _inv_freq(width, config.rope_local_base_freq), window
        scaling = getattr(config, "rope_scaling", None)
        if scaling:  # scaled frequencies are what Hugging Face says they are, to the last bit
            inv_freq, _ = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, torch.device("cpu"))
            return inv_freq.double(), window
        return _inv_freq(width, config.rope_theta), window


def _d_head(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _inv_freq(width: int, base: float) -> Tensor:
    """Rotary angles per position, (width / 2,), in float64."""
    return base ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)


def rotate(x: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
    """Rotates x (..., e) in its first 2 * half dimensions, where i pairs with i + half."""
    half = len(inv_freq)
    angle = positions[..., None] * inv_freq
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def softcap(x: Tensor, cap: float | None) -> Tensor:
    return x if cap is None else cap * torch.tanh(x / cap)
