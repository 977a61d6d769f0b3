"""Modules that learn from five digits with labels, and start the task of the other five."""
