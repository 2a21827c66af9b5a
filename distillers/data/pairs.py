"""Co-registered SAR and optical scenes, kept in memory, cut into crops for training and tiles for evaluation.

A pair is cut, turned and mirrored as one, so neither can move without the other. What SAR values mean, and what a model
is shown of them, is `distillers.radiometry`.
"""

import hashlib
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distillers.data.pixels import (
    SPLITS,
    Batch,
    Pixels,
    check_indices,
    check_size,
    check_split,
    dihedral,
    existing_folder,
    image_files,
    read_image,
    spread,
    subfolders,
    to_tensor,
)
from distillers.errors import BadInput
from distillers.radiometry import NAMED, POLARISATIONS, UNITS, Radiometry, decibels

LAYOUTS = ("split", "class", "sen12")
_PATCH = re.compile(r"_p\d+$")  # ROIs1868_summer_59_p1001 is patch 1001 of scene ROIs1868_summer_59
STRETCHED = "stretched-db"
STRETCH_DB = (
    20.0  # dB between 0 and 255 of SEN1-2's pictures: puts their speckle (20 levels) where other pictures have it
)
MEAN_BELOW_WHITE_DB = 7.3  # of the pictures whose white is their 99 % quantile, measured on sentinel-pairs
CLIPPED_DB = 2.0  # how far, on average, clipped numbers lie beyond
GAIN_DB = 1.5  # between calibrations, orbits and seasons
RATIO_DB, RATIO_SPREAD_DB = 7.7, 2.0  # VV over VH on land: TerraMind's means, -12.6 and -20.3 dB
SPECKLE_DB = 1.5  # the share of a second polarisation's speckle that the first does not have
_GREY = 3  # grey levels that the channels of a grey image may differ by after lossy compression


@dataclass(frozen=True)
class Pair:
    """One file pair and the scene (the stretch of ground) that it belongs to."""

    sar: Path
    optical: Path
    scene: str


class SarOpticalPairs:
    """Pairs in one of three layouts, found by looking (`layout="auto"`) or named:

    - `split`: `{train,test}/{sar,opt}/ID.webp`; each ID is a scene, the folders are the split.
    - `class`: `{CLASS}/{sar,opt}/NAME.png`; the scene is NAME without its `_pN` (without one: the class).
    - `sen12`: `ROIsXXXX_season/s1_N/*.png` with `s2_N/*.png` (as SEN1-2 is published); each `s1_N` is a scene.

    The last two have no split on disk. Neighbouring patches overlap by half there, so whole scenes are divided: sorted
    by the SHA-256 of their names, the first fifth (rounded up) is the test split, always the same for the same scenes.

    `size` is the crop in pixels. `dihedral` turns and mirrors drawn crops in all eight ways. `limit` keeps an evenly
    spaced part of the pairs. Three equal SAR channels are read as one. `region_of` answers from `metadata.json`, else
    with the class folder.

    `radiometry` is what a model is shown: a name (amplitude | sentinel1-db) or a manifest's `sar`. Where it has
    decibels, `bands` names the polarisations of the files ("VH", "VV" or "VV,VH") and `units` what their values are:
    those of `radiometry.UNITS`, or "stretched-db" (8 bits, decibels stretched to them, as SEN1-2 has); then `draw` also
    varies the levels, adds a simulated second polarisation and leaves polarisations out: see `simulated`.
    BadInput names the file that is unreadable, lacks its partner, differs in size from it, or is smaller than the crop.
    """

    labels: tuple[str, ...] = ()

    def __init__(
        self,
        path: str | Path,
        split: str = "train",
        size: int = 64,
        layout: str = "auto",
        dihedral: bool = True,
        limit: int | None = None,
        radiometry: str | Mapping[str, Any] = "amplitude",
        bands: str = "VH",
        units: str = "dn",
    ) -> None:
        self.path, self.size, self.dihedral = existing_folder(path), check_size(size), dihedral
        check_split(split)
        self.radiometry = described(radiometry)
        self.bands = tuple(bands.split(","))
        if not set(self.bands) <= set(POLARISATIONS) or len(set(self.bands)) < len(self.bands):
            raise BadInput("bands", bands, "VV, VH or VV,VH: the polarisations of the SAR files")
        if units not in (*UNITS, STRETCHED):
            raise BadInput("units", units, " | ".join((*UNITS, STRETCHED)))
        self.units = units
        self.name = self.path.name
        self.layout = self._layout_on_disk() if layout == "auto" else layout
        if self.layout not in LAYOUTS:
            raise BadInput("layout", layout, " | ".join(("auto", *LAYOUTS)))
        pairs = {"split": self._find_split, "class": self._find_class, "sen12": self._find_sen12}[self.layout](split)
        if not pairs:
            raise BadInput("path", str(self.path), f"a folder with SAR/optical pairs in layout {self.layout!r}")
        self.pairs = [pairs[i] for i in spread(len(pairs), limit)]

    # --- what is on disk

    def _layout_on_disk(self) -> str:
        inside = {child.name for child in subfolders(self.path)}
        if any((self.path / s / "sar").is_dir() for s in SPLITS):
            return "split"
        if any((self.path / c / "sar").is_dir() for c in inside):
            return "class"
        if any(child.name.startswith("s1_") for c in inside for child in subfolders(self.path / c)):
            return "sen12"
        raise BadInput("path", str(self.path), "{train,test}/{sar,opt}, CLASS/{sar,opt} or ROIsXXXX_season/{s1_N,s2_N}")

    def _find_split(self, split: str) -> list[Pair]:
        folder = self.path / split
        return [Pair(sar, opt, sar.stem) for sar, opt in _match(folder / "sar", folder / "opt")]

    def _find_class(self, split: str) -> list[Pair]:
        pairs = []
        for folder in (f for f in subfolders(self.path) if (f / "sar").is_dir() or (f / "opt").is_dir()):
            for sar, opt in _match(folder / "sar", folder / "opt"):
                scene = _PATCH.sub("", sar.stem)
                pairs.append(Pair(sar, opt, scene if scene != sar.stem else folder.name))
        return _divide(pairs, split)

    def _find_sen12(self, split: str) -> list[Pair]:
        pairs = []
        for season in subfolders(self.path):
            names = {f.name[3:] for f in subfolders(season) if f.name.startswith(("s1_", "s2_"))}
            for name in sorted(names):
                matched = _match(season / f"s1_{name}", season / f"s2_{name}")
                pairs += [Pair(sar, opt, f"{season.name}/s1_{name}") for sar, opt in matched]
        return _divide(pairs, split)

    @cached_property
    def scenes(self) -> list[NDArray[Any]]:
        """Every pair as (H,W,C+3), uint8 or float16: the SAR's bands, red, green, blue; decoded at the first use."""
        return [_read_pair(pair, self.size) for pair in self.pairs]

    @cached_property
    def _tiles(self) -> list[tuple[int, int, int]]:
        """(pair, top, left) of every non-overlapping tile, in the order of the pairs, then by row."""
        s = self.size
        return [
            (k, top, left)
            for k, scene in enumerate(self.scenes)
            for top in range(0, scene.shape[0] - s + 1, s)
            for left in range(0, scene.shape[1] - s + 1, s)
        ]

    @cached_property
    def _regions(self) -> dict[str, str]:
        file = self.path / "metadata.json"
        if not file.is_file():
            return {}
        try:
            return {
                str(entry["id"]): str(entry["region"]) for entry in json.loads(file.read_text()) if "region" in entry
            }
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(str(file), str(error), 'a JSON list of {"id": ..., "region": ...}') from error

    # --- the batches

    def __len__(self) -> int:
        """How many non-overlapping tiles there are."""
        return len(self._tiles)

    def draw(self, n: int, rng: np.random.Generator) -> Batch:
        """`n` random crops (a pair is as likely as its area), both turned alike; a pure function of `rng`."""
        area = np.array([scene.shape[0] * scene.shape[1] for scene in self.scenes], dtype=np.float64)
        chosen, where = rng.choice(len(area), size=n, p=area / area.sum()), rng.random((n, 2))
        crops = np.empty((n, self.size, self.size, self.scenes[0].shape[2]), dtype=self.scenes[0].dtype)
        for i, k in enumerate(chosen):
            scene = self.scenes[k]
            top = int(where[i, 0] * (scene.shape[0] - self.size + 1))
            left = int(where[i, 1] * (scene.shape[1] - self.size + 1))
            crops[i] = scene[top : top + self.size, left : left + self.size]
        return self._batch(dihedral(crops, rng.integers(8, size=n)) if self.dihedral else crops, rng)

    def items(self, indices: Sequence[int]) -> Batch:
        """The tiles of these positions as they are."""
        chosen = [self._tiles[i] for i in check_indices(indices, len(self))]
        tiles = [self.scenes[k][top : top + self.size, left : left + self.size] for k, top, left in chosen]
        empty = np.empty((0, self.size, self.size, self.scenes[0].shape[2]), dtype=self.scenes[0].dtype)
        return self._batch(np.stack(tiles) if tiles else empty)

    def _batch(self, crops: NDArray[Any], rng: np.random.Generator | None = None) -> Batch:
        """(n,S,S,C+3) in the model's terms; with `rng` as training draws them."""
        image, sar = to_tensor(crops[..., -3:].astype(np.uint8)), crops[..., :-3]
        if self.radiometry.form == "amplitude":
            return {"image": image, "sar": to_tensor(sar)}
        heard = {band: self._decibels(sar[..., i], band, rng) for i, band in enumerate(self.bands)}
        seen = self.radiometry.unit(heard if rng is None else simulated(heard, rng))
        return {"image": image, "sar": torch.from_numpy(seen.swapaxes(0, 1).copy())}

    def _decibels(self, values: NDArray[Any], band: str, rng: np.random.Generator | None) -> NDArray[np.float32]:
        """dB of (n,S,S); training takes the steps out of 8-bit numbers and lets clipped ones lie beyond."""
        numbers = values.astype(np.float32)
        if self.units in ("db", "linear", "amplitude"):
            return decibels(numbers, self.units)
        beyond = np.zeros_like(numbers)
        if rng is not None:
            numbers += rng.uniform(-0.5, 0.5, numbers.shape).astype(np.float32)
            beyond = rng.exponential(CLIPPED_DB, numbers.shape).astype(np.float32) * (values == 255)
        white = self.radiometry.level(band)
        if self.units == STRETCHED:
            return white - MEAN_BELOW_WHITE_DB + (numbers - 127.5) * (STRETCH_DB / 255) + beyond
        return white + decibels(np.maximum(numbers, 0.5) / 255, "dn") + beyond

    def scene_of(self, index: int) -> str:
        """The scene that tile `index` was cut from."""
        check_indices([index], len(self))
        return self.pairs[self._tiles[index][0]].scene

    def region_of(self, index: int) -> str | None:
        """The region of tile `index` in `metadata.json`, or its class folder; None where neither says anything."""
        region = self._regions.get(self.scene_of(index))
        return region or (self.pairs[self._tiles[index][0]].sar.parents[1].name if self.layout == "class" else None)


class MixedPairs:
    """Several folders of pairs as one data set, for a translator of more than one polarisation.

    sources: tables with SarOpticalPairs' options, and `share`, how much of a drawn batch comes from each (1 if not
    said; only their ratio counts). The items are all items of all sources, in turn.

    Raises:
        BadInput: no source, an unknown option, a share that is not positive, and what a source itself refuses.
    """

    labels: tuple[str, ...] = ()

    def __init__(
        self,
        sources: Sequence[Mapping[str, Any]],
        split: str = "train",
        size: int = 64,
        dihedral: bool = True,
        radiometry: str | Mapping[str, Any] = "sentinel1-db",
    ) -> None:
        if not sources:
            raise BadInput("sources", sources, "one table or more, each with a path")
        own = {"split": split, "size": size, "dihedral": dihedral, "radiometry": radiometry}
        self.parts, shares, self.size = [], [], size
        for i, source in enumerate(sources):
            options = {**source}
            shares.append(options.pop("share", 1.0))
            known = set(inspect.signature(SarOpticalPairs).parameters) - set(own)
            if "path" not in options or not set(options) <= known:
                raise BadInput(f"sources.{i}", sorted(options), "path, share, " + ", ".join(sorted(known - {"path"})))
            self.parts.append(SarOpticalPairs(**options, **own))
        if not all(isinstance(share, int | float) and share > 0 for share in shares):
            raise BadInput("share", shares, "numbers above 0")
        self.shares = np.array(shares, dtype=np.float64) / sum(shares)
        self.name = "+".join(part.name for part in self.parts)
        self.radiometry = self.parts[0].radiometry

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def draw(self, n: int, rng: np.random.Generator) -> Batch:
        """`n` random crops, each from a source by its share; a pure function of `rng`."""
        counts = rng.multinomial(n, self.shares)
        drawn = [part.draw(int(count), rng) for part, count in zip(self.parts, counts, strict=True) if count]
        return {key: torch.cat([batch[key] for batch in drawn]) for key in drawn[0]}

    def items(self, indices: Sequence[int]) -> Batch:
        """The tiles of these positions as they are."""
        places = [self._place(index) for index in check_indices(indices, len(self))]
        found = [self.parts[k].items([i]) for k, i in places] or [self.parts[0].items([])]
        return {key: torch.cat([batch[key] for batch in found]) for key in found[0]}

    def region_of(self, index: int) -> str | None:
        """As the source says, after the source's name."""
        k, i = self._place(check_indices([index], len(self))[0])
        region = self.parts[k].region_of(i)
        return f"{self.parts[k].name}, {region}" if region else self.parts[k].name

    def _place(self, index: int) -> tuple[int, int]:
        """(source, position in it)."""
        ends = np.cumsum([len(part) for part in self.parts])
        k = int(np.searchsorted(ends, index, side="right"))
        return k, int(index - (ends[k - 1] if k else 0))


def described(radiometry: str | Mapping[str, Any]) -> Radiometry:
    """A radiometry by its name or by a manifest's words."""
    if isinstance(radiometry, str):
        if radiometry not in NAMED:
            raise BadInput("radiometry", radiometry, " | ".join(NAMED))
        return NAMED[radiometry]
    return Radiometry.of(radiometry)


def simulated(heard: Mapping[str, NDArray[np.floating]], rng: np.random.Generator) -> dict[str, NDArray[np.floating]]:
    """Backscatter as a calibrated raster might have it, from pairs of one polarisation or two, each (n,S,S) in dB.

    Levels shift by a random gain, for the pairs' own are not calibrated. Where there is one polarisation, the other is
    made of it: further off by a random ratio, with noise of its own. It lets one model take VV, VH or both; it cannot
    teach what the true ratio tells (volume against surface). Then, at random, one of the two is left out (NaN).
    """
    (n, *_), bands = (shape := next(iter(heard.values())).shape), dict(heard)
    drawn = rng.random((n, 1, 1))
    real = next(iter(heard))
    if len(bands) == 1:
        other = POLARISATIONS[1 - POLARISATIONS.index(real)]
        ratio = RATIO_DB if other == "VV" else -RATIO_DB
        bands[other] = bands[real] + rng.normal(ratio, RATIO_SPREAD_DB, (n, 1, 1)) + _speckle(shape, rng)
        without = {other: drawn < 0.4, real: drawn > 0.75}
    else:
        without = {"VV": drawn < 0.25, "VH": drawn > 0.75}
    gain = rng.normal(0, GAIN_DB, (n, 1, 1))
    return {band: np.where(without[band], np.nan, values + gain) for band, values in bands.items()}


def _speckle(shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.floating]:
    """Noise in dB, alike over two pixels, for Sentinel-1's 20 m are sampled every 10 m."""
    white = rng.normal(0, SPECKLE_DB, shape)
    pairs = (white + np.roll(white, 1, -1)) / np.sqrt(2)
    return (pairs + np.roll(pairs, 1, -2)) / np.sqrt(2)


def _match(sar_folder: Path, optical_folder: Path) -> list[tuple[Path, Path]]:
    """The files of both folders paired by name (`_s1_` in one stands for `_s2_` in the other)."""
    sar, optical = (
        {f.stem.replace("_s1_", "_s2_"): f for f in image_files(existing_folder(folder))}
        for folder in (sar_folder, optical_folder)
    )
    for name in sorted(sar.keys() ^ optical.keys()):
        present, absent = (sar, optical_folder) if name in sar else (optical, sar_folder)
        raise BadInput(str(present[name]), "no partner", f"an image of the same name in {absent}")
    return [(sar[name], optical[name]) for name in sorted(sar)]


def _divide(pairs: list[Pair], split: str) -> list[Pair]:
    """The pairs of the scenes of `split`; see SarOpticalPairs for the rule."""
    scenes = sorted({p.scene for p in pairs}, key=lambda scene: hashlib.sha256(scene.encode()).digest())
    if len(scenes) == 1:
        raise BadInput(
            "path", f"one scene only ({scenes[0]})", "two scenes or more, to divide them into train and test"
        )
    test = set(scenes[: -(-len(scenes) // 5)])
    return [p for p in pairs if (p.scene in test) == (split == "test")]


def _read_pair(pair: Pair, size: int) -> NDArray[Any]:
    sar, optical = _read_sar(pair.sar), np.asarray(read_image(pair.optical).convert("RGB"))
    if sar.shape[:2] != optical.shape[:2]:
        given = f"{sar.shape[1]}x{sar.shape[0]} px beside {optical.shape[1]}x{optical.shape[0]} px in {pair.optical}"
        raise BadInput(str(pair.sar), given, "SAR and optical of the same size")
    if min(sar.shape[:2]) < size:
        raise BadInput(str(pair.sar), f"{sar.shape[1]}x{sar.shape[0]} px", f"at least the crop size, {size} px")
    return np.concatenate([sar, optical.astype(sar.dtype)], axis=2)


def _read_sar(path: Path) -> Pixels:
    """(H,W,1) uint8; BadInput for a picture in colour, which is most often the optical one in the wrong folder."""
    image = read_image(path)
    if image.mode == "L":
        return np.asarray(image)[:, :, None]
    rgb = np.asarray(image.convert("RGB"))
    if int((rgb.max(axis=2) - rgb.min(axis=2)).max()) > _GREY:
        raise BadInput(str(path), "an image in colour", "SAR as one channel, or as three equal channels")
    return rgb[:, :, 1:2]


def read_sar(path: str | Path) -> Tensor:
    """One SAR picture as (1, 1, H, W), 0..255 to [-1, 1]; BadInput for a missing, unreadable or coloured file."""
    file = Path(path)
    if not file.is_file():
        raise BadInput("sar", str(path), "an existing picture file")
    return to_tensor(_read_sar(file)[None])
