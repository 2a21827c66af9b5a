"""Commands that measure what something costs: benchmark training, scene, serving, soak."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from distillers.benchmarks.serving.plan import SYSTEMS, Plan, find_systems
from distillers.cli.arguments import Device, Steps, Table, Weights, device_of, step_counts
from distillers.errors import check_file

Pinned = Annotated[
    bool, typer.Option("--pinned/--unpinned", help="The server on one processor and the client on another.")
]


def training(
    recipes: Annotated[list[str], typer.Argument(help="TOML files or names of shipped recipes.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="key=value for every recipe, e.g. train.batch=8; repeatable.")
    ] = None,
    iterations: Annotated[int, typer.Option(help="Iterations to time.")] = 10,
    progress: Annotated[float, typer.Option(help="Where in the training, 0 to 1: curricula change the work.")] = 0.9,
    compiled: Annotated[bool, typer.Option("--compiled", help="Run the networks by torch.compile.")] = False,
    out: Table = None,
    device: Device = "auto",
) -> None:
    """Time one training iteration of each recipe against the network passes that it cannot avoid.

    Example: `fewstep benchmark training eurosat-consistency shapes-consistency --set train.batch=8 --out cost.json`.
    """
    from distillers.benchmarks.training import measure, table
    from distillers.jobs.recipe import Recipe

    _check(out)
    place = "cpu" if device_of(device) == "cpu" else None
    opened = [Recipe.load(recipe, overrides) for recipe in recipes]
    costs = [
        measure(recipe, iterations=iterations, progress=progress, device=place, compiled=compiled) for recipe in opened
    ]
    typer.echo(table(costs))
    _write(out, [asdict(cost) for cost in costs], table(costs))


def scene(
    model: Annotated[Path, typer.Argument(help="A weights folder of sar-to-optical.", show_default=False)],
    sides: Annotated[str, typer.Option(help="Pixels a side of the scenes, with commas.")] = "1024,4096",
    rounds: Annotated[int, typer.Option(help="Scene and bare passes, in turn, so many times.")] = 3,
    widths: Annotated[
        str | None, typer.Option(help="Also the memory of scenes so many pixels wide, with commas.", show_default=False)
    ] = None,
    samples: Annotated[str, typer.Option(help="With --widths: samples, with commas.")] = "1,16",
    steps: Steps = None,
    out: Table = None,
    device: Device = "auto",
) -> None:
    """Hold the throughput of whole scenes against the bare forward pass on the same tiles; show memory by size.

    Example: `fewstep benchmark scene weights/sar-optical-db-consistency --widths 2048,8192,30000 --out scene.json`.
    """
    from distillers.benchmarks.scene import measure, table

    _check(out)
    speeds = measure(
        model,
        step_counts("sides", sides),
        rounds=rounds,
        widths=step_counts("widths", widths) if widths else (),
        samples=step_counts("samples", samples),
        steps=steps,
        device=device_of(device),
    )
    typer.echo(table(speeds))
    _write(out, asdict(speeds), table(speeds))


def serving(
    models: Annotated[list[Path], typer.Argument(help="Weights folders, each a workload.", show_default=False)],
    systems: Annotated[str | None, typer.Option(help="Which, with commas; all when left out.")] = None,
    constant: Annotated[
        bool, typer.Option("--constant/--no-constant", help="Also a constant picture without a forward pass.")
    ] = Plan.constant,
    rounds: Annotated[int, typer.Option(help="All systems take turns so many times.")] = Plan.rounds,
    seconds: Annotated[
        float, typer.Option(help="Of each closed loop, and up to four times that; twice as long an open one.")
    ] = Plan.seconds,
    concurrency: Annotated[str, typer.Option(help="Callers of the closed loops, with commas.")] = ",".join(
        map(str, Plan.callers)
    ),
    load: Annotated[str, typer.Option(help="Percent of the raw loop that open loops ask.")] = ",".join(
        map(str, Plan.loads)
    ),
    burst: Annotated[
        bool, typer.Option("--burst/--no-burst", help="With the first model: recovery from 2 s at 400 %.")
    ] = Plan.burst,
    pinned: Annotated[
        bool, typer.Option("--pinned/--unpinned", help="Servers on one processor and the client on another.")
    ] = Plan.pinned,
    batch: Annotated[int, typer.Option(help="Pictures in a forward pass at most, of all that batch.")] = Plan.batch,
    device: Device = Plan.device,
    dtype: Annotated[str, typer.Option(help="Of the raw loop and the peers; ours chooses.")] = Plan.dtype,
    environments: Annotated[Path, typer.Option(help="Where the peers are installed, by pip.")] = Plan.environments,
    out: Annotated[
        Path | None, typer.Option(help="A .json to write; tables in a .md, the plot in a .png.", show_default=False)
    ] = None,
) -> None:
    """Hold our server and its peers against the bare forward pass: throughput, latency, CPU, every picture checked.

    Example: `fewstep benchmark serving weights/eurosat-consistency --systems fewstep,litserve --out serving.json`.
    """
    from distillers.benchmarks.serving.measure import measure
    from distillers.benchmarks.serving.tables import plot, table

    _check(out)
    plan = Plan(
        folders=models,
        systems=find_systems(systems.split(",")) if systems else SYSTEMS,
        constant=constant,
        rounds=rounds,
        seconds=seconds,
        callers=step_counts("concurrency", concurrency),
        loads=step_counts("load", load),
        burst=burst,
        pinned=pinned,
        environments=environments,
        device=device_of(device),
        dtype=dtype,
        batch=batch,
    )
    for figures in measure(plan, _say):
        if out is not None:
            page = f"# Servers side by side\n\n{table(figures)}\n![images a second]({out.stem}.png)\n"
            _write(out, figures, page, indent=1)
            plot(figures, out.with_suffix(".png"))
    typer.echo(table(figures))


def soak(
    model: Weights,
    minutes: Annotated[float, typer.Option(help="How long.")] = 10,
    load: Annotated[int, typer.Option(help="Percent of what the server can give.")] = 80,
    system: Annotated[str, typer.Option(help="Ours, ours untuned (fewstep-eager), or a peer.")] = "fewstep",
    pinned: Pinned = Plan.pinned,
    out: Table = None,
) -> None:
    """Keep a server at work and watch its memory and latency; exit code 1 if memory grows or a picture is wrong.

    Example: `fewstep benchmark soak weights/eurosat-consistency --minutes 60 --out soak.json`.
    """
    from distillers.benchmarks.serving.measure import soak as measure
    from distillers.benchmarks.serving.servers import Unavailable
    from distillers.benchmarks.serving.tables import soak_table

    _check(out)
    try:
        figures = measure(
            Plan(folders=[model], systems=find_systems([system]), constant=False, pinned=pinned), minutes, load, _say
        )
    except Unavailable as error:
        typer.echo(f"{system} {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(soak_table(figures))
    _write(out, figures, f"# A long run\n\n{soak_table(figures)}", indent=1)
    if not (figures["memory"]["flat"] and figures["alive"]) or any(minute["wrong"] for minute in figures["minutes"]):
        raise typer.Exit(1)


def _say(line: str) -> None:
    """Print a line about progress on stderr."""
    typer.echo(line, err=True)


def _check(out: Path | None) -> None:
    """Check the name of a table before it takes minutes to fill."""
    if out is not None:
        check_file(out, ".json")


def _write(out: Path | None, figures: Any, page: str, indent: int = 2) -> None:
    """Write figures as JSON and a page of Markdown beside them, if a file was named."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(figures, indent=indent) + "\n")
        out.with_suffix(".md").write_text(page)
