"""The one error for input that a person can correct."""

from typing import Any


class BadInput(ValueError):
    """Wrong input, named: which field, what was given, what is allowed.

    The command prints it and exits with 2; the server answers with a 4xx error object. Neither shows a traceback.
    """

    def __init__(self, field: str, given: Any, allowed: str) -> None:
        self.field, self.given, self.allowed = field, given, allowed
        super().__init__(f"{field}: got {given!r}; allowed: {allowed}")
