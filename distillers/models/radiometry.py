"""Conversion of SAR backscatter in any units to the [-1, 1] that a network takes.

A raster holds decibels, linear power, amplitude, or digital numbers that nobody calibrated. All are converted to
decibels first: dB = 10 log10(power) = 20 log10(amplitude). Digital numbers are amplitudes up to an unknown factor, so
their white (the 99 % quantile of the scene; 255 where they have 8 bits) is put at a level that the model's manifest
names, as it names the clip ranges (`sar` in fewstep.json).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from distillers.errors import BadInput
from distillers.models.band_names import POLARISATIONS, name_bands, polarisations_of_file

if TYPE_CHECKING:
    from pydantic import TypeAdapter

Array = NDArray[np.floating]

Units = Literal["auto", "db", "linear", "amplitude", "dn"]  # what the numbers of a raster are; auto: by their values
UNITS = get_args(Units)[1:]
WHITE = 0.99  # the quantile of digital numbers that is taken for white, as in the pictures the models learnt from
PLAUSIBLE_DB = {"VV": (-20.0, -4.0), "VH": (-27.0, -11.0), "": (-27.0, -4.0)}  # where the median of land lies
LOWEST_DB, HIGHEST_DB = -80.0, 50.0  # beyond, a number is no backscatter in decibels (saturated metal reaches 40)
NO_DATA_DB = -450.0  # 10 log10 of the smallest float32; a lower number, such as -9999, never was a power
NOISE = 0.05  # the share of values that noise, subtracted or rounded to nothing, may put beyond what their units allow
DN_ABOVE = 50.0  # no median of power or amplitude comes near it
ADVICE = "say what they are: --units db | linear | amplitude | dn; and what means no data: --nodata NUMBER"


@dataclass(frozen=True, kw_only=True)
class Levels:
    """The windows and frequencies of the local means that a network takes: see `conditions.encode_sar`."""

    cells: tuple[int, ...] = (5, 17)  # sides of the windows, odd, in positions of the network
    frequencies: int = 6  # of sine and cosine, each twice the one before


@dataclass(frozen=True, kw_only=True)
class Radiometry:
    """The description of one model's SAR input, stored as `sar` in its manifest.

    Attributes:
        form: "db": each of `bands` is clipped to clip_db[band] and mapped to [-1, 1] linearly; an absent band is 0
            everywhere. "amplitude": one band, amplitude over its white, clipped and mapped to [-1, 1]; absolute levels
            play no part.
        channels: of the input, the plane of `calibrated` included.
        white_db: the level in decibels that the white of digital numbers is taken for ("db" only).
        levels: whether the network takes local means and the presence of each band besides.
        calibrated: whether a last plane says if levels are absolute (1: decibels, power, amplitude) or relative to the
            scene's own white (-1) ("db" only).
    """

    form: Literal["db", "amplitude"] = "amplitude"
    channels: int = 1
    bands: tuple[str, ...] = ()
    clip_db: dict[str, tuple[float, float]] = field(default_factory=dict)
    white_db: dict[str, float] = field(default_factory=dict)
    levels: Levels | None = None
    calibrated: bool = False
    range: Any = None  # a remark

    @classmethod
    def of(cls, sar: Mapping[str, Any] | None) -> Radiometry:
        """Read a manifest's `sar`. Raises BadInput for a description that cannot be followed."""
        from pydantic import ValidationError

        try:
            found = _checker().validate_python(dict(sar or {}))
        except ValidationError as error:
            first = error.errors()[0]
            raise BadInput(f"sar.{'.'.join(map(str, first['loc']))}", first["input"], first["msg"]) from None
        named = set(found.bands)
        whole = len(found.bands) == found.band_count and named <= set(found.clip_db) and named <= set(found.white_db)
        ranges = all(low < high for low, high in found.clip_db.values())
        if found.channels < 1 or (found.form == "db" and not (whole and ranges)):
            raise BadInput("sar", dict(sar or {}), "a clip_db range and a white_db level for each of its bands")
        if found.calibrated and found.form != "db":
            raise BadInput("sar.calibrated", True, 'form "db": amplitudes always hang on their own white')
        if (own := found.levels) and not (own.frequencies > 0 and all(n > 0 and n % 2 for n in own.cells)):
            raise BadInput("sar.levels", asdict(own), "odd numbers of cells, 1 frequency or more")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Describe the radiometry as a manifest's `sar`, without what is at its default of nothing."""
        entries: dict[str, Any] = {key: value for key, value in asdict(self).items() if value}
        if self.levels:
            entries["levels"]["cells"] = list(self.levels.cells)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in entries.items()}

    @property
    def band_count(self) -> int:
        """The number of channels that are backscatter."""
        return self.channels - self.calibrated

    def is_relative(self, units: str) -> bool:
        """Tell whether levels in these units are relative to the scene's own white."""
        return units == "dn" or self.form == "amplitude"

    def white_level(self, band: str) -> float:
        """Return the decibels that the white of relative levels is put at."""
        return self.white_db[band] if self.form == "db" else 0.0

    def normalize(
        self, decibels: Mapping[str, Array], calibrated: bool | NDArray[np.bool_] = False
    ) -> NDArray[np.float32]:
        """Map decibels (H, W) by band, shifted to the model's white, to (channels, H, W) in [-1, 1]; NaN becomes 0.

        Form "db" takes any of its bands; "amplitude" takes one, whatever its name. `calibrated`: whether levels are
        absolute, for a model with that plane.
        """
        if self.form == "amplitude":
            (values,) = decibels.values()
            seen = np.minimum(10 ** (values / 20), 1) * 2 - 1
            return np.nan_to_num(np.repeat(seen[None], self.channels, 0).astype(np.float32), nan=0.0)
        shape = next(iter(decibels.values())).shape
        out = np.zeros((self.channels, *shape), dtype=np.float32)
        for i, band in enumerate(self.bands):
            if band in decibels:
                low, high = self.clip_db[band]
                out[i] = (np.clip(decibels[band], low, high) - low) * (2 / (high - low)) - 1
        if self.calibrated:
            out[-1] = np.where(calibrated, 1, -1)
        return np.nan_to_num(out, copy=False, nan=0.0)

    def choose_bands(self, found: dict[str, int]) -> dict[str, int]:
        """Choose among a raster's bands (polarisation: number) those that the model takes: one for form "amplitude"."""
        if self.form == "db":
            return found
        kept = next((band for band in ("VH", *self.bands) if band in found), next(iter(found)))
        return {kept: found[kept]}

    def band_of_picture(self, bands: str | None = None, file: str = "") -> str:
        """Name the polarisation of a picture of one band.

        In this order: what `bands` says ("VV", "VH"; see `name_bands`), what the file's name says, the model's band if
        it has one. "" for form "amplitude", which takes any.

        Raises:
            BadInput: nothing says it.
        """
        if bands is not None:
            return next(iter(name_bands(bands, [None])[0]))
        named = polarisations_of_file(file)
        if len(named) == 1 and named[0] in POLARISATIONS:
            return named[0]
        if self.form == "amplitude":
            return ""
        if set(named) - {*POLARISATIONS}:
            raise BadInput("bands", f"{' and '.join(named)} in the file's name", " or ".join(self.bands))
        if len(self.bands) > 1:
            raise BadInput("bands", None, f"{' or '.join(self.bands)}, or a file with it in its name: tile-VH.png")
        return self.bands[0]

    def from_picture(self, grey: Array, band: str) -> NDArray[np.float32]:
        """Map a grey picture (H, W), 0 black to 1 white (the quantile WHITE), to (channels, H, W) in [-1, 1].

        In form "db" black is half a level of 8 bits, and the picture is of `band`.
        """
        if self.form == "amplitude":
            return np.repeat((grey * 2 - 1).astype(np.float32)[None], self.channels, 0)
        if band not in self.bands:
            raise BadInput("bands", band, ", ".join(self.bands))
        return self.normalize({band: self.white_level(band) + decibels(np.maximum(grey, 0.5 / 255), "dn")})

    def to_picture(self, unit: NDArray[np.floating]) -> tuple[NDArray[np.float32], str]:
        """Show the first band that an input (channels, H, W) holds as a grey picture (H, W), 0 to 1, and name the band.

        `from_picture` is its inverse, up to white.
        """
        if self.form == "amplitude":
            return ((unit[0] + 1) / 2).astype(np.float32), ""
        i = next((i for i in range(self.band_count) if np.any(unit[i])), 0)
        band, (low, high) = self.bands[i], self.clip_db[self.bands[i]]
        seen = (unit[i] + 1) / 2 * (high - low) + low - self.white_level(band)
        return np.minimum(10 ** (seen / 20), 1).astype(np.float32), band


# The clip ranges that SEN12MS-CR's models share (DSen2-CR, GLF-CR, UnCRtainTS). The white levels put the mean of the
# pictures learnt from, 7.3 dB below their white, where Sentinel-1's mean over land is (-12.6 and -20.3 dB, TerraMind).
SENTINEL1_DB = Radiometry(
    form="db",
    channels=2,
    bands=POLARISATIONS,
    clip_db={"VV": (-25.0, 0.0), "VH": (-32.5, 0.0)},
    white_db={"VV": -5.3, "VH": -13.0},
)
SENTINEL1 = replace(SENTINEL1_DB, channels=3, levels=Levels(), calibrated=True)
AMPLITUDE = Radiometry(range="uint8 amplitude / its 99 % quantile, to [-1, 1]")
NAMED = {"amplitude": AMPLITUDE, "sentinel1-db": SENTINEL1_DB, "sentinel1": SENTINEL1}


def decibels(values: NDArray[Any], units: str) -> NDArray[np.float32]:
    """Convert values in `units` to dB, digital numbers to relative dB; NaN stays NaN.

    Zero backscatter, or less where noise was subtracted, becomes LOWEST_DB, and so does what is lower; decibels above
    HIGHEST_DB become that.
    """
    numbers = values.astype(np.float32)
    if units == "db":
        return np.clip(numbers, LOWEST_DB, HIGHEST_DB)
    factor = np.float32(10 if units == "linear" else 20)
    smallest = np.float32(10 ** (LOWEST_DB / factor))
    return factor * np.log10(np.maximum(numbers, smallest))


def measure_white(values: NDArray[Any], units: str) -> float:
    """Measure the white of valid values in dB: 255 where they have 8 bits, else their 99 % quantile."""
    if values.dtype == np.uint8:
        return float(20 * np.log10(255.0))
    return float(np.nanquantile(decibels(values, units), WHITE))


def decide_units(samples: Mapping[str, NDArray[Any]]) -> tuple[str, str]:
    """Decide the units of a raster by valid values of each band, in the raster's type, and say why.

    One rule holds for all bands; where one band could be in two units, another may decide:
    - 8 bits: digital numbers, stretched for display.
    - a median below -1 dB, values between -80 and 50: decibels.
    - a median above 50, or whole numbers: digital numbers.
    - nothing negative: linear power where that puts the median where land has it and amplitude does not, amplitude
      where it is the other way round.
    Up to a share NOISE of the values may be beyond, so that no single value decides.

    Raises:
        BadInput: both fit all bands, none fits one, or the bands disagree.
    """
    found = {band: _decide(band, values) for band, values in samples.items()}
    kinds = set(UNITS).intersection(*(fitting for fitting, _ in found.values()))
    reasons = "; ".join(f"{band or 'the band'}: {why}" for band, (_, why) in found.items())
    if len(kinds) != 1:
        raise BadInput("units", f"auto, but values do not tell ({reasons})", ADVICE)
    return kinds.pop(), reasons


def can_be(samples: Mapping[str, NDArray[Any]], units: str) -> bool:
    """Tell whether a raster's values by band can be in these units.

    As decibels each band lies between -80 and 50; of what else they are, some band has more than noise above 0. A share
    NOISE of a band may be beyond.
    """
    if units == "db":
        return all(_share_beyond(values) <= NOISE for values in samples.values())
    return any(float((values > 0).mean()) > NOISE for values in samples.values())


def _share_beyond(values: NDArray[Any]) -> float:
    """Measure the share of values that are no decibels of backscatter."""
    return float(((values < LOWEST_DB) | (values > HIGHEST_DB)).mean())


def most_common_below(values: NDArray[Any], level: float) -> tuple[float, float]:
    """Find the most common of the values below a level and its share of all values; (nan, 0) where none is below."""
    numbers, counts = np.unique(values[values < level], return_counts=True)
    return (float(numbers[counts.argmax()]), float(counts.max() / values.size)) if numbers.size else (np.nan, 0.0)


def _no_data(values: NDArray[Any], level: float) -> str:
    """Ask whether a number below a level that is more common than noise means no data."""
    number, share = most_common_below(values, level)
    return f"; {100 * share:.0f} % are {number:g}, no data?" if share > NOISE else ""


def _decide(band: str, values: NDArray[Any]) -> tuple[set[str], str]:
    """Return the units that fit one band, and why."""
    if values.dtype == np.uint8:
        return {"dn"}, "8-bit numbers, stretched for display"
    numbers = values.astype(np.float64)
    low, median, high = float(numbers.min()), float(np.median(numbers)), float(numbers.max())
    seen = f"{low:.4g} to {high:.4g}, median {median:.4g}"
    if median < -1:
        if median >= LOWEST_DB and _share_beyond(numbers) <= NOISE:
            return {"db"}, f"{seen}: negative, as decibels are"
        return set(), f"{seen}: beyond decibels{_no_data(numbers, LOWEST_DB) or '; scaled?'}"
    negative = float((numbers < 0).mean())
    if negative > NOISE:
        return (
            set(),
            f"{seen}, {100 * negative:.0f} % negative: neither decibels nor power{_no_data(numbers, 0)}",
        )
    if median > DN_ABOVE or (values.dtype.kind in "ui" and np.quantile(numbers, 1 - NOISE) > 1):
        return {"dn"}, f"{seen}: digital numbers"
    if median <= 0:
        return set(), f"{seen}: hardly any backscatter; does 0 mean no data?"
    bottom, top = PLAUSIBLE_DB.get(band, PLAUSIBLE_DB[""])
    levels = {"linear": 10 * np.log10(median), "amplitude": 20 * np.log10(median)}
    fitting = {units for units, level in levels.items() if bottom <= level <= top}
    told = ", ".join(f"{level:.1f} dB if {units}" for units, level in levels.items())
    return fitting, f"{seen}: {told}; plausible for land: {' and '.join(sorted(fitting)) or 'neither'}"


@lru_cache
def _checker() -> TypeAdapter[Radiometry]:
    """Build the checker of manifests once: building takes longer than a small picture does."""
    from pydantic import TypeAdapter

    return TypeAdapter(Radiometry)
