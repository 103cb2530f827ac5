"""Peak memory of one attribution, beside what the model and its dictionaries hold.

    python tests/benchmarks/memory.py [--layers 8 --d-model 768 --width 16384 --tokens 32 --dtype bfloat16]

A random Llama-shaped model and all-layer JumpReLU SAEs are written to a temporary folder; a fresh
process for each way of loading attributes one prompt. Anonymous memory is what the process owns;
pages of mapped files are the system's to drop. ``--plan`` prints the sum for Gemma-2-2B alone.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch


def write(folder: Path, args: argparse.Namespace) -> None:
    """The model and its dictionaries, with about ``--l0`` active features a position."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.d_model,
        intermediate_size=4 * args.d_model,
        num_hidden_layers=args.layers,
        num_attention_heads=args.d_model // 64,
        num_key_value_heads=max(1, args.d_model // 256),
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = AutoModelForCausalLM.from_config(config).to(getattr(torch, args.dtype))
    model.save_pretrained(folder / "model")
    with torch.no_grad():
        streams = model(prompt(args)[None], output_hidden_states=True).hidden_states
    for layer in range(args.layers):
        sae = folder / "gemma-scope-2b-pt-res" / f"layer_{layer}_width_16k_l0_small"
        sae.mkdir(parents=True)
        W = torch.nn.functional.normalize(torch.randn(args.width, args.d_model), dim=1)
        pre = streams[layer + 1][0].float() @ W.T
        threshold = float(pre.flatten().kthvalue(pre.numel() - len(pre) * args.l0)[0])
        save_file(
            {
                "w_enc": W.T.contiguous(),
                "w_dec": W,
                "b_enc": torch.zeros(args.width),
                "b_dec": torch.zeros(args.d_model),
                "threshold": torch.full((args.width,), threshold),
            },
            sae / "params.safetensors",
        )
        hook = f"model.layers.{layer}.output"
        (sae / "config.json").write_text(
            json.dumps({"architecture": "jump_relu", "hf_hook_point_in": hook})
        )


def plan(shape: dict[str, int]) -> dict[str, float]:
    """Megabytes that attributing a prompt takes on the device, with mapped dictionaries.

    Weights stay in the model's dtype; what is contracted is cast to float32 where it is used, a
    layer at a time. Decoder rows are bounded by one row for every active feature.
    """
    d, positions = shape["d_model"], shape["tokens"]
    embedding = shape["vocabulary"] * d
    heads = shape["d_head"] * (2 * shape["heads"] + 2 * shape["key_heads"])
    layer = d * heads + 3 * d * shape["d_mlp"]
    active = positions * shape["l0"] * shape["layers"]
    nodes = min(active, shape["kept"]) + positions * (shape["layers"] + 1) + 10
    numbers = {
        "weights (unembedding untied)": shape["bytes"] * (layer * shape["layers"] + 2 * embedding),
        "unembedding in float32, for the logits": 4 * embedding,
        "one layer in float32": 4 * layer,
        "residual streams": 4 * 4 * (shape["layers"] + 1) * positions * d,
        "piece of an encoder, activations": 4 * (2**24 + positions * shape["width"]),
        "decoder rows of active features": 4 * active * d,
        "kept vectors and adjacency": 4 * (2 * nodes * d + 2 * nodes**2),
    }
    return {name: bytes_ / 1e6 for name, bytes_ in numbers.items()}


GEMMA_2_2B = {
    "layers": 26, "d_model": 2304, "d_mlp": 9216, "heads": 8, "key_heads": 4, "d_head": 256,
    "vocabulary": 256_000, "width": 16_384, "l0": 100, "tokens": 64, "kept": 7500, "bytes": 2,
}  # fmt: skip


def show(title: str, parts: dict[str, float]) -> None:
    """The sum on paper."""
    print(title)
    for name, megabytes in parts.items():
        print(f"  {name:40} {megabytes:10.0f} MB")
    print(f"  {'sum':40} {sum(parts.values()):10.0f} MB")


def returned() -> None:
    """Give freed memory back to the system, so that what is left is in use."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def prompt(args: argparse.Namespace) -> torch.Tensor:
    """(tokens,) ids, a BOS in front."""
    ids = torch.randint(
        3, args.vocabulary, (args.tokens,), generator=torch.Generator().manual_seed(1)
    )
    ids[0] = 1
    return ids


def anonymous() -> int:
    """Bytes of memory that this process owns."""
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("RssAnon"))


def measure(folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Load and attribute, watching memory."""
    import dataclasses

    import circuit_tracer_qk as ctqk

    ctqk.explain("Aunt", ctqk.load_model())  # imports everything, which is no model's memory
    peak, done = [0], threading.Event()
    returned()
    start = anonymous()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], anonymous())

    threading.Thread(target=watch, daemon=True).start()
    began = time.perf_counter()
    dtype = getattr(torch, args.dtype)
    saes = ctqk.load_dictionaries(folder / "gemma-scope-2b-pt-res", lazy=args.measure == "mapped")
    if args.measure == "copied":  # mapping is what torch makes of a file even without asking
        saes = dataclasses.replace(
            saes,
            by_checkpoint={
                c: dataclasses.replace(
                    d, W_enc=d.W_enc.clone(), decoders={k: W.clone() for k, W in d.decoders.items()}
                )
                for c, d in saes.by_checkpoint.items()
            },
        )
    model = ctqk.load_model(folder / "model", saes, dtype=dtype, device="cpu")
    load_peak = peak[0]
    returned()
    loaded = peak[0] = anonymous()
    seconds = time.perf_counter() - began
    graph = ctqk.attribute(prompt(args), model, max_n_logits=5, max_feature_nodes=2000)
    done.set()
    took = time.perf_counter() - began - seconds
    return {
        "loading, peak": (load_peak - start) / 1e6,
        "loaded": (loaded - start) / 1e6,
        "attributing, peak": (peak[0] - start) / 1e6,
        "process, with mapped files": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
        "seconds to load": seconds,
        "seconds to attribute": took,
        "active features": float(graph.n_features),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, value in (
        *(("layers", 8), ("d-model", 768), ("width", 16384), ("l0", 100), ("tokens", 32)),
        ("vocabulary", 32000),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--measure", choices=("mapped", "copied"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--plan", action="store_true", help="the sum for Gemma-2-2B, no run")
    args = parser.parse_args()
    if args.plan:
        return show("Gemma-2-2B in bfloat16, all-layer 16k SAEs, 64 tokens", plan(GEMMA_2_2B))
    if args.measure:
        print(json.dumps(measure(args.folder, args)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write(folder, args)
        model = sum(f.stat().st_size for f in (folder / "model").glob("*.safetensors"))
        saes = sum(f.stat().st_size for f in folder.glob("gemma*/*/*.safetensors"))
        print(f"model {model / 1e6:.0f} MB in {args.dtype}, dictionaries {saes / 1e6:.0f} MB")
        rows = {}
        for how in ("mapped", "copied"):
            command = [sys.executable, __file__, *sys.argv[1:], "--measure", how]
            run = subprocess.run([*command, "--folder", temporary], capture_output=True, text=True)
            if run.returncode:
                raise SystemExit(run.stderr)
            rows[how] = json.loads(run.stdout.splitlines()[-1])
    small = {"layers": args.layers, "d_model": args.d_model, "d_mlp": 4 * args.d_model}
    small |= {"heads": args.d_model // 64, "key_heads": max(1, args.d_model // 256), "d_head": 64}
    small |= {name: getattr(args, name) for name in ("vocabulary", "width", "l0", "tokens")}
    size = torch.empty((), dtype=getattr(torch, args.dtype)).element_size()
    show("the sum for this model", plan({**small, "kept": 2000, "bytes": size}))
    print(f"{'MB':28} {'mapped':>10} {'copied':>10}")
    for name in rows["mapped"]:
        print(f"{name:28} {rows['mapped'][name]:10.1f} {rows['copied'][name]:10.1f}")


if __name__ == "__main__":
    main()
