"""Cases that the identity tests share: a tiny model, its independent reference and our graph."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import circuit_tracer_qk as ctqk
from helpers.architectures import ARCHITECTURES, prompt_ids, save_tiny
from helpers.random_dictionaries import PRE, Site, decomposition, write_sae, write_wcc
from helpers.reference import Reference, Run

# name -> (writer's extra arguments); "wcc" has its own writer
SETS = ("sae", "wcc", "pre", "topk")


class Named(NamedTuple):
    """A component by what it is: kind, position, checkpoint read and index (-1 for non-features)."""

    kind: str
    position: int
    reads: int
    feature: int


@dataclass
class Case:
    """One architecture with one kind of dictionary set, computed twice."""

    name: str
    ids: list[int]
    reference: Reference
    run: Run
    sites: dict[int, Site]
    model: ctqk.ResidualModel
    graph: ctqk.ResidualGraph

    @property
    def n_layers(self) -> int:
        return self.reference.n_layers

    def vectors(self, checkpoint: int, tokens: bool = False) -> dict[Named, Tensor]:
        """Every component of a checkpoint, from the files and the reference run alone."""
        n = len(self.ids)
        if checkpoint in self.sites and not (tokens and checkpoint == 0):
            site = self.sites[checkpoint]
            out = {Named("feature", p, c, f): v for (p, c, f), v in site.features.items()}
            out |= {Named("bias", p, checkpoint, -1): site.bias for p in range(n)}
            return out | {Named("error", p, checkpoint, -1): site.error[p] for p in range(n)}
        if checkpoint == 0:
            E = self.reference.W_E[self.ids]
            out = {Named("embedding", p, 0, -1): E[p] for p in range(n)}
            if bool(self.reference.W_pos.any()):
                out |= {Named("position", p, 0, -1): self.reference.W_pos[p] for p in range(n)}
            return out
        x = self.run.residual[checkpoint]
        return {Named("error", p, checkpoint, -1): x[p] for p in range(n)}

    def node(self, name: Named) -> int | None:
        """The graph's node of a component; None for decoder biases and positions."""
        g, n = self.graph, len(self.ids)
        if name.kind == "feature":
            key = torch.tensor([name.reads - 1, name.position, name.feature])
            active = g.active_features[g.selected_features]
            found = (active == key).all(1).nonzero().flatten().tolist()
            return found[0] if found else None
        if name.kind == "error":
            slot = name.reads - (0 if self.model.dictionaries.hook == PRE else 1)
            return g.n_features + slot * n + name.position
        if name.kind == "embedding":
            return g.n_features + self.n_layers * n + name.position
        return None


def build(
    name: str,
    folder: Path,
    kind: str = "sae",
    dtype: torch.dtype = torch.float64,
    n: int = 12,
    **options,
) -> Case:
    """Save a tiny model and a random dictionary set, and attribute a prompt with both sides."""
    hf_model = save_tiny(name, folder / "model")
    n_layers, d_model = hf_model.config.num_hidden_layers, hf_model.config.hidden_size
    layers = list(range(n_layers))
    path = folder / kind
    if kind == "wcc":
        write_wcc(path, d_model, layers)
    elif kind == "pre":
        write_sae(path, d_model, layers, hook=PRE)
    else:
        write_sae(path, d_model, layers, activation="topk" if kind == "topk" else "jumprelu")
    reference = Reference(hf_model)
    ids = prompt_ids(name, n)
    run = reference.run(ids)
    model = ctqk.load_model(folder / "model", dictionaries=path, dtype=dtype, device="cpu")
    graph = ctqk.attribute(ids, model, max_n_logits=3, **options)
    return Case(name, ids, reference, run, decomposition(path, run.residual), model, graph)


__all__ = ["ARCHITECTURES", "SETS", "Case", "Named", "build"]
