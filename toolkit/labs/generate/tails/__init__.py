"""Denoisers of small digits, trained with noise of several laws, and how they are tried."""
