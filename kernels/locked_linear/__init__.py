"""The projection with a lock per row, y = (x + s d[lock]) Wᵀ + c."""
