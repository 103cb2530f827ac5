"""Reading what dictionaries are stored in: JSON, and tensors mapped into memory.

Tensors stay in their files until they are used; what is small is checked at once, the rest where
it is used (:class:`circuit_tracer_qk.dictionaries.dictionary.Dictionary`).
"""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Mapping
from itertools import product
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.lib import format as npy
from safetensors import safe_open
from torch import Tensor

from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.base.files import read_file
from circuit_tracer_qk.base.memory import is_full

JSON_BYTES = 2**24  # how long a JSON file beside tensors may be
CHECKED_AT_ONCE = 2**26  # bytes of a tensor that are searched for NaN when it is opened


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        UserError: it is missing, or none.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing: fetch it again.")
    try:
        document = json.loads(read_file(path, JSON_BYTES), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from error
    if not isinstance(document, dict):
        raise UserError(f"{path} should be a JSON object.")
    return document


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number")


def flag(path: Path, config: Mapping[str, Any], name: str, default: bool = False) -> bool:
    """A setting that is true or false.

    Raises:
        UserError: it is something else, such as the text "false".
    """
    value = config.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise UserError(f"{path}: {name} should be true or false, found {value!r}.")
    return value


def mapped(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors``, ``.npz`` or ``.pt`` file, mapped into memory.

    Raises:
        UserError: the file is missing, truncated or of another kind.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing: fetch it again.")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}
        if path.suffix == ".npz":
            return _mapped_npz(path)
        return _mapped_pt(path)
    except Exception as error:  # damaged archives raise nearly anything
        if is_full(error):
            raise
        kind = {".safetensors": "safetensors", ".npz": "NumPy archive"}.get(path.suffix, "PyTorch")
        reason = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path} is truncated or no {kind} file ({reason}): fetch it again."
        ) from error


def _mapped_npz(path: Path) -> dict[str, Tensor]:
    """NumPy's archives are zip files; members that are not compressed can be mapped in place."""
    tensors: dict[str, Tensor] = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            if member.compress_type != zipfile.ZIP_STORED:
                with archive.open(member) as stream:
                    _read_header(name, stream, member.file_size)
                with archive.open(member) as stream:
                    tensors |= _tensor(name, npy.read_array(stream, allow_pickle=False))
                continue
            # the local header's own lengths: they may differ from the directory's
            file.seek(member.header_offset + 26)
            n_name, n_extra = struct.unpack("<HH", file.read(4))
            file.seek(n_name + n_extra, 1)
            shape, fortran, dtype = _read_header(name, file, member.file_size)
            order = "F" if fortran else "C"
            if 0 in shape or not shape:
                array = np.fromfile(file, dtype, prod(shape)).reshape(shape)
            else:  # copy-on-write, because torch wants what it may write to
                array = np.memmap(path, dtype, "c", file.tell(), shape, order)
            tensors |= _tensor(name, array)
    return tensors


def _read_header(name: str, file: IO[bytes], n_bytes: int) -> tuple[tuple[int, ...], bool, Any]:
    """Shape, order and dtype of a ``.npy``, checked before memory is asked for.

    Raises:
        ValueError: they are none that a file of ``n_bytes`` holds.
    """
    start = file.tell()
    old = npy.read_magic(file) == (1, 0)
    shape, fortran, dtype = (npy.read_array_header_1_0 if old else npy.read_array_header_2_0)(file)
    if dtype.hasobject:
        raise ValueError(f"{name} holds Python objects")
    if any(type(size) is not int or size < 0 for size in shape):
        raise ValueError(f"{name} has the shape {list(shape)}")
    if prod(shape) * dtype.itemsize > n_bytes - (file.tell() - start):
        raise ValueError(f"{name} has the shape {list(shape)}, and fewer numbers")
    return shape, fortran, dtype


def _tensor(name: str, array: np.ndarray) -> dict[str, Tensor]:
    """An array under its name; nothing where torch has no such numbers (text, JAX's bfloat16)."""
    try:
        return {name: torch.from_numpy(array)}
    except TypeError:
        return {}


def _mapped_pt(path: Path) -> dict[str, Tensor]:
    """A state dict, mapped where the file is of PyTorch's newer kind; only tensors are unpickled."""
    try:
        try:
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except RuntimeError as error:  # the format before zip files cannot be mapped
            if "mmap" not in str(error):
                raise
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler's own kinds, and whatever junk makes it raise
        raise ValueError(f"{type(error).__name__} while unpickling") from error
    if not isinstance(state, dict):
        raise ValueError("it holds no mapping of names to tensors")
    tensors = {str(n): t.detach() for n, t in state.items() if isinstance(t, Tensor)}
    return {n: t for n, t in tensors.items() if t.layout == torch.strided}


def validate_tensors(
    path: Path | Mapping[str, str],
    stored: Mapping[str, Tensor],
    spec: Mapping[str, str],
    optional: Mapping[str, str] | None = None,
    *,
    sizes: Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    """The tensors that a layout names, their shapes checked against one another.

    Args:
        path: their file, for messages; or what messages call each tensor.
        stored: the tensors that it holds.
        spec: name -> shape in words, such as ``"dict model"``; words of ``sizes`` have that size,
            the others the sizes that agree with most of the tensors, so that the odd one is named.
        optional: the same, of tensors that may be absent.
        sizes: the sizes that are known.

    Raises:
        UserError: naming the file and the tensor that is missing or wrong.
    """
    shapes = {**spec, **(optional or {})}
    titles = path
    if not isinstance(titles, Mapping):
        titles = {name: f"the tensor {name} of {path}" for name in shapes}
    for name in spec:
        if name not in stored:
            has = ", ".join(sorted(stored)) or "no tensors"
            raise UserError(f"{path} lacks the tensor {name}; it has {has}")
    words = {name: shape.split() for name, shape in shapes.items()}
    tensors = {name: _flat(stored[name], words[name]) for name in words if name in stored}
    expected = _agreed(tensors, words, sizes or {})
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        if shape != expected[name]:
            hint = "; it is stored transposed" if shape == expected[name][::-1] else ""
            raise UserError(
                f"{titles[name]} should be {list(expected[name])} and is {list(shape)}{hint}"
            )
        if not tensor.is_floating_point() or tensor.itemsize < 2:
            raise UserError(
                f"{titles[name]} should hold floating-point numbers, not {tensor.dtype}"
            )
        if tensor.nbytes <= CHECKED_AT_ONCE and not bool(tensor.isfinite().all()):
            raise UserError(
                f"{titles[name]} holds NaN or infinite values; it was damaged or overflowed"
            )
    return tensors


def _flat(tensor: Tensor, axes: list[str]) -> Tensor:
    """A vector that is stored as a matrix of one row, as a vector."""
    return tensor[0] if len(axes) == 1 and tensor.ndim == 2 and len(tensor) == 1 else tensor


def _agreed(
    tensors: Mapping[str, Tensor], words: Mapping[str, list[str]], known: Mapping[str, int]
) -> dict[str, tuple[int, ...]]:
    """The shapes, with the sizes of unknown words chosen by vote."""
    votes: dict[str, dict[int, None]] = {}  # biases first: they cannot be transposed
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].ndim):
        shape, named = tensor.shape, words[name]
        for at in {0, -1} if shape and named else ():
            if named[at] not in known:
                votes.setdefault(named[at], {})[shape[at]] = None
    unknown = sorted(votes)

    def shapes(choice: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        size = dict(known) | dict(zip(unknown, choice, strict=True))
        return {name: tuple(size[word] for word in words[name]) for name in tensors}

    def agreement(expected: dict[str, tuple[int, ...]]) -> int:
        ends = ((tuple(tensor.shape), expected[name]) for name, tensor in tensors.items())
        return sum(s[:1] + s[-1:] == e[:1] + e[-1:] for s, e in ends)

    choices = product(*(votes[word] for word in unknown))
    return max((shapes(choice) for choice in choices), key=agreement)
