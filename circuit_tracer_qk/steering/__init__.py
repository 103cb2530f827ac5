"""Edits inside the QK circuits of chosen heads, their controls, runs and results."""
