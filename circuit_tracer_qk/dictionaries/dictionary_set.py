"""Dictionaries at several checkpoints of one model, with their features' labels and examples."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch

from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.dictionaries.dictionary import Dictionary
from circuit_tracer_qk.dictionaries.features import FeatureExamples, read_labels


@dataclass(frozen=True, eq=False)
class DictionarySet:
    """Dictionaries at several checkpoints of one model, with their features' labels and examples.

    Attributes:
        kind: "residual_sae_set" or "weakly_causal_crosscoder".
        hook: "hook_resid_post" or "hook_resid_pre", the hook the set's layers are counted by.
        scan: the name under which features are shown.
        model_name: the model the set was trained on, where the folder tells.
        by_checkpoint: the dictionaries, by ascending checkpoint.
        folder: where the features and labels lie.
        entries: the number in each checkpoint's file names and in ``labels.json``; checkpoint - 1
            for the checkpoints left out.
        neuronpedia: the id on Neuronpedia of each checkpoint's dictionary, such as
            "gemma-2-2b/12-gemmascope-res-16k", where the set has them.

    >>> from circuit_tracer_qk import load_dictionaries
    >>> dictionaries = load_dictionaries("miniature-wcc")
    >>> dictionaries.kind, dictionaries.d_model
    ('weakly_causal_crosscoder', 128)
    >>> list(dictionaries.by_checkpoint[3].decoders)  # the checkpoints that its features write to
    [3, 4]
    """

    kind: str
    hook: str
    scan: str
    model_name: str | None
    by_checkpoint: dict[int, Dictionary]
    folder: Path | None = None
    entries: dict[int, int] = field(default_factory=dict)
    neuronpedia: dict[int, str] = field(default_factory=dict)

    @property
    def checkpoints(self) -> tuple[int, ...]:
        """The checkpoints that have a dictionary, ascending."""
        return tuple(self.by_checkpoint)

    @property
    def d_model(self) -> int:
        """Width of the residual stream the set was trained on."""
        return next(iter(self.by_checkpoint.values())).W_enc.shape[1]

    def check_fits(self, d_model: int, n_layers: int) -> None:
        """Check that a model has these dictionaries' checkpoints and width.

        Raises:
            UserError: naming the checkpoint, the tensor and what was expected and found.
        """
        for checkpoint, dictionary in self.by_checkpoint.items():
            d_dict, width = dictionary.W_enc.shape
            if width != d_model:
                raise UserError(
                    f"the dictionary at checkpoint {checkpoint} does not fit the model: W_enc "
                    f"should be {[d_dict, d_model]} and is {[d_dict, width]}; use "
                    "dictionaries trained on this model"
                )
            if checkpoint > n_layers:
                raise UserError(
                    f"the dictionary at checkpoint {checkpoint} does not fit the model: with "
                    f"n_layers = {n_layers} the checkpoints of W_enc are expected in 0 to "
                    f"{n_layers}, found {checkpoint}; use dictionaries trained on this model"
                )

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> DictionarySet:
        """The same set with every tensor on ``device`` and, where given, in ``dtype``."""
        moved = {c: d.to(device, dtype) for c, d in self.by_checkpoint.items()}
        return replace(self, by_checkpoint=moved)

    @property
    def n_weights(self) -> int:
        """How many numbers its encoders and decoders hold."""
        tensors = [t for d in self.by_checkpoint.values() for t in (d.W_enc, *d.decoders.values())]
        return sum(t.numel() for t in tensors)

    def label(self, checkpoint: int, feature: int) -> str:
        """The feature's label from ``labels.json``, "" when it has none.

        Raises:
            UserError: ``labels.json`` is not a mapping from file numbers to lists of labels.
        """
        labels = self.labels.get(str(self.entries.get(checkpoint, checkpoint - 1)), [])
        return (labels[feature] or "") if 0 <= feature < len(labels) else ""

    def examples(self, checkpoint: int, feature: int) -> bytes | None:
        """The feature's JSON, None without one; see :class:`FeatureExamples`.

        Raises:
            UserError: ``features.zip`` cannot be read.
        """
        return None if self._examples is None else self._examples.read(checkpoint, feature)

    @cached_property
    def _examples(self) -> FeatureExamples | None:
        return None if self.folder is None else FeatureExamples(self.folder)

    @cached_property
    def labels(self) -> dict[str, list[str | None]]:
        """The names of features in ``labels.json``, by the number of the file they are in."""
        path = None if self.folder is None else self.folder / "labels.json"
        if path is None or not path.is_file():
            return {}
        return read_labels(path)
