"""Two specialists of digits, and searches for one network that knows what both know."""
