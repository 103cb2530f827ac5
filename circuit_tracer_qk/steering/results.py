"""What steering gives back: runs with their clean run and controls, generations, sweeps.

Every result has its controls beside it: an effect means something only next to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from circuit_tracer_qk.attribution.head import Head, HeadLike, head_name, parse_head
from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.host import graph as host
from circuit_tracer_qk.steering.edits import Edit
from circuit_tracer_qk.steering.hooks import Pass
from circuit_tracer_qk.steering.options import Freeze, Norms, SteeringOptions
from circuit_tracer_qk.steering.resolve import Changed


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class SteeredRun:
    """One forward pass with an intervention, and what to compare it with.

    Attributes:
        edits: the intervention; empty in clean runs and controls.
        changes: (layer, head, side) -> the components that changed there.
        outputs: head -> (n_pos,) factors of its output.
        options: how it was run; ``freeze`` and ``norms`` are its own.
        token_strings: the prompt's tokens.
        logits: (d_vocab,) of the last position.
        patterns: head -> (n_pos, n_pos) attention; rows are queries. Any head can be asked for, as
            ``(1, 2)`` or ``"L1H2"``; iterating gives the steered ones.
        scores: head -> (n_pos, n_pos) scores before soft-cap and mask, likewise.
        clean: the run without the intervention; itself in the clean run.
        controls: the same intervention on other features of the same positions.
        head_controls: the same intervention on other heads of the same layers.
        notes: what the controls could not match, in sentences.

    >>> import circuit_tracer_qk as ctqk
    >>> edit = ctqk.QKEdit("L1H2", "key", features="L0/61", positions=6, factor=0)
    >>> prompt = "I always loved visiting Aunt Sally. Whenever I was feeling sad, Aunt"
    >>> ctqk.steer(ctqk.load_model(device="cpu"), prompt, edit, controls=2)
    SteeredRun of 15 tokens, to ' feeling sad, Aunt'
      edited    key of L1H2 at 6: L0/61 x 0
      clean     ' Sally' 0.998, ' Carter' 0.001, ' Brother' 0.000
      steered   ' Sally' 0.187, ' Anna' 0.033, ' Wesley' 0.018
      controls  2 with other features, 2 with other heads
    """

    edits: tuple[Edit, ...] = ()
    changes: dict[tuple[int, int, str], tuple[Changed, ...]]
    outputs: dict[Head, tuple[float, ...]]
    options: SteeringOptions
    token_strings: list[str]
    logits: Tensor
    patterns: Mapping[Head, Tensor]
    scores: Mapping[Head, Tensor]
    controls: tuple[SteeredRun, ...] = ()
    head_controls: tuple[SteeredRun, ...] = ()
    notes: tuple[str, ...] = ()
    _clean: SteeredRun | None
    _tokenizer: Any

    def __repr__(self) -> str:
        end = "".join(self.token_strings[-4:])
        edits = [str(edit.resolved) for edit in self.edits] or ["nothing, or a control"]
        lines = [
            f"SteeredRun of {len(self.token_strings)} tokens, to {end!r}",
            *_rows("edited", edits),
            f"  clean     {_likeliest(self.clean)}",
            f"  steered   {_likeliest(self)}",
            _controls_line(self),
        ]
        return "\n".join(lines)

    @property
    def freeze(self) -> Freeze:
        """ "patterns" where the patterns of heads that were not steered are the clean ones."""
        return self.options.freeze

    @property
    def norms(self) -> Norms:
        """Whether the denominators inside the edited QK circuits were frozen or live."""
        return self.options.norms

    @property
    def clean(self) -> SteeredRun:
        """The run without the intervention; itself in the clean run."""
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
        return host.token_texts(self._tokenizer, len(self.logits))(token)

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
        i = self.token_id(token)
        features = Spread.of([run.probability(i) for run in self.controls])
        heads = Spread.of([run.probability(i) for run in self.head_controls])
        return Effect(self.clean.probability(i), self.probability(i), features, heads)


class HeadMaps(Mapping[Head, Tensor]):
    """One field of a pass by head: those watched, and any other by running it once more.

    Heads are written ``(1, 2)`` or ``"L1H2"``; KeyError where the model has no such head.
    """

    def __init__(self, name: str, ran: Pass, again: Callable[[Head], Pass]) -> None:
        self._name, self._again = name, again
        self._steered = tuple(sorted(ran.patterns))
        self._known: dict[Head, Tensor] = dict(getattr(ran, name))

    def __getitem__(self, head: HeadLike) -> Tensor:
        place = _place(head)
        if place not in self._known:
            self._known |= getattr(self._again(place), self._name)
        return self._known[place]

    def __contains__(self, head: object) -> bool:
        try:
            return _place(head) in self._steered
        except KeyError:
            return False

    def __iter__(self) -> Iterator[Head]:
        return iter(self._steered)

    def __len__(self) -> int:
        return len(self._steered)


def _place(head: Any) -> Head:
    try:
        return parse_head(head)
    except UserError as error:
        raise KeyError(head) from error


class Spread(NamedTuple):
    """Several runs' probabilities; nan without any.

    Attributes:
        n: how many.
        mean, std: their mean and (population) standard deviation.
        low, high: the extremes.
    """

    n: int
    mean: float
    std: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of some values."""
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
    """What a model added to a prompt.

    Attributes:
        tokens: their ids.
        text: the same as text.
    """

    tokens: list[int]
    text: str


class Generation(NamedTuple):
    """A prompt continued with an intervention held on.

    Attributes:
        steered, clean: with and without it.
        controls: with other features instead; at generated tokens an edit without positions
            keeps its feature's first stand-in.
        head_controls: in other heads instead.
        notes, options: as in :class:`SteeredRun`.
    """

    steered: Continued
    clean: Continued
    controls: tuple[Continued, ...]
    head_controls: tuple[Continued, ...]
    notes: tuple[str, ...]
    options: SteeringOptions

    def __repr__(self) -> str:
        lines = [
            f"Generation of {len(self.steered.tokens)} tokens",
            f"  clean     {self.clean.text!r}",
            f"  steered   {self.steered.text!r}",
            _controls_line(self),
        ]
        return "\n".join(lines)


class Swept(NamedTuple):
    """An intervention at several strengths.

    Attributes:
        factors: as given.
        runs: one a factor.
    """

    factors: list[float]
    runs: list[SteeredRun]

    def effects(self, token: str | int) -> list[Effect]:
        """A token's probability at each factor, beside the controls'.

        Raises:
            UserError: text that is not one token, or an id out of range.
        """
        return [run.effect(token) for run in self.runs]

    def __repr__(self) -> str:
        points = zip(self.factors, self.runs, strict=True)
        rows = [f"  {factor:+5.2f}  {_likeliest(run)}" for factor, run in points]
        return "\n".join([f"Swept over {len(self.factors)} factors", *rows])


class HeadCurve(NamedTuple):
    """A token's probability as more and more heads are steered.

    Attributes:
        heads: in the order in which they were added; point n steers the first n.
        live: len(heads) + 1 probabilities, everything downstream live.
        frozen: the same with the patterns of heads that are not steered frozen.
        random: per control, the live curve with the same heads added in a random order.
    """

    heads: list[Head]
    live: list[float]
    frozen: list[float]
    random: list[list[float]]

    def needed(self, curve: Sequence[float], share: float = 0.5) -> int | None:
        """The fewest heads that take away ``share`` of what all of them take away, if any do.

        Args:
            curve: ``live``, ``frozen`` or one of ``random``.
            share: from 0 to 1.
        """
        start, end = self.live[0], min(self.live[-1], self.frozen[-1])
        if end >= start:
            return None
        limit = start - share * (start - end)
        return next((n for n, p in enumerate(curve) if p <= limit), None)

    def __repr__(self) -> str:
        curves = {"live": self.live, "frozen": self.frozen}
        rows = [f"  {name:7} {' '.join(f'{p:.3f}' for p in ps)}" for name, ps in curves.items()]
        names = " ".join(map(head_name, self.heads))
        return "\n".join([f"HeadCurve of {names}, {len(self.random)} random orders", *rows])


def _likeliest(run: SteeredRun) -> str:
    return ", ".join(f"{token!r} {p:.3f}" for token, _, p in run.top(3))


def _controls_line(result: SteeredRun | Generation) -> str:
    features, heads = len(result.controls), len(result.head_controls)
    return f"  controls  {features} with other features, {heads} with other heads"


def _rows(title: str, texts: Sequence[str], most: int = 3) -> list[str]:
    """A few texts below one another, the first beside a title."""
    left_out = [f"and {len(texts) - most} more"] if len(texts) > most else []
    titles = [title, *[""] * most]
    return [f"  {t:8}  {text}" for t, text in zip(titles, [*texts[:most], *left_out])]
