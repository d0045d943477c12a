"""Heads that a token chooses among, and attention modules as experts."""
