"""A transcoder graph that knows its heads: circuit-tracer's own graph, explained.

Its edges cross many blocks, so no single head has *the* loading of one; what is exact is the split
at every block (attribution/README.md, section 4), and QK attributions over the graph's own nodes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from circuit_tracer_qk.attribution.batches import Batch, one_by_one
from circuit_tracer_qk.attribution.graph import ExplainedGraph
from circuit_tracer_qk.attribution.links import Kept, Links
from circuit_tracer_qk.attribution.qk import Place
from circuit_tracer_qk.attribution.transcoder.cuts import Listing, Splits
from circuit_tracer_qk.attribution.transcoder.links import transcoder_links
from circuit_tracer_qk.attribution.transcoder.nodes import (
    TranscoderRun,
    read_transcoder_graph,
    refuse_shared_rotary,
)
from circuit_tracer_qk.attribution.transcoder.qk import TranscoderQK
from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.base.memory import fitting
from circuit_tracer_qk.base.precision import exactly
from circuit_tracer_qk.host import gemma3
from circuit_tracer_qk.host import graph as host
from circuit_tracer_qk.model.check import check_patterns, say_rounding
from circuit_tracer_qk.model.supported import refuse_attention

AGREES = 1e-3  # of the largest edge: what our sweeps may differ from the host's backward passes
AGREES_HALF = 5e-2  # the same for a model in half precision, whose own passes round
CHECKED = 256  # edges compared


class TranscoderGraph(ExplainedGraph):
    """A ``circuit_tracer.Graph`` of transcoder features, with what carried its edges.

    Nodes and adjacency are circuit-tracer's own. Saved with ``to_pt`` it is a plain graph again;
    :func:`explain_graph` explains one that was loaded.

    Args:
        parts: what every node writes and reads.
        token_strings: the prompt's tokens as text.
        rounded: the model is in half precision.
        **arguments: of ``circuit_tracer.Graph``.

    >>> issubclass(ctqk.TranscoderGraph, ctqk.ExplainedGraph)
    True
    """

    kind = "transcoder"
    writes_examples = False

    def __init__(
        self, parts: TranscoderRun, token_strings: list[str], rounded: bool, **arguments: Any
    ) -> None:
        super().__init__(**arguments)
        self.parts = parts
        self.rounded = rounded
        self.token_strings = token_strings

    @cached_property
    def scores(self) -> TranscoderQK:
        return TranscoderQK(self.parts, self.label, self.rounded)

    def label(self, checkpoint: int, feature: int) -> str:
        """Features of transcoders have no labels here: the page finds them by scan and index."""
        return ""

    def batches(self, places: Iterable[Place]) -> Iterator[Batch]:
        return one_by_one(self.scores, places)

    def links(self, kept: Kept) -> Links:
        splits = self.split(kept.sources, kept.targets, Listing(), progress=True)
        return transcoder_links(splits, kept, self.positions)

    @exactly
    def split(
        self,
        sources: Sequence[int] | Tensor,
        targets: Sequence[int] | Tensor,
        listing: Listing | None = None,
        progress: bool = False,
    ) -> Splits:
        """How edges split over heads, at every block between their ends.

        Parts are in units of the edge: ``attention_free`` and all of ``last`` sum to it, and so do
        ``through`` and the bypass of any one block (attribution/README.md, section 4).

        Args:
            sources, targets: (n,) node indices in adjacency order, pairwise.
            listing: list the largest heads with the positions between which they carried.
            progress: show it, where it takes longer than two seconds.

        Raises:
            UserError: a node out of range, a source that writes nothing or a target that reads
                nothing.

        >>> listing = ctqk.Listing(heads=2, pairs=1)
        >>> splits = transcoder_graph.split([0], [n], listing)  # doctest: +SKIP
        """
        source, target = self.source_nodes(sources), self.target_nodes(targets)
        return self.parts.split(source, target, listing, progress)


def check_model(model: Any) -> None:
    """Refuse a replacement model whose graphs cannot be explained exactly.

    Raises:
        UserError: the reason and the way out.
    """
    # circuit-tracer's other backends have transcoders too, and blocks of Hugging Face's modules
    if not hasattr(model, "transcoders") or not isinstance(model, HookedTransformer):
        raise UserError(
            f"{type(model).__name__} is no replacement model of circuit-tracer's TransformerLens "
            'backend: load it with backend="transformerlens" to explain its heads.'
        )
    host.check_layers(model.transcoders, model.cfg.n_layers)
    refuse_attention(model)
    refuse_shared_rotary(model)


@fitting("this graph's explanation", "make the graph with a smaller max_feature_nodes")
@exactly
@torch.no_grad()
def explain_graph(graph: host.Graph, model: Any) -> TranscoderGraph:
    """Explain a graph that circuit-tracer made (paper, "Head loadings" and "QK attributions").

    Token edges of Gemma-3 that its nnsight backend made without the embeddings' factor get it.

    Args:
        graph: of ``circuit_tracer.attribute``, or loaded from a file. It is left as it is.
        model: the replacement model that it was made with (TransformerLens backend).

    Raises:
        UserError: another model, a backend or architecture that is not done exactly, targets that
            are no tokens, or edges that our own sweeps do not reproduce.

    Warns:
        EmbeddingScaleWarning: token edges were multiplied by the embeddings' factor.

    >>> import circuit_tracer
    >>> stock = circuit_tracer.attribute(prompt, replacement_model)  # doctest: +SKIP
    >>> ctqk.explain_graph(stock, replacement_model).qk(1, 2, 14, 6)  # doctest: +SKIP
    """
    check_model(model)
    W_U = model.unembed.W_U.detach()
    ids = [int(target[1]) for target in graph.logit_targets]
    if max(ids) >= W_U.shape[1]:
        raise UserError(
            "this graph has targets that are no tokens, whose directions it does not keep: "
            "attribute tokens to explain their heads."
        )
    columns = (W_U[:, ids] - W_U.mean(1, keepdim=True)).T
    parts = read_transcoder_graph(model, graph, columns)
    exact = model.cfg.dtype in (torch.float32, torch.float64)
    check_patterns(parts.blocks.heads, str(model.cfg.model_name), model.cfg.dtype)
    say_rounding(parts.blocks.heads, model.cfg.dtype)
    text_of = host.token_texts(model.tokenizer, model.cfg.d_vocab)
    explained = TranscoderGraph(
        parts,
        [text_of(token) for token in graph.input_tokens],
        not exact,
        **host.arguments_of(graph),
    )
    if gemma3.is_gemma_3(model.cfg):
        _put_token_edges_right(explained, gemma3.embedding_factor(model.cfg))
    _check_edges(explained)
    return explained


def _put_token_edges_right(graph: TranscoderGraph, factor: float) -> None:
    """Multiply token edges by the embeddings' factor where the graph was made without it.

    Warns:
        EmbeddingScaleWarning: that it was.
    """
    n_pos = len(graph.input_tokens)
    last = len(graph.adjacency_matrix) - len(graph.logit_targets)
    tokens = torch.arange(last - n_pos, last)
    ours, theirs = _largest(graph, tokens)
    size = ours.abs().sum()  # of many, so that an edge that nearly cancels decides nothing
    if float((ours - theirs).abs().sum()) <= 0.5 * size or float(
        (ours - factor * theirs).abs().sum()
    ) > size * _limit(graph):
        return
    scaled = graph.adjacency_matrix.clone()
    scaled[:, tokens] *= factor
    graph.adjacency_matrix = scaled
    warnings.warn(
        "the graph's token edges lack the factor of Gemma-3's embeddings, as those of "
        f"circuit-tracer's nnsight backend do: they are multiplied by {factor:.4g} here",
        gemma3.EmbeddingScaleWarning,
        stacklevel=2,
    )


def _limit(graph: TranscoderGraph) -> float:
    return AGREES_HALF if graph.rounded else AGREES


def _largest(graph: TranscoderGraph, sources: Tensor) -> tuple[Tensor, Tensor]:
    """The largest edges from some nodes that are not zero: ours, and the host's."""
    edges = graph.adjacency_matrix[:, sources].double().cpu()
    flat = edges.abs().flatten().topk(min(CHECKED, edges.numel())).indices
    target, column = flat // edges.shape[1], flat % edges.shape[1]
    theirs = edges[target, column]
    joined = theirs != 0
    if not bool(joined.any()):
        return theirs[joined], theirs[joined]
    ours = graph.split(sources[column[joined]], target[joined]).weight.double().cpu()
    return ours, theirs[joined]


def _check_edges(graph: TranscoderGraph) -> None:
    """Hold some of the largest edges to the host's: one model fact read wrongly would show."""
    ours, theirs = _largest(graph, torch.arange(len(graph.adjacency_matrix)))
    if len(theirs) == 0:
        return
    off = float((ours - theirs).abs().max() / theirs.abs().max())
    limit = _limit(graph)
    if not off <= limit:
        raise UserError(
            f"our sweeps give other edges than circuit-tracer ({off:.1e} of the largest, limit "
            f"{limit:.0e}): the graph was made with another model or other transcoders, or in "
            "half precision; make it again in float32 with the ones named."
        )
