"""The columns of a table's lists: a number for each component, beside its marginal.

``COLUMNS`` is what graph files, the terminal and this package's checks go by. A new column is one
entry here, one property of ``component`` in ``graph.schema.json``, and one entry of ``columns`` in
``frontend_patch/format.js``, which names it on the page and in the CSV. A test holds the three
together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from circuit_tracer_qk.attribution.component import Component

Values = Sequence[float | None]


def _activation(components: Sequence[Component], terms: Tensor) -> Values:
    return [c.activation for c in components]


COLUMNS: dict[str, Callable[[Sequence[Component], Tensor], Values]] = {"activation": _activation}
"""By name: what makes the numbers of a column, None where a component has none.

Each takes components of one side, and their terms (n_components, n_components of the other side).
"""


def column_values(components: Sequence[Component], terms: Tensor) -> dict[str, Values]:
    """The numbers of every column, by name.

    Args:
        components: some components of one side of a table.
        terms: (n_components, n_components of the other side).
    """
    return {name: values(components, terms) for name, values in COLUMNS.items()}
