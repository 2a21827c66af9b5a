"""Hyper-SD trains consistency in ever longer segments, then feedback and score distillation for one step.

Ren, Xia, Lu, Zhang, Wu, Xie, Wang and Xiao, "Hyper-SD: Trajectory Segmented Consistency Model for Efficient Image
Synthesis", 2024. Its training code was never released; the segment's target and the adversarial heads follow Wang et
al., "Phased Consistency Models", 2024 (eq. 8-9), the score term Yin et al., "One-step Diffusion with Distribution
Matching Distillation", 2024, feedback Xu et al., "ImageReward", 2023.

With k segments the student carries x_t to the lower end of its segment: G(x_t, t -> b). Eight short jumps are easily
learnt, and each stage (8, 4, 2, 1) starts where the last one ended. The paper samples the target's time between the
segment's lower end and x_m; a network without that time as an input cannot learn it, so ours is the lower end. The
last stage, k = 1, is a consistency model, so one network - or one LoRA on the teacher - serves any number of steps.
Feedback and scores act in that stage, on one-step samples, beside the consistency term, which is what keeps them at the
teacher's pictures.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from distillers.errors import BadInput
from distillers.generator import Generator
from distillers.models.conditions import Cond, split
from distillers.models.denoiser import Denoiser
from distillers.teacher import Teacher
from distillers.training.discriminator import Heads, frozen_gradients
from distillers.training.distiller import (
    Batch,
    Distiller,
    Networks,
    Turn,
    follow,
    frozen,
    new_student,
    slow_copy,
    split_batch,
    trainable_copy,
)
from distillers.training.losses import (
    Solver,
    check_steps,
    consistency_generator,
    denoising,
    diffuse,
    discriminator_loss,
    distribution_matching,
    gan_loss,
    gradient_norms,
    per_sample_mse,
    pseudo_huber,
    sample_student,
    teacher_step,
)
from distillers.training.reward import Reward, load_reward


@dataclass(frozen=True, kw_only=True)
class HyperSD(Distiller):
    """L = E d( G(x_t, t -> b), sg G-(x_m, m -> b) ) + lambda_k L_adv, with x_m one teacher step below x_t (TSCD).

    lambda_k is what makes the adversarial term's gradient at the student's samples `adversarial_weights[k]` times as
    long as that of d (as in VQGAN, Esser et al. 2021, eq. 7): a fixed one of 0.5 came to four ten-thousandths.
    """

    segments: tuple[int, ...] = (8, 4, 2, 1)  # k of each stage; the last has half of the training, the others share it
    points: int = 64  # N, fine intervals of the trajectory; every k divides it
    solver: Solver = "ddim"  # the teacher's step
    target_decay: float = 0.95  # mu of the target network; 0 = the student itself
    distance: Literal["pseudo-huber", "l2"] = "pseudo-huber"  # d
    guidance_scale: float = 1.0  # of the teacher; 1 = none
    # adversarial term
    adversarial_weights: tuple[float, ...] = (0.0, 0.0, 0.05, 0.1)  # of each stage, a ratio: late stages average most
    layers: tuple[str, ...] = ("mid_block",)  # of the frozen teacher, what the discriminator's heads read
    # human feedback, in the last stage
    reward: str | None = None  # a feature classifier's folder, or "module:function"; see distillers/training/reward.py
    reward_weight: float = 0.1  # of relu(margin - reward)
    reward_margin: float = 0.0  # in the reward's own unit: above it there is nothing more to gain, so nothing to hack
    # one-step score distillation, in the last stage
    score_weight: float = 0.0  # of the distribution matching term; 0 = none
    critic_turns: int = 5  # of the score network for one of the student's (as DMD2's)
    # what is published
    steps: tuple[int, ...] = (1, 2, 4, 8)  # step counts published when the last stage is k = 1

    def __post_init__(self) -> None:
        if self.points < 1:
            raise BadInput("hyper_sd.points", self.points, "1 or more")
        for k in self.segments or (0,):
            if k < 1 or self.points % k:
                raise BadInput("hyper_sd.segments", self.segments, f"counts that divide points = {self.points}")
        if len(self.adversarial_weights) != len(self.segments) or min(self.adversarial_weights) < 0:
            allowed = f"0 or more for each of the {len(self.segments)} stages"
            raise BadInput("hyper_sd.adversarial_weights", self.adversarial_weights, allowed)
        if not 0 <= self.target_decay < 1:
            raise BadInput("hyper_sd.target_decay", self.target_decay, "0 up to, not including, 1")
        check_steps("hyper_sd.steps", self.steps)
        self._at_least(0, "reward_weight", "score_weight", "guidance_scale")
        self._at_least(1, "critic_turns")
        if (self.reward or self.score_weight) and self.segments[-1] != 1:
            raise BadInput(
                "hyper_sd.segments", self.segments, "1 as the last: feedback and scores are of one-step samples"
            )

    def networks(self, teacher: Teacher) -> Networks:
        nets = Networks({"student": new_student(teacher)})
        nets["student"].schedule.segment_grid(self.points)  # refused where the clock has too few timesteps
        nets["teacher"] = frozen(teacher.guided(self.guidance_scale))
        if self.target_decay:
            nets["target"] = slow_copy(nets["student"])
        x0, cond = teacher.example()
        if any(self.adversarial_weights):
            nets["backbone"] = frozen(teacher.initial)
            t = torch.tensor(teacher.initial.schedule.t_max)
            with torch.no_grad():
                nets["discriminator"] = Heads(teacher.initial.features(x0, t, cond, self.layers))
        if self.score_weight:
            nets["critic"] = trainable_copy(teacher.initial)
        if self.reward:
            nets["reward"] = frozen(Reward(load_reward(self.reward), teacher.codec, x0, cond))
        return nets

    def stage_starts(self) -> list[float]:
        earlier = len(self.segments) - 1
        return [0.5 * i / earlier for i in range(earlier)] + [0.5] if earlier else [0.0]

    def stage(self, progress: float) -> tuple[int, float]:
        """Return k and the adversarial term's ratio at this point of the training."""
        i = bisect_right(self.stage_starts(), progress) - 1
        return self.segments[i], self.adversarial_weights[i]

    def draws(self, progress: float) -> int:
        return self.critic_turns + 1 if self.score_weight and self.stage(progress)[0] == 1 else 1

    def step(self, nets: Networks, batch: Batch, progress: float) -> Iterator[Turn]:
        student, target = nets["student"], nets["target"] if self.target_decay else nets["student"]
        schedule = student.schedule
        last, *earlier = split(batch, self.draws(progress))
        x0, cond = split_batch(last)
        k, adversarial_weight = self.stage(progress)
        d = pseudo_huber if self.distance == "pseudo-huber" else per_sample_mse

        # n ~ U{1..N}: t, its neighbour m below, and the lower end b of the segment they are in
        grid, length = schedule.segment_grid(self.points).to(x0.device), self.points // k
        n = torch.randint(1, self.points + 1, (len(x0),), device=x0.device)
        first = (n - 1) // length * length
        t, m, b = grid[n], grid[n - 1], grid[first]
        x_t = schedule.add_noise(x0, torch.randn_like(x0), t)
        x_m = teacher_step(nets["teacher"], x_t, t, m, cond, self.solver)
        with torch.no_grad():  # sg G-(x_m, m -> b), which is x_m itself where m = b
            y = jump(target, x_m, m, b, cond)
        x_b = jump(student, x_t, t, b, cond)
        loss = d(x_b, y).mean()

        if adversarial_weight:
            # both are diffused to one random time above b in the segment, where D compares them (PCM, eq. 8-9)
            u, eps = grid[first + torch.randint_like(n, length + 1)], torch.randn_like(x0)

            def features(x: Tensor) -> list[Tensor]:
                x_u: Tensor = schedule.renoise(x, eps, b, u)
                return nets["backbone"].features(x_u, u, cond, self.layers)

            heads = nets["discriminator"]
            with torch.no_grad():
                fake, real = features(x_b.detach()), features(y)
            yield "discriminator", discriminator_loss(heads(fake), heads(real))
            with frozen_gradients(heads):
                adversary = gan_loss(heads(features(x_b)), real=True)
            pull, counterpull = gradient_norms(x_b, loss, adversary)
            lambda_k = adversarial_weight * pull / counterpull.clamp_min(1e-12)
            nets.pull("loss", pull)
            nets.pull("adversary", lambda_k * counterpull)
            loss = loss + lambda_k * (adversary - adversary.detach())  # lambda_k differs from batch to batch

        for part in earlier:
            yield "critic", self.critic_loss(nets, *split_batch(part))
        if k == 1 and (self.score_weight or self.reward):
            loss = loss + self.one_step_terms(nets, x0, cond)
        yield "student", loss

        if self.target_decay:  # theta- <- mu theta- + (1 - mu) theta
            follow(target, student, self.target_decay)

    def critic_loss(self, nets: Networks, x0: Tensor, cond: Cond | None) -> Tensor:
        """Compute the critic's denoising loss of the student's one-step samples (Yin et al. 2024, eq. 6)."""
        with torch.no_grad():
            x = sample_student(nets["student"], torch.randn_like(x0), cond)
        t, x_t = diffuse(nets["critic"].schedule, x)
        return denoising(nets["critic"], x_t, t, x, cond)

    def one_step_terms(self, nets: Networks, x0: Tensor, cond: Cond | None) -> Tensor:
        """Compute score distillation and feedback, both on the same one-step sample x."""
        x = sample_student(nets["student"], torch.randn_like(x0), cond)
        loss = x0.new_zeros(())
        if self.score_weight:
            with torch.no_grad():
                t, x_t = diffuse(nets["critic"].schedule, x)
                real, fake = nets["teacher"](x_t, t, cond), nets["critic"](x_t, t, cond)
            loss = loss + self.score_weight * distribution_matching(x, real, fake)
        if self.reward:
            loss = loss + self.reward_weight * (self.reward_margin - nets["reward"](x, cond)).relu().mean()
        return loss

    def generator(self, nets: Networks, teacher: Teacher) -> Generator:
        student, k = nets["student"], self.segments[-1]
        if k == 1:
            return consistency_generator(student, teacher, self.steps)
        # from end to end of the segments, without noise
        ends = student.schedule.segment_grid(self.points)[:: self.points // k]
        times = {k: ends[1:].flip(0).tolist()}
        info = replace(teacher.info, sampler="ddim", step_times=times, default_steps=k, guidance_scale=1.0)
        return Generator(student, teacher.codec, info, teacher.prompts)


def jump(denoiser: Denoiser, x_t: Tensor, t: Tensor, s: Tensor, cond: Cond | None = None) -> Tensor:
    """Evaluate G(x_t, t -> s) = alpha_s x0hat + sigma_s epshat: DDIM on the network's own estimates."""
    return denoiser.schedule.step(x_t, denoiser(x_t, t, cond), t, s)
