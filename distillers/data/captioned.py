"""Folders of pictures with a text each, kept in memory as `ImageFolder` keeps its pictures.

The texts stand in `metadata.jsonl` beside the pictures, one JSON object a line (the imagefolder convention),

    {"file_name": "0001.png", "text": "a cartoon head with teal hair, braids, on a pink background"}

or in a `.txt` beside each picture, of the same name. Other keys of a line are ignored.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from distillers.data.image_folder import PicturesInMemory, chosen_for_test
from distillers.data.pixels import (
    SPLITS,
    Batch,
    Pixels,
    fitted,
    image_files,
    listed,
    read_bands,
    spread,
    subfolders,
    tell_left_out,
    to_tensor,
)
from distillers.errors import BadInput
from distillers.models.captions import pack

METADATA = "metadata.jsonl"
CLAUSES = ", "  # what joins the clauses of a caption


class CaptionedFolder(PicturesInMemory):
    """Pictures and their texts of `path[/split]`, from `metadata.jsonl` or from a `.txt` beside each picture.

    Batches hold "caption" beside "image": see `models.captions.pack`; L is that of the longest text. Without folders
    train and test in `path`, a split is a part of the pictures, divided as `ImageFolder` divides them.

    Args:
        clause_dropout: the probability with which `draw` leaves each clause of a text out, a clause being what ", "
            separates; one clause stays at least. A model that has seen parts of texts answers short prompts.
        limit: keeps an evenly spaced part of so many pictures.

    Raises:
        BadInput: a missing folder; pictures without texts and texts without pictures, counted, the first ones named;
            empty texts; texts that are not UTF-8; files that `ImageFolder` refuses.
    """

    captioned = True

    def __init__(
        self,
        path: str | Path,
        split: str | None = None,
        size: int | Sequence[int] = 64,
        flip: bool = True,
        dihedral: bool = False,
        limit: int | None = None,
        channels: int = 3,
        clause_dropout: float = 0.0,
    ) -> None:
        divided = split in SPLITS and not any((Path(path).expanduser() / s).is_dir() for s in SPLITS)
        super().__init__(path, None if divided else split, size, flip, dihedral, channels)
        if not 0 <= clause_dropout < 1:
            raise BadInput("clause_dropout", clause_dropout, "a probability, 0 up to, not including, 1")
        self.clause_dropout = clause_dropout
        found = find_captions(self.root)
        if divided:
            test = chosen_for_test(self.root, [(file, 0) for file in found])
            found = {file: text for file, text in found.items() if ((file, 0) in test) == (split == "test")}
        kept = [list(found)[i] for i in spread(len(found), limit)]
        self.files, self.texts = kept, [found[file] for file in kept]
        self._classes = np.zeros(len(kept), dtype=np.int64)
        self.longest = max(len(text.encode()) for text in self.texts)

    @cached_property
    def pixels(self) -> Pixels:
        """All pictures, (N,H,W,C), decoded at the first use."""
        pixels = np.empty((len(self.files), *self.size, self.channels), dtype=np.uint8)
        for i, file in enumerate(self.files):
            pixels[i] = fitted(read_bands(file, self.channels), self.size)
        return pixels

    def batch(self, pixels: Pixels) -> Batch:
        return {"image": to_tensor(pixels)}

    def conditions(self, index: np.ndarray, rng: np.random.Generator | None = None) -> Batch:
        """Take the texts of the items at these positions, "caption" (n, L); with `rng` some lose clauses."""
        texts = [self.texts[i] for i in index]
        if rng is not None and self.clause_dropout:
            texts = [shortened(text, self.clause_dropout, rng) for text in texts]
        return {"caption": pack(texts, self.longest)}


def shortened(text: str, dropout: float, rng: np.random.Generator) -> str:
    """Leave each clause of a text out with this probability; where all would go, a random one stays."""
    clauses = text.split(CLAUSES)
    stays = rng.random(len(clauses)) >= dropout
    if not stays.any():
        stays[rng.integers(len(clauses))] = True
    return CLAUSES.join(clause for clause, kept in zip(clauses, stays, strict=True) if kept)


def find_captions(root: Path) -> dict[Path, str]:
    """Find the pictures of a folder and their texts, by the name of the picture.

    Raises:
        BadInput: as `CaptionedFolder`.
    """
    file = root / METADATA
    found = _in_metadata(file) if file.is_file() else _beside_pictures(root)
    if not found:
        splits = ", ".join(c.name for c in subfolders(root) if c.name in SPLITS)
        hint = f" (it has {splits}: give split)" if splits else ""
        raise BadInput("path", str(root), f"a folder with {METADATA}, or with pictures and a .txt beside each{hint}")
    empty = [picture.relative_to(root).as_posix() for picture, text in found.items() if not text]
    if empty:
        raise BadInput("path", f"{root}: {listed(empty, 'empty caption')}", "a text for each picture")
    return {picture: found[picture] for picture in sorted(found)}


def _in_metadata(file: Path) -> dict[Path, str]:
    """Read the texts of metadata.jsonl."""
    root, found = file.parent, dict[Path, str]()
    for i, line in enumerate(read_text(file).split("\n"), 1):
        if line.strip():
            picture, text = _entry(f"{file}:{i}", line, root)
            if picture in found:
                raise BadInput(f"{file}:{i}: file_name", picture.relative_to(root).as_posix(), "one line a picture")
            found[picture] = text
    folders = sorted({picture.parent for picture in found} | {root})
    _refuse_unmatched(root, {picture for folder in folders for picture in image_files(folder)}, set(found))
    tell_left_out(root, {*found, file}, f"pictures that {METADATA} names")
    return found


def _entry(where: str, line: str, root: Path) -> tuple[Path, str]:
    """Read the picture and the text of one line."""
    try:
        entry: Any = json.loads(line)
    except ValueError as error:
        raise BadInput(where, str(error), "a JSON object") from None
    name, text = (entry.get(key) for key in ("file_name", "text")) if isinstance(entry, dict) else (None, None)
    if not isinstance(name, str) or not name or not isinstance(text, str) or "\0" in text + name:
        raise BadInput(where, entry, 'a JSON object with "file_name" and "text", without the character 0')
    picture = Path(os.path.normpath(root / name))  # links are followed, for caches of hubs are made of them
    if not picture.is_relative_to(root):
        raise BadInput(f"{where}: file_name", name, "a file in the folder")
    return picture, text.strip()


def _beside_pictures(root: Path) -> dict[Path, str]:
    """Read the .txt beside each picture."""
    pictures = {picture.with_suffix(".txt"): picture for picture in image_files(root)}
    texts = {f for f in root.glob("*.txt") if not f.name.startswith(".") and f.is_file()}
    if not pictures or not texts:
        return {}
    if len(pictures) < len(image_files(root)):
        twins = [p.name for p in image_files(root) if p not in pictures.values()]
        raise BadInput("path", f"{root}: {listed(twins, 'picture')} whose name another has", "one picture a .txt")
    _refuse_unmatched(root, set(pictures), texts, lambda text: pictures[text])
    found = {picture: read_text(text).strip() for text, picture in pictures.items()}
    tell_left_out(root, {*pictures.values(), *texts}, "pictures with a .txt beside them")
    return found


def _refuse_unmatched(root: Path, pictures: set[Path], texts: set[Path], named: Any = lambda picture: picture) -> None:
    """Raise BadInput where pictures have no text or texts no picture; both are given by what joins them."""
    without = [named(one).relative_to(root).as_posix() for one in sorted(pictures - texts)]
    missing = [one.relative_to(root).as_posix() for one in sorted(texts - pictures)]
    told = [f"{listed(without, 'picture')} without a caption"] * bool(without)
    told += [f"{listed(missing, 'caption')} without a picture"] * bool(missing)
    if told:
        raise BadInput("path", f"{root}: {'; '.join(told)}", "a caption for each picture, and a picture for each")


def read_text(file: Path) -> str:
    """Read a text file in UTF-8, with or without a byte order mark. Raises BadInput for one that is not."""
    try:
        text = file.read_text("utf-8-sig")
    except (OSError, ValueError) as error:
        raise BadInput(str(file), str(error), "a readable text file in UTF-8") from None
    if "\0" in text:
        raise BadInput(str(file), "a text with the character 0", "a text file in UTF-8 without it")
    return text
