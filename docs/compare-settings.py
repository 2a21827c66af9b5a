"""Train variants of a recipe for equal core-minutes and compare their watches: how the teachers' networks were chosen.

    OMP_NUM_THREADS=1 .venv/bin/python docs/compare-settings.py docs/results/teachers-settings.toml

A variant's iterations are what `--minutes` of one core's own time pays for, measured before it begins, so other work on
the machine does not change the outcome. Results are kept as they come: what is there is not trained again.
"""

import argparse
import json
import time
import tomllib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from distillers.data import ImageData
from distillers.evaluation.report import Column, markdown_table
from distillers.generator import Generator
from distillers.jobs.inputs import held_out_data, load_data, load_teacher
from distillers.jobs.recipe import Recipe
from distillers.runtime import device_name
from distillers.teacher import Teacher
from distillers.training.latents import encoded_once
from distillers.training.trainer import begin, train
from distillers.training.watch import history

WATCHES = 3  # measurements of each variant


def changed(recipe: Recipe, **train: Any) -> Recipe:
    """Give the recipe other entries in its [train] table; nothing is watched that these do not name."""
    table = recipe.table()
    fixed = {"compile": "never", "watch_every": 0, "sample_every": 0, "publish": "last", "tracker": "none"}
    return Recipe.from_table({**table, "train": {**table["train"], **fixed, **train}})


def iterations(recipe: Recipe, teacher: Teacher, data: ImageData, out: Path, minutes: float) -> int:
    """Measure how many iterations of a recipe a core's minutes pay for."""
    run = begin(recipe.distiller(), teacher, changed(recipe, iterations=1000).settings(), out, device="cpu")
    for i in range(4):  # the first ones decode data and choose algorithms
        run.iteration(i, data)
    started = time.process_time()
    for i in range(4, 20):
        run.iteration(i, data)
    run.close()
    return max(WATCHES, round(60 * minutes * 16 / (time.process_time() - started)))


def measured(variant: dict[str, Any], minutes: float, runs: Path) -> dict[str, Any]:
    """Train one variant and say what was trained, how much of it, and how it stood in between and at the end."""
    recipe, out = Recipe.load(variant["recipe"], variant.get("overrides")), runs / variant["label"].replace(" ", "-")
    pictures = load_data(recipe)
    teacher = load_teacher(recipe, pictures)
    data = encoded_once(pictures, teacher.codec)
    count = iterations(recipe, teacher, data, out, minutes)
    steps, n = variant.get("steps", 4), variant.get("n", 256)
    watched = {"watch_every": -(-count // WATCHES), "watch_samples": n, "watch_steps": steps}
    chosen = changed(recipe, iterations=count, warmup=count // 20 + 1, **watched)
    made = train(
        chosen.distiller(), teacher, data, chosen.settings(), out, device="cpu", held_out=held_out_data(chosen)
    )
    assert isinstance(made, Generator), "a study compares teachers"
    parameters = sum(p.numel() for p in made.denoiser.parameters())
    batch = recipe.settings().batch
    return {
        "label": variant["label"],
        "group": variant["group"],
        "overrides": variant.get("overrides", []),
        "recipe": variant["recipe"],
        "parameters": parameters,
        "pictures": count * batch,
        "pictures_per_second": count * batch / (60 * minutes),
        "minutes": minutes,
        "steps": steps,
        "n": n,
        "curve": history(out),
        "device": device_name("cpu"),
        "date": datetime.now(UTC).date().isoformat(),
    }


def page(rows: list[dict[str, Any]]) -> str:
    """Write the rows as tables in Markdown, a table for each group."""
    columns: list[Column[dict[str, Any]]] = [
        ("setting", lambda r: r["label"], ""),
        ("parameters", lambda r: f"{r['parameters'] / 1e6:.1f} M", ""),
        ("pictures/s", lambda r: r["pictures_per_second"], ".0f"),
        ("pictures", lambda r: r["pictures"], ","),
        ("Frechet after a third", lambda r: r["curve"][0]["frechet"], ".1f"),
        ("two thirds", lambda r: r["curve"][1]["frechet"], ".1f"),
        ("all", lambda r: r["curve"][-1]["frechet"], ".1f"),
        ("KID", lambda r: r["curve"][-1]["kid_mean"], ".3f"),
        ("PSNR", lambda r: r["curve"][-1].get("psnr"), ".2f"),
    ]
    parts = ["# Teachers: networks and settings at equal core-minutes"]
    for group in dict.fromkeys(row["group"] for row in rows):
        chosen = [row for row in rows if row["group"] == group]
        first = chosen[0]
        parts.append(
            f"**{group}**: {first['minutes']:g} minutes of one core each ({first['device']}, {first['date']}); "
            f"Frechet and KID of {first['n']} held-out pictures at {first['steps']} steps."
        )
        parts.append(markdown_table(columns, chosen))
    return "\n\n".join(parts) + "\n"


def stored(file: Path) -> list[dict[str, Any]]:
    """Read the rows that are there already."""
    return json.loads(file.read_text()) if file.is_file() else []


def main() -> None:
    """Train what the study names and has no row yet, and write its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--group", help="only the variants of this group")
    parser.add_argument("--runs", type=Path, default=Path("runs/settings"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    variants = tomllib.loads(given.study.read_text())["variants"]
    target = given.study.with_suffix(".json")
    for variant in variants:
        if given.group not in (None, variant["group"]) or variant["label"] in {row["label"] for row in stored(target)}:
            continue
        row = measured(variant, given.minutes, given.runs)
        rows = [*stored(target), row]  # read again, for another group may have been trained meanwhile
        target.write_text(json.dumps(rows, indent=1) + "\n")
        given.study.with_suffix(".md").write_text(page(rows))


if __name__ == "__main__":
    main()
