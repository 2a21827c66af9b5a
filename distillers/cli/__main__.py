"""Run `fewstep` as `python -m distillers.cli`, which is how torchrun starts it."""

from distillers.cli import main

main()
