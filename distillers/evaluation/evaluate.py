"""Measure quality and latency of generators beside their teacher, so that the figures do not flatter.

* Every distance is between features; the feature space is named, with its classifier's accuracy, in every report.
* Teacher and student draw from the same seeds under the same conditions: the labels or the SAR tiles of the real items.
* The reference is the held-out split. Beside the models stand a floor (real against real) and, for pairs, the trivial
  baselines. Every report carries n, seeds, device, threads, versions and date.
* Frechet distances grow as n falls: compare two of them only at the same n and in the same feature space.

Pictures are (B,C,H,W) in [-1,1], features (N,d) float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from distillers.data import Part
from distillers.data.captioned import CaptionedFolder
from distillers.data.shapes import CaptionedShapes
from distillers.errors import BadInput
from distillers.evaluation.candidate import VARIED, accumulate, candidates_of, measure_diversity, measure_latency
from distillers.evaluation.latency import device_of
from distillers.evaluation.metrics import mean
from distillers.evaluation.options import MEANS, EvaluationOptions
from distillers.evaluation.reference import (
    check_space,
    real_features,
    real_pictures,
    real_row,
    regions_of,
    spread_evenly,
)
from distillers.evaluation.report import Report, setting
from distillers.evaluation.shape_reader import read_shape, shares
from distillers.models.captions import unpack

if TYPE_CHECKING:
    from distillers.data import ImageData
    from distillers.evaluation.features import Features
    from distillers.generator import Generator

Progress = Callable[[int, int, str], None]  # pictures done, pictures in all, what is being drawn

DISTANCES_FALL = "Frechet distances fall as n grows: compare them only at one n and in one feature space."
PROMPTS = 64  # whose diversity is measured
ENDLESS = 2000  # captions of endless data that tell which pairs training has shown
HALF_FLOOR = "The real row has half the n of the others, so it overstates the floor; give the train split for n."


@torch.no_grad()
def evaluate(
    generator: Generator,
    data: ImageData,
    features: Features,
    options: EvaluationOptions | None = None,
    *,
    teacher: Generator | None = None,
    train: ImageData | None = None,
    progress: Progress | None = None,
) -> Report:
    """Measure a generator at several step counts, and its teacher beside it on the same seeds and conditions.

    All models are moved to the generator's device.

    Args:
        data: the held-out split. The reference is n of its items, evenly spread, or all where n is larger; picture i
            has the label or SAR tile of reference item i. Of pairs too few for the feature space, each is drawn once
            and distances are left out.
        features: the space in which sets of pictures are compared.
        options: the defaults of `EvaluationOptions` without.
        train: the training split. With it the floor is n of its pictures against the reference; without it one half of
            the reference against the other, at half the n.
        progress: called with pictures done, pictures in all, and the name of the row.

    Raises:
        BadInput: what cannot be compared, see `check_evaluation`; step counts that a model does not have.
    """
    options = options or EvaluationOptions()
    check_evaluation(generator, data, features, options, teacher, few=True)
    device = device_of(generator)
    for model in (teacher, features):
        if model is not None:
            model.to(device)
    few = generator.condition.paired and min(options.n, len(data)) <= features.num_features
    if few:  # there are no distances to draw more for
        options = replace(options, n=min(options.n, len(data)))
    n, batch = options.n, options.batch
    indices = spread_evenly(n, len(data))
    reference, colour = real_features(data, n, features, batch)
    candidates = candidates_of(generator, teacher, options, colour, len(reference))
    readable = _is_readable(generator, data)
    done, labels, captions = 0, list[int](), list[str]()
    for start in range(0, n, batch):
        part = indices[start : start + batch]
        seeds, items = range(options.seed + start, options.seed + start + len(part)), data.items(part)
        labels += generator.condition.of_items(items).get("labels") or []
        captions += unpack(items["caption"]) if options.judge is not None else []
        for one in accumulate(candidates, items, seeds, features, options, generator.condition, readable):
            done += len(part)
            if progress:
                progress(done, n * len(candidates), one.row.name)
    regions, unseen = regions_of(data, n), None
    if options.judge is not None and (learnt := captions_of(train)):
        unseen = options.judge.unseen(captions, learnt)
    for one in candidates:
        one.fill_row(reference, regions, unseen)
        if n <= len(data):
            one.fill_classes(reference, torch.tensor(labels), data.labels)
    floor = real_row(reference, data, train, n, features, batch)
    if options.judge is not None:
        real = data.items(indices[: len(reference)])
        verdict = options.judge(real["image"], captions[: len(reference)])
        floor.adherence = verdict.groups(None if unseen is None else unseen[: len(reference)])
        if options.seeds_per_prompt > 1:
            measure_diversity(candidates, data.items(indices[:: max(1, n // PROMPTS)][:PROMPTS]), options, features)
    if options.rewards or readable:
        pictures, condition = real_pictures(data, n)
        rewards = {name: mean(reward(pictures, condition)) or 0.0 for name, reward in options.rewards.items()}
        floor.rewards = rewards or None
        if readable:
            floor.shows = shares(*read_shape(pictures).matches(condition["label"]))
    if options.latency_repeats:
        measure_latency(candidates, data.items(indices[:1]), options.latency_repeats)
    return Report(
        model=generator.info.name,
        teacher=teacher.info.name if teacher else generator.info.teacher,
        task=generator.info.task,
        data=data.name,
        n=n,
        seeds=[options.seed, options.seed + n - 1],
        features=features.card.summary(),
        setting=setting(device),
        notes=_notes(n, data, features, len(reference), train is None, generator.condition.paired, readable, options),
        rows=[floor, *(one.row for one in candidates)],
    )


def captions_of(data: ImageData | None) -> list[str]:
    """List the captions of data, of endless ones the first `ENDLESS`; [] where there are none."""
    if isinstance(data, CaptionedShapes):
        return data.captions(range(ENDLESS)) if data.captioned else []
    return data.texts if isinstance(data, CaptionedFolder) else []


def check_evaluation(
    generator: Generator,
    data: ImageData,
    features: Features,
    options: EvaluationOptions,
    teacher: Generator | None = None,
    few: bool = False,
) -> None:
    """Refuse what `evaluate` could not measure; `few` allows pairs too few for distances between features.

    Raises:
        BadInput: too few pictures for the feature space; data or a teacher of another task, size or labels; a mean of
            samples where there is no true picture; a space that the training compared in.
    """
    info, paired = generator.info, generator.condition.paired
    check_space(info, features, min(options.n, len(data)), few and paired)
    if options.mean_of and not paired:
        raise BadInput("mean_of", options.mean_of, MEANS)
    check_teacher(generator, teacher)
    if (judge := options.judge) is not None:
        if not (generator.condition.argument == "prompts" and data.captioned):
            raise BadInput("judge", judge.name, "none: only models that read text, on data with captions, are judged")
        if judge.name in info.trained_with:
            raise BadInput("judge", judge.name, f"another than the network whose reward {info.name} has learnt from")
    if generator.condition.argument == "labels" and not _same_labels(data.labels, info.labels):
        raise BadInput("data", list(data.labels), f"data with the model's labels: {list(info.labels)}")
    if paired != ("sar" in data.items([0])):
        allowed = f"data for {info.task}: pairs of SAR and optical only where SAR is translated"
        raise BadInput("data", data.name, allowed)
    if not paired and tuple(info.size) != data.size:
        raise BadInput("data.size", data.size, f"the model's {tuple(info.size)}")
    if data.channels != info.channels:
        raise BadInput("data.channels", data.channels, f"the model's {info.channels}")


def check_teacher(student: Generator, teacher: Generator | None) -> None:
    """Refuse with BadInput a teacher of another task, of other labels, or of another size than a student."""
    if teacher is None:
        return
    own, other = student.info, teacher.info
    sized = student.condition.paired or tuple(own.size) == tuple(other.size)
    sized = sized and own.channels == other.channels
    if not (own.task == other.task and sized and _same_labels(own.labels, other.labels)):
        raise BadInput(
            "teacher", other.name, f"a teacher for {own.task} with the size, the bands and the labels of {own.name}"
        )


def _same_labels(labels: Sequence[str], others: Sequence[str]) -> bool:
    """Compare names in their order; a pipeline that knows only numbers agrees with as many names."""
    numbered = any(list(some) == [str(i) for i in range(len(some))] for some in (labels, others))
    return list(labels) == list(others) or (numbered and len(labels) == len(others))


def _is_readable(generator: Generator, data: ImageData) -> bool:
    """Say whether a program can read off the pictures what their labels ask."""
    whole = data.data if isinstance(data, Part) else data
    return generator.condition.argument == "labels" and isinstance(whole, CaptionedShapes) and whole.objects == 1


def _notes(
    n: int,
    data: ImageData,
    features: Features,
    n_reference: int,
    halved: bool,
    paired: bool,
    readable: bool,
    options: EvaluationOptions,
) -> list[str]:
    """Say under the table what its figures do not."""
    notes = [DISTANCES_FALL]
    if n_reference <= (least := features.num_features):
        height, width = data.size
        notes = [
            f"Distances are left out: the test split has {len(data)} tiles of {width}x{height} px and n is {n}; "
            f"{least + 1} are needed. Smaller tiles are more of them, such as --pairs-option size={height // 2}."
        ]
    if readable:
        notes.append(
            "Shows what was asked: a program without a network reads colour and form off the picture and holds them "
            "against the label; half, blurred, doubled and speckled objects show no form."
        )
    if options.judge is not None:
        notes.append(
            f"Follows its prompt: {options.judge.describe()} finds everything that the prompt names; unseen pairs: it "
            "names two things that no training caption names together. Diversity: the distance of one prompt's "
            f"pictures in the feature space, {options.seeds_per_prompt} seeds each of {min(n, VARIED)} prompts, as a "
            "share of different prompts'."
        )
    if n_reference < n:
        notes.append(f"The split has {n_reference} items: conditions repeat, with other seeds.")
    if halved:
        notes.append(HALF_FLOOR)
    if paired:
        notes.append(
            "PSNR and SSIM reward blur. Constant colour: the mean of the very pictures it is measured on, the best "
            "constant there is. PSNR and SSIM are means over pictures."
        )
    return notes
