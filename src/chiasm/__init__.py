"""Chiasm: where vision crosses into language."""

__version__ = "0.1.0"
