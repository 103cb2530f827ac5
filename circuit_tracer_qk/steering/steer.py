"""Interventions on the QK circuit alone, with their clean run and their controls beside them.

An explanation of a score says what happens when a feature is taken away; :func:`steer` takes it
away, in the chosen heads' queries or keys only, and measures (attribution/README.md, section 5;
paper, "Induction", "Antonyms", "Multiple Choice", "Correctness circuits").
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor
from tqdm import tqdm

from circuit_tracer_qk.attribution.head import Head, head_name
from circuit_tracer_qk.attribution.residual.attribution import read
from circuit_tracer_qk.attribution.residual.model import ResidualModel
from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.base.memory import fitting
from circuit_tracer_qk.base.precision import exactly
from circuit_tracer_qk.base.rules import RULES, check, listed
from circuit_tracer_qk.host import graph as host
from circuit_tracer_qk.model.heads import Heads
from circuit_tracer_qk.model.supported import read_blocks
from circuit_tracer_qk.steering.controls import Controls, matched
from circuit_tracer_qk.steering.edits import Edit, Edits, QKEdit, listed_edits
from circuit_tracer_qk.steering.hooks import Pass, Steered
from circuit_tracer_qk.steering.options import DEFAULTS, Freeze, Norms, SteeringOptions
from circuit_tracer_qk.steering.resolve import Intervention, resolve
from circuit_tracer_qk.steering.results import Continued, Generation, HeadMaps, SteeredRun, Swept


def steer(
    model: ResidualModel,
    prompt: str | Tensor | list[int],
    edits: Edits,
    *,
    freeze: Freeze = DEFAULTS.freeze,
    norms: Norms = DEFAULTS.norms,
    controls: int = DEFAULTS.controls,
    seed: int = DEFAULTS.seed,
    verbose: bool = False,
) -> SteeredRun:
    """Run a prompt with features edited inside the QK circuits of chosen heads only.

    (Paper, "Induction", "Antonyms", "Multiple Choice" and "Correctness circuits".)

    Args:
        model: of :func:`circuit_tracer_qk.load_model`.
        prompt: text, token ids or a tensor of them.
        edits: :class:`QKEdit` and :class:`HeadEdit`, applied in order.
        freeze, norms, controls, seed: as in
            :class:`~circuit_tracer_qk.steering.options.SteeringOptions`.
        verbose: show progress.

    Returns:
        The run: its logits (d_vocab,), attention patterns (n_pos, n_pos) of any head, its clean run
        and one run per control.

    Identities: factor 1 is the clean run bit for bit; values, other heads and other query heads of
    a key-value group are untouched.

    Raises:
        UserError: a prompt, edit or option that cannot be used.

    >>> import circuit_tracer_qk as ctqk
    >>> heads = ["L1H2", "L1H6", "L1H7"]
    >>> edit = ctqk.QKEdit(heads, "key", features=["L0/61", "L0/177"], positions=6, factor=0)
    >>> prompt = "I always loved visiting Aunt Sally. Whenever I was feeling sad, Aunt"
    >>> run = ctqk.steer(ctqk.load_model(device="cpu"), prompt, edit, norms="frozen", controls=2)
    >>> round(run.clean.probability(" Sally"), 3), round(run.probability(" Sally"), 3)
    (0.998, 0.01)
    """
    options = {"freeze": freeze, "norms": norms, "controls": controls, "seed": seed}
    return Session(model, prompt).steer(edits, verbose=verbose, **options)


def generate(
    model: ResidualModel,
    prompt: str | Tensor | list[int],
    edits: Edits,
    max_new_tokens: int = 20,
    *,
    freeze: Freeze = DEFAULTS.freeze,
    norms: Norms = DEFAULTS.norms,
    controls: int = 5,
    seed: int = DEFAULTS.seed,
    cached: bool = True,
    stop: str | int | None = None,
) -> Generation:
    """Continue a prompt, greedily, with an intervention held on.

    Edited keys of the prompt stay edited for every query that follows; edits without positions
    also hold at generated tokens, where features are read off the steered stream and norms are
    live. Frozen patterns are those of the prompt's own queries. (Paper, "Antonyms".)

    Args:
        model, prompt, edits, freeze, norms, seed: as in :func:`steer`.
        max_new_tokens: how many tokens to add at most.
        controls: how many matched controls of either kind to continue as well.
        cached: keep keys and values of tokens already read; the tokens are the same without.
        stop: a token to stop at; the tokenizer's end of text if left out.

    Returns:
        The continuations: clean, steered and of each control.

    Raises:
        UserError: a prompt, edit or option that cannot be used.

    >>> import circuit_tracer_qk as ctqk
    >>> heads = ["L1H2", "L1H6", "L1H7"]
    >>> edit = ctqk.QKEdit(heads, "key", features=["L0/61", "L0/177"], positions=6, factor=0)
    >>> prompt = "I always loved visiting Aunt Sally. Whenever I was feeling sad, Aunt"
    >>> ctqk.generate(ctqk.load_model(device="cpu"), prompt, edit, 3, controls=1).clean.text
    ' Sally baked a'
    """
    options = {"freeze": freeze, "norms": norms, "controls": controls, "seed": seed}
    session = Session(model, prompt)
    return session.generate(edits, max_new_tokens, cached=cached, stop=stop, **options)


def sweep(
    model: ResidualModel,
    prompt: str | Tensor | list[int],
    edits: Edits,
    factors: Iterable[float],
    *,
    freeze: Freeze = DEFAULTS.freeze,
    norms: Norms = DEFAULTS.norms,
    controls: int = DEFAULTS.controls,
    seed: int = DEFAULTS.seed,
    verbose: bool = False,
) -> Swept:
    """The same intervention at several factors.

    (Paper, "Antonyms", where activations are scaled by factors down to negative ones.)

    Args:
        factors: put in the place of every edit's own; 1 is the clean run. What an edit injects is
            multiplied with 1 - factor, so that 0 is a swap as it was written.
        model, prompt, edits, freeze, norms, controls, seed, verbose: as in :func:`steer`.

    Returns:
        One :class:`SteeredRun` a factor.

    Raises:
        UserError: a prompt, edit or option that cannot be used.

    >>> import circuit_tracer_qk as ctqk
    >>> heads = ["L1H2", "L1H6", "L1H7"]
    >>> edit = ctqk.QKEdit(heads, "key", features=["L0/61", "L0/177"], positions=6, factor=0)
    >>> prompt = "I always loved visiting Aunt Sally. Whenever I was feeling sad, Aunt"
    >>> swept = ctqk.sweep(ctqk.load_model(device="cpu"), prompt, edit, [1, 0], controls=1)
    >>> [round(effect.after, 3) for effect in swept.effects(" Sally")]
    [0.998, 0.01]
    """
    options = {"freeze": freeze, "norms": norms, "controls": controls, "seed": seed}
    return Session(model, prompt).sweep(edits, factors, verbose=verbose, **options)


class Session:
    """One prompt, read once, for any number of interventions.

    Args:
        model: of :func:`circuit_tracer_qk.load_model`.
        prompt: text, token ids or a tensor of them.

    ``options`` of its methods are those of :class:`SteeringOptions`.

    Raises:
        UserError: a prompt or model that cannot be used.
    """

    def __init__(self, model: ResidualModel, prompt: str | Tensor | list[int]) -> None:
        self.model = model
        self.parts, self.heads = read(prompt, model)
        self._decode = host.decoder(model.tokenizer, model.cfg.d_vocab).decode
        text_of = host.token_texts(model.tokenizer, model.cfg.d_vocab)
        self.token_strings = list(map(text_of, self.parts.run.tokens))

    @fitting("the steered run", "give a shorter prompt or fewer controls")
    @exactly
    def steer(
        self,
        edits: Edits,
        *,
        verbose: bool = False,
        before_run: Callable[[], object] | None = None,
        **options: Any,
    ) -> SteeredRun:
        """As :func:`steer`, on this prompt.

        ``before_run`` is called before the clean run, the edit's and each control's. To cancel the
        work, it raises.
        """
        checked, several = SteeringOptions(**options), listed_edits(edits)
        engine, intervention = self.engine(checked), self.resolve(several)
        steered = {head for edit in several for head in edit.resolved.heads}
        controls = self._matched(intervention, checked)
        start = min((layer for layer, _ in steered), default=0)

        def run(intervention: Intervention, clean: SteeredRun | None) -> SteeredRun:
            if before_run is not None:
                before_run()
            forward = engine.run(intervention, sorted(steered.union(intervention.heads)), start)

            def again(head: Head) -> Pass:
                (layer, number), n_heads = head, self.parts.run.pattern.shape[1]
                if layer not in range(self.parts.run.n_layers) or number not in range(n_heads):
                    raise KeyError(head_name(head))
                # all heads of its layer, in a pass from the prompt's tokens
                return engine.run(intervention, [(layer, h) for h in range(n_heads)])

            return SteeredRun(
                changes={(p.layer, p.head, p.side): c for p, c in intervention.changes.items()},
                outputs=intervention.outputs,
                options=checked,
                token_strings=self.token_strings,
                logits=forward.logits,
                patterns=HeadMaps("patterns", forward, again),
                scores=HeadMaps("scores", forward, again),
                _clean=clean,
                _tokenizer=self.model.tokenizer,
            )

        clean = run(Intervention(), None)
        every = [*controls.features, *controls.heads]
        bar = tqdm(every, "controls", disable=not verbose, leave=False)
        control_runs, n = tuple(run(control, clean) for control in bar), len(controls.features)
        return replace(
            run(intervention, clean),
            edits=several,
            controls=control_runs[:n],
            head_controls=control_runs[n:],
            notes=tuple(controls.notes),
        )

    def sweep(
        self, edits: Edits, factors: Iterable[float], *, verbose: bool = False, **options: Any
    ) -> Swept:
        """As :func:`sweep`, on this prompt."""
        several, given = listed_edits(edits), listed(factors, "factors", "a list of numbers")
        factors = [RULES["factor"].checked(factor, "a factor") for factor in given]
        if not factors:
            raise UserError("a sweep needs at least one factor.")
        bar = tqdm(factors, "factors", disable=not verbose, leave=False)
        runs = [self.steer([at_factor(e, factor) for e in several], **options) for factor in bar]
        return Swept(factors, runs)

    @fitting("the steered run", "give a shorter prompt or fewer controls")
    @exactly
    def generate(
        self,
        edits: Edits,
        max_new_tokens: int = 20,
        *,
        cached: bool = True,
        stop: str | int | None = None,
        controls: int = 5,
        **options: Any,
    ) -> Generation:
        """As :func:`generate`, on this prompt."""
        checked, several = SteeringOptions(controls=controls, **options), listed_edits(edits)
        max_new_tokens = check(max_new_tokens=max_new_tokens)["max_new_tokens"]
        engine = self.engine(checked, max_new_tokens)
        tokenizer, n_pos = self.model.tokenizer, self.parts.run.n_pos
        end = getattr(tokenizer, "eos_token_id", None) if stop is None else stop
        if end is not None:
            end = host.token_id(end, tokenizer, self.model.cfg.d_vocab)
        intervention = self.resolve(several)
        matching = self._matched(intervention, checked)

        def continued(intervention: Intervention) -> Continued:
            ids = engine.generate(intervention, max_new_tokens, cached, end)[n_pos:].tolist()
            return Continued(ids, self._decode(ids))

        features = tuple(continued(control) for control in matching.features)
        heads = tuple(continued(control) for control in matching.heads)
        steered, clean = continued(intervention), continued(Intervention())
        return Generation(steered, clean, features, heads, tuple(matching.notes), checked)

    def resolve(self, edits: Edits) -> Intervention:
        """What edits come to on this prompt.

        Raises:
            UserError: an edit that names what is not there.
        """
        return resolve(edits, self.model.dictionaries, self.parts, self.model.zero_positions)

    def engine(self, options: SteeringOptions, more: int = 0) -> Steered:
        """Steered passes over this prompt and up to ``more`` generated tokens.

        Raises:
            UserError: more tokens than the context holds.
        """
        heads, n_pos, n_ctx = self.heads, self.parts.run.n_pos + more, self.model.cfg.n_ctx
        if more:
            if n_pos > n_ctx:
                raise UserError(
                    f"{more} more tokens make {n_pos}, and the model's context is {n_ctx}: "
                    "generate fewer."
                )
            heads = Heads(read_blocks(self.model.transformer, n_pos), self.parts.run)
        return Steered(self.model.transformer, self.model.dictionaries, self.parts, heads, options)

    def _matched(self, intervention: Intervention, options: SteeringOptions) -> Controls:
        dictionaries = self.model.dictionaries
        return matched(intervention, dictionaries, self.parts, options.controls, options.seed)


def at_factor(edit: Edit, factor: float) -> Edit:
    """An edit at another strength: 1 changes nothing, 0 is full removal or injection."""
    if isinstance(edit, QKEdit) and edit.inject is not None:
        return replace(edit, inject=edit.inject * (1 - factor))
    return replace(edit, factor=factor)
