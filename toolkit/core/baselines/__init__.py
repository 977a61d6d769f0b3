"""Small published methods as baselines, one for each kind of change; they have no chapters."""
