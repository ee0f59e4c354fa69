"""How a lock is brought to an adapter: a file for each carrier, and the table of them."""
