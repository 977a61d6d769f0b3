"""Models as named tensors: what a task changed in them, as sparse differences."""
