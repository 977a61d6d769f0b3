"""Nothing moves: a model is probed to see what to do with it."""
