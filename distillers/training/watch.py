"""A watch measures Frechet and kernel distances on held-out data, inexpensively, while a training runs.

The figures are those of `fewstep evaluate`, on few pictures and few network calls: good enough to see whether a run
goes on improving, and to choose the best of its averages; not to be quoted as the quality of a model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distillers.autoencoder import Autoencoder
from distillers.data import ImageData
from distillers.errors import BadInput
from distillers.evaluation.evaluate import evaluate
from distillers.evaluation.features import feature_space, load_features
from distillers.evaluation.options import EvaluationOptions
from distillers.evaluation.reconstruction import evaluate_reconstruction
from distillers.generator import Generator

TEACHER_STEPS = 20
FILE = "watch.jsonl"
FIGURES = ("frechet", "kid_mean", "psnr")


class Watch:
    """A watch measures the averaged generators of one run on the same held-out items and seeds.

    Args:
        data: held-out items; picture i has the condition of an item and seed i.
        n: pictures a measurement.
        steps: network calls a picture; 0 for the generator's fewest, 20 for a teacher.
        out: run folder; its watch.jsonl gets one line for every measurement.
    """

    def __init__(self, data: ImageData, n: int, steps: int, out: Path) -> None:
        if not data.pictured:
            raise BadInput(
                "train.watch_every", f"above 0, with {data.name}", "0: there are no pictures to compare with"
            )
        self.data, self.n, self.steps, self.out = data, n, steps, out
        self.features = load_features(feature_space(data.name))
        if min(self.n, len(data)) <= self.features.num_features:
            allowed = f"more than the {self.features.num_features} features of {self.features.card.name}, and that many"
            raise BadInput("train.watch_samples", self.n, f"{allowed} held-out pictures (there are {len(data)})")

    def measure(self, model: Generator | Autoencoder, iteration: int) -> tuple[dict[str, float], bool]:
        """Measure a model after so many iterations; say whether its Frechet distance is the least so far.

        Of an autoencoder the reconstructions are measured. Figures: "frechet", "kid_mean"; "psnr" in dB for translators
        and autoencoders; "asked" for shapes, the share of pictures that show what was asked for.
        """
        info = model.info
        if isinstance(model, Autoencoder):
            steps = 1
            options = EvaluationOptions(n=self.n, latency_repeats=0)
            report = evaluate_reconstruction(model, self.data, self.features, options)
        else:
            steps = self.steps or (min(info.step_times) if info.step_times else TEACHER_STEPS)
            options = EvaluationOptions(n=self.n, steps=[steps], latency_repeats=0)
            report = evaluate(model, self.data, self.features, options)
        row = next(row for row in report.rows if row.role not in ("real", "baseline"))
        figures = {name: value for name in FIGURES if (value := getattr(row, name)) is not None}
        figures |= {"asked": row.shows["asked"]} if row.shows else {}
        past = [entry for entry in history(self.out) if entry["iteration"] < iteration]  # a run resumed repeats some
        best = all(figures["frechet"] < entry["frechet"] for entry in past)
        entries: list[dict[str, Any]] = [*past, {"iteration": iteration, "steps": steps, "n": self.n, **figures}]
        temporary = self.out / ".watch.jsonl"
        temporary.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        temporary.rename(self.out / FILE)
        return figures, best


def history(run: Path) -> list[dict[str, Any]]:
    """Read what a run's watch has measured so far, in the order of iterations."""
    file = run / FILE
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def best_iteration(run: Path) -> int:
    """Return the iteration of a run's best averages: the first of the least Frechet distance. BadInput without any."""
    entries = history(run)
    if not entries:
        raise BadInput("which", "best", f"last: {run} has no watched weights")
    return int(min(entries, key=lambda entry: entry["frechet"])["iteration"])
