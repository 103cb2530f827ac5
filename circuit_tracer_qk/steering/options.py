"""The options of steering: names, allowed values, defaults and meanings, defined once.

Python's calls, the command line and the server's requests are made from this, and a test holds the
page against it. Loads no torch: the server of plain files reads it too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.base.rules import Rule

Freeze = Literal["none", "patterns"]
Norms = Literal["live", "frozen"]


@dataclass(frozen=True)
class Option:
    """One option.

    Attributes:
        name: on every surface.
        default: its value where it is left out.
        help: its meaning, in one line.
        values: allowed value -> what a run under it was; empty where it is a whole number.
        least: the smallest whole number allowed; None for any.
    """

    name: str
    default: Any
    help: str
    values: dict[str, str] = field(default_factory=dict)
    least: int | None = None

    def checked(self, value: Any, called: str | None = None) -> Any:
        """The value, if it is allowed.

        Args:
            value: as given.
            called: the option's name where it was given.

        Raises:
            UserError: it is not.
        """
        if self.values:
            if isinstance(value, str) and value in self.values:
                return value
            wanted = " or ".join(map(repr, self.values))
            raise UserError(f"{called or self.name} is {value!r:.60}: it must be {wanted}.")
        return Rule(int, self.least).checked(value, called or self.name)


FREEZE = Option(
    "freeze",
    "none",
    "patterns: heads that are not steered keep their clean patterns",
    {
        "none": "everything downstream live",
        "patterns": "patterns of all other heads frozen at the clean run's",
    },
)
NORMS = Option(
    "norms",
    "live",
    "frozen: the clean run's denominators inside the edited QK circuits, so that a score changes "
    "by (factor - 1) times the marginal",
    {
        "live": "norms inside the edited QK circuits recomputed on the edited stream",
        "frozen": "norms inside the edited QK circuits frozen at the clean run's",
    },
)
CONTROLS = Option("controls", 20, "matched controls of either kind", least=0)
SEED = Option("seed", 0, "of the controls' draw")

OPTIONS = (FREEZE, NORMS, CONTROLS, SEED)
"""Every option, in the order in which they are shown."""


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

    freeze: Freeze = FREEZE.default
    norms: Norms = NORMS.default
    controls: int = CONTROLS.default
    seed: int = SEED.default

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


DEFAULTS = SteeringOptions()
