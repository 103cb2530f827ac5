"""From a prompt to a residual attribution graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from circuit_tracer_qk.attribution.residual.decompose import Decomposition, decompose
from circuit_tracer_qk.attribution.residual.fvu import check_fvu
from circuit_tracer_qk.attribution.residual.graph import ResidualGraph
from circuit_tracer_qk.attribution.residual.influence import Sweep
from circuit_tracer_qk.attribution.residual.model import ResidualModel
from circuit_tracer_qk.attribution.residual.qk import QK
from circuit_tracer_qk.attribution.residual.store import Record
from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.base.memory import fitting
from circuit_tracer_qk.base.precision import exactly
from circuit_tracer_qk.base.selection import EXPLAINED, SELECTIONS
from circuit_tracer_qk.dictionaries.dictionary import RESID_PRE
from circuit_tracer_qk.dictionaries.dictionary_set import DictionarySet
from circuit_tracer_qk.host import graph as host
from circuit_tracer_qk.model.check import say_rounding
from circuit_tracer_qk.model.heads import Heads, logit_directions
from circuit_tracer_qk.model.run import freeze
from circuit_tracer_qk.model.supported import read_blocks


def check_graph_set(dictionaries: DictionarySet, n_layers: int) -> None:
    """Refuse sets whose gaps leave edges undefined (attribution/README.md, section 3, "Sets
    with gaps").

    Raises:
        UserError: a gap other than checkpoint n_layers, or a crosscoder that reads checkpoint 0.
    """
    missing = [c for c in range(1, n_layers) if c not in dictionaries.by_checkpoint]
    if missing:
        raise UserError(
            f"the dictionaries {dictionaries.scan} have none at checkpoint "
            f"{', '.join(map(str, missing))} of 1 to {n_layers - 1}: an edge would cross several "
            "blocks and its heads would not be defined; use a set with every layer (QK "
            "attributions alone work at the checkpoints it has: circuit_tracer_qk.explain)."
        )
    first = dictionaries.by_checkpoint.get(0)
    if first is not None and set(first.decoders) - {0}:
        raise UserError(
            f"the crosscoder {dictionaries.scan} reads checkpoint 0, whose node in a graph is the "
            "token embedding: use one whose first encoder reads checkpoint 1 (QK attributions "
            "alone work: circuit_tracer_qk.explain)."
        )


@fitting("this prompt's run", "give a shorter prompt")
@exactly
@torch.no_grad()
def explain(prompt: str | Tensor | list[int], model: ResidualModel) -> QK:
    """QK attributions of a prompt alone, without a graph: for sets with any gaps (paper, "QK
    attributions").

    A checkpoint without a dictionary is all error (checkpoint 0: embedding and position).

    Args:
        prompt: text, token ids or a tensor of them.
        model: of :func:`circuit_tracer_qk.load_model`.

    Returns:
        ``.table(layer, head, query, key)``, ``.row(layer, head, query)`` and
        ``.top(layer, head, query, n)``.

    Raises:
        UserError: a prompt that cannot be used.

    >>> qk = ctqk.explain(prompt, model)
    >>> qk.row(1, 2, 14)
    QKRow(query 14: attention 1.000 at key 6, 0.000 at key 5, 0.000 at key 14)
    """
    parts, heads = read(prompt, model)
    return QK(parts, heads, model.dictionaries.label)


@exactly
def read(prompt: str | Tensor | list[int], model: ResidualModel) -> tuple[Decomposition, Heads]:
    """One frozen run of a prompt, taken apart, and the heads on it.

    Raises:
        UserError: a prompt that cannot be used, or a model of another kind.
    """
    if not isinstance(model, ResidualModel):
        raise UserError(
            f"this needs the model of circuit_tracer_qk.load_model, not {type(model).__name__}: "
            "transcoder models go to circuit_tracer.attribute."
        )
    run = freeze(model.transformer, model.ensure_tokenized(prompt))
    parts = decompose(run, model.dictionaries, model.zero_positions)
    check_fvu(parts, model.dictionaries, model.zero_positions)
    heads = Heads(read_blocks(model.transformer, run.n_pos), run)
    say_rounding(heads, model.cfg.dtype)
    return parts, heads


@exactly
@torch.no_grad()
def attribute_residual(
    prompt: str | Tensor | list[int],
    model: ResidualModel,
    *,
    attribution_targets: Any = None,
    max_n_logits: int = 10,
    desired_logit_prob: float = 0.95,
    batch_size: int = 512,
    max_feature_nodes: int | None = None,
    verbose: bool = False,
    select: str = EXPLAINED,
) -> ResidualGraph:
    """The residual graph of a prompt; arguments as in :func:`circuit_tracer_qk.attribute`.

    Identity: the sum of a target's edges over features, decoder biases, errors and positions is
    <gradient, residual stream> (completeness).

    Raises:
        UserError: a prompt, targets or dictionaries that cannot be attributed exactly.
    """
    if select not in SELECTIONS:
        raise UserError(f"select is {select!r}: it must be one of {', '.join(SELECTIONS)}.")
    if isinstance(model, ResidualModel):
        check_graph_set(model.dictionaries, model.cfg.n_layers)
    parts, heads = read(prompt, model)
    run, transformer = parts.run, model.transformer
    targets = host.logit_targets(
        attribution_targets=attribution_targets,
        logits=run.logits,
        unembed=transformer.unembed.W_U.T.to(run.logits.dtype),
        tokenizer=model.tokenizer,
        max_n_logits=max_n_logits,
        desired_logit_prob=desired_logit_prob,
    )
    directions = logit_directions(transformer, run, targets.logit_vectors)
    # counted by resid_post where checkpoint n_layers needs a slot; checkpoint 0 never does
    resid_pre = model.dictionaries.hook == RESID_PRE and run.n_layers not in parts.biases
    sweep = Sweep(transformer, parts, heads, directions, resid_pre, batch_size, verbose, select)
    selected = sweep.select(targets.logit_probabilities.to(run.logits), max_feature_nodes or None)
    filled = sweep.fill(selected)

    active, folder = parts.features, model.dictionaries.folder
    nodes = active.checkpoint > 0
    vocabulary = model.tokenizer, transformer.cfg.d_vocab
    return ResidualGraph(
        Record(
            parts=parts,
            heads=heads,
            target_pulls=filled.target_pulls,
            logit_rows=directions,
            bias_edges=filled.bias_edges,
            position_edges=filled.position_edges,
            resid_pre=resid_pre,
            token_strings=list(map(host.token_texts(*vocabulary), run.tokens)),
            names=model.dictionaries.label,
            dictionary_folder=None if folder is None else str(folder),
            neuronpedia=dict(model.dictionaries.neuronpedia),
            select=select,
        ),
        **host.graph_arguments(
            scan=model.scan,
            input_string=host.decoder(*vocabulary).decode(run.tokens),
            input_tokens=run.tokens,
            logit_targets=targets.logit_targets,
            logit_probabilities=targets.logit_probabilities.to(filled.adjacency),
            vocab_size=transformer.cfg.d_vocab,
            active_features=torch.stack(
                [active.checkpoint[nodes] - 1, active.position[nodes], active.feature[nodes]], 1
            ),
            activation_values=active.activation[nodes].float(),
            selected_features=selected,
            adjacency_matrix=filled.adjacency,
            cfg=transformer.cfg,
        ),
    )
