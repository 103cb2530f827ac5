"""The layouts in which dictionaries are stored, one module each, read as their owners mean them."""

from circuit_tracer_qk.dictionaries.layouts import (
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    llama_scope,
    native,
    qwen_scope,
    sae_lens,
    sparsify,
)
from circuit_tracer_qk.dictionaries.layouts.layout import Hints, Layout, assemble

__all__ = ["LAYOUTS", "Layout", "Hints", "assemble"]

LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        native.LAYOUT,
        sae_lens.LAYOUT,
        gemma_scope.LAYOUT,
        gemma_scope_2.LAYOUT,
        gemma_scope_2.CROSSCODER,
        llama_scope.LAYOUT,
        sparsify.LAYOUT,
        dictionary_learning.LAYOUT,
        qwen_scope.LAYOUT,
    )
}
