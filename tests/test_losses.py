"""Losses that methods share, each held to what it is for: the gradient it claims, what it forgives and what not."""

import math
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from gaussians import each_schedule
from mutate import mutated
from networks import unet
from torch import Tensor, nn

from distillers.errors import BadInput
from distillers.methods.consistency import Consistency
from distillers.models.denoiser import Denoiser
from distillers.models.schedule import NoiseSchedule, VariancePreserving
from distillers.training import losses
from distillers.training.losses import (
    best_shift,
    blurred,
    distribution_matching,
    feature_distance,
    focal_frequency,
    gan_loss,
    lognormal_times,
    per_sample_mse,
    ramp,
)
from distillers.training.toy import GaussianMixture, StudentNetwork

VP = VariancePreserving.from_betas()


def texture(n: int = 2, side: int = 32, blur: int = 1) -> Tensor:
    """Sharp pictures, (n, 3, side, side): noise averaged over squares of `blur` pixels, of unit variance."""
    noise = torch.randn(n, 3, side + blur - 1, side + blur - 1, generator=torch.Generator().manual_seed(0))
    return blur * nn.functional.avg_pool2d(noise, blur, stride=1)


def moved(pictures: Tensor, down: int, right: int) -> Tensor:
    return pictures.roll((down, right), (2, 3))


# --- distribution matching -------------------------------------------------------------------------------------------
def test_the_gradient_of_distribution_matching_is_the_one_it_claims() -> None:
    x0, real, fake = torch.randn(3, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x0.requires_grad_(), real.requires_grad_(), fake.requires_grad_()
    distribution_matching(x0, real, fake).backward()
    size = (x0 - real).abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(x0.grad, ((fake - real) / size / x0.numel()).detach(), atol=1e-15, rtol=1e-12)
    assert real.grad is None and fake.grad is None


def test_distribution_matching_is_at_rest_when_the_student_is_the_teacher() -> None:
    x0, both = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    x0 = x0.detach().requires_grad_()
    distribution_matching(x0, both, both).backward()
    assert x0.grad is not None and float(x0.grad.abs().max()) < 1e-7
    distribution_matching(x0, x0, x0).backward()  # no size to divide by
    assert bool(x0.grad.isfinite().all())


def kl_gradient(module: Any, t: float) -> tuple[Tensor, Tensor]:
    """d/da and d/db of KL( N(a, b^2) || N(m, s^2) ) both diffused to t: by the loss, and analytic.

    One sample of very many dimensions: its size is one number, which is multiplied out again.
    """
    (a, b), (m, s), n, time = (0.8, 0.5), (-0.3, 0.9), 400_000, torch.tensor(t, dtype=torch.float64)
    a_t, s_t = float(VP.alpha(time)), float(VP.sigma(time))

    def gaussian(mean: float, std: float) -> GaussianMixture:
        return GaussianMixture(torch.tensor([[mean]]), torch.tensor([std]), torch.ones(1), VP)

    rng = torch.Generator().manual_seed(0)
    z, eps = torch.randn(2, 1, n, generator=rng, dtype=torch.float64)
    parameters = torch.tensor([a, b], dtype=torch.float64, requires_grad=True)
    x0 = parameters[0] + parameters[1] * z
    x_t = VP.add_noise(x0.detach(), eps, time)
    real, fake = (g(x_t.T, time).T for g in (gaussian(m, s), gaussian(a, b)))
    module.distribution_matching(x0, real, fake).backward()
    size = (x0 - real).abs().mean().detach()
    real_variance, fake_variance = a_t**2 * s**2 + s_t**2, a_t**2 * b**2 + s_t**2
    analytic = [a_t**2 * (a - m) / real_variance, a_t**2 * b * (1 / real_variance - 1 / fake_variance)]
    assert parameters.grad is not None
    return parameters.grad * size * (a_t / s_t) ** 2, torch.tensor(analytic, dtype=torch.float64)


@pytest.mark.parametrize("t", [150.0, 400.0, 700.0])
def test_distribution_matching_descends_the_divergence(t: float) -> None:
    by_the_loss, analytic = kl_gradient(losses, t)
    torch.testing.assert_close(by_the_loss, analytic, atol=2e-3, rtol=2e-2)
    upwards = mutated(losses, "(fake - real) / like(size, x0)", "(real - fake) / like(size, x0)")
    torch.testing.assert_close(kl_gradient(upwards, t)[0], -analytic, atol=2e-3, rtol=2e-2)


# --- times ------------------------------------------------------------------------------------------------------------
@each_schedule
def test_times_are_the_schedules_own_and_a_share_is_the_last(schedule: NoiseSchedule) -> None:
    """Around two thirds of the range of ln(sigma/alpha), and 10 to 20 % at t_max, a one-step student's time."""
    torch.manual_seed(0)
    t, s = Consistency(source="data").tuning_times(schedule, 10_000, 0.5, torch.device("cpu"))
    last = t == schedule.t_max
    assert 0.1 < float(last.double().mean()) < 0.2 and bool((s < t).all())
    low, high = schedule.noise_ratio(torch.tensor([schedule.t_min, schedule.t_max])).log().tolist()
    middle = float(schedule.noise_ratio(t[~last]).log().median())
    assert middle == pytest.approx(low + 2 / 3 * (high - low), abs=0.3)
    torch.manual_seed(0)
    own = lognormal_times(schedule, 10_000, -1.0, 0.5, 0.0, torch.device("cpu"))
    ratio = schedule.noise_ratio(own).log()
    assert float(ratio.mean()) == pytest.approx(-1, abs=0.03) and float(ratio.std()) == pytest.approx(0.5, abs=0.03)


# --- misregistered pairs ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shift", [(0, 0), (1, 0), (-1, 2), (2, 2), (-2, -2)])
def test_a_planted_shift_is_found(shift: tuple[int, int]) -> None:
    """Each sample by its own: the second one is where it was."""
    truth = texture()
    given = torch.stack([moved(truth, *shift)[0], truth[1]])
    found = best_shift(truth, given, radius=2)
    inner = slice(2, -2)  # edges repeat
    assert torch.equal(found[..., inner, inner], truth[..., inner, inner]) and found.shape == truth.shape


def test_what_a_shift_uncovers_repeats_the_edge() -> None:
    truth = texture(1)
    found = best_shift(truth, moved(truth, 1, 0), radius=1)
    assert torch.equal(found[..., -1, :], moved(truth, 1, 0)[..., -1, :]) and torch.equal(
        found[..., :-1, :], truth[..., :-1, :]
    )


def test_a_shift_beyond_the_radius_stays_one_and_no_radius_is_no_move() -> None:
    truth = texture()
    far = moved(truth, 3, 0)
    found = best_shift(truth, far, radius=2)
    assert float((found - truth)[..., 4:-4, 4:-4].abs().mean()) > 0.5
    assert torch.equal(best_shift(truth, far, radius=0), far)


@pytest.mark.parametrize("grain", [1, 3])
def test_a_sharp_picture_a_pixel_off_beats_a_blurred_one_in_place(grain: int) -> None:
    """The requirement behind `best_shift`: L1 alone rewards blur on pairs that are a pixel or two off."""
    truth = texture(blur=grain)
    off = {1: (1, 1), 3: (2, 2)}[grain]
    sharp, smooth = moved(truth, *off), nn.functional.avg_pool2d(truth, 2 * grain + 1, stride=1, padding=grain)

    def plain(made: Tensor, module: Any = None) -> float:
        return float((made - truth).abs().mean())

    def forgiving(made: Tensor, module: Any = losses) -> float:
        return float((made - module.best_shift(made, truth, 2)).abs().mean())

    assert plain(sharp) > 1.2 * plain(smooth), "otherwise there is nothing to forgive"
    assert forgiving(sharp) < 0.5 * forgiving(smooth)
    for old, new in (("errors.argmin(0)", "errors.argmax(0)"), ("padded = F.pad(b", "padded = F.pad(a")):
        broken = mutated(losses, old, new)
        assert not forgiving(sharp, broken) < 0.5 * forgiving(smooth, broken), f"{new!r} went unnoticed"


def test_the_shift_compares_brightness_in_one_unit() -> None:
    """Rows of four pixels, one move right or left: where the mean of the channels is nearest, not their sum."""
    flat = torch.full((1, 3, 1, 4), 3.0)
    for row, best in (([3.0, 3.0, 1.0, 1.0], [3.0, 3.0, 3.0, 1.0]), ([3.0, 3.0, 9.0, 9.0], [3.0, 3.0, 3.0, 9.0])):
        given = torch.tensor(row).expand(1, 3, 1, 4)
        assert best_shift(flat, given, 1)[0, 0, 0].tolist() == best


def test_the_shift_carries_no_gradient() -> None:
    a, b = texture().requires_grad_(), texture().requires_grad_()
    assert not best_shift(a, b, 1).requires_grad


# --- colour and spectrum ---------------------------------------------------------------------------------------------
def test_blurred_sees_a_colour_cast_and_hardly_a_shift() -> None:
    truth = texture(side=64, blur=3)
    cast = truth + torch.tensor([0.2, 0.0, -0.1])[:, None, None]
    assert blurred(truth, 8).shape == (2, 3, 8, 8)
    expected = (0.2**2 + 0.1**2) / 3
    assert per_sample_mse(blurred(cast, 8), blurred(truth, 8)).tolist() == pytest.approx([expected] * 2, rel=1e-4)
    for off in ((1, 0), (1, 2)):
        sharp = per_sample_mse(moved(truth, *off), truth)
        coarse = per_sample_mse(blurred(moved(truth, *off), 8), blurred(truth, 8))
        assert bool((coarse < 0.12 * sharp).all())
    assert blurred(truth, 1000).shape == (2, 3, 1, 1), "no larger than the picture"


def test_the_spectrum_of_equals_has_no_distance_and_the_weights_no_gradient() -> None:
    a, b = texture(), moved(texture(), 1, 0)
    assert float(focal_frequency(a, a).abs().max()) == 0
    assert focal_frequency(a, b).shape == (2,) and bool((focal_frequency(a, b) > 0.1).all())
    a.requires_grad_()
    focal_frequency(a, b).sum().backward()
    with torch.no_grad():
        size = (torch.fft.fft2(a, norm="ortho") - torch.fft.fft2(b, norm="ortho")).abs()
        weight = size / size.amax((-2, -1), keepdim=True)
    again = a.detach().clone().requires_grad_()
    gap = torch.fft.fft2(again, norm="ortho") - torch.fft.fft2(b, norm="ortho")
    (weight * gap.abs() ** 2).flatten(1).mean(1).sum().backward()
    torch.testing.assert_close(a.grad, again.grad, atol=1e-6, rtol=1e-4)
    leaky = a.detach().clone().requires_grad_()
    mutated(losses, "squared.detach().sqrt()", "(squared + 1e-12).sqrt()").focal_frequency(leaky, b).sum().backward()
    assert float((leaky.grad - again.grad).norm()) > 0.1 * float(again.grad.norm())


def test_a_single_wrong_frequency_weighs_fully_and_a_spread_error_less() -> None:
    """The same energy in one wave, or over the whole spectrum: the wave is what the loss goes after."""
    row = torch.arange(32) * (2 * math.pi * 5 / 32)
    wave = row.cos().expand(1, 3, 32, 32) * math.sqrt(2)
    spread = texture(1)
    spread = spread / spread.square().mean((-2, -1), keepdim=True).sqrt()
    nothing = torch.zeros_like(wave)
    assert float(per_sample_mse(wave, nothing)) == pytest.approx(float(per_sample_mse(spread, nothing)), rel=1e-3)
    assert float(focal_frequency(wave, nothing)) > 1.5 * float(focal_frequency(spread, nothing))


# --- features --------------------------------------------------------------------------------------------------------
def transformer() -> DiTTransformer2DModel:
    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=3, out_channels=3, num_layers=2, sample_size=8,
        patch_size=4, num_embeds_ada_norm=3, norm_num_groups=4,
    ).eval()  # fmt: skip


FEATURES = {
    "unet": (lambda: unet(num_class_embeds=4), (2, 3, 8, 8), ["down_blocks.0", "mid_block"]),
    "transformer": (transformer, (2, 3, 8, 8), ["transformer_blocks.0"]),
    "toy": (StudentNetwork, (2, 2), ["layers.1", "layers.3"]),
}


@pytest.mark.parametrize("name", FEATURES)
def test_features_of_equals_have_no_distance_and_only_the_first_is_moved(name: str) -> None:
    network, shape, layers = FEATURES[name]
    denoiser = Denoiser(network(), VP, "v").eval().requires_grad_(False)  # type: ignore[operator]
    a, b = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))  # type: ignore[misc]
    cond = None if name == "toy" else {"label": torch.tensor([0, 1])}
    assert float(feature_distance(denoiser, a, a, cond, layers).max()) == 0
    a.requires_grad_(), b.requires_grad_()
    distance = feature_distance(denoiser, a, b, cond, layers)
    assert distance.shape == (2,) and bool((distance > 1e-3).all())
    distance.sum().backward()
    assert b.grad is None and a.grad is not None and bool(a.grad.flatten(1).any(1).all())
    with torch.no_grad():
        alone = feature_distance(denoiser, a[1:], b[1:], cond and {"label": cond["label"][1:]}, layers)
    torch.testing.assert_close(alone, distance[1:].detach(), atol=1e-5, rtol=1e-4)


def test_unit_lengths_are_over_the_channels_by_hand() -> None:
    """Maps (B, C, H, W), tokens (B, N, C) and vectors (B, C), each with sizes that differ."""
    rng = torch.Generator().manual_seed(0)
    shapes = [(2, 5, 3, 4), (2, 6, 7), (2, 8)]
    pairs = [(torch.randn(s, generator=rng), torch.randn(s, generator=rng)) for s in shapes]
    expected = torch.zeros(2)
    for a, b in pairs:
        channels = 1 if a.ndim == 4 else a.ndim - 1
        a, b = (x.movedim(channels, -1).reshape(2, -1, x.shape[channels]) for x in (a, b))
        a, b = (x / x.square().sum(2, keepdim=True).sqrt() for x in (a, b))
        expected += (a - b).square().sum(2).mean(1) / 3
    torch.testing.assert_close(losses.unit_length_distance(*zip(*pairs, strict=True)), expected)


def test_each_layer_counts_alike_whatever_its_scale() -> None:
    denoiser = Denoiser(unet(), VP, "v").eval()
    a, b = torch.randn(2, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        alone = [feature_distance(denoiser, a, b, None, [layer]) for layer in ("down_blocks.0", "mid_block")]
        both = feature_distance(denoiser, a, b, None, ["down_blocks.0", "mid_block"])
    torch.testing.assert_close(both, (alone[0] + alone[1]) / 2)
    assert float(torch.stack(alone).max()) <= 4, "unit vectors are at most 2 apart"


def test_features_of_an_unknown_layer_are_refused() -> None:
    x = torch.zeros(1, 3, 8, 8)
    with pytest.raises(BadInput, match="layers"):
        feature_distance(Denoiser(unet(), VP, "v"), x, x, None, ["middle"])


# --- small ones ------------------------------------------------------------------------------------------------------
def test_the_ramp() -> None:
    assert [ramp(p, 0.2, 0.4) for p in (0, 0.2, 0.3, 0.4, 0.6, 1)] == pytest.approx([0, 0, 0.25, 0.5, 1, 1])
    assert [ramp(p, 0.5, 0.0) for p in (0.0, 0.49, 0.5, 1.0)] == [0, 0, 1, 1], "no length: a step"


def test_judgements_are_one_sided_and_mirror_images() -> None:
    logits = torch.tensor([-20.0, 0.0, 20.0])
    assert [float(gan_loss(x, real=True)) for x in logits] == pytest.approx([20, math.log(2), 0], abs=1e-6)
    assert float(gan_loss(logits, real=True)) == pytest.approx((20 + math.log(2)) / 3)
    assert float(gan_loss(logits, real=False)) == float(gan_loss(-logits, real=True))
