"""Co-registered SAR and optical scenes, kept in memory as uint8, cut into crops for training and tiles for evaluation.

Each pair is one (H,W,4) array (SAR, red, green, blue), so a crop, a turn or a flip cannot move one without the other.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
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

LAYOUTS = ("split", "class", "sen12")
_PATCH = re.compile(r"_p\d+$")  # ROIs1868_summer_59_p1001 is patch 1001 of scene ROIs1868_summer_59
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
    spaced part of the pairs. Three equal SAR channels are read as one. `region_of` answers from `metadata.json`.
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
    ) -> None:
        self.path, self.size, self.dihedral = existing_folder(path), check_size(size), dihedral
        check_split(split)
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
    def scenes(self) -> list[Pixels]:
        """Every pair as (H,W,4) uint8 (SAR, red, green, blue), decoded at the first use."""
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
        crops = np.empty((n, self.size, self.size, 4), dtype=np.uint8)
        for i, k in enumerate(chosen):
            scene = self.scenes[k]
            top = int(where[i, 0] * (scene.shape[0] - self.size + 1))
            left = int(where[i, 1] * (scene.shape[1] - self.size + 1))
            crops[i] = scene[top : top + self.size, left : left + self.size]
        return _batch(dihedral(crops, rng.integers(8, size=n)) if self.dihedral else crops)

    def items(self, indices: Sequence[int]) -> Batch:
        """The tiles of these positions as they are."""
        chosen = [self._tiles[i] for i in check_indices(indices, len(self))]
        tiles = [self.scenes[k][top : top + self.size, left : left + self.size] for k, top, left in chosen]
        return _batch(np.stack(tiles) if tiles else np.empty((0, self.size, self.size, 4), dtype=np.uint8))

    def scene_of(self, index: int) -> str:
        """The scene that tile `index` was cut from."""
        check_indices([index], len(self))
        return self.pairs[self._tiles[index][0]].scene

    def region_of(self, index: int) -> str | None:
        """The region of tile `index` in `metadata.json`; None where it says nothing of it."""
        return self._regions.get(self.scene_of(index))


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


def _read_pair(pair: Pair, size: int) -> Pixels:
    sar, optical = _read_sar(pair.sar), np.asarray(read_image(pair.optical).convert("RGB"))
    if sar.shape[:2] != optical.shape[:2]:
        given = f"{sar.shape[1]}x{sar.shape[0]} px beside {optical.shape[1]}x{optical.shape[0]} px in {pair.optical}"
        raise BadInput(str(pair.sar), given, "SAR and optical of the same size")
    if min(sar.shape[:2]) < size:
        raise BadInput(str(pair.sar), f"{sar.shape[1]}x{sar.shape[0]} px", f"at least the crop size, {size} px")
    return np.concatenate([sar, optical], axis=2)


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
    """One SAR picture as (1, 1, H, W) in [-1, 1]; BadInput for a missing, unreadable or coloured file."""
    file = Path(path)
    if not file.is_file():
        raise BadInput("sar", str(path), "an existing picture file")
    return to_tensor(_read_sar(file)[None])


def _batch(pixels: Pixels) -> Batch:
    return {"image": to_tensor(pixels[..., 1:]), "sar": to_tensor(pixels[..., :1])}
