"""The `fastlock` command."""
