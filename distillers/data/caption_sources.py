"""Where captioned pictures lie: folders, webdataset tars, Parquet files. All give a list of `Captioned`.

- `metadata.jsonl` beside the pictures, one JSON object a line (the imagefolder convention; other keys are ignored):
  `{"file_name": "0001.png", "text": "a cartoon head with teal hair, braids, on a pink background"}`;
- a `.txt` beside each picture, of the same name;
- `*.tar` (webdataset): members `KEY.jpg` (any picture) and `KEY.txt`; other members are ignored;
- `*.parquet`: columns `image` (bytes, or datasets' struct with `bytes`) and `text`.

Tars and Parquet files named `train-...` and `test-...` are splits, as hubs have them.
"""

from __future__ import annotations

import functools
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distillers.data.pixels import SPLITS, image_files, listed, subfolders, suffixes, tell_left_out
from distillers.errors import BadInput

METADATA = "metadata.jsonl"
ARCHIVES = (".tar", ".parquet")


@dataclass(frozen=True)
class Captioned:
    """A picture that can be read, and its text.

    file: the file of the picture, or the archive that holds it. name: of the picture in the folder, for messages and
    divisions. place: where it is in the archive: offset and length, or row group and row; None for a file.
    """

    file: Path
    name: str
    text: str
    place: tuple[int, int] | None = None

    @property
    def path(self) -> Path:
        """Name the picture in full, for messages; a member of an archive as if that were a folder."""
        return self.file if self.place is None else self.file / self.name.rpartition("/")[2]

    def content(self) -> bytes | None:
        """Read the picture's encoded bytes out of its archive; None for a file, which is opened by its path."""
        if self.place is None:
            return None
        if self.file.suffix == ".parquet":
            group, row = self.place
            return _row_group(self.file, group)[row] or b""
        offset, length = self.place
        with self.file.open("rb") as archive:
            archive.seek(offset)
            return archive.read(length)


def find_captioned(root: Path, split: str | None = None) -> list[Captioned]:
    """Find the captioned pictures of a folder, sorted by name.

    Args:
        split: "train" or "test", of archives that are named so; None for all.

    Raises:
        BadInput: a folder of none of the forms; pictures without captions and captions without pictures, counted, the
            first ones named; empty captions; texts that are not UTF-8; archives that cannot be read.
    """
    archives = sorted(f for f in root.iterdir() if f.suffix in ARCHIVES and not f.name.startswith("."))
    if (root / METADATA).is_file():
        found = _in_metadata(root / METADATA)
    elif archives:
        own = [f for f in archives if f.name.startswith(split)] if split and named_by_split(archives) else archives
        found = [one for f in own for one in (_in_tar(f) if f.suffix == ".tar" else _in_parquet(f))]
        tell_left_out(root, set(archives), "archives *.tar or *.parquet")
    else:
        found = _beside_pictures(root)
    if not found:
        splits = ", ".join(c.name for c in subfolders(root) if c.name in SPLITS)
        hint = f" (it has {splits}: give split)" if splits else ""
        allowed = f"a folder with {METADATA}, with pictures and a .txt beside each, with *.tar or with *.parquet{hint}"
        raise BadInput("path", str(root), allowed)
    if empty := [one.name for one in found if not one.text]:
        raise BadInput("path", f"{root}: {listed(empty, 'empty caption')}", "a text for each picture")
    return sorted(found, key=lambda one: one.name)


def named_by_split(archives: Iterable[Path]) -> bool:
    """Say whether every archive's name begins with that of a split, and both are there."""
    found = {next((s for s in SPLITS if f.name.startswith(s)), None) for f in archives}
    return found == set(SPLITS)


# --- folders ---------------------------------------------------------------------------------------------------------
def _in_metadata(file: Path) -> list[Captioned]:
    """Read the texts of metadata.jsonl."""
    root, found = file.parent, dict[Path, str]()
    for i, line in enumerate(read_text(file).split("\n"), 1):
        if line.strip():
            picture, text = _entry(f"{file}:{i}", line, root)
            if picture in found:
                raise BadInput(f"{file}:{i}: file_name", picture.relative_to(root).as_posix(), "one line a picture")
            found[picture] = text
    folders = sorted({picture.parent for picture in found} | {root})
    in_root = _named_in(root)
    _refuse_unmatched(
        root, {p for folder in folders if folder.is_dir() for p in image_files(folder)}, set(found), in_root
    )
    tell_left_out(root, {*found, file}, f"pictures that {METADATA} names")
    return [Captioned(picture, in_root(picture), text) for picture, text in found.items()]


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


def _beside_pictures(root: Path) -> list[Captioned]:
    """Read the .txt beside each picture."""
    every = image_files(root)
    pictures = {picture.with_suffix(".txt"): picture for picture in every}
    texts = {f for f in root.glob("*.txt") if not f.name.startswith(".") and f.is_file()}
    if not pictures or not texts:
        return []
    if len(pictures) < len(every):
        twins = [p.name for p in every if p not in pictures.values()]
        raise BadInput("path", f"{root}: {listed(twins, 'picture')} whose name another has", "one picture a .txt")
    in_root = _named_in(root)
    _refuse_unmatched(root, set(pictures), texts, in_root, lambda text: in_root(pictures[text]))
    tell_left_out(root, {*every, *texts}, "pictures with a .txt beside them")
    return [Captioned(picture, picture.name, read_text(text).strip()) for text, picture in pictures.items()]


def _named_in(root: Path) -> Callable[[Path], str]:
    return lambda path: path.relative_to(root).as_posix()


def _refuse_unmatched(
    where: Path,
    pictures: set[Any],
    texts: set[Any],
    text_name: Callable[[Any], str],
    picture_name: Callable[[Any], str] | None = None,
) -> None:
    """Raise BadInput where pictures have no text or texts no picture; both are given by what joins them."""
    without = [(picture_name or text_name)(one) for one in sorted(pictures - texts)]
    missing = [text_name(one) for one in sorted(texts - pictures)]
    told = [f"{listed(without, 'picture')} without a caption"] * bool(without)
    told += [f"{listed(missing, 'caption')} without a picture"] * bool(missing)
    if told:
        raise BadInput("path", f"{where}: {'; '.join(told)}", "a caption for each picture, and a picture for each")


def read_text(file: Path) -> str:
    """Read a text file in UTF-8, with or without a byte order mark. Raises BadInput for one that is not."""
    try:
        return as_text(file, file.read_bytes())
    except OSError as error:
        raise BadInput(str(file), str(error), "a readable text file in UTF-8") from None


def as_text(path: Path, content: bytes) -> str:
    """Decode a text in UTF-8, with or without a byte order mark. Raises BadInput for what is not, naming `path`."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(str(path), str(error), "a readable text file in UTF-8") from None
    if "\0" in text:
        raise BadInput(str(path), "a text with the character 0", "a text file in UTF-8 without it")
    return text


# --- archives --------------------------------------------------------------------------------------------------------
def _in_tar(file: Path) -> list[Captioned]:
    """Find the pairs KEY.picture and KEY.txt of a webdataset tar; a key is what precedes the first dot of a name."""
    pictures, texts = dict[str, tuple[str, tuple[int, int]]](), dict[str, str]()
    try:
        with tarfile.open(file, "r:") as archive:  # compressed ones could only be read from front to back
            for member in archive:
                folder, _, base = member.name.rpartition("/")
                if not member.isreg() or base.startswith("."):
                    continue
                key = f"{folder}/{base.partition('.')[0]}"
                ending = "." + base.rpartition(".")[2].lower()
                if ending == ".txt":
                    content = archive.extractfile(member)
                    texts[key] = as_text(file / member.name, content.read() if content else b"").strip()
                elif ending in suffixes():
                    if key in pictures:
                        raise BadInput(f"{file}: {member.name}", "two pictures of one key", "one picture a .txt")
                    pictures[key] = member.name, (member.offset_data, member.size)
    except (tarfile.TarError, OSError) as error:
        raise BadInput(str(file), str(error), "a complete, uncompressed tar") from None
    _refuse_unmatched(file, set(pictures), set(texts), lambda key: f"{key}.txt".lstrip("/"), lambda k: pictures[k][0])
    return [Captioned(file, f"{file.name}/{name}", texts[key], place) for key, (name, place) in pictures.items()]


def import_parquet(file: Path) -> Any:
    """Import pyarrow's Parquet reader. Raises BadInput, with how to get it, where it is missing."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise BadInput(str(file), "a Parquet file, without pyarrow", "pip install 'fewstep[parquet]'") from None
    return parquet


def _in_parquet(file: Path) -> list[Captioned]:
    """Read the texts of a Parquet file; its pictures are read by row group when they are asked for."""
    import_parquet(file)
    import pyarrow

    found = list[Captioned]()
    try:
        opened = import_parquet(file).ParquetFile(file)
        kind = {field.name: field.type for field in opened.schema_arrow}
        struct = (
            "image" in kind and pyarrow.types.is_struct(kind["image"]) and kind["image"].get_field_index("bytes") >= 0
        )
        binary = "image" in kind and (
            pyarrow.types.is_binary(kind["image"]) or pyarrow.types.is_large_binary(kind["image"])
        )
        if not (struct or binary) or "text" not in kind:
            raise BadInput(str(file), f"columns {', '.join(kind)}", "image (bytes, or a struct with bytes) and text")
        for group in range(opened.num_row_groups):
            texts = opened.read_row_group(group, columns=["text"])["text"].to_pylist()
            for row, text in enumerate(texts):
                name = f"{file.name}/{len(found):08d}"
                if text is not None and (not isinstance(text, str) or "\0" in text):
                    raise BadInput(f"{file}: row {len(found)}", text, "a text without the character 0")
                found.append(Captioned(file, name, (text or "").strip(), (group, row)))
    except (pyarrow.ArrowException, OSError) as error:
        raise BadInput(str(file), str(error), "a complete, readable Parquet file") from None
    return found


@functools.lru_cache(maxsize=1)  # pictures are decoded in the order of files, so that each group is read once
def _row_group(file: Path, group: int) -> Sequence[bytes | None]:
    """Read the encoded pictures of a row group."""
    column = import_parquet(file).ParquetFile(file).read_row_group(group, columns=["image"])["image"].to_pylist()
    return [one["bytes"] if isinstance(one, dict) else one for one in column]
