"""Which architectures are done exactly; all others are refused by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.model.attention import AttentionBlock
from circuit_tracer_qk.model.run import refuse_split_inputs

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

# Elementwise activations; anything else (SoLU is a softmax) would need its own Jacobian.
ELEMENTWISE = {
    *("relu", "gelu", "silu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "quick_gelu", "sigmoid")
}


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
    refuse_split_inputs(model)
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
                "attributed exactly: use a GPT-2, Pythia, Llama, Mistral, Qwen2, Qwen3, Gemma, "
                "Gemma-2 or Gemma-3 model."
            )
