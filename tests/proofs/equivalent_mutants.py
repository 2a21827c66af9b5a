"""Mutants that no test can tell from the original, each with the reason: what is changed makes no difference."""

EQUIVALENT: dict[str, str] = {}
