"""Search to be learned: a made language with synonyms, its small encoder, and Cranfield."""
