"""A low-rank difference is learned beside the frozen weight."""
