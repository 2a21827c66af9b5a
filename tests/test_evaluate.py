"""Distances with known answers, baselines on real pairs, and one whole report from real (tiny) generators."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import tiny
from PIL import Image
from torch import Tensor

from distillers.data import ImageData, open_data
from distillers.errors import BadInput
from distillers.evaluation.evaluate import evaluate
from distillers.evaluation.features import Features, load_features
from distillers.evaluation.latency import latencies, latency
from distillers.evaluation.metrics import extract, frechet_distance, kernel_distance, precision_recall, psnr, rmse, ssim
from distillers.evaluation.options import EvaluationOptions
from distillers.evaluation.pictures import grid, grid_png, side_by_side, to_pixels
from distillers.evaluation.quick_benchmark import quick_benchmark
from distillers.evaluation.reference import real_pictures
from distillers.evaluation.report import Report
from distillers.evaluation.student_drift import describe_course, track_training
from distillers.generator import Generator

PAIRS = Path(__file__).resolve().parents[2] / "shared" / "data" / "sentinel-pairs"


def gaussian(n: int, d: int, seed: int, mean: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return mean + scale * torch.randn(n, d, generator=rng, dtype=torch.float64)


# --- distances


def test_frechet_distance_of_gaussians_is_the_closed_form() -> None:
    # N(0, 1) against N(0.5, 2^2) in 8 dimensions: 8 (0.5^2 + (2 - 1)^2) = 10
    value = frechet_distance(gaussian(20000, 8, 0), gaussian(20000, 8, 1, mean=0.5, scale=2.0))
    assert value == pytest.approx(10, rel=0.02)
    turn = torch.linalg.qr(gaussian(8, 8, 2)).Q  # full covariances: a rotation changes nothing
    a, b = gaussian(500, 8, 3), gaussian(500, 8, 4) * torch.arange(1, 9)
    assert frechet_distance(a @ turn, b @ turn) == pytest.approx(frechet_distance(a, b), rel=1e-9)


def test_identical_sets_are_at_no_distance_and_fully_precise() -> None:
    a = gaussian(300, 16, 0)
    assert frechet_distance(a, a.flip(0)) == pytest.approx(0, abs=1e-9)
    assert precision_recall(a, a.flip(0)) == (1, 1)
    assert abs(kernel_distance(a, a.flip(0))[0]) < 0.1


def test_kernel_distance_is_unbiased_where_frechet_is_not_and_grows_with_the_shift() -> None:
    near, _ = kernel_distance(gaussian(200, 16, 0), gaussian(200, 16, 1))
    far, deviation = kernel_distance(gaussian(200, 16, 0), gaussian(200, 16, 1, mean=1.0))
    # (x.y/16 + 1)^3 for means 0 and m in 16 dimensions of unit variance: E over the two sets gives 6.57 for m = 1
    k = [(1 + 3 * c + 3 * (c**2 + v) + c**3 + 3 * c * v) for c, v in ((0, 1 / 16), (1, 3 / 16), (0, 2 / 16))]
    assert abs(near) < 0.05 and deviation < 1 and far == pytest.approx(k[0] + k[1] - 2 * k[2], rel=0.25)
    assert frechet_distance(gaussian(200, 16, 0), gaussian(200, 16, 1)) > 0.1
    state = torch.get_rng_state()
    assert kernel_distance(gaussian(200, 16, 0), gaussian(200, 16, 1))[0] == near  # seeded, and leaves no trace
    assert torch.equal(state, torch.get_rng_state())


def test_recall_sees_a_collapsed_set_and_precision_does_not() -> None:
    real = gaussian(400, 8, 0)
    collapsed = real[:4].repeat(100, 1) + 1e-3 * gaussian(400, 8, 1)
    precision, recall = precision_recall(real, collapsed)
    assert precision > 0.99 and recall < 0.05
    precision, recall = precision_recall(real, gaussian(400, 8, 2, mean=20))
    assert (precision, recall) == (0, 0)


def test_precision_and_recall_on_a_line_worked_by_hand() -> None:
    real = torch.tensor([[0.0], [1.0], [2.0], [10.0]])  # k = 1: radii 1, 1, 1, 8
    fake = torch.tensor([[0.5], [3.5], [-3.0], [50.0]])  # k = 1: radii 3, 3, 3.5, 46.5
    # inside the reals: 0.5 (of 0), 3.5 (of 10), not -3, not 50; inside the fakes: 0, 1, 2 (of 0.5), 10 (of 50)
    assert precision_recall(real, fake, k=1) == (0.5, 1.0)


def test_too_few_pictures_for_the_features_is_refused() -> None:
    with pytest.raises(BadInput, match="n: got 16; allowed: 17 or more"):
        frechet_distance(gaussian(100, 16, 0), gaussian(16, 16, 1))
    assert frechet_distance(gaussian(10, 16, 0), gaussian(10, 16, 1), few=True) > 0
    for measure in (kernel_distance, precision_recall):
        with pytest.raises(BadInput, match="n: got 3"):
            measure(gaussian(3, 16, 0), gaussian(30, 16, 1))
        with pytest.raises(BadInput, match="with one d"):
            measure(gaussian(30, 16, 0), gaussian(30, 8, 1))


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_features_that_are_not_finite_are_refused(distance: Callable[..., Any], value: float) -> None:
    broken = gaussian(100, 8, 0)
    broken[3, 5] = value
    with pytest.raises(BadInput, match=r"features: got .no finite ones for 1 pictures"):
        distance(gaussian(100, 8, 1), broken)


# --- pairs


def test_psnr_ssim_and_rmse_of_known_pairs() -> None:
    black, grey = -torch.ones(2, 3, 32, 32), torch.zeros(2, 3, 32, 32)
    assert psnr(black, grey).tolist() == pytest.approx([20 * math.log10(2)] * 2, abs=1e-4)  # half of the range
    assert rmse(black, grey).tolist() == [1, 1]
    assert psnr(grey, grey).tolist() == [100, 100]
    # constants a = 0, b = 1/2 on [0,1]: only the luminance term is left, c1 / (b^2 + c1) with c1 = 0.01^2
    assert ssim(black, grey).tolist() == pytest.approx([1e-4 / (0.25 + 1e-4)] * 2, rel=1e-3)
    noise = torch.rand(2, 3, 32, 32) * 2 - 1
    assert ssim(noise, noise).tolist() == pytest.approx([1, 1], abs=1e-5)
    assert ssim(noise[..., :8, :8], noise[..., :8, :8]).isnan().all()  # no window fits


def test_the_trivial_baselines_of_real_pairs_are_reproduced() -> None:
    if not PAIRS.is_dir():
        pytest.skip("the Sentinel pairs are not at ../shared/data/sentinel-pairs")
    items = open_data("pairs", path=PAIRS, split="test", size=256)
    batch = items.items(range(0, len(items), 2))
    optical = batch["image"]
    constant = optical.mean((0, 2, 3), keepdim=True).expand_as(optical)
    assert psnr(constant, optical).mean() == pytest.approx(16.1, abs=0.5)  # dB, as stated beside the data
    assert psnr(batch["sar"].expand_as(optical), optical).mean() == pytest.approx(11.8, abs=0.5)


# --- latency


def test_latencies_take_turns_and_are_percentiles() -> None:
    order: list[str] = []
    slow = torch.randn(600, 600)

    def fast_call() -> None:
        order.append("fast")

    def slow_call() -> torch.Tensor:
        order.append("slow")
        return slow @ slow @ slow

    fast_times, slow_times = latencies([fast_call, slow_call], repeats=5, warmup=1)
    assert order == ["fast", "slow"] * 6 and fast_times["n"] == 5
    assert fast_times["p50"] <= fast_times["p90"] <= fast_times["p99"] and fast_times["p50"] < slow_times["p50"]
    with pytest.raises(BadInput, match="repeats"):
        latencies([fast_call], repeats=0)


# --- whole evaluations, with real networks of a few hundred thousand numbers at most


@pytest.fixture(scope="module")
def shapes() -> ImageData:
    return open_data("shapes", size=16, split="test", objects=1)  # what the feature space was trained on


@pytest.fixture(scope="module")
def space() -> Features:
    return load_features("shapes")


@pytest.fixture(scope="module")
def report(shapes: ImageData, space: Features) -> Report:
    student, teacher = (tiny("class-to-image", role, shapes.labels, i) for i, role in enumerate(("student", "teacher")))
    heard: list[tuple[int, int, str]] = []
    report = evaluate(
        student,
        shapes,
        space,
        EvaluationOptions(n=300, seed=5, teacher_steps=(4, 3), latency_repeats=2),
        teacher=teacher,
        train=open_data("shapes", size=16, objects=1),
        progress=lambda *said: heard.append(said),
    )
    assert heard[-1][:2] == (1200, 1200) and all(before[0] < after[0] for before, after in pairwise(heard))
    return report


def test_a_report_says_on_what_with_what_and_when(report: Report) -> None:
    told = json.loads(report.to_json())
    assert told["n"] == 300 and told["seeds"] == [5, 304] and told["data"] == "shapes" and told["split"] == "test"
    assert told["features"]["name"] == "shapes" and told["features"]["accuracy"] > 0.9
    assert told["setting"].keys() == {"device", "date", "torch", "threads"} and told["setting"]["device"].startswith(
        "cpu"
    )
    assert [row["name"] for row in told["rows"]] == [
        "real, train split", "teacher, 3 steps", "teacher, 4 steps", "student, 1 step", "student, 2 steps",
    ]  # fmt: skip
    assert [row.get("nfe") for row in told["rows"]] == [None, 3, 4, 1, 2]
    for row in told["rows"]:
        assert row["n"] == 300 and row["n_reference"] == 300
        assert row["frechet"] > 0 and 0 <= row["precision"] <= 1 and 0 <= row["recall"] <= 1 and "kid_mean" in row


def test_untrained_networks_are_far_from_the_floor(report: Report) -> None:
    floor, *others = report.rows
    assert floor.frechet is not None and floor.recall is not None and floor.recall > 0.6
    assert all(row.frechet is not None and row.frechet > 5 * floor.frechet for row in others)
    assert floor.precision is not None and floor.precision > 0.6
    assert all(row.precision is not None and row.precision < 0.4 for row in others)


def test_the_student_is_timed_and_held_against_the_teacher(report: Report) -> None:
    one = next(row for row in report.rows if row.name == "student, 1 step")
    teacher = next(row for row in report.rows if row.name == "teacher, 4 steps")
    assert one.latency_ms is not None and teacher.latency_ms is not None and one.speed_up is not None
    assert one.speed_up["teacher, 4 steps"] == pytest.approx(teacher.latency_ms["p50"] / one.latency_ms["p50"])
    assert one.agreement is not None and one.agreement["with"] == "teacher, 4 steps" and one.agreement["rmse"] > 0
    assert teacher.agreement is None


def test_the_table_has_a_row_for_each_contestant_and_its_conditions(report: Report) -> None:
    text = report.markdown()
    table = text.partition("\n\n")[0]
    assert table.count("\n| ") == 1 + len(report.rows) and "PSNR" not in table  # the separator, and no pairs here
    assert "| RMSE to teacher, 4 steps |" in text and "| speed-up over teacher, 3 steps |" in text
    assert (
        "n = 300, seeds 5 to 304" in text
        and "shapes, classifier accuracy" in text
        and str(report.setting["date"]) in text
    )


def test_a_student_that_is_its_teacher_agrees_with_it_and_the_figures_repeat(
    shapes: ImageData, space: Features
) -> None:
    teacher = tiny("class-to-image", "teacher", shapes.labels, seed=1)
    twin = tiny("class-to-image", "teacher", shapes.labels, seed=1)
    twin.info = replace(twin.info, role="student")
    again = [
        evaluate(
            twin,
            shapes,
            space,
            EvaluationOptions(n=130, steps=[3], teacher_steps=[3], latency_repeats=0, batch=b),
            teacher=teacher,
        )
        for b in (64, 33)
    ]
    for said in again:
        theirs, ours = said.rows[-2:]
        assert ours.agreement == {"with": "teacher, 3 steps", "rmse": 0, "psnr": 100} and ours.latency_ms is None
        assert ours.frechet == pytest.approx(theirs.frechet, abs=1e-9)
    assert again[0].rows[-1].frechet == pytest.approx(again[1].rows[-1].frechet, rel=1e-3)  # whatever the batch


def test_guidance_costs_two_evaluations_a_step(shapes: ImageData, space: Features) -> None:
    teacher = tiny("class-to-image", "teacher", shapes.labels, guidance_scale=2.0)
    said = evaluate(teacher, shapes, space, EvaluationOptions(n=130, steps=[2], latency_repeats=0))
    assert said.rows[-1].nfe == 4


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> ImageData:
    root, rng = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    for name in ("north", "south"):
        for folder, shape in (("sar", (144, 144)), ("opt", (144, 144, 3))):
            (root / "test" / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).save(root / "test" / folder / f"{name}.png")
    (root / "metadata.json").write_text(
        json.dumps([{"id": name, "region": name.title()} for name in ("north", "south")])
    )
    return open_data("pairs", path=root, split="test", size=16)


def test_pairs_have_psnr_ssim_regions_and_baselines(pairs: ImageData, space: Features) -> None:
    student = tiny("sar-to-optical", "student")
    said = evaluate(student, pairs, space, EvaluationOptions(n=162, steps=[1], latency_repeats=1))
    rows = {row.name: row for row in said.rows}
    assert set(rows) == {"real, half against half", "student, 1 step", "constant colour", "SAR copied to three bands"}
    assert rows["real, half against half"].frechet is None  # 81 pictures a half are fewer than the features
    items = pairs.items(range(162))
    mean = items["image"].mean((0, 2, 3), keepdim=True).expand_as(items["image"])
    assert rows["constant colour"].psnr == pytest.approx(float(psnr(mean, items["image"]).mean()), abs=1e-4)
    copied = psnr(items["sar"].expand_as(items["image"]), items["image"])
    assert rows["SAR copied to three bands"].psnr == pytest.approx(float(copied.mean()), abs=1e-4)
    drawn = student.sample(range(162), sar=items["sar"], steps=1)
    row = rows["student, 1 step"]
    assert row.psnr == pytest.approx(float(psnr(drawn, items["image"]).mean()), abs=1e-3)
    assert row.regions is not None and {k: v["n"] for k, v in row.regions.items()} == {"North": 81, "South": 81}
    assert row.regions["North"]["psnr"] == pytest.approx(float(psnr(drawn, items["image"])[:81].mean()), abs=1e-3)
    assert "reward blur" in said.markdown() and json.loads(said.to_json())["rows"][1]["ssim"] is not None


def test_the_mean_of_samples_is_a_row_of_its_own(pairs: ImageData, space: Features) -> None:
    student = tiny("sar-to-optical", "student")
    said = evaluate(student, pairs, space, EvaluationOptions(n=140, steps=[1, 2], latency_repeats=1, mean_of=3, seed=5))
    rows = {row.name: row for row in said.rows}
    names = ["student, 1 step", "student, 2 steps", "student, 1 step, mean of 3"]
    assert [row.name for row in said.rows if row.role == "student"] == names
    items = pairs.items([int(i) for i in np.linspace(0, len(pairs) - 1, 140).round()])
    drawn = [student.sample(range(5 + 140 * k, 145 + 140 * k), sar=items["sar"], steps=1) for k in range(3)]
    row, mean = rows["student, 1 step, mean of 3"], torch.stack(drawn).mean(0)
    assert row.psnr == pytest.approx(float(psnr(mean, items["image"]).mean()), abs=1e-3)
    assert row.psnr > rows["student, 1 step"].psnr  # noise averages out
    assert (row.steps, row.nfe, row.latency_ms) == (1, 3, None) and row.regions is not None
    assert "| student, 1 step, mean of 3 | 3 |" in said.markdown()


@pytest.mark.parametrize(("task", "mean_of"), [("class-to-image", 4), ("sar-to-optical", 1), ("sar-to-optical", -2)])
def test_a_mean_of_samples_needs_samples_of_one_truth(
    task: str, mean_of: int, shapes: ImageData, pairs: ImageData, space: Features
) -> None:
    data = pairs if task == "sar-to-optical" else shapes
    with pytest.raises(BadInput, match="mean_of"):
        evaluate(tiny(task, "student", data.labels), data, space, EvaluationOptions(n=140, mean_of=mean_of))


def test_what_cannot_be_compared_is_refused(shapes: ImageData, space: Features, pairs: ImageData) -> None:
    student = tiny("class-to-image", "student", shapes.labels)
    for wrong, given in {
        "n: got 128": {"n": 128},
        "seed": {"n": 140, "seed": -1},
        "latency_repeats": {"latency_repeats": -1},
        "steps": {"n": 140, "steps": [3]},
    }.items():
        with pytest.raises(BadInput, match=wrong):
            evaluate(student, shapes, space, EvaluationOptions(**given))
    with pytest.raises(BadInput, match="teacher"):
        evaluate(student, shapes, space, EvaluationOptions(n=140), teacher=tiny("image", "teacher"))
    with pytest.raises(BadInput, match="labels"):
        evaluate(tiny("class-to-image", "student", ("a", "b")), shapes, space, EvaluationOptions(n=140))
    with pytest.raises(BadInput, match="size"):
        evaluate(student, open_data("shapes", size=32), space, EvaluationOptions(n=140))
    with pytest.raises(BadInput, match="pairs"):
        evaluate(tiny("sar-to-optical", "student"), shapes, space, EvaluationOptions(n=140))
    with pytest.raises(BadInput, match="pairs"):
        evaluate(tiny("image", "student"), pairs, space, EvaluationOptions(n=140))


# --- the small one


def test_a_quick_benchmark_measures_now_and_says_that_it_is_small(shapes: ImageData, space: Features) -> None:
    student, teacher = (tiny("class-to-image", role, shapes.labels, i) for i, role in enumerate(("student", "teacher")))
    told = quick_benchmark(student, teacher, n=6, seed=3, features=space, teacher_steps=4, latency_repeats=2, batch=4)
    told = json.loads(json.dumps(told, allow_nan=False))
    assert told["n"] == 6 and told["seeds"] == [3, 8] and told["nfe"] == 1 and told["teacher"]["nfe"] == 4
    assert told["speed_up"] == pytest.approx(told["teacher"]["latency_ms"]["p50"] / told["latency_ms"]["p50"])
    assert "6 pictures are few" in told["note"] and "biased high" in told["note"]
    labels = [i % len(shapes.labels) for i in range(6)]
    ours, theirs = (g.sample(range(3, 9), labels=labels, steps=s) for g, s in ((student, 1), (teacher, 4)))
    against = told["against_teacher"]
    assert against["rmse"] == pytest.approx(float(rmse(ours, theirs).mean()), abs=1e-5)
    a, b = extract(space, theirs), extract(space, ours)
    assert against["frechet"] == pytest.approx(frechet_distance(a, b, few=True), rel=1e-3)
    assert against["features"]["name"] == "shapes" and "kid_mean" in against and "ssim" in against


def test_a_quick_benchmark_of_one_picture_or_without_teacher_still_answers(shapes: ImageData, space: Features) -> None:
    student, teacher = tiny("image", "student"), tiny("image", "teacher")
    one = quick_benchmark(student, teacher, n=1, features=space, teacher_steps=2, latency_repeats=1)
    assert one["against_teacher"]["frechet"] is None and one["against_teacher"]["psnr"] > 0
    alone = quick_benchmark(student, latency_repeats=1)
    assert alone["teacher"] is None and alone["latency_ms"]["p50"] > 0 and "latency alone" in alone["note"]
    assert (
        "frechet" not in quick_benchmark(student, teacher, n=2, teacher_steps=2, latency_repeats=1)["against_teacher"]
    )


def test_a_translator_is_benchmarked_on_real_sar_only(pairs: ImageData, space: Features) -> None:
    student, teacher = tiny("sar-to-optical", "student"), tiny("sar-to-optical", "teacher", seed=1)
    with pytest.raises(BadInput, match="SAR"):
        quick_benchmark(student, teacher, n=4)
    with pytest.raises(BadInput, match="SAR"):
        latency(student, steps=1)
    sar = pairs.items([0, 1, 2])["sar"]
    told = quick_benchmark(student, teacher, n=4, teacher_steps=2, features=space, sar=sar, latency_repeats=1)
    ours = student.sample(range(4), sar=sar[[0, 1, 2, 0]], steps=1)
    theirs = teacher.sample(range(4), sar=sar[[0, 1, 2, 0]], steps=2)
    assert told["against_teacher"]["rmse"] == pytest.approx(float(rmse(ours, theirs).mean()), abs=1e-5)
    assert latency(student, steps=2, batch=2, repeats=2, sar=sar)["p50"] > 0
    with pytest.raises(BadInput, match="n and batch of 1"):
        quick_benchmark(student, teacher, n=0, sar=sar)


# --- pictures of pictures


def test_grids_hold_the_pixels_in_reading_order(tmp_path: Path) -> None:
    images = torch.linspace(-1, 1, 5).reshape(5, 1, 1, 1).expand(5, 3, 8, 8)
    assert to_pixels(images)[:, 0, 0, 0].tolist() == [0, 64, 128, 191, 255]
    sheet = np.asarray(grid(images, columns=2))
    assert sheet.shape == (3 * 10 + 2, 2 * 10 + 2, 3)
    assert [sheet[6 + 10 * (i // 2), 6 + 10 * (i % 2), 0] for i in range(6)] == [0, 64, 128, 191, 255, 255]
    grid_png(images, 3, tmp_path / "new" / "grid.png", zoom=3)
    assert Image.open(tmp_path / "new" / "grid.png").size == (3 * 26 + 2, 2 * 26 + 2)


def test_side_by_side_labels_every_row_and_takes_grey(tmp_path: Path) -> None:
    grey, colour = torch.zeros(2, 1, 16, 16), torch.ones(3, 3, 16, 16)
    side_by_side({"SAR": grey, "a label much longer than its pictures": colour}, tmp_path / "rows.png")
    sheet = np.asarray(Image.open(tmp_path / "rows.png"))
    assert sheet.shape[0] == 2 * (20 + 20) and sheet.shape[1] > 3 * 18 + 2
    assert sheet[20 + 5, 5].tolist() == [128, 128, 128] and sheet[:20].min() < 100 and sheet[40:60].min() < 100  # words
    for wrong in ({}, {"a": grey, "b": colour[..., :8]}):
        with pytest.raises(BadInput, match="one picture size"):
            side_by_side(wrong, tmp_path / "no.png")
    with pytest.raises(BadInput, match="images"):
        grid(torch.zeros(2, 0, 8, 8), 2)
    with pytest.raises(BadInput, match="columns"):
        grid(colour, 0)


# --- by class, rewards, and whom a training followed -----------------------------------------------------------------
class Lifelike(Generator):
    """Draws real pictures of the class it is asked for; grey for the dead class."""

    dead = 3

    def sample(self, seeds: Any, *, labels: Any = None, sar: Any = None, steps: Any = None, size: Any = None) -> Tensor:
        data, pictures = open_data("shapes", size=16, split="train", objects=1), []
        every = data.items(range(1200))
        for seed, label in zip(seeds, labels, strict=True):
            own = every["image"][every["label"] == label]
            pictures.append(torch.zeros_like(own[0]) if label == self.dead else own[seed % len(own)])
        return torch.stack(pictures)


def lifelike(shapes: ImageData) -> Generator:
    plain = tiny("class-to-image", "student", tuple(shapes.labels))
    return Lifelike(plain.denoiser, plain.codec, plain.info)


def test_a_dead_class_is_seen_by_itself(shapes: ImageData, space: Features) -> None:
    report = evaluate(lifelike(shapes), shapes, space, EvaluationOptions(n=600, steps=[1], latency_repeats=0))
    found = report.rows[-1].classes
    assert found is not None and list(found) == list(shapes.labels) and sum(c["n"] for c in found.values()) == 600
    worst = max(found, key=lambda label: found[label]["kid"])
    others = [c["kid"] for label, c in found.items() if label != worst]
    assert worst == shapes.labels[Lifelike.dead] and found[worst]["kid"] > 3 * max(others)
    assert f"{1000 * found[worst]['kid']:.0f} |" in report.markdown()
    assert Report.from_dict(json.loads(report.to_json())).rows[-1].classes == found


def test_rewards_are_means_over_the_pictures_of_every_row(shapes: ImageData, space: Features) -> None:
    def asked_for(pictures: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return cond["label"].double()

    def mean(pictures: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return pictures.mean((1, 2, 3))

    judges = {"asked": asked_for, "mean": mean}
    report = evaluate(
        lifelike(shapes),
        shapes,
        space,
        EvaluationOptions(n=200, steps=[1], latency_repeats=0, batch=48, rewards=judges),
    )
    indices = np.linspace(0, len(shapes) - 1, 200).round().astype(int).tolist()
    real, row = shapes.items(indices), report.rows[-1]
    for one in (report.rows[0], row):
        assert one.rewards is not None and one.rewards["asked"] == pytest.approx(real["label"].double().mean())
    assert report.rows[0].rewards["mean"] == pytest.approx(float(real["image"].mean()), abs=1e-6)
    assert "| reward asked | reward mean |" in report.markdown()


def test_a_student_that_follows_its_teacher_away_from_the_data_is_reported(
    shapes: ImageData, space: Features, tmp_path: Path
) -> None:
    real = open_data("shapes", split="train").items(range(256))["image"]
    mistaken = 0.5 * real - 0.5  # what the teacher draws: all too dark
    drawn = {100: real.flip(3) + 0.8, 200: real.flip(3) - 0.02, 300: mistaken.flip(3)}
    for iteration, pictures in drawn.items():
        np.save(tmp_path / f"{iteration:06d}.npy", to_pixels(pictures))
    np.save(tmp_path / "000050.npy", to_pixels(real[:16]))  # a grid to look at
    course = track_training(tmp_path, real_pictures(shapes, 140)[0], mistaken, space)
    assert [one["iteration"] for one in course] == [100, 200, 300] and all(one["n"] == 256 for one in course)
    line, warning = describe_course(course)
    assert line.startswith("Student drift: KID") and "teacher hacking: since iteration 200" in warning
    (tmp_path / "000300.npy").unlink()
    course = track_training(tmp_path, real_pictures(shapes, 140)[0], mistaken, space)
    (line,) = describe_course(course)
    assert line.startswith("Student drift: KID") and len(course) == 2 and not describe_course([])


def test_a_student_that_leaves_its_teacher_is_told_from_one_that_hacks_it() -> None:
    """KID to the teacher from 87 to 316 while that to the data stays: DMD2 with two turns of the critic."""

    def course(*kids: tuple[int, int]) -> list[dict[str, float]]:
        return [
            {"iteration": 100 * i, "n": 256, "kid_teacher": a / 1000, "kid_real": b / 1000, "kid_std": 0.01}
            for i, (a, b) in enumerate(kids, 1)
        ]

    _, drift = describe_course(course((87, 183), (170, 187), (316, 190)))
    assert drift.startswith("Warning, student drift: since iteration 100") and "critic_turns" in drift
    _, hacking = describe_course(course((300, 400), (200, 180), (90, 250)))
    assert hacking.startswith("Warning, teacher hacking: since iteration 200")
    assert len(describe_course(course((87, 183), (100, 190), (105, 195)))) == 1, "within the noise of the measurement"
    _, away = describe_course(course((100, 100), (200, 200)))
    assert "student drift" in away, "from both: it learns nobody's pictures"
    assert len(describe_course(course((100, 200), (200, 100)))) == 1, "an adversary leads it to the data"
