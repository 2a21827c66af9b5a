"""Commands that measure what something costs: benchmark training, scene, serving, soak."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from distillers.cli.arguments import Device, Steps, Weights, benchmarks, check_json_name, device_of, step_counts
from distillers.errors import BadInput


@benchmarks.command("training")
def benchmark_training(
    recipes: Annotated[list[str], typer.Argument(help="TOML files or names of shipped recipes.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="key=value for every recipe, e.g. train.batch=8; repeatable.")
    ] = None,
    iterations: Annotated[int, typer.Option(help="Iterations to time.")] = 10,
    progress: Annotated[float, typer.Option(help="Where in the training, 0 to 1: curricula change the work.")] = 0.9,
    compiled: Annotated[bool, typer.Option("--compiled", help="Run the networks by torch.compile.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="A .json to write, with the table in a .md beside it.", show_default=False)
    ] = None,
    device: Device = "auto",
) -> None:
    """Time one training iteration of each recipe against the network passes that it cannot avoid.

    Example: `fewstep benchmark training eurosat-consistency shapes-consistency --set train.batch=8 --out cost.json`.
    """
    import json
    from dataclasses import asdict

    from distillers.benchmarks.training import measure, table
    from distillers.jobs.recipe import Recipe

    if out is not None and out.suffix != ".json":
        raise BadInput("out", str(out), "a name that ends in .json")
    place = "cpu" if device_of(device) == "cpu" else None
    plans = [Recipe.load(recipe, overrides) for recipe in recipes]
    costs = [measure(plan, iterations=iterations, progress=progress, device=place, compiled=compiled) for plan in plans]
    typer.echo(table(costs))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps([asdict(cost) for cost in costs], indent=2) + "\n")
        out.with_suffix(".md").write_text(table(costs))


@benchmarks.command("scene")
def benchmark_scene(
    model: Annotated[Path, typer.Argument(help="A weights folder of sar-to-optical.", show_default=False)],
    sides: Annotated[str, typer.Option(help="Pixels a side of the scenes, with commas.")] = "1024,4096",
    rounds: Annotated[int, typer.Option(help="Scene and bare passes, in turn, so many times.")] = 3,
    steps: Steps = None,
    out: Annotated[
        Path | None, typer.Option(help="A .json to write, with the table in a .md beside it.", show_default=False)
    ] = None,
    device: Device = "auto",
) -> None:
    """Hold the throughput of whole scenes against the bare forward pass on the same tiles; show memory by size.

    Example: `fewstep benchmark scene weights/sar-optical-db-consistency --sides 1024,4096,16384 --out scene.json`.
    """
    import json
    from dataclasses import asdict

    from distillers.benchmarks.scene import measure, table

    if out is not None and out.suffix != ".json":
        raise BadInput("out", str(out), "a name that ends in .json")
    found = measure(model, step_counts("sides", sides), rounds=rounds, steps=steps, device=device_of(device))
    typer.echo(table(found))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(asdict(found), indent=2) + "\n")
        out.with_suffix(".md").write_text(table(found))


@benchmarks.command("serving")
def benchmark_serving(
    models: Annotated[list[Path], typer.Argument(help="Weights folders, each a workload.", show_default=False)],
    systems: Annotated[str | None, typer.Option(help="Which, with commas; all when left out.")] = None,
    constant: Annotated[
        bool, typer.Option("--constant/--no-constant", help="Also a constant picture without a forward pass.")
    ] = True,
    rounds: Annotated[int, typer.Option(help="All systems take turns so many times.")] = 3,
    seconds: Annotated[
        float, typer.Option(help="Of each closed loop, and up to four times that; twice as long an open one.")
    ] = 0.5,
    concurrency: Annotated[str, typer.Option(help="Callers of the closed loops, with commas.")] = "1,2,4,8,16,32",
    load: Annotated[str, typer.Option(help="Percent of the raw loop that open loops ask.")] = "50,80,95,120",
    burst: Annotated[
        bool, typer.Option("--burst/--no-burst", help="With the first model: recovery from 2 s at 400 %.")
    ] = True,
    pinned: Annotated[
        bool, typer.Option("--pinned/--unpinned", help="Servers on one processor and the client on another.")
    ] = True,
    batch: Annotated[int, typer.Option(help="Pictures in a forward pass at most, of all that batch.")] = 16,
    device: Device = "cpu",
    dtype: Annotated[str, typer.Option(help="Of the raw loop and the peers; ours chooses.")] = "float32",
    environments: Annotated[Path, typer.Option(help="Where the peers are installed, by pip.")] = Path("runs/peers"),
    out: Annotated[
        Path | None, typer.Option(help="A .json to write; tables in a .md, the plot in a .png.", show_default=False)
    ] = None,
) -> None:
    """Hold our server and its peers against the bare forward pass: throughput, latency, CPU, every picture checked.

    Example: `fewstep benchmark serving weights/eurosat-consistency --systems fewstep,litserve --out serving.json`.
    """
    import json

    from distillers.benchmarks.serving.report import plot, table
    from distillers.benchmarks.serving.servers import chosen
    from distillers.benchmarks.serving.serving import Plan, measure

    check_json_name(out)
    plan = Plan(
        folders=models, systems=chosen(systems.split(",") if systems else None), constant=constant, rounds=rounds,
        seconds=seconds, callers=step_counts("concurrency", concurrency), loads=step_counts("load", load), burst=burst,
        pinned=pinned, environments=environments, device=device_of(device), dtype=dtype,
        batch=batch,
    )  # fmt: skip
    for found in measure(plan, lambda line: typer.echo(line, err=True)):
        if out is None:
            continue
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=1) + "\n")
        plot(found, out.with_suffix(".png"))
        page = f"# Servers side by side\n\n{table(found)}\n![images a second]({out.stem}.png)\n"
        out.with_suffix(".md").write_text(page)
    typer.echo(table(found))


@benchmarks.command("soak")
def benchmark_soak(
    model: Weights,
    minutes: Annotated[float, typer.Option(help="How long.")] = 10,
    load: Annotated[int, typer.Option(help="Percent of what the server can give.")] = 80,
    system: Annotated[str, typer.Option(help="Ours, ours untuned (fewstep-eager), or a peer.")] = "fewstep",
    pinned: Annotated[
        bool, typer.Option("--pinned/--unpinned", help="The server on one processor and the client on another.")
    ] = True,
    out: Annotated[
        Path | None, typer.Option(help="A .json to write, with the table in a .md beside it.", show_default=False)
    ] = None,
) -> None:
    """Keep a server at work and watch its memory and latency; exit code 1 if memory grows or a picture is wrong.

    Example: `fewstep benchmark soak weights/eurosat-consistency --minutes 60 --out soak.json`.
    """
    import json

    from distillers.benchmarks.serving.report import soak_table
    from distillers.benchmarks.serving.servers import Unavailable, chosen
    from distillers.benchmarks.serving.serving import soak

    check_json_name(out)
    try:
        found = soak(
            model, *chosen([system]), minutes=minutes, load=load, pinned=pinned,
            say=lambda line: typer.echo(line, err=True),
        )  # fmt: skip
    except Unavailable as error:
        typer.echo(f"{system} {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(soak_table(found))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=1) + "\n")
        out.with_suffix(".md").write_text(f"# A long run\n\n{soak_table(found)}")
    if not (found["memory"]["flat"] and found["alive"]) or any(minute["wrong"] for minute in found["minutes"]):
        raise typer.Exit(1)
