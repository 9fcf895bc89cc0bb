"""Models: loading and saving, where an architecture keeps its neurons, and the head without logits."""
