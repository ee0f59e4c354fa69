"""What is shipped: pairs, prompts and texts."""
