"""What a lock does to a model's answers."""
