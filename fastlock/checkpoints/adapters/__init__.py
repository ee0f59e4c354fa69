"""Adapters of PEFT, read from their files: what they do to a locked output projection of their base."""
