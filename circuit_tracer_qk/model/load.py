"""A name becomes an exact TransformerLens model.

TransformerLens' own conversion of a local Hugging Face folder is silently wrong for many models
(it ignores rotary bases and scalings, biases and head sizes). Here the configuration is built from
Hugging Face's own fields, only TransformerLens' weight conversions are reused, and the result must
give Hugging Face's logits before anybody sees it. What cannot be done exactly is refused by name.
"""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.base.memory import fitting
from circuit_tracer_qk.model.config_fields import check_fields
from circuit_tracer_qk.model.conversion import (
    CONVERTERS,
    build_config,
    convert_weights,
    empty_model,
    fill,
    set_scaled_rotary,
)
from circuit_tracer_qk.model.huggingface import (
    TOO_LARGE,
    Source,
    architecture_of,
    first_line,
    read_config,
    read_tokenizer,
    read_weights,
)

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

# Largest difference between the two models' logits, as a part of the spread of the logits.
LOGITS_TOLERANCE = 1e-3
# Rotary tables: Hugging Face's float32 angles are off by about 1e-3 at position 8192.
ROTARY_TOLERANCE = 1e-2
# Names whose weights TransformerLens keeps in its own format: there is no Hugging Face model.
TRANSFORMER_LENS_ONLY = ("NeelNanda/", "ArthurConmy/", "Baidicoot/")


def load_transformer(
    name: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    check: Callable[[HookedTransformer], None] | None = None,
) -> HookedTransformer:
    """Loads a model whose logits are Hugging Face's.

    Peak memory, in float32 (float64 if asked for): the weights, the unembedding counted by itself,
    its copy in a forward pass of TransformerLens 3, a mask of n_ctx^2 bytes for each kind of
    attention, and the pages of the weights' file where it is of this dtype. Hugging Face's copy of
    a tensor is freed as soon as it has been copied. (Twice the weights and a mask a layer for the
    architectures that only TransformerLens converts.)

    Args:
        name: a local Hugging Face folder, a hub id ``org/name[@revision]`` (a cached copy is used
            without asking the network) or a TransformerLens name such as ``gpt2``.
        dtype: float32, float64, bfloat16 or float16. The 16-bit ones are compared with Hugging
            Face in float32 and rounded afterwards.
        device: where the model goes; default cuda if there is one, else cpu.
        check: called with the model while it is still exact (float32 or float64, on the CPU),
            to refuse it.

    Returns:
        The unprocessed model (nothing folded, nothing centred) in eval mode, its parameters
        without gradients. ``cfg.tokenizer_name`` is the absolute folder or the hub id. A folder
        without tokenizer files gives ``tokenizer`` and ``cfg.tokenizer_name`` None; such a model
        takes token ids only.

    Raises:
        UserError: the name, the files or the architecture cannot be loaded exactly.
    """
    check_dtype(dtype)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    source = Source.find(str(name))
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    full = fitting(f"the model {source.title}", TOO_LARGE)
    with full, _quiet(bars=not source.local), torch.no_grad():
        if source.path.startswith(TRANSFORMER_LENS_ONLY):
            model = _by_transformer_lens(source, None, exact)
        else:
            model = _converted(source, exact)
        if check is not None:
            check(model)
        return _finish(model, dtype, device)


def check_dtype(dtype: Any) -> None:
    """Refuse a dtype that no model runs in.

    Raises:
        UserError: which ones are.
    """
    if dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise UserError(f"dtype {dtype!r:.60} is not one of float32, float64, bfloat16, float16.")


def _converted(source: Source, dtype: torch.dtype) -> HookedTransformer:
    """The model of a Hugging Face source, on the CPU and compared with Hugging Face's."""
    config = read_config(source)
    architecture = architecture_of(source, config)
    if architecture in CONVERTERS:
        check_fields(config, source.title)
        # the same scores in float32, and rounded ones in float64
        config.reorder_and_upcast_attn = False
        cfg = build_config(config, architecture)
        cfg.model_name, cfg.dtype = source.title, dtype
        tokenizer = read_tokenizer(source, config.model_type)
        cfg.tokenizer_name = None if tokenizer is None else source.path
        model = empty_model(cfg, tokenizer)
        hf_model = read_weights(source, config, dtype)
        try:
            reference = Reference.run(hf_model, cfg)
        except Exception as error:  # a field of its configuration that only running it shows
            raise source.failure("config.json", error) from error
        state = convert_weights(hf_model, cfg, architecture)
        del hf_model
        gc.collect()
        fill(model, state)
        set_scaled_rotary(model, config)
    elif source.local:
        supported = ", ".join(CONVERTERS)
        raise UserError(
            f"{source.title} is a {architecture}, which cannot be converted exactly from a local "
            f"folder; use one of {supported}."
        )
    else:
        hf_model = read_weights(source, config, dtype)
        model = _by_transformer_lens(source, hf_model, dtype)
        reference = Reference.run(hf_model, model.cfg)
    reference.check(model, source.title)
    return model


def _by_transformer_lens(source: Source, hf_model: Any, dtype: torch.dtype) -> HookedTransformer:
    """TransformerLens' own unprocessed loading, for what only TransformerLens knows."""
    from transformer_lens import HookedTransformer

    try:
        return HookedTransformer.from_pretrained_no_processing(
            source.path, hf_model=hf_model, dtype=dtype, device="cpu"
        )
    except Exception as error:
        raise UserError(
            f"TransformerLens cannot load {source.title} ({first_line(error)}); use a model of "
            f"one of the architectures {', '.join(CONVERTERS)}."
        ) from error


def _finish(
    model: HookedTransformer, dtype: torch.dtype, device: torch.device
) -> HookedTransformer:
    """Rounds to ``dtype``, moves to ``device`` and shares what is equal in all layers."""
    cfg = model.cfg
    gemma = CONVERTERS.get(cfg.original_architecture or "") == "convert_gemma_weights"
    if gemma and dtype != cfg.dtype:
        # Gemma rounds the factor of its embeddings to the dtype it runs in (33.94 -> 34.0).
        scale = cfg.d_model**0.5
        model.embed.W_E.data.mul_(float(torch.tensor(scale, dtype=dtype)) / scale)
    cfg.dtype, cfg.device = dtype, str(device)
    shared: dict[tuple[str, str], Tensor] = {}
    for block in model.blocks:
        attention: Any = block.attn
        for name, buffer in list(attention.named_buffers(recurse=False)):
            if name not in ("mask", "rotary_sin", "rotary_cos"):
                continue
            key = attention.attn_type, name
            if key not in shared:
                shared[key] = buffer.to(device, dtype if buffer.is_floating_point() else None)
            setattr(attention, name, shared[key])
    nn.Module.to(model, device=device, dtype=dtype)  # leaves alone what is as asked
    return model.requires_grad_(False).eval()


@dataclass
class Reference:
    """What Hugging Face's model computes, kept after the model itself is freed.

    Attributes:
        runs: (tokens (1, n), logits (1, n, d_vocab)) of each sequence.
        rotary: attention type -> (cos, sin), each (n_ctx, rotary_dim).
    """

    runs: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    rotary: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def run(cls, hf_model: Any, cfg: HookedTransformerConfig) -> Reference:
        """Runs 16 fixed tokens, and more than a short window's worth where there is one."""
        lengths = [min(cfg.n_ctx, 16)]
        if cfg.use_local_attn and (cfg.window_size or 0) < 64:
            lengths.append(min(cfg.n_ctx, max(16, (cfg.window_size or 0) + 8)))
        reference = cls()
        for seed, length in enumerate(lengths):
            generator = torch.Generator().manual_seed(seed)
            tokens = torch.randint(cfg.d_vocab, (1, length), generator=generator)
            reference.runs.append((tokens, hf_model(tokens, use_cache=False).logits))
        base = getattr(hf_model, "model", hf_model.base_model)  # Gemma-3's base is itself
        tables = {"global": "rotary_emb", "local": "rotary_emb"}
        if hasattr(base, "rotary_emb_local"):
            tables["local"] = "rotary_emb_local"
        if cfg.original_architecture in CONVERTERS and hasattr(base, "rotary_emb"):
            positions = torch.arange(cfg.n_ctx)[None]
            for kind, name in tables.items():
                cos, sin = getattr(base, name)(torch.zeros((), dtype=cfg.dtype), positions)
                reference.rotary[kind] = (cos[0], sin[0])
        return reference

    def check(self, model: HookedTransformer, title: str) -> None:
        """Refuses a model that differs from Hugging Face's.

        The rotary tables are compared over the whole context, because 16 tokens hardly see a
        wrong base or scaling.

        Raises:
            UserError: the logits or a rotary table differ.
        """
        way_out = "the conversion is not exact for this model, please report it"
        for i, block in enumerate(model.blocks):
            attention: Any = block.attn
            for name, table in zip(
                ("rotary_cos", "rotary_sin"), self.rotary.get(attention.attn_type, ()), strict=False
            ):
                ours = getattr(attention, name)
                if ours.shape != table.shape or (ours - table).abs().max() > ROTARY_TOLERANCE:
                    raise UserError(
                        f"The rotary positions of {title} in layer {i} are not Hugging Face's; "
                        f"{way_out}."
                    )
        for tokens, logits in self.runs:
            difference = float((model(tokens) - logits).abs().max())
            limit = LOGITS_TOLERANCE * float(logits.max() - logits.min())
            if not difference <= limit:
                raise UserError(
                    f"The converted model's logits for {title} differ from Hugging Face's by "
                    f"{difference:.2g} (limit {limit:.2g}) on {tokens.shape[1]} tokens; {way_out}."
                )


@contextlib.contextmanager
def _quiet(bars: bool) -> Iterator[None]:
    """Silences the libraries' notices while a model loads and leaves logging as it was.

    Args:
        bars: keep the progress bars, for what may be downloaded.
    """
    import huggingface_hub.utils.logging as hub_logging
    import transformers.utils.logging as hf_logging

    handlers = logging.root.handlers[:]
    verbosity, hub_verbosity = hf_logging.get_verbosity(), hub_logging.get_verbosity()
    silenced = hf_logging.is_progress_bar_enabled() and not bars
    hf_logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    if silenced:
        hf_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        hf_logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(hub_verbosity)
        if silenced:
            hf_logging.enable_progress_bar()
        logging.root.handlers[:] = handlers
