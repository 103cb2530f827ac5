"""The options of steering: names, allowed values, defaults and meanings, defined once.

Python's calls, the command line and the server's requests are made from this, and a test holds the
page against it. Loads no torch: the server of plain files reads it too.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from operator import index
from typing import Any, Literal

from circuit_tracer_qk.base.errors import UserError

Freeze = Literal["none", "patterns"]
Norms = Literal["live", "frozen"]


def _choice(default: str, help: str, **values: str) -> Any:
    """An option with a few allowed values, each with what a run under it was."""
    return field(default=default, metadata={"help": help, "values": values})


def _whole(default: int, help: str, least: int | None = None) -> Any:
    """An option that is a whole number."""
    return field(default=default, metadata={"help": help, "least": least})


@dataclass(frozen=True, kw_only=True)
class SteeringOptions:
    """How an intervention is run, whatever it changes.

    Attributes:
        freeze: "none": everything downstream is live; "patterns": heads that are not steered keep
            their clean patterns, so that none makes up for those that are.
        norms: "frozen": the change of a score is (factor - 1) times the feature's marginal,
            exactly, with the clean run's denominators; "live": ln1 and the QK-norm of the edited
            heads are recomputed on the edited stream. Norms elsewhere are live in both.
        controls: how many matched controls of either kind to run.
        seed: of their draw.

    Raises:
        UserError: a value that is not allowed.

    >>> SteeringOptions(norms="frozen").freeze
    'none'
    """

    freeze: Freeze = _choice(
        "none",
        "patterns: heads that are not steered keep their clean patterns",
        none="everything downstream live",
        patterns="patterns of all other heads frozen at the clean run's",
    )
    norms: Norms = _choice(
        "live",
        "frozen: the clean run's denominators inside the edited QK circuits, so that a score "
        "changes by (factor - 1) times the marginal",
        live="norms inside the edited QK circuits recomputed on the edited stream",
        frozen="norms inside the edited QK circuits frozen at the clean run's",
    )
    controls: int = _whole(20, "matched controls of either kind", least=0)
    seed: int = _whole(0, "of the controls' draw")

    def __post_init__(self) -> None:
        for option in OPTIONS:
            object.__setattr__(self, option.name, option.checked(getattr(self, option.name)))

    @property
    def conditions(self) -> dict[str, str]:
        """The options that a forward pass depends on: those with allowed values."""
        return {option.name: getattr(self, option.name) for option in OPTIONS if option.values}

    @property
    def sentences(self) -> list[str]:
        """What a run under these conditions was, in the order of ``conditions``."""
        return [option.values[getattr(self, option.name)] for option in OPTIONS if option.values]


@dataclass(frozen=True)
class Option:
    """One field of :class:`SteeringOptions`.

    Attributes:
        name: on every surface.
        default: what it is where it is left out.
        help: what it means, in one line.
        values: allowed value -> what a run under it was; empty where it is a whole number.
        least: the smallest whole number allowed; None for any.
    """

    name: str
    default: Any
    help: str
    values: dict[str, str]
    least: int | None

    def checked(self, value: Any, called: str | None = None) -> Any:
        """The value, if it is allowed.

        Args:
            value: as given.
            called: what the option is called where it was given.

        Raises:
            UserError: it is not.
        """
        if self.values:
            if isinstance(value, str) and value in self.values:
                return value
            wanted = " or ".join(map(repr, self.values))
        else:
            whole = not isinstance(value, bool) and hasattr(value, "__index__")
            if whole and (self.least is None or index(value) >= self.least):
                return index(value)
            wanted = "a whole number" + ("" if self.least is None else f" from {self.least} on")
        raise UserError(f"{called or self.name} is {value!r}: it must be {wanted}.")


OPTIONS = tuple(
    Option(
        f.name,
        f.default,
        f.metadata["help"],
        f.metadata.get("values", {}),
        f.metadata.get("least"),
    )
    for f in fields(SteeringOptions)
)
"""Every option, in the order in which they are shown."""

DEFAULTS = SteeringOptions()
