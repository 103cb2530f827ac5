"""Residual SAEs and a weakly causal crosscoder (WCC) of the miniature, and their measurements.

Both are one thing here: encoders that read the residual stream after block i, with decoders to the
sites i, ..., i + reach_i - 1. An SAE's reach is 1; a WCC's goes to the last site, and site k is
reconstructed by the features of every encoder i <= k. Training sees centred and scaled activations
and keeps the k largest per encoder and batch (BatchTopK); what is saved is folded back into the
model's own units, with one JumpReLU threshold per encoder.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaForCausalLM

from .corpus import Corpus
from .model import Batches

MODEL_NAME = "circuit-tracer-qk/miniature"
DEAD_AFTER = 150
AUXILIARY_K = 32
AUXILIARY_WEIGHT = 1 / 16


@contextmanager
def site_hooks(
    model: LlamaForCausalLM, change: Callable[[int, Tensor], Tensor | None]
) -> Iterator[None]:
    """Call ``change(site, residual)`` after every block; a tensor it returns takes its place."""

    def hook(site: int) -> Callable[[nn.Module, object, Tensor], Tensor | None]:
        return lambda _module, _inputs, output: change(site, output)

    blocks = enumerate(model.model.layers)
    handles = [block.register_forward_hook(hook(site)) for site, block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def collect(model: LlamaForCausalLM, seed: int, documents: int) -> tuple[Tensor, Tensor]:
    """Token ids and the residual stream of fresh documents.

    Returns:
        ids (documents, context) and activations (sites, documents, context, width).
    """
    batches = Batches(Corpus(seed), 50)
    ids_list, parts = [], []
    for _ in tqdm(range(0, documents, batches.batch), desc="activations", mininterval=5):
        ids = batches.next()[0]
        stack: list[Tensor] = []
        with site_hooks(model, lambda _site, residual, stack=stack: stack.append(residual)):
            model(ids)
        ids_list.append(ids)
        parts.append(torch.stack(stack))
    return torch.cat(ids_list), torch.cat(parts, 1)


class Dictionary(nn.Module):
    """Encoders at every site with decoders to their own and later sites.

    Args:
        sites: Number of sites.
        latents: Number of features per encoder.
        width: Width of the residual stream.
        crosscoder: Whether decoders go to every later site (a WCC) or only to their own (SAEs).
    """

    def __init__(self, sites: int, latents: int, width: int, *, crosscoder: bool):
        super().__init__()
        self.crosscoder = crosscoder
        reach = [sites - i if crosscoder else 1 for i in range(sites)]
        self.W_dec = nn.ParameterList(torch.randn(latents, n, width) for n in reach)
        self.W_enc = nn.ParameterList(torch.empty(latents, width) for _ in range(sites))
        self.b_enc = nn.Parameter(torch.zeros(sites, latents))
        self.b_dec = nn.Parameter(torch.zeros(sites, width))
        self.register_buffer("threshold", torch.zeros(sites, latents))
        self.threshold: Tensor
        self.normalise()
        with torch.no_grad():
            for encoder, decoder in zip(self.W_enc, self.W_dec, strict=True):
                encoder.copy_(decoder[:, 0] / decoder[:, 0].norm(dim=-1, keepdim=True) / 2)

    @property
    def sites(self) -> int:
        return len(self.W_enc)

    @torch.no_grad()
    def normalise(self) -> None:
        """Give every feature's decoder, all its sites together, the norm 1."""
        for decoder in self.W_dec:
            decoder.div_(decoder.flatten(1).norm(dim=1)[:, None, None].clamp_min(1e-8))

    def preactivations(self, site: int, x: Tensor) -> Tensor:
        """What an encoder reads from the residual stream at its site."""
        return F.linear(x, self.W_enc[site], self.b_enc[site])

    def encode(self, site: int, x: Tensor) -> Tensor:
        """JumpReLU activations."""
        pre = self.preactivations(site, x)
        return pre * (pre > self.threshold[site])

    def sources(self, site: int) -> range:
        """The encoders that write to a site."""
        return range(site + 1) if self.crosscoder else range(site, site + 1)

    def decode(self, site: int, acts: list[Tensor] | dict[int, Tensor]) -> Tensor:
        """The reconstruction of a site from the activations of the encoders up to it."""
        total = self.b_dec[site].expand(*acts[site].shape[:-1], -1)
        for i in self.sources(site):
            total = total + acts[i] @ self.W_dec[i][:, site - i]
        return total

    @torch.no_grad()
    def fold(self, mean: Tensor, scale: Tensor) -> None:
        """Rewrite everything for activations ``scale * x + mean`` in place of x, per site.

        Each feature's decoder ends with norm 1 at the site where it is largest.
        """
        for i in range(self.sites):
            decoder = self.W_dec[i]
            decoder.mul_(scale[i : i + decoder.shape[1], None])
            size = decoder.norm(dim=-1).amax(1).clamp_min(1e-8)
            decoder.div_(size[:, None, None])
            self.W_enc[i].mul_(size[:, None] / scale[i])
            self.b_enc[i] = self.b_enc[i] * size - self.W_enc[i] @ mean[i]
            self.threshold[i] = self.threshold[i] * size
            self.b_dec[i] = self.b_dec[i] * scale[i] + mean[i]

    def save(self, folder: Path, scan: str) -> None:
        """Write the tensors in circuit-tracer's names, and config.yaml."""
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(self.sites):
            encoder = self.W_enc[i].detach().half().contiguous()
            decoder = self.W_dec[i].detach().half().contiguous()
            b_enc, b_dec = self.b_enc[i].detach().clone(), self.b_dec[i].detach().clone()
            threshold = self.threshold[i].clone()
            if self.crosscoder:
                tensors = {
                    f"W_enc_{i}": encoder,
                    f"b_enc_{i}": b_enc,
                    f"b_dec_{i}": b_dec,
                    f"threshold_{i}": threshold,
                }
                save_file(tensors, folder / f"W_enc_{i}.safetensors")
                save_file({f"W_dec_{i}": decoder}, folder / f"W_dec_{i}.safetensors")
            else:
                tensors = {
                    "W_enc": encoder,
                    "W_dec": decoder[:, 0].contiguous(),
                    "b_enc": b_enc,
                    "b_dec": b_dec,
                    "activation_function.threshold": threshold,
                }
                save_file(tensors, folder / f"layer_{i}.safetensors")
        config = {
            "model_name": MODEL_NAME,
            "model_kind": "weakly_causal_crosscoder" if self.crosscoder else "residual_sae_set",
            "feature_input_hook": "hook_resid_post",
            "feature_output_hook": "hook_resid_post",
            "layers": list(range(self.sites)),
            "activation": "jumprelu",
            "scan": scan,
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        for path in folder.glob("*.safetensors"):
            path.chmod(0o644)

    @classmethod
    def load(cls, folder: Path) -> "Dictionary":
        """Read what :meth:`save` wrote, in float32."""
        config = yaml.safe_load((folder / "config.yaml").read_text())
        crosscoder = config["model_kind"] == "weakly_causal_crosscoder"
        parts: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = []
        for i in config["layers"]:
            if crosscoder:
                t = load_file(folder / f"W_enc_{i}.safetensors")
                decoder = load_file(folder / f"W_dec_{i}.safetensors")[f"W_dec_{i}"]
                names = (f"W_enc_{i}", f"b_enc_{i}", f"b_dec_{i}", f"threshold_{i}")
            else:
                t = load_file(folder / f"layer_{i}.safetensors")
                decoder = t["W_dec"][:, None]
                names = ("W_enc", "b_enc", "b_dec", "activation_function.threshold")
            encoder, b_enc, b_dec, threshold = (t[name].float() for name in names)
            parts.append((encoder, decoder.float(), b_enc, b_dec, threshold))
        latents, width = parts[0][0].shape
        new = cls(len(parts), latents, width, crosscoder=crosscoder)
        with torch.no_grad():
            for i, (encoder, decoder, b_enc, b_dec, threshold) in enumerate(parts):
                new.W_enc[i].copy_(encoder)
                new.W_dec[i].copy_(decoder)
                new.b_enc[i], new.b_dec[i], new.threshold[i] = b_enc, b_dec, threshold
        return new.requires_grad_(False)


def kept(pre: Tensor, k: float, every: int = 4) -> tuple[Tensor, Tensor]:
    """The activations above a threshold that keeps k per row on average.

    Args:
        pre: Pre-activations (rows, latents).
        k: How many to keep per row.
        every: The threshold is read off every so many rows.
    """
    positive = pre.relu()
    sample = positive.detach()[::every].flatten()
    count = max(int(k * (sample.numel() // pre.shape[1])), 1)
    threshold = sample.kthvalue(sample.numel() - count).values
    return positive * (positive > threshold), threshold


@dataclass(frozen=True)
class Recipe:
    """How a dictionary is trained."""

    latents: int
    k: tuple[float, ...]
    steps: int
    batch: int = 1024
    rate: float = 2e-3


def train_dictionary(bank: Tensor, recipe: Recipe, seed: int, *, crosscoder: bool) -> Dictionary:
    """Train on a bank of activations and fold the result into the model's units.

    Args:
        bank: Activations (sites, tokens, width), BOS left out.
        recipe: Sizes, sparsity and length of training.
        seed: Seed of the initial weights and of the order of the tokens.
        crosscoder: A WCC in place of an SAE per site.
    """
    torch.manual_seed(seed)
    sites, tokens, width = bank.shape
    mean = bank.mean(1)
    scale = torch.stack([(x - m).pow(2).mean().sqrt() for x, m in zip(bank, mean, strict=True)])
    dictionary = Dictionary(sites, recipe.latents, width, crosscoder=crosscoder)
    optimizer = torch.optim.Adam(dictionary.parameters(), lr=recipe.rate, fused=True)
    warmup, decay = recipe.steps // 20 + 1, recipe.steps // 3 + 1
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warmup, (recipe.steps - s) / decay, 1.0)
    )
    silent = torch.zeros(sites, recipe.latents)
    bar = tqdm(range(recipe.steps), desc="WCC" if crosscoder else "SAEs", mininterval=5)
    for step in bar:
        rows = torch.randint(tokens, (recipe.batch,))
        x = [(bank[i, rows] - mean[i]) / scale[i] for i in range(sites)]
        pre = [dictionary.preactivations(i, x[i]) for i in range(sites)]
        acts = []
        for i in range(sites):
            # a gentle start: more features at first, so that few of them die
            k = recipe.k[i] * (1 + max(0.0, 1 - 5 * step / recipe.steps))
            act, threshold = kept(pre[i], k)
            acts.append(act)
            dictionary.threshold[i].lerp_(threshold, 0.02 if step > 50 else 0.5)
            fired = (act > 0).any(0)
            silent[i] = torch.where(fired, 0, silent[i] + 1)
        loss = torch.zeros(())
        worst = 0.0
        for k in range(sites):
            error = x[k] - dictionary.decode(k, acts)
            fvu = error.pow(2).mean()
            worst = max(worst, fvu.item())
            loss = loss + fvu
            dead = silent[k] > DEAD_AFTER
            if dead.any():
                # dead features learn to explain what the living ones leave over at their site
                chosen = pre[k].masked_fill(~dead, float("-inf"))
                best = chosen.topk(min(AUXILIARY_K, int(dead.sum())))
                revived = torch.zeros_like(pre[k]).scatter(1, best.indices, best.values.relu())
                guess = revived @ dictionary.W_dec[k][:, 0]
                rest = error.detach()
                loss = loss + AUXILIARY_WEIGHT * ((rest - guess).pow(2).mean() / rest.pow(2).mean())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(dictionary.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        dictionary.normalise()
        if step % 50 == 0:
            bar.set_postfix(worst_fvu=f"{worst:.4f}", dead=int((silent > DEAD_AFTER).sum()))
    calibrate(dictionary, bank, mean, scale, recipe.k)
    dictionary.fold(mean, scale)
    return dictionary.requires_grad_(False)


@torch.no_grad()
def calibrate(
    dictionary: Dictionary, bank: Tensor, mean: Tensor, scale: Tensor, k: tuple[float, ...]
) -> None:
    """Set each encoder's threshold so that k features are active on average."""
    rows = torch.arange(0, bank.shape[1], max(bank.shape[1] // 20_000, 1))
    for i in range(dictionary.sites):
        x = (bank[i, rows] - mean[i]) / scale[i]
        dictionary.threshold[i] = kept(dictionary.preactivations(i, x), k[i], every=1)[1]


@torch.no_grad()
def losses(
    model: LlamaForCausalLM, ids: Tensor, change: Callable[[int, Tensor], Tensor | None]
) -> float:
    """Mean next-token loss after every position but BOS, with the residual stream changed."""
    total, count = 0.0, 0
    for part in ids.split(100):
        with site_hooks(model, change):
            logits = model(part).logits[:, 1:-1]
        total += F.cross_entropy(
            logits.flatten(0, 1), part[:, 2:].flatten(), reduction="sum"
        ).item()
        count += part[:, 2:].numel()
    return total / count


def after_bos(residual: Tensor, changed: Tensor) -> Tensor:
    """The changed residual stream, with BOS's as it was."""
    return torch.cat([residual[:, :1], changed[:, 1:]], 1)


def measure(
    model: LlamaForCausalLM, dictionary: Dictionary, ids: Tensor, activations: Tensor
) -> dict[str, object]:
    """FVU, L0, dead features and recovered loss, on text that nothing was trained on.

    Args:
        model: The transformer.
        dictionary: SAEs or a WCC in the model's units.
        ids: Token ids (documents, context).
        activations: Residual streams (sites, documents, context, width).
    """
    x = activations[:, :, 1:].flatten(1, 2)
    acts = [dictionary.encode(i, x[i]) for i in range(dictionary.sites)]
    counts = [(a > 0).float().sum(-1).mean().item() for a in acts]
    clean = losses(model, ids, lambda _site, _residual: None)
    per_site: list[dict[str, float | int]] = []
    for k in range(dictionary.sites):

        def zero(site: int, residual: Tensor, k: int = k) -> Tensor | None:
            return after_bos(residual, torch.zeros_like(residual)) if site == k else None

        error = x[k] - dictionary.decode(k, acts)
        spliced = losses(model, ids, splice(dictionary, {k}))
        zeroed = losses(model, ids, zero)
        per_site.append(
            {
                "site": k,
                "fvu": (error.pow(2).sum() / (x[k] - x[k].mean(0)).pow(2).sum()).item(),
                "l0": counts[k],
                "features_entering": sum(counts[i] for i in dictionary.sources(k)),
                "dead": int((~(acts[k] > 0).any(0)).sum()),
                "latents": acts[k].shape[-1],
                "loss_spliced": spliced,
                "loss_zeroed": zeroed,
                "loss_recovered": (zeroed - spliced) / (zeroed - clean),
            }
        )
    together = losses(model, ids, splice(dictionary, set(range(dictionary.sites))))
    zeroed = float(per_site[-1]["loss_zeroed"])
    return {
        "tokens": ids[:, 1:].numel(),
        "loss_clean": clean,
        "sites": per_site,
        "all_sites": {
            "loss_spliced": together,
            "loss_zeroed": zeroed,
            "loss_recovered": (zeroed - together) / (zeroed - clean),
        },
    }


def splice(dictionary: Dictionary, replaced: set[int]) -> Callable[[int, Tensor], Tensor | None]:
    """A change for :func:`losses`: reconstructions of the live residual stream at some sites."""
    live: dict[int, Tensor] = {}

    def change(site: int, residual: Tensor) -> Tensor | None:
        live[site] = dictionary.encode(site, residual)
        if site not in replaced:
            return None
        return after_bos(residual, dictionary.decode(site, live))

    return change
