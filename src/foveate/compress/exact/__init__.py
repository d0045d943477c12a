"""Exact attention in another order: the same numbers, other costs."""
