"""Kernels and memory."""
