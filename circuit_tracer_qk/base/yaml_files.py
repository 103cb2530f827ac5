"""Reading small YAML files that others wrote."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import yaml

from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.base.files import read_file

LONGEST = 2**18
"""How many bytes such a file may have."""

MOST = 100_000
"""How many values it may have when its aliases are written out."""


def read_yaml(path: Path, example: str) -> dict[str, Any]:
    """A YAML mapping; ``example`` is one line of what is expected.

    Raises:
        UserError: it is none, no regular file, or larger than such a file can be.
    """
    try:
        text = read_file(path, LONGEST)
        loader = yaml.SafeLoader(text)
        try:
            root = loader.get_single_node()
            if _size(root, {}) > MOST:
                raise UserError(
                    f"{path} has more than {MOST} values, its aliases written out: write what they "
                    "stand for, or give another file."
                )
            document = None if root is None else loader.construct_document(root)
            repr(document)  # refuses numbers of more digits than Python prints
        finally:
            loader.dispose()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from error
    except UserError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError, TypeError, AttributeError) as error:
        # ValueError: impossible dates; the last two: tags on what they are not for
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not valid YAML: {reason}") from error
    if not isinstance(document, dict):
        raise UserError(f"{path} should be a mapping such as `{example}`")
    return document


def _size(node: Any, sizes: dict[int, float]) -> float:
    """How many values a node holds; endless for one that holds itself."""
    if id(node) not in sizes:
        sizes[id(node)] = math.inf
        inside = node.value if isinstance(node, yaml.CollectionNode) else ()
        parts = (part for item in inside for part in (item if isinstance(item, tuple) else (item,)))
        sizes[id(node)] = 1 + sum(_size(part, sizes) for part in parts)
    return sizes[id(node)]
