"""AdamW with a pull towards an anchor, the whole step of many tensors in one launch."""
