"""A whole georeferenced scene through a translator, in constant memory: read by rows, tile, draw, blend, write beside, rename.

A scene is cut into tiles that overlap by a quarter or more. Tiles agree where they overlap because the noise belongs to
the ground, not to the tile (`NoiseField`); what differs still is blended by raised cosines that add up to one. So the
result depends on the seed and the place alone, not on how many tiles are drawn at a time. rasterio does the files.

It knows rasters and one generator; units and bands are decided in `radiometry.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from itertools import count
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distillers import radiometry
from distillers.errors import BadInput
from distillers.generator import MAX_SEED, Generator
from distillers.radiometry import UNITS, Radiometry

TILE = 256  # px a side, unless a model or a scene is smaller
MAX_PIXELS = 1 << 33  # of a scene: twenty of Sentinel-1's largest; beyond, a header lies
MAX_SAMPLES = 64
SAMPLED_WINDOWS = 64  # windows of TILE px that units and white are decided by
QUANTILES = (0.05, 0.95)
SCALE = 1 / 256  # of the uncertainty bands: 16-bit numbers hold levels of 0 to 255 in steps of 1/256
HOLE = 65535  # no data in the uncertainty bands
COLLAPSED = 1.0  # levels of 255: below this mean deviation N samples are one
GROUND_M = (5.0, 20.0)  # pixel sizes that models of 10 m can be trusted with
WARNING = (
    "Colours are inferred, not measured; objects may be invented or missing. Not for measurement, targeting or damage "
    "claims."
)
COG = {
    "driver": "COG", "compress": "deflate", "predictor": "yes", "level": "6", "blocksize": "512",
    "overview_resampling": "average", "bigtiff": "if_safer", "num_threads": "all_cpus",
}  # fmt: skip

Progress = Callable[[int, int], None]  # pixels done, of how many


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a scene is translated. `None` leaves the choice to the model or the raster; sizes are pixels.

    bands, units: see `radiometry.name_bands`, `decide_units`. nodata: a number that means no data, beside NaN and what
    the file says. samples: more than 1 also gives mean, deviation and quantiles over seeds seed, seed + 1, ...
    tile, overlap: multiples of the model's `size_multiple`; overlap is a quarter to a half of a tile. batch: tiles at a
    time; threads on a CPU, where single tiles on each core are fastest.
    """

    steps: int | None = None
    seed: int = 0
    samples: int = 1
    units: str = "auto"
    bands: str | None = None
    nodata: float | None = None
    tile: int | None = None
    overlap: int | None = None
    batch: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.seed <= MAX_SEED - MAX_SAMPLES:
            raise BadInput("seed", self.seed, f"0 to {MAX_SEED - MAX_SAMPLES}")
        if not 1 <= self.samples <= MAX_SAMPLES:
            raise BadInput("samples", self.samples, f"1 to {MAX_SAMPLES}")
        if self.units not in ("auto", *UNITS):
            raise BadInput("units", self.units, " | ".join(("auto", *UNITS)))
        if self.batch is not None and self.batch < 1:
            raise BadInput("batch", self.batch, "1 or more")


# --- the ground's noise ----------------------------------------------------------------------------------------------
class NoiseField:
    """Unit Gaussian noise over an endless plane; each value is a function of (seed, step, place) alone.

    The plane is made of blocks, each from its own Philox stream (Salmon et al. 2011): key = (seed, step), counter =
    (row, column). A crop of it is what a tile starts from, so neighbours start from the same noise where they overlap.
    """

    BLOCK = 64  # positions a side

    def __init__(self, channels: int, kept: int = 256) -> None:
        self.channels, self._kept = channels, kept
        self._blocks: OrderedDict[tuple[int, int, int, int], NDArray[np.float32]] = OrderedDict()

    def crop(self, seed: int, step: int, top: int, left: int, height: int, width: int) -> NDArray[np.float32]:
        """(channels, height, width) float32 at a place in the network's positions, 0 or more."""
        b = self.BLOCK
        out = np.empty((self.channels, height, width), dtype=np.float32)
        for row in range(top // b, ceil((top + height) / b)):
            for column in range(left // b, ceil((left + width) / b)):
                y0, y1 = max(top, row * b), min(top + height, (row + 1) * b)
                x0, x1 = max(left, column * b), min(left + width, (column + 1) * b)
                block = self._block(seed, step, row, column)
                out[:, y0 - top : y1 - top, x0 - left : x1 - left] = block[
                    :, y0 - row * b : y1 - row * b, x0 - column * b : x1 - column * b
                ]
        return out

    def _block(self, *place: int) -> NDArray[np.float32]:
        """Kept for the neighbours; two threads may make the same one, which is the same."""
        block = self._blocks.get(place)
        if block is None:
            seed, step, row, column = place
            bits = np.random.Philox(key=np.array([seed, step], np.uint64), counter=[0, 0, row, column])
            shape = (self.channels, self.BLOCK, self.BLOCK)
            block = self._blocks[place] = np.random.Generator(bits).standard_normal(shape, dtype=np.float32)
            with suppress(KeyError):  # another thread was first
                while len(self._blocks) > self._kept:
                    self._blocks.popitem(last=False)
        return block


# --- the tiles -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Axis:
    """One side of a scene cut into tiles: they start at multiples of `stride`, the last may reach beyond the scene."""

    length: int
    tile: int
    overlap: int

    @property
    def stride(self) -> int:
        return self.tile - self.overlap

    @property
    def count(self) -> int:
        return 1 + max(0, ceil((self.length - self.tile) / self.stride))

    def weight(self, index: int) -> NDArray[np.float32]:
        """(tile,): raised cosines where a neighbour overlaps, 1 elsewhere; the weights of all tiles add up to 1."""
        weight = np.ones(self.tile)
        ramp = 0.5 - 0.5 * np.cos(np.pi * (np.arange(self.overlap) + 0.5) / self.overlap)
        if index > 0:
            weight[: self.overlap] = ramp
        if index < self.count - 1:
            weight[-self.overlap :] = ramp[::-1]
        return weight.astype(np.float32)


def axis(length: int, options: Options, generator: Generator) -> Axis:
    """The tiles of one side. BadInput for a tile or an overlap that does not fit the model."""
    multiple = generator.size_multiple
    tile = options.tile or max(TILE // multiple, 1) * multiple
    overlap = ceil(tile / 4 / multiple) * multiple if options.overlap is None else options.overlap
    if tile % multiple or tile < 2 * multiple:
        raise BadInput("tile", tile, f"a multiple of {multiple}, {2 * multiple} or more")
    if overlap % multiple or not tile / 4 <= overlap <= tile / 2:
        raise BadInput("overlap", overlap, f"a multiple of {multiple}, a quarter to a half of the tile ({tile})")
    whole = ceil(length / multiple) * multiple
    return Axis(length, tile, overlap) if whole > tile else Axis(length, whole, 0)


# --- reading ---------------------------------------------------------------------------------------------------------
class Source:
    """An open raster of backscatter: which bands, in which units, where there are data. One thread at a time.

    Raises:
        BadInput: not a readable raster, complex, without bands, in range geometry, all nodata, bands or units unclear.
    """

    def __init__(self, path: Path, options: Options, seen: Radiometry) -> None:
        rasterio = _rasterio()
        if not path.is_file():
            raise BadInput("scene", str(path), "an existing file")
        try:
            self.raster = rasterio.open(path)
        except rasterio.errors.RasterioError as error:
            raise BadInput("scene", path.name, f"a raster that opens, such as a whole GeoTIFF ({error})") from None
        self.path, self.radiometry, self.notes = path, seen, list[str]()
        self.own_nodata = options.nodata
        try:
            self._check(rasterio)
            self.bands, self.bands_how = self._bands(options.bands)
            self.kind = np.dtype(self.raster.dtypes[next(iter(self.bands.values())) - 1])
            samples = self._sample()
            self.units, self.units_why = self._units(options.units, samples)
            self.shift = {band: 0.0 for band in self.bands}
            if seen.anchored(self.units):
                self.shift = {
                    band: seen.level(band) - radiometry.white_of(values, self.units) for band, values in samples.items()
                }
        except BaseException:
            self.raster.close()
            raise

    @property
    def shape(self) -> tuple[int, int]:
        return self.raster.height, self.raster.width

    @property
    def georeferenced(self) -> bool:
        return self.raster.crs is not None or not self.raster.transform.is_identity

    def _check(self, rasterio: Any) -> None:
        r = self.raster
        if r.count == 0 or not r.height or not r.width:
            inside = f"; it holds {', '.join(r.subdatasets[:4])}" if r.subdatasets else ""
            raise BadInput("scene", f"{self.path.name}: {r.count} bands", f"a raster with bands{inside}")
        if r.height * r.width > MAX_PIXELS:
            raise BadInput("scene", f"{r.width}x{r.height} pixels", f"{MAX_PIXELS} pixels together")
        if min(r.height, r.width) < 8:
            raise BadInput("scene", f"{r.width}x{r.height} pixels", "at least 8 pixels on each side")
        if any(np.dtype(kind).kind == "c" for kind in r.dtypes):
            raise BadInput(
                "scene", f"complex values ({r.dtypes[0]}), as single-look complex products have",
                "detected backscatter: multi-look and terrain-correct first (SNAP, pyroSAR, sarsen)",
            )  # fmt: skip
        if r.crs is None and r.transform.is_identity and (r.gcps[0] or r.rpcs):
            raise BadInput(
                "scene", "range geometry: ground control points but no map grid, as GRD products come",
                "a terrain-corrected raster: make one first (SNAP, pyroSAR, sarsen, or an RTC product)",
            )  # fmt: skip
        if not self.georeferenced:
            self.notes.append("The scene has no georeference; the result has none either.")
        self._check_ground()

    def _check_ground(self) -> None:
        """Notes about pixels of another size or shape than the models have seen."""
        x, y = _metres(self.raster)
        if x is None or y is None:
            return
        low, high = GROUND_M
        if not (low <= x <= high and low <= y <= high):
            self.notes.append(f"Pixels are {x:.3g} x {y:.3g} m; the models have learnt from 10 m: resample for sense.")
        elif max(x, y) > 1.5 * min(x, y):
            self.notes.append(f"Pixels are not square ({x:.3g} x {y:.3g} m); the models have learnt from square ones.")

    def _bands(self, wanted: str | None) -> tuple[dict[str, int], str]:
        r = self.raster
        found, how = radiometry.name_bands(wanted, r.descriptions, self.path.stem)
        if len({r.dtypes[i - 1] for i in found.values()}) > 1:
            raise BadInput("bands", found, "bands of one data type")
        if self.radiometry.form == "amplitude" and len(found) > 1:
            kept = next((b for b in ("VH", *self.radiometry.bands) if b in found), next(iter(found)))
            found, how = {kept: found[kept]}, f"{how}; the model takes one band"
        if "assumed" in how:
            self.notes.append(f"Polarisation {how}; --bands says otherwise.")
        return found, how

    def _sample(self) -> dict[str, NDArray[Any]]:
        """Valid values by band, from windows spread over the scene, or from all of it where those hold none."""
        from rasterio.windows import Window

        height, width = self.shape
        side = min(TILE, height, width)
        n = int(SAMPLED_WINDOWS**0.5)
        tops, lefts = (np.unique(np.linspace(0, length - side, n).astype(int)) for length in (height, width))
        few = [Window(left, top, side, side) for top in tops for left in lefts]
        every = (Window(0, top, width, min(side, height - top)) for top in range(0, height, side))
        for windows, enough in ((few, 1000), (every, 1)):
            found: dict[str, list[NDArray[Any]]] = {band: [] for band in self.bands}
            valid_pixels = 0
            for window in windows:
                values, valid = self._read(window)
                for band, numbers in zip(self.bands, values, strict=True):
                    found[band].append(numbers[valid])
                valid_pixels += int(valid.sum())
                if windows is not few and valid_pixels > 1 << 22:
                    break
            if valid_pixels >= enough:
                return {band: np.concatenate(parts) for band, parts in found.items()}
        raise BadInput("scene", "no pixel with data", "a raster with valid pixels in the bands asked for")

    def _units(self, wanted: str, samples: dict[str, NDArray[Any]]) -> tuple[str, str]:
        if wanted == "auto":
            return radiometry.decide_units(samples)
        for band, values in samples.items():
            low, high = float(values.min()), float(values.max())
            wrong = (low < radiometry.LOWEST_DB or high > radiometry.HIGHEST_DB) if wanted == "db" else high <= 0
            if wrong:
                given = f"{wanted}, of values from {low:.4g} to {high:.4g} in {band}"
                raise BadInput("units", given, "db: values from -80 to 50; linear, amplitude, dn: some above 0")
        return wanted, "as asked for"

    def _read(self, window: Any) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """((bands, h, w) in the raster's numbers, scaled if the file says so; (h, w) valid in all bands)."""
        rasterio, indexes = _rasterio(), list(self.bands.values())
        try:
            values = self.raster.read(indexes, window=window)
            valid = (self.raster.read_masks(indexes, window=window) > 0).all(0)
        except rasterio.errors.RasterioError as error:
            top = int(window.row_off)
            raise BadInput(
                "scene", f"{self.path.name}: rows {top} to {top + int(window.height)} cannot be read",
                f"a whole file; this one breaks off or is damaged ({error.__cause__ or error})",
            ) from None  # fmt: skip
        for k, index in enumerate(indexes):
            scale, offset = self.raster.scales[index - 1], self.raster.offsets[index - 1]
            if (scale, offset) != (1, 0):
                values = values.astype(np.float64) if k == 0 else values
                values[k] = values[k] * scale + offset
        if values.dtype.kind == "f":
            valid &= np.isfinite(values).all(0)
        if self.own_nodata is not None:
            valid &= (values != self.own_nodata).all(0)
        return values, valid

    def rows(self, top: int, height: int, below: int, right: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Rows from `top` as the model sees them, (channels, height + below, W + right) and valid (..): what lies beyond
        the scene is reflected. Invalid pixels hold whatever they hold."""
        from rasterio.windows import Window

        values, valid = self._read(Window(0, top, self.raster.width, height))
        heard = {
            band: radiometry.decibels(numbers, self.units) + np.float32(self.shift[band])
            for band, numbers in zip(self.bands, values, strict=True)
        }
        pad = ((0, below), (0, right))
        return np.pad(self.radiometry.unit(heard), ((0, 0), *pad), mode="reflect"), np.pad(valid, pad, mode="reflect")


def _metres(raster: Any) -> tuple[float | None, float | None]:
    """Pixel width and height in metres, as far as the CRS says."""
    t, crs = raster.transform, raster.crs
    if crs is None:
        return None, None
    x, y = float(np.hypot(t.a, t.d)), float(np.hypot(t.b, t.e))
    if crs.is_geographic:  # degrees of the equator's 111 km, narrower away from it
        latitude = np.clip((t @ (raster.width / 2, raster.height / 2))[1], -89, 89)
        return x * 111_320 * float(np.cos(np.radians(latitude))), y * 110_574
    try:
        factor = float(crs.linear_units_factor[1])
    except Exception:  # a CRS without units, as local engineering grids are
        return None, None
    if crs.to_epsg() in (3395, 3857):  # Mercator's metres shrink with latitude
        radius = 6_378_137.0
        y_middle = (t @ (raster.width / 2, raster.height / 2))[1]
        factor /= float(np.cosh(y_middle / radius))
    return x * factor, y * factor


# --- the work --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Job:
    """One tile of one sample."""

    sample: int
    row: int
    column: int
    sar: NDArray[np.float32]  # (channels, tile, tile), no holes
    last: bool  # of its row and sample


@dataclass
class Facts:
    """What was done, for the log, the tags, the sidecar and the headers."""

    model: str
    model_sha256: str
    steps: int
    seed: int
    samples: int
    units: str
    units_why: str
    bands: dict[str, int]
    bands_how: str
    sar: dict[str, Any]
    white_shift_db: dict[str, float]
    tile: tuple[int, int]
    overlap: tuple[int, int]
    width: int = 0
    height: int = 0
    tiles: int = 0
    skipped: int = 0
    valid_share: float = 0.0
    mean_deviation: float | None = None  # of N samples, levels of 255
    seconds: float = 0.0
    megapixels_per_second: float = 0.0
    version: str = ""
    warnings: list[str] = field(default_factory=list)

    def tags(self) -> dict[str, str]:
        """What the file says of itself: nothing of when or how fast, so that equal work gives equal bytes."""
        return {
            "FEWSTEP_SYNTHETIC": "yes",
            "FEWSTEP_WARNING": WARNING,
            "FEWSTEP_MODEL": self.model,
            "FEWSTEP_MODEL_SHA256": self.model_sha256,
            "FEWSTEP_STEPS": str(self.steps),
            "FEWSTEP_SEED": str(self.seed),
            "FEWSTEP_SAMPLES": str(self.samples),
            "FEWSTEP_UNITS": f"{self.units} ({self.units_why})",
            "FEWSTEP_BANDS": ", ".join(f"{band} = band {i}" for band, i in self.bands.items()) + f" ({self.bands_how})",
            "FEWSTEP_SAR": json.dumps(self.sar),
            "FEWSTEP_VERSION": self.version,
        }


def translate(
    generator: Generator,
    scene: str | Path,
    out: str | Path,
    options: Options | None = None,
    *,
    stac: bool = False,
    progress: Progress | None = None,
    forward: Callable[[Callable[[], Tensor]], Tensor] | None = None,
) -> Facts:
    """Translate a raster of backscatter into a Cloud-Optimised GeoTIFF of red, green and blue (uint8, 0 = no data).

    CRS and transform are those of the scene, bit for bit. With `options.samples` > 1 the file holds the first sample,
    and `uncertainty_path(out)` mean, standard deviation and quantiles over all, in levels of 0 to 255. Files are
    written beside and renamed when whole: whatever goes wrong, a name that is there is a whole file.

    Args:
        progress: called with pixels done and pixels in all; what it raises ends the work.
        forward: runs a call of the network, for a server that has a thread for it; by default it is just called.
        stac: write a STAC item beside, `out` with .json.

    Raises:
        BadInput: what `Source` refuses, an output that is the input or cannot be written, a model of another task.
    """
    options, scene, out = options or Options(), Path(scene), Path(out)
    if generator.info.task != "sar-to-optical":
        raise BadInput("model", generator.info.name, "a model of sar-to-optical")
    steps = len(generator.times(options.steps))
    _check_output(scene, out)
    started = time.perf_counter()
    rasterio = _rasterio()
    seen = Radiometry.of(generator.info.sar)
    # The cache holds a row of blocks; without a limit GDAL takes a twentieth of the machine's memory.
    with rasterio.Env(GDAL_CACHEMAX=128, GDAL_PAM_ENABLED=False), ExitStack() as stack:
        source = Source(scene, options, seen)
        stack.callback(source.raster.close)
        height, width = source.shape
        down, across = axis(height, options, generator), axis(width, options, generator)
        facts = Facts(
            model=generator.info.name, model_sha256=model_hash(generator), steps=steps, seed=options.seed,
            samples=options.samples, units=source.units, units_why=source.units_why, bands=source.bands,
            bands_how=source.bands_how, sar=seen.to_dict(), white_shift_db=source.shift,
            tile=(down.tile, across.tile), overlap=(down.overlap, across.overlap), width=width, height=height,
            version=_version(), warnings=[WARNING, *source.notes],
        )  # fmt: skip
        try:
            product = stack.enter_context(_product(source, out, facts, 3, "uint8", 0, _RGB))
            spread = None
            if options.samples > 1:
                target, names = uncertainty_path(out), [f"{what} {c}" for what in _STATISTICS for c in _RGB]
                spread = stack.enter_context(
                    _product(source, target, facts, len(names), "uint16", HOLE, names, scale=SCALE)
                )
            _draw(generator, source, down, across, options, steps, facts, product, spread, progress, forward)
        except (rasterio.errors.RasterioError, OSError) as error:
            raise BadInput("out", str(out), f"a place with room that can be written ({error})") from None
        facts.seconds = time.perf_counter() - started
    facts.seconds = time.perf_counter() - started
    facts.megapixels_per_second = height * width / facts.seconds / 1e6
    if facts.mean_deviation is not None and facts.mean_deviation < COLLAPSED:
        facts.warnings.append(
            f"The student has collapsed to a point: {options.samples} samples differ by {facts.mean_deviation:.2f} "
            "levels of 255 on average. Their deviation says nothing about the error."
        )
    if stac:
        _stac_item(out, scene, facts)
    return facts


_RGB = ["red", "green", "blue"]
_STATISTICS = ["mean", "standard deviation", *(f"{100 * q:g} % quantile" for q in QUANTILES)]


def uncertainty_path(out: str | Path) -> Path:
    """Where the statistics over samples of a scene go."""
    return Path(out).with_suffix(".uncertainty.tif")


def _draw(
    generator: Generator, source: Source, down: Axis, across: Axis, options: Options, steps: int, facts: Facts,
    product: Any, spread: Any, progress: Progress | None, forward: Callable[[Callable[[], Tensor]], Tensor] | None,
) -> None:  # fmt: skip
    """Rows of tiles, from reading to writing; each stage in its own threads, each file in one."""
    height, width = source.shape
    device = next(generator.parameters()).device
    lanes, together = (1, options.batch or 16) if device.type == "cuda" else (options.batch or _cores(), 1)
    noise = NoiseField(generator.codec.channels(3))
    strips: dict[int, NDArray[np.bool_]] = {}  # valid pixels of the rows of tiles at work

    def draw(jobs: list[Job]) -> NDArray[np.float32]:
        pictures = (forward or _call)(lambda: _tiles(generator, jobs, steps, options.seed, noise, down, across))
        return pictures.float().clamp(-1, 1).cpu().numpy()

    with (
        ThreadPoolExecutor(1, "fewstep-read") as reader,
        ThreadPoolExecutor(lanes, "fewstep-tile", initializer=_one_thread if device.type == "cpu" else None) as pool,
        ThreadPoolExecutor(1, "fewstep-write") as writer,
    ):
        written: deque[Future[None]] = deque()
        canvas = np.zeros((3, down.tile, _covered(across)), dtype=np.float32)
        carried = [np.zeros((3, down.overlap, width), dtype=np.float32) for _ in range(options.samples)]
        finished: list[NDArray[np.uint8]] = []
        deviations, pixels, done = 0.0, 0, 0
        try:
            jobs = _jobs(source, down, across, options.samples, reader, strips, facts)
            for group, pictures in _ahead(pool, draw, _grouped(jobs, together), lanes + 2):
                for job, picture in zip(group, pictures, strict=True):
                    if job.sar.size:
                        left = job.column * across.stride
                        weight = down.weight(job.row)[:, None] * across.weight(job.column)
                        canvas[:, :, left : left + across.tile] += weight * picture
                    if not job.last:
                        continue
                    # This sample's row of tiles is whole: what no later row reaches is finished.
                    body = canvas[:, :, :width]
                    body[:, : down.overlap] += carried[job.sample]
                    end = down.stride if job.row < down.count - 1 else height - job.row * down.stride
                    finished.append(_levels(body[:, :end]))
                    carried[job.sample] = body[:, down.stride :][:, : down.overlap].copy()
                    canvas[:] = 0
                    if job.sample < options.samples - 1:
                        continue
                    valid, top = strips.pop(job.row)[:end, :width], job.row * down.stride
                    while len(written) > 1:
                        written.popleft().result()
                    first = finished[0]
                    written.append(writer.submit(_write_colours, product, first, valid, top))
                    if spread is not None:
                        statistics, total = _statistics(finished, valid)
                        deviations += total
                        written.append(writer.submit(_write, spread, statistics, top))
                    finished, pixels, done = [], pixels + int(valid.sum()), done + end * width
                    if progress is not None:
                        progress(done, height * width)
            while written:
                written.popleft().result()
        except BaseException:
            for pool_ in (pool, reader, writer):  # Ctrl-C must not wait for what nobody wants any more
                pool_.shutdown(wait=True, cancel_futures=True)
            raise
    facts.valid_share = pixels / (height * width)
    if spread is not None:
        facts.mean_deviation = deviations / max(pixels, 1)


def _jobs(
    source: Source, down: Axis, across: Axis, samples: int, reader: Executor, strips: dict[int, NDArray[np.bool_]],
    facts: Facts,
) -> Iterator[Job]:  # fmt: skip
    """The tiles in order: row by row, in a row sample by sample; the next row is read while this one is drawn.

    A tile without data is no work for the network; it comes through empty where it ends a row.
    """
    height, width = source.shape
    right = _covered(across) - width

    def read(row: int) -> Future[tuple[NDArray[np.float32], NDArray[np.bool_]]]:
        top = row * down.stride
        rows = min(down.tile, height - top)
        return reader.submit(source.rows, top, rows, down.tile - rows, right)

    coming = read(0)
    for row in range(down.count):
        sar, valid = coming.result()
        if row + 1 < down.count:
            coming = read(row + 1)
        strips[row] = valid
        columns = range(across.count)
        cuts = [np.s_[..., c * across.stride : c * across.stride + across.tile] for c in columns]
        tiles = [_filled(sar[cut], valid[cut]) for cut in cuts]
        for sample in range(samples):
            for column in columns:
                empty = not tiles[column].size
                facts.tiles += not empty
                facts.skipped += empty
                if not empty or column == across.count - 1:
                    yield Job(sample, row, column, tiles[column], column == across.count - 1)


def _covered(side: Axis) -> int:
    """Pixels from the first tile's start to the last one's end."""
    return (side.count - 1) * side.stride + side.tile


def _filled(sar: NDArray[np.float32], valid: NDArray[np.bool_]) -> NDArray[np.float32]:
    """The tile with each hole filled from its nearest valid pixel; empty if there is none."""
    if valid.all():
        return sar.copy()
    if not valid.any():
        return np.empty((len(sar), 0, 0), dtype=np.float32)
    from scipy.ndimage import distance_transform_edt

    nearest = distance_transform_edt(~valid, return_distances=False, return_indices=True)
    return sar[:, nearest[0], nearest[1]]


def _tiles(
    generator: Generator, jobs: list[Job], steps: int, seed: int, noise: NoiseField, down: Axis, across: Axis
) -> Tensor:
    """Pixels (B, 3, tile, tile) of tiles; their noise is the ground's. An empty tile among them comes as zeros."""
    work = [job for job in jobs if job.sar.size]
    out = torch.zeros(len(jobs), 3, down.tile, across.tile)
    if not work:
        return out
    device, factor = next(generator.parameters()).device, generator.codec.factor

    def field_at(step: int) -> Tensor:
        crops = [
            noise.crop(
                seed + job.sample, step, job.row * down.stride // factor, job.column * across.stride // factor,
                down.tile // factor, across.tile // factor,
            )
            for job in work
        ]  # fmt: skip
        return torch.from_numpy(np.stack(crops)).to(device)

    with torch.inference_mode():
        cond = generator.encode_condition(sar=torch.from_numpy(np.stack([job.sar for job in work])))
        x0 = generator(field_at(0), cond, steps, (field_at(step) for step in count(1)))
        out[[i for i, job in enumerate(jobs) if job.sar.size]] = generator.codec.decode(x0).float().cpu()
    return out


def _grouped(jobs: Iterable[Job], size: int) -> Iterator[list[Job]]:
    group: list[Job] = []
    for job in jobs:
        group.append(job)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _ahead(
    pool: Executor, function: Callable[[list[Job]], NDArray[np.float32]], groups: Iterable[list[Job]], depth: int
) -> Iterator[tuple[list[Job], NDArray[np.float32]]]:
    """(group, function(group)) in order, `depth` groups at work or waiting."""
    waiting: deque[tuple[list[Job], Future[NDArray[np.float32]]]] = deque()
    for group in groups:
        waiting.append((group, pool.submit(function, group)))
        if len(waiting) > depth:
            first, future = waiting.popleft()
            yield first, future.result()
    while waiting:
        first, future = waiting.popleft()
        yield first, future.result()


def _call(function: Callable[[], Tensor]) -> Tensor:
    return function()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _one_thread() -> None:
    """Single tiles on every core, one thread each: faster than all cores on one tile, and torch's sums then have one
    order, however many tiles are drawn at a time."""
    torch.set_num_threads(1)


# --- writing ---------------------------------------------------------------------------------------------------------
def _levels(pixels: NDArray[np.float32]) -> NDArray[np.uint8]:
    """(3, h, W) in [-1, 1] to levels of 0 to 255."""
    return np.clip(np.rint((pixels + 1) * 127.5), 0, 255).astype(np.uint8)


def _write_colours(product: Any, colours: NDArray[np.uint8], valid: NDArray[np.bool_], top: int) -> None:
    """0 means no data, so the darkest level of valid pixels is 1."""
    _write(product, np.where(valid, np.maximum(colours, 1), 0).astype(np.uint8), top)


def _write(product: Any, bands: NDArray[Any], top: int) -> None:
    from rasterio.windows import Window

    product.write(bands, window=Window(0, top, bands.shape[2], bands.shape[1]))


def _statistics(samples: list[NDArray[np.uint8]], valid: NDArray[np.bool_]) -> tuple[NDArray[np.uint16], float]:
    """((bands, h, W) mean, deviation and quantiles in steps of SCALE, sum over pixels of the mean deviation)."""
    height, width = valid.shape
    out = np.empty((3 * len(_STATISTICS), height, width), dtype=np.uint16)
    total = 0.0
    for left in range(0, width, 1024):  # in parts, for memory
        part = np.s_[..., left : left + 1024]
        stack = np.stack([sample[part] for sample in samples]).astype(np.float32)
        deviation = stack.std(0, ddof=1)
        found = np.concatenate([stack.mean(0), deviation, *np.quantile(stack, QUANTILES, axis=0)])
        out[part] = np.where(valid[part], np.rint(found / SCALE), HOLE).astype(np.uint16)
        total += float(deviation.mean(0)[valid[part]].sum())
    return out, total


@contextmanager
def _product(
    source: Source, out: Path, facts: Facts, bands: int, kind: str, nodata: int, names: list[str], scale: float = 1.0
) -> Iterator[Any]:
    """A raster to write rows into; on leaving it becomes a COG under its name, or nothing stays."""
    import rasterio.shutil
    from rasterio.enums import ColorInterp

    raster = source.raster
    plain, whole = (out.with_name(f".{out.name}.{os.getpid()}.{part}.tif") for part in ("rows", "cog"))
    profile = {
        "driver": "GTiff", "width": raster.width, "height": raster.height, "count": bands, "dtype": kind,
        "nodata": nodata, "tiled": True, "blockxsize": 512, "blockysize": 64, "bigtiff": "if_safer",
        "interleave": "pixel" if bands == 3 else "band",
    }  # fmt: skip
    if source.georeferenced:
        profile |= {"crs": raster.crs, "transform": raster.transform}
    try:
        with rasterio.open(plain, "w", **profile) as rows:
            rows.descriptions = names
            if bands == 3:
                rows.colorinterp = [ColorInterp.red, ColorInterp.green, ColorInterp.blue]
            if scale != 1:
                rows.scales = [scale] * bands
            kept = {k: v for k, v in raster.tags().items() if k in ("AREA_OR_POINT", "TIFFTAG_DATETIME", "datetime")}
            rows.update_tags(**kept, **facts.tags())
            yield rows
        rasterio.shutil.copy(plain, whole, **COG)
        _check_whole(whole, raster.shape)
        os.replace(whole, out)
    finally:
        for path in (plain, whole):
            path.unlink(missing_ok=True)


def _check_whole(path: Path, shape: tuple[int, int]) -> None:
    """The last block of every overview reads: what GDAL could not write (a full disk) it may have kept to itself."""
    import rasterio
    from rasterio.windows import Window

    with rasterio.open(path) as written:
        height, width = shape
        written.read(window=Window(width - 1, height - 1, 1, 1))


def _check_output(scene: Path, out: Path) -> None:
    if out.suffix.lower() not in (".tif", ".tiff"):
        raise BadInput("out", str(out), "a name that ends in .tif")
    if out.exists() and scene.exists() and out.samefile(scene):
        raise BadInput("out", str(out), "another file than the scene itself")
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise BadInput("out", str(out), "a name in an existing folder that can be written")


def preview(raster: str | Path, side: int = 2048) -> NDArray[np.uint8]:
    """(h, w, 3) of a translated scene, at most `side` pixels a side, from its overviews; holes are 0."""
    rasterio = _rasterio()
    with rasterio.open(raster) as opened:
        shrink = max(1.0, max(opened.shape) / side)
        shape = (3, max(1, round(opened.height / shrink)), max(1, round(opened.width / shrink)))
        pixels: NDArray[np.uint8] = opened.read([1, 2, 3], out_shape=shape)
    return np.ascontiguousarray(pixels.transpose(1, 2, 0))


def _stac_item(out: Path, scene: Path, facts: Facts) -> None:
    """out.json: a STAC 1.0 item with projection and SAR fields, derived from the scene."""
    import rasterio
    from rasterio.warp import transform_bounds, transform_geom

    with rasterio.open(out) as raster:
        if raster.crs is None:
            raise BadInput("stac", scene.name, "a scene with a CRS: an item needs a place")
        corners = [
            raster.transform @ at
            for at in ((0, 0), (raster.width, 0), (raster.width, raster.height), (0, raster.height))
        ]
        ring = [list(map(float, corner)) for corner in [*corners, corners[0]]]
        geometry = transform_geom(raster.crs, "EPSG:4326", {"type": "Polygon", "coordinates": [ring]})
        xs, ys = [p[0] for p in ring], [p[1] for p in ring]
        box = transform_bounds(raster.crs, "EPSG:4326", min(xs), min(ys), max(xs), max(ys))
        taken = raster.tags().get("datetime")
        about = {
            "proj:epsg": raster.crs.to_epsg(),
            "proj:shape": list(raster.shape),
            "proj:transform": list(raster.transform),
        }
    now = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    when = f"{taken[:19]}Z" if taken else now
    item = {
        "type": "Feature", "stac_version": "1.0.0", "id": out.stem, "geometry": geometry, "bbox": list(box),
        "stac_extensions": [
            "https://stac-extensions.github.io/projection/v1.1.0/schema.json",
            "https://stac-extensions.github.io/sar/v1.0.0/schema.json",
        ],
        "properties": {
            "datetime": when, "created": now, "description": f"Synthetic optical picture from SAR. {WARNING}", **about,
            "sar:polarizations": list(facts.bands), "sar:instrument_mode": "IW", "sar:frequency_band": "C",
            "sar:product_type": "synthetic-optical",
            **{f"fewstep:{key}": getattr(facts, key) for key in ("model", "model_sha256", "steps", "seed", "samples", "units")},
        },
        "links": [{"rel": "derived_from", "href": scene.name, "type": "image/tiff; application=geotiff"}],
        "assets": {
            "visual": {
                "href": out.name, "roles": ["visual"],
                "type": "image/tiff; application=geotiff; profile=cloud-optimized",
            }
        },
    }  # fmt: skip
    beside = out.with_name(f".{out.name}.{os.getpid()}.json")
    beside.write_text(json.dumps(item, indent=2) + "\n")
    os.replace(beside, out.with_suffix(".json"))


def model_hash(generator: Generator) -> str:
    """One sha256 for all parts of the folder, as its manifest has them."""
    return hashlib.sha256(json.dumps(generator.info.sha256, sort_keys=True).encode()).hexdigest()


def _version() -> str:
    try:
        return metadata.version("fewstep")
    except metadata.PackageNotFoundError:
        return "unknown"


def _rasterio() -> Any:
    try:
        import rasterio
        import rasterio.errors
        import rasterio.shutil
    except ImportError:
        raise BadInput("scene", "a GeoTIFF, without rasterio", "pip install 'fewstep[raster]'") from None
    return rasterio
