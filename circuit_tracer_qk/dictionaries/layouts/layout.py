"""What the layouts have in common: how one is recognised, and a set put together from its SAEs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.dictionaries.catalogue import names_of
from circuit_tracer_qk.dictionaries.dictionary import RESID_POST, RESID_PRE, SAE, Dictionary, Units
from circuit_tracer_qk.dictionaries.dictionary_set import DictionarySet
from circuit_tracer_qk.dictionaries.files import Files
from circuit_tracer_qk.dictionaries.tensors import mapped, validate_tensors

HOOK = re.compile(rf"blocks\.([0-9]+)\.({RESID_PRE}|{RESID_POST})")


@dataclass(frozen=True)
class Hints:
    """What the files do not say, from a ``config.yaml`` beside them or from the list of names.

    Attributes:
        named: whether the layout was named, rather than recognised.
        model_name: the model it was trained on.
        scan: the name under which features are shown.
        centred: trained on a model with centred writing weights; None where nobody says.
        norm_scaling_factor: SAELens' factor of ``expected_average_only_in``, one for all layers or
            one for each.
        checkpoints: the ones wanted of a set of SAEs; None for all.
        neuronpedia: Neuronpedia's id of a layer's dictionary, with ``{layer}`` or
            ``{checkpoint}`` in it.
    """

    named: bool = False
    model_name: str | None = None
    scan: str | None = None
    centred: bool | None = None
    norm_scaling_factor: float | dict[int, float] | None = None
    checkpoints: frozenset[int] | None = None
    neuronpedia: str | None = None

    def factor(self, layer: int) -> float | None:
        """The scaling factor of one layer."""
        given = self.norm_scaling_factor
        return given.get(layer) if isinstance(given, dict) else given


def wanted(checkpoints: Iterable[int], hints: Hints) -> list[int]:
    """The checkpoints to read, in order: those asked for, or else the first of a set."""
    every = sorted(checkpoints)
    if hints.checkpoints is None:
        return every
    return [c for c in every if c in hints.checkpoints] or every[:1]


class Layer(NamedTuple):
    """One layer's SAE: where it stands, and how to read it.

    Attributes:
        number: the layer.
        hook: hook_resid_pre or hook_resid_post.
        folder: where it lies, "" for the root; or its file, where that is all of it.
        weights: the file of its tensors.
        read: makes the dictionary from that file, the checkpoint and a name for messages.
        model_name: the model that its configuration names; anything but text is left out.
    """

    number: int
    hook: str
    folder: str
    weights: str
    read: Callable[[Path, int, str], Dictionary]
    model_name: Any = None

    def title(self, files: Files) -> str:
        """Its name for messages."""
        return self.folder or files.title

    @property
    def checkpoint(self) -> int:
        return checkpoint_of(self.number, self.hook)


@dataclass(frozen=True)
class Layout:
    """One way in which dictionaries are stored.

    Attributes:
        name: what it is called in ``format:``.
        files: the files by which a dictionary's folder is recognised.
        read_layer: reads the configuration of one SAE's folder; None where it is no residual SAE
            that a set would hold (the embedding's, say).
        read_set: reads a folder that is a set by itself, in place of ``read_layer``.
        optional: files that a dictionary may have besides.
    """

    name: str
    files: tuple[str, ...]
    read_layer: Callable[[Files, str, Hints], Layer | None] | None = None
    read_set: Callable[[Files, str, Hints], DictionarySet] | None = None
    optional: tuple[str, ...] = ()


def checkpoint_of(layer: int, hook: str) -> int:
    """The checkpoint of a layer's hook."""
    return layer + (1 if hook == RESID_POST else 0)


def assemble(files: Files, layers: Iterable[Layer], hints: Hints) -> DictionarySet:
    """One set of SAEs, one a checkpoint, in the files' own dtypes.

    Raises:
        UserError: two of one checkpoint, or of different widths.
    """
    by_checkpoint: dict[int, Layer] = {}
    for layer in layers:
        other = by_checkpoint.setdefault(layer.checkpoint, layer)
        if other is not layer:
            raise UserError(
                f"{files.title} holds several SAEs of layer {layer.number} at {layer.hook} "
                f"({other.title(files)} and {layer.title(files)}): name those of one set, as a "
                f"subfolder or with a pattern such as {files.title}/{_pattern(other, files)}."
                + names_of(files.repo)
            )
    chosen = {c: by_checkpoint[c] for c in wanted(by_checkpoint, hints)}
    files.fetch(layer.weights for layer in chosen.values())
    read = tqdm(chosen.items(), "Loading dictionaries", leave=False, delay=2, disable=None)
    dictionaries = {c: at.read(files.get(at.weights), c, at.title(files)) for c, at in read}
    widths = {len(d.b_dec) for d in dictionaries.values()}
    if len(widths) > 1:
        raise UserError(
            f"the SAEs of {files.title} are of different widths d_model ({sorted(widths)}): they do "
            "not belong to one model."
        )
    models = [layer.model_name for layer in chosen.values()]
    names = {name for name in models if isinstance(name, str) and name}
    hooks = {layer.hook for layer in chosen.values()}
    hook = RESID_PRE if RESID_PRE in hooks and 0 in chosen else RESID_POST
    shift = checkpoint_of(0, hook)  # numbers of their own for layer 11's input and its output
    return DictionarySet(
        kind=SAE,
        hook=hook,
        scan=hints.scan or scan_of(files),
        model_name=hints.model_name or (names.pop() if len(names) == 1 else None),
        by_checkpoint=dictionaries,
        folder=files.root,
        entries={c: c - shift for c in chosen},
        neuronpedia=neuronpedia(hints, {c: layer.number for c, layer in chosen.items()}),
    )


def scan_of(files: Files) -> str:
    """The name of a set that has none of its own."""
    return files.title if files.root is None else files.root.resolve().name


def neuronpedia(hints: Hints, layers: dict[int, int]) -> dict[int, str]:
    """checkpoint -> Neuronpedia's id, from checkpoint -> layer."""
    if hints.neuronpedia is None:
        return {}
    return {c: hints.neuronpedia.format(layer=n, checkpoint=c) for c, n in layers.items()}


def row_norms(W: Tensor) -> Tensor:
    """(n,) norms of the rows in float64, a few rows at a time."""
    return torch.cat([rows.double().norm(dim=1) for rows in W.split(1024)])


def read_tensors(
    path: Path,
    shapes: Mapping[str, str],
    optional: Mapping[str, str] | None = None,
    *,
    sizes: Mapping[str, int] | None = None,
    stored: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """A file's tensors, checked, the small ones in float32: what is added to sums of their size.

    Args:
        path: the file.
        shapes, optional, sizes: as in :func:`validate_tensors`.
        stored: what the file holds, where its tensors were looked at or renamed before.

    Raises:
        UserError: naming the file and the tensor that is missing or wrong.
    """
    stored = mapped(path) if stored is None else stored
    tensors = validate_tensors(path, stored, shapes, optional, sizes=sizes)
    return {name: t if t.ndim > 1 else t.float() for name, t in tensors.items()}


def from_tensors(
    at: int,
    architecture: str,
    W_enc: Tensor,
    decoders: dict[int, Tensor],
    biases: Mapping[str, Tensor],
    *,
    k: int | None = None,
    minus: bool = True,
    rescaled: bool = False,
    units: Units = Units(),
    title: str = "",
) -> Dictionary:
    """A dictionary of one of SAELens' architectures, whoever stored it.

    Args:
        at: the checkpoint.
        architecture: standard, jumprelu, topk or gated.
        W_enc: (d_dict, d_model).
        decoders: (d_dict, d_model) by the checkpoint written to.
        biases: b_dec, and b_enc or b_gate, b_mag and r_mag; threshold of a JumpReLU.
        k: of TopK.
        minus: whether the encoder subtracts b_dec from its input.
        rescaled: whether pre-activations are compared as if decoder vectors had norm 1.
        units: what the dictionary was trained to see.
        title: its name for messages.
    """
    b_dec, gated = biases["b_dec"], architecture == "gated"
    encoder_scale = decoder_scale = None
    if rescaled:
        encoder_scale = row_norms(decoders[at])
        decoder_scale = 1 / encoder_scale.clamp(min=1e-8)
    if units.factor != 1:
        back = torch.full((len(W_enc),), 1 / units.factor, dtype=torch.float64)
        decoder_scale = back if decoder_scale is None else back * decoder_scale
    return Dictionary(
        at,
        W_enc,
        biases["b_gate" if gated else "b_enc"],
        b_dec / units.factor,
        decoders,
        # a ReLU applies too
        threshold=biases["threshold"].clamp(min=0) if architecture == "jumprelu" else None,
        k=k,
        gain=biases["r_mag"].exp() if gated else None,
        b_mag=biases["b_mag"] if gated else None,
        subtract=b_dec if minus else None,
        encoder_scale=encoder_scale,
        decoder_scale=decoder_scale,
        units=units,
        title=title,
    )


def _pattern(layer: Layer, files: Files) -> str:
    return re.sub(rf"(?<![0-9]){layer.number}(?![0-9])", "*", layer.title(files), count=1)
