"""The fold, b = W d + c, over the locked head columns only."""
