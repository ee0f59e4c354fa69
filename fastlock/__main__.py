"""`python -m fastlock` is the `fastlock` command."""

from fastlock.cli import main

main()
