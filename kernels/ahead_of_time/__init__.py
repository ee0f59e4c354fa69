"""Kernels compiled ahead of time, and launching them without Triton."""
