"""Writing dictionaries in the native format, whatever layout they came in."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.base.files import put_folder_in_place, workplace
from circuit_tracer_qk.base.memory import fitting
from circuit_tracer_qk.dictionaries.dictionary import RESID_POST, WCC, Dictionary
from circuit_tracer_qk.dictionaries.dictionary_set import DictionarySet
from circuit_tracer_qk.dictionaries.features import archive_of


def write_dictionaries(dictionaries: DictionarySet, folder: str | Path) -> Path:
    """Write a set in the native format (:mod:`circuit_tracer_qk.dictionaries.layouts.native`).

    The folder appears whole or not at all. Loading it gives the same activations and decoder
    vectors, to the rounding of what had to be folded into the encoder; with nothing to fold, bit
    for bit. Labels and examples go along.

    Args:
        dictionaries: of :func:`circuit_tracer_qk.load_dictionaries`.
        folder: where to; must not exist.

    Raises:
        UserError: the folder exists or cannot be written, or the format has no place for the set.
    """
    target = Path(folder).expanduser()
    if os.path.exists(target):
        raise UserError(f"{target} exists already: name a new folder.")
    shift = 1 if dictionaries.hook == RESID_POST else 0
    config = _config(dictionaries, shift)
    layers = sorted(dictionaries.by_checkpoint.items())
    bar = tqdm(layers, "Writing dictionaries", leave=False, delay=2, disable=None)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with workplace(target) as aside:
            part = aside / "set"
            part.mkdir()
            for checkpoint, dictionary in bar:
                what = f"checkpoint {checkpoint} of {dictionaries.scan}"
                with fitting(what, "convert it on a machine with more memory"):
                    _write(part, dictionaries.kind, checkpoint - shift, dictionary.folded())
            _copy_features(dictionaries, part, shift)
            (part / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), "utf-8")
            put_folder_in_place(part, target)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{target} cannot be written ({reason}): free the disk or choose another folder."
        ) from error
    return target


def _config(dictionaries: DictionarySet, shift: int) -> dict[str, Any]:
    every = dictionaries.by_checkpoint.values()
    for d in every:
        reason = d.why_not_plain
        if reason is not None:
            raise UserError(
                f"{dictionaries.scan} {reason}, and the native format has no place for that: use "
                "the folder as it is."
            )
    ks = {d.k for d in every}
    if len(ks) > 1:
        raise UserError(
            f"{dictionaries.scan} keeps different numbers of features at different layers "
            f"({', '.join(map(str, sorted(ks, key=str)))}), and the native format has one k: use "
            "the folder as it is."
        )
    [k] = ks
    name = dictionaries.model_name
    config: dict[str, Any] = {} if name is None else {"model_name": name}
    config |= {
        "model_kind": dictionaries.kind,
        "feature_input_hook": dictionaries.hook,
        "feature_output_hook": dictionaries.hook,
        "layers": [checkpoint - shift for checkpoint in sorted(dictionaries.by_checkpoint)],
        "scan": dictionaries.scan,
    }
    return config if k is None else config | {"activation": "topk", "k": k}


def _write(folder: Path, kind: str, layer: int, d: Dictionary) -> None:
    """One layer's files."""
    if kind == WCC:
        sites = torch.stack([d.decoders[c] for c in sorted(d.decoders)], 1)
        encoder = {"W_enc": d.W_enc, "b_enc": d.b_enc, "b_dec": d.b_dec, "threshold": d.threshold}
        files = {"W_enc": encoder, "W_dec": {"W_dec": sites}}
        for file, tensors in files.items():
            numbered = {f"{name}_{layer}": tensor for name, tensor in tensors.items()}
            _save(numbered, folder / f"{file}_{layer}.safetensors")
        return
    [decoder] = d.decoders.values()
    tensors = {"W_enc": d.W_enc, "W_dec": decoder, "b_enc": d.b_enc, "b_dec": d.b_dec}
    threshold = {"activation_function.threshold": d.threshold}
    _save(tensors | threshold, folder / f"layer_{layer}.safetensors")


def _copy_features(dictionaries: DictionarySet, folder: Path, shift: int) -> None:
    """Labels and examples, where the set has them."""
    labels = {
        str(c - shift): [dictionaries.label(c, feature) for feature in range(len(d.b_enc))]
        for c, d in dictionaries.by_checkpoint.items()
    }
    if any(label for names in labels.values() for label in names):
        (folder / "labels.json").write_text(json.dumps(labels), "utf-8")
    source = dictionaries.folder
    if source is not None and archive_of(source).is_file():
        shutil.copyfile(archive_of(source), folder / "features.zip")
    if source is not None and (source / "features").is_dir():
        shutil.copytree(source / "features", folder / "features")


def _save(tensors: Mapping[str, Tensor | None], path: Path) -> None:
    """Those of some tensors that there are."""
    save_file({name: t.cpu().contiguous() for name, t in tensors.items() if t is not None}, path)
