"""Say how an evaluation measures. This module does not import torch, so that the command can read its defaults."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from distillers.errors import BadInput

if TYPE_CHECKING:
    from torch import Tensor

    from distillers.evaluation.adherence import Judge
    from distillers.models.conditions import Cond

RewardFunction = Callable[["Tensor", "Cond | None"], "Tensor"]  # pictures (B,3,H,W) in [-1,1], condition -> (B,)
MEANS = "0, or 2 and more where SAR is translated: one truth has many samples"


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """Hold the options of an evaluation.

    Attributes:
        n: pictures in each row; must exceed the number of features.
        seed: picture i has `seed + i`.
        steps: network calls per picture, a row each; None for all that the model publishes.
        teacher_steps: the same of the teacher; students are compared with its row of the most.
        mean_of: for translators, average so many samples of each picture in one more row, at the fewest of `steps`;
            sample k of picture i has seed `seed + i + k n`. 0 for no such row. PSNR rewards such a mean.
        rewards: functions by name, whose means stand in every row.
        judge: for text-to-image models, what says whether a picture shows what its prompt names; None for no such
            figures.
        seeds_per_prompt: with a judge, pictures of one prompt whose diversity is measured; 1 for no such figure.
        batch: pictures at a time.
        latency_repeats: timed calls of each row; 0 for no latency.

    Raises:
        BadInput: a number out of range.
    """

    n: int = 1000
    seed: int = 0
    steps: Sequence[int] | None = None
    teacher_steps: Sequence[int] = (50,)
    mean_of: int = 0
    rewards: Mapping[str, RewardFunction] = field(default_factory=dict)
    judge: Judge | None = None
    seeds_per_prompt: int = 4
    batch: int = 64
    latency_repeats: int = 20

    def __post_init__(self) -> None:
        if self.n < 1 or self.latency_repeats < 0:
            raise BadInput("n, latency_repeats", (self.n, self.latency_repeats), "1 or more, 0 or more")
        if self.seed < 0 or self.batch < 1:
            raise BadInput("seed, batch", (self.seed, self.batch), "seed of 0 or more, batch of 1 or more")
        if self.seeds_per_prompt < 1:
            raise BadInput("seeds_per_prompt", self.seeds_per_prompt, "1 or more")
        if self.mean_of < 0 or self.mean_of == 1:
            raise BadInput("mean_of", self.mean_of, MEANS)
