"""Translate georeferenced rasters from file to file, in threads of their own.

Only the network's calls go to the engine's thread, a few tiles at a time and after the pictures that wait, so that
nobody waits for a whole scene. Every scene has a private folder, which is removed however the translation ends.
"""

import asyncio
import logging
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from app.engine.engine import Engine
from app.engine.model import Model
from app.engine.passes import Pass
from app.errors import no_room, overloaded
from app.media.geotiff import ENV, check, grey, import_rasterio
from app.media.image_files import encode
from app.settings import Settings
from distillers.errors import BadInput
from distillers.models.band_names import polarisations_of_file

if TYPE_CHECKING:
    from torch import Tensor

    from distillers.sar.options import SceneFacts, SceneOptions

log = logging.getLogger("fewstep.scenes")
PREVIEW = 1024  # pixels a side, at most
PREFIX = "fewstep-scratch-"  # of the names of private folders


class Cancelled(Exception):
    """Raised where the caller has left or has cancelled the job."""


@dataclass(frozen=True)
class SceneOrder:
    """Describes a scene on disk and how to translate it."""

    model: Model
    options: "SceneOptions"
    scene: Path
    cancelled: threading.Event

    @property
    def optical(self) -> Path:
        """Return the path of the result."""
        return self.scene.with_name("optical.tif")

    @property
    def uncertainty(self) -> Path:
        """Return the path of the statistics over samples."""
        return self.scene.with_name("optical.uncertainty.tif")


@dataclass(frozen=True)
class Translated:
    """Holds a translated scene as bytes; its files have been removed."""

    facts: "SceneFacts"
    forward_s: float  # on the engine's thread, all tiles
    optical: bytes  # a GeoTIFF, or a picture in the format asked for
    uncertainty: bytes | None
    optical_png: bytes
    sar_png: bytes


def scene_name(given: str) -> str:
    """Return a safe file name that keeps the polarisations in their order, the only fact that is read from a name."""
    return "_".join(["scene", *polarisations_of_file(given)]) + ".tif"


class Scenes:
    """Translates scenes in threads. It is a context that makes the private folder `scratch`, and removes it."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine, self.settings = engine, settings
        self._pool = ThreadPoolExecutor(settings.max_scenes, "fewstep-scene")
        self._at_work: list[Future[Translated]] = []

    def __enter__(self) -> Self:
        _remove_abandoned(Path(self.settings.scratch or tempfile.gettempdir()))
        self.scratch = Path(tempfile.mkdtemp(prefix=PREFIX, dir=self.settings.scratch))
        self._held = _hold(self.scratch)
        return self

    def __exit__(self, *_: Any) -> None:
        self._pool.shutdown(cancel_futures=True)
        shutil.rmtree(self.scratch, ignore_errors=True)
        if self._held is not None:
            os.close(self._held)

    async def at_once(
        self, data: bytes, name: str, model: Model, options: "SceneOptions", output_format: str, quality: int
    ) -> Translated:
        """Translate a scene from bytes to bytes. A cancelled caller's ends at its next tile.

        Raises:
            ApiError: 503 when too many are translated already, 501 without rasterio.
        """
        import_rasterio()
        self._at_work = [future for future in self._at_work if not future.done()]
        if len(self._at_work) >= self.settings.max_scenes:
            raise overloaded(f"{len(self._at_work)} scenes are being translated already", 5)
        cancelled = threading.Event()

        def work() -> Translated:
            with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
                order = SceneOrder(model, options, Path(folder) / scene_name(name), cancelled)
                order.scene.write_bytes(data)
                check(order.scene, self.settings.max_scene_pixels)
                facts, forward_s = self.translate(order)
                optical = order.optical.read_bytes() if output_format == "geotiff" else b""
                if not optical:
                    from distillers.sar.raster import preview

                    whole = preview(order.optical, max(facts.height, facts.width))
                    optical = encode(whole, output_format, quality)
                spread = order.uncertainty.read_bytes() if options.samples > 1 else None
                return Translated(facts, forward_s, optical, spread, *self.previews(order, facts))

        self._at_work.append(future := self._pool.submit(work))
        try:
            return await asyncio.wrap_future(future)
        finally:
            cancelled.set()

    def translate(
        self, order: SceneOrder, progress: Callable[[int, int], None] | None = None
    ) -> tuple["SceneFacts", float]:
        """Translate a scene in the caller's thread, and return its facts and the seconds on the engine's.

        Raises:
            Cancelled: the order was cancelled.
            BadInput: a scene that cannot be translated.
        """
        from distillers.sar.tiles import TILE
        from distillers.sar.translate import translate

        def check() -> None:
            if order.cancelled.is_set():
                raise Cancelled

        lane = self.engine.lane(check)

        def forward(function: "Callable[[], Tensor]") -> "Tensor":
            with Pass(turn=lane.turn):
                return function()

        # On a CPU one tile runs and one waits, so that other requests wait for two tiles at most.
        limit = min(self.settings.max_batch, self.settings.max_pixels // TILE**2)
        batch = 2 if self.engine.device == "cpu" else max(1, limit)
        try:
            with import_rasterio().Env(**ENV):
                facts = translate(
                    order.model.generator,
                    order.scene,
                    order.optical,
                    replace(order.options, batch=batch),
                    progress=progress,
                    forward=forward,
                )
        except BadInput as error:
            raise _caller_error(error, order.scene.parent) from None
        facts.warnings = [_as_fields(warning) for warning in facts.warnings]
        return facts, lane.busy_s

    def previews(self, order: SceneOrder, facts: "SceneFacts") -> tuple[bytes, bytes]:
        """Return the result and the SAR as small PNG pictures of one size."""
        from distillers.sar.raster import preview

        optical = preview(order.optical, PREVIEW)
        sar = grey(order.scene, facts, order.options.nodata, (optical == 0).all(2))
        return encode(optical, "png"), encode(sar, "png")


def _hold(folder: Path) -> int | None:
    """Lock a folder for as long as this process lives, and return the descriptor; None where another process has it.

    Also None where the system has no such locks (Windows): then no folder counts as abandoned.
    """
    try:
        import fcntl
    except ImportError:
        return None
    descriptor = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _remove_abandoned(place: Path) -> None:
    """Remove the private folders of servers that were killed. Those of living ones are locked."""
    for folder in place.glob(f"{PREFIX}*"):
        try:
            held = _hold(folder)
        except OSError:  # no folder, or another's
            continue
        if held is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(held)
            log.info("%s, which a killed server had left, is removed", folder)


def _caller_error(error: BadInput, folder: Path) -> Exception:
    """Return the error with the form's field instead of the library's, and without paths of this machine."""
    if error.field == "out":
        log.error("%s", error)
        return no_room("the result")
    field = "image" if error.field == "scene" else error.field
    return BadInput(field, error.given, _as_fields(error.allowed).replace(f"{folder}/", ""))


def _as_fields(text: str) -> str:
    """Replace the names of the command's options by those of the form's fields."""
    return re.sub(r"--(?=bands|units|nodata)", "", text)
