"""One-step generation on two beds: pairs of noise and image, two readers, training, judging."""
