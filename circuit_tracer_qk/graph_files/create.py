"""Graph files: what circuit-tracer's page shows, with heads on links and QK attributions added.

``graph.schema.json`` describes the graph's file. Of graphs that write their examples
(:attr:`ExplainedGraph.writes_examples`) one file for every feature that the graph mentions lies
beside it, in the folder that its ``scan`` names.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, NamedTuple

from circuit_tracer_qk.attribution.graph import ExplainedGraph
from circuit_tracer_qk.attribution.pruning import ErrorShare, error_share
from circuit_tracer_qk.attribution.residual.graph import load_graph
from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.base.feature_names import checkpoint_name
from circuit_tracer_qk.base.files import check_case, check_folder, check_names, write_together
from circuit_tracer_qk.base.json_text import (
    Encoded,
    encode,
    rounded,
    rounded_all,
    without_collection,
)
from circuit_tracer_qk.base.memory import fitting
from circuit_tracer_qk.base.package import __version__
from circuit_tracer_qk.base.precision import exactly
from circuit_tracer_qk.base.rules import check
from circuit_tracer_qk.base.selection import EXPLAINED
from circuit_tracer_qk.graph_files.feature_files import folder_name, write_features
from circuit_tracer_qk.graph_files.index import add_to_listing, read_listing
from circuit_tracer_qk.graph_files.nodes import mention_nodes, prune
from circuit_tracer_qk.graph_files.select_tables import (
    Attributions,
    Limits,
    select_tables,
)
from circuit_tracer_qk.graph_files.sidecars import (
    FILE_BYTES,
    divide,
    folder_of,
    remove_others,
    sidecars_of,
)
from circuit_tracer_qk.graph_files.tables import TOP_TERMS, Names
from circuit_tracer_qk.host import graph as host

MOSTLY_ERRORS = 0.9
"""Where errors take this share of the influence, little of the graph can be in its file."""
TARGETS = ("cross layer transcoder", "logit")
"""Types of the nodes that have edges into them."""
LIMITS = Limits(tables=512, size=24 << 20, terms=TOP_TERMS)


class ErrorShareWarning(UserWarning):
    """Errors take so much of a graph's influence that its file says little."""


class GraphFiles(NamedTuple):
    """What the files of one graph are.

    Attributes:
        page: the graph's file.
        sidecars: what lies beside it of QK attributions.
        examples: the files of the features that it mentions.
        listed: what the folder's list of graphs says of it.
    """

    page: Path
    sidecars: list[Path]
    examples: list[Path]
    listed: dict[str, Any]


def create_graph_files(
    graph: ExplainedGraph | str | Path,
    slug: str,
    output_path: str | Path,
    node_threshold: float = 0.8,
    edge_threshold: float = 0.98,
    *,
    scan: str | list[str] | None = None,
    qk: bool = True,
    max_tables: int = LIMITS.tables,
    max_bytes: int = LIMITS.size,
    top_terms: int = LIMITS.terms,
    max_file_bytes: int = FILE_BYTES,
    np_model: str | None = None,
) -> Path:
    """Write a graph for circuit-tracer's page, with head loadings and QK attributions.

    Every link's parts sum to its weight (in transcoder graphs, at every block on its way), every
    table's listed terms and ``rest`` to its score. Tables are written for the two largest heads
    (by |part|) of each node's three strongest cross-position links; then for further heads of
    cross-position links, while there are fewer than ``max_tables`` and they take less than
    ``max_bytes``.

    Args:
        graph: of :func:`circuit_tracer_qk.attribute` or :func:`circuit_tracer_qk.explain_graph`,
            or where a residual graph was saved.
        slug: names the file ``<slug>.json``.
        output_path: the folder, made if need be; the page server's data folder.
        scan: names the folder of the features' examples, or in place of the transcoders' own
            scan; the dictionaries' own if left out.
        node_threshold, edge_threshold: share of influence kept, as in circuit-tracer.
        qk: write QK attributions.
        max_tables, max_bytes: limits of the further tables.
        top_terms: how many terms of a table to list, by absolute value.
        max_file_bytes: how long ``<slug>.json`` may become by its tables: those that do not fit,
            the last of the order above, go to one file for each head in ``<slug>.qk``, where
            the page finds them.
        np_model: write the scan and slug that Neuronpedia accepts, for this model id of its.

    Returns:
        The path of ``<slug>.json``. Sidecars of an earlier graph of this slug are removed.

    Raises:
        UserError: a slug, threshold or folder that cannot be used, or a file that cannot be
            written; files that were there before are then whole.

    >>> ctqk.create_graph_files(graph, "aunt", tmp).name
    'aunt.json'
    """
    files = write_graph_files(
        graph,
        slug,
        output_path,
        node_threshold,
        edge_threshold,
        scan=scan,
        qk=qk,
        limits=Limits(max_tables, max_bytes, top_terms),
        max_file_bytes=max_file_bytes,
        np_model=np_model,
    )
    add_to_listing(files.page.parent, [files.listed])
    return files.page


@fitting("the graph's file", "lower node_threshold and edge_threshold, or leave its tables out")
@exactly
def write_graph_files(
    graph: ExplainedGraph | str | Path,
    slug: str,
    output_path: str | Path,
    node_threshold: float,
    edge_threshold: float,
    *,
    scan: str | list[str] | None = None,
    qk: bool = True,
    limits: Limits = LIMITS,
    max_file_bytes: int = FILE_BYTES,
    np_model: str | None = None,
) -> GraphFiles:
    """The files of :func:`create_graph_files`, which the folder's list does not name yet.

    Args:
        limits: of the tables.
        max_file_bytes: as there.

    Raises:
        UserError: as there.
    """
    check_names(slug, np_model)
    thresholds = check(node_threshold=node_threshold, edge_threshold=edge_threshold, qk=qk)
    node_threshold, edge_threshold, _ = thresholds.values()
    check(output_path=output_path, max_file_bytes=max_file_bytes)
    check(max_tables=limits.tables, max_bytes=limits.size, top_terms=limits.terms)
    if isinstance(graph, str | Path):
        graph = load_graph(graph)
    folder = check_folder(output_path)
    check_case(folder, f"{slug}.json")
    read_listing(folder)  # a damaged one is refused before any work
    if not isinstance(graph, ExplainedGraph):
        raise UserError(
            f"{type(graph).__name__} is not explained yet: give circuit_tracer_qk.explain_graph("
            "graph, model)."
        )
    scan_name = folder_name(graph, scan if isinstance(scan, str) else None)
    named_scan, transcoder_list = f"./graph_data/{scan_name}", []
    if not graph.writes_examples:
        named_scan, transcoder_list = host.named_scan(graph, scan)
    metadata = host.Metadata(
        slug=slug if np_model is None else slug.replace(".", "-"),
        scan=np_model or named_scan,
        transcoder_list=transcoder_list,
        prompt_tokens=graph.token_strings,
        prompt=graph.input_string,
        node_threshold=node_threshold,
    )
    path, examples = folder / f"{slug}.json", []
    with without_collection():
        document, names, attributions = _document(
            graph, metadata, edge_threshold, limits if qk else None
        )
        data, sidecars = encode_files(document, attributions, path, max_file_bytes)
    if graph.writes_examples:
        features = names.features.values()
        examples = write_features(graph, folder / scan_name, features, scan_name)
    replace_files(path, data, sidecars)
    # the local page finds the file by its name, also where Neuronpedia's slug differs
    return GraphFiles(
        path, [folder / name for name in sidecars], examples, document["metadata"] | {"slug": slug}
    )


def _document(
    graph: ExplainedGraph, metadata: host.Metadata, edge_threshold: float, limits: Limits | None
) -> tuple[dict[str, Any], Names, Attributions | None]:
    """The graph's file, the features mentioned, and with limits the QK attributions."""
    node_threshold = metadata.node_threshold
    assert node_threshold is not None
    kept = prune(graph, node_threshold, edge_threshold)
    names = Names(graph.input_tokens.tolist(), {node.node_id for node in kept.nodes.values()})
    mention_nodes(graph, kept, names)
    links = graph.links(kept)
    model = host.Model(
        metadata=metadata,
        qParams=host.QParams(pinnedIds=[], supernodes=[], linkType="both", clickedId="", sg_pos=""),
        nodes=list(kept.nodes.values()),
        links=[],
    )
    document = model.model_dump()
    info = {
        "generator": {"name": "circuit-tracer-qk", "version": __version__},
        "digest": host.graph_digest(graph),
    }
    thresholds = {"node_threshold": node_threshold, "edge_threshold": edge_threshold}
    document["metadata"] |= {"info": info, "pruning_settings": thresholds}
    document["links"] = links.data
    if limits is None:
        return document, names, None
    nodes = dict(zip(kept.nodes, document["nodes"], strict=True))
    shares = rounded_all(kept.error_share)
    for i, node in nodes.items():
        if node["feature_type"] in TARGETS:
            node["qk_error_share"] = shares[i]
    attributions = select_tables(graph, links, nodes, names, limits)
    errors = error_share(graph)
    attributions.facts["error_share"] = {
        "share": rounded(errors.share),
        "layers": [[layer, rounded(share)] for layer, share in errors.by_layer],
    }
    _warn_of_errors(graph, errors, len(kept.weights), len(attributions.tables))
    return document, names, attributions


def _warn_of_errors(graph: ExplainedGraph, errors: ErrorShare, n_links: int, n_tables: int) -> None:
    """Say why a file says little, and what to do."""
    if n_tables and errors.share < MOSTLY_ERRORS:
        return
    largest = ", ".join(
        f"{checkpoint_name(layer + 1)} {share:.0%}" for layer, share in errors.by_layer[:3]
    )
    tables = f"{n_tables or 'no'} QK table{'s' * (n_tables != 1)}"
    another = (
        ""
        if graph.select == EXPLAINED or graph.kind == "transcoder"
        else ("choose nodes by explained influence (--select explained, select= in Python), ")
    )
    warnings.warn(
        f"errors take {errors.share:.0%} of the influence on the logits ({largest}), and the file "
        f"has {n_links} link{'s' * (n_links != 1)} and {tables}: {another}keep more "
        "(node_threshold), or use dictionaries that explain more.",
        ErrorShareWarning,
        stacklevel=7,  # of who called create_graph_files
    )


def encode_files(
    document: dict[str, Any], attributions: Attributions | None, path: Path, max_file_bytes: int
) -> tuple[bytes, dict[str, bytes]]:
    """The graph's file, and the sidecars of the tables that it has no room for.

    Raises:
        UserError: a number that JSON cannot hold.
    """
    # one after the other, so that what the tables may take is known
    parts = {key: Encoded(encode(value, str(path))) for key, value in document.items()}
    if attributions is None:
        return encode(parts), {}
    outsiders = Encoded(encode(attributions.outsiders, str(path)))
    empty = {"attributions": [], "rows": []}
    frame = encode({**parts, "qk": {**attributions.facts, **empty}, "qk_only_nodes": outsiders})
    divided = divide(attributions, path.stem, max_file_bytes - len(frame))
    return encode({**parts, "qk": divided.qk, "qk_only_nodes": outsiders}), divided.files


def replace_files(path: Path, data: bytes, sidecars: dict[str, bytes]) -> None:
    """Put a graph's file and its sidecars in place of the old ones, all or none.

    Raises:
        UserError: a file cannot be written; the old ones are then whole.
    """
    folder, slug = path.parent, path.stem
    before = sidecars_of(folder, slug)
    done = False
    try:
        if sidecars:
            check_folder(folder / folder_of(slug))
        write_together({folder / name: part for name, part in sidecars.items()} | {path: data})
        done = True
    finally:  # those that the graph's file does not name
        remove_others(folder, slug, sidecars if done else before)
