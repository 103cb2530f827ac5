"""Peak memory of loading a model, in a fresh process, beside what its weights need.

    python tests/benchmarks/loading.py FOLDER [DTYPE]      # any Hugging Face folder: one JSON line

The peak is the most that was resident at once (VmHWM), above what is resident after the imports; it
includes the pages of the mapped weights' file. Models are random, of real models' shapes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

SMOLLM2_135M: dict[str, Any] = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
    "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
GEMMA_3_270M: dict[str, Any] = {
    "vocab_size": 262144, "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18,
    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
    "max_position_embeddings": 32768, "sliding_window": 512, "query_pre_attn_scalar": 256,
}  # fmt: skip


def peak(folder: Path, dtype: str = "float32") -> dict[str, float]:
    """Bytes of loading a folder in a process of its own.

    Returns:
        ``peak`` above the imports, ``held`` at the end above the imports, ``weights`` (the
        unembedding counted by itself, as TransformerLens keeps it) and ``embeddings``.
    """
    command = [sys.executable, str(Path(__file__).resolve()), str(folder), dtype]
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    out = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
    return json.loads(out.stdout.splitlines()[-1])


def _resident(name: str) -> int:
    """Bytes of one line of Linux's account of this process: VmRSS now, VmHWM at most."""
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(name))


def _load(folder: str, dtype: str) -> dict[str, float]:
    import transformer_lens  # noqa: F401 - what is imported first is no model's memory
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    from circuit_tracer_qk.model.load import load_transformer

    before = _resident("VmRSS")
    model = load_transformer(folder, dtype=getattr(torch, dtype), device="cpu")
    return {
        "peak": _resident("VmHWM") - before,
        "held": _resident("VmRSS") - before,
        "weights": sum(p.numel() * p.element_size() for p in model.parameters()),
        "embeddings": model.W_E.numel() * model.W_E.element_size(),
    }


def measure() -> list[Any]:
    """The rows: two models, their weights stored in bfloat16 and in float32, in a process each."""
    from measuring import Row
    from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig

    shapes = {
        "SmolLM2-135M": LlamaConfig(**SMOLLM2_135M),
        "Gemma-3 270M": Gemma3TextConfig(**GEMMA_3_270M),
    }
    rows = []
    for name, config in shapes.items():
        for stored in ("bfloat16", "float32"):
            with tempfile.TemporaryDirectory() as folder:
                model = AutoModelForCausalLM.from_config(config).to(getattr(torch, stored))
                model.save_pretrained(folder)
                del model
                found = peak(Path(folder))
            note = f"{found['held'] / 1e6:.0f} MB held; embeddings {found['embeddings'] / 1e6:.0f}"
            row = Row(
                f"loading: {name}, stored in {stored}: peak above imports",
                [found["peak"]],
                "MB",
                floor=found["weights"],
                note=note,
            )
            rows.append(row)
    return rows


if __name__ == "__main__":
    print(json.dumps(_load(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "float32")))
