"""Measurements of the project itself; run from a checkout, not part of the wheel."""
