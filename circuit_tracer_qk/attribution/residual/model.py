"""A model with its residual dictionaries: what :func:`load_model` returns."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from circuit_tracer_qk.base import rules
from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.base.package import ROOT
from circuit_tracer_qk.dictionaries.catalogue import MINIATURES
from circuit_tracer_qk.dictionaries.dictionary_set import DictionarySet
from circuit_tracer_qk.dictionaries.load import load_dictionaries
from circuit_tracer_qk.host import gemma3
from circuit_tracer_qk.host import graph as host
from circuit_tracer_qk.model.check import check_exact
from circuit_tracer_qk.model.load import check_dtype, load_transformer
from circuit_tracer_qk.model.run import contraction_dtype
from circuit_tracer_qk.model.supported import refuse_unsupported

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

MINIATURE = ROOT / "miniature" / "model"
MINIATURE_NAME = "circuit-tracer-qk/miniature"  # as configs of its dictionaries name it


@dataclass(frozen=True, eq=False)
class ResidualModel:
    """A language model and the dictionaries of its residual stream.

    Attributes:
        transformer: the TransformerLens model, unmodified, nothing folded.
        dictionaries: residual SAEs or a weakly causal crosscoder.
        zero_positions: positions whose features are dropped.

    >>> model.scan, model.cfg.n_layers, model.cfg.d_model, model.zero_positions
    ('miniature-sae', 4, 128, slice(0, 1, None))
    """

    transformer: HookedTransformer
    dictionaries: DictionarySet
    zero_positions: slice

    @property
    def cfg(self) -> Any:
        """TransformerLens' configuration of the model."""
        return self.transformer.cfg

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer; None without one."""
        return self.transformer.tokenizer

    @property
    def scan(self) -> str:
        """The dictionaries' name, which graphs and their files carry."""
        return self.dictionaries.scan

    def ensure_tokenized(self, prompt: str | Tensor | list[int]) -> Tensor:
        """(n_pos,) token ids of a prompt, with a BOS in front (circuit-tracer's own rule).

        Raises:
            UserError: an empty prompt, or text for a model without a tokenizer.

        >>> len(model.ensure_tokenized(prompt))
        15
        """
        device = self.transformer.W_E.device
        name = gemma3.name_for_rules(self.cfg, self.tokenizer)
        return host.tokenize(prompt, self.tokenizer, device, name)


def load_model(
    model: str | Path | HookedTransformer | None = None,
    dictionaries: str | Path | DictionarySet | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    zero_positions: slice | None = None,
    checkpoints: Iterable[int] | None = None,
) -> ResidualModel:
    """Load a model and its residual dictionaries.

    Args:
        model: a local Hugging Face folder, a hub id or a TransformerLens name; the bundled
            miniature if left out (or the ``model_name`` in the dictionaries' config, if those are
            given). A TransformerLens model (norms folded or not) is used as it is.
        dictionaries: a built-in name, a local folder, a hub id ``org/name[@revision]`` or a set of
            :func:`load_dictionaries`, which is used as it is.
        dtype: of the weights; everything is contracted in float32, or float64 for float64. What a
            model in half precision rounds in its own pass stays (section 7 of attribution/README.md).
        device: cuda if there is one, else cpu.
        zero_positions: positions whose features are dropped, as circuit-tracer does: the first
            (an instruction-tuned Gemma-3, which its chat template tells: the first four).
            ``slice(0, 0)`` keeps them all.
        checkpoints: the dictionaries to fetch and read, where not all are needed: QK attributions
            of block ``l`` need checkpoint ``l``.

    Raises:
        UserError: whatever cannot be loaded exactly, with the reason and the way out.

    >>> wcc = ctqk.load_model(dictionaries="miniature-wcc", dtype=torch.float64)
    >>> wcc.scan, wcc.transformer.W_E.dtype
    ('miniature-wcc', torch.float64)
    """
    if not isinstance(dictionaries, DictionarySet):
        rules.check(dictionaries=dictionaries)
    if not hasattr(model, "cfg"):
        rules.check(model=model)
    check_dtype(dtype)
    if model is not None and not isinstance(model, str | Path):
        device, dtype = model.W_E.device, model.cfg.dtype
    device = _device(device)
    if dictionaries is None:
        if model is not None:
            raise UserError(
                "No dictionaries were named: give dictionaries=..., a folder or hub id with "
                "residual SAEs or a weakly causal crosscoder."
            )
        dictionaries = MINIATURES["miniature-sae"]  # itself, whatever the current folder holds
    if not isinstance(dictionaries, DictionarySet):
        dictionaries = load_dictionaries(
            dictionaries, device=device, dtype=contraction_dtype(dtype), checkpoints=checkpoints
        )
    model = model or dictionaries.model_name
    if model == MINIATURE_NAME:
        model = MINIATURE
    if model is None:
        raise UserError(
            "No model was named, and the dictionaries' config has no model_name: give one."
        )
    fitting = dictionaries

    def check(loaded: HookedTransformer) -> None:
        refuse_unsupported(loaded)
        fitting.check_fits(loaded.cfg.d_model, loaded.cfg.n_layers)
        check_exact(loaded)

    if isinstance(model, str | Path):
        transformer = load_transformer(str(model), dtype=dtype, device=device, check=check)
    else:
        transformer = model
        transformer.setup()  # folding puts in new norms, whose hooks older trees do not register
        check(transformer)
    if zero_positions is None:
        zero_positions = gemma3.zero_positions(transformer.cfg, transformer.tokenizer)
    return ResidualModel(transformer, dictionaries, zero_positions)


def _device(device: str | torch.device | None) -> torch.device:
    """The device named, if it is there; else cuda, else cpu."""
    try:
        named = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=named)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"the device {device} cannot be used here ({reason}): use cpu.") from error
    return named
