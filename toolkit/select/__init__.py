"""Methods that choose which of the existing weights move."""
