"""Denoising score matching trains a teacher: the degenerate distiller, which learns from data alone.

Ho, Jain and Abbeel, "Denoising Diffusion Probabilistic Models", 2020; the SNR + 1 weight: Salimans and Ho,
"Progressive Distillation", 2022, sec. 4; its cap: Hang et al., "Min-SNR Weighting", 2023; label dropout for guidance:
Ho and Salimans, "Classifier-Free Diffusion Guidance", 2022; lognormal noise levels: Karras et al., "Elucidating the
Design Space of Diffusion-Based Generative Models", 2022, table 1; on the flow path they are the logit-normal times of
Esser et al., "Scaling Rectified Flow Transformers", 2024, sec. 3.1.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from distillers.errors import BadInput
from distillers.generator import Generator
from distillers.models.conditions import Cond
from distillers.models.denoiser import Denoiser
from distillers.teacher import Teacher
from distillers.training.distiller import Batch, Distiller, Networks, Turn, split_batch, trainable_copy
from distillers.training.losses import SNR_CAP, denoising
from distillers.training.text_encoder import of_parts


@dataclass(frozen=True, kw_only=True)
class Diffusion(Distiller):
    """E (min(SNR, cap) + 1) || x0_theta(x_t, t) - x0 ||^2. Without the cap this is the velocity loss."""

    starts_from = "model"

    snr_cap: float = SNR_CAP  # keeps the last, almost clean times from taking most of the loss
    label_dropout: float = 0.1  # share of samples trained without their class or caption; 0 forbids guidance later
    log_std: float = 0.0  # of ln(sigma/alpha) at the times trained at; 0 = times are uniform
    log_mean: float = 0.0  # of the same; 0 is the logit-normal's middle, t = 1/2 on the flow path
    last_time_share: float = 0.0  # of samples at t_max, the only time that a one-step student is called at
    sampling_steps: int = 50  # network calls when the teacher is served
    guidance_scale: float = 1.0  # when it is served; 1 = none

    def __post_init__(self) -> None:
        self._at_least(0, "snr_cap", "log_std")
        for name in ("label_dropout", "last_time_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise BadInput(f"diffusion.{name}", getattr(self, name), "0 to 1")

    def networks(self, teacher: Teacher) -> Networks:
        return Networks({"student": trainable_copy(teacher.denoiser)})

    def step(self, nets: Networks, batch: Batch, progress: float) -> Iterator[Turn]:
        denoiser = nets["student"]
        schedule = denoiser.schedule
        x0, cond = split_batch(batch)
        if cond and "sar" not in cond:
            dropped = torch.rand(len(x0), device=x0.device) < self.label_dropout
            cond = without_condition(cond, dropped, denoiser)
        # x_t = alpha x0 + sigma eps at a random time (Ho et al. 2020, Algorithm 1)
        if self.log_std:  # ln(sigma/alpha) ~ N(mean, std^2) (Karras et al. 2022)
            ratio = self.log_mean + self.log_std * torch.randn(len(x0), device=x0.device, dtype=torch.float64)
            t = schedule.time_at_ratio(ratio.exp())
        else:
            t = schedule.t_min + torch.rand(len(x0), device=x0.device) * (schedule.t_max - schedule.t_min)
        if self.last_time_share:
            t = t.masked_fill(torch.rand(len(x0), device=x0.device) < self.last_time_share, schedule.t_max)
        x_t = schedule.add_noise(x0, torch.randn_like(x0), t)
        yield "student", denoising(denoiser, x_t, t, x0, cond, self.snr_cap)

    def generator(self, nets: Networks, teacher: Teacher) -> Generator:
        info = replace(
            teacher.info,
            sampler="ddim",
            step_times={},
            default_steps=self.sampling_steps,
            guidance_scale=self.guidance_scale,
        )
        learnt, prompts = nets["student"], teacher.prompts
        if prompts is not None and learnt.text is not None:
            prompts = of_parts(prompts.tokenizers["tokenizer"], copy.deepcopy(learnt.text))
            learnt = Denoiser(learnt.network, learnt.schedule, learnt.prediction)
        return Generator(learnt, teacher.codec, info, prompts)


def without_condition(cond: Cond, dropped: Tensor, denoiser: Denoiser) -> Cond:
    """Put the null in place of the condition of samples where `dropped` (B,) is true (Ho and Salimans 2022, sec. 3.2).

    The null of classes is the last row of the network's embedding; encoded prompts hold that of the empty one.
    """
    if "label" in cond:
        config: Any = denoiser.network.config
        null = config.num_class_embeds - 1
        return {**cond, "label": cond["label"].masked_fill(dropped, null)}
    nulls = {key.removeprefix("null_"): value for key, value in cond.items() if key.startswith("null_")}
    told = {key: value for key, value in cond.items() if not key.startswith("null_")}
    return told | {key: torch.where(dropped.view(-1, *[1] * (v.ndim - 1)), v, told[key]) for key, v in nulls.items()}
