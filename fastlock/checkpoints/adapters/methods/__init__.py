"""What each of PEFT's methods does to an output projection: a file for each kind, and the table of them."""
