"""Coarse rows for the whole text, fine rows for each piece of it."""
