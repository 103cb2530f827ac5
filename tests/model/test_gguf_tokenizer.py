"""Gemma's tokenizer from a GGUF file: the pieces of SentencePiece's own BPE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest

from circuit_tracer_qk.model.gguf_tokenizer import read_gemma_tokenizer

TEXTS = [
    "the cat sat on the mat",
    "  two   spaces and a\n\nbreak",
    "unknown é letters, 17 of them",
    "<turn>the mat",
    " ",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A tokenizer as Gemma's was trained, and a GGUF file of it as llama.cpp's converter writes it."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("pieces")
    lines = ["the cat sat on the mat and the dog sat on the cat", "spaces and breaks and letters"]
    (folder / "text.txt").write_text("\n".join(lines * 30))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "pieces"),
        model_type="bpe",
        vocab_size=340,
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=["\u2581\u2581", "\u2581\u2581\u2581", "\n\n", "\n"],
        control_symbols=["<turn>"],
        hard_vocab_limit=False,
        minloglevel=2,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "pieces.model"))
    ids = range(pieces.get_piece_size())
    types = [
        2 if pieces.is_unknown(i) else 3 if pieces.is_control(i) else 6 if pieces.is_byte(i) else 1
        for i in ids
    ]
    tokens = [pieces.id_to_piece(i) for i in ids]
    for i, token in enumerate(tokens):
        if token in ("\u2581\u2581", "\u2581\u2581\u2581", "\n\n", "\n"):
            tokens[i], types[i] = token.replace("\u2581", " "), 4
    path = folder / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([pieces.get_score(i) for i in ids])
    writer.add_token_types(types)
    for add, i in (
        (writer.add_unk_token_id, pieces.unk_id()),
        (writer.add_bos_token_id, pieces.bos_id()),
        (writer.add_eos_token_id, pieces.eos_id()),
    ):
        add(i)
    writer.add_chat_template("{{ messages }}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return pieces, path


def test_it_splits_as_sentencepiece_does(trained: tuple[Any, Path]) -> None:
    pieces, path = trained
    tokenizer = read_gemma_tokenizer(path)
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        control = text.startswith("<turn>")  # which SentencePiece reads in no text
        expected = pieces.encode(text.removeprefix("<turn>"))
        assert ids == [pieces.piece_to_id("<turn>")] * control + expected, text
        assert tokenizer.decode(ids) == text
    assert tokenizer("the").input_ids[0] == tokenizer.bos_token_id == pieces.bos_id()
    assert tokenizer.chat_template == "{{ messages }}"
