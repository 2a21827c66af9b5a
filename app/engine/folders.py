"""Judge a weights folder before anything in it is opened: it may be half copied, or made by somebody hostile."""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from app.errors import told
from app.settings import Settings
from distillers.errors import BadInput
from distillers.weights.manifest import AUTOENCODER, MANIFEST, Info, base_beside, inside, read_json
from distillers.weights.read import check_extent

MOST_FILES = 10_000
MOST_PIXELS = 4 << 20  # of a published size; more where FEWSTEP_MAX_PIXELS is
MOST_LETTERS = 1 << 20  # of all class names, which every list of the models repeats
OWN = ("golden.json", "model_index.json")  # files that a manifest need not list and that decide what is served
REPORT = "report.json"  # the one file that a folder is served without if it is no honest one
TRAINING = "training"  # a folder of which nothing is served


@dataclass(frozen=True)
class _Listed:
    """Holds what a manifest says that is needed before it is checked."""

    draws: bool
    files: tuple[str, ...] = ()


def draws(folder: Path) -> bool:
    """Tell whether a folder draws pictures, as `manifest.draws`; a manifest that has not changed is not read again."""
    return _listed(folder).draws


def version(folder: Path) -> Any:
    """Return names, sizes and times of the files that make a folder what it is; None where there is no manifest.

    They are the files that its manifest lists, there or not yet, and all its weights. Of an adapter's folder those of
    the base beside it too, where there is one: it may come later.
    """
    try:
        base = base_beside(folder)
        names = {MANIFEST, *OWN, *_listed(folder).files}
        files = sorted({*(folder / name for name in names), *folder.rglob("*.safetensors")})
        files += sorted(base.rglob("*.safetensors")) if base else []
        return (_stamp(folder / MANIFEST), *((file, _stamp(file, absent=True)) for file in files))
    except OSError:
        return None


def check(folder: Path, settings: Settings) -> str:
    """Refuse a folder that is not fit to be opened, before a byte of its weights is read.

    Returns:
        Why its report is left aside, which is not read if it leads out of the folder; "" for an honest one.

    Raises:
        BadInput: a name that cannot be shown; a link that leaves the folder; what is neither file nor folder; more
            files, pixels, steps or class names than this server allows; a broken manifest; a configuration of a
            network larger than its weights.
    """
    if not folder.name.isprintable():
        raise BadInput("name", folder.name, "printable text in UTF-8")
    places = [place for place in (folder, base_beside(folder)) if place]
    aside = [fault for place in places for fault in _faults(place)]
    info, where = Info.read(folder), f"{folder / MANIFEST}: "
    pixels, steps = max(MOST_PIXELS, settings.max_pixels), settings.max_steps
    if info.size[0] * info.size[1] > pixels:
        raise BadInput(f"{where}size", info.size, f"{pixels} pixels or fewer (FEWSTEP_MAX_PIXELS)")
    if max(info.step_times, default=0) > steps:
        raise BadInput(f"{where}step_times", max(info.step_times), f"{steps} steps or fewer (FEWSTEP_MAX_STEPS)")
    if (letters := sum(map(len, info.labels))) > MOST_LETTERS:
        raise BadInput(f"{where}labels", f"{letters} letters", f"{MOST_LETTERS} or fewer")
    for place in places:
        check_extent(place)
    return str(without_place(aside[0], folder)) if aside else ""


def shown(folder: Path) -> str:
    """Return a folder's name, with escapes where it cannot be shown."""
    return folder.name if folder.name.isprintable() else ascii(folder.name)[1:-1]


def without_place(error: BadInput, folder: Path) -> BadInput:
    """Return the error without where the server keeps its folders, which callers need not know."""
    roots = {f"{place}{os.sep}" for place in (folder.parent, folder.parent.absolute(), folder.resolve().parent)}

    def local(text: str) -> str:
        for root in sorted(roots, key=len, reverse=True):
            text = text.replace(root, "")
        return told(text)

    given = local(error.given) if isinstance(error.given, str) else error.given
    return BadInput(local(error.field), given, local(error.allowed))


def _faults(folder: Path) -> Iterator[BadInput]:
    """Look at all that is in a folder. BadInput at the first file that is no honest one; the report's is yielded."""
    root, count = folder.resolve(), 0
    for place, folders, files in os.walk(root):
        if Path(place) == root and TRAINING in folders:
            folders.remove(TRAINING)
        for name in (*folders, *files):
            path, count = Path(place) / name, count + 1
            where = str(folder / path.relative_to(root))
            if count > MOST_FILES:
                raise BadInput(str(folder), f"more than {MOST_FILES} files", f"{MOST_FILES} or fewer")
            fault = None
            if not inside(root, path):
                fault = BadInput(where, "a link that leaves the folder", "files (`cp -rL` copies what links lead to)")
            elif path.exists() and stat.S_IFMT(path.stat().st_mode) not in (stat.S_IFREG, stat.S_IFDIR):
                fault = BadInput(where, "neither a file nor a folder", "files and folders")
            if fault and path != root / REPORT:
                raise fault
            if fault:
                yield fault


def _listed(folder: Path) -> _Listed:
    try:
        return _read_listed(folder, _stamp(folder / MANIFEST))
    except (BadInput, OSError):
        return _Listed(draws=True)


@lru_cache(1024)
def _read_listed(folder: Path, stamp: tuple[int, int]) -> _Listed:
    manifest = read_json(folder / MANIFEST)
    names = manifest.get("sha256")
    files = [name for name in names if inside(folder, folder / name)] if isinstance(names, dict) else []
    return _Listed(manifest.get("task") != AUTOENCODER, tuple(files[:MOST_FILES]))


def _stamp(file: Path, absent: bool = False) -> Any:
    try:
        facts = file.stat()
    except (OSError, ValueError):
        if absent:
            return None
        raise
    return facts.st_size, facts.st_mtime_ns
