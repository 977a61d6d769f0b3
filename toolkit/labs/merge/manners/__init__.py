"""A generated language with good and bad manners, and a small gated network that speaks it."""
