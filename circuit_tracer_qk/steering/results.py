"""What steering gives back: runs with their clean run and controls, generations, sweeps.

Every result has its controls beside it: an effect means something only next to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from circuit_tracer_qk.host import graph as host
from circuit_tracer_qk.steering.edits import Edit, Head
from circuit_tracer_qk.steering.hooks import Pass
from circuit_tracer_qk.steering.resolve import Changed

Freeze = Literal["none", "patterns"]
Norms = Literal["live", "frozen"]


@dataclass(frozen=True, eq=False)
class SteeredRun:
    """One forward pass with an intervention, and what to compare it with.

    Attributes:
        edits: the intervention; empty in clean runs and controls.
        changes: (layer, head, side) -> what changed there; ``outputs``: head -> factors.
        freeze: "patterns" where the patterns of heads that are not steered were clean ones.
        norms: whether the denominators inside the edited QK circuits were frozen or live.
        token_strings: the prompt's tokens.
        logits: (d_vocab,) of the last position.
        patterns: head -> (n_pos, n_pos) attention; rows are queries. Any head can be asked for;
            iterating gives the steered ones.
        scores: head -> (n_pos, n_pos) scores before soft-cap and mask, likewise.
        clean: the run without the intervention; itself in the clean run.
        controls: the same intervention on other features of the same positions.
        head_controls: the same intervention on other heads of the same layers.
        notes: what the controls could not match, in sentences.
    """

    edits: tuple[Edit, ...]
    changes: dict[tuple[int, int, str], tuple[Changed, ...]]
    outputs: dict[Head, tuple[float, ...]]
    freeze: Freeze
    norms: Norms
    token_strings: list[str]
    logits: Tensor
    patterns: Mapping[Head, Tensor]
    scores: Mapping[Head, Tensor]
    controls: tuple[SteeredRun, ...]
    head_controls: tuple[SteeredRun, ...]
    notes: tuple[str, ...]
    _clean: SteeredRun | None
    _tokenizer: Any

    @property
    def clean(self) -> SteeredRun:
        return self if self._clean is None else self._clean

    @property
    def heads(self) -> tuple[Head, ...]:
        """The heads that were steered; in clean runs those of the run they belong to."""
        return tuple(sorted(self.patterns))

    def probability(self, token: str | int) -> float:
        """The probability of a token after the prompt.

        Raises:
            UserError: text that is not one token, or an id out of range.
        """
        return float(self.logits.softmax(0)[self.token_id(token)])

    def token_id(self, token: str | int) -> int:
        """The id that a token's text stands for.

        Raises:
            UserError: text that is not one token, or an id out of range.
        """
        return host.token_id(token, self._tokenizer, len(self.logits))

    def token_text(self, token: int) -> str:
        """A token id as text."""
        return host.decoder(self._tokenizer, len(self.logits)).decode([token])

    def top(self, n: int = 10) -> list[tuple[str, int, float]]:
        """The ``n`` likeliest next tokens: (text, id, probability)."""
        values, ids = self.logits.softmax(0).topk(min(n, len(self.logits)))
        pairs = zip(ids.tolist(), values.tolist(), strict=True)
        return [(self.token_text(i), i, p) for i, p in pairs]

    def effect(self, token: str | int) -> Effect:
        """What the intervention did to a token's probability, beside its controls.

        Raises:
            UserError: text that is not one token, or an id out of range.
        """
        at = self.token_id(token)
        return Effect(
            self.clean.probability(at),
            self.probability(at),
            Spread.of([run.probability(at) for run in self.controls]),
            Spread.of([run.probability(at) for run in self.head_controls]),
        )


class HeadMaps(Mapping[Head, Tensor]):
    """One field of a pass by head: those watched, and any other by running it once more."""

    def __init__(self, name: str, ran: Pass, again: Callable[[Head], Pass]) -> None:
        self._name, self._again = name, again
        self._steered = tuple(sorted(ran.patterns))
        self._known: dict[Head, Tensor] = dict(getattr(ran, name))

    def __getitem__(self, head: Head) -> Tensor:
        if head not in self._known:
            self._known |= getattr(self._again(head), self._name)
        return self._known[head]

    def __contains__(self, head: object) -> bool:
        return head in self._steered

    def __iter__(self) -> Iterator[Head]:
        return iter(self._steered)

    def __len__(self) -> int:
        return len(self._steered)


class Spread(NamedTuple):
    """Several runs' values: how many, mean, standard deviation, extremes; nan without any."""

    n: int
    mean: float
    std: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if not values:
            return cls(0, *[float("nan")] * 4)
        v = torch.tensor(values, dtype=torch.float64)
        return cls(len(v), float(v.mean()), float(v.std(correction=0)), min(values), max(values))


class Effect(NamedTuple):
    """A token's probability before and after, and after in the controls.

    Attributes:
        before, after: clean and steered.
        features: after edits of other features.
        heads: after the same edits in other heads.
    """

    before: float
    after: float
    features: Spread
    heads: Spread


class Continued(NamedTuple):
    """The tokens that a model added to a prompt."""

    tokens: list[int]
    text: str


class Generation(NamedTuple):
    """A prompt continued with an intervention held on.

    Attributes:
        steered, clean: with and without it.
        controls: with other features instead; at generated tokens an edit without positions
            keeps its feature's first stand-in.
        head_controls: in other heads instead.
        notes, freeze, norms: as in :class:`SteeredRun`.
    """

    steered: Continued
    clean: Continued
    controls: tuple[Continued, ...]
    head_controls: tuple[Continued, ...]
    notes: tuple[str, ...]
    freeze: Freeze
    norms: Norms


class Swept(NamedTuple):
    """An intervention at several strengths.

    Attributes:
        factors: as given.
        runs: one a factor.
    """

    factors: list[float]
    runs: list[SteeredRun]

    def effects(self, token: str | int) -> list[Effect]:
        """A token's probability at each factor, beside the controls'."""
        return [run.effect(token) for run in self.runs]
