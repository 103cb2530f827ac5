"""The independent reference against Hugging Face's eager attention, and its own identities.

Hugging Face takes norms and softmax in float32 whatever the model's dtype, hence 1e-5 against it
and 1e-10 for the identities.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from helpers.architectures import ARCHITECTURES, prompt_ids, save_tiny
from helpers.reference import Reference, Run
from torch import Tensor
from transformers import PreTrainedModel

HF, EXACT = 1e-5, 1e-10
N_POS = 24  # past every sliding window, and long enough for rotary scaling to matter


def error(got: Tensor, want: Tensor) -> float:
    """Largest difference relative to the largest value wanted."""
    return ((got - want).abs().max() / want.abs().max()).item()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small are several times slower on two threads when the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def ids(name: str) -> list[int]:
    return prompt_ids(name, N_POS)


@pytest.fixture(scope="module")
def hf_model(name: str, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    return save_tiny(name, tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def reference(hf_model: PreTrainedModel) -> Reference:
    return Reference(hf_model)


@pytest.fixture(scope="module")
def run(reference: Reference, ids: list[int]) -> Run:
    return reference.run(ids)


def test_forward_pass_is_hugging_faces(
    hf_model: PreTrainedModel, run: Run, ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # What enters its softmax: patterns alone do not show what is constant over keys.
    softmax, scores = torch.nn.functional.softmax, []

    def spy(x: Tensor, *args, **kwargs) -> Tensor:
        scores.append(x[0])
        return softmax(x, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "softmax", spy)
    with torch.no_grad():
        out = hf_model(
            torch.tensor([ids]), output_attentions=True, output_hidden_states=True, use_cache=False
        )
    assert error(out.logits[0], run.logits) <= HF
    assert len(scores) == len(out.attentions) == len(run.pattern)
    for layer, pattern in enumerate(out.attentions):
        assert error(out.hidden_states[layer][0], run.residual[layer]) <= HF
        assert error(pattern[0], run.pattern[layer]) <= HF
        visible = run.mask[layer].expand_as(run.capped[layer])
        assert error(scores[layer][visible], run.capped[layer][visible]) <= HF
        assert (pattern[0][~visible] == 0).all()


def test_frozen_block_reproduces_the_run(reference: Reference, run: Run) -> None:
    for layer in range(reference.n_layers):
        out = reference.block_frozen(run, layer, run.residual[layer])
        assert error(out, run.residual[layer + 1]) <= EXACT


def test_scores_are_products_of_query_and_key_vectors(reference: Reference, run: Run) -> None:
    queries, keys = (0, 7, N_POS - 1), range(N_POS)

    def whole(vector: Callable[..., Tensor], layer: int, head: int, position: int) -> Tensor:
        at = (run, layer, head, position, run.residual[layer][position])
        return vector(*at) + vector(*at, const=True)

    for layer in range(reference.n_layers):
        for head in range(reference.n_heads):
            q = torch.stack([whole(reference.q_vector, layer, head, p) for p in queries])
            k = torch.stack([whole(reference.k_vector, layer, head, p) for p in keys])
            scores = run.scores[layer][head][list(queries)]
            assert error(q @ k.T / reference.attn_scale, scores) <= EXACT


def test_vectors_are_linear(reference: Reference, run: Run) -> None:
    u, w = torch.randn(2, run.residual[0].shape[1], generator=torch.Generator().manual_seed(0)).to(
        run.residual[0]
    )
    for vector in (reference.q_vector, reference.k_vector):
        parts = vector(run, 1, 1, 7, torch.stack([u, w]))
        assert error(parts.sum(0), vector(run, 1, 1, 7, u + w)) <= EXACT


def test_paths_sum_to_the_frozen_blocks_gradient(reference: Reference, run: Run) -> None:
    generator = torch.Generator().manual_seed(0)
    for layer in range(reference.n_layers):
        x = run.residual[layer].clone().requires_grad_()
        target = torch.randn(x.shape[1], generator=generator).to(x)
        out = reference.block_frozen(run, layer, x)
        for position in (3, N_POS - 1):
            (whole,) = torch.autograd.grad(target @ out[position], x, retain_graph=True)
            total = reference.path_gradients(run, layer, target, position)
            assert error(total.residual + total.mlp + total.heads.sum(0), whole) <= EXACT
            direct = reference.path_gradients(run, layer, target, position, direct=True)
            assert torch.equal(direct.mlp, total.mlp)
            others = torch.arange(N_POS) != position
            assert not (total.residual[others].any() or total.mlp[others].any())
            difference = error(direct.heads, total.heads)
            assert difference == 0 if reference.parallel else difference > 1e-2


def test_direct_heads_are_the_printed_formula(reference: Reference, run: Run) -> None:
    layer, position, source = 1, N_POS - 1, N_POS - 3
    block, per_group = reference.blocks[layer], reference.n_heads // reference.n_kv_heads
    target, v = torch.randn(
        2, run.residual[0].shape[1], generator=torch.Generator().manual_seed(0)
    ).to(run.residual[0])
    direct = reference.path_gradients(run, layer, target, position, direct=True)
    n = block.ln1.linear(v, run.ln1[layer][source])
    for head in range(reference.n_heads):
        write = n @ block.W_V[head // per_group] @ block.W_O[head]
        write = block.post1.linear(write, run.post1[layer][position])
        printed = run.pattern[layer][head, position, source] * (target @ write)
        assert torch.isclose(direct.heads[head, source] @ v, printed, rtol=EXACT, atol=EXACT)


def test_logit_direction(reference: Reference, run: Run) -> None:
    x, logits = run.residual[-1][-1], run.logits[-1]
    if reference.final_softcap is not None:
        logits = reference.final_softcap * torch.atanh(logits / reference.final_softcap)
    bias = reference.final_norm.bias @ reference.W_U
    for token in (5, 60):
        got = reference.logit_direction(run, token) @ x + bias[token] - bias.mean()
        assert error(got, logits[token] - logits.mean()) <= EXACT


def test_the_matrix_bites(name: str, reference: Reference, run: Run) -> None:
    """Windows, soft-caps and sharp attention are really there: forgetting one cannot pass."""
    windows = {"mistral": [5, 5, 5], "gemma2": [6, None, 6], "gemma3": [6, None, 6, None]}
    assert [b.window for b in reference.blocks] == windows.get(name, [None] * reference.n_layers)
    for layer in range(reference.n_layers):
        visible = run.mask[layer]
        scores = run.scores[layer][:, visible]
        assert scores.std() > 0.8
        capped = error(run.capped[layer][:, visible], scores)
        assert capped > 0.05 if name == "gemma2" else capped == 0
    assert run.logits.std() > 1
