"""`python -m fastlock` is the `fastlock` command."""

from fastlock.cli.main import main

main()
