"""Methods that put something small beside, before or between the layers of a frozen network."""
