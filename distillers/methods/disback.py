"""DisBack is distribution matching along the path that leads back from the student to the teacher.

Zhang et al., "Distribution Backtracking Builds A Faster Convergence Trajectory for Diffusion Distillation", 2024.

At first the student's samples are nothing like the teacher's, and the teacher's score there says little. So, stage 1
(degradation): a copy of the teacher learns to denoise samples of the untrained student, and its states are recorded
along the path from the teacher P_0 to P_N, the score of the student's own samples. Stage 2 (backtracking): the
student matches P_{N-1}, then P_{N-2}, ..., and at last the teacher itself; the critic begins as P_N. Each of these
targets is close to where the student is.

Stage 1 trains the critic alone, so the path is the critic's own. The loss is that of DMD2, means over samples and
elements with a per-sample normaliser.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from distillers.errors import BadInput
from distillers.generator import Generator
from distillers.models.conditions import split
from distillers.teacher import Teacher
from distillers.training.distiller import (
    Batch,
    Distiller,
    Networks,
    Turn,
    frozen,
    new_student,
    slow_copy,
    split_batch,
    trainable_copy,
)
from distillers.training.losses import consistency_generator, denoising, diffuse, distribution_matching, sample_student


@dataclass(frozen=True, kw_only=True)
class DisBack(Distiller):
    """The gradient of DMD2 with P_k in place of the teacher, k = N-1, ..., 1, and the teacher at last."""

    start: str | None = None  # absent: the teacher's weights; "untrained"; or a folder of the same network
    network: dict[str, Any] | None = None  # options of the teacher's network class that differ: a smaller student
    guidance_scale: float = 1.0  # of the teacher, at the last node; 1 = none
    critic_turns: int = 5  # of the critic for one of the student's
    nodes: int = 5  # N
    record: float = 0.1  # share of the training that stage 1 takes
    back: float = 0.5  # share of the training after which the target is the teacher
    advance: Literal["interval", "plateau"] = "interval"  # to the next node: at even times, or when the gap stays
    patience: int = 50  # iterations without a fall of the gap by a hundredth (advance = plateau)

    def __post_init__(self) -> None:
        self._at_least(1, "critic_turns", "nodes", "patience")
        self._at_least(0, "guidance_scale")
        if not 0 < self.record < self.back < 1:
            raise BadInput("disback.record, back", (self.record, self.back), "0 < record < back < 1")

    @property
    def needs_pictures(self) -> bool:
        return False

    def networks(self, teacher: Teacher) -> Networks:
        nets = Networks({"student": new_student(teacher, self.start, self.network, "disback")})
        nets["teacher"] = frozen(teacher.guided(self.guidance_scale))
        nets["critic"] = trainable_copy(teacher.initial)
        nets["target"] = slow_copy(nets["critic"])
        nets["path"] = frozen(Path(self.nodes, nets["critic"]))
        return nets

    def draws(self, progress: float) -> int:
        return 1 if progress < self.record else self.critic_turns + 1

    def step(self, nets: Networks, batch: Batch, progress: float) -> Iterator[Turn]:
        student, critic, path = nets["student"], nets["critic"], nets["path"]
        schedule = critic.schedule  # the student's own ends where its sampling starts

        # P_1, ..., P_N at even times of stage 1
        while path.recorded < min(self.nodes, int(self.nodes * progress / self.record)):
            path.record(critic)
        last, *earlier = split(batch, self.draws(progress))
        # the critic denoises samples of the student (Yin et al. 2024, eq. 6): all that stage 1 does
        for part in earlier or [last]:
            x0, cond = split_batch(part)
            with torch.no_grad():
                fake_x0 = sample_student(student, torch.randn_like(x0), cond)
            t, x_t = diffuse(schedule, fake_x0)
            yield "critic", denoising(critic, x_t, t, fake_x0, cond)
        if progress < self.record:
            return

        # the score difference of critic and P_k at a diffused sample (eq. 7)
        target = self.target(nets, progress)
        x0, cond = split_batch(last)
        x = sample_student(student, torch.randn_like(x0), cond)
        with torch.no_grad():
            t, x_t = diffuse(schedule, x)
            real, fake = target(x_t, t, cond), critic(x_t, t, cond)
        yield "student", distribution_matching(x, real, fake)
        if self.advance == "plateau":
            path.watch((fake - real).abs().mean(), self.patience)

    def target(self, nets: Networks, progress: float) -> nn.Module:
        """Return the network to match now: P_k of this moment, the teacher itself from `back` on."""
        path = nets["path"]
        done = (progress - self.record) / (self.back - self.record)
        node = max(0, self.nodes - 1 - int(done * (self.nodes - 1))) if self.advance == "interval" else int(path.node)
        if node == 0 or progress >= self.back:
            return nets["teacher"]
        if path.loaded != node:
            path.load(node, nets["target"])
        return nets["target"]

    def generator(self, nets: Networks, teacher: Teacher) -> Generator:
        return consistency_generator(nets["student"], teacher, (1,))


class Path(nn.Module):
    """A path holds the states P_0 .. P_N of a network, and which of them is the target.

    They stay on the CPU (`on_cpu`) when the networks move to an accelerator: N + 1 times the parameters, float32.
    """

    on_cpu = True
    states: Tensor  # (N + 1, parameters)
    recorded: Tensor  # nodes after P_0
    loaded: Tensor  # the node whose state the target network has
    node: Tensor  # the current target (advance = plateau)
    gap: Tensor  # running mean of |critic - target|
    best: Tensor
    waited: Tensor

    def __init__(self, nodes: int, network: nn.Module) -> None:
        super().__init__()
        first = parameters_to_vector(network.parameters()).detach()
        self.register_buffer("states", torch.zeros(nodes + 1, len(first), device="meta" if first.is_meta else "cpu"))
        self.states[0] = first
        self.register_buffer("recorded", torch.tensor(0))
        self.register_buffer("loaded", torch.tensor(0))
        self.register_buffer("node", torch.tensor(nodes - 1))
        self.register_buffer("gap", torch.tensor(float("nan")))
        self.register_buffer("best", torch.tensor(float("inf")))
        self.register_buffer("waited", torch.tensor(0))

    def _apply(self, fn: Any, recurse: bool = True) -> Path:
        return self  # no device but the CPU, no other precision

    def record(self, network: nn.Module) -> None:
        """Record the network's state as the next node."""
        self.recorded += 1
        self.states[self.recorded] = parameters_to_vector(network.parameters()).detach().cpu()

    def load(self, node: int, network: nn.Module) -> None:
        """Load a node's state into the network, every parameter of it."""
        own = list(network.parameters())
        state = self.states[node].to(own[0].device)
        assert len(state) == sum(p.numel() for p in own), "the path is another network's"
        with torch.no_grad():
            vector_to_parameters(state, own)
        self.loaded.fill_(node)

    def watch(self, gap: Tensor, patience: int) -> None:
        """Advance to the next node once the gap, averaged over about ten iterations, no longer falls."""
        if torch.distributed.is_initialized():  # all processes advance together
            torch.distributed.all_reduce(gap)
        now = gap.cpu()
        self.gap.copy_(now if self.gap.isnan() else torch.lerp(self.gap, now, 0.1))
        better = bool(self.gap < 0.99 * self.best)
        self.best.copy_(self.gap if better else self.best)
        self.waited.copy_((self.waited + 1) * (not better))
        if self.waited >= patience:
            self.node.copy_((self.node - 1).clamp_min(0))
            self.gap.fill_(float("nan"))
            self.best.fill_(float("inf"))
            self.waited.zero_()
