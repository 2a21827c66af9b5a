"""What methods reach on eight random mixtures: 2 to 8 dimensions, 5 to 9 modes, two schedules, none chosen.

    python tests/proofs/mixtures_report.py --methods consistency boot dmd2

trains each method once on each mixture and writes mixtures/METHOD.json after every training, and mixtures.md of all
that stand there. A training that stands there with the same options is not repeated, so a stopped run goes on where it
was, and several methods may run at a time.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # what the tests share

import torch
from exact_report import MATCHING, MIXTURES, PROOFS, RANDOM, SETTINGS, exact_map, machine, off_manifold, prove

from distillers.evaluation.report import markdown_table
from distillers.methods.consistency import Consistency

# as in the proofs, but longer: more modes, nearer to each other, take a network more iterations to tell apart
PROOFS |= {
    "consistency": replace(
        PROOFS["consistency"],
        distiller=Consistency(points=20, first_points=5, anchored=0.0),
        settings=replace(SETTINGS, iterations=8000),
    ),
    "dmd2": replace(PROOFS["dmd2"], settings=replace(MATCHING, iterations=3000)),
}
METHODS = ("consistency", "boot", "dmd2", "tuning", "hyper_sd", "scm", "sid", "disback")
FIGURES = ("rmse", "median_error", "mode_agreement", "off_manifold", "energy", "share_error")


TUNING = {"ratio_base", "stages", "log_mean", "log_std", "last_time_share"}  # consistency's, for source = "data" alone


def described(method: str) -> dict[str, Any]:
    """What a training of this method depends on beside the mixture and the seed."""
    options: dict[str, Any] = json.loads(json.dumps(asdict(replace(PROOFS[method], mixtures=()))))
    if options["distiller"].get("source") == "teacher" and method == "consistency":
        options["distiller"] = {key: value for key, value in options["distiller"].items() if key not in TUNING}
    return options


def page(out: Path, runs: Sequence[dict[str, Any]]) -> str:
    """mixtures.md: the mixtures, the range of every figure by method, and the figures of each training."""
    mixtures = {name: MIXTURES[name]() for name in RANDOM}
    exact = {name: off_manifold(exact_map(name)[1], mixture) for name, mixture in mixtures.items()}
    about = markdown_table(
        [
            ("mixture", lambda name: name, ""), ("dimensions", lambda name: mixtures[name].means.shape[1], ""),
            ("modes", lambda name: len(mixtures[name].means), ""),
            ("schedule", lambda name: mixtures[name].schedule.name, ""),
            ("off the manifold, exact map, %", lambda name: 100 * exact[name], ".2f"),
        ],
        list(mixtures),
    )  # fmt: skip

    def span(method: str, figure: str) -> str:
        values = [run[figure] for run in runs if run["method"] == method and figure in run]
        if not values:
            return ""
        percent = figure in ("mode_agreement", "off_manifold", "share_error")
        shown = [
            f"{100 * v:.1f}" if percent else f"{v:.3f}" for v in (statistics.median(values), min(values), max(values))
        ]
        return f"{shown[0]} ({shown[1]} to {shown[2]}){' %' * percent}"

    methods = [method for method in METHODS if any(run["method"] == method for run in runs)]
    columns: list[Any] = [
        ("method", lambda method: method, ""),
        ("mixtures", lambda m: len([r for r in runs if r["method"] == m]), ""),
    ]
    columns += [
        (figure.replace("_", " "), lambda method, figure=figure: span(method, figure), "") for figure in FIGURES
    ]
    each: list[Any] = [("method", lambda run: run["method"], ""), ("mixture", lambda run: run["mixture"], "")]
    each += [
        (figure.replace("_", " "), lambda run, figure=figure: f"{run[figure]:.4f}" if figure in run else "", "")
        for figure in FIGURES
    ]
    said = (
        "Median (least to greatest) over the mixtures, one training each, seed 0, of students of three layers of 128. "
        "Methods that follow the teacher's trajectories are held against the exact flow map: rmse is the root mean "
        "squared distance of the end points of 4000 noises, to data of unit variance per dimension, median error the "
        "median distance, mode agreement the share of noises that both carry to the same mode. Those that match its "
        "distribution are judged by their samples: energy distance (8000 against 8000), the largest error of a mode's "
        "share. Off manifold: samples further from every mode than the radius that 0.03 % of exact ones exceed, 4 "
        "standard deviations in the plane; between modes they are what users see as smears. Written by "
        "`python tests/proofs/mixtures_report.py`."
    )
    parts = ["# Random mixtures", said, markdown_table(columns, methods), "## The mixtures", about, "## Every training"]
    return "\n\n".join([*parts, markdown_table(each, list(runs))]) + "\n"


def trained(out: Path, method: str) -> list[dict[str, Any]]:
    """The trainings of a method that stand in its file with its present options."""
    path = out / "mixtures" / f"{method}.json"
    runs: list[dict[str, Any]] = json.loads(path.read_text())["runs"] if path.is_file() else []

    def same(old: Any, new: Any) -> bool:  # an option that came later was no choice
        if isinstance(old, dict) and isinstance(new, dict):
            return all(same(old[key], new[key]) for key in old.keys() & new.keys())
        return bool(old == new)

    return [run for run in runs if same(run["options"], described(method))]


def report(out: Path, methods: Sequence[str], seed: int = 0) -> None:
    """Train what is missing; write a method's file and the page after each training."""
    (out / "mixtures").mkdir(parents=True, exist_ok=True)
    for method in methods:
        runs = trained(out, method)
        for name in RANDOM:
            if any(run["mixture"] == name for run in runs):
                continue
            began = time.process_time()
            found = prove(method, name, seed)[1]
            found = {figure: found[figure] for figure in FIGURES if figure in found}
            when = {"date": datetime.now(UTC).date().isoformat(), "cpu_seconds": round(time.process_time() - began, 1)}
            about = {**machine(), **when, "options": described(method)}
            runs.append({"method": method, "mixture": name, "seed": seed, **found, **about})
            print(method, name, found, flush=True)
            (out / "mixtures" / f"{method}.json").write_text(json.dumps({"runs": runs}, indent=1) + "\n")
    every = [run for method in METHODS for run in trained(out, method)]
    (out / "mixtures.md").write_text(page(out, every))


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    torch.set_num_threads(1)
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, default=Path("docs/results/exact"))
    arguments.add_argument("--methods", choices=METHODS, nargs="+", default=list(METHODS))
    given = arguments.parse_args()
    report(given.out, given.methods)
