"""Translation of a whole georeferenced scene in constant memory, tile by tile.

A scene is cut into tiles that overlap by a quarter or more. Tiles agree where they overlap because their noise belongs
to the ground (`NoiseField`); what still differs is blended by raised cosines that add up to one. So the result depends
on the seed and the place alone, not on how many tiles are sampled at a time.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distillers.errors import BadInput, check_file
from distillers.generator import Generator
from distillers.models.band import Band
from distillers.models.radiometry import Radiometry
from distillers.runtime import cpu_quota, package_versions, usable_cores
from distillers.sar.address import UNCERTAINTY, Scene, as_scene, is_address, network_options
from distillers.sar.beside import remove_older
from distillers.sar.options import WARNING, SceneFacts, SceneOptions
from distillers.sar.part import Part, find_part
from distillers.sar.raster import CACHE, Product, Source, check_output, import_rasterio, write_preview, writing
from distillers.sar.stac import NO_TIME, item_of, origin_of, write_item
from distillers.sar.tiles import Axis, NoiseField, Run, Tile, axis

QUANTILES = (0.05, 0.95)
COLOURS = ("red", "green", "blue")
BAND = ("90 % band, low", "90 % band, high")
STATISTICS = ("mean", "standard deviation", *(f"{100 * q:g} % quantile" for q in QUANTILES))
SCALE = 1 / 256  # of the statistics: 16-bit numbers hold levels of 0 to 255 in steps of 1/256
HOLE = 65535  # no data in them
RUN = 2048  # px, about: tiles side by side that are blended at a time; memory does not depend on a scene's width
COLLAPSED = 1.0  # levels of 255: below this mean deviation N samples are one

Progress = Callable[[int, int], None]  # pixels done, of how many
Forward = Callable[[Callable[[], Tensor]], Tensor]


def translate(
    generator: Generator,
    scene: Scene,
    out: str | Path,
    options: SceneOptions | None = None,
    *,
    stac: bool = False,
    preview: str | Path | None = None,
    progress: Progress | None = None,
    forward: Forward | None = None,
) -> SceneFacts:
    """Translate a raster of backscatter into a Cloud-Optimised GeoTIFF of red, green and blue (uint8, 0 = no data).

    CRS and transform are those of the scene, bit for bit. With `options.samples` > 1 the file holds the first sample,
    and `uncertainty_path(out)` mean, standard deviation and quantiles over all, in levels of 0 to 255. Files are
    written beside and renamed when whole: whatever goes wrong, a name that is there is a whole file.

    Args:
        scene: a file; a `str` may also be an address that GDAL reads, such as https://, s3:// or /vsizip/.
        progress: called with pixels done and pixels in all; what it raises ends the work.
        forward: runs a call of the network, for a server that has a thread for it; by default it is just called.
        stac: write a STAC item beside, `out` with .json.
        preview: a PNG to write, of the result at 2048 px at most.

    Raises:
        BadInput: what `Source` refuses, an output that is the input or cannot be written, a model of another task; for
            a STAC item a scene without a place.
    """
    options, scene, out = options or SceneOptions(), as_scene(scene), Path(out)
    info, item, picture = generator.info, out.with_suffix(".json"), Path(preview) if preview is not None else None
    if not generator.condition.paired:
        raise BadInput("model", info.name, "a model of sar-to-optical")
    steps = len(generator.times(options.steps))
    for target in (out, uncertainty_path(out))[: 1 + (options.samples > 1)]:
        check_output(scene, target)
    if stac:
        check_file(item, ".json")
    if picture is not None:
        check_file(picture, ".png", inputs=[] if is_address(scene) else [Path(scene)])
        if not picture.parent.is_dir():
            raise BadInput("preview", str(picture), "a name in an existing folder")
    started, seen = time.perf_counter(), Radiometry.of(info.sar)
    with ExitStack() as stack:
        # what .aux.xml says beside a file counts; at an address nothing is asked for that was not named
        remote = network_options() if is_address(scene) else {}
        stack.enter_context(import_rasterio().Env(GDAL_CACHEMAX=CACHE, **remote))
        source = Source(scene, seen, units=options.units, bands=options.bands, nodata=options.nodata)
        stack.callback(source.raster.close)
        stack.enter_context(import_rasterio().Env(GDAL_PAM_ENABLED=False))  # no .aux.xml beside what is written
        part = find_part(source.raster, options)
        origin = origin_of(source.raster, scene, part) if stac else None
        down, across = (
            axis(length, options, generator.size_multiple, start)
            for length, start in zip(source.shape, source.ground, strict=True)
        )
        facts = SceneFacts(
            model=info.name,
            model_sha256=generator.info.digest,
            steps=steps,
            seed=options.seed,
            samples=options.samples,
            units=source.units,
            units_why=source.units_why,
            bands=source.bands,
            bands_how=source.bands_how,
            sar=seen.to_dict(),
            white_shift_db=source.shift,
            width=part.width,
            height=part.height,
            tile=(down.tile, across.tile),
            overlap=(down.overlap, across.overlap),
            window=(part.left, part.top, part.width, part.height) if options.window or options.bbox else None,
            version=package_versions("fewstep").get("fewstep", "unknown"),
            warnings=[WARNING, *source.notes],
        )
        products = [Product(out, COLOURS, "uint8", 0)]
        if options.samples > 1:
            band = _fitted_band(generator, steps, facts)
            names = [f"{what} {colour}" for what in STATISTICS + BAND * (band is not None) for colour in COLOURS]
            products.append(Product(uncertainty_path(out), names, "uint16", HOLE, SCALE))
        with writing(source, products, facts.tags(), part) as rasters:
            work = _Work(generator, source, part, down, across, options, steps, facts, forward or _call)
            work.run(rasters, out.parent, progress)
    facts.seconds = time.perf_counter() - started
    facts.megapixels_per_second = part.height * part.width / facts.seconds / 1e6
    if source.lowest is not None:
        facts.warnings.append(
            f"Numbers such as {source.lowest:g}, too low for decibels, were taken for no data: --nodata says so."
        )
    if facts.mean_deviation is not None and facts.mean_deviation < COLLAPSED:
        facts.warnings.append(
            f"The student has collapsed to a point: {options.samples} samples differ by {facts.mean_deviation:.2f} "
            "levels of 255 on average. Their deviation says nothing about the error."
        )
    remove_older(out, (*(product.path for product in products), *([item] if stac else [])))
    if picture is not None:
        write_preview(out, picture)
    if origin is not None:
        if origin.time is None:
            facts.warnings.append(NO_TIME)
        write_item(item_of(origin, scene, out, _assets(products, picture), facts), item)
    return facts


def _assets(products: Sequence[Product], picture: Path | None) -> dict[str, dict[str, Any]]:
    """Describe every file that was written, as assets of a STAC item."""
    cog = "image/tiff; application=geotiff; profile=cloud-optimized"
    names = {"visual": "Synthetic optical picture", "uncertainty": "Statistics over samples, in levels of 0 to 255"}
    assets: dict[str, dict[str, Any]] = {}
    for (name, title), product in zip(names.items(), products, strict=False):
        bands = [{"name": band, "data_type": product.dtype, "nodata": product.nodata} for band in product.names]
        for band in bands:
            band |= {"raster:scale": product.scale, "raster:offset": 0}
        roles = [name] if name == "visual" else ["data"]
        assets[name] = {"href": product.path, "type": cog, "title": title, "roles": roles, "bands": bands}
    if picture is not None:
        assets["thumbnail"] = {"href": picture, "type": "image/png", "roles": ["thumbnail"]}
    return assets


def _fitted_band(generator: Generator, steps: int, facts: SceneFacts) -> Band | None:
    """Return the folder's band if it was fitted to samples drawn like these; else say in the facts what it needs."""
    band = generator.band
    if band is None:
        return None
    if (band.weights, band.steps, band.samples) == (facts.model_sha256, steps, facts.samples):
        facts.band = (
            f"held {100 * band.measured:.1f} % of truths on {band.n} tiles of {band.data}, {100 * band.worst:.1f} % in "
            "the worst part of them; not of every place, region or season"
        )
        return band
    own = "of these weights" if band.weights == facts.model_sha256 else "of other weights (fewstep evaluate fits one)"
    facts.warnings.append(
        f"No 90 % band is written: the folder's was fitted to {band.samples} samples of {band.steps} steps {own}."
    )
    return None


def uncertainty_path(out: str | Path) -> Path:
    """Return the path of the statistics over samples of a scene."""
    return Path(out).with_suffix(UNCERTAINTY)


@dataclass
class _Work:
    """The translation of one scene, with threads for each stage: one reads, several sample tiles, one writes.

    part: what is wanted of the scene; it gets the pixels that it has in the whole.
    """

    generator: Generator
    source: Source
    part: Part
    down: Axis
    across: Axis
    options: SceneOptions
    steps: int
    facts: SceneFacts
    forward: Forward

    def run(self, rasters: Sequence[Any], scratch: Path, progress: Progress | None) -> None:
        """Sample the scene and write it into the open rasters. What later tiles need lies in a file in `scratch`."""
        on_cpu = next(self.generator.parameters()).device.type == "cpu"
        lanes, together = lanes_and_batch(self.generator, self.options.batch)
        noise = NoiseField(self.generator.codec.channels(self.generator.info.channels))

        def draw(tiles: list[Tile]) -> NDArray[np.float32]:
            pictures = self.forward(lambda: self._pixels(tiles, noise))
            return pictures.float().clamp(-1, 1).cpu().numpy()

        with (
            tempfile.TemporaryFile(dir=scratch) as file,
            ThreadPoolExecutor(1, "fewstep-read") as reader,
            ThreadPoolExecutor(lanes, "fewstep-tile", initializer=one_thread if on_cpu else None) as drawers,
            ThreadPoolExecutor(1, "fewstep-write") as writer,
        ):
            try:
                groups = _grouped(self._tiles(reader), together)
                self._blend(_ahead(drawers, draw, groups, lanes + 2), file, writer, rasters, progress)
            except BaseException:  # Ctrl-C must not wait for what nobody wants any more
                for pool in (reader, drawers, writer):
                    pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _runs(self) -> Iterator[tuple[int, range]]:
        """Yield the row and the columns of each run of tiles, row by row."""
        rows, columns = self.down.touching(self.part.rows), self.across.touching(self.part.columns)
        tiles = max(1, RUN // self.across.stride)
        for row in rows:
            for first in range(0, len(columns), tiles):
                yield row, columns[first : first + tiles]

    def _width(self, columns: range) -> int:
        """Count the pixels from the start of a run's first tile to the end of its last one."""
        return (len(columns) - 1) * self.across.stride + self.across.tile

    def _tiles(self, reader: Executor) -> Iterator[Tile]:
        """Yield the tiles run by run, in a run sample by sample; the next run is read while this one is sampled."""
        down, across = self.down, self.across
        runs = deque(self._runs())

        def read(row: int, columns: range) -> Future[tuple[NDArray[np.float32], NDArray[np.bool_]]]:
            corner = down.start(row), across.start(columns[0])
            return reader.submit(self.source.read, Part(*corner, down.tile, self._width(columns)))

        coming = read(*runs[0])
        while runs:
            row, columns = runs.popleft()
            sar, valid = coming.result()
            if runs:
                coming = read(*runs[0])
            run = Run(row, columns, valid)
            places = [np.s_[..., i * across.stride : i * across.stride + across.tile] for i in range(len(columns))]
            cut = [_filled(sar[place], valid[place]) for place in places]
            for sample in range(self.options.samples):
                for column, tile in zip(columns, cut, strict=True):
                    yield Tile(sample, column, run, tile)

    def _pixels(self, tiles: list[Tile], noise: NoiseField) -> Tensor:
        """Sample tiles (B, 3, tile, tile) with the ground's noise; a tile without data is zeros and costs nothing."""
        places = [i for i, tile in enumerate(tiles) if tile.sar is not None]
        out = torch.zeros(len(tiles), 3, self.down.tile, self.across.tile)
        if not places:
            return out
        factor, device = self.generator.codec.factor, next(self.generator.parameters()).device

        def field(step: int) -> Tensor:
            crops = []
            for i in places:
                top = self.down.ground + tiles[i].run.row * self.down.stride
                left = self.across.ground + tiles[i].column * self.across.stride
                place = (n // factor for n in (top, left, self.down.tile, self.across.tile))
                crops.append(noise.crop(self.options.seed + tiles[i].sample, step, *place))
            return torch.from_numpy(np.stack(crops)).to(device)

        with torch.inference_mode():
            sar = torch.from_numpy(np.stack([tile.sar for tile in tiles if tile.sar is not None]))
            cond = self.generator.encode_condition(sar=sar)
            x0 = self.generator(field(0), cond, self.steps, map(field, count(1)))
            drawn = self.generator.codec.decode(x0).float().cpu()
        if len(places) == len(tiles):
            return drawn
        out[places] = drawn
        return out

    def _blend(
        self,
        drawn: Iterator[tuple[Tile, NDArray[np.float32]]],
        file: IO[bytes],
        writer: Executor,
        rasters: Sequence[Any],
        progress: Progress | None,
    ) -> None:
        """Add up the weighted tiles, in one order, and write the pixels that no later tile reaches.

        A run's right edge is kept for the next run, its lower edge for the next row of tiles. Lower edges of all
        samples are as wide as the scene: they lie in the file.
        """
        part, down, across, facts, samples = self.part, self.down, self.across, self.facts, self.options.samples
        rows, columns = down.touching(part.rows), across.touching(part.columns)
        below = _Edges(file, down.overlap)
        right = [np.zeros((3, down.tile, across.overlap), dtype=np.float32) for _ in range(samples)]
        finished: list[NDArray[np.uint8]] = []
        written: deque[Future[None]] = deque()
        deviations, pixels, done = 0.0, 0, 0
        whole = part.height * part.width
        for tile, picture in drawn:
            run, first, last = tile.run, tile.run.columns[0], tile.run.columns[-1]
            facts.tiles += tile.sar is not None
            facts.skipped += tile.sar is None
            if tile.column == first:
                canvas = np.zeros((3, down.tile, self._width(run.columns)), dtype=np.float32)
                if first > columns[0]:
                    canvas[:, :, : across.overlap] = right[tile.sample]
            left = (tile.column - first) * across.stride
            weight = down.weight(run.row)[:, None] * across.weight(tile.column)
            canvas[:, :, left : left + across.tile] += weight * picture
            if tile.column < last:
                continue
            if last < columns[-1]:
                right[tile.sample] = canvas[:, :, left + across.stride :].copy()
                canvas = canvas[:, :, : left + across.stride]
            if run.row > rows[0]:
                canvas[:, : down.overlap] += below.read(first - columns[0], tile.sample, canvas.shape[2])
            if run.row < rows[-1]:
                below.write(first - columns[0], tile.sample, canvas[:, down.stride : down.stride + down.overlap])
            y, x = down.done(run.row, run.row, part.rows), across.done(first, last, part.columns)
            inside = np.s_[..., _moved(y, -down.start(run.row)), _moved(x, -across.start(first))]
            finished.append(_levels(canvas[inside]))
            if tile.sample < samples - 1:
                continue
            valid, corner = run.valid[inside], (y.start - part.top, x.start - part.left)
            while len(written) > 1:  # a slow disk holds the work up, instead of filling the memory
                written.popleft().result()
            if valid.size:
                written.append(writer.submit(_write, rasters[0], _colours(finished[0], valid), corner))
            if valid.size and samples > 1:
                statistics, total = _statistics(finished, valid, self.generator.band if facts.band else None)
                deviations += total
                written.append(writer.submit(_write, rasters[1], statistics, corner))
            pixels += int(valid.sum())
            done += valid.size
            finished = []
            if progress is not None:
                progress(done, whole)
        for future in written:
            future.result()
        facts.valid_share = pixels / whole
        if samples > 1:
            facts.mean_deviation = deviations / max(pixels, 1)


class _Edges:
    """The lower edges of a row of tiles, of every sample, in a file: (3, overlap, width) in float32 for each run."""

    def __init__(self, file: IO[bytes], overlap: int) -> None:
        self._file, self._overlap = file, overlap
        self._places: dict[tuple[int, int], int] = {}

    def write(self, run: int, sample: int, edge: NDArray[np.float32]) -> None:
        """Keep the lower edge of a run, in place of the one of the row above."""
        if (run, sample) not in self._places:
            self._places[run, sample] = self._file.seek(0, os.SEEK_END)
        self._file.seek(self._places[run, sample])
        self._file.write(edge.tobytes())

    def read(self, run: int, sample: int, width: int) -> NDArray[np.float32]:
        """Read the lower edge of the run above, `width` pixels wide."""
        self._file.seek(self._places[run, sample])
        edge = np.frombuffer(self._file.read(3 * self._overlap * width * 4), np.float32)
        return edge.reshape(3, self._overlap, width)


def _moved(part: slice, by: int) -> slice:
    return slice(part.start + by, part.stop + by)


def _filled(sar: NDArray[np.float32], valid: NDArray[np.bool_]) -> NDArray[np.float32] | None:
    """Fill each hole of a tile from its nearest valid pixel; None if there is none."""
    if valid.all():
        return sar
    if not valid.any():
        return None
    from scipy.ndimage import distance_transform_edt

    nearest = distance_transform_edt(~valid, return_distances=False, return_indices=True)
    return sar[:, nearest[0], nearest[1]]


def _grouped(tiles: Iterable[Tile], size: int) -> Iterator[list[Tile]]:
    iterator = iter(tiles)
    while group := list(islice(iterator, size)):
        yield group


def _ahead(
    pool: Executor, function: Callable[[list[Tile]], NDArray[np.float32]], groups: Iterable[list[Tile]], depth: int
) -> Iterator[tuple[Tile, NDArray[np.float32]]]:
    """Yield each tile with its picture, in order, while `depth` further groups are at work or wait."""
    waiting: deque[tuple[list[Tile], Future[NDArray[np.float32]]]] = deque()
    for group in groups:
        waiting.append((group, pool.submit(function, group)))
        if len(waiting) > depth:
            first, future = waiting.popleft()
            yield from zip(first, future.result(), strict=True)
    for first, future in waiting:
        yield from zip(first, future.result(), strict=True)


def _call(function: Callable[[], Tensor]) -> Tensor:
    return function()


def lanes_and_batch(generator: Generator, wanted: int | None) -> tuple[int, int]:
    """Choose the threads that sample and the tiles in one call: single tiles on every core, one batch on a GPU."""
    on_cpu = next(generator.parameters()).device.type == "cpu"
    return (wanted or max(1, int(cpu_quota() or usable_cores())), 1) if on_cpu else (1, wanted or 16)


def one_thread() -> None:
    """Give torch one thread in this one: single tiles on every core are faster than all cores on one tile.

    torch's sums then also have one order, however many tiles are sampled at a time.
    """
    torch.set_num_threads(1)


# --- from pixels to levels --------------------------------------------------------------------------------------------
def _levels(pixels: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Round (3, h, W) in [-1, 1] to levels of 0 to 255."""
    return np.clip(np.rint((pixels + 1) * 127.5), 0, 255).astype(np.uint8)


def _colours(levels: NDArray[np.uint8], valid: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Mark pixels without data by 0, and raise valid ones to 1 or more."""
    return np.where(valid, np.maximum(levels, 1), 0).astype(np.uint8)


def _write(product: Any, bands: NDArray[Any], corner: tuple[int, int]) -> None:
    from rasterio.windows import Window

    product.write(bands, window=Window(corner[1], corner[0], bands.shape[2], bands.shape[1]))


def _statistics(
    samples: list[NDArray[np.uint8]], valid: NDArray[np.bool_], band: Band | None
) -> tuple[NDArray[np.uint16], float]:
    """Compute mean, deviation, quantiles and band (bands, h, W) in steps of SCALE, and the sum of mean deviations."""
    height, width = valid.shape
    out = np.empty((3 * len(STATISTICS + BAND * (band is not None)), height, width), dtype=np.uint16)
    total = 0.0
    for left in range(0, width, 256):  # in parts, for memory
        part = np.s_[..., left : left + 256]
        if not valid[part].any():
            out[part] = HOLE
            continue
        stack = np.stack([sample[part] for sample in samples]).astype(np.float32)
        mean, deviation = stack.mean(0), stack.std(0, ddof=1)
        ends = () if band is None else band.around(mean, deviation)
        found = np.concatenate([mean, deviation, *np.quantile(stack, QUANTILES, axis=0), *ends])
        out[part] = np.where(valid[part], np.rint(found / SCALE), HOLE).astype(np.uint16)
        total += float(deviation.mean(0)[valid[part]].sum())
    return out, total
