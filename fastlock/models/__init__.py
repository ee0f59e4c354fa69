"""Locks in a model in memory."""
