"""The worst error of every identity on every architecture, for the table after a run."""

from __future__ import annotations

import math

worst_errors: dict[tuple[str, str], float] = {}


def record_error(identity: str, architecture: str, error: float) -> None:
    """Keep the worst error of an identity on an architecture for the table after the run."""
    key = identity, architecture
    errors = error, worst_errors.get(key, 0.0)
    worst_errors[key] = max(errors, key=lambda e: (math.isnan(e), e))
