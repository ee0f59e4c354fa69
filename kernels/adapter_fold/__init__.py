"""The fold of adapters over one base, b = W d + c + s·B(A d): W d once, and a launch for all of them."""
