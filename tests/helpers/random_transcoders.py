"""Random transcoders of circuit-tracer's own classes, and replacement models that carry them."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from circuit_tracer.replacement_model.replacement_model_transformerlens import (
    TransformerLensReplacementModel,
)
from circuit_tracer.transcoder import SingleLayerTranscoder, TranscoderSet
from circuit_tracer.transcoder.activation_functions import JumpReLU, TopK
from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder
from torch import Tensor

from circuit_tracer_qk.host import patching
from circuit_tracer_qk.model.load import load_transformer

PLACES = {
    "mlp.hook_in": ("mlp.hook_in", "mlp.hook_out"),
    "ln2.hook_normalized": ("ln2.hook_normalized", "hook_mlp_out"),
    "hook_resid_mid": ("hook_resid_mid", "hook_mlp_out"),
}


KINDS = ("relu", "jumprelu", "topk", "skip", "clt", "clt-skip")


def replacement_model(
    folder: Path,
    kind: str,
    reads: str = "mlp.hook_in",
    writes: str = "hook_mlp_out",
    dtype: torch.dtype = torch.float32,
    stock: bool = False,
) -> Any:
    """A saved model with random transcoders in the place of its MLPs.

    Args:
        folder: the model.
        kind: of ``KINDS``.
        reads, writes: where the transcoders are.
        dtype: of the model.
        stock: as circuit-tracer alone sets it up, Gemma-3's rotary tables mixed up.
    """
    model: Any = load_transformer(folder, dtype=dtype, device="cpu")
    transcoders = random_transcoders(model.cfg.n_layers, model.cfg.d_model, kind, reads, writes)
    if stock:
        model.__class__ = TransformerLensReplacementModel
        model._configure_replacement_model(transcoders)
    else:
        model = patching.replacement_model(model, transcoders)
    model.tokenizer = Tokenizer(model.cfg.d_vocab)
    return model


class Tokenizer:
    """As much of one as circuit-tracer needs for prompts of ids."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.all_special_ids = list(range(vocab_size))  # no BOS is put in front
        self.padding_side = "right"
        self.bos_token_id = self.pad_token_id = self.eos_token_id = 1

    def decode(self, ids: Any) -> str:
        return "".join(f"<{int(i)}>" for i in torch.as_tensor(ids).reshape(-1))


def random_transcoders(
    n_layers: int, d_model: int, kind: str, reads: str, writes: str, d_dict: int = 24
) -> TranscoderSet | CrossLayerTranscoder:
    """Transcoders of which about a third of the features are active."""
    generator = torch.Generator().manual_seed(5)
    if kind.startswith("clt"):
        clt: Any = CrossLayerTranscoder(
            n_layers,
            d_dict,
            d_model,
            activation_function="jump_relu",
            skip_connection=kind == "clt-skip",
            lazy_decoder=False,
            feature_input_hook=reads,
            feature_output_hook=writes,
            **_named(CrossLayerTranscoder),
            device=torch.device("cpu"),
            dtype=torch.float32,
        )
        _draw(clt, generator, d_model)
        return clt
    made: dict[int, SingleLayerTranscoder] = {}
    for layer in range(n_layers):
        function: Any = torch.nn.functional.relu
        if kind == "jumprelu":
            function = JumpReLU(torch.zeros(d_dict))
        elif kind == "topk":
            function = TopK(6)
        made[layer] = SingleLayerTranscoder(
            d_model,
            d_dict,
            function,
            layer,
            skip_connection=kind == "skip",
            device=torch.device("cpu"),
            dtype=torch.float32,
        )
        _draw(made[layer], generator, d_model)
    return TranscoderSet(
        made, feature_input_hook=reads, feature_output_hook=writes, **_named(TranscoderSet)
    )


def _named(kind: type) -> dict[str, Any]:
    """The scan, by the name that this circuit-tracer has for it."""
    parameters = inspect.signature(kind.__init__).parameters
    return {"scan_name" if "scan_name" in parameters else "scan": "random"}


def _draw(module: torch.nn.Module, generator: torch.Generator, d_model: int) -> None:
    scales = {"W_enc": d_model**-0.5, "W_dec": 0.4, "b_enc": 0.1, "b_dec": 0.3, "W_skip": 0.2}
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if "threshold" in name:
                parameter.copy_(drawn.abs() * 0.2)
                continue
            scale = next(s for key, s in scales.items() if name.startswith(key))
            shift = -0.2 if name.startswith("b_enc") else 0.0
            parameter.copy_(drawn * scale + shift)


def columns_of(model: Any, graph: Any) -> Tensor:
    """Demeaned unembedding columns of a graph's logits."""
    W_U = model.unembed.W_U
    W_U = W_U if W_U.shape[0] == model.cfg.d_model else W_U.T
    ids = [target[1] for target in graph.logit_targets]
    return (W_U[:, ids] - W_U.mean(1, keepdim=True)).T


__all__ = ["KINDS", "columns_of", "random_transcoders", "replacement_model"]
