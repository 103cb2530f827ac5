"""Peak memory of one attribution, beside what the model and its dictionaries hold.

    python tests/benchmarks/memory.py [--layers 8 --d-model 768 --width 16384 --tokens 32 --dtype bfloat16]

A random Llama-shaped model and all-layer JumpReLU SAEs are written to a temporary folder; a fresh
process for each way of loading attributes one prompt. Anonymous memory is what the process owns;
pages of mapped files are the system's to drop.
"""

from __future__ import annotations

import argparse
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

    peak, done = [0], threading.Event()
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
    loaded, load_peak, peak[0] = anonymous(), peak[0], 0
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
    args = parser.parse_args()
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
    print(f"{'MB':28} {'mapped':>10} {'copied':>10}")
    for name in rows["mapped"]:
        print(f"{name:28} {rows['mapped'][name]:10.1f} {rows['copied'][name]:10.1f}")


if __name__ == "__main__":
    main()
