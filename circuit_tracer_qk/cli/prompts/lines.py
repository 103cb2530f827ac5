"""A file of prompts, one JSON object a line, and what is wrong with its lines."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.base.files import check_names


@dataclass(frozen=True)
class Request:
    """One line's work.

    Attributes:
        line: its number, from 1.
        prompt: the text.
        slug: names its files.
        options: flags that it sets for itself, by name.
    """

    line: int
    prompt: str
    slug: str
    options: dict[str, Any] = field(default_factory=dict)


class BadLine(NamedTuple):
    """A line that cannot be used, and why."""

    line: int
    problem: str


def _whole(least: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and value >= least


def _share(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and 0 <= value <= 1


OPTIONS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_n_logits": (_whole(1), "a whole number from 1"),
    "desired_logit_prob": (_share, "a number from 0 to 1"),
    "max_feature_nodes": (_whole(0), "a whole number from 0"),
    "node_threshold": (_share, "a number from 0 to 1"),
    "edge_threshold": (_share, "a number from 0 to 1"),
}
"""Flags that a line may set for itself: what they may be, and in words."""


def read_prompts(path: Path, prefix: str | None = None) -> tuple[list[Request], list[BadLine]]:
    """What a file asks for.

    A line is ``{"prompt": "..."}``, with ``"slug"`` and any of ``OPTIONS`` beside it, or the prompt
    alone as a JSON string. Without a slug it is called after the file and the line's number, so
    that a line keeps its name when others are mended. Empty lines are left out.

    Args:
        path: the file, in UTF-8.
        prefix: of such slugs, in place of the file's name.

    Returns:
        The requests and the bad lines, in their order.

    Raises:
        UserError: the file cannot be read, or has no line at all.
    """
    try:
        content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): give --prompts a file with one JSON object "
            'a line, {"prompt": "..."}.'
        ) from error
    prefix = prefix or re.sub(r"[^A-Za-z0-9_.-]", "-", path.stem)
    requests: list[Request] = []
    bad: list[BadLine] = []
    named: dict[str, int] = {}
    for number, line in enumerate(content.split(b"\n"), 1):  # U+2028 may stand in a string
        if not line.strip():
            continue
        try:
            request = _request(number, line, prefix)
            if request.slug in named:
                raise UserError(f"the slug {request.slug!r} is line {named[request.slug]}'s")
        except UserError as error:
            bad.append(BadLine(number, str(error).rstrip(".")))
            continue
        named[request.slug] = number
        requests.append(request)
    if not requests and not bad:
        raise UserError(
            f'{path} has no prompts in it: give one JSON object a line, {{"prompt": "..."}}.'
        )
    return requests, bad


def _request(number: int, line: bytes, prefix: str) -> Request:
    """What one line asks for.

    Raises:
        UserError: what is wrong with it.
    """
    try:
        said = json.loads(line.decode())
    except UnicodeDecodeError:
        raise UserError("it is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"it is not JSON ({error})") from None
    if isinstance(said, str):
        said = {"prompt": said}
    if not isinstance(said, dict):
        raise UserError('it is neither {"prompt": "..."} nor a string')
    unknown = sorted(said.keys() - OPTIONS.keys() - {"prompt", "slug"})
    if unknown:
        raise UserError(
            f"{unknown[0]!r} is unknown here: a line has prompt, slug, {', '.join(OPTIONS)}"
        )
    prompt = said.get("prompt")
    if not isinstance(prompt, str):
        raise UserError("it has no prompt" if prompt is None else "its prompt is no string")
    if not prompt:
        raise UserError("its prompt is empty")
    slug = said.get("slug", f"{prefix}-{number:04d}")
    if not isinstance(slug, str):
        raise UserError("its slug is no string")
    check_names(slug, None)
    options = {name: said[name] for name in OPTIONS if name in said}
    for name, value in options.items():
        allowed, words = OPTIONS[name]
        if not allowed(value):
            raise UserError(f"its {name} is {json.dumps(value)[:40]}: it must be {words}")
    return Request(number, prompt, slug, options)
