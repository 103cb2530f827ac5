"""Which token stands in front of a prompt: the tokenizer's BOS, also where its id is 0."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.architectures import save_neox
from tokenizers import Tokenizer, models, pre_tokenizers
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.host import graph as host

WORDS = ["<zero>", "<one>", "<two>", "a", "b", "c"]


def word_tokenizer(**special: str) -> Any:
    """Words, of which some are special."""
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="c"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def tokens_of(prompt: Any, tokenizer: Any, name: str = "tiny") -> list[int]:
    return host.tokenize(prompt, tokenizer, "cpu", name).tolist()


def in_transformer_lens(tokenizer: Any, folder: Path) -> Any:
    """The tokenizer as TransformerLens leaves it: the end of text for a BOS that is not there."""
    tokenizer.save_pretrained(folder)
    sizes: dict[str, Any] = {"n_layers": 1, "d_model": 4, "n_ctx": 8, "d_head": 4}
    cfg = HookedTransformerConfig(**sizes, d_vocab=len(WORDS), attn_only=True, device="cpu")
    return HookedTransformer(cfg, AutoTokenizer.from_pretrained(folder)).tokenizer


@pytest.mark.parametrize("pad", [None, "<|padding|>", "<|endoftext|>"])
def test_neox(tmp_path: Path, pad: str | None) -> None:
    save_neox(tmp_path, pad)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.bos_token_id == 0 and tokenizer.convert_tokens_to_ids("<|padding|>") == 1
    plain = tokenizer("the cat", add_special_tokens=False).input_ids
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tokens_of("the cat", tokenizer) == [0, *plain]
        assert tokens_of("<|endoftext|>the cat", tokenizer) == [0, *plain]
        assert tokens_of("<|padding|>the cat", tokenizer) == [0, 1, *plain]
        middle = tokens_of("the<|endoftext|> cat", tokenizer)
        assert middle[0] == 0 and middle.count(0) == 2
        assert tokens_of([0, *plain], tokenizer) == [0, *plain]
    with pytest.raises(UserError, match="empty"):
        tokens_of("", tokenizer)


SPECIAL = {"bos_token": "<zero>", "pad_token": "<one>", "eos_token": "<two>"}


@pytest.mark.parametrize(
    ("special", "text", "expected"),
    [
        ({"bos_token": "<zero>"}, "a b", [0, 3, 4]),
        ({"bos_token": "<one>"}, "a b", [1, 3, 4]),
        (SPECIAL, "a <zero> b", [0, 3, 0, 4]),
        (SPECIAL, "<two> a", [0, 2, 3]),
        (SPECIAL, "<zero>", [0]),
        (SPECIAL, "a", [0, 3]),
    ],
)
def test_text_begins_with_the_bos(special: dict[str, str], text: str, expected: list[int]) -> None:
    assert tokens_of(text, word_tokenizer(**special)) == expected


@pytest.mark.parametrize(
    ("special", "expected"),
    [
        ({"eos_token": "<two>"}, 2),
        ({"pad_token": "<one>", "eos_token": "<two>"}, 1),  # circuit-tracer's order
        ({"pad_token": "<zero>", "eos_token": "<two>"}, 2),  # which skips id 0
        ({"unk_token": "<one>"}, 1),
        ({"pad_token": "<zero>"}, 0),  # where circuit-tracer ends in an error
    ],
)
def test_another_token_is_named(special: dict[str, str], expected: int) -> None:
    said = rf"no BOS: `{WORDS[expected]}` \(id {expected}\) stands in front of the prompt"
    with pytest.warns(host.FirstTokenWarning, match=said):
        assert tokens_of("a b", word_tokenizer(**special)) == [expected, 3, 4]


def test_what_transformer_lens_puts_there_is_no_bos(tmp_path: Path) -> None:
    tokenizer = in_transformer_lens(word_tokenizer(eos_token="<two>"), tmp_path)
    assert tokenizer.bos_token_id == 2
    with pytest.warns(host.FirstTokenWarning, match=r"no BOS: `<two>` \(id 2\)"):
        assert tokens_of("a b", tokenizer) == [2, 3, 4]


def test_without_any_special_token() -> None:
    with pytest.raises(UserError, match="no special token to put in front"):
        tokens_of("a b", word_tokenizer())


def test_ids_are_circuit_tracers() -> None:
    """Its own rule, and its choice is named; what it cannot do gets the special token of id 0."""
    assert tokens_of([2, 3], word_tokenizer(**SPECIAL)) == [2, 3]
    with pytest.warns(host.FirstTokenWarning, match=r"`<one>` \(id 1\).*the BOS \(id 0\)"):
        assert tokens_of([3, 4], word_tokenizer(**SPECIAL)) == [1, 3, 4]
    assert tokens_of(torch.tensor([3, 4]), word_tokenizer(bos_token="<zero>")) == [0, 3, 4]
    bos_1 = word_tokenizer(bos_token="<one>")
    assert tokens_of([3], bos_1) == [1, 3] and tokens_of([1], bos_1) == [1]


class Nested:
    """Adds its BOS to every text and gives a batch of one."""

    bos_token_id, pad_token_id, eos_token_id, all_special_ids = 0, None, None, [0]

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        return type("Encoded", (), {"input_ids": [[0, 3, 4]]})


def test_a_tokenizer_that_adds_its_own_bos() -> None:
    assert tokens_of("a b", Nested()) == [0, 3, 4]


PREFIX = [2, 105, 2364, 107]


class Chat:
    """As much of Gemma-3's tokenizer as its chat prefix needs."""

    bos_token_id, pad_token_id, eos_token_id, all_special_ids = 2, 0, 1, [0, 1, 2]

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        return type("Encoded", (), {"input_ids": [int(word) for word in text.split()]})

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def test_gemma_3_it_wants_its_chat_prefix() -> None:
    chat = " ".join(map(str, [*PREFIX, 9]))
    assert tokens_of(chat, Chat(), "gemma-3-1b-it") == [*PREFIX, 9]
    for without in ("9 10", chat.removeprefix("2 ")):
        with pytest.raises(UserError, match="does not suit gemma-3-1b-it"):
            tokens_of(without, Chat(), "gemma-3-1b-it")
    assert tokens_of("9 10", Chat(), "gemma-3-1b-pt") == [2, 9, 10]


def _stock(tokenizer: Any) -> Callable[[Any], list[int]]:
    from circuit_tracer.replacement_model import replacement_model_transformerlens as home

    cfg = type("Cfg", (), {"device": "cpu", "model_name": "tiny"})
    model = type("Model", (), {"tokenizer": tokenizer, "cfg": cfg})
    ensure: Any = home.TransformerLensReplacementModel.ensure_tokenized
    return lambda ids: ensure(model, ids).tolist()


@pytest.mark.parametrize("special", [{"bos_token": "<zero>"}, SPECIAL, {"pad_token": "<zero>"}])
@pytest.mark.filterwarnings("ignore::circuit_tracer_qk.host.graph.FirstTokenWarning")
def test_circuit_tracer_leaves_our_ids_alone(special: dict[str, str]) -> None:
    tokenizer = word_tokenizer(**special)
    ids = host.tokenize("a b", tokenizer, "cpu", "tiny")
    assert ids[0] == 0 and _stock(tokenizer)(ids) == ids.tolist()
