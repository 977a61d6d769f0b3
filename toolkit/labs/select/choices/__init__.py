"""One task, one choice of weights, one run: what *Which weights, when?* is measured with."""
