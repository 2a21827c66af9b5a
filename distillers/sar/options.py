"""What a caller may choose about the translation of a scene, and the facts that come back with the result.

Each option's name, default, limits and help stand here once: the command makes its options of these fields, the
service the fields of its forms. Nothing here imports torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from distillers.errors import BadInput
from distillers.models.radiometry import UNITS

MAX_SAMPLES = 64
WARNING = (
    "Colours are inferred, not measured; objects may be invented or missing. "
    "Not for measurement, targeting or damage claims."
)


def _option(default: Any, description: str, **limits: Any) -> Any:
    """Declare a field with pydantic's words for its help text and its limits (ge, le, max_length)."""
    return field(default=default, metadata={"description": description, **limits})


@dataclass(frozen=True, kw_only=True)
class SceneOptions:
    """How a scene is translated. None leaves the choice to the model or the raster; sizes are pixels.

    Raises:
        BadInput: a seed, a number of samples, units, a batch, a window or a box that are not allowed.
    """

    steps: int | None = _option(None, "Network calls per picture; the folder's default if left out.", ge=1)
    seed: int = _option(0, "The same seed and scene give the same bytes.", ge=0)
    samples: int = _option(
        1,
        "Above 1: also mean, deviation and quantiles over seeds seed, seed + 1, ..., in a file .uncertainty.tif.",
        ge=1,
        le=MAX_SAMPLES,
    )
    units: str = _option(
        "auto", "What the numbers are: auto | db | linear | amplitude | dn. auto refuses when the values do not tell."
    )
    bands: str | None = _option(
        None,
        '"VV,VH", "2,1" or "VV=1,VH=2"; by descriptions or the file\'s name if left out; else refused.',
        max_length=80,
    )
    nodata: float | None = _option(None, "A number that means no data, as stored, beside NaN and the file's own.")
    window: tuple[int, int, int, int] | None = _option(
        None, "LEFT TOP WIDTH HEIGHT in pixels: translate this part alone, to the same pixels as in the whole."
    )
    bbox: tuple[float, float, float, float] | None = _option(
        None, "WEST SOUTH EAST NORTH, in the scene's coordinates or in degrees: the same, of the pixels that it meets."
    )
    tile: int | None = _option(None, "Pixels a side of the tiles; 256 if left out.", ge=1)
    overlap: int | None = _option(None, "Pixels; a quarter of a tile if left out, at most half.", ge=0)
    batch: int | None = _option(None, "Tiles at a time; cores on a CPU, 16 on a GPU if left out.", ge=1)

    def __post_init__(self) -> None:
        from distillers.generator import MAX_SEED

        if not 0 <= self.seed <= MAX_SEED - MAX_SAMPLES:
            raise BadInput("seed", self.seed, f"0 to {MAX_SEED - MAX_SAMPLES}")
        if not 1 <= self.samples <= MAX_SAMPLES:
            raise BadInput("samples", self.samples, f"1 to {MAX_SAMPLES}")
        if self.units not in ("auto", *UNITS):
            raise BadInput("units", self.units, " | ".join(("auto", *UNITS)))
        if self.batch is not None and self.batch < 1:
            raise BadInput("batch", self.batch, "1 or more")
        if self.window and not (min(self.window[:2]) >= 0 and min(self.window[2:]) >= 1):
            raise BadInput("window", self.window, "left and top of 0 or more, width and height of 1 or more pixels")
        if self.bbox and not (all(map(isfinite, self.bbox)) and self.bbox[1] < self.bbox[3]):
            raise BadInput("bbox", self.bbox, "four finite numbers, west south east north, with south below north")
        if self.window and self.bbox:
            raise BadInput("bbox", self.bbox, "nothing beside window: one of both says which part")


@dataclass
class SceneFacts:
    """What was done to a scene, and why: for the log, the tags, the STAC item and the service's answers."""

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
    width: int  # of the result
    height: int
    tile: tuple[int, int]  # down, across
    overlap: tuple[int, int]
    tiles: int = _option(0, "Tiles drawn, over all samples.")
    skipped: int = _option(0, "Tiles without data.")
    window: tuple[int, int, int, int] | None = _option(
        None, "Left, top, width and height in the scene's pixels, where a part alone was asked for."
    )
    valid_share: float = 0.0
    band: str | None = _option(None, "What the 90 % band held on held-out pairs; null where none is written.")
    mean_deviation: float | None = _option(None, "Of the samples, in levels of 255; null for one sample.")
    seconds: float = 0.0
    megapixels_per_second: float = 0.0
    version: str = ""
    warnings: list[str] = field(default_factory=list)

    def tags(self) -> dict[str, str]:
        """List the tags of the result: nothing of when or how fast, so that equal work gives equal bytes."""
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
            **({"FEWSTEP_BAND": self.band} if self.band else {}),
            **({"FEWSTEP_WINDOW": " ".join(map(str, self.window))} if self.window else {}),
        }
