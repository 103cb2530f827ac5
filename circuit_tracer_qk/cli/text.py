"""Graphs and QK tables as text for a terminal, 100 columns wide. Nothing here reads or prints.

Wherever a list is cut, one line says how much was left out, so that what is shown adds up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor

from circuit_tracer_qk.attribution.columns import column_values
from circuit_tracer_qk.attribution.component import Component
from circuit_tracer_qk.attribution.graph import ExplainedGraph
from circuit_tracer_qk.attribution.pruning import edge_influence, error_share
from circuit_tracer_qk.attribution.qk import QKRow, QKTable
from circuit_tracer_qk.attribution.residual.carriers import Carrier, carriers
from circuit_tracer_qk.attribution.residual.graph import ResidualGraph
from circuit_tracer_qk.base.feature_names import checkpoint_name, feature_name
from circuit_tracer_qk.base.one_line import one_line
from circuit_tracer_qk.cli import highlights
from circuit_tracer_qk.host.graph import graph_scores, logit_texts

WIDTH = 100
LOOKED = 0.1
"""A head that pays a key less attention than this can hardly be said to have looked there."""
CANCELLED = 0.1
"""A score below this part of its terms' absolute sum has no meaningful shares."""

FOOTNOTE = [
    "L3/17: feature 17 of layer 3 (circuit-tracer's node 3_17), of the dictionary that reads checkpoint",
    "4, the residual stream entering block L4. b_dec: the dictionary's bias. error: what it misses.",
    "A part of the score that is the same for every key does not change where the head looks.",
]


TRANSCODER_FOOTNOTE = [
    "L1/17: feature 17 of layer 1's transcoder (circuit-tracer's node 1_17). from 5: its node is at",
    "position 5, and attention carried it here. bias: of every earlier block, carried too.",
    "A part of the score that is the same for every key does not change where the head looks.",
]


# Words and columns --------------------------------------------------------------------------------


def wrap(cells: Iterable[str], indent: str = "  ", gap: str = "  ") -> list[str]:
    """Cells side by side, wrapped between them."""
    lines: list[str] = []
    for cell in cells:
        if lines and len(lines[-1]) + len(gap) + len(cell) <= WIDTH:
            lines[-1] += gap + cell
        else:
            lines.append(indent + cell)
    return lines


def paragraphs(*sections: Sequence[str]) -> list[str]:
    """Lines of sections below one another, an empty line between two."""
    lines = [line for section in sections for line in ("", *section)]
    return lines[1:]


def token_name(tokens: Sequence[str], position: int) -> str:
    """``6 ' Sally'``: a position and its token, quoted because its spaces matter."""
    return f"{position} {tokens[position]!r}"


def percent(value: float) -> str:
    """A share in percent: one digit after the point only below ten."""
    digits = 1 if abs(value) < 0.0995 else 0
    return f"{100 * value:.{digits}f} %"


def component_name(component: Component, position: int | None = None) -> str:
    """A component in one phrase: the feature and its label, or the label of another kind.

    Args:
        component: the component.
        position: where it is looked at; said where it comes from another.
    """
    came = "" if position in (None, component.position) else f" from {component.position}"
    name = "" if component.feature is None else component.name
    return f"{name} {component.label}".strip() + came


# A QK table ---------------------------------------------------------------------------------------


def prompt_lines(tokens: Sequence[str], marks: Mapping[int, str] = {}) -> list[str]:
    """The prompt's tokens with their positions, some of them marked."""
    names = (token_name(tokens, p) for p in range(len(tokens)))
    marked = (f"{name} <-{marks[p]}" if p in marks else name for p, name in enumerate(names))
    return [f"prompt, {len(tokens)} tokens", *wrap(marked)]


def qk_lines(
    table: QKTable, row: QKRow, tokens: Sequence[str], top: int = 20, note: str = ""
) -> list[str]:
    """One table: the score, the row it competes in, marginals, pairs, block totals.

    Args:
        table: the head's table at one query and key.
        row: the same head's row at that query.
        tokens: the prompt's tokens.
        top: how many keys, components of each side and pairs to list.
        note: said after the title, e.g. how the key was chosen.
    """
    query, key = table.query_position, table.key_position
    title = f"L{table.layer}H{table.head}: query {token_name(tokens, query)}"
    title += f" -> key {token_name(tokens, key)}{note}"
    if table.masked:
        masked = [
            f"  score      masked: key {key} lies outside this head's attention window,",
            "             so its score never enters the softmax and has no terms here",
        ]
        return paragraphs([title], masked, row_lines(row, tokens, key, top))
    score = f"  score      {table.score:+.3f}"
    if table.score_capped != table.score:
        gain = table.score_capped / table.score if table.score else 1.0
        score += f" before the soft-cap, {table.score_capped:+.3f} after it (x {gain:.3f})"
    visible = row.scores_raw[~row.scores.isinf()]
    keys = count(len(visible), "key")
    mean = f"  mean       {float(visible.mean()):+.3f} over the {keys} in view"
    return paragraphs(
        [title],
        [f"  attention  {float(row.pattern[key]):.3f}", score, mean],
        row_lines(row, tokens, key, min(top, 8)),
        marginal_lines(table, 0, top),
        marginal_lines(table, 1, top),
        pair_lines(table, top),
        block_lines(table),
    )


def row_lines(row: QKRow, tokens: Sequence[str], marked: int, top: int) -> list[str]:
    """The keys that one query attended to most, the marked one always among them."""
    query = len(row.pattern) - 1
    visible = (~row.scores.isinf()).nonzero().flatten().tolist()
    order = sorted(visible, key=lambda p: -float(row.pattern[p]))
    shown = order[:top]
    if marked in visible and marked not in shown:
        shown = [*order[: top - 1], marked]
    capped = bool((row.scores[visible] != row.scores_raw[visible]).any())
    lines = [
        f"where the head looks from {token_name(tokens, query)} (softmax: only differences between "
        "scores count)",
        "    pattern     score  " + ("  capped  key" if capped else "key"),
    ]
    for p in shown:
        line = f"   {float(row.pattern[p]):8.3f}  {float(row.scores_raw[p]):+8.3f}  "
        line += f"{float(row.scores[p]):+8.3f}  " if capped else ""
        line += token_name(tokens, p) + ("   <- this key" if p == marked else "")
        lines.append(cut_line(line))
    if len(shown) < len(visible):
        rest = max(1 - float(row.pattern[shown].sum()), 0.0)
        pad = " " * (12 if not capped else 22)
        lines.append(f"   {rest:8.3f}{pad}rest: {count(len(visible) - len(shown), 'key')}")
    if len(visible) <= query:
        hidden = count(query + 1 - len(visible), "earlier key")
        lines.append(f"     masked  {hidden}, outside this head's attention window")
    return lines


def marginal_lines(table: QKTable, side: int, top: int) -> list[str]:
    """What each component of one side adds to the score, all components of the other summed.

    The kinds that are no features are always shown.
    """
    components = (table.query, table.key)[side]
    values = (table.query_marginal, table.key_marginal)[side].tolist()
    columns = column_values(components, (table.terms, table.terms.T)[side])
    order = sorted(range(len(values)), key=lambda i: -abs(values[i]))
    here, there = ("query", "key") if side == 0 else ("key", "query")
    position = (table.query_position, table.key_position)[side]

    def came_from(i: int) -> bool:  # of a transcoder graph, carried by attention
        return components[i].position != position

    many = [i for i in order if components[i].kind == "feature" or came_from(i)]
    left_out = set(many[top:])
    noun = "feature" if all(components[i].kind == "feature" for i in left_out) else "component"
    names = "".join(f"{name:>{max(10, len(name))}}  " for name in columns)
    lines = [
        f"{here} side: what each component at the {here} adds (all components at the {there} summed)",
        f"       value   share  kind       feature   {names}label",
    ]
    share = _share(table.score, sum(map(abs, values)))
    for i in [i for i in order if i not in left_out]:
        c = components[i]
        name = "" if c.feature is None else c.name
        line = _valued(values[i], share, f"{c.kind:9}  {name:8}")
        for column, numbers in columns.items():
            text = "" if numbers[i] is None else f"{numbers[i]:.3f}"
            line += f"  {text:>{max(10, len(column))}}"
        label = one_line(c.label, WIDTH) if c.label != c.kind else ""
        came = f"from {c.position}  " if came_from(i) else ""
        lines.append(cut_line(f"{line}  {came}{label}"))
    if left_out:
        rest = f"rest: {count(len(left_out), f'smaller {noun}')}"
        lines.append(_valued(sum(values[i] for i in left_out), share, rest))
    return [*lines, _valued(sum(values), share, "sum = score")]


def pair_lines(table: QKTable, top: int) -> list[str]:
    """The largest single terms. They mislead where many small ones add up: see the rest."""
    terms = table.top(top)
    share = _share(table.score, float(table.terms.abs().sum()))
    n = table.terms.numel()
    lines = [
        f"pairs: the {len(terms)} largest of {n} terms" if n > len(terms) else f"pairs: all {n}",
        "       value   share  query component                        key component",
    ]
    for query, key, value in terms:
        left = component_name(query, table.query_position)
        right = component_name(key, table.key_position)
        names = f"{one_line(left, 37):37}  {one_line(right, 37)}"
        lines.append(_valued(value, share, names).rstrip())
    total = float(table.terms.sum())
    if n > len(terms):
        rest = total - sum(value for *_, value in terms)
        lines.append(_valued(rest, share, f"rest: {count(n - len(terms), 'smaller term')}"))
    return [*lines, _valued(total, share, "sum = score")]


def block_lines(table: QKTable) -> list[str]:
    """Block totals, and how much of the score features explain."""
    queries = list(dict.fromkeys(a for a, _ in table.blocks))
    keys = list(dict.fromkeys(b for _, b in table.blocks))
    lines = ["block totals (query kinds down, key kinds across)"]
    lines.append(" " * 12 + "".join(f"{k:>11}" for k in [*keys, "sum"]))
    columns = {k: sum(table.blocks[q, k] for q in queries) for k in keys}
    for q in queries:
        cells = [table.blocks[q, k] for k in keys]
        lines.append(f"  {q:10}" + "".join(f"{v:+11.3f}" for v in [*cells, sum(cells)]))
    totals = [*columns.values(), sum(columns.values())]
    lines.append(f"  {'sum':10}" + "".join(f"{v:+11.3f}" for v in totals))
    size = float(table.terms.abs().sum())
    explained = table.blocks.get(("feature", "feature"))
    if explained is not None:
        share = _share(table.score, size)(explained).strip()
        of = f", {share} of the score" if share else ""
        lines.append(f"  features x features: {explained:+.3f} of {table.score:+.3f}{of}")
    if size and abs(table.score) < CANCELLED * size:
        lines.append(
            f"  the terms cancel (their absolute values sum to {size:.3f}): shares would mislead"
        )
    return lines


def _share(score: float, size: float) -> Callable[[float], str]:
    """A value as a share of the score; blank where terms of ``size`` nearly cancel in it."""
    cancels = score == 0 or abs(score) < CANCELLED * size
    return lambda value: " " * 6 if cancels else f"{100 * value / score:4.0f} %"


def _valued(value: float, share: Callable[[float], str], text: str) -> str:
    return f"  {value:+10.3f}  {share(value)}  {text}"


def cut_line(line: str) -> str:
    """A line cut at the page's width."""
    return (line if len(line) <= WIDTH else line[: WIDTH - 2] + "..").rstrip()


def count(n: int, noun: str) -> str:
    """``1 key``, ``2 keys``."""
    return f"{n} {noun}" + ("" if n == 1 else "s")


# A graph ------------------------------------------------------------------------------------------


def node_name(graph: ResidualGraph, node: int) -> str:
    """A node as position, token and what it stands for."""
    record = graph.record
    tokens, n_pos = record.token_strings, graph.n_pos
    node -= graph.n_features
    if node < 0:
        selected = int(graph.selected_features[node])
        layer, position, feature = graph.active_features[selected].tolist()
        name, label = feature_name(layer + 1, feature), record.names(layer + 1, feature)
        return f"{token_name(tokens, position)} {name} {label}"
    slot, position = divmod(node, n_pos)
    if slot < graph.cfg.n_layers:
        checkpoint = slot + (not record.resid_pre)
        return f"{token_name(tokens, position)} {checkpoint_name(checkpoint)} error"
    if slot == graph.cfg.n_layers:
        return f"{token_name(tokens, position)} token"
    text, _ = logit_texts(graph)[node - (graph.cfg.n_layers + 1) * n_pos]
    return f"logit {text!r}"


def prediction_lines(predicted: Iterable[tuple[str, float]]) -> list[str]:
    """The likeliest next tokens."""
    cells = (f"{token!r} {p:.3f}" for token, p in predicted)
    return ["the model's next token", *wrap(cells, gap="   ")]


def edge_lines(
    graph: ResidualGraph, edges: Sequence[highlights.StrongEdge], title: str
) -> list[str]:
    """Edges with what carried them: heads by |total|, residual and MLP parts."""
    if not edges:
        return [title, "  none"]
    lines = [title, "  influence    weight  block  from -> to"]
    for source, target, influence, edge in edges:
        block = "-" if edge.layer is None else f"L{edge.layer}"
        names = f"{node_name(graph, source)} -> {node_name(graph, target)}"
        line = f"  {percent(influence):>9}  {edge.weight:+8.3f}  {block:>5}  "
        lines.append(line + one_line(names, WIDTH - len(line)))
        lines += _carried(edge.residual, edge.mlp, edge.heads.total)
    return lines


def _carried(residual: float, mlp: float, heads: Tensor, most: int = 3) -> list[str]:
    order = heads.abs().argsort(descending=True).tolist()
    parts = [f"{name} {part:+.3f}" for name, part in (("residual", residual), ("MLP", mlp)) if part]
    parts += [f"H{h} {float(heads[h]):+.3f}" for h in order[:most] if float(heads[h])]
    rest = order[most:]
    if rest and bool(heads[rest].any()):
        parts.append(f"{count(len(rest), 'other head')} {float(heads[rest].sum()):+.3f}")
    first, *more = wrap(parts, indent=" " * 13) or [""]
    return [f"{' ' * 11}= {first.strip()}".rstrip(), *more]


def error_line(graph: ExplainedGraph) -> str:
    """How much of the influence errors take, and where most."""
    errors = error_share(graph)
    most = ", ".join(
        f"{checkpoint_name(layer + 1)} {percent(share)}" for layer, share in errors.by_layer[:3]
    )
    return f"errors take {percent(errors.share)} of the influence on the answer (most: {most})"


def carrier_lines(ranked: Sequence[Carrier], title: str, top: int) -> list[str]:
    """The heads that carried edges between two positions."""
    if not ranked:
        return [title, "  none: no edge joins these positions"]
    lines = [
        title,
        "  head    influence  attention  agrees   (agrees: part that has the sign of its edge)",
    ]
    for c in ranked[:top]:
        name = f"L{c.layer}H{c.head}"
        line = f"  {name:6}  {percent(c.influence):>9}  {c.attention:9.3f}  {percent(c.along):>6}"
        lines.append(line)
    rest = ranked[top:]
    if rest:
        total = percent(sum(c.influence for c in rest))
        lines.append(f"  {'rest':6}  {total:>9}  {count(len(rest), 'head')}")
    return lines


def story_lines(graph: ResidualGraph, decode: Callable[[int], str]) -> list[str]:
    """The demo's account of a graph: prediction, strongest edges, heads, and why they looked.

    Args:
        graph: any residual graph.
        decode: token id to text.
    """
    tokens, last = graph.record.token_strings, graph.n_pos - 1
    influence = edge_influence(graph)
    replacement, completeness = graph_scores(graph)
    predicted = [(decode(token), p) for token, p in highlights.predictions(graph)]
    nodes = f"{graph.n_features} features of {len(graph.active_features)} active"
    across = "strongest edges across positions, and what carried each (H5: head 5 of the block)"
    within = "strongest edges within a position"
    summary = [
        f"attribution graph: {nodes}; replacement score {replacement:.2f}, completeness "
        f"{completeness:.2f}",
        error_line(graph),
        "influence below: the share of what reaches the logits that runs through an edge or head",
    ]
    sections = [
        prompt_lines(tokens),
        prediction_lines(predicted),
        summary,
        edge_lines(graph, highlights.strongest_edges(graph, influence, 8, across=True), across),
        edge_lines(graph, highlights.strongest_edges(graph, influence, 4, across=False), within),
    ]
    key = highlights.source_position(graph, influence)
    if key is None:
        return paragraphs(*sections)
    ranked = carriers(graph, influence, query=last, key=key)
    what = "name-copying heads: they" if tokens[key] == predicted[0][0] else "heads that"
    source, target = token_name(tokens, key), token_name(tokens, last)
    title = f"{what} carried {source} to the last position, {target}"
    sections.append(carrier_lines(ranked, title, 6))
    for carrier in ranked[:2]:
        table = graph.qk(carrier.layer, carrier.head, last, key)
        row = graph.qk_row(carrier.layer, carrier.head, last)
        looked = "why it looked there" if carrier.attention >= LOOKED else "it hardly looked there"
        sections.append(["-" * WIDTH, *qk_lines(table, row, tokens, 5, f"   ({looked})")])
    return paragraphs(*sections, FOOTNOTE)
