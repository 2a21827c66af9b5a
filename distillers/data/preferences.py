"""Preference pairs: two pictures under the same condition, of which one was preferred.

`fewstep pairs` writes their format, and anything else may: a folder with `pairs.jsonl` beside the pictures, one JSON
object a line,

    {"winner": "winners/000000.png", "loser": "losers/000000.png", "label": "Forest"}

Paths are relative to the folder and stay inside it. `label` is on every line or on none; with labels there is a
`labels.json`, the list of all class names in the model's order. Other keys, such as seeds and rewards, are ignored.
"""

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from distillers.data.image_folder import PicturesInMemory
from distillers.data.pixels import Batch, Pixels, fitted, read_bands, to_tensor
from distillers.errors import BadInput

PAIRS, LABELS = "pairs.jsonl", "labels.json"


class PreferencePairs(PicturesInMemory):
    """The pairs of `path[/split]`: "image" is the winner, "loser" the other, "label" theirs.

    Both pictures of a pair are turned alike.

    Raises:
        BadInput: naming file and line of what is no pair, of a picture that is missing, unreadable or outside the
            folder, and of an unknown label.
    """

    def __init__(
        self,
        path: str | Path,
        split: str | None = None,
        size: int | Sequence[int] = 64,
        flip: bool = True,
        dihedral: bool = False,
        channels: int = 3,
    ) -> None:
        super().__init__(path, split, size, flip, dihedral, channels)
        self.labels = self._read_labels()
        self.files, self._classes = self._read_pairs()

    def _read_labels(self) -> tuple[str, ...]:
        file = self.root / LABELS
        if not file.exists():
            return ()
        allowed = "a JSON list of different class names, one or more"
        try:
            names = json.loads(file.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise BadInput(str(file), str(error), allowed) from None
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise BadInput(str(file), names, allowed)
        if len(set(names)) < len(names):
            raise BadInput(str(file), names, allowed)
        return tuple(names)

    def _read_pairs(self) -> tuple[list[tuple[Path, Path]], np.ndarray]:
        file = self.root / PAIRS
        try:
            text = file.read_text("utf-8")
        except (OSError, ValueError) as error:
            raise BadInput(str(file), str(error), "a readable text file, one JSON object a line") from None
        lines = text.removesuffix("\n").split("\n")
        entries = [self._read_line(f"{file}:{i}", line) for i, line in enumerate(lines, 1)]
        return [files for files, _ in entries], np.array([label for _, label in entries], dtype=np.int64)

    def _read_line(self, where: str, line: str) -> tuple[tuple[Path, Path], int]:
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise BadInput(where, str(error), "a JSON object") from None
        if not isinstance(entry, dict):
            raise BadInput(where, entry, "a JSON object")
        winner, loser = (self._picture(where, key, entry.get(key)) for key in ("winner", "loser"))
        if winner == loser:
            raise BadInput(f"{where}: loser", entry["loser"], "another picture than the winner")
        label = entry.get("label")
        if not self.labels:
            if label is not None:
                raise BadInput(f"{where}: label", label, f"none, for there is no {LABELS} with the classes' names")
            return (winner, loser), 0
        if label not in self.labels:
            raise BadInput(f"{where}: label", label, ", ".join(self.labels))
        return (winner, loser), self.labels.index(label)

    def _picture(self, where: str, key: str, given: Any) -> Path:
        if not isinstance(given, str) or not given:
            raise BadInput(f"{where}: {key}", given, "the path of a picture, relative to the folder")
        try:
            place = (self.root / given).resolve()
            inside, there = place.is_relative_to(self.root), place.is_file()
        except (OSError, ValueError) as error:  # a name that no file can have
            raise BadInput(f"{where}: {key}", given, f"the path of a picture ({error})") from None
        if not inside:
            raise BadInput(f"{where}: {key}", given, f"a path that stays in {self.root}")
        if not there:
            raise BadInput(f"{where}: {key}", given, f"an existing file in {self.root}")
        return place

    @cached_property
    def pixels(self) -> Pixels:
        """All pairs, (N,H,W,2 C), the winner's channels first, decoded at the first use."""
        pixels = np.empty((len(self.files), *self.size, 2 * self.channels), dtype=np.uint8)
        for i, pair in enumerate(self.files):
            try:
                seen = [fitted(read_bands(file, self.channels), self.size) for file in pair]
                pixels[i] = np.concatenate(seen, axis=2)
            except BadInput as error:
                line = f"{self.root / PAIRS}:{i + 1}: {error.field}"
                raise BadInput(line, error.given, error.allowed) from None
        return pixels

    def batch(self, pixels: Pixels) -> Batch:
        winner, loser = pixels[..., : self.channels], pixels[..., self.channels :]
        return {"image": to_tensor(winner), "loser": to_tensor(loser)}


@dataclass(frozen=True, kw_only=True)
class Preferred:
    """A pair to write: two pictures (H,W,3), the name of their class, and further entries of its line."""

    winner: Pixels
    loser: Pixels
    label: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def write_preferences(folder: Path, pairs: Iterable[Preferred], labels: Sequence[str]) -> int:
    """Write a folder of pairs, beside and then renamed, so that it is whole or absent, and count them.

    Raises:
        BadInput: something stands there already; there is no pair.
    """
    folder = folder.expanduser().absolute()
    if folder.exists():
        raise BadInput("out", str(folder), "a folder that does not exist yet")
    new = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)  # left behind by a killed process
    (new / "winners").mkdir(parents=True)
    (new / "losers").mkdir()
    try:
        lines = []
        for i, pair in enumerate(pairs):
            entry = {"winner": f"winners/{i:06d}.png", "loser": f"losers/{i:06d}.png"}
            Image.fromarray(pair.winner).save(new / entry["winner"])
            Image.fromarray(pair.loser).save(new / entry["loser"])
            label = {} if pair.label is None else {"label": pair.label}
            lines.append(json.dumps({**entry, **label, **pair.extra}) + "\n")
        if not lines:
            raise BadInput("pairs", 0, "one pair or more of which one picture is preferred")
        if labels:
            (new / LABELS).write_text(json.dumps(list(labels)) + "\n", "utf-8")
        (new / PAIRS).write_text("".join(lines), "utf-8")
        new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return len(lines)
