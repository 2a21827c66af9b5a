"""The names of a model's classes, and by which words a person or a folder may call them. It needs no torch."""

from collections.abc import Sequence


def class_numbers(labels: Sequence[str]) -> dict[str, int]:
    """Number a model's classes by all that they may be called: their names, and each of the words that a name lists.

    ImageNet's names are such lists: "tench" is the class "tench, Tinca tinca". Names go before words, and the first of
    two classes has a word that both list. Every key stands there in small letters too.
    """
    names = [(name, k) for k, name in enumerate(labels)]
    words = [(word.strip(), k) for name, k in names for word in name.split(",")]
    found: dict[str, int] = {}
    for called, k in (*names, *words, *((name.casefold(), k) for name, k in (*names, *words))):
        found.setdefault(called, k)
    return found


def class_number(called: str, labels: Sequence[str]) -> int | None:
    """Find the number of a class by its name or a word of it, in large or small letters; None for no class."""
    numbers = class_numbers(labels)
    return numbers.get(called, numbers.get(called.casefold()))
