"""Experiments of the part ``diagnose``."""
