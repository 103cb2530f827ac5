"""Train the bundled miniature: a small transformer, its dictionaries and their feature examples.

    python demos/train_miniature.py                     # everything, about 35 minutes
    python demos/train_miniature.py --stage features    # one stage, from the earlier ones' outputs
    python demos/train_miniature.py --quick --out /tmp/miniature    # a smoke run of a minute

The stages are ``corpus`` (which only shows it), ``model``, ``refine``, ``dictionaries``,
``features`` and ``metrics``. Each reads what the stages before it wrote to the output folder, and
measures what it writes as it is on disk. Everything follows from ``--seed``; the corpus is made as
it is needed and is never a file.
"""

import argparse
import json
import platform
import time
from dataclasses import dataclass, replace
from pathlib import Path

import tokenizers
import torch
import transformers
from miniature import corpus, dictionaries, features, model
from torch import Tensor
from transformers import LlamaForCausalLM

HERE = Path(__file__).resolve().parent
STAGES = ("corpus", "model", "refine", "dictionaries", "features", "metrics")
README = """\
The bundled miniature of circuit-tracer-qk: a small transformer (`model/`) trained on template
English, residual SAEs (`sae/`) and a weakly causal crosscoder (`wcc/`) of its residual stream, and
examples and labels of their features. `demos/train_miniature.py` made all of it; `metrics.json` is
what it measured. No outside data or weights were used. MIT, as the rest of this package.
"""


@dataclass(frozen=True)
class Plan:
    """Sizes and lengths of a run."""

    steps: int = 4000
    refine: int = 1500
    batch: int = 32
    probe_every: int = 200
    bank: int = 4000
    held_out: int = 1500
    prompts: int = 1000
    sae: dictionaries.Recipe = dictionaries.Recipe(512, (12, 12, 12, 12), 2000)
    wcc: dictionaries.Recipe = dictionaries.Recipe(512, (10, 5, 4, 3), 1600)


PLAN = Plan()
QUICK = Plan(
    steps=30,
    refine=10,
    batch=16,
    probe_every=0,
    bank=100,
    held_out=100,
    prompts=20,
    sae=replace(PLAN.sae, latents=128, steps=40),
    wcc=replace(PLAN.wcc, latents=128, steps=40),
)


def load_model(out: Path) -> LlamaForCausalLM:
    """The saved transformer, in float32."""
    return LlamaForCausalLM.from_pretrained(out / "model", dtype=torch.float32).eval()


def stage_corpus(out: Path, seed: int, plan: Plan) -> dict[str, object]:
    """Show a few documents and count what the language has."""
    source = corpus.Corpus(seed)
    documents = [source.document() for _ in range(1000)]
    print("\n".join(documents[:5]))
    marks = [m for text in documents for m in corpus.tokenize(text)[1]]
    return {
        "vocabulary": len(corpus.vocabulary()),
        "titles": len(corpus.TITLES),
        "names": len(corpus.NAMES),
        "words_with_antonym_and_synonym": len(corpus.RELATIONS),
        "facts": len(corpus.FACT_LIST),
        "share_of_tokens_that_are_determined": round(sum(marks) / len(marks), 4),
    }


def save_model(net: LlamaForCausalLM, out: Path) -> None:
    """Save the transformer, in half precision, and its tokenizer."""
    net.half().save_pretrained(out / "model")
    model.build_tokenizer().save_pretrained(out / "model")
    (out / "model" / "model.safetensors").chmod(0o644)


def stage_model(out: Path, seed: int, plan: Plan) -> dict[str, object]:
    """Train the transformer's first course, which leaves multiple choice to the second."""
    net = model.build_model()
    source = corpus.Corpus(seed)
    seen = model.train_model(
        net, source, plan.steps, batch=plan.batch, probe_every=plan.probe_every
    )
    save_model(net, out)
    return {
        "parameters": net.num_parameters(),
        "steps": plan.steps,
        "tokens": seen,
        "batch": plan.batch,
        "context": model.CONTEXT,
    }


def stage_refine(out: Path, seed: int, plan: Plan) -> dict[str, object]:
    """Train the second course: more multiple choice, and the echoes that make it learnable."""
    net = load_model(out)
    source = corpus.Corpus(seed + 3, echoes=True)
    seen = model.train_model(
        net, source, plan.refine, batch=plan.batch, probe_every=plan.probe_every
    )
    save_model(net, out)
    return {"steps": plan.refine, "tokens": seen, "batch": plan.batch, "context": model.CONTEXT}


def stage_dictionaries(out: Path, seed: int, plan: Plan) -> dict[str, object]:
    """Train and save the SAEs and the WCC, and measure them as saved."""
    net = load_model(out)
    bank = dictionaries.collect(net, seed + 1, plan.bank)[1][:, :, 1:].flatten(1, 2)
    print(f"bank of {bank.shape[1]} tokens at {bank.shape[0]} sites")
    ids, activations = held_out_text(net, seed, plan)
    report: dict[str, object] = {"bank_tokens": bank.shape[1]}
    for name, recipe in (("sae", plan.sae), ("wcc", plan.wcc)):
        start = time.time()
        trained = dictionaries.train_dictionary(bank, recipe, seed, crosscoder=name == "wcc")
        trained.save(out / name, f"miniature-{name}")
        saved = dictionaries.Dictionary.load(out / name)
        report[name] = {
            "latents": recipe.latents,
            "k": recipe.k,
            "steps": recipe.steps,
            "batch": recipe.batch,
            "seconds": round(time.time() - start),
            **dictionaries.measure(net, saved, ids, activations),
        }
        print(json.dumps(report[name]))
    return report


def held_out_text(net: LlamaForCausalLM, seed: int, plan: Plan) -> tuple[Tensor, Tensor]:
    """Token ids and activations of documents that nothing is trained on."""
    return dictionaries.collect(net, seed + 2, plan.held_out)


def stage_features(out: Path, seed: int, plan: Plan) -> dict[str, object]:
    """Write the examples, logits and labels of every feature."""
    net = load_model(out)
    ids, activations = held_out_text(net, seed, plan)
    return {
        name: features.write_features(net, out / name, f"miniature-{name}", ids, activations)
        for name in ("sae", "wcc")
    }


def stage_metrics(out: Path, seed: int, plan: Plan) -> dict[str, object]:
    """Measure the saved transformer: held-out accuracies, demo prompts, the heads behind one."""
    net = load_model(out)
    return {
        "held_out": corpus.HELD_OUT_DEFINITION,
        "accuracy": model.accuracies(net, plan.prompts),
        "demo_prompts": model.demo_predictions(net),
        "sally_heads": model.induction_heads(net),
    }


def main() -> None:
    """Run the stages that were asked for and update metrics.json."""
    parser = argparse.ArgumentParser(description="Train the bundled miniature.")
    default = HERE.parent / "circuit_tracer_qk" / "miniature"
    parser.add_argument("--out", type=Path, default=default, help=f"default: {default}")
    parser.add_argument("--stage", choices=("all", *STAGES), default="all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a smoke run, useless as a model")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    out: Path = args.out
    plan = QUICK if args.quick else PLAN
    out.mkdir(parents=True, exist_ok=True)
    (out / "README.md").write_text(README)
    path = out / "metrics.json"
    metrics = json.loads(path.read_text()) if path.exists() else {}
    run = {
        "corpus": stage_corpus,
        "model": stage_model,
        "refine": stage_refine,
        "dictionaries": stage_dictionaries,
        "features": stage_features,
        "metrics": stage_metrics,
    }
    for stage in STAGES if args.stage == "all" else (args.stage,):
        start = time.time()
        torch.manual_seed(args.seed)
        report = run[stage](out, args.seed, plan)
        metrics[stage] = {**report, "wall_seconds": round(time.time() - start)}
        metrics["run"] = {
            "seed": args.seed,
            "threads": args.threads,
            "quick": args.quick,
            "machine": platform.machine(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        }
        path.write_text(json.dumps(metrics, indent=1) + "\n")
        print(f"{stage}: {metrics[stage]['wall_seconds']} s")
    print(json.dumps(metrics, indent=1))


if __name__ == "__main__":
    main()
