"""SmolLM2-135M: tables, edges and heads of a trained model, against Hugging Face's own in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers.errors import record_error
from helpers.smollm2 import gguf_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import circuit_tracer_qk as ctqk

PROMPT = "I always loved visiting Aunt Sally. Whenever I was feeling sad, Aunt"
ALIKE = 1e-5  # of the sum of |terms|, float32


class Real(NamedTuple):
    """The model as Hugging Face runs it in float64, and as this package reads it."""

    theirs: Any
    model: ctqk.ResidualModel
    ids: Tensor
    states: tuple[Tensor, ...]  # the stream before every block
    patterns: tuple[Tensor, ...]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Real:
    file = gguf_file()
    folder = tmp_path_factory.mktemp("smollm2")
    theirs = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float64, attn_implementation="eager"
    )
    # dictionaries that need no training: some directions of the stream, random biases
    from helpers.random_dictionaries import write_sae

    write_sae(
        folder / "saes", theirs.config.hidden_size, list(range(theirs.config.num_hidden_layers))
    )
    model = ctqk.load_model(file, folder / "saes", device="cpu")
    ids = model.ensure_tokenized(PROMPT)
    with torch.no_grad():
        out = theirs(ids[None], output_hidden_states=True, output_attentions=True)
    return Real(theirs, model, ids, out.hidden_states, tuple(p[0] for p in out.attentions))


@pytest.fixture(scope="module")
def graph(real: Real) -> ctqk.ResidualGraph:
    return ctqk.attribute(PROMPT, real.model, max_feature_nodes=200, max_n_logits=2)


def test_patterns_and_scores_are_hugging_faces(real: Real, graph: ctqk.ResidualGraph) -> None:
    worst = 0.0
    for layer in (0, 7, 18, 23, 24, 29):
        for head in range(9):
            row = graph.qk_row(layer, head, len(real.ids) - 1)
            worst = max(worst, float((row.pattern - real.patterns[layer][head, -1]).abs().max()))
            scores = row.scores - row.scores.max()
            expected = real.patterns[layer][head, -1].log()
            expected = expected - expected.max()
            seen = expected > -20
            assert torch.allclose(scores.double()[seen], expected[seen], atol=2e-3)
    record_error("SmolLM2: patterns (float32)", "llama", worst)
    assert worst < 1e-4


def rotated(x: Tensor, position: int, base: float) -> Tensor:
    """A query or key turned by its position, half against half."""
    half = x.shape[-1] // 2
    angle = position / base ** (torch.arange(half, dtype=torch.float64) / half)
    cos, sin = angle.cos(), angle.sin()
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def test_terms_are_products_of_projected_components(real: Real, graph: ctqk.ResidualGraph) -> None:
    """Every term from plain weights: W_Q and W_K of the component, divided by the stream's norm."""
    worst = 0.0
    known = real.model.dictionaries.by_checkpoint
    for layer, head, query, key in ((5, 3, 14, 6), (23, 2, 14, 6), (24, 4, 14, 6), (29, 8, 10, 10)):
        table = graph.qk(layer, head, query, key)
        block = real.theirs.model.layers[layer]
        cfg = real.theirs.config
        d = cfg.hidden_size // cfg.num_attention_heads
        group = head // (cfg.num_attention_heads // cfg.num_key_value_heads)
        weights = (
            block.self_attn.q_proj.weight[head * d : (head + 1) * d],
            block.self_attn.k_proj.weight[group * d : (group + 1) * d],
        )
        gain, images = block.input_layernorm.weight, []
        for components, weight, position in (
            (table.query, weights[0], query),
            (table.key, weights[1], key),
        ):
            x = real.states[layer][0, position]
            denominator = (x.pow(2).mean() + cfg.rms_norm_eps).sqrt()
            vectors, left = [], x.clone()
            dictionary = known[layer]
            acts = dictionary.encode(x[None].float())[0].double()
            for c in components:
                if c.kind == "feature":
                    assert c.activation is not None
                    row = dictionary.vectors(layer, torch.tensor([c.feature]))[0].double()
                    assert abs(acts[c.feature] - c.activation) < 1e-3 * abs(c.activation) + 1e-4
                    vectors.append(c.activation * row)
                elif c.kind == "bias":
                    vectors.append(dictionary.b_dec.double())
                else:
                    vectors.append(torch.full_like(x, float("nan")))
            stacked = torch.stack(vectors)
            rest = stacked.isnan().any(1)
            stacked[rest] = left - stacked[~rest].sum(0)
            images.append(
                rotated((stacked / denominator * gain) @ weight.T, position, cfg.rope_theta)
            )
        with torch.no_grad():
            terms = images[0] @ images[1].T / d**0.5
        error = float((table.terms.double() - terms).abs().max() / terms.abs().sum())
        worst = max(worst, error)
        assert abs(table.score - float(terms.sum())) < ALIKE * float(terms.abs().sum())
    record_error("SmolLM2: QK terms (float32)", "llama", worst)
    assert worst < ALIKE


def test_edges_are_those_of_a_frozen_forward_pass(real: Real, graph: ctqk.ResidualGraph) -> None:
    """A source taken out of the stream before one block, with patterns and norms frozen by hand."""
    worst = 0.0
    rows = graph.adjacency_matrix[: graph.n_features]
    strongest = rows[:, : graph.n_features].abs().flatten().topk(200).indices.tolist()
    wanted: dict[tuple[int, bool], tuple[int, int]] = {}
    for i in strongest:
        target, source = divmod(i, graph.n_features)
        edge = graph.edge(source, target)
        assert edge.layer is not None
        wanted.setdefault((edge.layer, edge.query != edge.key), (source, target))
    assert len(wanted) > 4
    for (layer, _), (source, target) in list(wanted.items())[:12]:
        edge = graph.edge(source, target)
        active = graph.active_features[graph.selected_features]
        vector = {}
        for node in (source, target):
            checkpoint, position, feature = (int(n) for n in active[node] + torch.tensor([1, 0, 0]))
            acts = graph.activation_values[graph.selected_features[node]]
            rows_of = real.model.dictionaries.by_checkpoint[checkpoint]
            decoder = rows_of.vectors(checkpoint, torch.tensor([feature]))[0].double()
            vector[node] = (position, float(acts) * decoder)
        at, v = vector[source]
        to, y = vector[target]
        write = frozen_block(real, layer, at, v, to)
        expected = float(write @ y)
        size = abs(edge.residual) + abs(edge.mlp) + float(edge.heads.total.abs().sum())
        worst = max(worst, abs(edge.weight - expected) / size)
    record_error("SmolLM2: edges (float32)", "llama", worst)
    assert worst < ALIKE * 10


def frozen_block(real: Real, layer: int, at: int, v: Tensor, to: int) -> Tensor:
    """What a vector at one position becomes at another, across one block whose patterns and
    denominators are those of the run: attention by hand, the MLP's gradient by autograd."""
    cfg, block = real.theirs.config, real.theirs.model.layers[layer]
    d, n_heads = cfg.hidden_size // cfg.num_attention_heads, cfg.num_attention_heads
    per_group = n_heads // cfg.num_key_value_heads
    x = real.states[layer][0]

    def scale(stream: Tensor) -> Tensor:
        return (stream.pow(2).mean(-1, keepdim=True) + cfg.rms_norm_eps).rsqrt()

    with torch.no_grad():
        n = v * scale(x)[at] * block.input_layernorm.weight
        values = block.self_attn.v_proj.weight.view(-1, d, cfg.hidden_size) @ n
        heads = [
            float(real.patterns[layer][h, to, at]) * values[h // per_group] for h in range(n_heads)
        ]
        attention = block.self_attn.o_proj.weight @ torch.cat(heads)
        whole = block.self_attn.v_proj(x * scale(x) * block.input_layernorm.weight)
        whole = whole.view(len(x), -1, d)
        mixed = torch.cat(
            [real.patterns[layer][h, to] @ whole[:, h // per_group] for h in range(n_heads)]
        )
        mid = x[to] + block.self_attn.o_proj.weight @ mixed
        moved = attention + (v if at == to else 0)
        gain = scale(mid) * block.post_attention_layernorm.weight
    _, through = torch.autograd.functional.jvp(lambda m: block.mlp(m * gain), mid, moved)
    return (moved + through).detach()


# With trained dictionaries ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(real: Real, shared: Path) -> ctqk.ResidualModel:
    return ctqk.load_model(real.model.transformer, shared / "smollm2" / "saes")


def test_the_heads_that_carry_sally_and_what_they_read(trained: ctqk.ResidualModel) -> None:
    """Induction, in these heads' QK circuits alone: what each one's table ranks first is removed."""
    graph = ctqk.attribute(PROMPT, trained, max_feature_nodes=3000)
    assert len(graph.active_features) == 13440
    last = graph.n_pos - 1
    [key] = [i for i, token in enumerate(graph.token_strings) if token == " Sally"]
    heads = ctqk.select_heads(graph, query=last, key=key, count=8)
    assert {(24, 4), (23, 7)} <= set(heads[:5])
    edits = []
    for layer, head in heads:
        table = graph.qk(layer, head, last, key)
        order = table.key_marginal.argsort(descending=True).tolist()
        features = [table.key[i].name for i in order if table.key[i].kind == "feature"][:5]
        edits.append(ctqk.QKEdit((layer, head), "key", features=features, positions=key, factor=0))
    run = ctqk.steer(trained, PROMPT, edits, norms="frozen", controls=3, seed=0)
    effect = run.effect(" Sally")
    assert run.clean.probability(" Sally") == pytest.approx(0.762, abs=0.005)
    assert run.probability(" Sally") < 0.02
    assert effect.features.mean > 0.65 and effect.heads.mean > 0.65
