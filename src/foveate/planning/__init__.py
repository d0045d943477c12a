"""Finding the smallest cache that keeps a model right on a text, and proving it."""
