"""The package itself: its version, and the folder that its data files lie in."""

from __future__ import annotations

from pathlib import Path

__version__ = "0.1.0"

ROOT = Path(__file__).resolve().parents[1]
"""``miniature/``, ``graph.schema.json`` and, when installed, ``frontend_patch/`` lie here."""
