"""The tests; a package so that they can share helpers whatever the import mode."""
