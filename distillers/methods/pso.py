"""Pairwise sample optimization (PSO) tunes a few-step generator to preferences and keeps its few steps.

Miao, Yang, Lin, Wang, Liu, Wang and Qiu, "Tuning Timestep-Distilled Diffusion Model Using Pairwise Sample
Optimization", 2024. The recipe's teacher is the generator to tune, and the reference; the paper tunes a LoRA on it.
Plain fine-tuning of such a generator would make it a denoiser again, and blurred.

Offline, the winners are data and the losers samples of the reference: under one noise, at one of the times that the
sampler visits, the error on the winner has to fall against that on the loser, both measured from the reference.
Online, a reward judges two rollouts of the re-noising sampler, and the winner's steps have to become likelier than the
loser's. The step that ends in the picture adds no noise and has no likelihood, so it is left out; a generator of one
step has no other. `policy_std` makes that step a Gaussian, while training only.

Errors and log-densities are means over elements, so that beta means the same at every size.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distillers.errors import BadInput
from distillers.generator import Generator
from distillers.models.conditions import Cond
from distillers.models.denoiser import Denoiser, unclipped
from distillers.models.schedule import NoiseSchedule
from distillers.teacher import Teacher
from distillers.training.distiller import Batch, Distiller, Networks, Turn, frozen, split_batch, trainable_copy
from distillers.training.losses import per_sample_mse
from distillers.training.reward import Reward, load_reward
from distillers.weights.network import guided

SAFE = 3.8  # 2 beta ln(1 + eps): below it the samples of a toy problem left the data
WAYS_OUT = 'mode = "offline"; or policy_std above 0, which makes the last step a Gaussian around its output'


@dataclass(frozen=True, kw_only=True)
class Pso(Distiller):
    """L = -ln sigmoid( beta ((l_ref^w - l_ref^l) - (l^w - l^l)) ), l = mean of (x0_theta(x_t, t) - x0)^2 / sigma_t^2.

    personalise: relu(1 - beta (l^l - l^w)) + l^l / 2, without a reference. finetune: l^w alone, the naive baseline.
    """

    tasks: ClassVar[tuple[str, ...]] = ("image", "class-to-image", "text-to-image")
    mode: Literal["offline", "online", "personalise", "finetune"] = "offline"  # where the pairs come from, or none
    steps: int = 4  # step count of the base that is tuned, and published as the default
    beta: float = 5.0  # per element, as all here; larger stays nearer to the reference (paper, online: 50)
    clip: float = 0.5  # eps, online: likelihood ratios outside [1 - eps, 1 + eps] earn no more (paper: 0.1)
    reward: str | tuple[str, ...] | None = None  # online: a classifier's folder or "module:function", or several
    inner_epochs: int = 1  # turns that learn from one pair of rollouts, online
    policy_std: float = 0.0  # online, experimental: std of the last step, in the unit of x0; 0 leaves that step out

    def __post_init__(self) -> None:
        self._at_least(1, "steps", "inner_epochs")
        self._at_least(0, "policy_std")
        if not self.beta > 0:
            raise BadInput("pso.beta", self.beta, "a number above 0")
        if not 0 < self.clip < 1:
            raise BadInput("pso.clip", self.clip, "a number between 0 and 1")
        online = self.mode == "online"
        if online != bool(self.reward):
            raise BadInput("pso.reward", self.reward, 'a reward for mode = "online", absent for the others')
        if self.policy_std and not online:
            raise BadInput("pso.policy_std", self.policy_std, 'absent: only mode = "online" has a policy')
        if online and self.steps == 1 and not self.policy_std:
            raise BadInput("pso.steps", 1, f"2 or more, for one step adds no noise and has no likelihood; {WAYS_OUT}")

    @property
    def fits_head(self) -> bool:
        return False

    @property
    def needs_pictures(self) -> bool:
        return self.mode != "online"

    def networks(self, teacher: Teacher) -> Networks:
        sampler = Sampler(Generator(teacher.denoiser, teacher.codec, teacher.info, teacher.prompts), self.steps)
        nets = Networks({"student": trainable_copy(teacher.denoiser), "sampler": frozen(sampler)})
        nets["reference"] = frozen(unclipped(teacher.denoiser))
        if self.reward:
            if not self.noisy_steps(sampler, teacher.denoiser.schedule):
                allowed = f"a sampler that adds noise between its steps, for others have no likelihood; {WAYS_OUT}"
                raise BadInput("teacher", f"{teacher.info.name}, sampled by {teacher.info.sampler}", allowed)
            x0, cond = teacher.example()
            names = (self.reward,) if isinstance(self.reward, str) else self.reward
            rewards = [Reward(load_reward(name), teacher.codec, x0, cond, differentiable=False) for name in names]
            nets["rewards"] = frozen(nn.ModuleList(rewards))
        for warning in self.doubts():
            warnings.warn(warning, stacklevel=2)
        return nets

    def doubts(self) -> Iterator[str]:
        """Yield warnings about settings that went wrong in our measurements."""
        room = 2 * self.beta * math.log1p(self.clip)
        if self.mode == "online" and room < SAFE:
            yield f"pso: 2 beta ln(1 + clip) = {room:.2f}, below {SAFE}: samples may leave the data (toy measurements)"
        if self.mode == "online" and self.beta >= 50 and self.clip <= 0.1:
            yield f"pso: beta = {self.beta:g}, clip = {self.clip:g} hardly learns in two dimensions (toy measurements)"
        if self.mode in ("offline", "online") and self.steps == 1:
            yield "pso: steps = 1 is experimental: on toy problems the one-step output did not reach the target"

    def step(self, nets: Networks, batch: Batch, progress: float) -> Iterator[Turn]:
        x0, cond = split_batch(batch)
        if self.mode == "online":
            rollouts = self.judged_rollouts(nets, x0, cond)
            for _ in range(self.inner_epochs):
                yield "student", self.online(nets, *rollouts, cond)
        else:
            yield "student", self.offline(nets, x0, batch.get("loser"), cond)

    # --- pairs of pictures -------------------------------------------------------------------------------------------
    def offline(self, nets: Networks, winner: Tensor, loser: Tensor | None, cond: Cond | None) -> Tensor:
        """Compute the offline loss of winners and losers (B, ...); with None, losers are sampled from the reference."""
        student, reference, sampler = nets["student"], nets["reference"], nets["sampler"]
        if loser is None and self.mode != "finetune":
            loser = sampler.rollout(reference, torch.randn_like(winner), cond)[-1]
        # one of the sampler's times and one noise, for winner and loser, policy and reference alike
        times = torch.tensor(sampler.times, dtype=torch.float64, device=winner.device)
        t = times[torch.randint(len(times), (len(winner),), device=winner.device)]
        eps = torch.randn_like(winner)

        def error(denoiser: Denoiser, x0: Tensor) -> Tensor:
            x_t = student.schedule.add_noise(x0, eps, t)
            squared = per_sample_mse(sampler(denoiser, x_t, t, cond), x0)
            return squared / student.schedule.sigma(t).to(squared) ** 2

        won = error(student, winner)
        if self.mode == "finetune" or loser is None:
            return won.mean()
        lost = error(student, loser)
        if self.mode == "personalise":  # the second term keeps what the base could draw
            return ((1 - self.beta * (lost - won)).relu() + 0.5 * lost).mean()
        with torch.no_grad():
            won_ref, lost_ref = error(reference, winner), error(reference, loser)
        return -F.logsigmoid(self.beta * ((won_ref - lost_ref) - (won - lost))).mean()

    # --- pairs of rollouts -------------------------------------------------------------------------------------------
    @torch.no_grad()
    def judged_rollouts(
        self, nets: Networks, x0: Tensor, cond: Cond | None
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Draw two rollouts of x0's shape, and h (B,): +1 where the first is the winner, -1 where the second is.

        One of the rewards, drawn for each pair, judges all of its steps. A tie has h = 0 and no gradient; the official
        code takes the second for the winner.
        """
        a, b = (nets["sampler"].rollout(nets["student"], torch.randn_like(x0), cond) for _ in range(2))
        for path in (a, b):
            path[-1] = path[-1] + self.policy_std * torch.randn_like(x0)
        h = torch.stack([(reward(a[-1], cond) - reward(b[-1], cond)).sign() for reward in nets["rewards"]])
        judge = torch.randint(len(h), (1, len(x0)), device=x0.device)
        return a, b, h.gather(0, judge)[0]

    def online(self, nets: Networks, a: list[Tensor], b: list[Tensor], h: Tensor, cond: Cond | None) -> Tensor:
        """Compute L = -ln sigmoid( beta (h_a ln r_a + h_b ln r_b) ), mean over noisy steps and pairs; h_b = -h_a."""
        student, sampler = nets["student"], nets["sampler"]
        margins = [
            h * (self.log_ratio(nets, a, j, cond) - self.log_ratio(nets, b, j, cond))
            for j in self.noisy_steps(sampler, student.schedule)
        ]
        return -F.logsigmoid(self.beta * torch.stack(margins)).mean()

    def log_ratio(self, nets: Networks, path: list[Tensor], j: int, cond: Cond | None) -> Tensor:
        """Compute ln p(x_{j+1} | x_j) / p_ref(x_{j+1} | x_j) (B,), a mean over elements, clipped at 1 -+ eps."""
        student, reference, sampler = nets["student"], nets["reference"], nets["sampler"]
        scale, std = self.gaussian(sampler, student.schedule, j)
        t = torch.tensor(sampler.times[j], dtype=torch.float64, device=path[j].device)

        def squared(denoiser: Denoiser) -> Tensor:
            return per_sample_mse(scale * sampler(denoiser, path[j], t, cond), path[j + 1])

        with torch.no_grad():
            least = squared(reference)
        ln_r = (least - squared(student)) / (2 * std**2)
        return ln_r.clamp(math.log1p(-self.clip), math.log1p(self.clip))

    def gaussian(self, sampler: Sampler, schedule: NoiseSchedule, j: int) -> tuple[float, float]:
        """Return scale and std of x_{j+1} ~ N(scale x0_theta(x_j), std^2); std is 0 where the step adds no noise."""
        if j + 1 == len(sampler.times):
            return 1.0, self.policy_std
        s = torch.tensor(sampler.times[j + 1], dtype=torch.float64)
        return float(schedule.alpha(s)), float(schedule.sigma(s)) if sampler.renoises else 0.0

    def noisy_steps(self, sampler: Sampler, schedule: NoiseSchedule) -> list[int]:
        """List the steps that have a likelihood."""
        return [j for j in range(len(sampler.times)) if self.gaussian(sampler, schedule, j)[1] > 0]

    def generator(self, nets: Networks, teacher: Teacher) -> Generator:
        info = replace(teacher.info, default_steps=self.steps)
        return Generator(nets["student"], teacher.codec, info, teacher.prompts)


class Sampler(nn.Module):
    """The sampler of the base, without its network: its times, guidance, and whether it adds noise between steps."""

    def __init__(self, base: Generator, steps: int) -> None:
        super().__init__()
        self.info, self.times = base.info, base.times(steps)
        self.renoises = base.info.sampler == "consistency"

    def forward(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Cond | None) -> Tensor:
        """Predict x0 as it is predicted while sampling."""
        x0: Tensor = guided(denoiser, self.info, self.info.guidance_scale)(x_t, t, cond)
        return x0

    @torch.no_grad()
    def rollout(self, denoiser: Denoiser, noise: Tensor, cond: Cond | None) -> list[Tensor]:
        """Sample x_t at each time, then x0: steps + 1 tensors, the last one as `Generator` makes it."""
        schedule, times = denoiser.schedule, torch.tensor(self.times, dtype=torch.float64, device=noise.device)
        path = [schedule.start(noise, times[0])]
        for t, s in pairwise(times):
            x0 = self(denoiser, path[-1], t, cond)
            if self.renoises:
                path.append(schedule.add_noise(x0, torch.randn_like(x0), s))
            else:
                path.append(schedule.step(path[-1], x0, t, s))
        return [*path, self(denoiser, path[-1], times[-1], cond)]
