"""`python -m distillers.cli`, which torchrun starts; it is `fewstep`."""

from distillers.cli import main

main()
