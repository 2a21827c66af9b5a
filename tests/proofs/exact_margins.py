"""How far every figure of the slow proofs is from its limit, and how far broken methods are from passing.

    python tests/proofs/exact_margins.py                # the page, from the runs that are there
    python tests/proofs/exact_margins.py --train 0 1 2  # trains the proofs as the tests do, and broken methods, first

writes brief.json, broken.json, and of these and pso.json the page margins.md with margins.json. A proof may fail on
another processor where a margin is small: floating-point sums differ there, which acts on a training like another seed.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from broken_methods import BROKEN
from exact_report import BROKEN_BY, IDEAL, LIMITS, PROOFS, kept, machine, prove, strain
from mutate import mutated
from preference_report import TARGETS, WRONG, held_against, modes, tuned, untuned
from preference_report import strain as strain_of_pso

from distillers.evaluation.report import markdown_table
from distillers.methods import pso

LEAST = 1.3  # a margin below this is too small
Row = dict[str, Any]


def load(path: Path) -> list[Row]:
    runs: list[Row] = json.loads(path.read_text())["runs"] if path.is_file() else []
    return runs


def worst(what: str, runs: Iterable[Row], taken: Callable[[Row], dict[str, float]]) -> list[Row]:
    """A row for each figure: the run that takes most of what is allowed."""
    rows, runs = [], list(runs)
    for figure in dict.fromkeys(figure for run in runs for figure in taken(run)):
        run = max(runs, key=lambda run: taken(run)[figure])
        rows.append({"proof": what, "figure": figure, "worst": run[figure], "margin": 1 / taken(run)[figure],
                     "seed": run["seed"], "runs": len(runs)})  # fmt: skip
    return rows


def proofs(folder: Path) -> list[Row]:
    """The worst of every figure over seeds and machines."""
    rows, runs = [], load(folder / "brief.json")
    for method, limits in LIMITS.items():
        chosen = [run for run in runs if run["method"] == method]
        for row in worst(method, chosen, lambda run, m=method: strain(m, run)):  # type: ignore[misc]
            rows.append({**row, "ideal": IDEAL.get(row["figure"], 0.0), "limit": limits[row["figure"]]})
    return rows


def preferences(folder: Path) -> list[Row]:
    """The same of PSO's proofs: pairs on every target, and a reward."""
    runs, rows = load(folder / "pso.json"), []
    for target in TARGETS:
        before = {run["seed"]: run for run in runs if (run["target"], run["method"]) == (target, "base")}
        chosen = [run for run in runs if (run["target"], run["method"]) == (target, "pso, beta 2")]
        rows += worst(f"pso, {target}", chosen, lambda run, b=before: strain_of_pso(b[run["seed"]], run))  # type: ignore[misc]
    chosen = [run for run in runs if run["method"] == "online, beta 5, eps 0.5"]
    return rows + worst("pso, reward", chosen, lambda run: strain_of_pso({"reward": run["reward_base"]}, run))


def write(path: Path, what: str, runs: Sequence[Row]) -> None:
    """Write runs beside those of other seeds and machines."""
    about: dict[str, Any] = {"what": what, "runs": list(runs)}
    about["runs"] = kept(path, about) + about["runs"]
    path.write_text(json.dumps(about, indent=2) + "\n")


def train_proofs(folder: Path, seeds: Sequence[int]) -> None:
    """Train every proof as the tests do; write brief.json."""
    runs: list[Row] = []
    for seed in seeds:
        for method, limits in LIMITS.items():
            mixture, proof = PROOFS[method].mixtures[0], PROOFS[method].brief()
            began, found = time.process_time(), prove(method, mixture, seed, proof)[1]
            figures = {k: value for k, value in found.items() if k in limits}
            about = {"iterations": proof.settings.iterations, "cpu_seconds": round(time.process_time() - began, 1)}
            runs.append({"method": method, "mixture": mixture, "seed": seed, **figures, **about, **machine()})
            print(json.dumps(runs[-1]), flush=True)
            write(folder / "brief.json", "the proofs as the tests train them", runs)


def train_broken(folder: Path, seeds: Sequence[int]) -> None:
    """Train every broken method; write broken.json. The figure that misses its limit by most is kept beside."""
    runs: list[Row] = []

    def note(name: str, method: str, seed: int, found: dict[str, float], missed: dict[str, float]) -> None:
        figure = max(missed, key=lambda k: missed[k])
        told = {"figure": figure, "value": found[figure], "times_the_limit": missed[figure]}
        runs.append({"mixture": name, "method": method, "seed": seed, **told, **machine()})
        print(json.dumps(runs[-1]), flush=True)

    for seed in seeds:
        for name, broken in BROKEN.items():
            found = broken.train(seed)
            note(name, broken.method, seed, found, strain(broken.method, found))
        target = modes(TARGETS["opposite modes"])
        before = held_against(target, untuned(seed))
        for name, change in WRONG.items():
            found = held_against(target, tuned(mutated(pso, *change).Pso(beta=2.0), seed, target))
            note(f"pso, {name}", "pso", seed, found, strain_of_pso(before, found))
    write(folder / "broken.json", "broken methods, trained as briefly as the tests train the whole ones", runs)


def page(folder: Path) -> None:
    """Write margins.json and margins.md."""
    rows, broken = proofs(folder) + preferences(folder), load(folder / "broken.json")
    keys = ("device", "vectors", "threads", "torch")
    machines = [dict(m) for m in dict.fromkeys(
        tuple((k, run.get(k)) for k in keys) for name in ("brief", "broken") for run in load(folder / f"{name}.json")
    )]  # fmt: skip
    nearest = [
        min((run for run in broken if run["mixture"] == name), key=lambda run: run["times_the_limit"])
        | {"runs": sum(run["mixture"] == name for run in broken)}
        for name in dict.fromkeys(run["mixture"] for run in broken)
    ]
    about = {"date": datetime.now(UTC).date().isoformat(), "machines": machines, "proofs": rows, "broken": nearest}
    (folder / "margins.json").write_text(json.dumps(about, indent=2) + "\n")
    lines = [
        "# How far the proofs are from their limits",
        "Floating-point sums differ between processors, which acts on a training like another seed; so a limit has to "
        f"be {LEAST} times what the worst of several seeds and processors gives. Margin: what is allowed over the "
        "worst run's distance from the ideal. The tests train seed 0 and read the same limits, with a "
        "quarter of the iterations of the reports beside, whose students come nearer. Written by "
        "`python tests/proofs/exact_margins.py`.",
        markdown_table(
            [("proof", lambda r: r["proof"], ""), ("figure", lambda r: r["figure"], ""),
             ("ideal", lambda r: r.get("ideal"), ""), ("allowed distance", lambda r: r.get("limit"), ""),
             ("worst", lambda r: r["worst"], ".4f"), ("margin", lambda r: r["margin"], ".2f"),
             ("its seed", lambda r: r["seed"], ""), ("runs", lambda r: r["runs"], "")],
            rows,
        ),
        "## Broken methods, which must not pass",
        f"The run that comes nearest to passing; the tests ask for {BROKEN_BY:g} times the limit, of PSO's for more "
        "than the limit.",
        markdown_table(
            [("broken method", lambda r: r["mixture"], ""), ("judged as", lambda r: r["method"], ""),
             ("figure", lambda r: r["figure"], ""), ("value", lambda r: r["value"], ".3f"),
             ("times the limit", lambda r: r["times_the_limit"], ".1f"), ("runs", lambda r: r["runs"], "")],
            nearest,
        ),
        "## Machines",
        markdown_table([(k, lambda r, k=k: r[k], "") for k in keys], machines),  # type: ignore[misc]
        "Vectors DEFAULT: `ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE`, sums in the order of a processor without "
        "vector units.",
    ]  # fmt: skip
    (folder / "margins.md").write_text("\n\n".join(lines) + "\n")
    print("\n\n".join(lines))
    small = [row for row in rows if row["margin"] < LEAST]
    if small:
        raise SystemExit(f"margins below {LEAST}: " + ", ".join(f"{r['proof']} {r['figure']}" for r in small))


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, default=Path("docs/results/exact"))
    arguments.add_argument("--train", type=int, nargs="*", default=[], help="seeds to train on")
    given = arguments.parse_args()
    if given.train:
        train_proofs(given.out, given.train)
        train_broken(given.out, given.train[:1])
    page(given.out)
