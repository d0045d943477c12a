"""What is remembered: codes, a workspace of a few slots, chunks of the past."""
