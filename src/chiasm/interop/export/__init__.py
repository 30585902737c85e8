"""Chiasm models → checkpoints of other tools: one file for each kind, by the tables that the loaders read."""
