"""Vision Transformers, their weights, and what they show of a forward and a backward pass."""
