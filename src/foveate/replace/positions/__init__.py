"""Where a key stands as seen from its row."""
