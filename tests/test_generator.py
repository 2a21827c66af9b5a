"""One call, one picture a seed: the seed contract, the times, the codecs, and every wrong request by name."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import LABELS, NETWORK
from torch import Tensor, nn

from distillers.errors import BadInput
from distillers.evaluation.pictures import to_pixels
from distillers.generator import MAX_SEED, Generator, seeded_noise
from distillers.models.codec import PixelUnshuffle
from distillers.models.denoiser import Denoiser
from distillers.models.schedule import NoiseSchedule, Prediction, Trigonometric, VariancePreserving, from_config
from distillers.teacher import Teacher
from distillers.weights.manifest import Info
from distillers.weights.write import lcm_times

SEEDS = [11, 7, 2**31 + 11, 0, MAX_SEED, 3, 5]


def untrained(
    task: str = "image",
    sampler: str = "ddim",
    prediction: Prediction = "v",
    schedule: NoiseSchedule | None = None,
    **more: Any,
) -> Generator:
    torch.manual_seed(0)
    schedule = schedule or VariancePreserving.from_betas()
    if sampler == "consistency":
        more["step_times"] = {k: lcm_times(VariancePreserving.from_betas(), k) for k in (1, 2, 4)}
    info = Info(
        name="tiny", task=task, method="test", role="teacher", data="d", sampler=sampler, size=(16, 16),
        labels=LABELS if task == "class-to-image" else [],
        sar={"channels": 1, "range": [-1, 1]} if task == "sar-to-optical" else None, **more,
    )  # fmt: skip
    codec = PixelUnshuffle(info.patch)
    denoiser = Teacher.random(info, NETWORK, schedule.to_config(), prediction, codec).denoiser
    return Generator(denoiser, codec, info).eval()


def condition(generator: Generator, count: int) -> dict[str, Any]:
    """A different class or SAR for each of `count` images."""
    if generator.info.task == "class-to-image":
        return {"labels": [i % len(LABELS) for i in range(count)]}
    if generator.info.task == "sar-to-optical":
        return {"sar": torch.rand(count, 1, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1}
    return {}


def pick(condition: dict[str, Any], order: Sequence[int]) -> dict[str, Any]:
    return {
        key: value[list(order)] if isinstance(value, Tensor) else [value[i] for i in order]
        for key, value in condition.items()
    }


# --- the seed contract


@pytest.mark.parametrize(("sampler", "steps"), [("ddim", 3), ("consistency", 1), ("consistency", 4)])
@pytest.mark.parametrize("task", ["image", "class-to-image", "sar-to-optical"])
def test_an_image_depends_on_its_own_seed_and_condition_only(task: str, sampler: str, steps: int) -> None:
    generator = untrained(task, sampler)
    given = condition(generator, len(SEEDS))
    together = generator.sample(SEEDS, steps=steps, **given)
    assert len({picture.numpy().tobytes() for picture in together}) == len(SEEDS)

    alone = torch.cat([generator.sample([s], steps=steps, **pick(given, [i])) for i, s in enumerate(SEEDS)])
    order = [4, 0, 6, 2, 5, 1, 3]
    elsewhere = torch.empty_like(together)
    elsewhere[order] = generator.sample([SEEDS[i] for i in order], steps=steps, **pick(given, order))
    for other in (alone, elsewhere):
        torch.testing.assert_close(other, together, atol=1e-5, rtol=0)
        assert abs(to_pixels(other).astype(int) - to_pixels(together)).max() <= 1
    torch.manual_seed(99)  # the global generator has no say
    assert torch.equal(generator.sample(SEEDS, steps=steps, **given), together)


def test_one_seed_twice_is_one_picture_twice() -> None:
    first, second, other = untrained(sampler="consistency").sample([4, 4, 5], steps=4)
    torch.testing.assert_close(first, second, atol=1e-5, rtol=0)
    assert not torch.allclose(first, other, atol=1e-2)


def test_the_noise_of_a_seed_is_one_endless_stream() -> None:
    """What torch.Generator().manual_seed(seed) gives, draw after draw, for each image by itself."""
    stream = seeded_noise([8, 9], (3, 4, 4))
    rngs = [torch.Generator().manual_seed(seed) for seed in (8, 9)]
    for _ in range(3):
        expected = torch.stack([torch.randn(3, 4, 4, generator=rng) for rng in rngs])
        assert torch.equal(next(stream), expected)


def test_between_its_steps_a_student_draws_on_from_the_images_own_stream() -> None:
    generator = untrained(sampler="consistency")
    seen: list[Tensor] = []
    generator.denoiser.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].clone()))
    generator.sample([8, 9], steps=4)
    stream = seeded_noise([8, 9], (3, 16, 16))
    torch.testing.assert_close(seen[0], next(stream))
    times = torch.tensor(generator.times(4))
    with torch.no_grad():
        for i in range(1, 4):
            x0 = generator.denoiser(seen[i - 1], times[i - 1])
            torch.testing.assert_close(seen[i], generator.schedule.add_noise(x0, next(stream), times[i]))


def test_nfe_is_the_number_of_steps() -> None:
    for generator in (untrained(), untrained(sampler="consistency")):
        calls: list[None] = []
        generator.denoiser.network.register_forward_pre_hook(lambda _m, _i, calls=calls: calls.append(None))
        generator.sample([0], steps=4)
        assert len(calls) == 4


def test_a_picture_that_is_no_numbers_is_refused() -> None:
    """Finite weights may still leave the range of their precision; the picture would be black."""
    generator = untrained()
    with torch.no_grad():
        generator.denoiser.network.conv_out.bias.fill_(3e38)  # type: ignore[union-attr, operator]
        generator.denoiser.network.conv_out.weight.fill_(3e38)  # type: ignore[union-attr, operator]
    with pytest.raises(BadInput, match=r"weights: .*draws what is no number.*torch.float32"):
        generator.sample([0], **condition(generator, 1))


def test_samples_are_pixels() -> None:
    for task, patch in (("image", 1), ("class-to-image", 2), ("sar-to-optical", 2)):
        generator = untrained(task, patch=patch, default_steps=2)
        pictures = generator.sample([1, 2], **condition(generator, 2))
        assert pictures.shape == (2, 3, 16, 16) and pictures.dtype == torch.float32
        assert -1 <= pictures.min() < pictures.max() <= 1 and not pictures.requires_grad


def test_half_precision_draws_nearly_the_same_pictures(tmp_path: Path) -> None:
    untrained(sampler="consistency").save_pretrained(tmp_path / "tiny")
    whole, half = (
        Generator.from_pretrained(tmp_path / "tiny", dtype=dtype).sample([1, 2])
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert half.dtype == torch.float32 and not torch.equal(whole, half), "bfloat16 was used"
    assert (whole - half).abs().mean() < 0.05


# --- times


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 16, 50, 999, 1000])
def test_a_teachers_times_are_diffusers_trailing_ones(steps: int) -> None:
    from diffusers import DDIMScheduler

    stock: Any = DDIMScheduler(timestep_spacing="trailing")
    stock.set_timesteps(steps)
    assert untrained().times(steps) == stock.timesteps.tolist()


def test_schedules_without_a_clock_are_walked_on_their_grid() -> None:
    schedule = Trigonometric()
    times = Generator(Denoiser(nn.Linear(1, 1), schedule, "x0"), PixelUnshuffle(), untrained().info).times(5)
    assert times[0] == pytest.approx(schedule.t_max) and times == sorted(times, reverse=True) and len(times) == 5
    assert times[-1] > schedule.t_min


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_a_teacher_takes_one_to_a_thousand_steps(steps: int) -> None:
    with pytest.raises(BadInput, match=r"steps.*1 to 1000"):
        untrained().sample([0], steps=steps)


def test_a_teacher_has_no_more_steps_than_its_clock() -> None:
    generator = untrained(schedule=from_config({"num_train_timesteps": 20, "beta_end": 0.5}))
    assert generator.times(20) == [float(t) for t in range(19, -1, -1)]
    with pytest.raises(BadInput, match=r"steps.*1 to 20"):
        generator.times(21)


def test_a_student_takes_its_published_steps_only() -> None:
    generator = untrained(sampler="consistency")
    assert generator.times() == [999.0] and generator.times(4) == lcm_times(VariancePreserving.from_betas(), 4)
    for steps in (0, 3, 8):
        with pytest.raises(BadInput, match=r"steps.*1, 2, 4"):
            generator.sample([0], steps=steps)


# --- sizes and codecs


@pytest.mark.parametrize(("patch", "multiple"), [(1, 2), (2, 4), (4, 8)])
def test_sizes_are_multiples_of_patch_times_downsampling(patch: int, multiple: int) -> None:
    generator = untrained(patch=patch)
    assert generator.size_multiple == multiple
    wide = generator.sample([0], steps=1, size=(16, 16 + multiple))
    assert wide.shape == (1, 3, 16, 16 + multiple)
    for size in ((16, 16 + multiple // 2), (16 + multiple // 2, 16), (4, 16), (0, 16)):
        with pytest.raises(BadInput, match=rf"size.*multiples of {multiple}"):
            generator.sample([0], steps=1, size=size)


@settings(max_examples=25, deadline=None)
@given(factor=st.integers(1, 4), rows=st.integers(1, 3), columns=st.integers(1, 3), channels=st.sampled_from([1, 3]))
def test_pixel_unshuffle_is_a_permutation(factor: int, rows: int, columns: int, channels: int) -> None:
    codec = PixelUnshuffle(factor)
    pixels = torch.randn(2, channels, rows * factor, columns * factor)
    encoded = codec.encode(pixels)
    assert encoded.shape == (2, codec.channels(channels), rows, columns)
    assert torch.equal(codec.decode(encoded), pixels)
    assert math.isclose(float(encoded.square().sum()), float(pixels.square().sum()), rel_tol=1e-5)


def test_translating_pads_and_crops_any_size() -> None:
    generator = untrained("sar-to-optical", patch=2)
    sar = torch.rand(1, 1, 17, 22) * 2 - 1
    assert generator.translate(sar, steps=2).shape == (1, 3, 17, 22)
    even = sar[..., :16, :20]
    assert torch.equal(generator.translate(even, seed=6, steps=2), generator.sample([6], sar=even, steps=2))
    deep = untrained("sar-to-optical", patch=16)  # multiples of 32: reflecting adds less than the picture has
    assert deep.translate(torch.zeros(1, 1, 17, 33), steps=1).shape == (1, 3, 17, 33)
    for shape in ((1, 1, 16, 40), (1, 1, 1, 1), (1, 40, 40)):
        with pytest.raises(BadInput, match=r"sar.*17 pixels"):
            deep.translate(torch.zeros(shape))
    with pytest.raises(BadInput, match="no translator"):
        untrained().translate(torch.zeros(1, 1, 16, 16))


# --- wrong requests


@pytest.mark.parametrize("seed", [-1, MAX_SEED + 1, -(2**70), 2**64])
def test_seeds_out_of_range(seed: int) -> None:
    with pytest.raises(BadInput, match=rf"seed: got {seed};.*{MAX_SEED}"):
        untrained().sample([1, seed], steps=1)


def test_no_seeds_at_all() -> None:
    with pytest.raises(BadInput, match="seeds"):
        untrained().sample([], steps=1)


@pytest.mark.parametrize("labels", [None, [], [0], [0, 1, 2], [0, 3], [-1, 0], [0, 10**9]])
def test_labels_are_one_class_an_image(labels: list[int] | None) -> None:
    with pytest.raises(BadInput, match=r"labels.*0 to 2"):
        untrained("class-to-image").sample([0, 1], labels=labels, steps=1)


@pytest.mark.parametrize("task", ["image", "sar-to-optical"])
def test_labels_where_there_are_no_classes(task: str) -> None:
    with pytest.raises(BadInput, match=r"labels.*tiny takes no class"):
        untrained(task).sample([0], labels=[0], steps=1)


@pytest.mark.parametrize("task", ["image", "class-to-image"])
def test_sar_where_there_is_no_translator(task: str) -> None:
    with pytest.raises(BadInput, match=r"sar.*tiny is no translator"):
        untrained(task).sample([0], sar=torch.zeros(1, 1, 16, 16), steps=1)


@pytest.mark.parametrize(
    "sar",
    [
        None,
        torch.zeros(1, 1, 16, 16),  # one for two seeds
        torch.zeros(2, 3, 16, 16),
        torch.zeros(2, 16, 16),
        torch.zeros(2, 1, 16, 18),
        torch.zeros(2, 1, 1, 1),
        torch.zeros(2, 1, 0, 16),
        torch.full((2, 1, 16, 16), 255.0),
        torch.full((2, 1, 16, 16), -1.1),
        torch.full((2, 1, 16, 16), math.nan),
    ],
    ids=["none", "too few", "three bands", "no band", "size", "1 pixel", "empty", "0 to 255", "below", "nan"],
)
def test_wrong_sar(sar: Tensor | None) -> None:
    with pytest.raises(BadInput, match="sar"):
        untrained("sar-to-optical", patch=2).sample([0, 1], sar=sar, steps=1)


def test_sar_of_any_number_type_is_sar() -> None:
    generator = untrained("sar-to-optical", patch=2)
    sar = (torch.arange(256).reshape(1, 1, 16, 16) / 255 * 2 - 1).double()
    assert torch.equal(generator.sample([0], sar=sar, steps=1), generator.sample([0], sar=sar.float(), steps=1))
