"""Labs of the low-rank methods."""
