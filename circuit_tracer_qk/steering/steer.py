"""Interventions on the QK circuit alone, with their clean run and their controls beside them.

An explanation of a score says what happens when a feature is taken away; :func:`steer` takes it
away, in the chosen heads' queries or keys only, and measures (method, section 5; paper,
"Induction", "Antonyms", "Multiple Choice", "Correctness circuits").
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from tqdm import tqdm

from circuit_tracer_qk.attribution.residual.attribution import read
from circuit_tracer_qk.attribution.residual.model import ResidualModel
from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.base.precision import exactly
from circuit_tracer_qk.host import graph as host
from circuit_tracer_qk.model.heads import Heads
from circuit_tracer_qk.model.supported import read_blocks
from circuit_tracer_qk.steering.controls import matched
from circuit_tracer_qk.steering.edits import Edit, Head, HeadEdit, QKEdit
from circuit_tracer_qk.steering.hooks import Pass, Steered
from circuit_tracer_qk.steering.resolve import Plan, resolve
from circuit_tracer_qk.steering.results import (
    Continued,
    Freeze,
    Generation,
    HeadMaps,
    Norms,
    SteeredRun,
    Swept,
)


def steer(
    model: ResidualModel,
    prompt: str | Tensor | list[int],
    edits: Edit | Iterable[Edit],
    *,
    freeze: Freeze = "none",
    norms: Norms = "live",
    controls: int = 20,
    seed: int = 0,
    verbose: bool = False,
) -> SteeredRun:
    """Run a prompt with features edited inside the QK circuits of chosen heads only.

    Args:
        model: of :func:`circuit_tracer_qk.load_model`.
        prompt: text, token ids or a tensor of them.
        edits: :class:`QKEdit` and :class:`HeadEdit`, applied in order.
        freeze: "none": everything downstream is live; "patterns": heads that are not steered keep
            their clean patterns, so that none makes up for those that are.
        norms: "frozen": the change of a score is (factor - 1) times the feature's marginal,
            exactly, with the clean run's denominators; "live": ln1 and the QK-norm of the edited
            heads are recomputed on the edited stream. Norms elsewhere are live in both.
        controls: how many matched controls of either kind to run.
        seed: of their draw.
        verbose: show progress.

    Identities: factor 1 is the clean run bit for bit; values, other heads and other query heads of
    a key-value group are untouched.

    Raises:
        UserError: a prompt, edit or option that cannot be used.
    """
    return Session(model, prompt).steer(
        edits, freeze=freeze, norms=norms, controls=controls, seed=seed, verbose=verbose
    )


class Session:
    """One prompt, read once, for any number of interventions.

    Args:
        model: of :func:`circuit_tracer_qk.load_model`.
        prompt: text, token ids or a tensor of them.

    Raises:
        UserError: a prompt or model that cannot be used.
    """

    def __init__(self, model: ResidualModel, prompt: str | Tensor | list[int]) -> None:
        self.model = model
        self.parts, self.heads = read(prompt, model)
        decode = host.decoder(model.tokenizer, model.cfg.d_vocab).decode
        self.token_strings = [decode(t) for t in self.parts.run.tokens]

    @exactly
    def steer(
        self,
        edits: Edit | Iterable[Edit],
        *,
        freeze: Freeze = "none",
        norms: Norms = "live",
        controls: int = 20,
        seed: int = 0,
        verbose: bool = False,
    ) -> SteeredRun:
        """As :func:`steer`, on this prompt."""
        edits, engine = _edits(edits), self.engine(freeze, norms)
        _check_controls(controls)
        plan = self.resolve(edits)
        named: list[Head] = sorted({h for e in edits for h in e.heads})  # type: ignore[misc]
        found = matched(plan, self.model.dictionaries, self.parts, controls, seed)
        start = min((layer for layer, _ in named), default=0)

        def made(plan: Plan, clean: SteeredRun | None, **more: Any) -> SteeredRun:
            ran = engine.run(plan, sorted({*named, *plan.heads}), start)

            def again(head: Head) -> Pass:
                return self._layer_again(engine, plan, head)

            return SteeredRun(
                **{"edits": (), "controls": (), "head_controls": (), "notes": (), **more},
                changes={(p.layer, p.head, p.side): changes for p, changes in plan.changes.items()},
                outputs=plan.outputs,
                freeze=freeze,
                norms=norms,
                token_strings=self.token_strings,
                logits=ran.logits,
                patterns=HeadMaps("patterns", ran, again),
                scores=HeadMaps("scores", ran, again),
                _clean=clean,
                _tokenizer=self.model.tokenizer,
            )

        clean = made(Plan(), None)
        bar = tqdm([*found.features, *found.heads], "controls", disable=not verbose, leave=False)
        runs = [made(control, clean) for control in bar]
        n = len(found.features)
        return made(
            plan,
            clean,
            edits=edits,
            controls=tuple(runs[:n]),
            head_controls=tuple(runs[n:]),
            notes=tuple(found.notes),
        )

    def _layer_again(self, engine: Steered, plan: Plan, head: Head) -> Pass:
        """The same pass, with all heads of another head's layer watched."""
        run, n_heads = self.parts.run, self.parts.run.pattern.shape[1]
        if head not in [(at, h) for at in range(run.n_layers) for h in range(n_heads)]:
            raise KeyError(head)
        layer, _ = head
        return engine.run(plan, [(layer, h) for h in range(n_heads)])

    def resolve(self, edits: Iterable[Edit]) -> Plan:
        """What edits come to on this prompt.

        Raises:
            UserError: an edit that names what is not there.
        """
        return resolve(edits, self.model.dictionaries, self.parts, self.model.zero_positions)

    def engine(self, freeze: str, norms: str, more: int = 0) -> Steered:
        """Steered passes over this prompt and up to ``more`` generated tokens.

        Raises:
            UserError: an unknown option, or more tokens than the context holds.
        """
        if freeze not in ("none", "patterns"):
            raise UserError(f"freeze is {freeze!r}: it must be 'none' or 'patterns'.")
        if norms not in ("live", "frozen"):
            raise UserError(f"norms is {norms!r}: it must be 'live' or 'frozen'.")
        heads = self.heads
        if more:
            n_pos, n_ctx = self.parts.run.n_pos + more, self.model.cfg.n_ctx
            if n_pos > n_ctx:
                raise UserError(
                    f"{more} more tokens make {n_pos}, and the model's context is {n_ctx}: "
                    "generate fewer."
                )
            heads = Heads(read_blocks(self.model.transformer, n_pos), self.parts.run)
        return Steered(
            self.model.transformer,
            self.model.dictionaries,
            self.parts,
            heads,
            frozen_patterns=freeze == "patterns",
            frozen_norms=norms == "frozen",
        )

    @exactly
    def generate(
        self,
        edits: Edit | Iterable[Edit],
        max_new_tokens: int = 20,
        *,
        freeze: Freeze = "none",
        norms: Norms = "live",
        controls: int = 5,
        seed: int = 0,
        cached: bool = True,
        stop: str | int | None = None,
    ) -> Generation:
        """As :func:`generate`, on this prompt."""
        edits = _edits(edits)
        _check_controls(controls)
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {max_new_tokens}: it must be at least 1.")
        engine = self.engine(freeze, norms, max_new_tokens)
        tokenizer = self.model.tokenizer
        end = getattr(tokenizer, "eos_token_id", None) if stop is None else stop
        if end is not None:
            end = host.token_id(end, tokenizer, self.model.cfg.d_vocab)
        plan, n = self.resolve(edits), self.parts.run.n_pos
        found = matched(plan, self.model.dictionaries, self.parts, controls, seed)
        decode = host.decoder(tokenizer, self.model.cfg.d_vocab).decode

        def made(plan: Plan) -> Continued:
            ids = engine.generate(plan, max_new_tokens, cached, end)[n:].tolist()
            return Continued(ids, decode(ids))

        return Generation(
            made(plan),
            made(Plan()),
            tuple(made(p) for p in found.features),
            tuple(made(p) for p in found.heads),
            tuple(found.notes),
            freeze,
            norms,
        )


def generate(
    model: ResidualModel,
    prompt: str | Tensor | list[int],
    edits: Edit | Iterable[Edit],
    max_new_tokens: int = 20,
    *,
    freeze: Freeze = "none",
    norms: Norms = "live",
    controls: int = 5,
    seed: int = 0,
    cached: bool = True,
    stop: str | int | None = None,
) -> Generation:
    """Continue a prompt, greedily, with an intervention held on.

    Edited keys of the prompt stay edited for every query that follows; edits without positions
    also hold at generated tokens, where features are read off the steered stream and norms are
    live. Frozen patterns are those of the prompt's own queries.

    Args:
        model, prompt, edits, freeze, norms, seed: as in :func:`steer`.
        max_new_tokens: how many tokens to add at most.
        controls: how many matched controls of either kind to continue as well.
        cached: keep keys and values of tokens already read; the tokens are the same without.
        stop: a token to stop at; the tokenizer's end of text if left out.

    Raises:
        UserError: a prompt, edit or option that cannot be used.
    """
    return Session(model, prompt).generate(
        edits,
        max_new_tokens,
        freeze=freeze,
        norms=norms,
        controls=controls,
        seed=seed,
        cached=cached,
        stop=stop,
    )


def sweep(
    model: ResidualModel,
    prompt: str | Tensor | list[int],
    edits: Edit | Iterable[Edit],
    factors: Iterable[float],
    *,
    freeze: Freeze = "none",
    norms: Norms = "live",
    controls: int = 20,
    seed: int = 0,
    verbose: bool = False,
) -> Swept:
    """The same intervention at several factors.

    Args:
        factors: put in the place of every edit's own; 1 is the clean run. What an edit injects is
            multiplied with 1 - factor, so that 0 is a swap as it was written.
        model, prompt, edits, freeze, norms, controls, seed, verbose: as in :func:`steer`.

    Raises:
        UserError: a prompt, edit or option that cannot be used.
    """
    session, given = Session(model, prompt), _edits(edits)
    factors = list(factors)
    if not factors:
        raise UserError("a sweep needs at least one factor.")
    runs = [
        session.steer(
            [at_factor(edit, factor) for edit in given],
            freeze=freeze,
            norms=norms,
            controls=controls,
            seed=seed,
        )
        for factor in tqdm(factors, "factors", disable=not verbose, leave=False)
    ]
    return Swept(factors, runs)


def at_factor(edit: Edit, factor: float) -> Edit:
    """An edit at another strength: 1 changes nothing, 0 is full removal or injection."""
    if isinstance(edit, HeadEdit):
        return HeadEdit(edit.heads, factor, edit.positions)
    if edit.inject is None:
        changed: dict[str, Any] = {"factor": factor}
    else:
        changed = {"inject": edit.inject * (1 - factor)}
    return QKEdit(edit.heads, edit.side, edit.checkpoint, edit.features, edit.positions, **changed)


def _check_controls(controls: Any) -> None:
    if isinstance(controls, bool) or not hasattr(controls, "__index__") or controls < 0:
        raise UserError(f"controls is {controls!r}: it must be a whole number from 0 on.")


def _edits(edits: Edit | Iterable[Edit]) -> tuple[Edit, ...]:
    found = (edits,) if isinstance(edits, QKEdit | HeadEdit) else tuple(edits)
    if not found:
        raise UserError("there is nothing to steer: give at least one QKEdit or HeadEdit.")
    for edit in found:
        if not isinstance(edit, QKEdit | HeadEdit):
            raise UserError(
                f"{type(edit).__name__} is no edit: give circuit_tracer_qk.QKEdit or HeadEdit."
            )
    return found
