"""Edges between transcoder features, split at every block: against removal of each head's write."""

from __future__ import annotations

import pytest
import torch
from helpers.architectures import ARCHITECTURES
from helpers.linear_blocks import KINDS, Case, Cases, N, linear_block
from torch import Tensor

from circuit_tracer_qk.attribution.transcoder import cuts as splits
from circuit_tracer_qk.attribution.transcoder.cuts import Listing, Reads, Writes, split_edges


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    return Cases(tmp_path_factory.mktemp("models"))


def random_ends(case: Case, cross_layer: bool) -> tuple[Writes, Reads]:
    """Sources at every layer and some positions, targets that read at every layer, and logits."""
    generator = torch.Generator().manual_seed(3)
    n_layers, d = case.reference.n_layers, case.run.residual[0].shape[1]
    rows, n_sources = [], 0
    for layer in range(-1, n_layers):
        for position in (0, 2, 5):
            last = n_layers if cross_layer and layer >= 0 else layer + 1
            rows += [(n_sources, at, position) for at in range(layer, last)]
            n_sources += 1
    source, layer, position = map(torch.tensor, zip(*rows, strict=True))
    vectors = torch.randn(len(rows), d, generator=generator, dtype=torch.float64)
    reads = [(layer, position) for layer in range(n_layers) for position in (2, 5, 8)]
    reads += [(n_layers, N - 1)] * 2
    read_layer, read_position = map(torch.tensor, zip(*reads, strict=True))
    targets = torch.randn(len(reads), d, generator=generator, dtype=torch.float64)
    return Writes(source, layer, position, vectors), Reads(read_layer, read_position, targets)


def reference_edges(
    case: Case, writes: Writes, reads: Reads, cut: tuple[int, int] | None = None
) -> Tensor:
    """(n_sources, n_targets): frozen forward passes of every source, a head's write removed."""
    n_sources, d = int(writes.source.max()) + 1, writes.vector.shape[1]
    out = torch.zeros(n_sources, len(reads.layer), dtype=torch.float64)
    for s in range(n_sources):
        x = torch.zeros(N, d, dtype=torch.float64)

        def write(layer: int, x: Tensor, s: int = s) -> Tensor:
            x = x.clone()
            for row in ((writes.source == s) & (writes.layer == layer)).nonzero().flatten():
                x[writes.position[row]] += writes.vector[row]
            return x

        x = write(-1, x)
        for layer in range(case.reference.n_layers):
            without = cut[1] if cut is not None and cut[0] == layer else None
            mid, after = linear_block(case, layer, x, without)
            for t in (reads.layer == layer).nonzero().flatten():
                out[s, t] = mid[reads.position[t]] @ reads.row[t]
            x = write(layer, after)
        for t in (reads.layer == case.reference.n_layers).nonzero().flatten():
            out[s, t] = x[reads.position[t]] @ reads.row[t]
    return out


@pytest.mark.parametrize("cross_layer", [False, True], ids=["plt", "clt"])
@pytest.mark.parametrize("reads_at, writes_at, skip", [KINDS[0], KINDS[1], KINDS[-1]])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_cut_is_what_goes_missing_without_the_head(
    cases,
    record_error,
    name,
    reads_at,
    writes_at,
    skip,
    cross_layer,
):
    case = cases(name, reads_at, writes_at, skip)
    writes, reads = random_ends(case, cross_layer)
    n_layers, n_heads = case.reference.n_layers, case.reference.n_heads
    whole = reference_edges(case, writes, reads)
    scale = float(whole.abs().max())
    position = torch.zeros(int(writes.source.max()) + 1, dtype=torch.long)
    position[writes.source] = writes.position
    source, target = (position[:, None] <= reads.position).nonzero(as_tuple=True)
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))
    source, target = source[order], target[order]
    found = split_edges(case.blocks, writes, reads, source, target)
    worst = float((found.weight - whole[source, target]).abs().max()) / scale
    for layer in range(n_layers):
        for head in range(n_heads):
            less = reference_edges(case, writes, reads, (layer, head))
            expected = (whole - less)[source, target]
            missing = float((found.through[:, layer, head] - expected).abs().max()) / scale
            worst = max(worst, missing)
    total = found.attention_free + found.last.sum((1, 2))
    worst = max(worst, float((total - found.weight).abs().max()) / scale)
    record_error("transcoder edges: cuts", name, worst)
    assert worst < 1e-10

    across = position[source] != reads.position[target]
    assert not found.attention_free[across].any()
    if case.skips[0] is None and not cross_layer:  # the one block between carries all of it
        first = torch.zeros(int(writes.source.max()) + 1, dtype=torch.long)
        first[writes.source] = writes.layer
        ends = reads.layer[target] - (1 if case.reference.parallel else 0)
        ends = torch.where(reads.layer[target] == n_layers, n_layers - 1, ends)
        one = across & (ends - first[source] == 1)
        assert one.any()
        at = found.through[one].sum(2)[torch.arange(int(one.sum())), ends[one]]
        assert torch.allclose(at, found.weight[one], atol=1e-10 * scale)
    # the last head's list is the cut of a path that passes no attention later
    assert bool((found.last != 0).any())


def test_last_is_checked_by_removing_later_attention(cases):
    """``last`` at a block: the way to it whole, the way on without any head."""
    case = cases("llama", *KINDS[0])
    writes, reads = random_ends(case, False)
    source, target = torch.tensor([0, 1, 4]), torch.tensor([8, 8, 7])
    found = split_edges(case.blocks, writes, reads, source, target)
    for e, (s, t) in enumerate(zip(source.tolist(), target.tolist(), strict=True)):
        for at in range(case.reference.n_layers):
            for head in range(case.reference.n_heads):
                expected = _last(case, writes, reads, s, t, at, head)
                assert float(found.last[e, at, head]) == pytest.approx(expected, abs=1e-9)


def _last(case: Case, writes: Writes, reads: Reads, s: int, t: int, at: int, head: int) -> float:
    """Carry fully to block ``at``; there keep what one head writes; carry that without heads."""
    row = int((writes.source == s).nonzero()[0])
    x = torch.zeros(N, writes.vector.shape[1], dtype=torch.float64)
    if int(writes.layer[row]) >= at or int(reads.layer[t]) < at:
        return 0.0
    x[writes.position[row]] = writes.vector[row]
    for layer in range(int(writes.layer[row]) + 1, at):
        x = linear_block(case, layer, x)[1]
    mid, out = (linear_block(case, at, x) - linear_block(case, at, x, without=head)).unbind()
    x = mid if int(reads.layer[t]) == at else out
    for layer in range(at + 1, int(reads.layer[t]) + 1):
        if layer == case.reference.n_layers:
            break
        mid, out = _without_heads(case, layer, x)
        x = mid if layer == int(reads.layer[t]) else out
    return float(x[reads.position[t]] @ reads.row[t])


def _without_heads(case: Case, layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
    kept = case.reference.blocks[layer].W_O.clone()
    case.reference.blocks[layer].W_O.zero_()
    try:
        mid, out = linear_block(case, layer, x).unbind()
    finally:
        case.reference.blocks[layer].W_O.copy_(kept)
    return mid, out


@pytest.mark.parametrize("name", ["gpt2", "neox", "gemma2"])
def test_pairs_are_what_goes_missing_without_one_entry_of_a_pattern(cases, record_error, name):
    case = cases(name, *KINDS[0])
    writes, reads = random_ends(case, False)
    source, target = torch.tensor([0, 1, 4, 3, 2]), torch.tensor([8, 6, 8, 7, 9])
    listing = Listing(heads=case.reference.n_heads, share=1.0, pairs=N * N)
    found = split_edges(case.blocks, writes, reads, source, target, listing)
    assert found.pairs is not None
    rows = zip(*(field.tolist() for field in found.pairs), strict=True)
    whole = reference_edges(case, writes, reads)
    scale, worst, n = float(whole.abs().max()), 0.0, 0
    for edge, layer, head, queries, keys, values in rows:
        part = float(found.through[edge, layer, head])
        worst = max(worst, abs(sum(values) - part) / scale)
        assert [abs(v) for v in values] == sorted(map(abs, values), reverse=True)
        s, t = int(source[edge]), int(target[edge])
        for query, key, value in list(zip(queries, keys, values, strict=True))[:2]:
            pattern = case.run.pattern[layer]
            kept = float(pattern[head, query, key])
            pattern[head, query, key] = 0
            less = reference_edges(case, writes, reads)
            pattern[head, query, key] = kept
            worst = max(worst, abs(float(whole[s, t] - less[s, t]) - value) / scale)
            n += 1
    record_error("transcoder edges: pairs of positions", name, worst)
    assert n > 20 and worst < 1e-10


def test_some_at_a_time_gives_the_same(cases, monkeypatch):
    case = cases("mistral", *KINDS[0])
    writes, reads = random_ends(case, True)
    n_sources, n_targets = int(writes.source.max()) + 1, len(reads.layer)
    source = torch.arange(n_sources).repeat(n_targets)
    target = torch.arange(n_targets).repeat_interleave(n_sources)
    at_once = split_edges(case.blocks, writes, reads, source, target, Listing())
    monkeypatch.setattr(splits, "gradient_bytes", lambda device: 1)
    monkeypatch.setattr(splits, "stream_bytes", lambda device: 1)
    one_by_one = split_edges(case.blocks, writes, reads, source, target, Listing())
    assert at_once.pairs is not None and one_by_one.pairs is not None
    for a, b in zip(at_once[:5], one_by_one[:5], strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=0, atol=1e-12)
    listed = [
        set(zip(*(f.tolist() for f in pairs[:3]), strict=True))
        for pairs in (at_once.pairs, one_by_one.pairs)
    ]
    assert listed[0] == listed[1] and len(listed[0]) > 100
    position = torch.zeros(n_sources, dtype=torch.long)
    position[writes.source] = writes.position
    back_in_time = position[source] > reads.position[target]
    assert back_in_time.any() and not at_once.through[back_in_time].any()
    assert not at_once.weight[back_in_time].any()
