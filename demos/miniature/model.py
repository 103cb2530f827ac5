"""The miniature's tokenizer and transformer, and the measurements of what it learned."""

import json
import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .corpus import (
    BOS,
    BOS_ID,
    DEMO_PROMPTS,
    EOS,
    PAD,
    TOKEN_PATTERN,
    UNK,
    Corpus,
    Prompt,
    tokenize,
    vocabulary,
)

CONTEXT = 64
SHORT_CONTEXT = 40
ANSWER_WEIGHT = 5.0
ROPE_THETA = 500.0
EMBEDDING = "model.embed_tokens.weight"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer whose tokens keep their leading space, so that decoding is exact."""
    ids = {token: i for i, token in enumerate(vocabulary())}
    backend = Tokenizer(models.WordLevel(ids, unk_token=UNK))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(TOKEN_PATTERN), behavior="isolated")
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, BOS_ID)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


class Batches:
    """Batches of token ids, and of a weight for each token, made from a corpus as they are asked.

    Args:
        corpus: The seeded corpus.
        batch: Number of documents in a batch.
        context: Number of tokens of a document, BOS included.
    """

    def __init__(self, corpus: Corpus, batch: int, context: int = CONTEXT):
        self.corpus = corpus
        self.batch = batch
        self.context = context
        self.ids = {token: i for i, token in enumerate(vocabulary())}

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The next batch: ids and weights, both (batch, context)."""
        ids, weights = [], []
        for _ in range(self.batch):
            tokens, marks = tokenize(self.corpus.document(self.context))
            ids.append([BOS_ID, *(self.ids[t] for t in tokens)][: self.context])
            weights.append([0.0, *(ANSWER_WEIGHT if m else 1.0 for m in marks)][: self.context])
        return torch.tensor(ids), torch.tensor(weights)


def build_model(*, layers: int = 4, heads: int = 8, width: int = 128) -> LlamaForCausalLM:
    """A small decoder with RMSNorm, rotary positions and a gated MLP, before its training."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary()),
            hidden_size=width,
            intermediate_size=width * 5 // 2,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=256,
            rope_theta=ROPE_THETA,
            tie_word_embeddings=True,
            initializer_range=0.05,
            pad_token_id=0,
            bos_token_id=BOS_ID,
            eos_token_id=2,
            attn_implementation="sdpa",
        )
    )
    torch.nn.init.normal_(model.get_parameter(EMBEDDING), std=0.2)
    look_back(model, offsets=(1, 2))
    return model


@torch.no_grad()
def look_back(model: LlamaForCausalLM, offsets: tuple[int, ...], score: float = 20.0) -> None:
    """Start the first heads of block 0 looking a fixed number of tokens back.

    Induction needs such a head before anything else can be learned, and chance takes thousands of
    steps to find one; from here on they are trained like all others. All embeddings get a shared
    direction, which these heads' queries and keys read; rotated to their positions, the two agree
    best at the offset.

    Args:
        model: The untrained transformer.
        offsets: The offset of each head.
        score: The attention score at the offset.
    """
    config = model.config
    width = config.hidden_size
    size = width // config.num_attention_heads
    embedding = model.get_parameter(EMBEDDING)
    direction = F.normalize(torch.randn(width), dim=0)
    embedding.add_(direction * embedding.pow(2).mean().sqrt() * math.sqrt(width))
    along = math.sqrt(width / 2)  # of a normalised embedding, along the shared direction
    frequencies = config.rope_theta ** (-torch.arange(0, size, 2) / size)
    amplitude = (torch.arange(size // 2) < 4) / 2.0  # the four fastest tell neighbours apart
    for head, offset in enumerate(offsets):
        angle = torch.rand(size // 2) * 2 * math.pi
        turned = angle + offset * frequencies
        gain = math.sqrt(score * math.sqrt(size)) / along
        rows = slice(head * size, (head + 1) * size)
        for name, phase in (("q_proj", angle), ("k_proj", turned)):
            vector = torch.cat([amplitude * phase.cos(), amplitude * phase.sin()])
            weight = model.get_parameter(f"model.layers.0.self_attn.{name}.weight")
            weight[rows] += gain * vector[:, None] * direction


def train_model(
    model: LlamaForCausalLM,
    source: Corpus,
    steps: int,
    *,
    batch: int,
    rate: float = 2e-3,
    muon_rate: float = 0.02,
    probe_every: int = 0,
) -> int:
    """Train the transformer on documents made as they are needed.

    The first third of the steps sees shorter documents, and more of them.

    Args:
        model: The transformer, trained in place.
        source: The documents' source.
        steps: Number of optimiser steps.
        batch: Documents per step.
        rate: Peak learning rate of AdamW (embedding and gains), after a linear warm-up and before
            a cosine decay to zero.
        muon_rate: The same of Muon (all other matrices).
        probe_every: Print held-out accuracies every so many steps; 0 for never.

    Returns:
        The number of tokens seen.
    """
    model.train()
    embedding = model.get_parameter(EMBEDDING)
    matrices = [p for p in model.parameters() if p.ndim > 1 and p is not embedding]
    others = [embedding, *(p for p in model.parameters() if p.ndim == 1)]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=muon_rate, weight_decay=0.01, momentum=0.95),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
    ]
    warmup = min(100, steps // 5 + 1)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda s: min((s + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * s / steps)),
        )
        for optimizer in optimizers
    ]
    short, full = Batches(source, batch * 3 // 2, SHORT_CONTEXT), Batches(source, batch)
    seen = 0
    bar = tqdm(range(steps), desc="model", mininterval=5)
    for step in bar:
        ids, weights = (short if 3 * step < steps else full).next()
        seen += ids.numel()
        logits = model(ids).logits[:, :-1]
        losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        weights = weights[:, 1:].flatten()
        loss = (losses * weights).sum() / weights.sum()
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        if step % 20 == 0:
            answers = losses[weights > 1].mean()
            bar.set_postfix(loss=f"{losses.mean():.3f}", answers=f"{answers:.3f}")
        if probe_every and (step + 1) % probe_every == 0:
            tqdm.write(f"{step + 1} {json.dumps(short_accuracy(model, 100))}")
    model.eval()
    return seen


@torch.no_grad()
def next_token(model: LlamaForCausalLM, texts: Iterable[str]) -> torch.Tensor:
    """Logits of the token that follows each text, (texts, vocabulary)."""
    ids = {token: i for i, token in enumerate(vocabulary())}
    rows = [[BOS_ID, *(ids[t] for t in tokenize(text)[0])] for text in texts]
    padded = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = torch.tensor(row)
    logits = model(padded).logits
    return logits[torch.arange(len(rows)), torch.tensor([len(row) - 1 for row in rows])]


def accuracy(model: LlamaForCausalLM, prompts: list[Prompt]) -> dict[str, float | int]:
    """Share of prompts whose most probable next token is the answer, by distractor."""
    ids = {token: i for i, token in enumerate(vocabulary())}
    best = next_token(model, [p.text for p in prompts]).argmax(-1).tolist()
    right = [b == ids[p.answer] for b, p in zip(best, prompts, strict=True)]
    plain = [r for r, p in zip(right, prompts, strict=True) if not p.distractor]
    distracted = [r for r, p in zip(right, prompts, strict=True) if p.distractor]
    return {
        "accuracy": sum(right) / len(right),
        "without_distractor": sum(plain) / len(plain),
        "with_distractor": sum(distracted) / len(distracted),
        "prompts": len(prompts),
    }


def accuracies(model: LlamaForCausalLM, count: int) -> dict[str, dict[str, float | int]]:
    """Held-out accuracies by task."""
    prompts = Corpus(10_007).evaluation_prompts(count)
    return {task: accuracy(model, items) for task, items in prompts.items()}


def short_accuracy(model: LlamaForCausalLM, count: int) -> dict[str, list[float]]:
    """Accuracies without and with a distractor, for the log."""
    model.eval()
    table = {
        task: [figures["without_distractor"], figures["with_distractor"]]
        for task, figures in accuracies(model, count).items()
    }
    model.train()
    return table


def demo_predictions(model: LlamaForCausalLM) -> list[dict[str, object]]:
    """The three most probable next tokens of every demo prompt."""
    tokens = vocabulary()
    probabilities = next_token(model, [prompt for prompt, _ in DEMO_PROMPTS]).softmax(-1)
    table: list[dict[str, object]] = []
    for (prompt, answer), row in zip(DEMO_PROMPTS, probabilities, strict=True):
        best = row.topk(3)
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        top = [[tokens[i], round(p, 4)] for i, p in pairs]
        table.append({"prompt": prompt, "answer": answer, "top": top, "right": top[0][0] == answer})
    return table


@torch.no_grad()
def induction_heads(model: LlamaForCausalLM, least: float = 0.1) -> dict[str, object]:
    """The heads behind the first demo prompt, whose last token is the second " Aunt".

    Args:
        model: The transformer.
        least: Attention below this is left out.

    Returns:
        Under ``induction`` the heads that attend from the last token to the first " Sally", under
        ``previous_token`` those that attend from that " Sally" to the " Aunt" in front of it, each
        as [layer, head, attention], the largest first.
    """
    prompt, answer = DEMO_PROMPTS[0]
    words = [BOS, *tokenize(prompt)[0]]
    ids = {token: i for i, token in enumerate(vocabulary())}
    name = words.index(answer)
    implementation = str(model.config._attn_implementation)
    model.set_attn_implementation("eager")
    patterns = model(torch.tensor([[ids[w] for w in words]]), output_attentions=True).attentions
    model.set_attn_implementation(implementation)

    def heads(query: int, key: int) -> list[list[float]]:
        found = [
            [layer, head, round(pattern[0, head, query, key].item(), 4)]
            for layer, pattern in enumerate(patterns)
            for head in range(pattern.shape[1])
        ]
        return sorted((h for h in found if h[2] >= least), key=lambda h: -h[2])

    return {
        "prompt": prompt,
        "position_of_first_name": name,
        "induction": heads(len(words) - 1, name),
        "previous_token": heads(name, name - 1),
    }
