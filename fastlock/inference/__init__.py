"""A model run over texts."""
