"""Draws the README's picture from the bundled miniature: why a name-copying head looked there.

python demos/picture.py            # writes demos/sally.svg
"""

from __future__ import annotations

import argparse
from html import escape
from pathlib import Path

import circuit_tracer_qk as ctqk
from circuit_tracer_qk.demo import carriers, source_position
from circuit_tracer_qk.host import edge_influence
from circuit_tracer_qk.qk import QKTable

PROMPT = "I always loved visiting Aunt Sally. Whenever I was feeling sad, Aunt"
WIDTH, LINE, SHOWN = 980, 22, 5
POSITIVE, NEGATIVE, GREY = "#1b7837", "#762a83", "#777"


def main() -> None:
    """Attribute the prompt, take its strongest name-copying head and draw it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("sally.svg"))
    graph = ctqk.attribute(PROMPT, ctqk.load_model(device="cpu"))
    influence = edge_influence(graph)
    query, key = graph.n_pos - 1, source_position(graph, influence)
    assert key is not None, "no edge carried a name to the last position"
    best = carriers(graph, influence, query, key)[0]
    table = graph.qk(best.layer, best.head, query, key)
    pattern = graph.qk_row(best.layer, best.head, query).pattern.tolist()
    tokens = graph.record.token_strings
    drawing = _title(table, tokens) + _row(tokens, pattern, key)
    top = 150
    for side, (name, listed, marginal) in enumerate(
        (
            ("query side", table.query, table.query_marginal),
            ("key side", table.key, table.key_marginal),
        )
    ):
        named = [c.label or f"{c.kind} c{c.checkpoint}/{c.feature}" for c in listed]
        pairs = sorted(zip(marginal.tolist(), named, strict=True), key=lambda p: -abs(p[0]))
        rest = sum(value for value, _ in pairs[SHOWN:])
        rows = [*pairs[:SHOWN], (rest, f"rest: {len(pairs) - SHOWN} smaller parts")]
        largest = max(abs(value) for value, _ in rows)
        drawing += _bars(30 + side * WIDTH / 2, top, name, rows, table.score, largest)
    height = top + (SHOWN + 3) * LINE + 20
    out = parser.parse_args().out
    out.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="sans-serif" font-size="13"><rect width="100%" height="100%" fill="white"/>'
        f"{drawing}</svg>\n",
        encoding="utf-8",
    )
    print(f"wrote {out}")


def _text(x: float, y: float, text: str, **style: str) -> str:
    attributes = "".join(f' {k.replace("_", "-")}="{v}"' for k, v in style.items())
    return f'<text x="{x:.0f}" y="{y:.0f}"{attributes}>{escape(text)}</text>'


def _title(table: QKTable, tokens: list[str]) -> str:
    return _text(
        30,
        30,
        f"Why L{table.layer}H{table.head} looked from {tokens[table.query_position].strip()!r} "
        f"({table.query_position}) to {tokens[table.key_position].strip()!r} "
        f"({table.key_position}): score {table.score:+.2f}",
        font_weight="bold",
        font_size="16",
    )


def _row(tokens: list[str], pattern: list[float], key: int) -> str:
    """The attention row: a bar over every token, as high as the pattern."""
    step = (WIDTH - 60) / len(tokens)
    out = _text(30, 58, "attention from the last token", fill=GREY)
    for i, (token, p) in enumerate(zip(tokens, pattern, strict=True)):
        x, colour = 30 + i * step, POSITIVE if i == key else "#bbb"
        out += f'<rect x="{x:.0f}" y="{108 - 40 * p:.1f}" width="{step - 8:.0f}" '
        out += f'height="{max(40 * p, 0.5):.1f}" fill="{colour}"/>'
        out += _text(x, 124, token.strip() or token, font_size="12")
        if p >= 0.05:
            out += _text(x, 104 - 40 * p, f"{p:.2f}", font_size="11", fill=GREY)
    return out


def _bars(
    x: float, y: float, name: str, rows: list[tuple[float, str]], score: float, largest: float
) -> str:
    """Signed bars that add up to the score."""
    out = _text(x, y + 14, f"{name}: what each component adds", font_weight="bold")
    for i, (value, label) in enumerate(rows):
        at = y + (i + 1) * LINE + 14
        length = 110 * abs(value) / largest
        colour = POSITIVE if value > 0 else NEGATIVE
        out += _text(x + 46, at, f"{value:+.2f}", text_anchor="end")
        out += f'<rect x="{x + 54:.0f}" y="{at - 11:.0f}" width="{length:.1f}" height="14" '
        out += f'fill="{colour}"/>'
        out += _text(x + 172, at, label if len(label) <= 40 else label[:38] + "..")
    at = y + (len(rows) + 1) * LINE + 14
    out += _text(x + 46, at, f"{score:+.2f}", text_anchor="end", font_weight="bold")
    return out + _text(x + 54, at, "sum = score", font_weight="bold")


if __name__ == "__main__":
    main()
