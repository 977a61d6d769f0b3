"""Labs of the methods that merge models."""
