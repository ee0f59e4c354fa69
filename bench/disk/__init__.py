"""Checkpoints and zoos on disk."""
