"""`python -m cluster …` is the `tandem` command, for environments without its script on the path."""

from cluster.cli import main

main()
