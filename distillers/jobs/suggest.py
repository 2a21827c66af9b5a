"""Small student networks are ranked without training, by latency and likeness to the teacher at initialisation.

A candidate is the teacher's network class with other options. What is measured: parameters; the latency of one pass on
this device; and the linear CKA (Kornblith et al., "Similarity of Neural Network Representations Revisited", 2019) of
its middle block's activations with the teacher's, on the same noised inputs, over random initialisations. Agreement at
initialisation is a hint, not a promise: it says what an architecture makes of its inputs before it has learnt
anything, not what it can learn, and among U-Nets it mostly follows the width. A budget in ms is a fact; within it,
train the first two or three.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from distillers.errors import BadInput
from distillers.evaluation.latency import latencies
from distillers.evaluation.report import Column, markdown_table
from distillers.models.conditions import Cond
from distillers.models.denoiser import Denoiser
from distillers.runtime import device_name
from distillers.teacher import Teacher
from distillers.training.distiller import rebuilt

SIZES = (1, 3 / 4, 1 / 2, 3 / 8, 1 / 4)  # of the teacher's widths
NOISES = (1.0, 0.6, 0.3)  # times of the inputs, as shares of the schedule's range
SEEDS = (0, 1, 2)
INPUTS = 64  # a time


@dataclass(frozen=True)
class Candidate:
    """A measured network. `network` holds options that differ from the teacher's; {} is the teacher's own network."""

    network: dict[str, Any]
    parameters: int
    latency_ms: float  # median of one pass, one picture
    agreement: float  # 0 to 1, mean over initialisations
    spread: float  # their standard deviation

    @property
    def line(self) -> str:
        """Write the options as a line of a recipe."""
        options = ", ".join(f"{key} = {value}" for key, value in self.network.items())
        return f"network = {{ {options} }}" if options else 'start = "untrained"'


def suggest(teacher: Teacher, *, budget_ms: float | None = None, candidates: int = 10) -> list[Candidate]:
    """Measure candidates on the teacher's device: those within the budget by agreement, then the others, fastest first.

    Args:
        budget_ms: of one pass of one picture; None: no limit.
        candidates: at most so many, from the largest to the smallest.

    Raises:
        BadInput: a budget or count that is not above 0, or a network whose size is not given by width or depth.
    """
    if budget_ms is not None and not budget_ms > 0:
        raise BadInput("budget_ms", budget_ms, "a number above 0")
    if candidates < 1:
        raise BadInput("candidates", candidates, "1 or more")
    options = variants(teacher.denoiser.network)[:candidates]
    device = next(teacher.denoiser.parameters()).device
    own, inputs = teacher.denoiser, diffused_inputs(teacher, device)
    targets = activations(own, inputs)

    def initialised(network: dict[str, Any], seed: int) -> Denoiser:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            built = rebuilt(own.network, network, "network").to(device).eval()
        return Denoiser(built, own.schedule, own.prediction)

    first_ones = [initialised(network, SEEDS[0]) for network in options]
    x_t, t, cond = inputs[0]
    alone = (x_t[:1], t, cond and {key: value[:1] for key, value in cond.items()})
    with torch.inference_mode():
        times = latencies([partial(one, *alone) for one in first_ones], device=device)
    measured = []
    for network, first, latency in zip(options, first_ones, times, strict=True):
        agreements = [
            agreement(activations(one, inputs), targets)
            for one in (first, *(initialised(network, seed) for seed in SEEDS[1:]))
        ]
        parameters = sum(p.numel() for p in first.network.parameters())
        mean, spread = statistics.fmean(agreements), statistics.stdev(agreements)
        measured.append(Candidate(network, parameters, latency["p50"], mean, spread))
    limit = float("inf") if budget_ms is None else budget_ms
    within = sorted((c for c in measured if c.latency_ms <= limit), key=lambda c: -c.agreement)
    return within + sorted((c for c in measured if c.latency_ms > limit), key=lambda c: c.latency_ms)


def table(candidates: Sequence[Candidate], teacher: Teacher, budget_ms: float | None = None) -> str:
    """Write a Markdown table of the candidates, and under it the best one's line for a recipe."""
    columns: list[Column[Candidate]] = [
        ("for the recipe", lambda c: f"`{c.line}`", ""),
        ("parameters", lambda c: c.parameters, ","),
        ("ms a pass", lambda c: c.latency_ms, ".2f"),
        ("agreement", lambda c: c.agreement, ".3f"),
        ("+-", lambda c: c.spread, ".3f"),
        ("budget", lambda c: None if budget_ms is None else "over" if c.latency_ms > budget_ms else "within", ""),
    ]
    device = device_name(next(teacher.denoiser.parameters()).device)
    note = (
        f"Agreement: CKA with {teacher.info.name} before any training, {len(SEEDS)} initialisations. A hint, not a "
        f"promise. Medians on {device}, {torch.get_num_threads()} threads."
    )
    best, page = candidates[0], f"{markdown_table(columns, candidates)}\n\n{note}"
    if budget_ms is not None and best.latency_ms > budget_ms:
        return f"{page}\n\nNone is within {budget_ms:g} ms; the fastest is first.\n"
    return f"{page}\n\n    {best.line}\n"


# --- the candidates --------------------------------------------------------------------------------------------------
def variants(network: nn.Module) -> list[dict[str, Any]]:
    """List options that make a network of this class smaller, the largest first; {} is its own size."""
    config: Any = network.config
    sizes: list[dict[str, Any]] = []
    if "block_out_channels" in config:  # UNet2DModel
        widths = config.block_out_channels
        group = math.lcm(config.norm_num_groups, config.attention_head_dim or 1)  # both divide a width
        for size in SIZES:
            scaled = [max(group, round(size * width / group) * group) for width in widths]
            for layers in dict.fromkeys((config.layers_per_block, 1)):
                options = {"block_out_channels": scaled, "layers_per_block": layers}
                sizes.append({key: value for key, value in options.items() if value != _plain(config[key])})
    elif "num_attention_heads" in config:  # DiTTransformer2DModel
        layers, heads = config.num_layers, config.num_attention_heads
        depths = dict.fromkeys((layers, max(1, layers // 2), max(1, layers // 4)))
        for h in dict.fromkeys((heads, max(1, heads // 2), max(1, heads // 4))):
            for depth in depths:
                options = {"num_layers": depth, "num_attention_heads": h}
                sizes.append({key: value for key, value in options.items() if value != config[key]})
    else:
        raise BadInput("teacher", type(network).__name__, "UNet2DModel or DiTTransformer2DModel")
    return [options for i, options in enumerate(sizes) if options not in sizes[:i]]


def _plain(value: Any) -> Any:
    """Turn a tuple into a list, as TOML would write it."""
    return list(value) if isinstance(value, tuple) else value


# --- likeness --------------------------------------------------------------------------------------------------------
Input = tuple[Tensor, Tensor, Cond | None]


@torch.inference_mode()
def diffused_inputs(teacher: Teacher, device: torch.device) -> list[Input]:
    """Sample (x_t, t, cond) at each of NOISES without data: unit noise at t_max, the teacher's diffused x0 below it."""
    denoiser, schedule = teacher.denoiser, teacher.denoiser.schedule
    rng, shape = torch.Generator().manual_seed(0), (INPUTS, *teacher.example()[0].shape[1:])
    cond = teacher.condition.random(INPUTS, rng)
    cond = cond and {key: value.to(device) for key, value in cond.items()}
    t = torch.tensor(schedule.t_max, dtype=torch.float64, device=device)
    noise = torch.randn(shape, generator=rng).to(device)
    x_t = schedule.start(noise, t)
    inputs: list[Input] = [(x_t, t, cond)]
    for share in NOISES[1:]:
        x0 = denoiser(x_t, t, cond)
        t = schedule.spaced(torch.tensor(share, dtype=torch.float64, device=device))
        x_t = schedule.add_noise(x0, torch.randn(shape, generator=rng).to(device), t)
        inputs.append((x_t, t, cond))
    return inputs


@torch.inference_mode()
def activations(denoiser: Denoiser, inputs: Sequence[Input]) -> list[Tensor]:
    """Compute the middle block's activations at each time, a row for each position of each input, (N, channels)."""
    features = [denoiser.features(*one, (middle(denoiser.network),))[0] for one in inputs]
    return [(x.movedim(1, -1) if x.ndim == 4 else x).flatten(0, -2) for x in features]


def middle(network: nn.Module) -> str:
    """Return the name of the block that is compared: a U-Net's lowest, a transformer's at half its own depth."""
    blocks = getattr(network, "transformer_blocks", None)
    return "mid_block" if blocks is None else f"transformer_blocks.{len(blocks) // 2}"


def agreement(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Average linear CKA over the times."""
    return statistics.fmean(linear_cka(a, b) for a, b in zip(ours, theirs, strict=True))


def linear_cka(a: Tensor, b: Tensor) -> float:
    """Compute HSIC(a, b) / sqrt(HSIC(a, a) HSIC(b, b)) of activations (N, d), (N, d'), linear kernels, N >= 4.

    1 for the same up to rotation, scale and shift; 0, on average, for independent ones, which takes the unbiased
    estimate of HSIC (Song et al. 2012): the plain one is larger the more features there are.
    """
    a, b = (x.double() - x.double().mean(0) for x in (a, b))
    size = _hsic(a, a) * _hsic(b, b)
    return _hsic(a, b) / math.sqrt(size) if size > 0 else 0.0


def _hsic(a: Tensor, b: Tensor) -> float:
    """Compute N (N - 3) HSIC of K = a a^T and M = b b^T, diagonals emptied; neither K nor M is built."""
    n, own_a, own_b = len(a), a.square().sum(1), b.square().sum(1)
    rows_a, rows_b = a @ a.sum(0) - own_a, b @ b.sum(0) - own_b  # K 1, M 1
    both = (a.T @ b).square().sum() - own_a @ own_b  # tr(K M)
    return float(both + rows_a.sum() * rows_b.sum() / ((n - 1) * (n - 2)) - 2 * (rows_a @ rows_b) / (n - 2))
