"""Noise schedules, one deterministic sampling loop, mixtures with exact scores, and distances."""
