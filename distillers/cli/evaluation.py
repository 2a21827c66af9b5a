"""Commands that measure quality: evaluate, compare, results."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distillers.cli.arguments import Device, Root, Seed, Weights, device_of, open_pairs, step_counts
from distillers.errors import BadInput, check_file
from distillers.evaluation.options import EvaluationOptions

if TYPE_CHECKING:
    from distillers.evaluation.calibration import Calibration
    from distillers.evaluation.report import Report
    from distillers.generator import Generator


def evaluate(
    weights: Weights,
    n: Annotated[int, typer.Option(help="Pictures per row; more than the features (128).")] = EvaluationOptions.n,
    steps: Annotated[str | None, typer.Option(help="e.g. 1,2,4,8; all published counts if left out.")] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Teacher folder; the one named in the folder, beside it, if left out.")
    ] = None,
    teacher_steps: Annotated[str, typer.Option(help="The teacher's rows, e.g. 50,250; empty for none.")] = ",".join(
        map(str, EvaluationOptions.teacher_steps)
    ),
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
    judge: Annotated[
        str | None,
        typer.Option(help="Text to image: avatars, shapes or a classifier's folder; whether pictures follow prompts."),
    ] = None,
    seeds_per_prompt: Annotated[
        int, typer.Option(help="With --judge: pictures of one prompt whose diversity is measured; 1 to leave that out.")
    ] = EvaluationOptions.seeds_per_prompt,
    mean_of: Annotated[
        int, typer.Option(help="Translators: also the mean of so many samples of each tile; 0 for no such row.")
    ] = EvaluationOptions.mean_of,
    seed: Seed = EvaluationOptions.seed,
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
    from distillers.evaluation.adherence import load_judge
    from distillers.evaluation.calibration import TILES, calibrate, check_calibration
    from distillers.evaluation.evaluate import evaluate as measure
    from distillers.evaluation.features import feature_space, load_features
    from distillers.generator import Generator
    from distillers.jobs.inputs import held_out
    from distillers.progress import drawing_bar
    from distillers.weights.manifest import MANIFEST, Info, draws

    if not (weights / MANIFEST).is_file():
        raise BadInput("weights", str(weights), f"a weights folder, with {MANIFEST}; `fewstep adopt` makes one")
    target = out or weights / "report.json"
    check_file(
        target, ".json", inputs=[weights / name for name in (MANIFEST, "golden.json", *Info.read(weights).sha256)]
    )
    if not draws(weights):
        given = {"steps": steps, "teacher": teacher, "pairs": pairs, "samples": samples, "mean-of": mean_of}
        given["judge"] = judge
        for name, value in given.items():
            if value:
                raise BadInput(name, value, "nothing: an autoencoder draws nothing that this could be asked of")
        report = _measure_autoencoder(weights, EvaluationOptions(n=n), path, features, device_of(device))
        _write(report, out, None, weights)
        return
    options = EvaluationOptions(
        n=n,
        seed=seed,
        steps=step_counts("steps", steps) if steps else None,
        teacher_steps=step_counts("teacher-steps", teacher_steps) if teacher_steps else [],
        mean_of=mean_of,
        judge=load_judge(judge, weights.parent, device_of(device)) if judge else None,
        seeds_per_prompt=seeds_per_prompt,
    )
    generator = Generator.from_pretrained(weights, device_of(device))
    data, train = held_out(weights, path) if pairs is None else open_pairs(generator, pairs, pairs_option or [])
    if pairs_option and pairs is None:
        raise BadInput("pairs-option", pairs_option, "nothing, without --pairs")
    if samples:
        check_calibration(generator, samples, min(n, len(data)))
    opened = _open_teacher(teacher, weights, device_of(device)) if options.teacher_steps else None
    space = load_features(features or feature_space(generator.info.data), weights.parent)
    calibration = None
    with drawing_bar() as show:
        report = measure(generator, data, space, options, teacher=opened, train=train, progress=show)
        if samples:
            calibration = calibrate(
                generator,
                data,
                n=min(n, TILES),
                samples=samples,
                steps=min(options.steps or [generator.info.default_steps]),
                seed=seed,
                progress=show,
                picture=target.with_name(f"{target.stem}-tiles.png"),
            )
    _write(report, out, calibration, weights)


def _open_teacher(named: str | None, weights: Path, device: str) -> Generator | None:
    """Open the teacher that is named, else the folder's own; say why there is none where a student lacks it."""
    from distillers.generator import Generator
    from distillers.jobs.inputs import find_teacher
    from distillers.weights.manifest import Info

    source, why = named or find_teacher(weights), "no folder says which it was"
    try:
        if source:
            return Generator.from_pretrained(source, device)
    except BadInput as error:
        if named:
            raise
        why = str(error)
    if Info.read(weights).role == "student":
        typer.echo(f"note: no row of the teacher, which --teacher may name: {why}", err=True)
    return None


def _measure_autoencoder(
    weights: Path, options: EvaluationOptions, path: Path | None, features: str | None, device: str
) -> Report:
    """Measure the reconstructions of a folder that draws nothing."""
    from distillers.autoencoder import Autoencoder
    from distillers.evaluation.features import feature_space, load_features
    from distillers.evaluation.reconstruction import evaluate_reconstruction
    from distillers.jobs.inputs import held_out
    from distillers.progress import drawing_bar

    autoencoder = Autoencoder.from_pretrained(weights, device)
    data, train = held_out(weights, path)
    space = load_features(features or feature_space(autoencoder.info.data), weights.parent)
    with drawing_bar() as show:
        return evaluate_reconstruction(autoencoder, data, space, options, train=train, progress=show)


def _write(report: Report, out: Path | None, calibration: Calibration | None, weights: Path) -> None:
    """Print a report, write it into its weights folder and its card, or to another file with a page beside it."""
    import json

    from distillers.jobs.card import write_card

    target, page = out or weights / "report.json", report.markdown()
    typer.echo(page + ("" if calibration is None else "\n" + calibration.markdown()))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({**report.to_dict(), "markdown": page}, indent=2) + "\n")
    if calibration is not None:
        calibration.save(target.with_name("calibration.json" if out is None else f"{target.stem}-calibration.json"))
        page += "\n" + calibration.markdown()
    if out is None:
        write_card(weights)
    else:
        curves = f"\n![calibration]({target.stem}-calibration.png)\n" if calibration is not None else ""
        target.with_suffix(".md").write_text(f"# {report.model} on {report.data}\n\n{page}{curves}")


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
    from distillers.jobs.study import run_study

    failed = run_study(
        study, runs=runs, device=device_of(device), jobs=jobs, say=lambda line: typer.echo(line, err=True)
    )
    typer.echo(study.with_suffix(".md").read_text())
    if failed:
        raise typer.Exit(1)


def results(
    weights: Root = Path("weights"),
    readme: Annotated[Path | None, typer.Option(help="Markdown to update between <!-- results --> marks.")] = None,
) -> None:
    """Collect the reports of all folders below --weights into one table."""
    from distillers.jobs.card import results as collect

    if not weights.is_dir():
        raise BadInput("weights", str(weights), "an existing folder of weights folders")
    table, mark = collect(weights), "<!-- results -->"
    if readme is None:
        typer.echo(table)
        return
    text = readme.read_text("utf-8", errors="replace") if readme.is_file() else ""
    if text.count(mark) != 2:
        raise BadInput("readme", str(readme), f"an existing file with two lines {mark}")
    before, _, after = text.split(mark)
    readme.write_text(f"{before}{mark}\n\n{table}\n{mark}{after}")
