"""Work shared out over threads is the work, whoever does it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from threading import Barrier, Event, Thread, current_thread, get_ident
from weakref import WeakSet

import pytest
import torch
from helpers.cases import build

import circuit_tracer_qk as ctqk
from circuit_tracer_qk.attribution.residual import influence
from circuit_tracer_qk.attribution.residual.attribution import read
from circuit_tracer_qk.attribution.residual.edges import PositionRun, runs_of
from circuit_tracer_qk.attribution.residual.influence import Sweep
from circuit_tracer_qk.base.threads import Crew, Scratch

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def threads_of_a_new_thread() -> int:
    found: list[int] = []
    thread = Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


def test_two_at_once_in_order_with_one_thread_each() -> None:
    both = Barrier(2, timeout=20)

    def work(piece: int) -> tuple[int, int, int]:
        both.wait()  # alone nobody gets past this
        return piece, get_ident(), torch.get_num_threads()

    done = list(Crew(CPU).do(work, range(6)))
    assert [piece for piece, _, _ in done] == list(range(6))
    assert len({thread for _, thread, _ in done}) == 2
    assert {threads for _, _, threads in done} == {1}
    assert torch.get_num_threads() == 2 == threads_of_a_new_thread()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_modes_are_the_callers(mode: type) -> None:
    def modes(piece: int) -> tuple[bool, bool]:
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    with mode():
        assert set(Crew(CPU).do(modes, range(4))) == {modes(0)}


def test_a_crew_goes_on_after_an_error_and_when_nobody_takes_the_rest() -> None:
    def work(piece: int) -> tuple[int, int]:
        if piece == 3:
            raise ctqk.UserError("the third")
        return piece, torch.get_num_threads()

    crew = Crew(CPU)
    with pytest.raises(ctqk.UserError, match="the third"):
        list(crew.do(work, range(6)))
    assert next(iter(crew.do(work, range(6)))) == (0, 1)
    assert list(crew.do(work, range(3))) == [(0, 1), (1, 1), (2, 1)]
    assert torch.get_num_threads() == 2 == threads_of_a_new_thread()


def test_stages_come_in_order_and_the_next_goes_on_meanwhile() -> None:
    """Two pieces wait for each other that stand in different stages, and so for a third's begin."""
    meetings = [Barrier(2, timeout=20) for _ in range(5)]

    def begin(stage: int) -> tuple[Callable[[int], tuple[int, int, int]], range]:
        def work(piece: int) -> tuple[int, int, int]:
            if piece == 2 and stage < 5:
                meetings[stage].wait()
            if piece == 0 and stage > 0:
                meetings[stage - 1].wait()
            return stage, piece, torch.get_num_threads()

        return work, range(3)

    done = list(Crew(CPU).flow(begin, range(6)))
    assert done == [(stage, piece, 1) for stage in range(6) for piece in range(3)]
    assert torch.get_num_threads() == 2 == threads_of_a_new_thread()


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("most_pieces", [0, 1, 5])
def test_no_more_than_three_stages_are_in_memory(threads: int, most_pieces: int) -> None:
    torch.set_num_threads(threads)
    alive: WeakSet[torch.Tensor] = WeakSet()
    most = 0

    def begin(stage: int) -> tuple[Callable[[int], int], range]:
        nonlocal most
        memory = torch.zeros(1)
        alive.add(memory)
        most = max(most, len(alive))
        return lambda piece: stage + int(memory), range((stage + 1) % (most_pieces + 1))

    done = list(Crew(CPU).flow(begin, range(20)))
    assert done == [stage for stage in range(20) for _ in range((stage + 1) % (most_pieces + 1))]
    assert 1 <= most <= (3 if threads > 1 else 1)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_stages_are_begun_and_done_in_the_callers_modes(mode: type) -> None:
    def modes() -> tuple[bool, bool]:
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    def both(begun: tuple[bool, bool], piece: int) -> tuple[object, object]:
        return begun, modes()

    with mode():
        flow = Crew(CPU).flow(lambda _: (partial(both, modes()), range(2)), range(3))
        assert set(flow) == {(modes(), modes())}


@pytest.mark.parametrize("bad", ["begin", "work"])
def test_a_flow_ends_with_an_error_and_when_nobody_takes_the_rest(bad: str) -> None:
    seen: set[int] = set()
    go = Event()

    def begin(stage: int) -> tuple[Callable[[int], int], range]:
        if (bad, stage) == ("begin", 2):
            raise ctqk.UserError("the third")

        def work(piece: int) -> int:
            seen.add(stage)
            if (bad, stage, piece) == ("work", 2, 1):
                raise ctqk.UserError("the third")
            return stage

        return work, range(3)

    crew = Crew(CPU)
    with pytest.raises(ctqk.UserError, match="the third"):
        list(crew.flow(begin, range(40)))
    assert max(seen) <= 4
    first = next(
        flow := crew.flow(lambda s: (lambda p: go.wait(20) if s else s, range(9)), range(2))
    )
    flow.close()  # of the second stage's pieces only those begun are waited for
    go.set()
    assert first == 0
    assert list(crew.do(torch.tensor, range(3))) == [0, 1, 2]


def test_threads_end_with_their_crew() -> None:
    crew = Crew(CPU)
    threads = set(crew.do(lambda _: current_thread(), range(4)))
    assert threads and all(thread.is_alive() for thread in threads)
    del crew
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()


def test_one_thread_or_another_device_work_where_they_are_called() -> None:
    here = {get_ident()}
    assert set(Crew(torch.device("cuda")).do(lambda _: get_ident(), range(4))) == here
    assert set(Crew(CPU).do(lambda _: get_ident(), range(1))) == here
    torch.set_num_threads(1)
    assert set(Crew(CPU).do(lambda _: get_ident(), range(4))) == here


def test_scratch_is_each_threads_own_and_is_kept() -> None:
    scratch, like = Scratch(), torch.zeros(1, dtype=torch.float64)
    both = Barrier(2, timeout=20)

    def work(piece: int) -> tuple[int, int]:
        first = scratch.of(like, 4, 6)
        both.wait()  # both hold one now
        again = scratch.of(like, 5)
        assert first.shape == (4, 6) and again.dtype == torch.float64
        return first.data_ptr(), again.data_ptr()

    (a, a_again), (b, b_again) = Crew(CPU).do(work, range(2))
    assert a == a_again != b == b_again
    assert scratch.of(like, 100).shape == (100,)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("kept", [0, 1 << 30])
@pytest.mark.parametrize(("name", "kind"), [("gpt2", "wcc"), ("gemma2", "sae"), ("neox", "sae")])
def test_graphs_of_two_threads_are_those_of_one(
    name: str,
    kind: str,
    kept: int,
    inference: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In float64, so that nodes are chosen alike; with rows kept from the sweep and made again."""
    monkeypatch.setattr(influence, "KEEP_BYTES", kept)
    monkeypatch.setattr(influence, "LEAST_ROWS", 2)
    case = build(name, tmp_path, kind, torch.float64)
    many = case.graph.n_features // 2
    seen: set[int] = set()

    class Watched(influence.BlockEdges):
        def rows(self, targets: influence.Targets, runs: list[PositionRun]) -> torch.Tensor:
            seen.add(get_ident())
            return super().rows(targets, runs)

    monkeypatch.setattr(influence, "BlockEdges", Watched)

    def graph(threads: int) -> ctqk.ResidualGraph:
        torch.set_num_threads(threads)
        seen.clear()
        with torch.inference_mode(inference):
            return ctqk.attribute(case.ids, case.model, max_feature_nodes=many, batch_size=6)

    one, n_one = graph(1), len(seen)
    two, n_two = graph(2), len(seen)
    assert n_one == 1 < n_two
    assert torch.equal(one.selected_features, two.selected_features)
    for a, b in (
        (one.adjacency_matrix, two.adjacency_matrix),
        (one.record.target_pulls, two.record.target_pulls),
        (one.record.bias_edges, two.record.bias_edges),
    ):
        assert bool(a.any())
        tolerance = 1e-6 if a.dtype == torch.float32 else 1e-12
        assert float((a - b).abs().max()) <= tolerance * float(a.abs().max())


@pytest.mark.parametrize(("batch_size", "size"), [(1, 1), (63, 1), (64, 2), (100, 3), (512, 4)])
def test_all_threads_together_take_a_batch_or_less(
    batch_size: int, size: int, tmp_path: Path
) -> None:
    torch.set_num_threads(4)
    case = build("gpt2", tmp_path, "sae", torch.float32)
    parts, heads = read(case.ids, case.model)
    sweep = Sweep(case.model.transformer, parts, heads, torch.zeros(1, 1), False, batch_size, False)
    some = sweep.subset()
    pieces = sweep.pieces(some, some.within(*sweep.reading(2)))
    assert sweep.crew.size == size
    assert size * max(piece.stop - piece.start for piece in pieces) <= batch_size


@pytest.mark.parametrize("most", [1, 2, 3, 7, 1000])
def test_pieces_are_cut_between_positions(
    most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(influence, "LEAST_ROWS", 1)
    case = build("gpt2", tmp_path, "sae", torch.float32)
    parts, heads = read(case.ids, case.model)
    sweep = Sweep(case.model.transformer, parts, heads, torch.zeros(1, 1), False, 2 * most, False)
    assert sweep.crew.size == 2
    some = sweep.subset()
    whole = some.within(*sweep.reading(2))
    pieces = sweep.pieces(some, whole)
    assert [i for piece in pieces for i in range(piece.start, piece.stop)] == list(
        range(whole.start, whole.stop)
    )
    assert all(0 < piece.stop - piece.start <= most for piece in pieces)
    positions = parts.features.position[sweep.skipped :][whole]
    longest = max(run.stop - run.start for run in runs_of(positions))
    if longest <= most:
        inner = [piece.start - whole.start for piece in pieces[1:]]
        assert all(positions[at] != positions[at - 1] for at in inner)
