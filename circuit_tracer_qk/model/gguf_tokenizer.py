"""The tokenizer of a Gemma that is stored as GGUF.

transformers reads it as a unigram model with ranks for log-probabilities, which splits words into
other pieces than the model was trained on (" France" into six). It is SentencePiece's BPE: a merge
is as good as the score of the piece that it makes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

CONTROL, USER_DEFINED = 3, 4  # types of tokens
SPACE = "\u2581"  # as SentencePiece writes one


def read_gemma_tokenizer(file: Path) -> Any:
    """A fast tokenizer from the file's own pieces, scores and special tokens."""
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(file).fields

    def read(name: str) -> Any:
        field = fields.get(f"tokenizer.{name}")
        return None if field is None else field.contents()

    pieces = [token.replace(" ", SPACE) for token in read("ggml.tokens")]
    types = read("ggml.token_type")
    named = {
        f"{role}_token": pieces[i]
        for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if (i := read(f"ggml.{key}_token_id")) is not None
    }
    inner = Tokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)},
            _merges(pieces, read("ggml.scores")),
            unk_token=named.get("unk_token"),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    inner.normalizer = normalizers.Replace(" ", SPACE)
    inner.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    of_type = {
        kind: [p for p, t in zip(pieces, types, strict=True) if t == kind] for kind in set(types)
    }
    inner.add_special_tokens([AddedToken(p, normalized=False) for p in of_type.get(CONTROL, ())])
    # what is never split, as the normalised text has it: runs of spaces and line breaks, tags
    inner.add_tokens([AddedToken(p, normalized=True) for p in of_type.get(USER_DEFINED, ())])
    template = read("chat_template")
    options: dict[str, Any] = named | {"name_or_path": str(file.parent)}
    if template is not None:
        options["chat_template"] = template
    if "bos_token" in named:
        bos = named["bos_token"]
        inner.post_processor = processors.TemplateProcessing(
            f"{bos} $A", special_tokens=[(bos, inner.token_to_id(bos))]
        )
        options["add_bos_token"] = True  # so does TransformerLens know that it is put in front
    return PreTrainedTokenizerFast(tokenizer_object=inner, **options)


def _merges(pieces: list[str], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, the best piece first."""
    ids = {piece: i for i, piece in enumerate(pieces)}
    found = []
    for piece, score in zip(pieces, scores, strict=True):
        for cut in range(1, len(piece)):
            left, right = ids.get(piece[:cut]), ids.get(piece[cut:])
            if left is not None and right is not None:
                found.append((-score, left, right))
    return [(pieces[left], pieces[right]) for _, left, right in sorted(found)]
