"""``python -m imma_cli``."""

from imma_cli.cli import main

main()
