"""What the page asks to have steered, read from the query of its address.

Loads pydantic, so the server imports this at the first such request; loads no torch. Whether a
model has what is asked for is :mod:`circuit_tracer_qk.steering.steer`'s to say.
"""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import parse_qsl

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
    model_validator,
)

from circuit_tracer_qk.attribution.head import parse_head
from circuit_tracer_qk.base.feature_names import is_feature_name
from circuit_tracer_qk.frontend.answers import Refusal
from circuit_tracer_qk.steering.edits import ALL, OTHER_KINDS, Edit, HeadEdit, QKEdit, Side
from circuit_tracer_qk.steering.options import OPTIONS, Option, SteeringOptions

MOST_HEADS, MOST_FEATURES, MOST_POSITIONS = 256, 256, 1024
MOST = {"controls": 50}
"""The largest whole number that an option may be."""

LARGEST_FACTOR, LARGEST_ACTIVATION = 100, 1_000_000
_KINDS = (ALL, *sorted(OTHER_KINDS))


class SteerRequest(NamedTuple):
    """One edit and how to run it.

    Attributes:
        edit: of features in heads' QK circuits, or of heads' outputs.
        options: as of :func:`circuit_tracer_qk.steer`.
        query: the position whose attention rows are wanted; None for the last.
    """

    edit: Edit
    options: SteeringOptions
    query: int | None


def read_request(query: str) -> SteerRequest:
    """The request that a query string is.

    Raises:
        Refusal: something is missing, malformed, given twice or not known.
        UserError: an edit that means nothing.
    """
    pairs = parse_qsl(query, keep_blank_values=True)
    if len(pairs) != len(dict(pairs)):
        raise _refused(_KNOWN)
    try:
        asked = _Asked.model_validate(dict(pairs))
    except ValidationError as error:
        raise _refused(_sentence(error.errors()[0])) from None
    options = SteeringOptions(**asked.model_dump(include={option.name for option in OPTIONS}))
    return SteerRequest(asked.edit(), options, asked.query)


def _matching(pattern: str, convert: Any) -> BeforeValidator:
    """Reads a text of one form."""

    def read(text: str) -> Any:
        if not re.fullmatch(pattern, text):
            raise ValueError(text)
        return convert(text)

    return BeforeValidator(read)


def _feature(text: str) -> int | str:
    if text in _KINDS or is_feature_name(text):
        return text
    if not re.fullmatch(_WHOLE, text):
        raise ValueError(text)
    return int(text)


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) < len(values):
        raise ValueError(values)
    return values


def _field(default: Any, sentence: str, **limits: Any) -> Any:
    """A field and the end of the sentence that refuses a wrong value."""
    return Field(default, description=f"must be {sentence}", **limits)


def _list(default: Any, most: int, items: str) -> Any:
    return _field(default, f"different ones, at most {most}, {items}", max_length=most)


def _decimal(largest: int) -> Any:
    sentence = f"a decimal number from -{largest} to {largest}"
    return _field(None, sentence, ge=-largest, le=largest)


_FROM_0 = "a whole number from 0 on"
_WHOLE = "[0-9]{1,9}"
_Whole = Annotated[int, _matching(_WHOLE, int)]
_Decimal = Annotated[float, _matching(r"-?[0-9]{1,9}(\.[0-9]{1,17})?", float)]
_Head = Annotated[tuple[int, int], _matching("L[0-9]{1,4}H[0-9]{1,4}", parse_head)]
_Feature = Annotated[int | str, BeforeValidator(_feature)]
_split, _different = BeforeValidator(lambda text: text.split(",")), AfterValidator(_distinct)


class _AskedEdit(BaseModel):
    """The fields of an edit, as texts, read and bounded."""

    model_config = ConfigDict(extra="forbid")

    heads: Annotated[tuple[_Head, ...], _split, _different] = _list(
        ..., MOST_HEADS, "written as L1H2,L1H3"
    )
    side: Side | None = _field(None, "query or key")
    checkpoint: _Whole | None = _field(None, _FROM_0)
    features: Annotated[tuple[_Feature, ...], _split, _different] = _list(
        (), MOST_FEATURES, f"names such as L0/61, whole numbers from 0 on, or {', '.join(_KINDS)}"
    )
    positions: Annotated[tuple[_Whole, ...], _split, _different] | None = _list(
        None, MOST_POSITIONS, "whole numbers from 0 on"
    )
    factor: _Decimal | None = _decimal(LARGEST_FACTOR)
    inject: _Decimal | None = _decimal(LARGEST_ACTIVATION)
    query: _Whole | None = _field(None, _FROM_0)

    @model_validator(mode="after")
    def _whole_edit(self) -> _AskedEdit:
        if (self.factor is None) == (self.inject is None):
            raise ValueError("either factor or inject must be given")
        if self.side is None:
            if self.model_fields_set & {"checkpoint", "features", "inject"}:
                raise ValueError("side is missing: query or key; only heads' outputs have none")
        elif not self.features:
            raise ValueError("features is missing: a side's edit needs it")
        elif self.checkpoint is None and not all(is_feature_name(str(f)) for f in self.features):
            raise ValueError("checkpoint is missing: only features by name need none")
        return self

    def edit(self) -> Edit:
        if self.side is None:
            return HeadEdit(**self.model_dump(include={"heads", "factor", "positions"}))
        return QKEdit(**self.model_dump(include=set(_AskedEdit.model_fields) - {"query"}))


def _option_field(option: Option) -> tuple[Any, Any]:
    if option.values:
        values = tuple(option.values)
        return Literal[values], _field(option.default, " or ".join(values))
    most = MOST.get(option.name)
    sentence = _FROM_0 if most is None else f"{_FROM_0}, at most {most}"
    return _Whole, _field(option.default, sentence, le=most)


_option_fields: dict[str, Any] = {option.name: _option_field(option) for option in OPTIONS}
_Asked = create_model("_Asked", __base__=_AskedEdit, **_option_fields)
_KNOWN = f"what can be given, each once, is {', '.join(_Asked.model_fields)}"


def _sentence(error: Any) -> str:
    if not error["loc"]:
        return str(error["ctx"]["error"])
    name = error["loc"][0]
    if error["type"] == "extra_forbidden":
        return _KNOWN
    description = _Asked.model_fields[name].description
    return (
        f"{name} is missing; it {description}"
        if error["type"] == "missing"
        else f"{name} {description}"
    )


def _refused(reason: str) -> Refusal:
    return Refusal(HTTPStatus.BAD_REQUEST, f"{reason}.")
