"""One training loop; the training signal is an argument."""
