"""The suite holds the shapes in signatures (``conftest.py`` turns that on)."""

from __future__ import annotations

import pytest
import torch
from jaxtyping import TypeCheckError

from circuit_tracer_qk.model.linear import Matrix


def test_a_wrong_shape_is_an_error() -> None:
    f = Matrix(torch.ones(4, 6))
    assert f(torch.ones(3, 4)).shape == (3, 6)
    with pytest.raises(TypeCheckError, match="d_in d_out"):
        Matrix(torch.ones(4, 6, 2))
