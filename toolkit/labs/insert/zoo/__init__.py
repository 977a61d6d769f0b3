"""The zoo: every family of small trainable parts on one network that heard four speakers."""
