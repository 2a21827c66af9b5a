"""Read what captions say: each clause names values of attributes, such as "teal hair" of the hair's colour.

A vocabulary lists all phrases that the captions of a data set are made of. Captions join clauses by ", " and the first
one may join two by " with ": "a cartoon head with teal hair, braids, on a pink background". Prompts may leave clauses
out and may change their order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import torch
from torch import Tensor

from distillers.errors import BadInput

CLAUSES, JOINED = ", ", " with "
UNSEEN = -1  # the target of an attribute that another one hides
SHOWN = 6  # phrases that an error names


@dataclass(frozen=True)
class Vocabulary:
    """The phrases of a data set's captions and what they name.

    Attributes:
        phrases: phrase -> attribute -> value.
        hides: value -> attributes that cannot be seen where a picture shows that value: eyes under a sleep mask.
        kinds: the attribute that says what kind of picture it is; the same words mean another thing in another kind.
        parts: attributes that show at one place of all pictures of a kind; two together where one drawing says both.
        lost: values too fine for the autoencoder that pictures are drawn by; they are learnt and not asked for.
    """

    phrases: Mapping[str, Mapping[str, str]]
    hides: Mapping[str, Sequence[str]]
    kinds: str
    parts: Sequence[Sequence[str]] = ()
    lost: Sequence[str] = ()

    @cached_property
    def attributes(self) -> dict[str, tuple[str, ...]]:
        """List the values of each attribute, both in the order of the phrases."""
        found: dict[str, dict[str, None]] = {}
        for named in self.phrases.values():
            for attribute, value in named.items():
                found.setdefault(attribute, {})[value] = None
        return {attribute: tuple(values) for attribute, values in found.items()}

    def words(self, caption: str) -> dict[str, str]:
        """Read the values that a caption names, by attribute.

        Raises:
            BadInput: a clause that is not in the vocabulary, two values of one attribute, or no clause.
        """
        found: dict[str, str] = {}
        for clause in caption.strip(" .,\n").lower().split(CLAUSES):
            for attribute, value in self._read(clause.strip()):
                if found.setdefault(attribute, value) != value:
                    raise BadInput("prompt", f"{found[attribute]!r} and {value!r}", f"one value of {attribute}")
        return found

    def hidden(self, words: Mapping[str, str]) -> set[str]:
        """List the attributes that cannot be seen where a picture shows these values."""
        return {attribute for value in words.values() for attribute in self.hides.get(value, ())}

    def named(self, caption: str) -> dict[str, str]:
        """Read the values that a caption names and a picture can show, by attribute. Raises BadInput as `words`."""
        words = self.words(caption)
        hidden = self.hidden(words)
        shown = {attribute: value for attribute, value in words.items() if attribute not in hidden}
        return {attribute: value for attribute, value in shown.items() if value not in self.lost}

    def _read(self, clause: str) -> list[tuple[str, str]]:
        """Read (attribute, value) of a clause, or of the two of a first one."""
        subject, joined, rest = clause.partition(JOINED)
        if clause in self.phrases:
            return list(self.phrases[clause].items())
        if joined and subject in self.phrases and rest in self.phrases:
            return [*self.phrases[subject].items(), *self.phrases[rest].items()]
        known = list(self.phrases)
        listed = ", ".join(known[:: max(1, len(known) // SHOWN)])
        raise BadInput("prompt", clause, f"clauses of {len(known)} known ones, such as: {listed}")

    def targets(self, captions: Sequence[str]) -> Tensor:
        """Number the values that whole captions name: int64 (B, attributes).

        0 stands for an attribute that a caption leaves out because the picture has none, 1 for its first value, and
        UNSEEN for one that is hidden.
        """
        rows = torch.zeros(len(captions), len(self.attributes), dtype=torch.int64)
        for row, caption in zip(rows, captions, strict=True):
            words = self.words(caption)
            hidden = self.hidden(words)
            for i, (attribute, values) in enumerate(self.attributes.items()):
                if attribute in hidden:
                    row[i] = UNSEEN
                elif attribute in words:
                    row[i] = 1 + values.index(words[attribute])
        return rows

    def pairs(self, caption: str) -> set[tuple[str | None, str, str]]:
        """List the pairs of values that a caption names together, with the kind of picture: (kind, value, value)."""
        words = self.words(caption)
        kind = words.pop(self.kinds, None)
        values = sorted(f"{attribute}: {value}" for attribute, value in words.items())
        return {(kind, *pair) for pair in combinations(values, 2)}

    def unseen(self, captions: Sequence[str], learnt: Iterable[str]) -> Tensor:
        """Say of each caption whether it names a pair of values that none learnt from names together, bool (B,)."""
        known = set[tuple[str | None, str, str]]().union(*(self.pairs(caption) for caption in learnt))
        return torch.tensor([not self.pairs(caption) <= known for caption in captions])


def _avatars() -> Vocabulary:
    """List the clauses of the avatars' captions: cartoon heads (bigSmile) and flat portraits (personas)."""
    named = {
        "style": "a cartoon head, a flat portrait",
        "hair colour": "black hair, blond hair, brown hair, coral hair, dark brown hair, golden hair, orange hair, "
        "pink hair, purple hair, red hair, silver hair, teal hair",
        "hair": "a bald head, a balding head, a beanie, a bob cut, a bob with bangs, a bowl cut, a buzz cut, a cap, "
        "a combover with chops, a curly bob, a curly bun, a curly high top, a fade, a hair bun, a half shaved head, "
        "a mohawk, a shaved head, a short combover, a side shave, a straight bun, a wavy bob, an afro bun, "
        "an undercut with a bun, bangs, braids, curly hair, extra long hair, long hair, pigtails, short curly hair, "
        "short hair, straight hair",
        "eyes": "angry eyes, cheery eyes, closed eyes, confused eyes, happy eyes, normal eyes, open eyes, sad eyes, "
        "sleepy eyes, starstruck eyes, a wink, winking eyes",
        "mouth": "a big smile, a frown, a gap-toothed smile, a pacifier, a smile, a smirk, a surprised mouth, "
        "a tiny cute mouth, a toothy smile, an awkward smile, an open sad mouth, an open smile, an unimpressed mouth, "
        "braces on the teeth, full lips",
        "accessory": "a clown nose, a face mask, a sleep mask, a tiara, cat ears, glasses, sunglasses",
        "facial hair": "a beard, a goatee, a mustache, a pyramid mustache, a soul patch, a walrus mustache, stubble",
        "background": ", ".join(
            f"on a {colour} background" for colour in ("light blue", "lilac", "mint", "pink", "white", "yellow")
        ),
    }
    phrases = {phrase: {attribute: phrase} for attribute, listed in named.items() for phrase in listed.split(CLAUSES)}
    for garment in ("checkered shirt", "shirt", "sweater", "t-shirt"):
        for colour in ("blue", "green", "orange", "pink", "purple", "red", "turquoise"):
            article = "an" if colour == "orange" else "a"
            phrases[f"{article} {colour} {garment}"] = {"clothing": garment, "clothing colour": colour}
    hides = {
        "a sleep mask": ["eyes"],
        "sunglasses": ["eyes"],  # dark glasses over brows and pupils: no eye can be told from another on dark skin
        "a face mask": ["mouth"],
        "a beard": ["mouth"],  # it is drawn with a white mouth of its own
        "a buzz cut": ["hair colour"],  # a tint of the skin: a silver one cannot be seen on a pale head
    }
    parts = [["eyes"], ["mouth"], ["accessory"], ["facial hair"], ["clothing", "clothing colour"]]
    lost = ["braces on the teeth", "stubble", "a soul patch"]  # looked at in weights/avatars-autoencoder's pictures
    return Vocabulary(phrases, hides, "style", parts, lost)


AVATARS = _avatars()
