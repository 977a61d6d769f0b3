"""Kinds of insertion at equal counts on turned MNIST, and what works from outside the model."""
