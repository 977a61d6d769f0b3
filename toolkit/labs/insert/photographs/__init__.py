"""Colour photographs of ten classes, changed, with few labels: SSF, PVP, BlackVIP and controls."""
