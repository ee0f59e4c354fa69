"""How locks are made and chosen."""
