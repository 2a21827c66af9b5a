"""The settings of a training are the [train] table of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from distillers.errors import BadInput
from distillers.training.execution import Compile

BESIDE = (
    "shard",
    "checkpoint_every",
    "sample_every",
    "samples",
    "log_every",
    "tracker",
)  # leave the weights as they are


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """The [train] table of a recipe, checked when it is built. Raises BadInput naming the field."""

    iterations: int = 10_000
    batch: int = 64  # images per iteration and process
    accumulation: int = 1  # micro-batches that one iteration's batch is split into
    learning_rate: float = 1e-4
    learning_rates: dict[str, float] | None = None  # per player, where it differs
    optimizer: str = "radam"  # radam | adamw | adam | adam8bit, whose state takes a quarter (needs bitsandbytes)
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup: int = 100  # iterations of linear rise
    decay: str = "constant"  # constant | cosine | linear, to zero at the last iteration
    clip: float = 1.0  # gradient norm per player
    ema: float = 0.999  # decay of the evaluation average; 0 = none
    checkpointing: bool = False  # compute activations again in the backward pass: less memory, a third more time
    shard: bool = (
        False  # split networks, gradients and optimizer state over the processes that torchrun started (FSDP2)
    )
    precision: str = "no"  # accelerate's mixed precision: no | bf16 | fp16
    compile: Compile = "auto"  # torch.compile: auto = where the training is long enough and it is measured to be faster
    seed: int = 0
    checkpoint_every: int = 500  # iterations
    sample_every: int = 0  # iterations between sample grids; 0 = only at the end
    samples: int = 16
    watch_every: int = 0  # iterations between figures of quality on held-out data; 0 = none
    watch_samples: int = 256  # pictures for each of them
    watch_steps: int = 0  # network calls per picture; 0 = the generator's fewest, 20 for a teacher
    publish: Literal["last", "best"] = "last"  # best: the averages with the least Frechet distance in the watch
    log_every: int = 50
    workers: int = 0  # processes that draw batches; 0 = a thread, which is enough for a CPU and for cheap pictures
    cache_gb: float = 20.0  # most that latents and encoded texts may take on disk; 0 encodes them when drawn
    tracker: str = "tensorboard"  # any name accelerate knows, or "none"

    def __post_init__(self) -> None:
        counts = ("iterations", "batch", "accumulation", "checkpoint_every", "samples", "watch_samples", "log_every")
        for name in (*counts, "learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise BadInput(f"train.{name}", getattr(self, name), "a number above 0")
        for name, allowed in (
            ("optimizer", ("radam", "adamw", "adam", "adam8bit")),
            ("decay", ("constant", "cosine", "linear")),
            ("precision", ("no", "bf16", "fp16")),
        ):
            if getattr(self, name) not in allowed:
                raise BadInput(f"train.{name}", getattr(self, name), ", ".join(allowed))
        if self.batch % self.accumulation:
            raise BadInput("train.accumulation", self.accumulation, f"a divisor of train.batch = {self.batch}")
        if not 0 <= self.ema < 1:
            raise BadInput("train.ema", self.ema, "0 up to, not including, 1")
        for name in ("warmup", "sample_every", "watch_every", "watch_steps", "weight_decay", "workers", "cache_gb"):
            if not getattr(self, name) >= 0:
                raise BadInput(f"train.{name}", getattr(self, name), "0 or more")
        if self.publish == "best" and not (self.watch_every and self.ema):
            raise BadInput("train.publish", "best", "last, or train.watch_every and train.ema above 0")
        if not 0 <= self.seed < 2**32:
            raise BadInput("train.seed", self.seed, "0 to 4294967295")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise BadInput("train.betas", self.betas, "two numbers of 0 up to, not including, 1")
        for player, rate in (self.learning_rates or {}).items():
            if not rate > 0:
                raise BadInput(f"train.learning_rates.{player}", rate, "a number above 0")
