"""Keeping a model's refusals while it is fine-tuned."""
