"""What users write (YAML, JSON), checked by pydantic and refused in one sentence.

Importing this module loads pydantic, which takes time: import it where something is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from circuit_tracer_qk.base.errors import UserError

Model = TypeVar("Model", bound=BaseModel)


def validate(model: type[Model], content: Mapping[str, Any], where: str = "") -> Model:
    """The content of a file or of one of its lines as a model.

    Args:
        model: every field that can be wrong has a ``description``, which completes "KEY should be".
        content: what was read.
        where: what the refusal begins with, such as ``"FILE: "``.

    Raises:
        UserError: naming the first key that is wrong, what it should be and what was found; or with
            the message of the model's own validator, where one raised ``ValueError``.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        problem = error.errors()[0]
    key = str(next(iter(problem["loc"]), ""))
    if problem["type"] == "value_error":
        message = str(problem["ctx"]["error"])  # pyright: ignore[reportTypedDictNotRequiredAccess]
    elif problem["type"] in ("extra_forbidden", "invalid_key"):
        message = f"{key} is unknown here: known are {', '.join(model.model_fields)}"
    else:
        given = "nothing" if content.get(key) is None else f"{content[key]!r:.60}"
        message = f"{key} should be {model.model_fields[key].description}, found {given}"
    raise UserError(f"{where}{message}")
