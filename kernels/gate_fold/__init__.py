"""The fold of a gate, W' = W + (W U) Vᵀ over the locked head columns: of many sites by one launch."""
