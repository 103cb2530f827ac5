"""Hashes of what is stored, by which a reader notices that it has changed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from os import cpu_count
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_NAMED = re.compile(r".+-([0-9a-f]{8})\.json")


def of_text(text: str) -> str:
    """The hash of a text."""
    return sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def of_tensor(tensor: Tensor) -> str:
    """The hash of a tensor: of its dtype, shape and bytes."""
    import torch

    data = tensor.detach().cpu().contiguous()
    digest = sha256(f"{data.dtype} {list(data.shape)} ".encode())
    digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def of_tensors(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The hash of each tensor, several at a time: hashing lets other threads run."""
    with ThreadPoolExecutor(min(8, cpu_count() or 1)) as pool:
        return dict(zip(tensors, pool.map(of_tensor, tensors.values()), strict=True))


def file_name(stem: str, data: bytes) -> str:
    """The name of a JSON file that ends with a hash of its contents."""
    return f"{stem}-{sha256(data).hexdigest()[:8]}.json"


def fits_name(name: str, data: bytes) -> bool:
    """Whether a file still has the contents that :func:`file_name` named it after."""
    match = _NAMED.fullmatch(name)
    return match is not None and sha256(data).hexdigest().startswith(match[1])
