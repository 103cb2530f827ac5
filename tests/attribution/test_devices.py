"""No tensor is made on the default device where the model's is meant.

Without a GPU this is held by watching: whatever this package creates while it attributes, explains
and steers has to name its device, or lie in the short list of what belongs on the CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.architectures import prompt_ids, save_tiny
from helpers.layout_files import write_sae_lens
from torch.overrides import TorchFunctionMode

import circuit_tracer_qk as ctqk

PACKAGE = str(Path(ctqk.__file__).parent)
FACTORIES: set[Callable[..., Any]] = {
    *(torch.zeros, torch.ones, torch.empty, torch.full, torch.arange, torch.tensor, torch.eye),
    *(torch.linspace, torch.rand, torch.randn, torch.randint, torch.as_tensor),
}
# (module, function): made on the CPU and meant to be
ON_THE_CPU = {
    ("check", "check_exact"),  # random tokens, the same on every device, then moved
    ("graph", "node_indices"),  # moved when they are known to be good
    ("graph", "decode"),  # ids of a model without a tokenizer, as text
    ("graph", "tokenize"),  # moved when it is known to be good
    ("load", "run"),  # Hugging Face's model, which stays there
    ("conversion", "fill"),  # weights, which are converted there and then moved
    ("resolve", "changed_vectors"),  # an index, moved to where the decoder lies
}


class Watch(TorchFunctionMode):
    """Remembers who made a tensor without naming a device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[tuple[str, str, int]] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in FACTORIES and kwargs.get("device") is None:
            frame = sys._getframe(1)
            name = frame.f_code.co_filename
            if name.startswith(PACKAGE):
                self.found.add((Path(name).stem, frame.f_code.co_name, frame.f_lineno))
        return func(*args, **kwargs)


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "llama"])
def test_what_is_made_names_its_device(tmp_path: Path, name: str) -> None:
    save_tiny(name, tmp_path / "model")
    kinds = ("jumprelu", "topk-rescaled", "gated")
    for layer in range(3):
        about = {"model_from_pretrained_kwargs": {"center_writing_weights": layer == 1}}
        write_sae_lens(tmp_path / "saes", layer, kinds[layer], about=about)
    dictionaries = ctqk.load_dictionaries(tmp_path / "saes", lazy=True)
    ids = prompt_ids(name, 8)
    with Watch() as watch:
        model = ctqk.load_model(tmp_path / "model", dictionaries, device="cpu")
        graph = ctqk.attribute(ids, model, max_n_logits=2)
        table = graph.qk(1, 0, 7, 4)
        graph.qk_row(2, 1, 6)
        rows = graph.adjacency_matrix[: len(graph.selected_features)]
        target, source = divmod(int(rows.abs().argmax()), rows.shape[1])
        graph.edge(source, target)
        feature = next(c for c in table.key if c.kind == "feature")
        edit = ctqk.QKEdit((1, 0), "key", 1, feature.feature or 0, 4, factor=0.0)
        for norms in ("live", "frozen"):
            ctqk.steer(model, ids, edit, norms=norms, controls=2)
        ctqk.generate(model, ids, edit, 3)
    left = {place for place in watch.found if place[:2] not in ON_THE_CPU}
    assert not left, f"made on the default device: {sorted(left)}"
