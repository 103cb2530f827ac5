"""Whether a tree of circuit-tracer is one that this package works with.

    python tests/hosts/check.py FOLDER        # the folder that holds circuit_tracer/

Checks the signatures that we rely on, and that circuit-tracer's own command line and ours make the
same graph with and without heads. The installed circuit-tracer is checked by the test suite; this
is for other trees, fetched by hand (upstream main, the newest of PyPI's fork).
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]

RELIED = {
    "attribution.attribute:attribute": "prompt model attribution_targets max_n_logits "
    "desired_logit_prob batch_size max_feature_nodes offload verbose update_interval",
    "attribution.targets:AttributionTargets": "attribution_targets logits unembed_proj tokenizer "
    "max_n_logits desired_logit_prob",
    "frontend.graph_models:Metadata": "slug scan transcoder_list prompt_tokens prompt "
    "node_threshold",
    "frontend.graph_models:Model": "metadata qParams nodes links",
    "frontend.graph_models:Node.error_node": "layer pos influence",
    "frontend.graph_models:Node.feature_node": "layer pos feat_idx influence activation",
    "frontend.graph_models:Node.logit_node": "pos vocab_idx token num_layers target_logit "
    "token_prob",
    "frontend.graph_models:Node.token_node": "pos vocab_idx influence",
    "frontend.graph_models:QParams": "pinnedIds supernodes linkType clickedId sg_pos",
    "frontend.local_server:serve": "data_dir frontend_dir port",
    "graph:Graph": "input_string input_tokens active_features adjacency_matrix cfg "
    "selected_features activation_values logit_targets logit_probabilities scan|scan_name "
    "vocab_size",
    "graph:compute_graph_scores": "graph",
    "graph:compute_node_influence": "",
    "graph:prune_graph": "graph node_threshold edge_threshold",
    "replacement_model:ReplacementModel.from_pretrained": "model_name transcoder_set backend "
    "device dtype",
    "replacement_model:ReplacementModel.from_pretrained_and_transcoders": "model_name transcoders "
    "backend device dtype",
    "replacement_model.replacement_model_transformerlens:"
    "TransformerLensReplacementModel._configure_replacement_model": "transcoder_set",
    "replacement_model.replacement_model_transformerlens:"
    "TransformerLensReplacementModel.setup_attribution": "",
    "transcoder.cross_layer_transcoder:CrossLayerTranscoder.compute_skip": "",
    "transcoder.cross_layer_transcoder:load_clt": "clt_path feature_input_hook "
    "feature_output_hook scan|scan_name device dtype lazy_decoder lazy_encoder",
    "transcoder.single_layer_transcoder:TranscoderSet.compute_skip": "",
    "utils.create_graph_files:create_graph_files": "graph_or_path slug output_path scan|scan_name "
    "node_threshold edge_threshold",
    "utils.hf_utils:load_transcoder_from_hub": "hf_ref device dtype lazy_encoder lazy_decoder",
    "utils.hf_utils:load_transcoders": "config device dtype lazy_encoder lazy_decoder",
}
"""Everything of circuit-tracer that we call, with the names of the arguments that we give."""


def check_signatures() -> list[str]:
    """What is missing, in words."""
    missing = []
    for place, names in RELIED.items():
        module, _, path = place.partition(":")
        try:
            found: Any = import_module(f"circuit_tracer.{module}")
            for part in path.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError) as error:
            missing.append(f"{place}: {error}")
            continue
        parameters = inspect.signature(found).parameters
        open_ended = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
        for name in names.split():
            if not open_ended and not parameters.keys() & set(name.split("|")):
                missing.append(f"{place}: takes no {name}")
    return missing


def check_runs(folder: Path, tree: Path | None) -> list[str]:
    """Both command lines on tiny transcoders of either kind; what differs, in words."""
    import jsonschema
    import torch
    from helpers import stock_runs

    import circuit_tracer_qk

    schema = json.loads(
        (Path(circuit_tracer_qk.__file__).parent / "graph.schema.json").read_bytes()
    )
    home = stock_runs.make_cache(folder / "home")
    wrong = []
    for kind, transcoders in stock_runs.SETS.items():
        out = folder / kind
        out.mkdir()
        for slug, program, *flags in (
            ("stock", "circuit_tracer"),
            ("explained", "circuit_tracer_qk", "--qk"),
            ("plain", "circuit_tracer_qk", "--no-qk"),
        ):
            stock_runs.attribute(program, kind, out, slug, *flags, home=home, tree=tree)
        named = ["-t", transcoders, "--slug", "later", "--graph_file_dir", out]
        done = stock_runs.run(
            "circuit_tracer_qk", "augment", out / "stock.pt", *named, home=home, tree=tree
        )
        if done.returncode:
            wrong.append(f"{kind}: augment failed: {done.stderr}")
            continue
        graphs = {
            slug: torch.load(out / f"{slug}.pt", weights_only=False)
            for slug in ("stock", "explained", "plain")
        }
        for slug in ("explained", "plain"):
            for name in ("adjacency_matrix", "active_features", "selected_features"):
                if not torch.equal(graphs[slug][name], graphs["stock"][name]):
                    wrong.append(f"{kind}: {name} of {slug} differs from the stock command's")
        documents = {
            slug: json.loads((out / f"{slug}.json").read_bytes())
            for slug in ("stock", "explained", "plain", "later")
        }
        if documents["plain"]["links"] != documents["stock"]["links"]:
            wrong.append(f"{kind}: --no-qk wrote other links than the stock command")
        for slug in ("explained", "later"):
            jsonschema.Draft202012Validator(schema).validate(documents[slug])
            if documents[slug]["metadata"]["scan"] != documents["stock"]["metadata"]["scan"]:
                wrong.append(f"{kind}: the scan of {slug} is not the stock command's")
        if documents["explained"]["links"] != documents["later"]["links"]:
            wrong.append(f"{kind}: augment wrote other links than attribute --qk")
        weights = [
            sorted(link["weight"] for link in documents[slug]["links"] if link["weight"])
            for slug in ("stock", "explained")
        ]
        if len(weights[0]) != len(weights[1]) or not torch.allclose(
            *(torch.tensor(w) for w in weights), rtol=1e-6
        ):
            wrong.append(f"{kind}: the weights written are not the stock command's")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="the folder that holds circuit_tracer/")
    tree = parser.parse_args().folder.resolve()
    if not (tree / "circuit_tracer").is_dir():
        parser.error(f"{tree} has no circuit_tracer")
    sys.path[:0] = [str(tree), str(TESTS), str(TESTS.parent)]
    import circuit_tracer

    assert tree in Path(circuit_tracer.__file__).parents, circuit_tracer.__file__
    wrong = check_signatures()
    with tempfile.TemporaryDirectory() as folder:
        wrong += check_runs(Path(folder), tree)
    print(*(wrong or [f"{tree}: all checks pass"]), sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
