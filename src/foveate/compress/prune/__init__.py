"""Pruning: which parts of a model are taken out."""
