"""Quality and latency of generators, measured so that they do not flatter.

* Every distance is between features; the feature space is named, with its classifier's accuracy, in every report.
* Teacher and student draw from the same seeds under the same conditions: the labels or the SAR tiles of the real items.
* The reference is the held-out split. Beside the models stand a floor (real against real) and, for pairs, the trivial
  baselines. Every report carries n, seeds, device, threads, versions and date.
* Frechet distances grow as n falls: compare two of them only at the same n and in the same feature space.

Pictures are (B,3,H,W) in [-1,1], features (N,d) float64. This file knows generators and data, and nothing of training.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from distillers.data import Part
from distillers.data.shapes import CaptionedShapes
from distillers.errors import BadInput
from distillers.evaluation.pictures import grey_sar
from distillers.evaluation.shape_reader import read_shape, shares
from distillers.models.conditions import Given, subset

if TYPE_CHECKING:
    from distillers.autoencoder import Autoencoder
    from distillers.data import Batch, ImageData
    from distillers.evaluation.features import Features
    from distillers.generator import Generator
    from distillers.weights.manifest import Info
from distillers.evaluation.latency import latencies
from distillers.evaluation.metrics import (
    copy_ratio,
    extract,
    frechet_distance,
    kernel_distance,
    precision_recall,
    psnr,
    rmse,
    shifted_psnr,
    ssim,
)
from distillers.evaluation.report import Report, Row, setting

Judge = Callable[[Tensor, dict[str, Tensor]], Tensor]  # pictures (B,3,H,W), condition -> (B,); see reward.py

Progress = Callable[[int, int, str], None]  # pictures done, pictures in all, what is being drawn


def latency(
    generator: "Generator", *, steps: int, batch: int = 1, repeats: int = 20, warmup: int = 2, sar: Tensor | None = None
) -> dict[str, float]:
    """Milliseconds of one `sample` call of `batch` pictures, warm, from seeds to pixels on the generator's device."""
    call = _call(generator, steps, generator.condition.in_turn(range(batch), sar), range(batch))
    return latencies([call], repeats=repeats, warmup=warmup, device=_device(generator))[0]


def latencies_of(
    models: Sequence[tuple["Generator", int]], item: "Batch", *, repeats: int = 20, warmup: int = 2
) -> list[dict[str, float]]:
    """Milliseconds of one picture by each (generator, steps), told the condition of one real item; they take turns."""
    calls = [_call(generator, steps, generator.condition.of_items(item), [0]) for generator, steps in models]
    return latencies(calls, repeats=repeats, warmup=warmup, device=_device(models[0][0]))


# --- one evaluation


@dataclass
class _Contestant:
    """Who draws, and what has been measured of the pictures so far."""

    row: Row
    draw: Callable[["Batch", Sequence[int]], Tensor]  # (the real items, the seeds) -> pictures
    generator: "Generator | None" = None
    features: list[Tensor] = field(default_factory=list)
    pairs: dict[str, list[Tensor]] = field(default_factory=dict)
    agreement: dict[str, list[Tensor]] = field(default_factory=lambda: {"rmse": [], "psnr": []})
    rewards: dict[str, list[Tensor]] = field(default_factory=dict)
    shows: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # the asked colour, the asked form


@torch.no_grad()
def evaluate(
    generator: "Generator", data: "ImageData", *, n: int, features: "Features", seed: int = 0,
    steps: Sequence[int] | None = None, teacher: "Generator | None" = None, teacher_steps: Sequence[int] = (50,),
    train: "ImageData | None" = None, split: str = "test", batch: int = 64, latency_repeats: int = 20,
    mean_of: int = 0, rewards: Mapping[str, Judge] | None = None, history: Path | None = None,
    drawn_by_teacher: Tensor | None = None, device: str | torch.device | None = None, progress: Progress | None = None,
) -> Report:  # fmt: skip
    """Measure `generator` at each of `steps` (None: all it publishes), and `teacher` at `teacher_steps` beside it.

    data: the held-out split. The reference is n of its items, evenly spread (all of them where n is larger); picture i
    has seed `seed + i` and the label or SAR tile of reference item i. train: the training split; with it the floor is
    n of its pictures against the reference, without it one half of the reference against the other, at half the n.
    Agreement is with the teacher at the largest of `teacher_steps`. latency_repeats 0: no latency. n must exceed the
    number of features.

    mean_of: for translators, one more row at the fewest of `steps`: picture i is the mean of so many samples, seeds
    seed + i + k n for k = 0, 1, ...; 0 for none. Such a mean is what PSNR rewards, and no sample of anything.

    rewards: (pictures, condition) -> (B,), by name; their means stand in every row. history: a training's folder of
    samples, see `teacher_hacking`; held against the teacher's pictures of this evaluation, or against those given.
    """
    steps = steps or sorted(generator.info.step_times) or [generator.info.default_steps]
    check_evaluation(generator, teacher, data, n=n, seed=seed, batch=batch, features=features, mean_of=mean_of)
    for model in (generator, teacher, features):
        if model is not None:
            model.to(device or _device(generator))
    indices = _spread(n, len(data))
    reference, colour = _look(data, sorted(set(indices)), features, batch)
    entries = [(teacher, s) for s in sorted(teacher_steps)] if teacher is not None else []
    contestants = [
        *(_entrant(model, s, n, len(reference)) for model, s in [*entries, *((generator, s) for s in steps)]),
        *(_mean_entrant(generator, s, n, len(reference), mean_of) for s in [min(steps)] if mean_of),
        *(_baselines(colour, n, len(reference), generator) if generator.condition.paired else ()),
    ]
    done, judges, read = 0, rewards or {}, _readable(generator, data)
    labels: list[int] = []
    for start in range(0, n, batch):
        part = indices[start : start + batch]
        seeds, items = range(seed + start, seed + start + len(part)), data.items(part)
        labels += generator.condition.of_items(items).get("labels") or []
        for contestant in _round(contestants, items, seeds, features, judges, generator.info.sar, read):
            done += len(part)
            if progress:
                progress(done, n * len(contestants), contestant.row.name)
    regions = _regions(data, indices)
    for contestant in contestants:
        _settle(contestant, reference, regions)
        if n <= len(data):  # the reference item of each picture stands where the picture does
            contestant.row.classes = _classes(torch.tensor(labels), data.labels, reference, contestant.features)
    floor = _floor(reference, data, train, n, features, batch)
    floor.rewards = {name: _mean(judge(*_seen(data, indices))) or 0.0 for name, judge in judges.items()} or None
    if read:
        pictures, condition = _seen(data, indices)
        floor.shows = shares(*read_shape(pictures).matches(condition["label"]))
    theirs = [torch.cat(one.features) for one in contestants if one.row.role == "teacher"]
    if drawn_by_teacher is not None:
        theirs = [extract(features, drawn_by_teacher, batch)]
    told = teacher_hacking(history, reference, theirs[-1], features) if history and theirs else []
    if latency_repeats:
        _time(contestants, data.items(indices[:1]), latency_repeats)
    card = features.card
    return Report(
        model=generator.info.name, teacher=teacher.info.name if teacher else generator.info.teacher, n=n, split=split,
        task=generator.info.task, data=data.name, seeds=[seed, seed + n - 1],
        features={"name": card.name, "accuracy": card.accuracy, "n_test": card.n_test, "data": card.data},
        setting=setting(_device(generator)), history=told,
        notes=[*_notes(n, len(reference), train, paired=generator.condition.paired, read=read), *hacking_notes(told)],
        rows=[floor, *(contestant.row for contestant in contestants)],
    )  # fmt: skip


@torch.no_grad()
def evaluate_reconstruction(
    autoencoder: "Autoencoder", data: "ImageData", *, n: int, features: "Features", train: "ImageData | None" = None,
    split: str = "test", batch: int = 64, latency_repeats: int = 20, progress: Progress | None = None,
) -> Report:  # fmt: skip
    """Compare n held-out pictures with their reconstructions: PSNR, SSIM, and the distances between the two sets.

    The sets hold the same pictures, so a perfect autoencoder has the distance 0; the floor, real against real, is what
    other pictures of the same kind have. Latency is that of one picture, there and back.

    Raises:
        BadInput: too few pictures for the feature space, or a space that the training's loss compared in.
    """
    info, indices = autoencoder.info, sorted(set(_spread(n, len(data))))
    _check_space(info, features, len(indices))
    if data.size % info.patch:
        raise BadInput("data.size", data.size, f"a multiple of {info.patch}")
    features.to(_device(autoencoder))
    row = Row(name="reconstruction", role="autoencoder", n=len(indices), n_reference=len(indices))
    one, seen = _Contestant(row, lambda items, _: autoencoder.reconstruct(items["image"])), []
    for start in range(0, len(indices), batch):
        items = data.items(indices[start : start + batch])
        real, made = items["image"], one.draw(items, [])
        seen.append(extract(features, real, batch))
        one.features.append(extract(features, made, batch))
        for name, values in {"psnr": psnr(made, real), "ssim": ssim(made, real)}.items():
            one.pairs.setdefault(name, []).append(values)
        if progress:
            progress(start + len(real), len(indices), row.name)
    reference = torch.cat(seen)
    _settle(one, reference, {})
    if latency_repeats:
        call, item = one.draw, data.items(indices[:1])
        row.latency_ms = latencies([lambda: call(item, [])], repeats=latency_repeats, device=_device(autoencoder))[0]
    card = features.card
    return Report(
        model=info.name, teacher=None, n=len(indices), split=split, task=info.task, data=data.name, seeds=[],
        features={"name": card.name, "accuracy": card.accuracy, "n_test": card.n_test, "data": card.data},
        setting=setting(_device(autoencoder)), notes=_notes(len(indices), len(indices), train),
        rows=[_floor(reference, data, train, len(indices), features, batch), row],
    )  # fmt: skip


def _check_space(info: "Info", features: "Features", pictures: int) -> None:
    """Too few pictures for the space, or a space that a loss of the training looked through."""
    if features.card.name in info.trained_with:
        allowed = f"a space that {info.name} was not trained in: its loss made it good in {features.card.name}"
        raise BadInput("features", features.card.name, allowed)
    if pictures <= features.num_features:
        raise BadInput("n", pictures, f"more than the {features.num_features} features of {features.card.name}")


# --- is the student learning the teacher's mistakes?


def teacher_hacking(samples: Path, real: Tensor, teacher: Tensor, features: "Features") -> list[dict[str, float]]:
    """KID of the samples that a training left (NNNNNN.npy, uint8 (B,H,W,3)) to the teacher's pictures and to real ones.

    real, teacher: features (N,d). Sets of other sizes may be compared, for KID has no bias. Empty without samples.
    """
    told = []
    for file in sorted(samples.glob("*.npy")):
        pictures = torch.from_numpy(np.load(file)).permute(0, 3, 1, 2) / 127.5 - 1
        if len(pictures) < 32:  # a grid to look at; too few to measure
            continue
        seen = extract(features, pictures.to(_device(features)))
        (to_teacher, spread), (to_real, _) = (kernel_distance(them, seen) for them in (teacher, real))
        told.append({
            "iteration": int(file.stem), "n": len(seen), "kid_teacher": to_teacher, "kid_real": to_real,
            "kid_std": spread,
        })  # fmt: skip
    return told


def hacking_notes(told: Sequence[dict[str, float]]) -> list[str]:
    """One line on the course of both distances; a warning where the teacher comes nearer and the data go away."""
    if not told:
        return []
    course = ", ".join(f"{1000 * t['kid_teacher']:.0f} / {1000 * t['kid_real']:.0f}" for t in told)
    places = ", ".join(str(int(t["iteration"])) for t in told)
    notes = [
        f"Teacher hacking: KID x1000 of {int(told[-1]['n'])} samples to the teacher / to real data at iterations "
        f"{places}: {course}."
    ]
    best, last = min(told, key=lambda t: t["kid_real"]), told[-1]
    margin = 2 * max(best["kid_std"], last["kid_std"])
    if last["kid_teacher"] < best["kid_teacher"] and last["kid_real"] > best["kid_real"] + margin:
        notes.append(
            f"Warning: since iteration {int(best['iteration'])} the student comes nearer to its teacher and goes away "
            "from the data. It learns the teacher's mistakes: stop earlier, or add real data (an adversarial term)."
        )
    return notes


def check_evaluation(
    generator: "Generator", teacher: "Generator | None", data: "ImageData", *, n: int, features: "Features",
    seed: int = 0, batch: int = 64, mean_of: int = 0,
) -> None:  # fmt: skip
    """BadInput for what `evaluate` could not measure."""
    info, paired = generator.info, generator.condition.paired
    _check_space(info, features, min(n, len(data)))
    if seed < 0 or batch < 1:
        raise BadInput("seed, batch", (seed, batch), "seed of 0 or more, batch of 1 or more")
    if mean_of and (mean_of < 2 or not paired):
        raise BadInput("mean_of", mean_of, "0, or 2 and more where SAR is translated: one truth has many samples")
    _check_teacher(generator, teacher)
    if generator.condition.argument == "labels" and not _agree(data.labels, info.labels):
        raise BadInput("data", list(data.labels), f"data with the model's labels: {list(info.labels)}")
    if paired != ("sar" in data.items([0])):
        raise BadInput(
            "data", data.name, f"data for {info.task}: pairs of SAR and optical only where SAR is translated"
        )
    if not paired and list(info.size) != [data.size, data.size]:
        raise BadInput("data.size", data.size, f"the model's {list(info.size)}")


def _check_teacher(student: "Generator", teacher: "Generator | None") -> None:
    if teacher is None:
        return
    own, its = student.info, teacher.info
    sized = student.condition.paired or tuple(own.size) == tuple(its.size)
    if not (own.task == its.task and sized and _agree(own.labels, its.labels)):
        raise BadInput("teacher", its.name, f"a teacher for {own.task} with the size and the labels of {own.name}")


def _agree(labels: Sequence[str], others: Sequence[str]) -> bool:
    """The same names in the same order; a pipeline that knows only numbers agrees with as many names."""
    numbered = any(list(some) == [str(i) for i in range(len(some))] for some in (labels, others))
    return list(labels) == list(others) or (numbered and len(labels) == len(others))


def _spread(n: int, available: int) -> list[int]:
    """n positions spread evenly over a split; where n is larger, the split again and again."""
    if n <= available:
        return [int(i) for i in np.linspace(0, available - 1, n).round()]
    return [i % available for i in range(n)]


def _look(data: "ImageData", indices: list[int], features: "Features", batch: int) -> tuple[Tensor, Tensor]:
    """(features (N,d), mean colour (3,)) of real items."""
    seen, colours = [], []
    for start in range(0, len(indices), batch):
        image = data.items(indices[start : start + batch])["image"]
        seen.append(extract(features, image, batch))
        colours.append(image.double().mean((2, 3)))
    return torch.cat(seen), torch.cat(colours).mean(0)


def _entrant(generator: "Generator", steps: int, n: int, n_reference: int) -> _Contestant:
    role = generator.info.role
    name = f"{role}, {steps} step{'s' * (steps > 1)}"
    row = Row(name=name, role=role, n=n, n_reference=n_reference, steps=steps, nfe=_nfe(generator, steps))
    return _Contestant(
        row, lambda items, seeds: _call(generator, steps, generator.condition.of_items(items), seeds)(), generator
    )


def _mean_entrant(generator: "Generator", steps: int, n: int, n_reference: int, mean_of: int) -> _Contestant:
    """The mean of samples whose seeds are n apart, so that no two pictures share one. It has no latency."""
    one = _entrant(generator, steps, n, n_reference)

    def draw(items: "Batch", seeds: Sequence[int]) -> Tensor:
        return torch.stack([one.draw(items, [s + k * n for s in seeds]) for k in range(mean_of)]).mean(0)

    row = replace(one.row, name=f"{one.row.name}, mean of {mean_of}", nfe=(one.row.nfe or 0) * mean_of)
    return _Contestant(row, draw)


def _baselines(colour: Tensor, n: int, n_reference: int, generator: "Generator") -> Iterator[_Contestant]:
    def constant(items: "Batch", seeds: Sequence[int]) -> Tensor:
        return colour.float().reshape(1, 3, 1, 1).expand_as(items["image"])

    def copied(items: "Batch", seeds: Sequence[int]) -> Tensor:
        return grey_sar(items["sar"], generator.info.sar).expand_as(items["image"])

    for name, draw in (("constant colour", constant), ("SAR copied to three bands", copied)):
        yield _Contestant(Row(name=name, role="baseline", n=n, n_reference=n_reference), draw)


def _round(
    contestants: list[_Contestant],
    items: "Batch",
    seeds: Sequence[int],
    features: "Features",
    judges: Mapping[str, Judge],
    radiometry: dict[str, Any] | None,
    read: bool,
) -> Iterator[_Contestant]:
    """Everybody draws for one batch of real items; students are held against the last teacher's pictures."""
    held: tuple[str, Tensor] | None = None
    for one in contestants:
        pictures = one.draw(items, seeds).float().cpu()
        one.features.append(extract(features, pictures, len(pictures)))
        for name, judge in judges.items():
            one.rewards.setdefault(name, []).append(judge(pictures, {k: items[k] for k in items if k == "label"}))
        if read:
            one.shows.append(read_shape(pictures).matches(items["label"]))
        if "sar" in items:
            real, seen = items["image"], grey_sar(items["sar"], radiometry)
            measured = {"psnr": psnr(pictures, real), "ssim": ssim(pictures, real)}
            measured |= {"shifted_psnr": shifted_psnr(pictures, real), "copy_ratio": copy_ratio(pictures, real, seen)}
            for name, values in measured.items():
                one.pairs.setdefault(name, []).append(values)
        if one.row.role == "teacher":
            held = (one.row.name, pictures)
        elif one.row.role == "student" and held is not None:
            one.row.agreement = {"with": held[0]}
            one.agreement["rmse"].append(rmse(pictures, held[1]))
            one.agreement["psnr"].append(psnr(pictures, held[1]))
        yield one


def _settle(one: _Contestant, reference: Tensor, regions: dict[str, list[int]]) -> None:
    """From what was gathered to the row."""
    row, seen = one.row, torch.cat(one.features)
    _fill_distances(row, reference, seen)
    if one.pairs:
        pairs = {name: torch.cat(values) for name, values in one.pairs.items()}
        for name, values in pairs.items():
            setattr(row, name, _mean(values))
        row.regions = {
            region: {"n": len(where), **{k: v for k, p in pairs.items() if (v := _mean(p[where])) is not None}}
            for region, where in regions.items()
        } or None  # fmt: skip
    if row.agreement is not None:
        row.agreement.update({name: _mean(torch.cat(values)) for name, values in one.agreement.items()})
    row.rewards = {name: _mean(torch.cat(values)) or 0.0 for name, values in one.rewards.items()} or None
    if one.shows:
        row.shows = shares(*(torch.cat(shown) for shown in zip(*one.shows, strict=True)))


def _readable(generator: "Generator", data: "ImageData") -> bool:
    """Whether a program can read off these pictures what their labels ask."""
    whole = data.data if isinstance(data, Part) else data
    return generator.condition.argument == "labels" and isinstance(whole, CaptionedShapes) and whole.objects == 1


def _seen(data: "ImageData", indices: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
    """Real pictures and their condition, as a judge wants them."""
    items = data.items(sorted(set(indices)))
    return items["image"], {k: items[k] for k in items if k == "label"}


def _classes(
    labels: Tensor, names: Sequence[str], reference: Tensor, seen: list[Tensor]
) -> dict[str, dict[str, float]] | None:
    """Distance of each class by itself. KID, for it has no bias at few pictures, unlike Frechet's."""
    found, drawn = {}, torch.cat(seen)
    for k in labels.unique().tolist():
        own = labels == k
        if int(own.sum()) > 7:
            kid, _ = kernel_distance(reference[own], drawn[own])
            found[names[k]] = {"n": int(own.sum()), "kid": kid}
    return found or None


def _fill_distances(row: Row, reference: Tensor, seen: Tensor) -> None:
    row.frechet = frechet_distance(reference, seen)
    row.kid_mean, row.kid_std = kernel_distance(reference, seen)
    row.precision, row.recall = precision_recall(reference, seen)


def _regions(data: "ImageData", indices: list[int]) -> dict[str, list[int]]:
    """Region name -> positions in the evaluation, where the data knows regions."""
    found: dict[str, list[int]] = {}
    region_of = getattr(data, "region_of", None)
    for position, index in enumerate(indices):
        if region_of is not None and (region := region_of(index)):
            found.setdefault(region, []).append(position)
    return found


def _floor(
    reference: Tensor, data: "ImageData", train: "ImageData | None", n: int, features: "Features", batch: int
) -> Row:
    """Real against real: what a perfect generator would get at this n."""
    if train is not None:
        seen, name = _look(train, _spread(min(n, len(train)), len(train)), features, batch)[0], "real, train split"
    else:
        reference, seen, name = reference[0::2], reference[1::2], "real, half against half"
    row = Row(name=name, role="real", n=len(seen), n_reference=len(reference))
    if min(row.n, row.n_reference) > features.num_features:
        _fill_distances(row, reference, seen)
    return row


def _notes(
    n: int, n_reference: int, train: "ImageData | None", *, paired: bool = False, read: bool = False
) -> list[str]:
    notes = ["Frechet distances fall as n grows: compare them only at one n and in one feature space."]
    if read:
        notes.append(
            "Shows what was asked: a program without a network reads colour and form off the picture and holds them "
            "against the label; half, blurred, doubled and speckled objects show no form."
        )
    if n_reference < n:
        notes.append(f"The split has {n_reference} items: conditions repeat, with other seeds.")
    if train is None:
        notes.append(
            "The real row has half the n of the others, so it overstates the floor; give the train split for n."
        )
    if paired:
        notes.append(
            "PSNR and SSIM reward blur. Constant colour: the mean of the very pictures it is measured on, the best "
            "constant there is. PSNR and SSIM are means over pictures."
        )
    return notes


def _time(contestants: list[_Contestant], item: "Batch", repeats: int) -> None:
    """Latency of every generator, taking turns, and speed-ups over the teacher's rows."""
    timed = [one for one in contestants if one.generator is not None]
    device = _device(timed[-1].generator)
    calls = [partial(one.draw, item, [0]) for one in timed]
    for one, times in zip(timed, latencies(calls, repeats=repeats, device=device), strict=True):
        one.row.latency_ms = times
    medians = {one.row.name: (one.row.latency_ms or {})["p50"] for one in timed}
    teachers = [one.row.name for one in timed if one.row.role == "teacher"]
    for row in (one.row for one in timed if one.row.role == "student" and teachers):
        row.speed_up = {name: medians[name] / medians[row.name] for name in teachers}


# --- asking a generator


def _call(generator: "Generator", steps: int, condition: Given, seeds: Sequence[int]) -> Callable[[], Tensor]:
    return lambda: generator.sample(list(seeds), steps=steps, **condition)


def _nfe(generator: "Generator", steps: int) -> int:
    """Network evaluations per picture; guidance at sampling time doubles them."""
    return steps if generator.info.guidance_scale == 1 else 2 * steps


def _device(generator: nn.Module | None) -> torch.device:
    return torch.device("cpu") if generator is None else next(generator.parameters()).device


def _mean(values: Tensor) -> float | None:
    value = float(values.double().mean())
    return None if math.isnan(value) else value


# --- the small one


@torch.no_grad()
def quick_benchmark(
    student: "Generator", teacher: "Generator | None" = None, *, n: int = 16, seed: int = 0, steps: int | None = None,
    features: "Features | None" = None, teacher_steps: int = 50, latency_repeats: int = 10, batch: int = 16,
    sar: Tensor | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Latency now on this device, and how far the student's pictures are from the teacher's on the same noises.

    JSON-able. Labels go in turn over the classes; a SAR model needs `sar`, tiles (B,1,H,W) in [-1,1]. Without a
    teacher: latency alone. Without features: no Frechet distance, no KID. This is agreement, not realism.
    """
    if n < 1 or seed < 0 or batch < 1:
        raise BadInput("n, seed, batch", (n, seed, batch), "n and batch of 1 or more, seed of 0 or more")
    _check_teacher(student, teacher)
    steps = student.info.default_steps if steps is None else steps
    models = [(student, steps)] + ([(teacher, teacher_steps)] if teacher is not None else [])
    alone = student.condition.in_turn(range(1), sar)
    speeds = latencies(
        [_call(model, s, alone, [seed]) for model, s in models],
        repeats=latency_repeats, warmup=1, device=_device(student),
    )  # fmt: skip
    result: dict[str, Any] = {
        "model": student.info.name, "steps": steps, "nfe": _nfe(student, steps), "n": n, "seeds": [seed, seed + n - 1],
        **setting(_device(student)), "latency_ms": {"batch": 1, **speeds[0]}, "teacher": None,
    }  # fmt: skip
    if teacher is None:
        return {**result, "note": "The teacher is not here: latency alone was measured."}
    result["teacher"] = {
        "model": teacher.info.name, "steps": teacher_steps, "nfe": _nfe(teacher, teacher_steps),
        "latency_ms": {"batch": 1, **speeds[1]},
    }  # fmt: skip
    result["speed_up"] = speeds[1]["p50"] / speeds[0]["p50"]
    condition = student.condition.in_turn(range(n), sar)
    ours, theirs = (_draw(model, s, condition, n, seed, batch) for model, s in models)
    result["against_teacher"] = _agreement(ours, theirs, features, batch)
    result["note"] = (
        f"{n} pictures are few: read these as a check that the model works, not as its quality. They say how close the "
        "student comes to its teacher on the same noises, not how real either looks; the model's report.json says that."
    )
    if features is not None and n <= features.num_features:
        result["note"] += (
            f" With {n} pictures for {features.num_features} features the Frechet distance is biased high."
        )
    return result


def _draw(generator: "Generator", steps: int, condition: Given, n: int, seed: int, batch: int) -> Tensor:
    parts = []
    for start in range(0, n, batch):
        end = min(start + batch, n)
        parts.append(
            _call(generator, steps, subset(condition, start, end), range(seed + start, seed + end))().float().cpu()
        )
    return torch.cat(parts)


def _agreement(ours: Tensor, theirs: Tensor, features: "Features | None", batch: int) -> dict[str, Any]:
    found: dict[str, Any] = {
        "rmse": _mean(rmse(ours, theirs)), "psnr": _mean(psnr(ours, theirs)), "ssim": _mean(ssim(ours, theirs)),
    }  # fmt: skip
    if features is not None:
        a, b = extract(features, theirs, batch), extract(features, ours, batch)
        found["frechet"] = frechet_distance(a, b, few=True) if len(a) > 1 else None
        found["kid_mean"], found["kid_std"] = kernel_distance(a, b) if len(a) > 3 else (None, None)
        found["features"] = {
            "name": features.card.name,
            "accuracy": features.card.accuracy,
            "n_test": features.card.n_test,
        }
    return found
