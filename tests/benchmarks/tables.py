"""QK tables: the 50 largest terms of many, against bare matrix products with ``topk``.

The bare side has every image projected beforehand and makes
``(q @ k.T / scale).flatten().abs().topk(50)`` of one pair after the other.
"""

from __future__ import annotations

import torch
from measuring import Ceilings, Row, ratios, timed
from shapes import random_decomposition, random_model
from torch import Tensor

from circuit_tracer_qk.attribution.qk import Place
from circuit_tracer_qk.attribution.residual.qk import QK, TopTerms
from circuit_tracer_qk.model.attention import KEY, QUERY

LAYER, HEADS = 1, 4
TOP = 50
SHAPES = ((81, 32), (321, 128))  # components a side, d_head
TOKENS = 64
AGREEMENT = 1e-4


def measure(n_components: int, d_head: int, ceilings: Ceilings, repeats: int) -> list[Row]:
    """Tables of all pairs of one head, a few of every head, and one by one."""
    torch.manual_seed(0)
    device = ceilings.device
    model = random_model(
        TOKENS,
        device=device,
        d_model=HEADS * d_head,
        n_heads=HEADS,
        d_head=d_head,
        d_mlp=HEADS * d_head,
        act_fn="silu",
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_dim=d_head,
    )
    active = n_components - 2  # and b_dec and error
    parts, heads = random_decomposition(model, TOKENS, active, d_dict=4 * n_components)
    checkpoint = parts.at(LAYER)
    scale = heads.block(LAYER).attn_scale
    vectors = checkpoint.vectors()
    images: dict[tuple[int, int, int], Tensor] = {}
    for head in range(HEADS):
        q = heads.image(LAYER, vectors, checkpoint.position, head, QUERY)
        k = heads.image(LAYER, vectors, checkpoint.position, head, KEY)
        for p in range(TOKENS):
            images[0, head, p] = q[checkpoint.at(p)].contiguous()
            images[1, head, p] = k[checkpoint.at(p)].contiguous()

    last = TOKENS - 1
    pairs = [Place(LAYER, 2, q, k) for q in range(TOKENS) for k in range(q + 1)]
    mixed = [Place(LAYER, h, q, k) for h in range(HEADS) for q in (last, 40, 20) for k in range(20)]
    one = [Place(LAYER, 2, last, k) for k in range(TOKENS)]

    def bare(places: list[Place]) -> list[Tensor]:
        found = []
        for _, head, query, key in places:
            terms = (images[0, head, query] @ images[1, head, key].T / scale).flatten()
            found.append(terms[terms.abs().topk(min(TOP, len(terms))).indices])
        return found

    def new() -> QK:
        return QK(parts, heads, lambda c, f: "")

    qk = new()

    def tops(places: list[Place], qk: QK = qk) -> list[TopTerms]:
        return [found for _, found in qk.tops(places, TOP)]

    for places in (pairs, mixed):
        ours = torch.cat([found.values for found in tops(places)])
        for theirs, mine in zip(bare(sorted(places)), ours, strict=True):
            difference = (theirs.abs() - mine[: len(theirs)].abs()).abs().max() / theirs.abs().max()
            if float(difference) > AGREEMENT:
                raise SystemExit(f"the terms differ by {float(difference):.1e} of their scale")

    name, rows = f"QK {n_components}x{n_components}, d_head {d_head}", []
    cases = {"all pairs of a head": pairs, "4 heads x 3 queries x 20 keys": mixed}
    cases["one query, 64 keys"] = one
    with torch.no_grad():
        for case, places in cases.items():
            found, bares = timed(
                {"": lambda places=places: tops(places)},
                lambda places=places: bare(places),
                repeats,
                device,
            )
            each = [[s / len(places) for s in times[""]] for times in (bares, found)]
            operations = 2.0 * sum(
                len(images[0, h, q]) * len(images[1, h, k]) * d_head for _, h, q, k in places
            )
            floor = ceilings.floor(operations) / len(places)
            rows += [
                Row(f"{name}: bare, {case}", each[0], "ms", floor, note="a table"),
                Row(f"{name}: {case}", each[1], "ms", floor, note=f"a table, of {len(places)}"),
                Row(
                    f"{name}: ratio to bare, {case}",
                    ratios(each[1], each[0]),
                    "x",
                    goal="goal: at most 1.1, then below 1",
                ),
            ]
        found, bares = timed(
            {
                "with projections": lambda: tops(pairs, new()),
                "exact tables, one by one": lambda: [qk.table(*p).top(TOP) for p in one],
            },
            lambda: bare(one),
            repeats,
            device,
        )
        for case, places in (("with projections", pairs), ("exact tables, one by one", one)):
            values = [s / len(places) for s in found[case]]
            rows.append(Row(f"{name}: {case}", values, "ms", note="a table"))
    return rows
