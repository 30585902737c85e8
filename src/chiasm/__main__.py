"""`python -m chiasm`."""

from chiasm.cli import main

main()
