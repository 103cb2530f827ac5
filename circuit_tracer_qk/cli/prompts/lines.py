"""A file of prompts, one JSON object a line, and what is wrong with its lines.

Importing this module loads pydantic.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, create_model

from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.base.files import LONGEST_SLUG, check_names, read_file
from circuit_tracer_qk.base.json_text import unique_keys
from circuit_tracer_qk.base.rules import RULES
from circuit_tracer_qk.base.validation import validate

PROMPTS_BYTES = 2**30  # how long a file of prompts may be


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


class _Line(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    prompt: str = Field(min_length=1, description="a text of valid Unicode that is not empty")
    slug: str = Field("", description="a name")


def _flag(name: str) -> Any:
    """The type and the rule of a flag that a line may set."""
    rule = RULES[name]
    return rule.kind, Field(rule.low, ge=rule.low, le=rule.high, description=rule.words)


_OWN = ("max_n_logits", "desired_logit_prob", "max_feature_nodes", "node_threshold")
_own: dict[str, Any] = {name: _flag(name) for name in (*_OWN, "edge_threshold")}
Line = create_model("Line", __base__=_Line, **_own)
"""What a line may say: the prompt, the name of its files, and flags for itself alone."""


def read_prompts(path: Path, prefix: str | None = None) -> tuple[list[Request], list[BadLine]]:
    """What a file asks for.

    A line is ``{"prompt": "..."}``, with the other keys of :class:`Line` beside it, or the prompt
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
        content = read_file(path, PROMPTS_BYTES, pipes=True).removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): give --prompts a file with one JSON object "
            'a line, {"prompt": "..."}.'
        ) from error
    _check_lines(path, content)
    prefix = prefix or re.sub(r"[^A-Za-z0-9_.-]", "-", path.stem)[: LONGEST_SLUG - 20]
    requests: list[Request] = []
    bad: list[BadLine] = []
    named: dict[str, int] = {}
    for number, line in enumerate(content.split(b"\n"), 1):  # U+2028 may stand in a string
        if not line.strip():
            continue
        try:
            request = _request(number, line, prefix)
            name = request.slug.lower()  # which are one file on Windows and macOS
            if name in named:
                raise UserError(f"the slug {request.slug!r} is line {named[name]}'s")
        except UserError as error:
            bad.append(BadLine(number, str(error).rstrip(".")))
        else:
            named[name] = number
            requests.append(request)
    if not requests and not bad:
        raise UserError(
            f'{path} has no prompts in it: give one JSON object a line, {{"prompt": "..."}}.'
        )
    return requests, bad


def _check_lines(path: Path, content: bytes) -> None:
    """Refuse a file of another kind, once and not line by line.

    Raises:
        UserError: what kind it is.
    """
    wanted = 'give --prompts one JSON object a line, {"prompt": "..."}'
    if content.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in content[:1000]:
        raise UserError(f"{path} is not UTF-8 text (UTF-16, perhaps): save it as UTF-8.")
    lines = [line.strip() for line in content.split(b"\n") if line.strip()]
    if lines and lines[0].startswith(b"["):
        raise UserError(f"{path} is a JSON array: {wanted}, without brackets and commas around.")
    if lines and not any(line.startswith((b"{", b'"')) for line in lines):
        raise UserError(f"{path} is plain text: {wanted}, or each prompt as a JSON string.")


def _request(number: int, line: bytes, prefix: str) -> Request:
    """What one line asks for.

    Raises:
        UserError: what is wrong with it.
    """
    try:
        content = json.loads(line.decode(), object_pairs_hook=unique_keys)
    except UnicodeDecodeError:
        raise UserError("it is not UTF-8") from None
    except UserError:  # of a key that stands twice
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"it is not JSON ({error})") from None
    if isinstance(content, str):
        content = {"prompt": content}
    if not isinstance(content, dict):
        raise UserError('it is neither {"prompt": "..."} nor a string')
    options = validate(Line, content).model_dump(exclude_unset=True)
    prompt, slug = options.pop("prompt"), options.pop("slug", f"{prefix}-{number:04d}")
    check_names(slug, None)
    return Request(number, prompt, slug, options)
