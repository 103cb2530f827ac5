"""Frozen blocks without MLPs as linear maps, against Hugging Face's weights and autograd."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers.architectures import ARCHITECTURES
from helpers.linear_blocks import KINDS, Cases, N, linear_block
from torch import Tensor
from transformer_lens import HookedTransformerConfig
from transformer_lens.components.layer_norm import LayerNorm

from circuit_tracer_qk import UserError
from circuit_tracer_qk.attribution.transcoder.hookpoints import READS, WRITES, read_hook_points


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    return Cases(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("reads, writes, skip", KINDS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_blocks_are_the_linear_maps_they_should_be(cases, record_error, name, reads, writes, skip):
    case = cases(name, reads, writes, skip)
    generator = torch.Generator().manual_seed(1)
    d = case.run.residual[0].shape[1]
    worst = 0.0
    for layer in range(case.reference.n_layers):
        for start in (0, 3):
            x = torch.zeros(N, d, dtype=torch.float64)
            x[start:] = torch.randn(N - start, d, generator=generator, dtype=torch.float64)
            x.requires_grad_()
            mid, out = linear_block(case, layer, x)
            carried = case.blocks.carry(layer, x.detach()[None, start:], start)
            worst = max(
                worst, error(carried.mid[0], mid[start:]), error(carried.out[0], out[start:])
            )
            assert not out[:start].detach().any()  # nothing flows back in time

            end = 7
            g = torch.zeros(N, d, dtype=torch.float64)
            g[:end] = torch.randn(end, d, generator=generator, dtype=torch.float64)
            gradients = case.blocks.vjp(layer, g[None, :end])
            (expected,) = torch.autograd.grad((g * out).sum(), x, retain_graph=True)
            worst = max(worst, error(gradients.whole[0, start:], expected[start:end]))
            at_mid = case.blocks.vjp_mid(layer, g[None, :end])
            (expected,) = torch.autograd.grad((g * mid).sum(), x)
            worst = max(worst, error(at_mid.whole[0, start:], expected[start:end]))

            # a head's part is what goes missing without its write
            here = slice(0, end - start)
            parts = (gradients.z[0, start:] * carried.z[0, here]).sum((0, 2))
            total = (g * out.detach()).sum()
            for head in range(case.reference.n_heads):
                less = (g * linear_block(case, layer, x.detach(), without=head)[1]).sum()
                worst = max(worst, error(parts[head], total - less, total))
            bypass = (gradients.bypass[0, start:] * x.detach()[start:end]).sum()
            worst = max(worst, error(parts.sum() + bypass, total))
    record_error("carry: heads, bypass, skip", name, worst)
    assert worst < 1e-10


def error(ours: Tensor, theirs: Tensor, scale: Tensor | None = None) -> float:
    if not ours.numel():
        return 0.0
    size = theirs if scale is None else scale
    return float((ours - theirs.detach()).abs().max() / size.detach().abs().max().clamp_min(1e-12))


def test_unknown_hooks_are_refused(cases):
    case = cases("gpt2", READS[0], WRITES[0], False)
    with pytest.raises(UserError, match="hook_resid_post"):
        read_hook_points([], case.blocks.heads.run, "hook_resid_post", WRITES[0], [])


@pytest.mark.parametrize("before", [True, False], ids=["before the gain", "after it"])
def test_where_a_norms_hook_lies_is_asked_of_the_norm(cases, monkeypatch, before):
    """TransformerLens' LayerNorm has had ``hook_normalized`` on either side of its gain."""
    run = cases("gpt2", READS[0], WRITES[0], False).blocks.heads.run

    def forward(self: LayerNorm, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        x = x / self.hook_scale((x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt())
        if before:
            return self.hook_normalized(x) * self.w + self.b
        return self.hook_normalized(x * self.w + self.b)

    monkeypatch.setattr(LayerNorm, "forward", forward)
    cfg = HookedTransformerConfig(
        n_layers=1, d_model=8, n_ctx=4, d_head=4, n_heads=2, attn_only=True, d_vocab=5
    )
    ln = LayerNorm(cfg)
    torch.nn.init.normal_(ln.w)
    blocks = [SimpleNamespace(ln2=ln, ln2_post=None)] * run.n_layers
    none = [None] * run.n_layers
    (point, *_) = read_hook_points(blocks, run, "ln2.hook_normalized", "hook_mlp_out", none)
    assert (point.ln2.w is None) == before
    (point, *_) = read_hook_points(blocks, run, "mlp.hook_in", "hook_mlp_out", none)
    assert point.ln2.w is not None
