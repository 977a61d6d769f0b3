"""Put methods on a model, train in any loop, take them off."""
