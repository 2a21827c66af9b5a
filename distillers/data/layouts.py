"""Layouts of folders with SAR and optical pairs, and their division into training and test scenes.

A scene is a stretch of ground. Neighbouring patches overlap, so only whole scenes are divided; a division on disk is
refused where train and test share ground. Pixels are not read.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distillers.data.pair_rasters import RASTER_SUFFIXES, Place, on_one_map, place
from distillers.data.pixels import SPLITS, existing_folder, image_files, subfolders, tell_left_out
from distillers.errors import BadInput

QXS_SAR, QXS_OPTICAL = "sar_256_oc_0.2", "opt_256_oc_0.2"
METADATA = "metadata.json"
QXS_BLOCK = 500  # patches
RASTERS = ("geotiff", "sen12ms")  # layouts whose files rasterio reads
_PATCH = re.compile(r"_p\d+$")  # ROIs1868_summer_59_p1001 is patch 1001 of scene ROIs1868_summer_59
_SENSOR = re.compile(r"(s1|s2)_((?!cloudy_).+)")
_GRID = re.compile(r"_\d+_\d+$")  # 12_240_960 is the patch at row 240 and column 960 of scene 12
_CORNERS = re.compile(r"corners_epsg(\d+)")
_EDGE = 1e-3  # of the smaller side: what overlaps less than this merely touches
_FORMS = (
    "{train,test}/{sar,opt}, {sar,opt}/NAME.tif, CLASS/{sar,opt}, ROIsXXXX_season/{s1_N,s2_N}, "
    "ROIsXXXX_season_{s1,s2}/{s1_N,s2_N}, "
    f"{{{QXS_SAR},{QXS_OPTICAL}}} or {{train,test}}{{A,B}}"
)


@dataclass(frozen=True)
class Pair:
    """A pair of files, and the scene (the stretch of ground) that it belongs to."""

    sar: Path
    optical: Path
    scene: str


Divided = dict[str, list[Pair]]  # by split


def find_pairs(root: Path, split: str, layout: str = "auto") -> tuple[str, list[Pair]]:
    """Find the pairs of a folder's `split`, and its layout, which is recognised ("auto") or named:

    - `split`: `{train,test}/{sar,opt}/ID.webp`; the scene is ID without its `_pN`, the folders are the split.
    - `class`: `{CLASS}/{sar,opt}/NAME.png`; the scene is NAME without its `_pN` (without one: the class).
    - `sen12`: `ROIsXXXX_season/s1_N/*.png` with `s2_N/*.png` (as SEN1-2 is published); each `s1_N` is a scene.
    - `sen12ms`: the same with GeoTIFFs (as SEN12MS is published; `lc_N` is left alone), or a tree for each sensor,
      `ROIsXXXX_season_s1/s1_N` with `ROIsXXXX_season_s2/s2_N` (as SEN12MS-CR is; `s2_cloudy_N` is left alone).
    - `qxs`: `sar_256_oc_0.2/N.png` with `opt_256_oc_0.2/N.png` (as QXS-SAROPT is published). It names no scenes, but
      numbers patches along them, so 500 consecutive numbers count as one. That keeps most neighbours together; it
      cannot rule out that patches at the ends of a block overlap (by a fifth) with those of the next, nor that a city
      is seen in both splits.
    - `sar2opt`: `{train,test}{A,B}/SCENE_ROW_COLUMN.jpg`, A is SAR (as SAR2Opt is published). Its own split cuts
      through scenes, and its patches of 600 px stand every 240 px, so some of its test patches are mostly trained on:
      whole scenes are divided anew. Files with other names keep the split of their folders.
    - `geotiff`: `{train,test}/{sar,opt}/NAME.tif`, or `{sar,opt}/NAME.tif`, whose rasters are divided by ground: what
      touches or overlaps is one scene, named by the first of its rasters. The optical files may be pictures instead.

    Where the folders are no split, scenes are sorted by the SHA-256 of their names and the first fifth (rounded up) is
    the test split, always the same for the same scenes.

    Raises:
        BadInput: an unknown layout, no pairs, a file without its partner, rasters that do not lie on each other, one
            scene only, and folders {train,test} that share a scene, a file or ground.
    """
    found = _recognise(root) if layout == "auto" else layout
    if found not in LAYOUTS:
        raise BadInput("layout", layout, " | ".join(("auto", *LAYOUTS)))
    divided = LAYOUTS[found](root, split)
    if not divided[split]:
        raise BadInput("path", str(root), f"a folder with SAR/optical pairs in layout {found!r}")
    used = {file for pairs in divided.values() for pair in pairs for file in (pair.sar, pair.optical)}
    tell_left_out(root.resolve(), used | {root.resolve() / METADATA}, f"pairs in layout {found!r}")
    return found, divided[split]


def metadata(root: Path) -> dict[str, dict[str, Any]]:
    """Read `metadata.json`, by id; {} without one."""
    file = root / METADATA
    if not file.is_file():
        return {}
    try:
        return {str(entry["id"]): dict(entry) for entry in json.loads(file.read_text())}
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(str(file), str(error), 'a JSON list of {"id": ..., "region": ...}') from error


# --- the layouts


def _recognise(root: Path) -> str:
    """Recognise a folder's layout by the names in it."""
    inside = subfolders(root)
    if any((root / f"{s}A").is_dir() and (root / f"{s}B").is_dir() for s in SPLITS):
        return "sar2opt"
    if (root / QXS_SAR).is_dir():
        return "qxs"
    for s in SPLITS:
        if (folder := root / s / "sar").is_dir():
            return "geotiff" if _rasters(folder) else "split"
    if _rasters(root / "sar"):
        return "geotiff"
    if any((child / "sar").is_dir() for child in inside):
        return "class"
    for scene in (scene for child in inside for scene in subfolders(child)):
        if scene.name.startswith("s1_"):
            return "sen12ms" if _rasters(scene) else "sen12"
    raise BadInput("path", str(root), _FORMS)


def _rasters(folder: Path) -> bool:
    """Tell whether a folder holds files with the names of rasters, and no other pictures."""
    suffixes = {file.suffix.lower() for file in image_files(folder)} if folder.is_dir() else set()
    return bool(suffixes) and suffixes <= RASTER_SUFFIXES


def _find_split(root: Path, split: str) -> Divided:
    found = _on_disk(root, split, "{}/sar", "{}/opt", _PATCH)
    entries = {name: entry for name, entry in metadata(root).items() if any(map(_CORNERS.fullmatch, entry))}
    _refuse_leaks(found, lambda pairs: _ground_in_metadata(pairs, entries))
    return found


def _find_class(root: Path, split: str) -> Divided:
    pairs = []
    for folder in (f for f in subfolders(root) if (f / "sar").is_dir() or (f / "opt").is_dir()):
        for sar, opt in _match(folder / "sar", folder / "opt"):
            scene = _PATCH.sub("", sar.stem)
            pairs.append(Pair(sar, opt, scene if scene != sar.stem else folder.name))
    return _divide(pairs)


def _find_sen12(root: Path, split: str) -> Divided:
    folders: dict[tuple[str, str], dict[str, Path]] = {}  # by season and number, of each sensor
    for season in subfolders(root):
        for folder in subfolders(season):
            if named := _SENSOR.fullmatch(folder.name):
                name = season.name.removesuffix(f"_{named[1]}")
                folders.setdefault((name, named[2]), {})[named[1]] = folder
    pairs = []
    for (season_name, number), found in sorted(folders.items()):
        for sensor, other in (("s1", "s2"), ("s2", "s1")):
            if sensor not in found:
                raise BadInput(str(found[other]), "no partner", f"a folder {sensor}_{number} of {season_name}")
        pairs += [Pair(sar, opt, f"{season_name}/s1_{number}") for sar, opt in _match(found["s1"], found["s2"])]
    return _divide(pairs)


def _find_qxs(root: Path, split: str) -> Divided:
    pairs = []
    for sar, opt in _match(root / QXS_SAR, root / QXS_OPTICAL):
        if not sar.stem.isdecimal():
            raise BadInput(str(sar), sar.stem, "a number, as QXS-SAROPT's patches have")
        pairs.append(Pair(sar, opt, f"block {int(sar.stem) // QXS_BLOCK}"))
    return _divide(pairs)


def _find_sar2opt(root: Path, split: str) -> Divided:
    found = _on_disk(root, split, "{}A", "{}B", _GRID)
    pairs = [pair for s in SPLITS for pair in found.get(s, ())]
    if all(pair.scene != pair.sar.stem for pair in pairs):
        return _divide(pairs)
    _refuse_leaks(found)
    return found


def _find_geotiff(root: Path, split: str) -> Divided:
    if any((root / s).is_dir() for s in SPLITS):
        found = _on_disk(root, split, "{}/sar", "{}/opt", _PATCH)
        places = _places(pair for pairs in found.values() for pair in pairs)
        _refuse_leaks(found, lambda pairs: {p: (places[p].corners, places[p].crs) for p in pairs if places[p].crs})
        return found
    pairs = [Pair(sar, opt, sar.stem) for sar, opt in _match(root / "sar", root / "opt")]
    places = _places(pairs)
    for pair in pairs:
        if places[pair].crs is None:
            raise BadInput(str(pair.sar), "no CRS", "a georeferenced raster, or folders train/ and test/")
    grouped = _grouped(pairs, [places[pair] for pair in pairs])
    if len({pair.scene for pair in grouped}) == 1:
        allowed = "ground that lies apart, to divide it; or folders train/ and test/ whose ground does not overlap"
        raise BadInput("path", f"{root}: rasters that all touch each other", allowed)
    return _divide(grouped)


LAYOUTS: dict[str, Callable[[Path, str], Divided]] = {
    "split": _find_split,
    "class": _find_class,
    "sen12": _find_sen12,
    "sen12ms": _find_sen12,
    "qxs": _find_qxs,
    "sar2opt": _find_sar2opt,
    "geotiff": _find_geotiff,
}


def _on_disk(root: Path, split: str, sar: str, optical: str, patch: re.Pattern[str]) -> Divided:
    """Pair the files of folders named by split; `patch` is what follows the scene in a file's name."""
    folders = {s: (root / sar.format(s), root / optical.format(s)) for s in SPLITS}
    there = [s for s in SPLITS if s == split or any(folder.is_dir() for folder in folders[s])]
    return {s: [Pair(a, b, patch.sub("", a.stem)) for a, b in _match(*folders[s])] for s in there}


def _match(sar_folder: Path, optical_folder: Path) -> list[tuple[Path, Path]]:
    """Pair the files of two folders by name (`_s1_` in one stands for `_s2_` in the other)."""
    sar, optical = (
        {f.stem.replace("_s1_", "_s2_"): f for f in image_files(existing_folder(folder))}
        for folder in (sar_folder, optical_folder)
    )
    for name in sorted(sar.keys() ^ optical.keys()):
        present, absent = (sar, optical_folder) if name in sar else (optical, sar_folder)
        raise BadInput(str(present[name]), "no partner", f"an image of the same name in {absent}")
    return [(sar[name], optical[name]) for name in sorted(sar)]


def _divide(pairs: Sequence[Pair]) -> Divided:
    """Divide whole scenes by the hash of their names."""
    scenes = sorted({p.scene for p in pairs}, key=lambda scene: hashlib.sha256(scene.encode()).digest())
    if len(scenes) == 1:
        raise BadInput(
            "path", f"one scene only ({scenes[0]})", "two scenes or more, to divide them into train and test"
        )
    test = set(scenes[: -(-len(scenes) // 5)])
    return {split: [p for p in pairs if (p.scene in test) == (split == "test")] for split in SPLITS}


# --- leaks

Ground = Mapping[Pair, tuple[NDArray[np.float64], Any]]
"""(4, 2) corners and their CRS, of the pairs whose place is known."""


def _refuse_leaks(found: Divided, ground: Callable[[Sequence[Pair]], Ground] = lambda pairs: {}) -> None:
    """Raise BadInput where train and test share a scene, a file or ground. Touching is no leak."""
    if len(found) < len(SPLITS):
        return
    train, test = (found[split] for split in SPLITS)
    scenes = {pair.scene: pair for pair in train}
    for pair in test:
        if pair.scene in scenes:
            _leak(scenes[pair.scene].sar, pair.sar, f"one scene, {pair.scene}")
    for one, other in _equal_files(*([f for p in pairs for f in (p.sar, p.optical)] for pairs in (train, test))):
        _leak(one, other, "the same bytes")
    places = [ground(pairs) for pairs in (train, test)]
    if all(places):
        corners, systems = zip(*places[0].values(), *places[1].values(), strict=True)
        mapped = on_one_map(corners, systems)
        for i, j, depth in _neighbours(mapped[: len(places[0])], mapped[len(places[0]) :]):
            if depth > _EDGE:
                _leak(list(places[0])[i].sar, list(places[1])[j].sar, "overlapping ground")


def _leak(train: Path, test: Path, why: str) -> None:
    allowed = "train and test without a scene, a file or ground in common"
    raise BadInput("split", f"{train} and {test}: {why}", allowed)


def _equal_files(train: Sequence[Path], test: Sequence[Path]) -> Iterator[tuple[Path, Path]]:
    """Find files of both that hold the same bytes; few are read whole, for most differ in size or in the middle."""

    def middle(file: Path) -> bytes:
        with file.open("rb") as opened:
            opened.seek(file.stat().st_size // 2)
            return opened.read(4096)

    def whole(file: Path) -> bytes:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").digest()

    keys: tuple[Callable[[Path], Any], ...] = (lambda file: file.stat().st_size, middle, whole)
    ours, theirs = [(file, None) for file in train], [(file, None) for file in test]
    for key in keys:
        ours, theirs = [(file, key(file)) for file, _ in ours], [(file, key(file)) for file, _ in theirs]
        shared = {k for _, k in ours} & {k for _, k in theirs}
        ours, theirs = ([(file, k) for file, k in files if k in shared] for files in (ours, theirs))
    known = {k: file for file, k in ours}
    yield from ((known[k], file) for file, k in theirs)


def _ground_in_metadata(pairs: Iterable[Pair], entries: Mapping[str, Mapping[str, Any]]) -> Ground:
    """Read the ground of pairs from metadata.json, where "corners_epsgN" is a list of four [x, y]."""
    found = {}
    for pair in pairs:
        for key, value in entries.get(pair.sar.stem, {}).items():
            if named := _CORNERS.fullmatch(key):
                try:
                    found[pair] = np.array(value, dtype=np.float64).reshape(4, 2), f"EPSG:{named[1]}"
                except (ValueError, TypeError):
                    allowed = "four corners [x, y]"
                    raise BadInput(f"metadata.json: {pair.sar.stem}.{key}", value, allowed) from None
    return found


def _places(pairs: Iterable[Pair]) -> dict[Pair, Place]:
    """Read the grid of each pair from its SAR. Raises BadInput for one whose rasters are not on one grid.

    An optical picture (.webp, .png, .jpg) has no grid of its own; it must have its SAR's size when it is read.
    """
    found = {}
    for pair in pairs:
        found[pair] = place(pair.sar)
        if pair.optical.suffix.lower() not in RASTER_SUFFIXES:
            continue
        optical = place(pair.optical)
        if not found[pair].fits(optical):
            given = f"{found[pair]} beside {optical} in {pair.optical}"
            raise BadInput(str(pair.sar), given, "SAR and optical of one CRS, size and transform: resample one of them")
    return found


def _grouped(pairs: Sequence[Pair], places: Sequence[Place]) -> list[Pair]:
    """Make one scene of rasters that touch or overlap, and of those that touch these."""
    first = list(range(len(pairs)))

    def leader(i: int) -> int:
        while first[i] != i:
            first[i] = i = first[first[i]]
        return i

    if pairs:
        ground = on_one_map([where.corners for where in places], [where.crs for where in places])
        for i, j, _ in _neighbours(ground, ground):
            low, high = sorted((leader(i), leader(j)))
            first[high] = low
    return [Pair(pair.sar, pair.optical, pairs[leader(i)].scene) for i, pair in enumerate(pairs)]


def _neighbours(ground: NDArray[np.float64], others: NDArray[np.float64]) -> Iterator[tuple[int, int, float]]:
    """Find (i, j, depth) of convex footprints (n, 4, 2) that touch or overlap."""
    low, high = others.min(1), others.max(1)
    slack = _EDGE * (high - low)
    for i, here in enumerate(ground):
        near = ((low - slack <= here.max(0)) & (high + slack >= here.min(0))).all(1)
        for j in np.flatnonzero(near):
            depth = _depth(here, others[j])
            if depth >= -_EDGE:
                yield i, int(j), depth


def _depth(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Measure how deep two convex footprints overlap, as a share of the smaller; below 0: the gap (separating axes)."""
    depth = np.inf
    for x, y in np.concatenate([np.roll(shape, -1, axis=0) - shape for shape in (one, other)]):
        a, b = one @ (-y, x), other @ (-y, x)
        shared = min(a.max(), b.max()) - max(a.min(), b.min())
        depth = min(depth, shared / min(np.ptp(a), np.ptp(b)))
    return float(depth)
