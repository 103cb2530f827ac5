"""circuit-tracer's own command line, run offline: a hub cache with a tiny model and transcoders.

The model has a name that TransformerLens knows, because circuit-tracer takes no other; its size
and weights are random.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from circuit_tracer_qk.attribution.residual.model import MINIATURE

MODEL = "Qwen/Qwen3-0.6B"
SETS = {"plt": "tiny/transcoders", "clt": "tiny/clt"}
PROMPT = "I met Aunt Sally. I like Aunt"
N_LAYERS, D_MODEL, D_DICT = 3, 24, 20
REPOSITORY = Path(__file__).parents[2]


def make_cache(home: Path) -> Path:
    """A Hugging Face home whose hub holds the model and both kinds of transcoders."""
    tokenizer = AutoTokenizer.from_pretrained(str(MINIATURE))
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=D_MODEL,
        intermediate_size=40,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.3 if parameter.ndim > 1 else 0.2
            parameter.copy_((parameter.ndim == 1) + spread * torch.randn(parameter.shape))
    folder = _repository(home, MODEL)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int, scale: float = 0.3) -> torch.Tensor:
        return scale * torch.randn(*shape, generator=generator)

    plt, clt = (_repository(home, name) for name in SETS.values())
    for layer in range(N_LAYERS):
        tensors = {"W_enc": draw(D_DICT, D_MODEL), "W_dec": draw(D_DICT, D_MODEL)}
        tensors |= {"b_enc": draw(D_DICT), "b_dec": draw(D_MODEL)}
        tensors["activation_function.threshold"] = draw(D_DICT).abs()
        save_file(tensors, plt / f"layer_{layer}.safetensors")
        named = {"W_enc": draw(D_DICT, D_MODEL), "b_enc": draw(D_DICT), "b_dec": draw(D_MODEL)}
        named = {f"{name}_{layer}": tensor for name, tensor in named.items()}
        save_file(named, clt / f"W_enc_{layer}.safetensors")
        decoders = {f"W_dec_{layer}": draw(D_DICT, N_LAYERS - layer, D_MODEL)}
        save_file(decoders, clt / f"W_dec_{layer}.safetensors")
    for folder, kind in ((plt, "transcoder_set"), (clt, "cross_layer_transcoder")):
        lines = [f"model_kind: {kind}", f"model_name: {MODEL}"]
        lines += ["feature_input_hook: mlp.hook_in", "feature_output_hook: mlp.hook_out"]
        (folder / "config.yaml").write_text("\n".join(lines) + "\n")
    return home


def _repository(home: Path, name: str) -> Path:
    """The folder of a hub repository's only revision."""
    root = home / "hub" / f"models--{name.replace('/', '--')}"
    snapshot, main = root / "snapshots" / ("0" * 40), root / "refs" / "main"
    for folder in (snapshot, main.parent):
        folder.mkdir(parents=True, exist_ok=True)
    main.write_text("0" * 40)
    return snapshot


def run(
    program: str, *arguments: Any, home: Path, tree: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``circuit_tracer`` or ``circuit_tracer_qk`` on the cache.

    Args:
        program: the module.
        arguments: of the command line.
        home: of :func:`make_cache`.
        tree: a folder that holds another circuit_tracer than the installed one.
    """
    path = [str(REPOSITORY), *([] if tree is None else [str(tree)])]
    environment = os.environ | {
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(path),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, "-m", program, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def attribute(
    program: str, kind: str, folder: Path, slug: str, *more: Any, home: Path, tree: Path | None
) -> subprocess.CompletedProcess[str]:
    """One ``attribute`` with its .pt and its graph files, as <folder>/<slug>.pt and .json."""
    named = ["-m", MODEL, "-t", SETS[kind], "-p", PROMPT, "--max_feature_nodes", 60]
    files = ["-o", folder / f"{slug}.pt", "--slug", slug, "--graph_file_dir", folder]
    done = run(program, "attribute", *named, *files, *more, home=home, tree=tree)
    assert done.returncode == 0, done.stderr
    return done


__all__ = ["MODEL", "PROMPT", "SETS", "attribute", "make_cache", "run"]
