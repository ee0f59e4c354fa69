"""Locks in a checkpoint's files."""
