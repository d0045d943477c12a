"""What helps training: adapters, and attention to a part of the keys."""
