"""State-space layers and gated recurrences."""
