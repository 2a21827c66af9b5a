"""Measure the throughput of whole scenes beside the bare forward pass on their tiles, and the memory they take.

A bare pass runs tiles that lie in memory through the same network in the same threads: no reading, no noise, no
blending, no writing. A scene goes from file to file. Both take turns, so a busy minute hits both. Overlap makes a
network process more pixels than a scene has; it buys the absence of seams and is stated apart.
"""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
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
HEIGHT = 512  # px, of scenes that are translated for their memory: three rows of tiles
HOLE = -9999.0
COMMAND = "from distillers.benchmarks.scene import translate_once; translate_once()"


@dataclass(kw_only=True)
class SceneSpeed:
    """Hold the figures of one size of scene."""

    side: int
    tiles: int
    megapixels_per_second: float  # of the scene, overlap and all
    tile_megapixels_per_second: float  # that the network saw
    bare_megapixels_per_second: float
    ratio: float  # tile over bare, the median of rounds
    overlap: float  # pixels of all tiles over pixels of the scene
    peak_mb: float  # of a process that translates this scene and does nothing else
    idle_mb: float  # of one that has only opened the model


@dataclass(kw_only=True)
class SceneMemory:
    """Hold the memory of a process that translates a scene of one width with so many samples, and does nothing else."""

    width: int
    height: int
    samples: int
    above_mb: float  # its peak above that of a process that has opened the model and called it once


@dataclass(kw_only=True)
class SceneSpeeds:
    """Hold the figures of all sizes, with the model and the machine they were measured on."""

    model: str
    steps: int
    batch: int
    setting: dict[str, Any]
    rounds: int
    sizes: list[SceneSpeed]
    memory: list[SceneMemory]


def measure(
    folder: Path,
    sides: list[int],
    *,
    rounds: int,
    widths: Sequence[int] = (),
    samples: Sequence[int] = (1,),
    steps: int | None = None,
    device: str = "cpu",
) -> SceneSpeeds:
    """Translate made-up scenes of these sides with a model and time its bare passes in between.

    Then translate scenes of these widths and HEIGHT, with each of these numbers of samples, for their memory alone.

    Raises:
        BadInput: sides or widths below 256, no rounds, no samples or too many.
    """
    if min([*sides, *widths]) < TILE or rounds < 1:
        raise BadInput("sides, rounds", ([*sides, *widths], rounds), f"sides of {TILE} or more, 1 round or more")
    for number in samples:
        SceneOptions(samples=number)
    generator = Generator.from_pretrained(folder, device)
    count = len(generator.times(steps))
    lanes, batch = lanes_and_batch(generator, None)
    with tempfile.TemporaryDirectory() as place:
        sizes = [_measure_side(generator, folder, side, rounds, count, Path(place)) for side in sorted(sides)]
        memory = _measure_memory(folder, device, count, sorted(widths), sorted(samples), Path(place))
    return SceneSpeeds(
        model=generator.info.name,
        steps=count,
        batch=lanes * batch,
        setting=setting(device),
        rounds=rounds,
        sizes=sizes,
        memory=memory,
    )


def _measure_side(generator: Generator, folder: Path, side: int, rounds: int, steps: int, place: Path) -> SceneSpeed:
    """Measure scenes of one side in pixels; `place` takes their files."""
    scene, out = place / f"{side}.tif", place / "out.tif"
    _scene(scene, side, side)
    device = str(next(generator.parameters()).device)
    idle, peak = (_peak(folder, device, steps, 1, scene, out if work else None) for work in (False, True))
    ratios, ours, bares = [], [], []
    for _ in range(rounds):
        bare = _bare(generator, steps)
        facts = translate(generator, scene, out, SceneOptions(steps=steps))
        bare = (bare + _bare(generator, steps)) / 2
        tiled = facts.tiles * facts.tile[0] * facts.tile[1] / 1e6
        ours.append(facts.megapixels_per_second)
        bares.append(bare)
        ratios.append(tiled / facts.seconds / bare)
    overlap = tiled / (side * side / 1e6)
    return SceneSpeed(
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


def _measure_memory(
    folder: Path, device: str, steps: int, widths: Sequence[int], samples: Sequence[int], place: Path
) -> list[SceneMemory]:
    """Measure what scenes of HEIGHT take; beyond PART pixels they are holes, which take the same and no time."""
    found = []
    for width in widths:
        _scene(place / "wide.tif", width, HEIGHT, holes=True)
        for number in samples:
            idle, peak = (
                _peak(folder, device, steps, number, place / "wide.tif", place / "out.tif" if work else None)
                for work in (False, True)
            )
            found.append(SceneMemory(width=width, height=HEIGHT, samples=number, above_mb=peak - idle))
    return found


def _bare(generator: Generator, steps: int, seconds: float = 4.0) -> float:
    """Return the megapixels a second of the network alone, on tiles that lie in memory, over so many seconds."""
    lanes, batch = lanes_and_batch(generator, None)
    device, codec = next(generator.parameters()).device, generator.codec
    channels, side = Radiometry.of(generator.info.sar).channels, TILE // codec.factor
    noise = torch.randn(batch, codec.channels(generator.info.channels), side, side, device=device)
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


def _scene(path: Path, width: int, height: int, holes: bool = False) -> None:
    """Write a made-up scene of any size by repeating one part; with holes, all but the first of them is one."""
    rasterio = import_rasterio()
    part = path.with_name("part.tif")
    demonstration(part, min(max(width, height), PART))
    with rasterio.open(part) as raster:
        values, profile = raster.read(), raster.profile
    values[~(values == values)] = -15.0
    profile |= {"width": width, "height": height, "nodata": HOLE if holes else None, "bigtiff": "if_safer"}
    with rasterio.open(path, "w", **profile | {"compress": "deflate" if holes else None}) as raster:
        raster.descriptions = ("VV", "VH")
        for top in range(0, height, PART):
            for left in range(0, width, PART):
                window = rasterio.windows.Window(left, top, min(PART, width - left), min(PART, height - top))
                piece = values[:, : window.height, : window.width]
                raster.write(np.full_like(piece, HOLE) if holes and left else piece, window=window)


def _peak(folder: Path, device: str, steps: int, samples: int, scene: Path, out: Path | None) -> float:
    """Return the peak memory in MB of a process of its own that translates the scene, or only opens the model."""
    options = json.dumps([str(folder), device, steps, samples, str(scene), str(out) if out else None])
    done = subprocess.run([sys.executable, "-c", COMMAND, options], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BadInput("scene", scene.name, f"a scene that translates ({done.stderr.strip().splitlines()[-1:]})")
    return float(done.stdout.strip().splitlines()[-1])


def translate_once() -> None:
    """Open a model, translate a scene if there is an output, and print the peak memory of this process in MB."""
    folder, device, steps, samples, scene, out = json.loads(sys.argv[1])
    generator = Generator.from_pretrained(folder, device)
    if out is not None:
        translate(generator, scene, out, SceneOptions(steps=steps, samples=samples))
    else:
        _bare(generator, steps, 0.1)
    print(peak_mb())


def peak_mb() -> float:
    """Return the peak memory of this process in MB; getrusage would also count what its parent held at the fork."""
    status = Path("/proc/self/status")
    if not status.is_file():  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return float(re.findall(r"VmHWM:\s+(\d+)", status.read_text())[0]) / 1024


def table(speeds: SceneSpeeds) -> str:
    """Write the figures as a Markdown table with its conditions under it."""
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
    s, plural = speeds.setting, "s" * (speeds.steps > 1)
    lines = [
        markdown_table(columns, speeds.sizes),
        "",
        f"{speeds.model}, {speeds.steps} step{plural}, tiles of {TILE} px, {speeds.batch} at a time, medians of "
        f"{speeds.rounds} rounds in which scene and bare passes took turns; {s['device']}, torch {s['torch']}, "
        f"{s['date']}.",
        "Bare: the network on the same tiles lying ready, in the same threads. Overlap: pixels that the network sees",
        "for each pixel of the scene.",
    ]
    if speeds.memory:
        widths = [
            ("scene, px", lambda m: f"{m.width} x {m.height}", ""),
            ("samples", lambda m: m.samples, ""),
            ("MB above model and libraries", lambda m: m.above_mb, ".0f"),
        ]
        lines += [
            "",
            markdown_table(widths, speeds.memory),
            "",
            "Peak memory of a process that does nothing else, above one that has called the model once. All but "
            f"{PART} px of these scenes are holes, which take as much memory and no time.",
        ]
    return "\n".join(lines) + "\n"
