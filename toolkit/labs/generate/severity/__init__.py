"""Handwriting on its way from one digit to another, and classes whose scores are known exactly."""
