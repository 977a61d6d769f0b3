"""Labs of the methods that choose which weights move."""
