"""Accumulate the figures of each model and baseline of an evaluation, and fill its row of the report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distillers.evaluation.adherence import Verdict, diversity
from distillers.evaluation.latency import device_of, latencies
from distillers.evaluation.metrics import (
    copy_ratio,
    distances,
    extract,
    kernel_distance,
    mean,
    psnr,
    rmse,
    shifted_psnr,
    ssim,
)
from distillers.evaluation.options import EvaluationOptions
from distillers.evaluation.report import Row
from distillers.evaluation.shape_reader import read_shape, shares
from distillers.models.captions import unpack
from distillers.models.conditions import Condition
from distillers.weights.network import calls_per_step

if TYPE_CHECKING:
    from distillers.data import Batch
    from distillers.evaluation.features import Features
    from distillers.generator import Generator

VARIED = 50  # prompts of which several pictures are drawn; of all of them they would be most of an evaluation's time
LEAST_OF_CLASS = 8  # pictures; fewer have no distance of their own


@dataclass
class Candidate:
    """Hold a model or baseline, its row, and the figures of its pictures so far, a tensor (B,) for each batch."""

    row: Row
    draw: Callable[[Batch, Sequence[int]], Tensor]  # (real items, seeds) -> pictures (B,C,H,W)
    generator: Generator | None = None  # whose latency is measured
    features: list[Tensor] = field(default_factory=list)  # (B,d)
    paired: dict[str, list[Tensor]] = field(default_factory=dict)  # against the real picture of each
    agreement: dict[str, list[Tensor]] = field(default_factory=lambda: {"rmse": [], "psnr": []})
    rewards: dict[str, list[Tensor]] = field(default_factory=dict)
    matches: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # of the asked colour, and form
    verdicts: list[Verdict] = field(default_factory=list)

    def add_paired(self, pictures: Tensor, real: Tensor, sar: Tensor) -> None:
        """Compare pictures with the real ones and with the grey SAR (B,1,H,W) they were drawn from."""
        figures = {
            "psnr": psnr(pictures, real),
            "ssim": ssim(pictures, real),
            "shifted_psnr": shifted_psnr(pictures, real),
            "copy_ratio": copy_ratio(pictures, real, sar),
        }
        for name, values in figures.items():
            self.paired.setdefault(name, []).append(values)

    def add_agreement(self, pictures: Tensor, teacher: str, others: Tensor) -> None:
        """Compare pictures with those of the teacher's row of this name."""
        self.row.agreement = {"with": teacher}
        self.agreement["rmse"].append(rmse(pictures, others))
        self.agreement["psnr"].append(psnr(pictures, others))

    def fill_row(self, reference: Tensor, regions: dict[str, list[int]], unseen: Tensor | None = None) -> None:
        """Average what was accumulated, by region too, and compare with the reference features (N,d).

        unseen: bool (B,), prompts that name a pair that was never learnt; None where that is not known.
        """
        row = self.row
        drawn = torch.cat(self.features)
        if min(len(reference), len(drawn)) > drawn.shape[1]:
            row.update(distances(reference, drawn))
        if self.paired:
            figures = {name: torch.cat(values) for name, values in self.paired.items()}
            row.update({name: mean(values) for name, values in figures.items()})
            by_region: dict[str, dict[str, float]] = {}
            for region, where in regions.items():
                means = {name: mean(values[where]) for name, values in figures.items()}
                by_region[region] = {"n": len(where), **{k: v for k, v in means.items() if v is not None}}
            row.regions = by_region or None
        if row.agreement is not None:
            row.agreement.update({name: mean(torch.cat(values)) for name, values in self.agreement.items()})
        row.rewards = {name: mean(torch.cat(values)) or 0.0 for name, values in self.rewards.items()} or None
        if self.matches:
            row.shows = shares(*(torch.cat(part) for part in zip(*self.matches, strict=True)))
        if self.verdicts:
            row.adherence = Verdict.joined(self.verdicts).groups(unseen)

    def fill_classes(self, reference: Tensor, labels: Tensor, names: Sequence[str]) -> None:
        """Compute KID of each class, for it has no bias at few pictures; reference item i is that of picture i."""
        ours, classes = torch.cat(self.features), dict[str, dict[str, float]]()
        for label in labels.unique().tolist():
            own = labels == label
            if int(own.sum()) >= LEAST_OF_CLASS:
                kid, _ = kernel_distance(reference[own], ours[own])
                classes[names[label]] = {"n": int(own.sum()), "kid": kid}
        self.row.classes = classes or None


def candidates_of(
    generator: Generator, teacher: Generator | None, options: EvaluationOptions, colour: Tensor, n_reference: int
) -> list[Candidate]:
    """List the teacher's rows, the model's, the mean of its samples, and for a translator the trivial baselines."""
    steps = options.steps or sorted(generator.info.step_times) or [generator.info.default_steps]
    models = [(teacher, s) for s in sorted(options.teacher_steps)] if teacher is not None else []
    listed = [_model(model, s, options.n, n_reference) for model, s in [*models, *((generator, s) for s in steps)]]
    if options.mean_of:
        listed.append(_mean(_model(generator, min(steps), options.n, n_reference), options.mean_of))
    if generator.condition.paired:
        listed += _baselines(generator, colour, options.n, n_reference)
    return listed


def _model(generator: Generator, steps: int, n: int, n_reference: int) -> Candidate:
    """Make the candidate of a generator at a step count."""
    role = generator.info.role
    name = f"{role}, {steps} step{'s' * (steps > 1)}"

    def draw(items: Batch, seeds: Sequence[int]) -> Tensor:
        return generator.sample(list(seeds), steps=steps, **generator.condition.of_items(items))

    row = Row(name=name, role=role, n=n, n_reference=n_reference, steps=steps, nfe=evaluations(generator, steps))
    return Candidate(row, draw, generator)


def _mean(one: Candidate, count: int) -> Candidate:
    """Make the candidate of means of samples; their seeds are n apart, so no two pictures share one."""

    def draw(items: Batch, seeds: Sequence[int]) -> Tensor:
        return torch.stack([one.draw(items, [s + k * one.row.n for s in seeds]) for k in range(count)]).mean(0)

    return Candidate(replace(one.row, name=f"{one.row.name}, mean of {count}", nfe=(one.row.nfe or 0) * count), draw)


def _baselines(generator: Generator, colour: Tensor, n: int, n_reference: int) -> Iterator[Candidate]:
    """Make the candidates of a constant colour (C,) and of the SAR itself."""

    def constant(items: Batch, seeds: Sequence[int]) -> Tensor:
        return colour.float().reshape(1, -1, 1, 1).expand_as(items["image"])

    def copied(items: Batch, seeds: Sequence[int]) -> Tensor:
        own = generator.condition
        return own.pictures(own.of_items(items))["SAR"].expand_as(items["image"])

    for name, draw in (("constant colour", constant), ("SAR copied to three bands", copied)):
        yield Candidate(Row(name=name, role="baseline", n=n, n_reference=n_reference), draw)


def accumulate(
    candidates: Sequence[Candidate],
    items: Batch,
    seeds: Sequence[int],
    features: Features,
    options: EvaluationOptions,
    condition: Condition,
    readable: bool,
) -> Iterator[Candidate]:
    """Let every candidate draw for a batch of real items, and yield each when its figures are added.

    Students are compared with the pictures of the last teacher before them.

    Args:
        condition: what the measured model is conditioned on.
        readable: whether a program can read off the pictures what their labels ask.
    """
    teacher: tuple[str, Tensor] | None = None
    asked = {name: items[name] for name in items if name in ("label", "caption")}
    for one in candidates:
        pictures = one.draw(items, seeds).float().cpu()
        one.features.append(extract(features, pictures, len(pictures)))
        for name, reward in options.rewards.items():
            one.rewards.setdefault(name, []).append(reward(pictures, asked))
        if options.judge is not None:
            one.verdicts.append(options.judge(pictures, unpack(items["caption"])))
        if readable:
            one.matches.append(read_shape(pictures).matches(items["label"]))
        if condition.paired:
            one.add_paired(pictures, items["image"], condition.pictures(condition.of_items(items))["SAR"])
        if one.row.role == "teacher":
            teacher = (one.row.name, pictures)
        elif one.row.role == "student" and teacher is not None:
            one.add_agreement(pictures, *teacher)
        yield one


def measure_diversity(
    candidates: Sequence[Candidate], items: Batch, options: EvaluationOptions, features: Features
) -> None:
    """Measure how far the pictures of one prompt lie apart, of the first prompts.

    Seed k of prompt i is `seed + i + k n`, as for means.
    """
    items = {key: value[:VARIED] for key, value in items.items()}
    numbers = range(len(items["caption"]))
    for one in candidates:
        if one.generator is not None:
            seeds = ([options.seed + i + k * options.n for i in numbers] for k in range(options.seeds_per_prompt))
            one.row.diversity = diversity([one.draw(items, each).float().cpu() for each in seeds], features)


def measure_latency(candidates: Sequence[Candidate], item: Batch, repeats: int) -> None:
    """Measure the latency of all generators, which take turns, and the speed-ups over the teacher's rows."""
    timed = [one for one in candidates if one.generator is not None]
    calls = [partial(one.draw, item, [0]) for one in timed]
    device = device_of(timed[-1].generator) if timed[-1].generator is not None else "cpu"
    for one, times in zip(timed, latencies(calls, repeats=repeats, device=device), strict=True):
        one.row.latency_ms = times
    medians = {one.row.name: (one.row.latency_ms or {})["p50"] for one in timed}
    teachers = [one.row.name for one in timed if one.row.role == "teacher"]
    for row in (one.row for one in timed if one.row.role == "student" and teachers):
        row.speed_up = {name: medians[name] / medians[row.name] for name in teachers}


def evaluations(generator: Generator, steps: int) -> int:
    """Count network evaluations per picture; guidance by a second pass doubles them."""
    return steps * calls_per_step(generator.denoiser, generator.info)
