"""A forward pass with some heads' QK circuits edited: TransformerLens' own, through hooks.

In a steered head the scores that edited queries or keys take part in become

    cap(q . k / attn_scale + delta),   delta = (dq . K + Q . dk + dq . dk) / attn_scale

where ``q . k`` is the model's own (recomputed before the soft-cap, from its rotated queries and
keys) and dq, dk are the images of what the edits move (attribution/README.md, section 5). With
frozen norms Q, K and all denominators are the clean run's, so ``delta`` is (factor - 1) times the
marginal exactly; with live norms Q and K are this run's and ln1 and the QK-norm are recomputed on
the edited stream. Scores with delta 0 are left as they are, bit for bit. Values never change.

Tokens that a generation adds have no clean run: there Q, K and the denominators are live ones, and
edits without positions read their features off the steered stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from circuit_tracer_qk.attribution.head import Head
from circuit_tracer_qk.attribution.residual.decompose import Decomposition
from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.dictionaries.dictionary import like
from circuit_tracer_qk.dictionaries.dictionary_set import DictionarySet
from circuit_tracer_qk.host import graph as host
from circuit_tracer_qk.model.heads import Heads
from circuit_tracer_qk.model.run import alone
from circuit_tracer_qk.steering.edits import SIDES
from circuit_tracer_qk.steering.options import SteeringOptions
from circuit_tracer_qk.steering.resolve import HeadSide, Intervention, changed_vectors

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

Hook = tuple[str | Callable[..., Any], Callable[..., Any]]
"""As TransformerLens takes them: a hook point's name and what to do there."""


class Pass(NamedTuple):
    """What one steered forward pass gave.

    Attributes:
        logits: (d_vocab,) of the last position.
        patterns: watched head -> (n_pos, n_pos).
        scores: watched head -> (n_pos, n_pos), before soft-cap and mask.
    """

    logits: Tensor
    patterns: dict[Head, Tensor]
    scores: dict[Head, Tensor]


class _Side(NamedTuple):
    """Queries or keys of one head: as they are, and what edits add; (n, d_head) each."""

    base: Tensor
    moved: Tensor

    def after(self, more: _Side) -> _Side:
        return _Side(torch.cat([self.base, more.base]), torch.cat([self.moved, more.moved]))


@dataclass
class _Past:
    """What a cached generation keeps of one block: keys of the tokens already read."""

    keys: dict[int, _Side] = field(default_factory=dict)
    live: Tensor | None = None  # unrotated models hand over new keys only


@dataclass
class Steered:
    """Forward passes of one prompt with edits.

    Attributes:
        transformer: the model; its weights and hooks are left as they are.
        dictionaries: whose features are edited.
        parts: the clean run's components.
        heads: the heads on the clean run, with rotary tables long enough for what is generated.
        options: freeze "patterns": every head that is not steered keeps its clean pattern; norms
            "frozen": denominators inside the edited QK circuits are the clean run's.
    """

    transformer: HookedTransformer
    dictionaries: DictionarySet
    parts: Decomposition
    heads: Heads
    options: SteeringOptions

    def __post_init__(self) -> None:
        self.frozen_patterns = self.options.freeze == "patterns"
        self.frozen_norms = self.options.norms == "frozen"
        # deltas are differences: in float64 where the device has it, whatever the model's dtype
        device = self.heads.run.residual.device
        self.wide = torch.float64 if device.type != "mps" else torch.float32
        self.rotary = self.heads.blocks[0].cos is not None
        self.whole = lru_cache(maxsize=8)(
            lambda layer, side: self.heads.whole(layer, side, self.wide)
        )

    @torch.no_grad()
    def run(self, intervention: Intervention, watch: Sequence[Head], start: int = 0) -> Pass:
        """One pass over the prompt.

        Args:
            intervention: of :func:`circuit_tracer_qk.steering.resolve.resolve`.
            watch: heads whose patterns and scores are wanted.
            start: the first block to compute; those before are the clean run's.
        """
        hooks = _Hooks(self, intervention, watch)
        run, dtype = self.heads.run, self.transformer.cfg.dtype
        with alone(self.transformer), self.transformer.hooks(hooks.all()):
            if start:
                stream = run.residual[start][None].to(dtype)
                logits: Any = self.transformer(stream, start_at_layer=start)
            else:
                logits = self.transformer(run.tokens[None])
        return Pass(logits[0, -1].to(run.residual.dtype), hooks.patterns, hooks.scores)

    @torch.no_grad()
    def generate(
        self, intervention: Intervention, n: int, cached: bool, stop: int | None
    ) -> Tensor:
        """(n_pos + at most n,) token ids: the prompt continued greedily, the edits held on.

        Args:
            intervention: what to hold.
            n: tokens to add.
            cached: keep keys and values of the tokens already read.
            stop: a token id to stop at.

        Raises:
            UserError: error or bias components without positions, which only a prompt has.
        """
        for edit in chain(*intervention.held.values()):
            for _, component in edit.components:
                if isinstance(component, str):
                    raise UserError(
                        f"{component!r} cannot be edited at tokens that are still to be "
                        "generated: give the edit positions."
                    )
        # TransformerLens' own generate() misplaces cached tokens of models without a tokenizer
        hooks = _Hooks(self, intervention, ())
        tokens = self.heads.run.tokens[None]
        cache = host.key_value_cache(self.transformer) if cached else None
        new = tokens
        with alone(self.transformer), self.transformer.hooks(hooks.all()):
            for _ in range(n):
                options: dict[str, Any] = {}
                if cache is not None:
                    options = {"past_kv_cache": cache, "attention_mask": torch.ones_like(new)}
                logits: Any = self.transformer(tokens if cache is None else new, **options)
                new = logits[:, -1:].argmax(-1)
                tokens = torch.cat([tokens, new], 1)
                if stop is not None and int(new) == stop:
                    break
        return tokens[0]


class _Hooks:
    """The hooks of one pass, or of all passes of one generation."""

    def __init__(self, steered: Steered, intervention: Intervention, watch: Sequence[Head]) -> None:
        self.steered, self.intervention = steered, intervention
        self.heads, self.run = steered.heads, steered.heads.run
        self.watch = set(watch)
        self.patterns: dict[Head, Tensor] = {}
        self.scores: dict[Head, Tensor] = {}
        places = (*intervention.changes, *intervention.held)
        self.edited = {(place.layer, place.head) for place in places}
        self.streams: dict[int, Tensor] = {}  # by checkpoint, of the tokens being read
        self.projected: dict[tuple[int, int], Tensor] = {}  # by layer and side
        self.past: dict[int, _Past] = {}
        self.moved = {
            place: changed_vectors(changes, place.layer, steered.dictionaries, steered.parts)
            for place, changes in intervention.changes.items()
        }

    def all(self) -> list[Hook]:
        hooks: list[Hook] = []
        scored = {layer for layer, _ in self.edited | self.watch}
        held = chain(*self.intervention.held.values())
        read = scored | {checkpoint for edit in held for checkpoint, _ in edit.features}
        for checkpoint in sorted(read):
            name = f"blocks.{checkpoint}.hook_resid_pre"
            hooks.append((name, self._keep(self.streams, checkpoint)))
        names = ("hook_rot_q", "hook_rot_k") if self.steered.rotary else ("hook_q", "hook_k")
        for layer in sorted(scored):
            for side, name in enumerate(names):
                keep = self._keep(self.projected, (layer, side))
                hooks.append((f"blocks.{layer}.attn.{name}", keep))
            hooks.append((f"blocks.{layer}.attn.hook_attn_scores", self._scores(layer)))
        for layer in range(self.run.n_layers):
            if self.steered.frozen_patterns or layer in scored:
                hooks.append((f"blocks.{layer}.attn.hook_pattern", self._pattern(layer)))
        outputs = set(self.intervention.outputs) | set(self.intervention.held_outputs)
        for layer in sorted({layer for layer, _ in outputs}):
            hooks.append((f"blocks.{layer}.attn.hook_z", self._output(layer)))
        return hooks

    def _keep(self, into: dict[Any, Tensor], key: Any) -> Callable[..., None]:
        def keep(x: Tensor, hook: Any) -> None:
            into[key] = x[0].detach()

        return keep

    def _scores(self, layer: int) -> Callable[..., Tensor]:
        def scores(s: Tensor, hook: Any) -> Tensor:
            block, wide = self.heads.block(layer), self.steered.wide
            offset = s.shape[-1] - s.shape[-2]
            q, k = (self.projected[layer, side].to(wide) for side in (0, 1))
            past = self.past.setdefault(layer, _Past())
            if offset == 0:
                past.keys, past.live = {}, None
            if not self.steered.rotary and past.live is not None:
                k = torch.cat([past.live, k])
            past.live = k
            out = s
            for head in sorted(h for at, h in self.edited | self.watch if at == layer):
                raw = q[:, head] @ k[:, _group(k, s, head)].T / block.attn_scale
                delta = None
                if (layer, head) in self.edited:
                    delta = self._delta(layer, head, offset, len(q), past)
                if delta is not None:
                    raw = raw + delta
                    new = block.cap(raw) if block.softcap else out[0, head].to(wide) + delta
                    touched = (delta != 0) & ~out[0, head].isneginf()
                    out = out.clone() if out is s else out
                    out[0, head] = torch.where(touched, new.to(s.dtype), out[0, head])
                if (layer, head) in self.watch:
                    self.scores[layer, head] = raw.to(self.run.residual.dtype)
            return out

        return scores

    def _delta(self, layer: int, head: int, offset: int, n: int, past: _Past) -> Tensor | None:
        """(n, offset + n) what the edits of one head add to its scores; None for nothing."""
        block = self.heads.block(layer)
        query = self._side(layer, head, 0, offset, n)
        key = self._side(layer, head, 1, offset, n)
        if offset and head in past.keys:
            key = past.keys[head].after(key)
        past.keys[head] = key
        if not bool(query.moved.any() or key.moved.any()):
            return None
        both = query.moved @ (key.base + key.moved).T + query.base @ key.moved.T
        return both / block.attn_scale

    def _side(self, layer: int, head: int, side: int, offset: int, n: int) -> _Side:
        """Queries (0) or keys (1) of the tokens ``offset`` to ``offset + n``."""
        block, run, wide = self.heads.block(layer), self.run, self.steered.wide
        number = block.group(head) if side else head
        at = torch.arange(offset, offset + n, device=run.residual.device)
        x = self.streams[layer].to(wide)
        dx = self._moved(HeadSide(layer, head, SIDES[side]), offset, n).to(wide)
        rows = dx.any(1)
        if not self.steered.frozen_norms:
            base = block.live(x, at, number, side)
            moved = torch.zeros_like(base)
            moved[rows] = block.live((x + dx)[rows], at[rows], number, side) - base[rows]
            return _Side(base, moved)
        of_prompt = at < run.n_pos
        clean = self.steered.whole(layer, side)[at[of_prompt], number].to(wide)
        base = torch.cat([clean, block.live(x[~of_prompt], at[~of_prompt], number, side)])
        moved = torch.zeros_like(base)
        for edited, is_clean in ((rows & of_prompt, True), (rows & ~of_prompt, False)):
            if bool(edited.any()):
                if is_clean:
                    by = self.heads.denominators(layer, at[edited], number, side)
                else:
                    by = block.denominators(x[edited], number, side)
                normed = block.ln1.at(by.scale.to(wide))(dx[edited])
                moved[edited] = block.project(normed, at[edited], number, side, by.tau)
        return _Side(base, moved)

    def _moved(self, place: HeadSide, offset: int, n: int) -> Tensor:
        """(n, d_model): what the edits of one side of a head add to the stream it reads."""
        run = self.run
        dx = run.residual.new_zeros(n, run.residual.shape[-1])
        if offset == 0 and place in self.moved:
            dx[: run.n_pos] = self.moved[place][:n]
        new = slice(max(run.n_pos - offset, 0), n)
        if new.start < n and place in self.intervention.held:
            dx[new] = self._held(place, new)
        return dx

    def _held(self, place: HeadSide, new: slice) -> Tensor:
        """The same at generated tokens: features are read off the steered stream."""
        dictionaries, dtype = self.steered.dictionaries.by_checkpoint, self.run.residual.dtype
        edits = self.intervention.held[place]
        before = {
            c: dictionaries[c].encode(self.streams[c][new].to(dtype))
            for c in {c for edit in edits for c, _ in edit.features}
        }
        after = {c: acts.clone() for c, acts in before.items()}
        for edit in edits:
            for c, acts in after.items():
                features = [f for read, f in edit.features if read == c]
                acts[:, features] = edit.apply(acts[:, features])
        moved = []
        for c, acts in before.items():
            step = after[c] - acts
            changed = step.any(0).nonzero().flatten()
            vectors = like(dictionaries[c].vectors(place.layer, changed), step)
            moved.append(step[:, changed] @ vectors)
        return torch.stack(moved).sum(0)

    def _pattern(self, layer: int) -> Callable[..., Tensor]:
        def pattern(p: Tensor, hook: Any) -> Tensor:
            n = self.run.n_pos
            if self.steered.frozen_patterns and p.shape[-2] >= n:
                steered = [h for at, h in self.intervention.heads if at == layer]
                frozen = p.clone()
                frozen[0, :, :n, :n] = self.run.pattern[layer].to(p.dtype)
                frozen[:, steered] = p[:, steered]
                p = frozen
            for at, head in self.watch:
                if at == layer:
                    self.patterns[at, head] = p[0, head].to(self.run.residual.dtype)
            return p

        return pattern

    def _output(self, layer: int) -> Callable[..., Tensor]:
        def output(z: Tensor, hook: Any) -> Tensor:
            z, n = z.clone(), z.shape[1]
            full = n >= self.run.n_pos  # else one generated token at a time
            for head in range(z.shape[2]):
                later = self.intervention.held_outputs.get((layer, head), 1.0)
                of_prompt = self.intervention.outputs.get((layer, head), (1.0,) * self.run.n_pos)
                factors = [*of_prompt, *[later] * (n - len(of_prompt))] if full else [later] * n
                if any(f != 1 for f in factors):
                    z[0, :, head] *= z.new_tensor(factors)[:, None]
            return z

        return output


def _group(keys: Tensor, scores: Tensor, head: int) -> int:
    """The key head of a query head, among (n, n_kv or n_heads, d_head) hooked keys."""
    return head // (scores.shape[1] // keys.shape[1])
