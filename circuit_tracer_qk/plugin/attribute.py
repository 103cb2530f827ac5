"""From a prompt to a graph: which kind it is depends on the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypedDict, overload

import torch
from torch import Tensor

from circuit_tracer_qk.attribution.residual.attribution import attribute_residual
from circuit_tracer_qk.attribution.residual.graph import ResidualGraph
from circuit_tracer_qk.attribution.residual.model import ResidualModel
from circuit_tracer_qk.attribution.transcoder import graph as transcoder
from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.base.memory import fitting
from circuit_tracer_qk.base.rules import check
from circuit_tracer_qk.base.selection import CIRCUIT_TRACER, EXPLAINED
from circuit_tracer_qk.host import graph as host

if TYPE_CHECKING:
    from typing_extensions import Unpack


class AttributeOptions(TypedDict, total=False):
    """The keyword arguments of :func:`attribute`."""

    attribution_targets: Any
    max_n_logits: int
    desired_logit_prob: float
    batch_size: int
    max_feature_nodes: int | None
    offload: str | None
    verbose: bool
    update_interval: int
    qk: bool
    select: str | None


@overload
def attribute(
    prompt: str | Tensor | list[int], model: ResidualModel, **options: Unpack[AttributeOptions]
) -> ResidualGraph: ...


@overload
def attribute(
    prompt: str | Tensor | list[int], model: Any, **options: Unpack[AttributeOptions]
) -> transcoder.TranscoderGraph | host.Graph: ...


@fitting(
    "this prompt's graph", "give a shorter prompt, or smaller max_feature_nodes and batch_size"
)
def attribute(
    prompt: str | Tensor | list[int],
    model: Any,
    *,
    attribution_targets: Any = None,
    max_n_logits: int = 10,
    desired_logit_prob: float = 0.95,
    batch_size: int = 512,
    max_feature_nodes: int | None = None,
    offload: str | None = None,
    verbose: bool = False,
    update_interval: int = 4,
    qk: bool = True,
    select: str | None = None,
) -> host.Graph:
    """Attribute a prompt's logits to features, with heads (paper, "Head loadings").

    Args:
        prompt: text, token ids or a tensor of them.
        model: of :func:`circuit_tracer_qk.load_model`; or a replacement model of circuit-tracer's,
            whose graph is circuit-tracer's own, then explained (:func:`explain_graph`).
        attribution_targets: which logits, as in ``circuit_tracer.attribute``.
        max_n_logits, desired_logit_prob: how many logits when they are not named.
        batch_size: target rows taken at once; bounds memory.
        max_feature_nodes: keep the features of the largest influence; None or 0 keeps all.
        offload: accepted as in ``circuit_tracer.attribute``; there is no backward pass through
            the sequence, so nothing needs to be offloaded.
        verbose: show progress.
        update_interval: accepted as in ``circuit_tracer.attribute``; influence is one exact sweep
            here, so no ranking needs updating.
        qk: explain circuit-tracer's own graphs; a residual graph always knows its heads.
        select: how features are chosen, here and for the graph's files: "explained" (the default
            of residual graphs), by influence shared out over features and tokens only, or
            "circuit-tracer", by its influence, of which errors take their share
            (attribution/README.md, "Which nodes"). Transcoder graphs are always circuit-tracer's.

    Returns:
        A genuine ``circuit_tracer.Graph``, edges in model units; the sum of a target's edges over features, decoder
        biases, errors and positions is <gradient, residual stream> (completeness).

    Raises:
        UserError: a prompt, targets or dictionaries that cannot be attributed exactly.

    >>> aunt = ctqk.attribute(prompt, model, max_feature_nodes=200)
    >>> aunt.n_features, tuple(aunt.adjacency_matrix.shape)
    (200, (276, 276))
    """
    shared = {"attribution_targets": attribution_targets} | check(
        max_n_logits=max_n_logits,
        desired_logit_prob=desired_logit_prob,
        batch_size=batch_size,
        max_feature_nodes=max_feature_nodes,
        verbose=verbose,
    )
    check(qk=qk)
    if isinstance(model, ResidualModel) or not hasattr(model, "transcoders"):
        return attribute_residual(prompt, model, **shared, select=select or EXPLAINED)
    if select not in (None, CIRCUIT_TRACER):
        raise UserError(
            f"select is {select!r}, and circuit-tracer chooses the nodes of transcoder graphs: leave "
            "select out."
        )
    if qk:
        transcoder.check_model(model)  # before the work
    # circuit-tracer's backward passes need gradients, whatever the caller's mode
    with torch.inference_mode(False), torch.enable_grad():
        made = host.attribute_transcoders(
            host.prompt_ids(prompt, model),
            model,
            **shared,
            offload=offload,
            update_interval=update_interval,
        )
    return transcoder.explain_graph(made, model) if qk else made
