"""Everything this package touches of circuit-tracer, in one place.

circuit-tracer exists in several trees (PyPI's fork, upstream). Features are detected, never
versions, and its functions are called with keyword arguments.
"""

from __future__ import annotations

import inspect
import json
import os
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from circuit_tracer.attribution.targets import AttributionTargets
from circuit_tracer.frontend.graph_models import Metadata, Model, Node, QParams
from circuit_tracer.graph import (
    Graph,
    PruneResult,
    compute_graph_scores,
    compute_node_influence,
    prune_graph,
)
from torch import Tensor

from circuit_tracer_qk.base import digests
from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.base.memory import fitting, is_full
from circuit_tracer_qk.host.gemma3 import name_for_rules


def _accepted(function: Callable[..., Any], **offered: Any) -> dict[str, Any]:
    """The offered keyword arguments that ``function`` takes."""
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in offered.items() if name in parameters}


def graph_arguments(*, scan: str, **arguments: Any) -> dict[str, Any]:
    """Keyword arguments of this host's ``Graph``; ``scan`` is ``scan_name`` in newer trees."""
    return _accepted(Graph.__init__, scan=scan, scan_name=scan, **arguments)


def graph_scan(graph: Graph) -> str:
    """The identifier of the dictionaries that a graph was made with."""
    scan = getattr(graph, "scan", None) or getattr(graph, "scan_name", None) or "unknown"
    return scan if isinstance(scan, str) else "-".join(scan)


def named_scan(graph: Graph, scan: str | list[str] | None = None) -> tuple[str, list[str]]:
    """``metadata.scan`` and ``transcoder_list`` as circuit-tracer writes them.

    A list of transcoders gets a name of its own: theirs joined, hashed so that it is the same in
    every process.
    """
    named = scan or getattr(graph, "scan", None) or getattr(graph, "scan_name", None) or "unknown"
    if isinstance(named, str):
        return named, []
    joined = "-".join(named)
    return f"custom-{int(sha256(joined.encode()).hexdigest()[:15], 16)}", list(named)


@contextmanager
def _float32_by_default() -> Iterator[None]:
    """circuit-tracer's scores allocate in the default dtype and need the adjacency's float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def prune(
    graph: Graph, node_threshold: float, edge_threshold: float, adjacency: Tensor | None = None
) -> PruneResult:
    """circuit-tracer's pruning: masks of the nodes and edges kept, and cumulative influence.

    Args:
        graph: any graph.
        node_threshold, edge_threshold: share of influence kept.
        adjacency: edges between the same nodes, in place of the graph's own.
    """
    if adjacency is not None:
        graph = with_edges(graph, adjacency)
    with _float32_by_default():
        return prune_graph(
            graph=graph, node_threshold=node_threshold, edge_threshold=edge_threshold
        )


def with_edges(graph: Graph, adjacency: Tensor) -> Graph:
    """A graph of the same nodes with other edges."""
    arguments = arguments_of(graph)
    arguments["adjacency_matrix"] = adjacency
    return Graph(**arguments)


def node_influence(graph: Graph, adjacency: Tensor | None = None) -> Tensor:
    """(n_nodes,) of every node on the logits, which begin with their probabilities.

    Args:
        graph: any graph.
        adjacency: edges between the same nodes, in place of the graph's own.
    """
    edges = graph.adjacency_matrix if adjacency is None else adjacency
    weights = _logit_weights(graph)
    return compute_node_influence(edges, weights) + weights


def graph_scores(graph: Graph) -> tuple[float, float]:
    """circuit-tracer's replacement and completeness score."""
    with _float32_by_default():
        return compute_graph_scores(graph=graph)


def _logit_weights(graph: Graph) -> Tensor:
    """(n_nodes,) probabilities of the logits, 0 elsewhere."""
    weights = graph.adjacency_matrix.new_zeros(len(graph.adjacency_matrix))
    weights[-len(graph.logit_targets) :] = graph.logit_probabilities.to(weights)
    return weights


def tokenize(
    prompt: str | Tensor | list[int], tokenizer: Any, device: Any, model_name: str
) -> Tensor:
    """(n_pos,) ids of a prompt, with a token in front that stands for its beginning.

    Text begins with the tokenizer's BOS, whatever its id: circuit-tracer takes an id of 0 for none.
    For a tokenizer without a BOS, and for ids, circuit-tracer's rule holds: a special token is put
    in front of what begins with none.

    Warns:
        FirstTokenWarning: naming the token in front that is not the tokenizer's BOS.

    Raises:
        UserError: an empty prompt, text for a model without a tokenizer, or what is no prompt.
    """
    empty = "The prompt is empty: give at least one token of text."
    if isinstance(prompt, str):
        if not prompt:
            raise UserError(empty)
        if tokenizer is None:
            raise UserError(
                "This model has no tokenizer, so a text prompt cannot be read: give token ids, or "
                "add the tokenizer's files to the model's folder."
            )
        try:
            ids = torch.tensor(tokenizer(prompt, add_special_tokens=False).input_ids)
        except (TypeError, UnicodeError):  # half a surrogate pair, or bytes that were no UTF-8
            raise UserError("The prompt is not valid Unicode text: check its encoding.") from None
    else:
        try:
            ids = torch.as_tensor(prompt)
        except (TypeError, ValueError, RuntimeError):
            raise UserError(
                f"The prompt must be text or integer token ids, not {type(prompt).__name__} such "
                f"as {str(prompt)[:40]!r}."
            ) from None
    if ids.numel() == 0:
        raise UserError(empty)
    whole = not ids.is_floating_point() and not ids.is_complex() and ids.dtype != torch.bool
    if not whole or ids.ndim not in (1, 2) or (ids.ndim == 2 and len(ids) > 1):
        raise UserError(
            f"The prompt must be one sequence of integer token ids, not {ids.dtype} of shape "
            f"{list(ids.shape)}."
        )
    ids = ids.reshape(-1).long().to(device)
    if tokenizer is None:
        return ids
    is_text = isinstance(prompt, str)
    tokens = _with_first_token(ids, is_text, tokenizer, model_name)
    bos = _bos_id(tokenizer)
    if len(tokens) > len(ids) and int(tokens[0]) != bos:
        first = f"`{tokenizer.decode([int(tokens[0])])}` (id {int(tokens[0])})"
        warnings.warn(
            f"the tokenizer has no BOS: {first} stands in front of the prompt"
            if bos is None
            else f"circuit-tracer's {first} stands in front of the prompt's token ids, which do "
            f"not begin with the BOS (id {bos})",
            FirstTokenWarning,
            stacklevel=3,
        )
    return tokens


def prompt_ids(prompt: str | Tensor | list[int], model: Any) -> Tensor:
    """(n_pos,) ids of a prompt for a replacement model: circuit-tracer leaves them as they are.

    Raises:
        UserError: a prompt that cannot be read, or a single token.
    """
    name = str(model.cfg.model_name)
    if getattr(model, "backend", None) != "nnsight":  # whose models stay circuit-tracer's own
        name = name_for_rules(model.cfg, model.tokenizer)
    tokens = tokenize(prompt, model.tokenizer, "cpu", name)
    if len(tokens) == 1:
        raise UserError(
            "The prompt is a single token, which circuit-tracer cannot attribute: give one more."
        )
    return tokens


class FirstTokenWarning(UserWarning):
    """The token in front of a prompt is not a BOS of the tokenizer's."""


def _bos_id(tokenizer: Any) -> int | None:
    """The tokenizer's BOS; None where TransformerLens put the end of text in its place."""
    bos = tokenizer.bos_token_id
    stand_in = getattr(tokenizer, "init_kwargs", {"bos_token": bos}).get("bos_token") is None
    return None if stand_in and bos == tokenizer.eos_token_id else bos


def _with_first_token(ids: Tensor, is_text: bool, tokenizer: Any, model_name: str) -> Tensor:
    """(n_pos,) ids, a special token in front of those that need one."""
    tokens, bos = _by_host(ids, tokenizer, model_name), _bos_id(tokenizer)
    if is_text and bos is not None:
        first = None if int(ids[0]) == bos else bos
    elif tokens is not None:
        return tokens
    else:  # circuit-tracer skips a token whose id is 0
        first = 0 if 0 in tokenizer.all_special_ids else None
        if first is None:
            raise UserError(
                "This model's tokenizer has no special token to put in front of the prompt: give "
                "token ids that begin with one."
            )
    return ids if first is None else torch.cat([ids.new_tensor([first]), ids])


def _by_host(ids: Tensor, tokenizer: Any, model_name: str) -> Tensor | None:
    """circuit-tracer's rule for the first token; None where it finds no token to put there."""
    try:
        from circuit_tracer.replacement_model.common import ensure_tokenized
    except ImportError:  # older trees keep it on the model's class
        ensure_tokenized = _ensure_tokenized_of_class
    alone = len(ids) == 1  # which circuit-tracer squeezes away: two of them, and one off again
    try:
        tokens = ensure_tokenized(
            prompt=ids.repeat(2) if alone else ids,
            tokenizer=tokenizer,
            device=ids.device,
            model_name=model_name,
        )
    except StopIteration:
        return None
    except AssertionError as error:  # gemma-3-it wants its chat prefix
        raise UserError(f"The prompt does not suit {model_name}: {error}") from None
    return tokens[:-1] if alone else tokens


def _ensure_tokenized_of_class(
    *, prompt: Tensor, tokenizer: Any, device: Any, model_name: str
) -> Tensor:
    from types import SimpleNamespace

    from circuit_tracer.replacement_model import replacement_model_transformerlens as home

    cfg = SimpleNamespace(device=device, model_name=model_name)
    model = SimpleNamespace(tokenizer=tokenizer, cfg=cfg)
    return home.TransformerLensReplacementModel.ensure_tokenized(model, prompt)  # type: ignore


class _Ids:
    """Stands in for the tokenizer of a model that has none: tokens are shown by their ids."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def decode(self, ids: Any) -> str:
        return "".join(f"<{int(i)}>" for i in torch.as_tensor(ids).reshape(-1))

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        raise ValueError(f"this model has no tokenizer to read {text!r} with; give token ids")


def decoder(tokenizer: Any, vocab_size: int) -> Any:
    """The tokenizer, or a stand-in that shows ids where the model has none."""
    return _Ids(vocab_size) if tokenizer is None else tokenizer


def token_texts(tokenizer: Any, vocab_size: int) -> Callable[[Any], str]:
    """From a token's id to its text, or to ``<id>`` where it decodes to nothing."""
    decode = decoder(tokenizer, vocab_size).decode
    return lambda token: decode([int(token)]) or f"<{int(token)}>"


def logit_texts(graph: Graph) -> list[tuple[str, int]]:
    """The text and the id of every logit's token; ``<id>`` is the text of one without any."""
    return [(t.token_str or f"<{t.vocab_idx}>", int(t.vocab_idx)) for t in graph.logit_targets]


def token_id(token: str | int, tokenizer: Any, vocab_size: int) -> int:
    """The id of one token, given as its id or its text.

    Text is looked up in the vocabulary as it is written (a leading space matters); what is not
    there is encoded and must give one token.

    Raises:
        UserError: text that is not one token, or an id out of range.
    """
    if not isinstance(token, str):
        if isinstance(token, bool) or not hasattr(token, "__index__"):
            raise UserError(f"{token!r} is no token: give its text or its id.")
        if not 0 <= int(token) < vocab_size:
            raise UserError(
                f"token id {token} is out of range: the vocabulary has ids 0 to {vocab_size - 1}."
            )
        return int(token)
    if tokenizer is None:
        raise UserError(f"this model has no tokenizer to read {token!r} with: give the token's id.")
    vocabulary = tokenizer.get_vocab()
    # SentencePiece and byte-level BPE write a space as one of these
    for space in (" ", "\u2581", "\u0120"):
        if (written := token.replace(" ", space)) in vocabulary:
            return vocabulary[written]
    ids = tokenizer(token, add_special_tokens=False).input_ids
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise UserError(
            f"{token!r} is not one token of this model's vocabulary: give one token (a leading "
            "space matters) or its id."
        )
    return ids[0]


def logit_targets(
    *,
    attribution_targets: Any,
    logits: Tensor,
    unembed: Tensor,
    tokenizer: Any,
    max_n_logits: int,
    desired_logit_prob: float,
) -> AttributionTargets:
    """circuit-tracer's choice of logits: their tokens, probabilities and demeaned columns.

    Args:
        attribution_targets, max_n_logits, desired_logit_prob: as in ``circuit_tracer.attribute``.
        logits: (d_vocab,) of the last position.
        unembed: (d_vocab, d_model), the orientation that circuit-tracer tells by its first size
            even where the two are equal.
        tokenizer: the model's, or None.

    Raises:
        UserError: targets that circuit-tracer refuses.
    """
    if isinstance(attribution_targets, Tensor) and (
        attribution_targets.ndim != 1
        or attribution_targets.numel() == 0
        or attribution_targets.is_floating_point()
    ):
        raise UserError(
            "attribution_targets must be a list of token ids, not a tensor of shape "
            f"{list(attribution_targets.shape)} and {attribution_targets.dtype}."
        )
    try:
        targets = AttributionTargets(
            attribution_targets=attribution_targets,
            logits=logits,
            unembed_proj=unembed,
            tokenizer=decoder(tokenizer, len(logits)),
            max_n_logits=min(max_n_logits, len(logits)),
            desired_logit_prob=desired_logit_prob,
        )
    except (ValueError, TypeError, AssertionError, IndexError, RuntimeError) as error:
        raise UserError(f"attribution_targets cannot be used: {error}") from error
    if targets.logit_vectors.shape[1:] != unembed.shape[1:]:
        raise UserError(
            f"attribution_targets have vectors of width {targets.logit_vectors.shape[-1]}, and the "
            f"model's is {unembed.shape[1]}: give directions of the residual stream."
        )
    return targets


def key_value_cache(model: Any) -> Any:
    """An empty cache of keys and values for one sequence of a TransformerLens model."""
    import transformer_lens

    names = ("TransformerLensKeyValueCache", "HookedTransformerKeyValueCache")
    kind = next(k for k in (getattr(transformer_lens, n, None) for n in names) if k is not None)
    return kind.init_cache(model.cfg, model.W_E.device, batch_size=1)


def check_layers(transcoders: Any, n_layers: int) -> None:
    """Refuse transcoders that are not one for every layer of their model.

    Raises:
        UserError: naming the first layer that has none.
    """
    n = transcoders.n_layers
    if n != n_layers:
        problem = f"layer {n} has none" if n < n_layers else "they are another model's"
        raise UserError(
            f"the transcoders are of {n} layers and the model has {n_layers}: {problem}; give one "
            "for every layer."
        )


class TranscoderNodes(NamedTuple):
    """A replacement model's own reading of a prompt, before any attribution.

    Attributes:
        active: (n, 3) layer, position and feature of every active feature, in the graph's order.
        encoders: (n, d_model) their encoder rows.
        decoders: (m, d_model) decoder vectors times activations, one for every block written to.
        decoder_feature: (m,) the active feature of each.
        decoder_layer, decoder_position: (m,) where it is written.
        errors: (n_layers, n_pos, d_model) what the transcoders miss.
        tokens: (n_pos, d_model) token embeddings.
        activations: (n,) of the active features.
    """

    active: Tensor
    encoders: Tensor
    decoders: Tensor
    decoder_feature: Tensor
    decoder_layer: Tensor
    decoder_position: Tensor
    errors: Tensor
    tokens: Tensor
    activations: Tensor


@torch.no_grad()
def transcoder_nodes(model: Any, tokens: Tensor) -> TranscoderNodes:
    """What circuit-tracer attributes to and from, by its own set-up of a prompt.

    Args:
        model: a replacement model of the TransformerLens backend.
        tokens: (n_pos,) ids.
    """
    context = model.setup_attribution(tokens)
    matrix = context.activation_matrix.coalesce()
    layer, position = context.decoder_locations
    nodes = TranscoderNodes(
        active=matrix.indices().T,
        encoders=context.encoder_vecs,
        decoders=context.decoder_vecs,
        decoder_feature=torch.as_tensor(context.encoder_to_decoder_map),
        decoder_layer=torch.as_tensor(layer),
        decoder_position=torch.as_tensor(position),
        errors=context.error_vectors,
        tokens=context.token_vectors,
        activations=matrix.values(),
    )
    return TranscoderNodes(*(part.to(tokens.device) for part in nodes))  # the host mixes devices


def transcoder_biases(model: Any) -> Tensor:
    """(n_layers, d_model) decoder biases of a replacement model's transcoders."""
    transcoders = model.transcoders
    if hasattr(transcoders, "b_dec"):
        return transcoders.b_dec.detach()
    return torch.stack([transcoder.b_dec.detach() for transcoder in transcoders])


def transcoder_hooks(model: Any) -> tuple[str, str]:
    """Where a replacement model's transcoders read and write, as circuit-tracer names it."""
    return model.feature_input_hook, model.feature_output_hook.removesuffix(".hook_out_grad")


def skip_weights(model: Any) -> list[Tensor | None]:
    """(d_model, d_model) skip of every block, acting as ``x @ skip``; None without one."""
    n_layers, transcoders = model.cfg.n_layers, model.transcoders
    if not transcoders.skip_connection:
        return [None] * n_layers
    eye = torch.eye(model.cfg.d_model, dtype=model.cfg.dtype, device=model.W_E.device)
    with torch.no_grad():  # asked of the host itself: its sets differ in which side they multiply
        return [transcoders.compute_skip(layer, eye) for layer in range(n_layers)]


def save_stock(graph: Graph, file: Any) -> None:
    """Write the ``.pt`` that this host's ``Graph.to_pt`` writes, to an open file or a path."""
    Graph.to_pt(graph, file)


def load_stock(path: Any, device: Any, trust: bool = False) -> dict[str, Any]:
    """The keyword arguments of the ``Graph`` in a ``.pt``; see :func:`load_graph`."""
    return arguments_of(load_graph(path, device, trust))


@fitting("this graph", "load it on a machine with more memory, or make a smaller one")
def load_graph(path: Any, device: Any = "cpu", trust: bool = False) -> Graph:
    """A graph that this host, or another tree of it, saved.

    Only tensors, plain values and the host's own two classes are read, so that nothing in the file
    is run.

    Args:
        path: the ``.pt``.
        device: where its tensors go.
        trust: read objects of any class, as circuit-tracer does: the file can then run code.

    Raises:
        UserError: a file that is missing, damaged, no graph, or wants another class.
    """
    path = Path(path)
    if not os.path.isfile(path):
        raise UserError(f"there is no graph file {path}: give the .pt that was saved.")
    _check_archive(path)
    try:
        with torch.serialization.safe_globals(_saved_classes()):
            if not trust and (names := torch.serialization.get_unsafe_globals_in_checkpoint(path)):
                raise UserError(
                    f"{path} wants {', '.join(sorted(names))}, which is no part of a graph and "
                    "could run code: make the graph again, or load it with --trust (trust=True in "
                    "Python) if you know who wrote it."
                )
            saved = torch.load(path, map_location=device, weights_only=not trust)
    except UserError:
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        if is_full(error):
            raise
        raise _damaged(path, error) from error
    return _graph_of(saved, path)


def _saved_classes() -> list[Any]:
    """The classes that a graph's ``.pt`` holds objects of, those that this tree has."""
    from circuit_tracer import graph as tree

    names = ("LogitTarget", "UnifiedConfig", "HookedTransformerConfig")
    return [getattr(tree, name) for name in names if hasattr(tree, name)]


def _check_archive(path: Path) -> None:
    """Check what torch does not: that the bytes are those that were written.

    Raises:
        UserError: it is no whole file of ``torch.save``.
    """
    try:
        if not zipfile.is_zipfile(path):
            raise UserError(
                f"{path} is no graph file, or damaged: it is no whole archive of torch.save; make "
                "the graph again."
            )
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except UserError:
        raise
    except Exception as error:  # a damaged archive raises nearly anything
        raise _damaged(path, error) from error
    if bad is not None:
        raise UserError(f"{path} is damaged ({bad} has changed): make the graph again.")


def _damaged(path: Path, error: Exception) -> UserError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return UserError(f"{path} is damaged ({reason:.200}): make the graph again.")


def _graph_of(saved: Any, path: Path) -> Graph:
    """The graph of what a ``.pt`` holds.

    Raises:
        UserError: it holds something else, or fields that do not belong together.
    """
    parameters = inspect.signature(Graph.__init__).parameters.values()
    needed = [p.name for p in parameters if p.default is p.empty and p.name != "self"]
    missing = [name for name in needed if not isinstance(saved, dict) or name not in saved]
    if missing:
        kind = "" if isinstance(saved, dict) else f"holds an object of {type(saved).__name__}, "
        raise UserError(
            f"{path} is no graph of circuit-tracer: it {kind or 'has '}no {missing[0]}; give the "
            ".pt that `attribute -o` wrote."
        )
    targets = saved.get("logit_targets")
    if isinstance(targets, Tensor):  # as older trees saved them
        from circuit_tracer.attribution.targets import LogitTarget

        saved["logit_targets"] = [LogitTarget("", int(i)) for i in targets.flatten().tolist()]
    problem = _misfit(saved)
    if problem is not None:
        raise UserError(f"{path} is no whole graph: {problem}; make the graph again.")
    try:
        return Graph(**saved)
    except Exception as error:  # whatever its configuration or a field of another tree leads to
        raise _damaged(path, error) from error


def _misfit(saved: dict[str, Any]) -> str | None:
    """Which field of a saved graph cannot belong to the others, None if all do."""
    ranks = {
        "input_tokens": 1,
        "active_features": 2,
        "adjacency_matrix": 2,
        "selected_features": 1,
        "activation_values": 1,
        "logit_probabilities": 1,
    }
    for name, rank in ranks.items():
        value = saved.get(name)
        if not isinstance(value, Tensor) or value.ndim != rank:
            return f"{name} should be a tensor of {rank} axes"
        whole = name in ("input_tokens", "active_features", "selected_features")
        if whole == value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            return f"{name} should hold {'whole' if whole else 'floating-point'} numbers"
    cfg = saved["cfg"]
    n_layers = getattr(cfg, "n_layers", getattr(cfg, "num_hidden_layers", None))
    if isinstance(n_layers, bool) or not isinstance(n_layers, int):
        return "cfg should be a model's configuration"
    if not isinstance(saved["input_string"], str):
        return "input_string should be text"
    targets = saved.get("logit_targets", saved.get("logit_tokens"))
    if not isinstance(targets, list | Tensor) or len(targets) == 0:
        return "logit_targets should be a list of tokens"
    if any(not isinstance(getattr(t, "vocab_idx", t), int | Tensor) for t in targets):
        return "logit_targets should be a list of tokens"
    n_pos, n_logits = len(saved["input_tokens"]), len(targets)
    n_active, selected = len(saved["active_features"]), saved["selected_features"]
    n = len(selected) + n_layers * n_pos + n_pos + n_logits
    shapes = {
        "active_features": (n_active, 3),
        "adjacency_matrix": (n, n),
        "logit_probabilities": (n_logits,),
    }
    for name, shape in shapes.items():
        if tuple(saved[name].shape) != shape:
            return (
                f"{name} should be of shape {list(shape)} and is of shape {list(saved[name].shape)}"
            )
    if len(saved["activation_values"]) not in (n_active, len(selected)):
        return f"activation_values should be of shape {[n_active]}"
    if len(selected) and not 0 <= int(selected.min()) <= int(selected.max()) < n_active:
        return f"selected_features should lie within 0 to {n_active - 1}"
    return None


def graph_digest(graph: Graph) -> str:
    """A hash of all fields of a graph, the same in every process."""
    fields = {name: value for name, value in arguments_of(graph).items() if "scan" not in name}
    hashes = {"scan": graph_scan(graph)}
    for name, value in fields.items():
        if name == "cfg":
            plain = str, int, float, torch.dtype  # what other objects are called may differ
            value = {k: str(v) for k, v in sorted(vars(value).items()) if isinstance(v, plain)}
        hashes[name] = (
            digests.of_tensor(value)
            if isinstance(value, Tensor)
            else digests.of_text(json.dumps(value))
        )
    return digests.of_text(json.dumps(hashes, sort_keys=True))


def arguments_of(graph: Graph) -> dict[str, Any]:
    """The keyword arguments that make a graph again."""
    names = inspect.signature(Graph.__init__).parameters
    return {name: getattr(graph, name) for name in names if hasattr(graph, name)}


def attribute_transcoders(prompt: Any, model: Any, **options: Any) -> Graph:
    """circuit-tracer's own attribution, with the options that it takes."""
    from circuit_tracer import attribute

    return attribute(prompt=prompt, model=model, **_accepted(attribute, **options))


__all__ = [
    "FirstTokenWarning",
    "Graph",
    "Metadata",
    "Model",
    "Node",
    "PruneResult",
    "QParams",
    "TranscoderNodes",
    "arguments_of",
    "attribute_transcoders",
    "check_layers",
    "decoder",
    "graph_arguments",
    "graph_digest",
    "graph_scan",
    "graph_scores",
    "load_graph",
    "load_stock",
    "logit_targets",
    "logit_texts",
    "named_scan",
    "node_influence",
    "prompt_ids",
    "prune",
    "save_stock",
    "skip_weights",
    "token_texts",
    "tokenize",
    "transcoder_biases",
    "transcoder_hooks",
    "transcoder_nodes",
    "with_edges",
]
