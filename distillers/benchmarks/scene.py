"""What a whole scene costs over the bare forward pass on its tiles, and how much memory it takes by size.

Bare: the same tiles, ready in memory, through the same network in the same threads, and nothing else: no reading, no
noise, no blending, no writing. Scene: from file to file. Both take turns, so a busy minute hits both. Overlap makes a
network see more pixels than a scene has; that is stated apart, for it buys the absence of seams.
"""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from distillers.errors import BadInput
from distillers.evaluation.report import markdown_table, setting
from distillers.generator import Generator
from distillers.models.radiometry import Radiometry
from distillers.sar.demonstration import demonstration
from distillers.sar.options import SceneOptions
from distillers.sar.raster import import_rasterio
from distillers.sar.tiles import TILE
from distillers.sar.translate import lanes_and_batch, one_thread, translate

PART = 1024  # px; larger scenes repeat one of this side
COMMAND = "from distillers.benchmarks.scene import one; one()"


@dataclass(kw_only=True)
class Size:
    """One size of scene."""

    side: int
    tiles: int
    megapixels_per_second: float  # of the scene, overlap and all
    tile_megapixels_per_second: float  # that the network saw
    bare_megapixels_per_second: float
    ratio: float  # tile over bare, the median of rounds
    overlap: float  # pixels seen over pixels of the scene
    peak_mb: float  # of a process that translates this scene and does nothing else
    idle_mb: float  # of one that has only opened the model


@dataclass(kw_only=True)
class Throughput:
    """All sizes, and with what."""

    model: str
    steps: int
    batch: int
    setting: dict[str, Any]
    rounds: int
    sizes: list[Size]


def measure(
    folder: Path, sides: list[int], *, rounds: int = 3, steps: int | None = None, device: str = "cpu"
) -> Throughput:
    """Translate made-up scenes of these sides with a model and time its bare passes in between.

    Raises:
        BadInput: sides below 256, no rounds.
    """
    if min(sides) < TILE or rounds < 1:
        raise BadInput("sides, rounds", (sides, rounds), f"sides of {TILE} or more, 1 round or more")
    generator = Generator.from_pretrained(folder, device)
    count = len(generator.times(steps))
    lanes, batch = lanes_and_batch(generator, None)
    with tempfile.TemporaryDirectory() as place:
        found = [_size(generator, folder, side, rounds, count, Path(place)) for side in sorted(sides)]
    return Throughput(
        model=generator.info.name, steps=count, batch=lanes * batch, setting=setting(device), rounds=rounds, sizes=found
    )


def _size(generator: Generator, folder: Path, side: int, rounds: int, steps: int, place: Path) -> Size:
    scene, out = place / f"{side}.tif", place / "out.tif"
    _scene(scene, side)
    device = str(next(generator.parameters()).device)
    idle, peak = (_peak(folder, device, steps, scene, out if work else None) for work in (False, True))
    ratios, ours, bares = [], [], []
    for _ in range(rounds):
        bare = _bare(generator, steps)
        facts = translate(generator, scene, out, SceneOptions(steps=steps))
        bare = (bare + _bare(generator, steps)) / 2
        seen = facts.tiles * facts.tile[0] * facts.tile[1] / 1e6
        ours.append(facts.megapixels_per_second)
        bares.append(bare)
        ratios.append(seen / facts.seconds / bare)
    overlap = seen / (side * side / 1e6)
    return Size(
        side=side,
        tiles=facts.tiles,
        megapixels_per_second=median(ours),
        tile_megapixels_per_second=median(ours) * overlap,
        bare_megapixels_per_second=median(bares),
        ratio=median(ratios),
        overlap=overlap,
        peak_mb=peak,
        idle_mb=idle,
    )


def _bare(generator: Generator, steps: int, seconds: float = 4.0) -> float:
    """Megapixels a second of the network and nothing else, on tiles that lie ready, for a few seconds."""
    lanes, batch = lanes_and_batch(generator, None)
    device, codec = next(generator.parameters()).device, generator.codec
    channels, side = Radiometry.of(generator.info.sar).channels, TILE // codec.factor
    noise = torch.randn(batch, codec.channels(3), side, side, device=device)
    sar = torch.rand(batch, channels, TILE, TILE, device=device) * 2 - 1

    def once(_: int) -> None:
        with torch.inference_mode():
            cond = generator.encode_condition(sar=sar)
            generator.codec.decode(generator(noise, cond, steps, iter(lambda: noise, None))).float().cpu()

    with ThreadPoolExecutor(lanes, initializer=one_thread if device.type == "cpu" else None) as pool:
        list(pool.map(once, range(2 * lanes)))
        started, calls = time.perf_counter(), 0
        while time.perf_counter() - started < seconds:
            list(pool.map(once, range(4 * lanes)))
            calls += 4 * lanes
        spent = time.perf_counter() - started
    return calls * batch * TILE * TILE / spent / 1e6


def _scene(path: Path, side: int) -> None:
    """A made-up scene without holes, of any side: one part, mirrored into the next."""
    rasterio = import_rasterio()
    part = path.with_name("part.tif")
    demonstration(part, min(side, PART))
    with rasterio.open(part) as raster:
        values, profile = raster.read(), raster.profile
    values[~(values == values)] = -15.0
    profile |= {"width": side, "height": side, "nodata": None, "bigtiff": "if_safer", "compress": None}
    with rasterio.open(path, "w", **profile) as raster:
        raster.descriptions = ("VV", "VH")
        for top in range(0, side, PART):
            for left in range(0, side, PART):
                height, width = min(PART, side - top), min(PART, side - left)
                window = rasterio.windows.Window(left, top, width, height)
                raster.write(values[:, :height, :width], window=window)


def _peak(folder: Path, device: str, steps: int, scene: Path, out: Path | None) -> float:
    """Megabytes of memory at most, of a process of its own."""
    told = json.dumps([str(folder), device, steps, str(scene), str(out) if out else None])
    done = subprocess.run([sys.executable, "-c", COMMAND, told], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BadInput("scene", scene.name, f"a scene that translates ({done.stderr.strip().splitlines()[-1:]})")
    return float(done.stdout.strip().splitlines()[-1])


def one() -> None:
    """In a process of its own: open a model, translate a scene if there is an output, print the peak memory in MB."""
    folder, device, steps, scene, out = json.loads(sys.argv[1])
    generator = Generator.from_pretrained(folder, device)
    if out is not None:
        translate(generator, scene, out, SceneOptions(steps=steps))
    else:
        _bare(generator, steps, 0.1)
    print(peak_mb())


def peak_mb() -> float:
    """Of this process since it was started; getrusage would also count what its parent held when it was forked."""
    status = Path("/proc/self/status")
    if not status.is_file():  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return float(re.findall(r"VmHWM:\s+(\d+)", status.read_text())[0]) / 1024


def table(found: Throughput) -> str:
    """Markdown."""
    columns = [
        ("scene, px", lambda s: f"{s.side} x {s.side}", ""),
        ("tiles", lambda s: s.tiles, ""),
        ("scene Mpx/s", lambda s: s.megapixels_per_second, ".3f"),
        ("tile Mpx/s", lambda s: s.tile_megapixels_per_second, ".3f"),
        ("bare Mpx/s", lambda s: s.bare_megapixels_per_second, ".3f"),
        ("tile / bare", lambda s: s.ratio, ".3f"),
        ("overlap", lambda s: s.overlap, ".2f"),
        ("peak MB", lambda s: s.peak_mb, ".0f"),
        ("of it model and libraries", lambda s: s.idle_mb, ".0f"),
    ]
    s, plural = found.setting, "s" * (found.steps > 1)
    lines = [
        markdown_table(columns, found.sizes),
        "",
        f"{found.model}, {found.steps} step{plural}, tiles of {TILE} px, {found.batch} at a time, medians of "
        f"{found.rounds} rounds in which scene and bare passes took turns; {s['device']}, torch {s['torch']}, "
        f"{s['date']}.",
        "Bare: the network on the same tiles lying ready, in the same threads. Overlap: pixels that the network sees",
        "for each pixel of the scene.",
    ]
    return "\n".join(lines) + "\n"
