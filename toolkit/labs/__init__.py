"""Experiments: what is measured, on which test beds, and what is claimed before it is."""
