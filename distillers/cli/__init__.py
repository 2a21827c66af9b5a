"""`fewstep`: arguments in, one call of the library, readable errors out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from distillers.errors import BadInput
from distillers.runtime import prepare_process

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="""Make diffusion models answer in one step: **distill** a teacher into a weights folder, look at what it
    **generate**s or **translate**s, **evaluate** what the speed cost, and **serve** it over HTTP.

    Start with `fewstep run`: it distils a small teacher on this machine, measures it and serves it.""",
)

benchmarks = typer.Typer(no_args_is_help=True, help="Measure what something costs beside what it cannot avoid.")
app.add_typer(benchmarks, name="benchmark")

Weights = Annotated[
    Path, typer.Argument(help="A weights folder, such as weights/eurosat-consistency.", show_default=False)
]
Steps = Annotated[int | None, typer.Option(help="Network calls per picture; the folder's default if left out.")]
Seed = Annotated[int, typer.Option(help="Picture i uses seed + i.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ... or auto.", envvar="FEWSTEP_DEVICE")]
Root = Annotated[Path, typer.Option("--weights", help="Where published folders are.", envvar="FEWSTEP_WEIGHTS")]


@app.command()
def distill(
    recipe: Annotated[
        str, typer.Argument(help="A recipe: a TOML file, or the name of a shipped one (`fewstep methods`).")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="key=value, e.g. train.batch=32 teacher=weights/mine", metavar="[KEY=VALUE]..."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The folder to make; weights/<name of the recipe> if left out.")
    ] = None,
    device: Device = "auto",
) -> None:
    """Train what a recipe describes and publish it as a weights folder.

    Stop it whenever you like: the same command goes on from its last checkpoint (under OUT/training). A recipe of
    several students trains them one after another and merges them; with `multi_student.student=1` that one alone.

    Examples: `fewstep distill eurosat-consistency`,
    `fewstep distill weights/eurosat-consistency/recipe.toml train.seed=1 --out weights/second`.
    """
    from accelerate import PartialState

    from distillers.jobs.distill import distill as make
    from distillers.jobs.distill import named
    from distillers.jobs.recipe import Recipe

    plan = named(Recipe.load(recipe, overrides))
    folder = out or Path("weights") / plan.name
    if device not in ("auto", "cpu", "cuda"):
        raise BadInput("device", device, "auto, cpu or cuda; CUDA_VISIBLE_DEVICES says which GPU")
    make(plan, folder, "cpu" if _device(device) == "cpu" else None)
    is_main = PartialState().is_main_process
    PartialState().destroy_process_group()
    if not is_main:
        return
    typer.echo(f"{folder}: {len(list(folder.rglob('*')))} files; samples in {folder / 'grid.png'}")


@app.command()
def publish(
    run: Annotated[Path, typer.Argument(help="The OUT folder of a `fewstep distill`.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="The weights folder to make.", show_default=False)],
    which: Annotated[str, typer.Option(help="last, or best: by the watch's Frechet distance.")] = "last",
) -> None:
    """Publish a training as it stands, whether it is still running, was stopped or has ended.

    Example: `fewstep publish runs/eurosat-teacher weights/eurosat-teacher --which best`.
    """
    from distillers.jobs.distill import publish_run

    typer.echo(f"{out}: {publish_run(run, out, which)}; samples in {out / 'grid.png'}")


@app.command()
def merge(
    students: Annotated[list[Path], typer.Argument(help="The folders of all students.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The folder to make.", show_default=False)],
) -> None:
    """Make one folder of the students of one recipe: every class is drawn by the student that has it.

    Example: `fewstep merge weights/mine-student-0 weights/mine-student-1 --out weights/mine`.
    """
    from distillers.jobs.distill import merge as make

    make(students, out)
    typer.echo(f"{out}: {len(students)} students; samples in {out / 'grid.png'}")


@app.command()
def adopt(
    pipeline: Annotated[str, typer.Argument(help="A diffusers pipeline: a folder or a hub id.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="The weights folder to make.", show_default=False)],
    steps: Annotated[
        str | None,
        typer.Option(help="Of a few-step model: the steps it was distilled for, with commas.", show_default=False),
    ] = None,
    sampler: Annotated[
        str, typer.Option(help="consistency re-noises between steps (LCM, Turbo); ddim does not.")
    ] = "consistency",
    guidance: Annotated[
        float | None, typer.Option(help="Scale; 1 with --steps, else the pipeline's own.", show_default=False)
    ] = None,
) -> None:
    """Make a folder that can be served out of a pipeline that others have trained, at float16.

    Example: `fewstep adopt stabilityai/sdxl-turbo weights/sdxl-turbo --steps 1,2,4`.
    """
    from distillers.jobs.publish import adopt as make

    name = make(pipeline, out, _counts("steps", steps) if steps else [], sampler, guidance)
    typer.echo(f"{out}: {name}")


@app.command()
def generate(
    weights: Weights,
    out: Annotated[Path, typer.Option(help="A PNG; several pictures become one grid.")] = Path("sample.png"),
    n: Annotated[int, typer.Option(help="How many pictures.")] = 1,
    label: Annotated[str | None, typer.Option(help="Class by name or number; classes in turn if left out.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What a text-to-image model is to draw.")] = None,
    steps: Steps = None,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Draw pictures from a weights folder or any supported diffusers pipeline.

    Example: `fewstep generate weights/eurosat-consistency --label River --n 8 --steps 2 --out rivers.png`.
    """
    from distillers.evaluation.pictures import grid_png
    from distillers.generator import Generator

    if not 1 <= n <= 1024:
        raise BadInput("n", n, "1 to 1024")
    generator = Generator.from_pretrained(weights, _device(device))
    classes, chosen = generator.info.classes, None
    if label is not None:
        chosen = [_label(label, generator.info.labels)] * n
    elif classes:
        chosen = [classes[i % len(classes)] for i in range(n)]
    prompts = None if prompt is None and generator.prompts is None else [prompt or ""] * n
    pictures = generator.sample(range(seed, seed + n), labels=chosen, prompts=prompts, steps=steps)
    grid_png(pictures, columns=_columns(n), path=_png(out))
    typer.echo(
        f"{out}: {n} from {generator.info.name}, {steps or generator.info.default_steps} steps each, "
        f"seeds {seed} to {seed + n - 1}"
    )


@app.command()
def translate(
    sar: Annotated[
        Path, typer.Argument(help="A GeoTIFF of VV, VH or both; or one grey PNG or WebP.", show_default=False)
    ],
    out: Annotated[Path, typer.Argument(help="The GeoTIFF to write; for a picture a PNG.", show_default=False)],
    model: Annotated[
        Path, typer.Option(help="A weights folder of sar-to-optical.", envvar="FEWSTEP_TRANSLATOR")
    ] = Path("weights/sar-optical-db-consistency"),
    steps: Steps = None,
    samples: Annotated[
        int, typer.Option(help="Above 1: also OUT.uncertainty.tif: mean, deviation, quantiles over so many seeds.")
    ] = 1,
    units: Annotated[
        str, typer.Option(help="auto | db | linear | amplitude | dn. auto refuses when the values do not tell.")
    ] = "auto",
    bands: Annotated[
        str | None, typer.Option(help='"VV,VH", "2,1" or "VH=1"; by descriptions or the name if left out.')
    ] = None,
    nodata: Annotated[float | None, typer.Option(help="A number without data, beside NaN and the file's own.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed and scene give the same bytes.")] = 0,
    tile: Annotated[int | None, typer.Option(help="Pixels a side of the tiles; 256 if left out.")] = None,
    overlap: Annotated[int | None, typer.Option(help="Pixels; a quarter of a tile if left out, at most half.")] = None,
    batch: Annotated[int | None, typer.Option(help="Tiles at a time; cores on a CPU, 16 on a GPU if left out.")] = None,
    stac: Annotated[bool, typer.Option("--stac", help="Write a STAC item beside, OUT with .json.")] = False,
    preview: Annotated[Path | None, typer.Option(help="A PNG of the result, 2048 px at most.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all facts as JSON on stdout.")] = False,
    device: Device = "auto",
) -> None:
    """Translate a SAR scene to optical: a GeoTIFF of any size in, a Cloud-Optimised GeoTIFF on the same grid out.

    Colours are inferred, not measured; objects may be invented or missing. Files are written beside and renamed: a file
    that is there is whole.

    Example: `fewstep translate scene.tif optical.tif --samples 8`; without a scene: `fewstep demonstration scene.tif`.
    """
    import json
    from dataclasses import asdict

    from distillers.generator import Generator

    picture = sar.suffix.lower() not in (".tif", ".tiff")
    if preview is not None:
        _png(preview)
    if picture:
        _png(out)
    generator = Generator.from_pretrained(model, _device(device))
    if picture:
        _translate_picture(generator, sar, out, bands, seed, steps)
        return
    from distillers.progress import scene_bar
    from distillers.sar.raster import preview as small
    from distillers.sar.translate import Options, uncertainty_path
    from distillers.sar.translate import translate as translate_scene

    options = Options(
        steps=steps, seed=seed, samples=samples, units=units, bands=bands, nodata=nodata, tile=tile, overlap=overlap,
        batch=batch,
    )  # fmt: skip
    with scene_bar() as show:
        facts = translate_scene(generator, sar, out, options, stac=stac, progress=show)
    if preview is not None:
        from PIL import Image

        Image.fromarray(small(out)).save(preview)
    if as_json:
        typer.echo(json.dumps(asdict(facts), indent=2))
    else:
        used = ", ".join(f"{band} (band {i})" for band, i in facts.bands.items())
        typer.echo(
            f"{out}: {facts.width}x{facts.height} px, {facts.steps} step{'s' * (facts.steps > 1)}, "
            f"{facts.megapixels_per_second:.2f} Mpx/s; {facts.tiles} tiles, {facts.skipped} without data\n"
            f"read as {facts.units}: {facts.units_why}\nbands: {used}, {facts.bands_how}"
        )
        if facts.mean_deviation is not None:
            typer.echo(f"{uncertainty_path(out)}: mean deviation {facts.mean_deviation:.1f} levels of 255")
        if samples > 1 and (line := _calibrated(model)):
            typer.echo(line)
    for warning in facts.warnings:
        typer.echo(f"warning: {warning}", err=True)


def _translate_picture(generator: Any, sar: Path, out: Path, bands: str | None, seed: int, steps: int | None) -> None:
    """One grey picture, of the size a network takes at once."""
    from distillers.data import read_sar
    from distillers.evaluation.pictures import grid_png
    from distillers.models.radiometry import Radiometry
    from distillers.sar.translate import WARNING

    seen = read_sar(sar, Radiometry.of(generator.info.sar), bands)
    grid_png(generator.translate(seen, seed=seed, steps=steps), columns=1, path=out, gap=0)
    typer.echo(f"{out}: {seen.shape[-1]}x{seen.shape[-2]} px")
    typer.echo(f"warning: {WARNING}", err=True)


def _calibrated(model: Path) -> str | None:
    """What the folder's calibration says of its bands, in one line; None without one."""
    import json

    file = model / "calibration.json"
    if not file.is_file():
        return None
    told = json.loads(file.read_text())
    return (
        f"calibration on {told['n']} tiles of {told['data']}: spread over skill {told['spread_over_skill']:.2f}, 1 if "
        f"right; rank correlation of deviation and error {told['rank_correlation']:.2f}"
    )


@app.command()
def demonstration(
    out: Annotated[Path, typer.Argument(help="The GeoTIFF to write.", show_default=False)],
    side: Annotated[int, typer.Option(help="Pixels a side.")] = 512,
    seed: Annotated[int, typer.Option(help="Another seed, another place.")] = 0,
) -> None:
    """Make up a Sentinel-1 scene (VV and VH in dB, UTM) to try `fewstep translate` with. No real place.

    Example: `fewstep demonstration scene.tif`, then `fewstep translate scene.tif optical.tif --preview optical.png`.
    """
    from distillers.sar.demonstration import demonstration as make

    make(out, side, seed)
    typer.echo(f"{out}: {side}x{side} px of VV and VH in dB")


@app.command()
def evaluate(
    weights: Weights,
    n: Annotated[int, typer.Option(help="Pictures per row; more than the features (128).")] = 1000,
    steps: Annotated[str | None, typer.Option(help="e.g. 1,2,4,8; all published counts if left out.")] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Teacher folder; the one named in the folder, beside it, if left out.")
    ] = None,
    teacher_steps: Annotated[str, typer.Option(help="The teacher's rows, e.g. 50,250; empty for none.")] = "50",
    path: Annotated[Path | None, typer.Option(help="Data folder; the recipe's if left out.")] = None,
    pairs: Annotated[
        Path | None, typer.Option(help="Translators: any folder of SAR/optical pairs; its held-out scenes.")
    ] = None,
    pairs_option: Annotated[
        list[str] | None,
        typer.Option("--pairs-option", help="key=value, e.g. units=db bands=VV,VH size=64; repeatable."),
    ] = None,
    samples: Annotated[
        int, typer.Option(help="Translators: calibrate the deviation of so many samples; 0 to leave that out.")
    ] = 0,
    features: Annotated[
        str | None, typer.Option(help="eurosat-landcover, shapes, inception, inception:FILE, efficientnet or a folder.")
    ] = None,
    mean_of: Annotated[
        int, typer.Option(help="Translators: also the mean of so many samples of each tile; 0 for no such row.")
    ] = 0,
    seed: Seed = 0,
    out: Annotated[
        Path | None, typer.Option(help="A .json to write, a page .md beside it; into the weights folder if left out.")
    ] = None,
    device: Device = "auto",
) -> None:
    """Measure quality and latency on the held-out split, the teacher beside it on the same noises; write report.json.

    Of an autoencoder: how near its reconstructions come. No space that a loss of the training compared in is taken.

    Example: `fewstep evaluate weights/eurosat-consistency --n 2000 --steps 1,2,4,8 --teacher-steps 50,250`; on your own
    pairs: `fewstep evaluate weights/sar-optical-db-consistency --pairs mine --samples 16 --out mine.json`.
    """
    import json

    from distillers.evaluation.calibration import calibrate
    from distillers.evaluation.evaluate import evaluate as measure
    from distillers.evaluation.features import feature_space, load_features
    from distillers.generator import Generator
    from distillers.jobs.publish import held_out, write_card
    from distillers.progress import drawing_bar
    from distillers.weights.manifest import draws

    if out is not None and out.suffix != ".json":
        raise BadInput("out", str(out), "a name that ends in .json")
    if not draws(weights):
        given = {"steps": steps, "teacher": teacher, "pairs": pairs, "samples": samples, "mean-of": mean_of}
        for name, value in given.items():
            if value:
                raise BadInput(name, value, "nothing: an autoencoder draws nothing that this could be asked of")
        _evaluate_autoencoder(weights, n, path, features, out, _device(device))
        return
    generator = Generator.from_pretrained(weights, _device(device))
    if pairs is None:
        data, train = held_out(weights, path)
    else:
        data, train = _pairs(generator, pairs, pairs_option or [])
    counts = _counts("steps", steps) if steps else None
    teacher_counts = _counts("teacher-steps", teacher_steps) if teacher_steps else []
    beside = weights.parent / (generator.info.teacher or "")
    source = teacher or (str(beside) if generator.info.teacher and beside.is_dir() else None)
    against = Generator.from_pretrained(source, _device(device)) if source and teacher_counts else None
    space = load_features(features or feature_space(generator.info.data), weights.parent)
    with drawing_bar() as show:
        report = measure(
            generator, data, n=n, features=space, seed=seed, steps=counts, teacher=against,
            teacher_steps=teacher_counts, train=train, mean_of=mean_of, progress=show,
        )  # fmt: skip
        calibration = None
        if samples:
            target = out or weights / "report.json"
            calibration = calibrate(
                generator, data, n=min(n, 200), samples=samples, steps=min(counts or [generator.info.default_steps]),
                seed=seed, progress=show, picture=target.with_name(f"{target.stem}-tiles.png"),
            )  # fmt: skip
    target = out or weights / "report.json"
    target.write_text(json.dumps({**report.to_dict(), "markdown": report.markdown()}, indent=2) + "\n")
    if calibration is not None:
        calibration.save(target.with_name("calibration.json" if out is None else f"{target.stem}-calibration.json"))
    page = report.markdown()
    if calibration is not None:
        page += "\n" + calibration.markdown()
    if out is None:
        write_card(weights)
    else:
        curves = f"\n![calibration]({target.stem}-calibration.png)\n" if calibration is not None else ""
        target.with_suffix(".md").write_text(f"# {report.model} on {report.data}\n\n{page}{curves}")
    typer.echo(page)


def _evaluate_autoencoder(
    weights: Path, n: int, path: Path | None, features: str | None, out: Path | None, device: str
) -> None:
    """The report of a folder that reconstructs and draws nothing."""
    import json

    from distillers.autoencoder import Autoencoder
    from distillers.evaluation.evaluate import evaluate_reconstruction
    from distillers.evaluation.features import feature_space, load_features
    from distillers.jobs.publish import held_out, write_card
    from distillers.progress import drawing_bar

    autoencoder = Autoencoder.from_pretrained(weights, device)
    data, train = held_out(weights, path)
    space = load_features(features or feature_space(autoencoder.info.data), weights.parent)
    with drawing_bar() as show:
        report = evaluate_reconstruction(autoencoder, data, n=n, features=space, train=train, progress=show)
    target, page = out or weights / "report.json", report.markdown()
    target.write_text(json.dumps({**report.to_dict(), "markdown": page}, indent=2) + "\n")
    if out is None:
        write_card(weights)
    else:
        target.with_suffix(".md").write_text(f"# {report.model} on {report.data}\n\n{page}")
    typer.echo(page)


@app.command()
def compare(
    study: Annotated[Path, typer.Argument(help="A TOML file that names recipes of one teacher.", show_default=False)],
    runs: Annotated[Path, typer.Option(help="Where the students are trained, one folder each.")] = Path("runs"),
    jobs: Annotated[int, typer.Option(help="Trainings at a time; they share the cores.")] = 1,
    device: Device = "auto",
) -> None:
    """Train the students of a study alike, measure them together: STUDY.json, .md and .png beside the TOML file.

    What is there already is not made again: stop it whenever you like, the same command goes on.

    Example: `fewstep compare docs/results/eurosat.toml --jobs 2`.
    """
    from distillers.jobs.study import compare as run_study

    failed = run_study(study, runs=runs, device=_device(device), jobs=jobs, say=lambda line: typer.echo(line, err=True))
    typer.echo(study.with_suffix(".md").read_text())
    if failed:
        raise typer.Exit(1)


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
    place = "cpu" if _device(device) == "cpu" else None
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
    found = measure(model, _counts("sides", sides), rounds=rounds, steps=steps, device=_device(device))
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

    _json(out)
    plan = Plan(
        folders=models, systems=chosen(systems.split(",") if systems else None), constant=constant, rounds=rounds,
        seconds=seconds, callers=_counts("concurrency", concurrency), loads=_counts("load", load), burst=burst,
        pinned=pinned, environments=environments, device=_device(device), dtype=dtype,
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

    _json(out)
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


@app.command()
def pairs(
    model: Weights,
    out: Annotated[Path, typer.Option(help="The folder to make.", show_default=False)],
    reward: Annotated[
        str,
        typer.Option(help="A feature classifier's folder, or module:function.", show_default=False),
    ],
    n: Annotated[int, typer.Option(help="Pairs to draw; ties are left out.")] = 256,
    steps: Annotated[int, typer.Option(help="Network calls per picture.")] = 4,
    seed: Annotated[int, typer.Option(help="Pair i uses seed + 2 i and seed + 2 i + 1.")] = 0,
    device: Device = "auto",
) -> None:
    """Draw pairs of pictures and let a reward choose: a folder for data of kind = "preferences".

    Example: `fewstep pairs weights/eurosat-consistency --out runs/pairs/eurosat-green
    --reward distillers.training.reward:greenness`.
    """
    from distillers.generator import Generator
    from distillers.training.reward import choose_pairs, load_reward

    judge = load_reward(reward)
    chosen = choose_pairs(Generator.from_pretrained(model, _device(device)), judge, out, n=n, steps=steps, seed=seed)
    typer.echo(
        f"{out}: {chosen.pairs} pairs, {chosen.ties} ties left out; "
        f"mean reward of winners {chosen.winners:.4f}, of losers {chosen.losers:.4f}"
    )


@app.command()
def suggest_student(
    teacher: Annotated[str, typer.Argument(help="A teacher's folder or hub id.", show_default=False)],
    budget_ms: Annotated[
        float | None, typer.Option(help="Of one network pass of one picture, on this device.", show_default=False)
    ] = None,
    candidates: Annotated[int, typer.Option(help="How many, from the largest to the smallest.")] = 10,
    device: Device = "auto",
) -> None:
    """Rank small student networks without training: latency, parameters, likeness to the teacher. Hints, no promises.

    Example: `fewstep suggest-student weights/eurosat-teacher --budget-ms 10`.
    """
    from distillers.jobs.suggest import suggest, table
    from distillers.teacher import Teacher

    opened = Teacher.from_pretrained(teacher, _device(device))
    typer.echo(table(suggest(opened, budget_ms=budget_ms, candidates=candidates), opened, budget_ms))


@app.command()
def serve(
    weights: Root = Path("weights"),
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    device: Device = "auto",
) -> None:
    """Serve every folder below --weights over HTTP: OpenAI's image routes, SAR translation, benchmarks, a page at /.

    Example: `fewstep serve --weights weights --port 8000`, then open http://127.0.0.1:8000.
    """
    import os

    import uvicorn

    if not weights.is_dir():
        raise BadInput("weights", str(weights), "an existing folder of weights folders")
    if (weights / "fewstep.json").is_file():
        raise BadInput(
            "weights", str(weights), f"the folder that it lies in ({weights.resolve().parent}): all are served"
        )
    if host not in ("127.0.0.1", "::1", "localhost") and not os.environ.get("FEWSTEP_KEYS"):
        typer.echo("without FEWSTEP_KEYS whoever reaches this address may draw: see `fewstep key`", err=True)
    os.environ["FEWSTEP_WEIGHTS"], os.environ["FEWSTEP_DEVICE"] = str(weights), device
    uvicorn.run(
        "app.main:create_app",
        factory=True,
        host=host,
        port=port,
        log_level="info",
        server_header=False,
        timeout_keep_alive=75,  # s; proxies keep theirs for 60, and lose a request on one that is being closed
    )


@app.command()
def key(
    name: Annotated[str, typer.Argument(help="Whose it is; it stands in the service's log.", show_default=False)],
    scopes: Annotated[str, typer.Option(help="With commas: infer, admin (load models), metrics.")] = "infer",
) -> None:
    """Make an API key for the service: the key for the caller, and the entry for the file that FEWSTEP_KEYS names.

    The file holds the key's hash alone, so the key is shown this once, beside the entry, and on stderr:
    `fewstep key web >> keys.toml`, then `FEWSTEP_KEYS=keys.toml fewstep serve`. A running service reads it by itself.
    """
    import hashlib
    import re
    import secrets

    import tomli_w

    asked, known = [scope.strip() for scope in scopes.split(",")], ("infer", "admin", "metrics")
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name):
        raise BadInput("name", name, "1 to 64 of letters, digits, dots, dashes and underscores")
    if not set(asked) <= set(known):
        raise BadInput("scopes", scopes, f"one or more of {', '.join(known)}, with commas")
    made = f"fewstep-{secrets.token_urlsafe(32)}"
    entry = {"name": name, "sha256": hashlib.sha256(made.encode()).hexdigest(), "scopes": asked}
    typer.echo(tomli_w.dumps({"keys": [entry]}))
    typer.echo(f"the key, not to be seen again: {made}", err=True)


@app.command()
def run(
    weights: Root = Path("weights"),
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    serving: Annotated[
        bool, typer.Option("--serve/--no-serve", help="Serve afterwards, or stop after the table.")
    ] = True,
) -> None:
    """The whole job, small: distil the shapes teacher into four steps (once), say what it cost, serve everything."""
    folder = weights / "shapes-quickstart"
    if not (folder / "report.json").is_file():
        distill("shapes-quickstart", [f"teacher={weights / 'shapes-teacher'}"], out=folder, device="auto")
        evaluate(
            folder,
            n=256,
            steps=None,
            teacher=None,
            teacher_steps="50",
            path=None,
            pairs=None,
            pairs_option=None,
            samples=0,
            features=None,
            mean_of=0,
            seed=0,
            out=None,
            device="auto",
        )
    else:
        import json

        typer.echo(json.loads((folder / "report.json").read_text())["markdown"])
    typer.echo(f"pictures: {folder / 'grid.png'}")
    if serving:
        serve(weights, host, port, "auto")


def _device(name: str) -> str:
    import torch

    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        torch.zeros((), device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(
            "device", name, f"cpu, or a CUDA device of this machine ({str(error).splitlines()[0]})"
        ) from None
    return chosen


def _label(given: str, labels: list[str]) -> int:
    lowered = [label.lower() for label in labels]
    if given.lower() in lowered:
        return lowered.index(given.lower())
    if given.isdigit() and int(given) < len(labels):
        return int(given)
    raise BadInput("label", given, ", ".join(labels) or "nothing: this model has no classes")


def _pairs(generator: Any, folder: Path, options: list[str]) -> tuple[Any, Any]:
    """The test and train split of a user's own pairs, shown as the model has seen its own."""
    import tomllib

    from distillers.data import open_data

    table: dict[str, Any] = {"size": generator.info.size[0], "radiometry": generator.info.sar or {}}
    for option in options:
        key, equals, text = option.partition("=")
        if not equals:
            raise BadInput("pairs-option", option, "key=value, for example units=db")
        try:
            table[key] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            table[key] = text
    return (
        open_data("pairs", path=str(folder), split="test", **table),
        open_data("pairs", path=str(folder), split="train", **table),
    )


def _counts(field: str, text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        raise BadInput(field, text, "whole numbers with commas, e.g. 1,2,4") from None
    return counts


def _columns(n: int) -> int:
    return max(1, min(n, 8))


def _json(out: Path | None) -> None:
    if out is not None and out.suffix != ".json":
        raise BadInput("out", str(out), "a name that ends in .json")


def _png(path: Path) -> Path:
    if path.suffix.lower() != ".png":
        raise BadInput("out", str(path), "a name that ends in .png")
    return path


@app.command()
def results(
    weights: Root = Path("weights"),
    readme: Annotated[Path | None, typer.Option(help="Markdown to update between <!-- results --> marks.")] = None,
) -> None:
    """Collect the reports of all folders below --weights into one table."""
    from distillers.jobs.publish import results as collect

    table, mark = collect(weights), "<!-- results -->"
    if readme is None:
        typer.echo(table)
        return
    text = readme.read_text() if readme.is_file() else ""
    if text.count(mark) != 2:
        raise BadInput("readme", str(readme), f"an existing file with two lines {mark}")
    before, _, after = text.split(mark)
    readme.write_text(f"{before}{mark}\n\n{table}\n{mark}{after}")


@app.command()
def methods() -> None:
    """List the methods, what each needs, and the recipes that ship with the package."""
    from dataclasses import fields

    from distillers import methods as registry
    from distillers.jobs.recipe import shipped

    for name in registry.names():
        kind = registry.find(name)
        first = (sys.modules[kind.__module__].__doc__ or "").strip().splitlines()[0]
        typer.echo(f"{name}: {first}")
        for field in fields(kind):
            typer.echo(f"    {name}.{field.name} = {field.default!r}")
    typer.echo("recipes: " + ", ".join(shipped()))


def main() -> Any:
    """Entry point: bad input is one line on stderr and exit code 2; a stopped training 1."""
    prepare_process()
    try:
        return app()
    except BadInput as error:
        typer.echo(f"error: {error}", err=True)
    except RuntimeError as error:
        if type(error).__name__ != "TrainingStopped":
            raise
        typer.echo(f"stopped: {error}", err=True)
        sys.exit(1)
    sys.exit(2)


if __name__ == "__main__":
    main()
