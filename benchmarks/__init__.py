"""Side-by-side measurements against peers, in one process, in alternation."""
