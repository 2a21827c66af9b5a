"""Co-registered SAR and optical scenes, kept in memory, cut into crops for training and tiles for evaluation.

A pair is cut, turned and mirrored as one, so neither can move without the other. `layouts` finds the pairs and divides
them; `models.radiometry` converts SAR values to a model's input.
"""

import contextlib
import inspect
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from distillers.data.layouts import RASTERS, Pair, find_pairs, metadata
from distillers.data.pair_rasters import RASTER_SUFFIXES, read_optical_raster, read_sar_raster, sar_bands
from distillers.data.pixels import (
    SMALLEST,
    UNREADABLE,
    Batch,
    Pixels,
    check_indices,
    check_side,
    check_split,
    check_whole,
    dihedral,
    existing_folder,
    read_image,
    spread,
    to_tensor,
)
from distillers.errors import BadInput, Notice, checked
from distillers.models.band_names import POLARISATIONS
from distillers.models.radiometry import (
    NAMED,
    NO_DATA_DB,
    UNITS,
    Radiometry,
    can_be,
    decibels,
    decide_units,
    measure_white,
)

STRETCHED = "stretched-db"
STRETCH_DB = 20.0  # between 0 and 255 of SEN1-2's pictures: puts their speckle (20 levels) where other pictures have it
MEAN_BELOW_WHITE_DB = 7.3  # of the pictures whose white is their 99 % quantile, measured on sentinel-pairs
CLIPPED_DB = 2.0  # how far, on average, clipped numbers lie beyond
GAIN_DB = 1.5  # between calibrations, orbits and seasons
CALIBRATED_GAIN_DB = 0.3  # between calibrated scenes of one place
SLOPE = 0.15  # by how much decibels are stretched or flattened about their median
NOISE_DB = 1.5  # the strongest additional speckle
OTHERWISE = 0.3  # of crops are shown as the kind of levels that they are not
RATIO_DB, RATIO_SPREAD_DB = 7.7, 2.0  # VV over VH on land: TerraMind's means, -12.6 and -20.3 dB
SPECKLE_DB = 1.5  # the share of a second polarisation's speckle that the first does not have
HOLES = 0.1  # of a crop's pixels may have no data
SAMPLED = 16  # rasters of a folder that its units are decided by
_GREY = 3  # grey levels that the channels of a grey image may differ by after lossy compression


class SarOpticalPairs:
    """SAR and optical pairs of a folder in one of `layouts.find_pairs`' layouts, recognised ("auto") or named.

    `size` is the crop in pixels. `dihedral` turns and mirrors drawn crops in all eight ways. `limit` keeps an evenly
    spaced part of the pairs. Three equal SAR channels are read as one. `region_of` answers from `metadata.json`, else
    with the class folder.

    `radiometry` is what a model is shown: a name (amplitude | sentinel1-db) or a manifest's `sar`. Where it has
    decibels, `bands` names the polarisations of pictures ("VH" if not said, "VV" or "VV,VH") and `units` what their
    values are: those of `radiometry.UNITS`, or "stretched-db" (8 bits, decibels stretched to them, as SEN1-2 has); then
    `draw` also varies the levels, adds a simulated second polarisation and leaves polarisations out: see `simulated`.

    A radiometry that tells absolute levels from others ("sentinel1") makes `draw` vary them more: see `varied`.
    `balance` sorts ground into that many classes by its mean colour, so that water or towns, which cover little, are
    drawn more often than their share of the area; 0 draws by area. `colours` = {gain: [r, g, b], offset: [r, g, b]}
    brings the optical pictures of one source to the brightness of another: gain * level + offset, levels of 0 to 255.

    Rasters (layouts geotiff and sen12ms) say their bands by description, else `bands` does, as in
    `band_names.name_bands`. Units "auto" are "dn" for 8 bits, else decided by the values of SAMPLED rasters, for all
    alike. `nodata` is a SAR value, as stored, that means no data beside NaN, what the file says and a border of zeros
    (`sar.border`). Optical rasters of 8 bits are
    taken as they are, all others as reflectance, (numbers - optical_offset) / optical_scale: optical_offset = 1000 for
    Sentinel-2 since processing baseline 04.00, as ESA delivers it. Crops of which more than a tenth lack data are not
    among the items, and drawn anew.

    BadInput names the file that is unreadable, lacks its partner, differs in size from it, or is smaller than the crop.
    """

    labels: tuple[str, ...] = ()
    channels = 3
    captioned, pictured = False, True

    def __init__(
        self,
        path: str | Path,
        split: str = "train",
        size: int = 64,
        layout: str = "auto",
        dihedral: bool = True,
        limit: int | None = None,
        radiometry: str | Mapping[str, Any] = "amplitude",
        bands: str | None = None,
        units: str = "auto",
        nodata: float | None = None,
        optical_scale: float = 10_000.0,
        optical_offset: float = 0.0,
        colours: Mapping[str, Sequence[float]] | None = None,
        balance: int = 0,
    ) -> None:
        self.path, self.side, self.dihedral = existing_folder(path), check_side(size), dihedral
        self.size = (size, size)
        check_split(split)
        self.radiometry = radiometry_of(radiometry)
        if units not in ("auto", *UNITS, STRETCHED):
            raise BadInput("units", units, " | ".join(("auto", *UNITS, STRETCHED)))
        if not optical_scale > 0:
            raise BadInput("optical_scale", optical_scale, "above 0")
        self.balance, self.colours = check_whole("balance", balance, 0), _colours(colours)
        self.name, self.nodata, self.optical = self.path.name, nodata, (optical_scale, optical_offset)
        self.layout, pairs = find_pairs(self.path, split, layout)
        self.pairs = [pairs[i] for i in spread(len(pairs), limit)]
        self._asked = bands, units
        self._bordered: dict[Path, None] = {}  # rasters whose zeros along the edge are taken for no data, in order
        if self.layout in RASTERS:
            first = self.pairs[0].sar
            found, how = sar_bands(first, bands)
            self.bands = tuple(self.radiometry.choose_bands(found))
            if "assumed" in how and self.layout != "sen12ms":  # which is published as VV, VH
                warnings.warn(f"{first}: polarisation {how}; bands says otherwise", Notice, stacklevel=2)
            return
        self.bands = tuple(("VH" if bands is None else bands).split(","))
        if not set(self.bands) <= set(POLARISATIONS) or len(set(self.bands)) < len(self.bands):
            raise BadInput("bands", bands, "VV, VH or VV,VH: the polarisations of the SAR files")

    # --- what is on disk

    @cached_property
    def scenes(self) -> list[NDArray[Any]]:
        """All pairs as (H,W,C+3), decoded at the first use: the SAR's bands, red, green, blue.

        uint8 where all are; else float16: 8-bit SAR as it is, other SAR in decibels (at the model's white where it has
        no level of its own), NaN where there are no data.
        """
        read = self._read_rasters if self.layout in RASTERS else _read_pair
        found = [self._recoloured(read(pair, self.side)) for pair in self.pairs]
        if self._bordered:
            shown = f"{len(self._bordered)} of {len(self.pairs)} SAR rasters, the first {next(iter(self._bordered))}"
            told = f"{self.path}: 0 along the edge is taken for no data, as nodata = 0 says, in {shown}"
            warnings.warn(told, Notice, stacklevel=2)
        kind = np.uint8 if all(scene.dtype == np.uint8 for scene in found) else np.float16
        return [scene.astype(kind, copy=False) for scene in found]

    def _recoloured(self, scene: NDArray[Any]) -> NDArray[Any]:
        """Bring the optical levels of a scene to another source's brightness."""
        if self.colours is not None:
            levels = self.colours[0] * scene[..., -3:].astype(np.float32) + self.colours[1]
            scene[..., -3:] = np.clip(np.rint(levels), 0, 255)
        return scene

    @cached_property
    def units(self) -> str:
        """The units of the SAR's values, as asked for or decided by them."""
        asked = self._asked[1]
        if asked != "auto" or self.layout not in RASTERS:
            return "dn" if asked == "auto" else asked
        sampled: dict[Path, dict[str, NDArray[Any]]] = {}
        for i in spread(len(self.pairs), SAMPLED):
            values, valid = self._read_sar(self.pairs[i])
            numbers = values[valid]
            if numbers.size:
                numbers = numbers[:: 1 + len(numbers) // 65_536]
                sampled[self.pairs[i].sar] = dict(zip(self.bands, numbers.T, strict=True))
        if not sampled:
            raise BadInput("path", str(self.path), "SAR rasters with data")
        together = {band: np.concatenate([own[band] for own in sampled.values()]) for band in self.bands}
        try:
            return decide_units(together)[0]
        except BadInput as error:
            raise BadInput(f"{_first_unclear(sampled)}: units", error.given, error.allowed) from None

    def _bands_of(self, pair: Pair) -> dict[str, int]:
        """Name the bands of a pair's SAR raster that the model takes, {polarisation: number}."""
        return self.radiometry.choose_bands(sar_bands(pair.sar, self._asked[0])[0])

    def _read_sar(self, pair: Pair) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Read a pair's SAR raster as `read_sar_raster` does, and remember it where a border of zeros was found."""
        found = self._bands_of(pair)
        if set(found) != set(self.bands):
            raise BadInput(str(pair.sar), ", ".join(found), f"{', '.join(self.bands)}, as in {self.pairs[0].sar}")
        values, valid, bordered = read_sar_raster(pair.sar, {band: found[band] for band in self.bands}, self.nodata)
        if bordered:
            self._bordered[pair.sar] = None
        return values, valid

    @cached_property
    def _eight_bits(self) -> bool:
        """Whether the SAR's values stay as they are in `scenes`: those of 8 bits."""
        return self.layout not in RASTERS or self._read_sar(self.pairs[0])[0].dtype == np.uint8

    def _read_rasters(self, pair: Pair, size: int) -> NDArray[Any]:
        sar, valid = self._read_sar(pair)
        if (sar.dtype == np.uint8) != self._eight_bits:
            raise BadInput(str(pair.sar), f"values of {sar.dtype}", f"8 bits in all or none, as in {self.pairs[0].sar}")
        if pair.optical.suffix.lower() in RASTER_SUFFIXES:
            optical, seen = read_optical_raster(pair.optical, *self.optical)
        else:
            optical = np.asarray(read_image(pair.optical).convert("RGB"))
            seen = np.ones(optical.shape[:2], bool)
        _check_sizes(pair, sar, optical, size)
        valid = valid & seen
        if not self._eight_bits:
            sar = self._levels(pair, sar, valid)
            valid &= ~np.isnan(sar).any(2)
        scene = np.concatenate([sar, optical.astype(sar.dtype)], axis=2)
        return scene if valid.all() else np.where(valid[..., None], scene, np.nan).astype(np.float16)

    def _levels(self, pair: Pair, sar: NDArray[Any], valid: NDArray[np.bool_]) -> NDArray[np.float16]:
        """Convert values of more than 8 bits to decibels. Raises BadInput for values of other units."""
        out = np.full(sar.shape, np.nan, np.float16)
        if not valid.any():
            return out
        samples = {band: sar[..., i][valid] for i, band in enumerate(self.bands)}
        low, high = float(sar[valid].min()), float(sar[valid].max())
        wrong = not can_be(samples, "db") if self.units == "db" else high <= 0
        if self.units == STRETCHED or wrong or (self._asked[1] == "auto" and self._of_another_kind(samples)):
            given = f"values from {low:.4g} to {high:.4g}, in a folder of units {self.units}"
            raise BadInput(str(pair.sar), given, "values of one kind in all rasters; nodata where a number means none")
        if self.units == "db":
            valid = valid & (sar > NO_DATA_DB).all(2)  # no more than noise, so some are left
        for i, band in enumerate(self.bands):
            numbers, shift = sar[..., i][valid], 0.0
            if self.radiometry.is_relative(self.units):
                shift = self.radiometry.white_level(band) - measure_white(numbers, self.units)
            out[valid, i] = decibels(numbers, self.units) + np.float32(shift)
        return out

    def _of_another_kind(self, samples: Mapping[str, NDArray[Any]]) -> bool:
        """Tell whether one raster alone would be taken for other units; power and amplitude count as one."""
        try:
            own, _ = decide_units(samples)
        except BadInput:
            return False
        alike = {"amplitude": "linear"}
        return alike.get(own, own) != alike.get(self.units, self.units)

    @cached_property
    def _tiles(self) -> list[tuple[int, int, int]]:
        """The (pair, top, left) of every non-overlapping tile with data, in the order of the pairs, then by row."""
        s = self.side
        return [
            (k, top, left)
            for k, scene in enumerate(self.scenes)
            for top in range(0, scene.shape[0] - s + 1, s)
            for left in range(0, scene.shape[1] - s + 1, s)
            if _holes(scene[None, top : top + s, left : left + s])[0] <= HOLES
        ]

    @cached_property
    def _ground(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
        """The tiles that `balance` draws from, with the classes of their ground.

        Returns:
            (n, 3) pair, top, left of every tile with data half a crop apart, sorted by class; where each class starts,
            and the end; the probability of each class.

        Classes are clusters of mean colours. One is as likely as the root of its size: by size, open sea would never
        be drawn; all alike, three tiles of one class would be seen thousands of times.
        """
        from scipy.cluster.vq import kmeans2

        s, step = self.side, self.side // 2
        found, means = [], []
        for k, scene in enumerate(self.scenes):
            for top in range(0, scene.shape[0] - s + 1, step):
                for left in range(0, scene.shape[1] - s + 1, step):
                    tile = scene[top : top + s, left : left + s]
                    if _holes(tile[None])[0] <= HOLES:
                        found.append((k, top, left))
                        means.append(np.nanmean(tile[::4, ::4, -3:], (0, 1), dtype=np.float64))
        if len(found) < self.balance:
            raise BadInput("balance", self.balance, f"at most the {len(found)} tiles with data of {self.path}")
        _, kinds = kmeans2(np.array(means), self.balance, minit="++", seed=0)
        counts = np.bincount(kinds, minlength=self.balance)
        order = np.argsort(kinds, kind="stable")
        return np.array(found)[order], np.append(0, np.cumsum(counts)), np.sqrt(counts) / np.sqrt(counts).sum()

    @cached_property
    def _anchors(self) -> dict[str, NDArray[np.float64]]:
        """The dB, (pairs,) by band, that put the white of a calibrated pair where digital numbers have it."""
        if not self.calibrated:
            return {}
        return {
            band: np.array(
                [
                    self.radiometry.white_level(band) - measure_white(self._decibels(s[..., i], band, None), "db")
                    for s in self.scenes
                ]
            )
            for i, band in enumerate(self.bands)
        }

    @cached_property
    def _regions(self) -> dict[str, str]:
        return {name: str(entry["region"]) for name, entry in metadata(self.path).items() if "region" in entry}

    # --- the batches

    def __len__(self) -> int:
        """Count the non-overlapping tiles with data."""
        return len(self._tiles)

    def draw(self, n: int, rng: np.random.Generator) -> Batch:
        """Draw `n` random crops, both of a pair turned alike; a pure function of `rng`.

        A pair is as likely as its area, or a class of ground as the root of its area (`balance`).
        """
        crops, chosen = self._crops(n, rng)
        while (poor := _holes(crops) > HOLES).any():
            if not self._tiles:
                raise BadInput("path", str(self.path), f"pairs with {self.side} x {self.side} px of data")
            crops[poor], chosen[poor] = self._crops(int(poor.sum()), rng)
        return self._batch(dihedral(crops, rng.integers(8, size=n)) if self.dihedral else crops, rng, chosen)

    def _crops(self, n: int, rng: np.random.Generator) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Draw crops (n,S,S,C+3) and the number of each one's pair (n,)."""
        places = self._balanced(n, rng) if self.balance else self._anywhere(n, rng)
        crops = np.empty((n, self.side, self.side, self.scenes[0].shape[2]), dtype=self.scenes[0].dtype)
        for i, (k, top, left) in enumerate(places):
            crops[i] = self.scenes[k][top : top + self.side, left : left + self.side]
        return crops, places[:, 0]

    def _anywhere(self, n: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Draw (n, 3) pair, top, left, evenly over the area."""
        shapes = np.array([scene.shape[:2] for scene in self.scenes])
        area = shapes.prod(1).astype(np.float64)
        chosen, where = rng.choice(len(area), size=n, p=area / area.sum()), rng.random((n, 2))
        return np.column_stack([chosen, (where * (shapes[chosen] - self.side + 1)).astype(np.int64)])

    def _balanced(self, n: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Draw (n, 3) pair, top, left: a tile of a class, shifted by up to half a crop within its pair."""
        tiles, starts, likely = self._ground
        kinds, where = rng.choice(self.balance, size=n, p=likely), rng.random((n, 3))
        places = tiles[(starts[kinds] + where[:, 0] * np.diff(starts)[kinds]).astype(np.int64)]
        room = np.array([scene.shape[:2] for scene in self.scenes])[places[:, 0]] - self.side
        places[:, 1:] += np.rint((where[:, 1:] - 0.5) * self.side).astype(np.int64)
        places[:, 1:] = places[:, 1:].clip(0, room)
        return places

    def items(self, indices: Sequence[int]) -> Batch:
        """Take the tiles at these positions as they are."""
        chosen = [self._tiles[i] for i in check_indices(indices, len(self))]
        tiles = [self.scenes[k][top : top + self.side, left : left + self.side] for k, top, left in chosen]
        empty = np.empty((0, self.side, self.side, self.scenes[0].shape[2]), dtype=self.scenes[0].dtype)
        return self._batch(np.stack(tiles) if tiles else empty)

    @cached_property
    def calibrated(self) -> bool:
        """Whether SAR levels are absolute, not relative to each scene's white."""
        return self.units in ("db", "linear", "amplitude") and not self.radiometry.is_relative(self.units)

    def _batch(
        self, crops: NDArray[Any], rng: np.random.Generator | None = None, pairs: NDArray[np.int64] | None = None
    ) -> Batch:
        """Turn crops (n,S,S,C+3), of these pairs, into the model's input; with `rng` augmented for training."""
        image, sar = to_tensor(np.nan_to_num(crops[..., -3:]).astype(np.uint8)), crops[..., :-3]
        if self.radiometry.form == "amplitude" and self._eight_bits:
            return {"image": image, "sar": to_tensor(sar).nan_to_num_(0)}
        backscatter = {band: self._decibels(sar[..., i], band, rng) for i, band in enumerate(self.bands)}
        absolute: bool | NDArray[np.bool_] = self.calibrated
        if rng is not None and pairs is not None and self.radiometry.calibrated:
            anchors = {band: shifts[pairs] for band, shifts in self._anchors.items()}
            backscatter, absolute = varied(backscatter, self.calibrated, anchors, rng)
        elif rng is not None and self.radiometry.form == "db":
            backscatter = simulated(backscatter, rng)
        seen = self.radiometry.normalize(backscatter, absolute)
        return {"image": image, "sar": torch.from_numpy(seen.swapaxes(0, 1).copy())}

    def _decibels(self, values: NDArray[Any], band: str, rng: np.random.Generator | None) -> NDArray[np.float32]:
        """Convert (n,S,S) to dB; training smooths the steps of 8-bit numbers and lets clipped ones lie beyond."""
        numbers = values.astype(np.float32)
        if not self._eight_bits:
            return numbers
        if self.units in ("db", "linear", "amplitude"):
            return decibels(numbers, self.units)
        beyond = np.zeros_like(numbers)
        if rng is not None:
            numbers += rng.uniform(-0.5, 0.5, numbers.shape).astype(np.float32)
            beyond = rng.exponential(CLIPPED_DB, numbers.shape).astype(np.float32) * (values == 255)
        white = self.radiometry.white_level(band)
        if self.units == STRETCHED:
            return white - MEAN_BELOW_WHITE_DB + (numbers - 127.5) * (STRETCH_DB / 255) + beyond
        return white + decibels(np.maximum(numbers, 0.5) / 255, "dn") + beyond

    def scene_of(self, index: int) -> str:
        """Return the scene that tile `index` was cut from."""
        check_indices([index], len(self))
        return self.pairs[self._tiles[index][0]].scene

    def region_of(self, index: int) -> str | None:
        """Return the region of tile `index` in `metadata.json`, or its class folder; None where there is neither."""
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
    channels = 3
    captioned, pictured = False, True

    def __init__(
        self,
        sources: Sequence[Mapping[str, Any]],
        split: str = "train",
        size: int = 64,
        dihedral: bool = True,
        radiometry: str | Mapping[str, Any] = "sentinel1-db",
        balance: int = 0,
    ) -> None:
        if not sources:
            raise BadInput("sources", sources, "one table or more, each with a path")
        own: dict[str, Any] = {
            "split": split,
            "size": size,
            "dihedral": dihedral,
            "radiometry": radiometry,
            "balance": balance,
        }
        self.parts, shares, self.size = [], [], (size, size)
        for i, source in enumerate(sources):
            options = {**source}
            shares.append(options.pop("share", 1.0))
            known = set(inspect.signature(SarOpticalPairs).parameters) - set(own)
            if "path" not in options or not set(options) <= known:
                raise BadInput(f"sources.{i}", sorted(options), "path, share, " + ", ".join(sorted(known - {"path"})))
            self.parts.append(SarOpticalPairs(**checked(SarOpticalPairs, options, f"data.sources.{i}"), **own))
        if not all(isinstance(share, int | float) and share > 0 for share in shares):
            raise BadInput("share", shares, "numbers above 0")
        self.shares = np.array(shares, dtype=np.float64) / sum(shares)
        self.name = "+".join(part.name for part in self.parts)
        self.radiometry = self.parts[0].radiometry

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def draw(self, n: int, rng: np.random.Generator) -> Batch:
        """Draw `n` random crops, each from a source by its share; a pure function of `rng`."""
        counts = rng.multinomial(n, self.shares)
        drawn = [part.draw(int(count), rng) for part, count in zip(self.parts, counts, strict=True) if count or not n]
        return {key: torch.cat([batch[key] for batch in drawn]) for key in drawn[0]}

    def items(self, indices: Sequence[int]) -> Batch:
        """Take the tiles at these positions as they are."""
        places = [self._place(index) for index in check_indices(indices, len(self))]
        found = [self.parts[k].items([i]) for k, i in places] or [self.parts[0].items([])]
        return {key: torch.cat([batch[key] for batch in found]) for key in found[0]}

    def region_of(self, index: int) -> str | None:
        """Return the source's name and its region of the item."""
        k, i = self._place(check_indices([index], len(self))[0])
        region = self.parts[k].region_of(i)
        return f"{self.parts[k].name}, {region}" if region else self.parts[k].name

    def _place(self, index: int) -> tuple[int, int]:
        """Find the source of an item, and its position there."""
        ends = np.cumsum([len(part) for part in self.parts])
        k = int(np.searchsorted(ends, index, side="right"))
        return k, int(index - (ends[k - 1] if k else 0))


def radiometry_of(radiometry: str | Mapping[str, Any]) -> Radiometry:
    """Look up a radiometry by its name, or read a manifest's `sar`."""
    if isinstance(radiometry, str):
        if radiometry not in NAMED:
            raise BadInput("radiometry", radiometry, " | ".join(NAMED))
        return NAMED[radiometry]
    return Radiometry.of(radiometry)


def _colours(given: Mapping[str, Sequence[float]] | None) -> NDArray[np.float32] | None:
    """Read the gain and the offset of red, green and blue, (2, 3)."""
    if given is None:
        return None
    allowed = "{ gain = [r, g, b], offset = [r, g, b] }: numbers, in levels of 0 to 255"
    try:
        found = np.array([given["gain"], given.get("offset", (0, 0, 0))], np.float32)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise BadInput("colours", given, allowed) from None
    if found.shape != (2, 3) or not np.isfinite(found).all() or set(given) - {"gain", "offset"}:
        raise BadInput("colours", given, allowed)
    return found


def varied(
    backscatter: Mapping[str, NDArray[np.floating]],
    calibrated: bool,
    anchors: Mapping[str, NDArray[np.floating]],
    rng: np.random.Generator,
) -> tuple[dict[str, NDArray[np.floating]], NDArray[np.bool_]]:
    """Make backscatter (n,S,S) in dB by band look like that of other scenes, and tell what is shown as absolute.

    Contrasts are stretched about the crop's median, speckle of random strength is added, then all of `simulated`.
    A share of crops is shown as the kind that they are not, so that neither kind of levels stands for the ground that
    its sources happen to show: calibrated ones by `anchors`, the dB (n,) by band that put their scene's white where
    digital numbers have it; others as they are, for their white is put where Sentinel-1's mean over land then is.
    """
    (n, *_) = shape = next(iter(backscatter.values())).shape
    other = rng.random((n, 1, 1)) < OTHERWISE
    slope, strength = rng.uniform(1 - SLOPE, 1 + SLOPE, (n, 1, 1)), rng.uniform(0, NOISE_DB / SPECKLE_DB, (n, 1, 1))
    gain = np.where(other | (not calibrated), GAIN_DB, CALIBRATED_GAIN_DB)
    bands = {}
    for band, values in backscatter.items():
        middle = np.nanmedian(values[:, ::4, ::4], (1, 2), keepdims=True)  # a sixteenth of the pixels tells it
        values = middle + slope * (values - middle) + strength * _speckle(shape, rng)
        bands[band] = values + np.where(other, anchors[band][:, None, None], 0) if band in anchors else values
    return simulated(bands, rng, gain), other != calibrated


def simulated(
    backscatter: Mapping[str, NDArray[np.floating]],
    rng: np.random.Generator,
    gain_db: float | NDArray[np.floating] = GAIN_DB,
) -> dict[str, NDArray[np.floating]]:
    """Simulate a calibrated raster's backscatter from pairs of one polarisation or two, each (n,S,S) in dB.

    Levels shift by a random gain, for the pairs' own are not calibrated. Where there is one polarisation, the other is
    made of it: further off by a random ratio, with noise of its own. It lets one model take VV, VH or both; it cannot
    teach what the true ratio tells (volume against surface). Then, at random, one of the two is left out (NaN).
    """
    (n, *_), bands = (shape := next(iter(backscatter.values())).shape), dict(backscatter)
    drawn = rng.random((n, 1, 1))
    real = next(iter(backscatter))
    if len(bands) == 1:
        other = POLARISATIONS[1 - POLARISATIONS.index(real)]
        ratio = RATIO_DB if other == "VV" else -RATIO_DB
        bands[other] = bands[real] + rng.normal(ratio, RATIO_SPREAD_DB, (n, 1, 1)) + _speckle(shape, rng)
        without = {other: drawn < 0.4, real: drawn > 0.75}
    else:
        without = {"VV": drawn < 0.25, "VH": drawn > 0.75}
    gain = rng.normal(0, 1, (n, 1, 1)) * gain_db
    return {band: np.where(without[band], np.nan, values + gain) for band, values in bands.items()}


def _speckle(shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.floating]:
    """Draw noise in dB, correlated over two pixels, for Sentinel-1's 20 m are sampled every 10 m."""
    white = rng.normal(0, SPECKLE_DB, shape)
    pairs = (white + np.roll(white, 1, -1)) / np.sqrt(2)
    return (pairs + np.roll(pairs, 1, -2)) / np.sqrt(2)


def _first_unclear(sampled: Mapping[Path, Mapping[str, NDArray[Any]]]) -> Path:
    """Find the first raster whose units its own values do not tell, or that has other units than the ones before."""
    units = set()
    for file, samples in sampled.items():
        try:
            units.add(decide_units(samples)[0])
        except BadInput:
            return file
        if len(units) > 1:
            return file
    return next(iter(sampled))


def _holes(crops: NDArray[Any]) -> NDArray[np.floating]:
    """Measure the share (n,) of pixels without SAR or without optical."""
    if crops.dtype == np.uint8:
        return np.zeros(len(crops))
    return np.isnan(crops).any(-1).mean((1, 2))


def _read_pair(pair: Pair, size: int) -> NDArray[Any]:
    sar, optical = _read_sar(pair.sar), np.asarray(read_image(pair.optical).convert("RGB"))
    _check_sizes(pair, sar, optical, size)
    return np.concatenate([sar, optical], axis=2)


def _check_sizes(pair: Pair, sar: NDArray[Any], optical: NDArray[Any], size: int) -> None:
    if sar.shape[:2] != optical.shape[:2]:
        given = f"{sar.shape[1]}x{sar.shape[0]} px beside {optical.shape[1]}x{optical.shape[0]} px in {pair.optical}"
        raise BadInput(str(pair.sar), given, "SAR and optical of the same size")
    if min(sar.shape[:2]) < size:
        raise BadInput(str(pair.sar), f"{sar.shape[1]}x{sar.shape[0]} px", f"at least the crop size, {size} px")


def _read_sar(path: Path) -> Pixels:
    """Read a grey picture (H,W,1). BadInput for one in colour, most often the optical one in the wrong folder."""
    image = read_image(path)
    if image.mode == "L":
        return np.asarray(image)[:, :, None]
    rgb = np.asarray(image.convert("RGB"))
    if int((rgb.max(axis=2) - rgb.min(axis=2)).max()) > _GREY:
        raise BadInput(str(path), "an image in colour", "SAR as one channel, or as three equal channels")
    return rgb[:, :, 1:2]


def _deep_grey(path: Path) -> NDArray[np.float32] | None:
    """Read a grey picture of 16 bits (H,W), 0 to 1; None for any other."""
    with contextlib.suppress(*UNREADABLE), Image.open(path) as image:
        deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")  # older Pillow's name
        if deep and min(image.size) >= SMALLEST:
            return np.asarray(image).astype(np.float32) / np.float32(65535)
    return None


def read_sar(path: str | Path, seen: Radiometry | None = None, bands: str | None = None) -> Tensor:
    """Read one SAR picture as a model takes it, (1, C, H, W) in [-1, 1].

    Args:
        seen: how the model takes backscatter; amplitudes if left out.
        bands: the polarisation, where the file's name does not say it: see `Radiometry.band_of_picture`.

    Raises:
        BadInput: a missing, unreadable or coloured file, float or 32-bit pixels; a polarisation that nothing says.
    """
    file, seen = Path(path), seen or Radiometry()
    if not file.is_file():
        raise BadInput("sar", str(path), "an existing picture file")
    deep = _deep_grey(file)
    grey = (to_tensor(_read_sar(file)[None])[0, 0].numpy() + 1) / 2 if deep is None else deep
    return torch.from_numpy(seen.from_picture(grey, seen.band_of_picture(bands, file.name)))[None]
