"""Everything the methods share. Parts import from here; nothing here imports a part by name."""
