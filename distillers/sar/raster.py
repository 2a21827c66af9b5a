"""Reading scenes of backscatter and writing rasters on their grid, with rasterio.

`Source` decides bands, units and valid pixels once for the whole scene. `writing` writes rows into a plain file beside
the target, converts it into a Cloud-Optimised GeoTIFF and renames it, so that a file that is there is whole.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distillers.errors import BadInput, check_file
from distillers.models import radiometry
from distillers.models.band_names import is_nameless, name_bands
from distillers.models.radiometry import Radiometry
from distillers.sar.address import Scene, file_name, gdal_name, is_address
from distillers.sar.beside import beside
from distillers.sar.border import NO_BORDER, find_border
from distillers.sar.part import Part
from distillers.sar.tiles import ground_corner

MAX_PIXELS = 1 << 33  # of a scene: twenty of Sentinel-1's largest; beyond, a header lies
LEAST_SIDE = 8  # px; below it there is nothing to translate
WINDOW, WINDOWS = 256, 8  # px a side, and how many down and across: what units and white are decided by
STRAY = 0.01  # the share of zeros inside a scene that is told
GROUND_M = (5.0, 20.0)  # pixel sizes that models of 10 m can be trusted with
TOOLS = "SNAP, pyroSAR, sarsen"
CACHE = 128 << 20  # bytes, as rasterio takes it; without a limit GDAL takes a twentieth of the memory
KEPT_TAGS = ("AREA_OR_POINT", "TIFFTAG_DATETIME", "datetime")
COG = {
    "driver": "COG",
    "compress": "deflate",
    "predictor": "yes",
    "level": "1",  # faster than the default, and on pictures with grain no larger
    "blocksize": "512",
    "overview_resampling": "average",
    "bigtiff": "if_safer",
    "num_threads": "all_cpus",
}


# --- reading ---------------------------------------------------------------------------------------------------------
class Source:
    """An open raster of backscatter, with its bands, its units and its valid pixels. One thread may use it at a time.

    Args:
        scene: a file; a `str` may also be an address that GDAL reads, see `address`.
        seen: how the model takes backscatter.
        units, bands, nodata: see `SceneOptions`.

    Raises:
        BadInput: not a readable raster, complex, without bands, in range geometry, all nodata, bands or units unclear.
    """

    def __init__(
        self,
        scene: Scene,
        seen: Radiometry,
        *,
        units: str = "auto",
        bands: str | None = None,
        nodata: float | None = None,
    ) -> None:
        rasterio = import_rasterio()
        self.path, self.radiometry = file_name(scene), seen
        try:
            self.raster = open_raster(gdal_name(scene))
        except rasterio.errors.RasterioError as error:
            allowed = f"a raster that opens, such as a whole GeoTIFF ({error})"
            raise BadInput("scene", self.path.name, allowed) from None
        self.notes: list[str] = []
        self.nodata, self.units = nodata, ""
        self.lowest: float | None = None  # read so far, where it is too low for decibels
        try:
            self._check(rasterio)
            self.bands, self.bands_how = self._bands(bands)
            self.border = NO_BORDER
            samples = self._sample()
            self.units, self.units_why = self._units(units, samples)
            if self.units == "db":
                samples = {band: values[values > radiometry.NO_DATA_DB] for band, values in samples.items()}
            self._note_lowest(samples)
            self.shift = {band: 0.0 for band in self.bands}
            if seen.is_relative(self.units):
                self.shift = {
                    band: seen.white_level(band) - radiometry.measure_white(values, self.units)
                    for band, values in samples.items()
                }
        except BaseException:
            self.raster.close()
            raise

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.raster.height, self.raster.width

    @property
    def ground(self) -> tuple[int, int]:
        """Row and column of its upper left pixel on the ground's grid; (0, 0) without a georeference."""
        return ground_corner(self.raster.transform if self.georeferenced else None)

    @property
    def georeferenced(self) -> bool:
        """Whether the file says where its pixels lie."""
        return self.raster.crs is not None or not self.raster.transform.is_identity

    def _check(self, rasterio: Any) -> None:
        r = self.raster
        if r.count == 0 or not r.height or not r.width:
            inside = f"; it holds {', '.join(r.subdatasets[:4])}" if r.subdatasets else ""
            raise BadInput("scene", f"{self.path.name}: {r.count} bands", f"a raster with bands{inside}")
        if r.height * r.width > MAX_PIXELS:
            raise BadInput("scene", f"{r.width}x{r.height} pixels", f"{MAX_PIXELS} pixels together")
        if min(r.height, r.width) < LEAST_SIDE:
            raise BadInput("scene", f"{r.width}x{r.height} pixels", f"at least {LEAST_SIDE} pixels on each side")
        if any("complex" in kind for kind in r.dtypes):  # complex_int16 is no dtype of NumPy
            given = f"complex values ({r.dtypes[0]}), as single-look complex products have"
            raise BadInput("scene", given, f"detected backscatter: multi-look and terrain-correct first ({TOOLS})")
        if r.crs is None and r.transform.is_identity and (r.gcps[0] or r.rpcs):
            given = "range geometry: ground control points but no map grid, as GRD products come"
            raise BadInput("scene", given, f"a terrain-corrected raster: make one first ({TOOLS}, or an RTC product)")
        if not self.georeferenced:
            self.notes.append("The scene has no georeference; the result has none either.")
        self._check_ground()

    def _check_ground(self) -> None:
        """Note pixels of another size or shape than the models have learnt from."""
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
        found, how = name_bands(wanted, r.descriptions, self.path.stem, alpha_bands(r))
        if len({r.dtypes[i - 1] for i in found.values()}) > 1:
            raise BadInput("bands", found, "bands of one data type")
        kept = self.radiometry.choose_bands(found)
        if len(kept) < len(found):
            found, how = kept, f"{how}; the model takes one band"
        if "assumed" in how:
            self.notes.append(f"Polarisation {how}; --bands says otherwise.")
        return found, how

    def _sample(self) -> dict[str, NDArray[Any]]:
        """Read valid values by band, and find the border of zeros that the scene may have."""
        dark = self.raster.dtypes[next(iter(self.bands.values())) - 1] == "uint8"  # there 0 may be water
        searched = not dark and self._zero_on_edge()
        if searched:
            self._find_border()
        samples, zeros = self._read_spread()
        if zeros and not (dark or searched):  # there may be a border inside one of other holes
            self._find_border()
            samples, zeros = self._read_spread()
        if self.border.pixels:
            share = 100 * self.border.pixels / (self.raster.height * self.raster.width)
            self.notes.append(
                f"{share:.3g} % of the scene, along its edge, is 0 in all bands used: taken for no data, as --nodata 0 "
                "says."
            )
        if zeros > STRAY:
            self.notes.append(
                f"{100 * zeros:.3g} % of the pixels are 0 in all bands used and drawn as ground: --nodata 0 if that "
                "means no data."
            )
        return samples

    def _read_spread(self) -> tuple[dict[str, NDArray[Any]], float]:
        """Read valid values by band, from windows spread over the scene, or from all of it where those hold few.

        Returns:
            the values, and the share of them that are 0 in all bands.
        """
        from rasterio.windows import Window

        height, width = self.shape
        side = min(WINDOW, height, width)
        tops, lefts = (np.unique(np.linspace(0, length - side, WINDOWS).astype(int)) for length in (height, width))
        few = [Window(left, top, side, side) for top in tops for left in lefts]
        every = (Window(0, top, width, min(side, height - top)) for top in range(0, height, side))
        for windows, enough in ((few, 1 << 16), (every, 1)):
            found: dict[str, list[NDArray[Any]]] = {band: [] for band in self.bands}
            valid_pixels = zeros = 0
            for window in windows:
                stored, valid = self._read_stored(window)
                for band, numbers in zip(self.bands, self._scaled(stored), strict=True):
                    found[band].append(numbers[valid])
                valid_pixels += int(valid.sum())
                zeros += int((valid & (stored == 0).all(0)).sum())
                if windows is not few and valid_pixels > 1 << 22:
                    break
            if valid_pixels >= enough:
                samples = {band: np.concatenate(parts) for band, parts in found.items()}
                return samples, zeros / valid_pixels
        raise BadInput("scene", "no pixel with data", "a raster with valid pixels in the bands asked for")

    def _zero_on_edge(self) -> bool:
        """Tell whether a pixel on the scene's edge is 0 in all bands."""
        from rasterio.windows import Window

        height, width = self.shape
        step = max(1, CACHE // (4 * width * self.raster.count * 8))  # what GDAL keeps from left to right
        windows = [Window(0, top, width, 1) for top in (0, height - 1)]
        for top in range(0, height, step):
            windows += [Window(left, top, 1, min(step, height - top)) for left in (0, width - 1)]
        return any(zero.any() for zero, _ in map(self._zeros, windows))

    def _find_border(self) -> None:
        """Look for a border of zeros in the whole scene."""
        from rasterio.windows import Window

        height, width = self.shape
        self.border = find_border(lambda top, rows: self._zeros(Window(0, top, width, rows)), height, width)

    def _zeros(self, window: Any) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Read where a window is 0 in all bands, and where it has no data."""
        stored, valid = self._read_stored(window)
        return valid & (stored == 0).all(0), ~valid

    def _units(self, wanted: str, samples: dict[str, NDArray[Any]]) -> tuple[str, str]:
        if wanted == "auto":
            return radiometry.decide_units(samples)
        if not radiometry.can_be(samples, wanted):
            seen = (f"{float(v.min()):.4g} to {float(v.max()):.4g} in {band}" for band, v in samples.items())
            allowed = (
                "db: values from -80 to 50; linear, amplitude, dn: some above 0 (5 % may be noise); --nodata NUMBER"
            )
            raise BadInput("units", f"{wanted}, of values from {', '.join(seen)}", f"{allowed} where one means no data")
        return wanted, "as asked for"

    def _note_lowest(self, samples: dict[str, NDArray[Any]]) -> None:
        """Note a number that no ground has and noise does not repeat: below decibels, or below zero."""
        level = radiometry.LOWEST_DB if self.units == "db" else 0.0
        for band, values in samples.items():
            number, share = radiometry.most_common_below(values, level)
            if share > STRAY / 10:
                what = f"{100 * share:.3g} % of {band} are {number:g}, below {level:g}"
                self.notes.append(f"{what}, and drawn as the darkest ground: --nodata, as stored, if it means no data.")

    def _read_stored(self, window: Any) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Read a window as `read_stored` does, without data in the scene's border."""
        part = Part(int(window.row_off), int(window.col_off), int(window.height), int(window.width))
        try:
            stored, valid = read_stored(self.raster, list(self.bands.values()), nodata=self.nodata, window=window)
        except import_rasterio().errors.RasterioError as error:
            given = f"{self.path.name}: rows {part.top} to {part.top + part.height} cannot be read"
            allowed = f"a whole file; this one breaks off or is damaged ({error.__cause__ or error})"
            raise BadInput("scene", given, allowed) from None
        if self.border.pixels:
            valid &= ~self.border.within(part)
        return stored, valid

    def _scaled(self, stored: NDArray[Any]) -> NDArray[Any]:
        return scaled(self.raster, list(self.bands.values()), stored)

    def _read(self, window: Any) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Read a window's values (C, H, W) in the scene's units, and (H, W), where they are valid."""
        stored, valid = self._read_stored(window)
        values = self._scaled(stored)
        if self.units == "db":
            lost = valid & (values <= radiometry.NO_DATA_DB).any(0)
            if lost.any():
                self.lowest = min(self.lowest or 0.0, float(values[:, lost].min()))
                valid &= ~lost
        return values, valid

    def read(self, part: Part) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Read a part as the model takes it; it may reach beyond the scene, which is reflected there.

        Returns:
            (channels, height, width) in [-1, 1], any number in invalid pixels;
            and (height, width), where they are valid.
        """
        from rasterio.windows import Window

        rows = _mirrored(part.top, part.height, self.raster.height)
        columns = _mirrored(part.left, part.width, self.raster.width)
        y, x = int(rows.min()), int(columns.min())
        values, valid = self._read(Window(x, y, int(columns.max()) + 1 - x, int(rows.max()) + 1 - y))
        levels = {
            band: radiometry.decibels(numbers, self.units) + np.float32(self.shift[band])
            for band, numbers in zip(self.bands, values, strict=True)
        }
        seen = self.radiometry.normalize(levels, calibrated=not self.radiometry.is_relative(self.units))
        if (y, x) == (part.top, part.left) and valid.shape == (part.height, part.width):
            return seen, valid
        return (  # one side after the other: several times as fast as both at once
            seen[:, rows - y][:, :, columns - x],
            valid[rows - y][:, columns - x],
        )


def _mirrored(start: int, count: int, length: int) -> NDArray[np.intp]:
    """List the pixels of a side of `length` that are read for those from `start`: reflections for those beyond it."""
    return np.abs((np.arange(start, start + count) + length - 1) % (2 * (length - 1)) - (length - 1))


def _metres(raster: Any) -> tuple[float | None, float | None]:
    """Measure a pixel's width and height in metres; None where the CRS does not say."""
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


# --- writing ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Product:
    """A raster to write on a scene's grid: its path, its bands' names and how numbers are stored.

    scale: a value is its stored number times this.
    """

    path: Path
    names: Sequence[str]
    dtype: str
    nodata: int
    scale: float = 1.0


@contextmanager
def writing(source: Source, products: Sequence[Product], tags: Mapping[str, str], part: Part) -> Iterator[list[Any]]:
    """Open rasters of a part to write rows into; on leaving all of them become COGs under their names, or none does.

    Raises:
        BadInput: the disk is full, the place cannot be written.
    """
    rasterio = import_rasterio()
    try:
        with ExitStack() as places:
            whole = [places.enter_context(beside(product.path)) for product in products]
            with ExitStack() as stack:
                opened = [
                    stack.enter_context(_open(source, product, path.with_name("rows.tif"), part))
                    for product, path in zip(products, whole, strict=True)
                ]
                for raster in opened:
                    raster.update_tags(**{k: v for k, v in source.raster.tags().items() if k in KEPT_TAGS}, **tags)
                yield opened
            for path in whole:
                _convert(path.with_name("rows.tif"), path)
    except (rasterio.errors.RasterioError, OSError) as error:
        raise BadInput("out", products[0].path.name, f"a place that can be written, with room ({error})") from None


def _convert(rows: Path, whole: Path) -> None:
    """Convert a plain file into a COG, in a thread: a signal that comes meanwhile ends the work at once."""

    def work() -> None:
        with import_rasterio().Env(GDAL_CACHEMAX=CACHE, GDAL_PAM_ENABLED=False):
            _check_rows(rows)
            import_rasterio().shutil.copy(rows, whole, **COG)
            _check_whole(whole)

    pool = ThreadPoolExecutor(1, "fewstep-cog")
    try:
        pool.submit(work).result()
    finally:
        pool.shutdown(wait=False)


def _open(source: Source, product: Product, path: Path, part: Part) -> Any:
    rasterio = import_rasterio()
    raster, colours = source.raster, len(product.names) == 3
    profile = {
        "driver": "GTiff",
        "width": part.width,
        "height": part.height,
        "count": len(product.names),
        "dtype": product.dtype,
        "nodata": product.nodata,
        "tiled": True,
        "blockxsize": 512,
        "blockysize": 64,  # a row of tiles fills whole blocks
        "interleave": "pixel" if colours else "band",
        "bigtiff": "if_safer",
    }
    if source.georeferenced:
        profile |= {"crs": raster.crs, "transform": part.moved(raster.transform)}
    opened = rasterio.open(path, "w", **profile)
    opened.descriptions = list(product.names)
    opened.scales = [product.scale] * len(product.names)
    if colours:
        enum = rasterio.enums.ColorInterp
        opened.colorinterp = [enum.red, enum.green, enum.blue]
    return opened


def _check_rows(path: Path) -> None:
    """Raise OSError if a plain file lacks pixels: what GDAL writes when it closes a file may fail without a word."""
    with import_rasterio().open(path) as written:
        height, width = written.block_shapes[0]
        pixels = ceil(written.height / height) * height * ceil(written.width / width) * width
        needed = pixels * written.count * np.dtype(written.dtypes[0]).itemsize
    if path.stat().st_size < needed:
        raise OSError(f"{needed} bytes are needed for the pixels alone, {path.stat().st_size} could be written")


def _check_whole(path: Path) -> None:
    """Read the last pixel and the first: GDAL may not have told of what it could not write to a full disk."""
    from rasterio.windows import Window

    with import_rasterio().open(path) as written:
        for column, row in ((0, 0), (written.width - 1, written.height - 1)):
            written.read(window=Window(column, row, 1, 1))


def check_output(scene: Scene, out: Path) -> None:
    """Refuse with BadInput a name that a GeoTIFF cannot have, or that is the scene's own."""
    check_file(out, ".tif", ".tiff", inputs=[] if is_address(scene) else [Path(scene)])
    if not out.resolve().parent.is_dir():
        raise BadInput("out", str(out), "a name in an existing folder that can be written")


def preview(raster: str | Path, side: int = 2048) -> NDArray[np.uint8]:
    """Read a translated scene as (h, w, 3), at most `side` pixels a side, from its overviews; holes are 0."""
    rasterio = import_rasterio()
    with rasterio.open(raster) as opened:
        shrink = max(1.0, max(opened.shape) / side)
        shape = (3, max(1, round(opened.height / shrink)), max(1, round(opened.width / shrink)))
        pixels: NDArray[np.uint8] = opened.read([1, 2, 3], out_shape=shape)
    return np.ascontiguousarray(pixels.transpose(1, 2, 0))


def write_preview(raster: Path, target: Path) -> None:
    """Write a translated scene as a small PNG, see `preview`."""
    from PIL import Image

    with beside(target) as path:
        Image.fromarray(preview(raster)).save(path, "png")


# --- rasterio --------------------------------------------------------------------------------------------------------
def import_rasterio(field: str = "scene") -> Any:
    """Import rasterio. BadInput of this field says how to get it where it is missing."""
    try:
        import rasterio
        import rasterio.enums
        import rasterio.errors
        import rasterio.shutil
    except ImportError:
        raise BadInput(field, "a GeoTIFF, without rasterio", "pip install 'fewstep[raster]'") from None
    return rasterio


def open_raster(path: str | Path, field: str = "scene") -> Any:
    """Open a raster for reading, without a warning where it has no place on the ground."""
    rasterio = import_rasterio(field)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        return rasterio.open(path)


def alpha_bands(raster: Any) -> list[int]:
    """List the numbers of the bands that hold transparency.

    GDAL calls the fourth of four 8-bit bands so by default, whatever it holds: a description of something else wins.
    """
    alpha = import_rasterio().enums.ColorInterp.alpha
    told = enumerate(zip(raster.colorinterp, raster.descriptions, strict=True), 1)
    return [i for i, (kind, text) in told if kind == alpha and (is_nameless(text) or "alpha" in text.lower())]


def read_stored(
    raster: Any, indexes: Sequence[int], *, nodata: float | None = None, window: Any = None
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Read bands (C, H, W) by number, as they are stored, and (H, W), where they are valid in all bands.

    A pixel is not valid where the file's mask, its nodata or a band of transparency says so, or a number is not finite.

    nodata: a stored number that means no data besides.
    """
    stored = raster.read(indexes, window=window)
    valid: NDArray[np.bool_] = (raster.read_masks(indexes, window=window) > 0).all(0)
    if alpha := alpha_bands(raster):
        valid &= (raster.read(alpha, window=window) > 0).all(0)
    if nodata is not None:
        valid &= (stored != nodata).all(0)
    if stored.dtype.kind == "f":
        valid &= np.isfinite(stored).all(0)
    return stored, valid


def scaled(raster: Any, indexes: Sequence[int], stored: NDArray[Any]) -> NDArray[Any]:
    """Apply the scales and offsets that the file names for bands to their stored numbers (C, ...)."""
    scales, offsets = (np.array([every[i - 1] for i in indexes]) for every in (raster.scales, raster.offsets))
    if (scales == 1).all() and (offsets == 0).all():
        return stored
    shape = (-1, *[1] * (stored.ndim - 1))
    values: NDArray[Any] = stored * scales.reshape(shape) + offsets.reshape(shape)
    return values
