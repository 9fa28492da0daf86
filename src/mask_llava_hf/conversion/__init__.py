"""Checkpoints of other packages and layouts, renamed to the one that is read here."""
