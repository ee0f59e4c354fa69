"""What a lock does to answers."""
