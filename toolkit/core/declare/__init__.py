"""What a method says about itself: facts, hyperparameters, the catalogue."""
