"""Mixing of tokens without scores: by weights of places, by pooling."""
