"""A classifier of clean digits behind a counter, and hazy digits that it cannot read."""
