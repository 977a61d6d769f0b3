"""Checks of the exercises, by chapter: what a chapter or a practice notebook imports by name."""
