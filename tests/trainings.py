"""Trainings of a few iterations: a recipe, methods that are easy to foresee, and one step of any method."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distillers.data import ImageData
from distillers.generator import Generator
from distillers.models.codec import PixelUnshuffle
from distillers.teacher import Teacher
from distillers.training.distiller import (
    Batch,
    Distiller,
    Networks,
    Turn,
    follow,
    slow_copy,
    split_batch,
    trainable_copy,
)
from distillers.training.losses import per_sample_mse
from distillers.training.settings import TrainSettings
from distillers.weights.manifest import Info

NETWORK: dict[str, Any] = {
    "block_out_channels": [8, 8],
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "add_attention": False,
}
TINY: dict[str, Any] = {
    "name": "tiny",
    "method": "diffusion",
    "data": {"kind": "shapes", "size": 8},
    "model": {"task": "class-to-image", "network": NETWORK},
    "diffusion": {"sampling_steps": 2},
    "train": {"iterations": 8, "batch": 4, "warmup": 2, "samples": 2, "checkpoint_every": 1},
}


def settings(**changes: Any) -> TrainSettings:
    """Few iterations, no warm-up, and a clip that never clips."""
    return TrainSettings(**{"iterations": 3, "batch": 4, "warmup": 0, "samples": 1, "clip": 1e9, "seed": 1, **changes})


def values(net: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def gradients(net: nn.Module) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in net.parameters()]


def norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.stack([t.double().norm() for t in tensors]).norm())


def same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@dataclass(frozen=True, kw_only=True)
class Regression(Distiller):
    """A loss without noise, and a target network that follows half-way; writes down what happened."""

    seen: list[dict[str, Any]] = field(default_factory=list)

    def networks(self, teacher: Teacher) -> Networks:
        student = trainable_copy(teacher.denoiser)
        return Networks({"student": student, "target": slow_copy(student)})

    def loss(self, net: nn.Module, batch: Batch, progress: float) -> Tensor:
        x0, cond = split_batch(batch)
        return per_sample_mse(net(x0, torch.full((len(x0),), 500.0), cond), x0).mean()

    def step(self, nets: Networks, batch: Batch, progress: float) -> Iterator[Turn]:
        student, before = nets["student"], values(nets["student"])
        yield "student", self.loss(student, batch, progress)
        follow(nets["target"], student, 0.5)
        self.seen.append(
            {
                "before": before,
                "gradient": gradients(student),
                "after": values(student),
                "target": values(nets["target"]),
            }
        )

    def generator(self, nets: Networks, teacher: Teacher) -> Generator:
        return Generator(nets["student"], teacher.codec, teacher.info)


@dataclass(frozen=True, kw_only=True)
class Duel(Regression):
    """Two players, each of whose losses has gradients in both networks."""

    def networks(self, teacher: Teacher) -> Networks:
        return Networks({name: trainable_copy(teacher.denoiser) for name in ("student", "critic")})

    def step(self, nets: Networks, batch: Batch, progress: float) -> Iterator[Turn]:
        t = torch.full((len(batch["x0"]),), 300.0)
        x0, cond = split_batch(batch)
        for player, other in (("critic", "student"), ("critic", "student"), ("student", "critic")):
            loss = per_sample_mse(nets["critic"](nets["student"](x0, t, cond), t, cond), x0).mean()
            own = torch.autograd.grad(loss, list(nets[player].parameters()), retain_graph=True)
            before, bystander = values(nets[player]), values(nets[other])
            yield player, loss
            self.seen.append(
                {
                    "player": player,
                    "own": own,
                    "before": before,
                    "gradient": gradients(nets[player]),
                    "after": values(nets[player]),
                    "bystander moved": not same(bystander, values(nets[other])),
                    "bystander gradient": norm(gradients(nets[other])),
                }
            )


@dataclass(frozen=True, kw_only=True)
class Breaks(Regression):
    """Half-way the loss, or only its gradient, is no number any more."""

    how: str

    def loss(self, net: nn.Module, batch: Batch, progress: float) -> Tensor:
        weight = next(net.parameters())
        zero = (weight * 0).sum()
        extra = {"loss": zero / 0, "gradient": zero.sqrt()}[self.how] if progress >= 0.5 else zero
        return super().loss(net, batch, progress) + extra


class Paired:
    """Shapes with a grey copy for SAR: the batch of a translator."""

    def __init__(self, data: ImageData) -> None:
        self.data = data

    def draw(self, n: int, rng: np.random.Generator) -> Batch:
        image = self.data.draw(n, rng)["image"]
        return {"image": image, "sar": image.mean(1, keepdim=True)}


def teacher_for(task: str, data: ImageData) -> Teacher:
    torch.manual_seed(0)
    info = Info(
        name="tiny",
        task=task,
        method="diffusion",
        role="teacher",
        data="shapes",
        sampler="ddim",
        size=(8, 8),
        labels=list(data.labels) if task == "class-to-image" else [],
        sar={"channels": 1} if task == "sar-to-optical" else None,
    )
    made = Teacher.random(info, NETWORK, {"name": "vp"}, "v", PixelUnshuffle(1))
    made.denoiser.eval().requires_grad_(False)
    return made


def batch_for(teacher: Teacher, data: ImageData, draws: int = 1) -> Batch:
    """An iteration's batch of four items a draw."""
    source = Paired(data) if teacher.info.task == "sar-to-optical" else data
    return teacher.encode_batch(source.draw(4 * draws, np.random.default_rng(0)), "cpu")


def digest(net: nn.Module) -> str:
    parts = (v.detach().contiguous().numpy().tobytes() for v in net.state_dict().values())
    return hashlib.sha256(b"".join(parts)).hexdigest()


def learners(nets: Networks) -> dict[str, nn.Module]:
    return {k: net for k, net in nets.items() if any(p.requires_grad for p in net.parameters())}


def digests(nets: Any) -> dict[str, str]:
    return {k: digest(net) for k, net in nets.items()}


def iterate(method: Distiller, nets: Networks, batch: Batch, progress: float) -> list[str]:
    """One iteration as the loop plays it; checks each turn. The players, in order."""
    players, turns = [], method.step(nets, batch, progress)
    optimizers = {k: torch.optim.SGD(net.parameters(), lr=1e-2) for k, net in learners(nets).items()}
    before = digests(learners(nets))
    for player, loss in turns:
        assert player in optimizers, f"{player} does not learn"
        assert digests(learners(nets)) == before, "a method moves learners by yielding, never by itself"
        assert loss.shape == () and loss.dtype == torch.float32 and loss.isfinite() and loss.requires_grad
        optimizers[player].zero_grad()
        loss.backward()
        moving = {k: p for k, p in nets[player].named_parameters() if p.requires_grad}
        missing = [k for k, p in moving.items() if p.grad is None or not p.grad.isfinite().all()]
        assert not missing, f"no gradient for {missing} of {player}"
        optimizers[player].step()
        after = digests(learners(nets))
        assert [k for k in after if after[k] != before[k]] == [player]
        before = after
        players.append(player)
    assert digests(learners(nets)) == before
    return players
