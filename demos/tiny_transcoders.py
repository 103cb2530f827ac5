"""A tiny set of transcoders for the bundled miniature, in circuit-tracer's own format.

    python demos/tiny_transcoders.py FOLDER [--clt]

Nothing is trained: encoder rows are MLP inputs of some sentences, decoders are fitted to the MLPs'
outputs by ridge regression. Takes some seconds; the same every time.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from circuit_tracer_qk.attribution.residual.model import MINIATURE
from circuit_tracer_qk.model.load import load_transformer

HOOKS = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "mlp.hook_out"}
D_DICT, SHARE_ACTIVE, RIDGE = 192, 0.06, 1e-2
NAMES = ("Sally", "Bob", "Mary", "John", "Alice", "Tom")
SENTENCES = [
    text.format(a=a, b=b)
    for a, b in zip(NAMES, NAMES[1:] + NAMES[:1], strict=True)
    for text in (
        "I always loved visiting Aunt {a}. Whenever I was feeling sad, Aunt {a}",
        "Uncle {a} met Aunt {b}. The next day Uncle {a}",
        'The opposite of "small" is "big". Aunt {b} said yes to Uncle {a}',
    )
]


def make_set(folder: Path) -> Path:
    """Per-layer transcoders: ``layer_i.safetensors`` and ``config.yaml``."""
    model: Any = load_transformer(MINIATURE, device="cpu")
    folder.mkdir(parents=True, exist_ok=True)
    for layer, (x, y) in enumerate(_inputs_and_outputs(model)):
        W_enc, b_enc, activations = _encoder(x, layer)
        W_dec, b_dec = _fitted(activations, y)
        tensors = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
        save_file(tensors, folder / f"layer_{layer}.safetensors")
    return _config(folder, "transcoder_set")


def make_clt(folder: Path) -> Path:
    """A cross-layer transcoder: ``W_enc_i.safetensors``, ``W_dec_i.safetensors``, config."""
    model: Any = load_transformer(MINIATURE, device="cpu")
    folder.mkdir(parents=True, exist_ok=True)
    pairs = _inputs_and_outputs(model)
    n_layers, d_model = len(pairs), model.cfg.d_model
    encoders = [_encoder(x, layer) for layer, (x, _) in enumerate(pairs)]
    decoders = [torch.zeros(D_DICT, n_layers - layer, d_model) for layer in range(n_layers)]
    for layer, (_, y) in enumerate(pairs):  # every layer's output from all features up to it
        reached = torch.cat([encoders[at][2] for at in range(layer + 1)], 1)
        W_dec, b_dec = _fitted(reached, y)
        for at, part in enumerate(W_dec.split(D_DICT)):
            decoders[at][:, layer - at] = part
        W_enc, b_enc, _ = encoders[layer]
        named = {f"W_enc_{layer}": W_enc, f"b_enc_{layer}": b_enc, f"b_dec_{layer}": b_dec}
        save_file(named, folder / f"W_enc_{layer}.safetensors")
    for layer, W_dec in enumerate(decoders):
        save_file({f"W_dec_{layer}": W_dec}, folder / f"W_dec_{layer}.safetensors")
    return _config(folder, "cross_layer_transcoder")


def _inputs_and_outputs(model: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """By layer: what its MLP reads and writes, over all tokens but the first of each sentence."""
    found: list[tuple[list[torch.Tensor], list[torch.Tensor]]]
    found = [([], []) for _ in range(model.cfg.n_layers)]
    for sentence in SENTENCES:
        tokens = model.to_tokens(sentence)
        with torch.no_grad():
            _, cache = model.run_with_cache(tokens)
        for layer, (inputs, outputs) in enumerate(found):
            x = cache[f"blocks.{layer}.ln2.hook_normalized"][0, 1:]
            weight = getattr(model.blocks[layer].ln2, "w", None)
            inputs.append(x if weight is None else x * weight)
            outputs.append(cache[f"blocks.{layer}.hook_mlp_out"][0, 1:])
    return [(torch.cat(inputs), torch.cat(outputs)) for inputs, outputs in found]


def _encoder(x: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows that look like some of the inputs, each active on the inputs most like it."""
    generator = torch.Generator().manual_seed(layer)
    centre = x.mean(0)
    some = torch.randint(len(x), (D_DICT,), generator=generator)
    rows = x[some] - centre + 0.1 * torch.randn(D_DICT, x.shape[1], generator=generator)
    rows = rows / rows.norm(dim=1, keepdim=True)
    scores = (x - centre) @ rows.T
    bias = -(rows @ centre) - scores.quantile(1 - SHARE_ACTIVE, dim=0)
    return rows, bias, (x @ rows.T + bias).relu()


def _fitted(a: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Decoders and bias that give ``y`` from activations ``a``, in the least-squares sense."""
    mean_a, mean_y = a.mean(0), y.mean(0)
    a, y = a - mean_a, y - mean_y
    gram = a.T @ a + RIDGE * len(a) * torch.eye(a.shape[1])
    W = torch.linalg.solve(gram, a.T @ y)
    return W.contiguous(), (mean_y - mean_a @ W).contiguous()


def _config(folder: Path, kind: str) -> Path:
    lines = [f"model_kind: {kind}", f"model_name: {MINIATURE}", f"scan: {folder.name}"]
    lines += [f"{name}: {hook}" for name, hook in HOOKS.items()]
    (folder / "config.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--clt", action="store_true", help="a cross-layer transcoder")
    args = parser.parse_args()
    make = make_clt if args.clt else make_set
    print(f"transcoders of the bundled miniature written to {make(args.folder)}", file=sys.stderr)


if __name__ == "__main__":
    main()
