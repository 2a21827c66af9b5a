"""Losses and sampling that several methods share: distances, solver steps, GAN and distribution matching losses.

Functions of tensors and networks, without state. Distances give one value per sample: (B, ...), (B, ...) -> (B,).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distillers.errors import BadInput
from distillers.evaluation.features import EfficientNetFeatures
from distillers.generator import Generator
from distillers.models.codec import ImageCodec
from distillers.models.conditions import Cond
from distillers.models.denoiser import Denoiser
from distillers.models.schedule import NoiseSchedule, VariancePreserving, like
from distillers.teacher import Teacher
from distillers.weights.write import lcm_times

Solver = Literal["heun", "ddim"]


# --- distances -------------------------------------------------------------------------------------------------------
def per_sample_mse(a: Tensor, b: Tensor) -> Tensor:
    """Compute the mean squared difference of each sample. (B, ...), (B, ...) -> (B,)."""
    return (a - b).square().flatten(1).mean(1)


def pseudo_huber(a: Tensor, b: Tensor, c: float | None = None) -> Tensor:
    """Compute sqrt(||a - b||^2 + c^2) - c over a sample (Song and Dhariwal 2023, eq. 7). (B, ...) -> (B,).

    c defaults to 0.00054 sqrt(D), as there. LCM's element-wise pseudo-Huber is another loss.
    """
    difference = (a - b).flatten(1)
    if c is None:
        c = 0.00054 * math.sqrt(difference.shape[1])
    return (difference.square().sum(1) + c * c).sqrt() - c


def blurred(pictures: Tensor, pixels: int) -> Tensor:
    """Average squares of so many pixels, which keeps colours and drops detail. (B, C, H, W) -> (B, C, H', W')."""
    return F.avg_pool2d(pictures, min(pixels, *pictures.shape[-2:]))


def focal_frequency(a: Tensor, b: Tensor) -> Tensor:
    """Compare spectra, each frequency weighted by how far off it is: focal frequency loss (Jiang et al. 2021).

    Pictures (B, C, H, W) -> (B,). The weight |A - B|, scaled to a greatest value of 1, carries no gradient.
    """
    gap = torch.fft.fft2((a - b).float(), norm="ortho")
    squared = gap.real**2 + gap.imag**2
    weight = squared.detach().sqrt()
    weight = weight / weight.amax((-2, -1), keepdim=True).clamp_min(1e-12)
    return (weight * squared).flatten(1).mean(1)


@torch.no_grad()
def best_shift(a: Tensor, b: Tensor, radius: int) -> Tensor:
    """Move each sample of b by up to `radius` pixels to where it is nearest to a; edges repeat. (B, C, H, W).

    Pairs from two sensors are misregistered by a pixel or two; a distance without this freedom rewards blur.
    """
    if radius == 0:
        return b
    height, width = a.shape[-2:]
    moves = [(i, j) for i in range(2 * radius + 1) for j in range(2 * radius + 1)]
    padded = F.pad(b, (radius,) * 4, mode="replicate")
    grey, target = padded.mean(1), a.mean(1)  # brightness is enough to find the place
    errors = torch.stack([(grey[:, i : i + height, j : j + width] - target).square().mean((1, 2)) for i, j in moves])
    best = [moves[k] for k in errors.argmin(0).tolist()]
    return torch.stack([padded[n, :, i : i + height, j : j + width] for n, (i, j) in enumerate(best)])


# --- the teacher's trajectory ----------------------------------------------------------------------------------------
@torch.no_grad()
def teacher_step(
    teacher: nn.Module, x_t: Tensor, t: Tensor, s: Tensor, cond: Cond | None, solver: Solver = "ddim"
) -> Tensor:
    """Take one solver step of the teacher's probability-flow ODE, from x_t down to x_s (Song et al. 2023, eq. 6)."""
    schedule: NoiseSchedule = teacher.schedule  # type: ignore[assignment]
    x0 = teacher(x_t, t, cond)
    x_s = schedule.step(x_t, x0, t, s)
    return x_s if solver == "ddim" else schedule.heun_step(x_t, x0, teacher(x_s, s, cond), t, s)


@torch.no_grad()
def teacher_samples(
    teacher: nn.Module,
    noise: Tensor,
    cond: Cond | None,
    steps: int,
    solver: Solver = "ddim",
    schedule: NoiseSchedule | None = None,
) -> Tensor:
    """Sample the teacher from noise (B, ...) in so many solver steps and a last look, over all of its schedule.

    schedule: the part of it to sample over, where that is not all.
    """
    schedule = schedule or teacher.schedule  # type: ignore[assignment]
    assert schedule is not None
    grid = schedule.grid(steps + 1).flip(0).to(noise.device)
    x_t = schedule.start(noise, grid[0])
    for t, s in pairwise(grid):
        x_t = teacher_step(teacher, x_t, t, s, cond, solver)
    return teacher(x_t, grid[-1], cond)


@torch.no_grad()
def teacher_end(teacher: nn.Module, x_t: Tensor, t: Tensor, cond: Cond | None) -> Tensor:
    """Follow the teacher's probability-flow ODE from x_t (B, ...) at t (B,) to t_min, in one midpoint step.

    In u = x/alpha and r = sigma/alpha the ODE is du/dr = (u - x0)/r, taken at half of r: Heun's method would divide the
    network's error by the r of t_min. For times of little noise.
    """
    schedule: NoiseSchedule = teacher.schedule  # type: ignore[assignment]
    end = t.new_tensor(schedule.t_min)
    r, r_end = schedule.noise_ratio(t), schedule.noise_ratio(end)
    middle = schedule.time_at_ratio((r + r_end) / 2)
    x_middle = schedule.step(x_t, teacher(x_t, t, cond), t, middle)
    slope = (x_middle / like(schedule.alpha(middle), x_t) - teacher(x_middle, middle, cond)) / like(
        schedule.noise_ratio(middle), x_t
    )
    return like(schedule.alpha(end), x_t) * (x_t / like(schedule.alpha(t), x_t) - like(r - r_end, x_t) * slope)


def neighbours(schedule: NoiseSchedule, points: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Sample `count` pairs of adjacent times t = t_{n+1}, s = t_n, with n ~ U{1..N-1} on the grid of N points."""
    grid = schedule.grid(points).to(device)
    n = torch.randint(points - 1, (count,), device=device)
    return grid[n + 1], grid[n]


def log_ratio_at(schedule: NoiseSchedule, share: float) -> float:
    """Find ln(sigma/alpha) at a share of its own range, 0 at t_min and 1 at t_max."""
    ends = schedule.noise_ratio(torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64)).log()
    return float(torch.lerp(ends[0], ends[1], share))


def lognormal_times(
    schedule: NoiseSchedule, count: int, log_mean: float, log_std: float, last_share: float, device: torch.device
) -> Tensor:
    """Sample times (count,) at which ln(sigma/alpha) is normal (Karras et al. 2022, table 1); a share of them is t_max.

    t_max is the one time at which a one-step student is called, and the normal's tail hardly reaches it.
    """
    ratio = (log_mean + log_std * torch.randn(count, device=device, dtype=torch.float64)).exp()
    last = torch.rand(count, device=device) < last_share
    return schedule.time_at_ratio(ratio).masked_fill(last, schedule.t_max)


# --- the consistency function ----------------------------------------------------------------------------------------
def consistency_function(denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
    """Evaluate f(x, t) = c_skip(t) x + (1 - c_skip(t)) x0_theta(x, t) (Song et al. 2023, eq. 5).

    f(x, t_min) = x exactly. c_skip falls off over one t_min of noise level, as LCM's boundary scaling does: the student
    starts as the teacher's own denoiser everywhere else, and c_skip is below 1e-8 where generators are called.
    """
    schedule = denoiser.schedule
    ratio = schedule.noise_ratio(t)
    floor = schedule.noise_ratio(t.new_tensor(schedule.t_min))
    c_skip = like(floor**2 / ((ratio - floor) ** 2 + floor**2), x_t)
    return c_skip * x_t + (1 - c_skip) * denoiser(x_t, t, cond)


def sampling_times(schedule: NoiseSchedule, steps: int) -> list[float]:
    """List the times of multi-step sampling, descending: LCMScheduler's for DDPM's schedules, or the schedule's own."""
    if isinstance(schedule, VariancePreserving):
        return lcm_times(schedule, steps)
    return schedule.student_times(steps)


def check_steps(field: str, steps: Sequence[int]) -> None:
    """Raise BadInput unless these are step counts to publish: one or more, different, each 1 or more."""
    if not steps or min(steps) < 1 or len(set(steps)) < len(steps):
        raise BadInput(field, tuple(steps), "different step counts of 1 or more, at least one")


def consistency_generator(student: Denoiser, teacher: Teacher, steps: Sequence[int]) -> Generator:
    """Build the generator of a student that is re-noised between its steps; any guidance is in its weights."""
    info = replace(
        teacher.info,
        sampler="consistency",
        step_times={k: sampling_times(student.schedule, k) for k in steps},
        default_steps=min(steps),
        guidance_scale=1.0,
    )
    return Generator(student, teacher.codec, info, teacher.prompts)


def sample_student(student: Denoiser, noise: Tensor, cond: Cond | None = None, steps: Sequence[int] = (1,)) -> Tensor:
    """Sample x0 from unit noise with the student's own few-step sampler (DMD2's backward simulation, Yin et al. 2024).

    The sampler takes k steps, k uniform among `steps`; the result is that of a random one of them, which has a
    gradient, while those before it have none. So the student's input in training is what it gets when it is served.
    """
    schedule = student.schedule
    k = steps[int(torch.randint(len(steps), ()))]
    times = torch.tensor(sampling_times(schedule, k), dtype=torch.float64, device=noise.device)
    last = int(torch.randint(k, ()))
    x_t = schedule.start(noise, times[0])
    with torch.no_grad():
        for t, s in pairwise(times[: last + 1]):
            x_t = schedule.add_noise(student(x_t, t, cond), torch.randn_like(noise), s)
    return student(x_t, times[last], cond)


# --- two players -----------------------------------------------------------------------------------------------------
def gan_loss(logits: Tensor, *, real: bool) -> Tensor:
    """Compute the non-saturating GAN loss that wants these logits to say real, or fake (Goodfellow et al. 2014).

    E softplus(-D) for real, E softplus(D) for fake: the discriminator minimises both kinds, the generator `real=True`
    on its own samples.
    """
    return F.softplus(-logits if real else logits).mean()


def discriminator_loss(fake: Tensor, real: Tensor) -> Tensor:
    """Compute the discriminator's GAN loss of the logits of fake and of real samples."""
    return gan_loss(fake, real=False) + gan_loss(real, real=True)


def gradient_norms(samples: Tensor, *terms: Tensor) -> list[Tensor]:
    """Compute the norm of each scalar term's gradient with respect to the samples (B, ...); the graphs are kept."""
    return [torch.autograd.grad(term, samples, retain_graph=True)[0].float().norm() for term in terms]


def ramp(progress: float, start: float, length: float) -> float:
    """Return 0 until `start`, then rise linearly to 1 over `length`; both are shares of the training."""
    return min(max((progress - start) / length, 0.0), 1.0) if length > 0 else float(progress >= start)


# --- the student's distribution and the teacher's --------------------------------------------------------------------
SNR_CAP = 20.0


def denoising(
    denoiser: nn.Module, x_t: Tensor, t: Tensor, x0: Tensor, cond: Cond | None, cap: float = SNR_CAP
) -> Tensor:
    """Compute the denoising score matching loss E (min(SNR, cap) + 1) || x0_theta(x_t, t) - x0 ||^2.

    SNR + 1 makes it the velocity loss (Salimans and Ho 2022, sec. 4); the cap keeps the last, almost clean times from
    taking most of it (Hang et al. 2023). A network that predicts noise has the weight min(SNR, cap), the loss of its
    output: with SNR + 1 the noisiest time of DDPM, where x0 is 157 times as wrong as the output, would be the whole
    loss. Mean over samples and elements.
    """
    weight = denoiser.schedule.snr(t).clamp(max=cap) + (denoiser.prediction != "eps")  # type: ignore[operator, union-attr]
    weight = weight.to(x0)
    return (weight * per_sample_mse(denoiser(x_t, t, cond), x0)).mean()


def score_matching(student: nn.Module, teacher: nn.Module, x_t: Tensor, t: Tensor, cond: Cond | None) -> Tensor:
    """Compute teacher score matching: the denoising loss whose target is the teacher's x0, not the data (scalar)."""
    with torch.no_grad():
        x0_teacher = teacher(x_t, t, cond)
    return denoising(student, x_t, t, x0_teacher, cond)


def diffuse(schedule: NoiseSchedule, x0: Tensor) -> tuple[Tensor, Tensor]:
    """Diffuse x0 to random times: t ~ U on the middle 96 % of the range (Yin et al. 2024), and x_t."""
    t = schedule.spaced(0.02 + 0.96 * torch.rand(len(x0), device=x0.device, dtype=torch.float64))
    return t, schedule.add_noise(x0, torch.randn_like(x0), t)


def distribution_matching(x0: Tensor, real: Tensor, fake: Tensor, weight: Tensor | None = None) -> Tensor:
    """Build a scalar whose gradient for x0 is weight (fake - real) / mean|x0 - real|, over the number of elements.

    x0 are the student's samples; real and fake the denoised estimates of the teacher and of the critic at a diffused x0
    (Yin et al., "One-step Diffusion with Distribution Matching Distillation", 2024, eq. 7-8, without its factor of
    time). It descends KL(student || teacher); another divergence by weight (B,): see `ratio_weight`.
    """
    with torch.no_grad():
        size = (x0 - real).abs().flatten(1).mean(1).clamp_min(1e-6)
        gap = (fake - real) / like(size, x0)
        goal = x0 - (gap if weight is None else like(weight, x0) * gap)
    return per_sample_mse(x0, goal).mean() / 2


def score_identity(x0: Tensor, real: Tensor, fake: Tensor, alpha: float) -> Tensor:
    """Compute SiD's loss, mean w (real - fake) . ((real - x0) - alpha (real - fake)) with w = 1 / mean|x0 - real|.

    Zhou et al., "Score identity Distillation", 2024. Unlike `distribution_matching` its gradient goes through both
    networks into x0; the weight carries none. Negative in normal operation.
    """
    size = (x0 - real).detach().abs().flatten(1).mean(1).clamp_min(1e-6)
    product = (real - fake) * ((real - x0) - alpha * (real - fake))
    return (product / like(size, x0)).mean()


Divergence = Literal[
    "reverse-kl", "forward-kl", "jensen-shannon", "jeffreys", "squared-hellinger", "softened-reverse-kl"
]


@torch.no_grad()
def ratio_weight(logits: Tensor, t: Tensor, divergence: Divergence) -> Tensor:
    """Weigh samples (B,) at times t (B,) by h(r) = f''(r) r^2, r = p_teacher / p_student: the weights (B,).

    The gradient of an f-divergence is the reverse KL's, weighted so (Xu et al., "One-step Diffusion Models with
    f-Divergence Distribution Matching", 2025, table 1). r = exp(logit) of a discriminator of the diffused samples: real
    against made. Weights have mean 1 among samples of similar times, in ten bins or as many as leave eight samples to
    each: ratios are far larger where there is little noise, and would take the gradient from all other times.
    """
    r = logits.clamp(-10, 10).exp()
    weight = {
        "reverse-kl": torch.ones_like(r),
        "forward-kl": r,
        "jensen-shannon": r / (1 + r),
        "jeffreys": 1 + r,
        "squared-hellinger": r.sqrt(),
        "softened-reverse-kl": 1 / (1 + r),
    }[divergence]
    for similar in t.argsort().tensor_split(max(1, min(10, len(t) // 8))):
        weight[similar] /= weight[similar].mean()
    return weight


# --- perceptual distances --------------------------------------------------------------------------------------------
def feature_distance(denoiser: Denoiser, a: Tensor, b: Tensor, cond: Cond | None, layers: Sequence[str]) -> Tensor:
    """Compare pictures in a frozen denoiser's activations at its least noise, in the form of LPIPS (see below).

    Activations are scaled to unit length over the channels; their squared difference is averaged over positions and
    layers. In the network's space, so it needs neither pixels nor other weights, and it is no space that our reports
    measure in. Only a carries a gradient. (B, ...), (B, ...) -> (B,).
    """
    t = torch.tensor(denoiser.schedule.t_min, device=a.device)
    features = denoiser.features(a, t, cond, layers)
    with torch.no_grad():
        targets = denoiser.features(b, t, cond, layers)
    return unit_length_distance(features, targets)


def unit_length_distance(features: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Average the squared difference of activations, each scaled to unit length, over layers and positions.

    Zhang et al. 2018, eq. 1, with all channels weighted alike. Layers are maps (B, C, H, W), tokens (B, N, C) or
    vectors (B, C); result (B,).
    """
    distances = []
    for feature, target in zip(features, targets, strict=True):
        channels = 1 if feature.ndim == 4 else -1
        gap = F.normalize(feature.float(), dim=channels) - F.normalize(target.float(), dim=channels)
        distances.append(gap.square().sum(channels).reshape(len(gap), -1).mean(1))
    return torch.stack(distances).mean(0)


def perceptual_distance(network: EfficientNetFeatures, a: Tensor, b: Tensor) -> Tensor:
    """Compare pictures (B, 3, H, W) in [-1, 1] in EfficientNet's activations; only a carries a gradient. -> (B,)."""
    features = network.stages(a)
    with torch.no_grad():
        targets = network.stages(b)
    return unit_length_distance(features, targets)


class Lpips(nn.Module):
    """LPIPS on VGG (Zhang et al. 2018) compares what a codec decodes, with torchvision's weights."""

    def __init__(self, codec: ImageCodec) -> None:
        super().__init__()
        try:
            from torchmetrics.functional.image.lpips import _NoTrainLpips

            self.net = _NoTrainLpips(net="vgg")
        except Exception as error:  # no torchvision, one built for another torch, or its weights cannot be had
            raise BadInput("distance", "lpips", f"needs torchvision and its VGG weights ({error})") from None
        self.codec = codec

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Compare samples in the network's space, (B, ...), (B, ...) -> (B,); small pictures are enlarged to 64 px."""
        pictures = [self.codec.decode(x) for x in (a, b)]
        if min(pictures[0].shape[-2:]) < 64:
            pictures = [F.interpolate(x, (64, 64), mode="bilinear", antialias=True) for x in pictures]
        distance: Tensor = self.net(*pictures, normalize=False)
        return distance.flatten()
