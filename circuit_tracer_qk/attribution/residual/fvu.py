"""How much of a prompt's residual stream its dictionaries explain, and why one may explain none.

FVU, the fraction of variance unexplained, is the squared error over the squared distance from the
mean, over the positions that have features. A dictionary that fits is far below 1; one above 1 is
worse than saying the mean everywhere: it belongs to another hook, layer, model or normalisation.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from circuit_tracer_qk.attribution.residual.decompose import Decomposition
from circuit_tracer_qk.dictionaries.dictionary import Dictionary, Units, like
from circuit_tracer_qk.dictionaries.dictionary_set import DictionarySet

log = logging.getLogger(__name__)

FITS = 0.8  # an FVU that a reading needs to be named as the likely one


class ReconstructionWarning(UserWarning):
    """A dictionary that does not reconstruct the stream it is said to be of."""


def fvu(x: Tensor, error: Tensor, zero_positions: slice = slice(0, 0)) -> float:
    """Fraction of variance unexplained; NaN where there is no variance.

    Args:
        x: (n_pos, d_model), the stream.
        error: (n_pos, d_model), what is left of it.
        zero_positions: positions that are not counted.
    """
    kept = torch.ones(len(x), dtype=torch.bool, device=x.device)
    kept[zero_positions] = False
    x, error = x[kept].double() if x.device.type != "mps" else x[kept], error[kept]
    variance = float((x - x.mean(0)).square().sum()) if len(x) else 0.0
    varies = variance > 1e-9 * float(x.square().sum())  # else it is rounding
    return float(error.square().sum()) / variance if varies else float("nan")


def explained(parts: Decomposition, zero_positions: slice) -> dict[int, float]:
    """checkpoint -> FVU of its dictionary on this prompt."""
    residual = parts.run.residual
    return {c: fvu(residual[c], error, zero_positions) for c, error in parts.errors.items()}


@torch.no_grad()
def check_fvu(parts: Decomposition, dictionaries: DictionarySet, zero_positions: slice) -> None:
    """Log every checkpoint's FVU; warn of those above 1, with the likely cause.

    Warns:
        ReconstructionWarning: naming the checkpoint, its FVU and what would fit, if anything does.
    """
    fvu_of = explained(parts, zero_positions)
    shown = ", ".join(f"{c}: {value:.3f}" for c, value in fvu_of.items())
    log.info("FVU of %s on this prompt, by checkpoint: %s", dictionaries.scan, shown)
    bad = {c: value for c, value in fvu_of.items() if value > 1}
    if not bad:
        return
    worst = max(bad, key=lambda c: bad[c])
    cause = _cause(parts, dictionaries, worst, zero_positions)
    listed = ", ".join(f"{c} ({value:.2f})" for c, value in bad.items())
    warnings.warn(
        f"{dictionaries.scan} does not reconstruct the residual stream of this prompt: FVU above 1 "
        f"at checkpoint {listed}. {cause}",
        ReconstructionWarning,
        stacklevel=3,
    )


def _cause(
    parts: Decomposition, dictionaries: DictionarySet, checkpoint: int, zero_positions: slice
) -> str:
    """What would make the dictionary fit, by trying it."""
    dictionary = dictionaries.by_checkpoint[checkpoint]
    unknown = "Likely: another layer, hook, model or normalisation than it was trained on."
    if set(dictionary.decoders) != {checkpoint} or dictionary.encoder is not None:
        return unknown
    best = (FITS, "")
    for other, x in enumerate(parts.run.residual):
        if other != checkpoint:
            value = fvu(x, _error(dictionary, x), zero_positions)
            hook = f"checkpoint {other}, that is hook_resid_post of layer {other - 1}"
            best = min(best, (value, f"it fits {hook} (FVU {value:.2f}): wrong layer or hook"))
    x = parts.run.residual[checkpoint]
    for units, name in _readings(dictionary, x):
        value = fvu(x, _error(replace(dictionary, units=units), x), zero_positions)
        best = min(best, (value, f"it fits with {name} (FVU {value:.2f}): missing normalisation"))
    return f"Likely, because {best[1]}." if best[1] else unknown


def _readings(dictionary: Dictionary, x: Tensor) -> Iterator[tuple[Units, str]]:
    """Other normalisations than the one that is said, with their names."""
    for normalised in ("layer_norm", "constant_norm_rescale"):
        yield Units(normalised), f"normalize_activations {normalised}"
    yield Units(centred=True), "centred writing weights"
    yield Units(), "no normalisation"


def _error(dictionary: Dictionary, x: Tensor) -> Tensor:
    """(n_pos, d_model): what an SAE leaves of a stream."""
    acts = dictionary.encode(x)
    active = acts.any(0).nonzero().flatten()
    [checkpoint] = dictionary.decoders
    vectors = like(dictionary.vectors(checkpoint, active), x)
    return x - acts[:, active] @ vectors - dictionary.bias(x)
