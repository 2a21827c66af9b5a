"""A distiller is the contract of a method: which networks it needs, and one training step as a generator of turns.

A turn is `yield player, loss`. The loop zeroes that player's gradients, runs backward, clips, moves that player only,
and resumes the generator. One-network training is one yield; a critic is `yield "critic", ...` before `yield
"student", ...`.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from distillers.errors import BadInput
from distillers.models.denoiser import Denoiser
from distillers.models.lora import Adapted, AdapterBase, LoraSettings, Origin, start_from
from distillers.training.sharding import local_part
from distillers.weights.read import origin, read_pipeline

if TYPE_CHECKING:
    from distillers.autoencoder import Autoencoder
    from distillers.data import ImageData
    from distillers.generator import Generator
    from distillers.teacher import Teacher

# "x0" (B, C, H, W) in the network's space; "loser", like x0, in preference pairs; all else is the condition
Batch = dict[str, Tensor]
Turn = tuple[str, Tensor]
M = TypeVar("M", bound=nn.Module)


class Networks(nn.ModuleDict):
    """Networks holds the networks of a method by name: denoisers, critics, discriminator heads.

    Attributes:
        pulls: sums of the norms of gradients at the student's samples since the last log, by the term that they are of:
            "loss", and "adversary" for its share. The tracker shows their ratio.
    """

    def __init__(self, modules: Mapping[str, nn.Module] | None = None) -> None:
        super().__init__(modules)
        self.pulls: dict[str, Tensor] = {}

    def pull(self, name: str, norm: Tensor) -> None:
        """Add the norm of a gradient at the student's samples."""
        self.pulls[name] = self.pulls.get(name, torch.zeros_like(norm)) + norm.detach()

    def noted(self, samples: Tensor, name: str) -> Tensor:
        """Pass samples (B, ...) on; the norm of the gradient that comes back through them is added to `pulls`."""
        passed = samples.view_as(samples)
        if passed.requires_grad:
            passed.register_hook(lambda gradient: self.pull(name, gradient.float().norm()))
        return passed

    if TYPE_CHECKING:  # torch types every submodule as Tensor | Module

        def __getitem__(self, key: str) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class Distiller(ABC):
    """A distiller implements one paper. Fields are its hyper-parameters with the paper's values as defaults."""

    # what it can be used for
    tasks: ClassVar[tuple[str, ...]] = ("image", "class-to-image", "sar-to-optical", "text-to-image")
    # what a job starts from: a teacher's folder, the untrained network of a [model] table, or the data alone
    starts_from: ClassVar[Literal["teacher", "model", "data"]] = "teacher"
    published: ClassVar[str] = "student"  # prefix of the names of the networks whose averaged weights are published

    @property
    def fits_head(self) -> bool:
        """Say whether its student may predict something else than its teacher does: see `training.head`."""
        return True

    @property
    def needs_pictures(self) -> bool:
        """Say whether it learns from the pictures of its data, or only from the conditions beside them."""
        return True

    def parts(self) -> list[dict[str, Any]]:
        """Return the options that tell the trainings of one job apart: one training, unless a method has several."""
        return [{}]

    def data(self, data: ImageData, teacher: Teacher) -> ImageData:
        """Return the part of the data that the method learns from: all of it, unless a method overrides this."""
        return data

    def draws(self, progress: float) -> int:
        """Return how many batches of `train.batch` items an iteration needs, in one: 1, unless a method overrides this.

        Players that learn several times an iteration need fresh noise, data and conditions each time; `step` cuts its
        batch into so many by `split`.
        """
        return 1

    def stage_starts(self) -> list[float]:
        """Return the progress, from 0 on and ascending, at which each stage of the training begins: one stage.

        The learning rate warms up and decays within each stage, for each has another task.
        """
        return [0.0]

    @abstractmethod
    def networks(self, teacher: Teacher) -> Networks:
        """Build "student", "teacher" (frozen) and every other network that learns or is kept, by name."""

    @abstractmethod
    def step(self, nets: Networks, batch: Batch, progress: float) -> Iterator[Turn]:
        """Yield (player, scalar loss) turns for one iteration; progress runs from 0 to 1 over the training.

        Randomness comes from torch's global generator, which the loop seeds for every iteration.
        """

    @abstractmethod
    def generator(self, nets: Networks, teacher: Teacher) -> Generator | Autoencoder:
        """Build the trained generator, or autoencoder. Its manifest is the teacher's with another way of sampling.

        Whose folder it is (name, role, teacher, data) is written when it is published: `distillers.jobs.publish`.
        """

    def finish(self, made: Generator | Autoencoder, data: ImageData) -> Generator | Autoencoder:
        """Adjust what was trained to the data that it learnt from, once, before it is published."""
        return made

    def _at_least(self, least: float, *names: str) -> None:
        """Raise BadInput unless each of these hyper-parameters is at least so much."""
        method = type(self).__module__.rpartition(".")[2]
        for name in names:
            if not getattr(self, name) >= least:
                raise BadInput(f"{method}.{name}", getattr(self, name), f"{least} or more")


def frozen(module: M) -> M:
    """Put a module into evaluation mode, without gradients, and return it."""
    return module.eval().requires_grad_(False)


@contextmanager
def modes_kept(module: nn.Module) -> Iterator[None]:
    """Give every part of a module its own mode, training or evaluation, back at the end of the block."""
    modes = {part: part.training for part in module.modules()}
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


def trainable_copy(module: M) -> M:
    """Make a deep copy that can be trained: a whole network, or an adapter where the module is a role on a base.

    It drops no labels: a method that wants that does it itself. It is not clipped: a bound would kill the gradient of
    what lies outside.
    """
    learner = copy.deepcopy(module)
    for part in list(learner.modules()):
        if type(part).__name__ == "LabelEmbedding":  # diffusers' DiT drops a tenth of its labels while it trains
            part.dropout_prob = 0.0  # type: ignore[assignment]
        if isinstance(part, Denoiser):
            part.clipping = None
            if isinstance(part.network, Adapted) and part.network.name is None:
                part.network = Adapted(part.network.base, part.network.base.add())
    return learner.train().requires_grad_(True)


def on_one_base(teacher: Teacher, settings: LoraSettings, origin: Origin | None = None) -> Teacher:
    """Make a teacher's network the frozen base of a training: all that learns from it will be adapters on it.

    Methods ask for copies of the teacher as ever, and get roles. The network itself is changed: see `AdapterBase`.
    `origin` is written into folders of adapters, for those who look for their base.
    """
    base = AdapterBase(teacher.initial.network, settings, origin)

    def role(denoiser: Denoiser) -> Denoiser:
        assert denoiser.network is base.network, "a head of its own is another network"
        twin = copy.copy(denoiser)
        twin._modules = {**denoiser._modules, "network": Adapted(base)}
        return twin

    learner = None if teacher.learner is None else role(teacher.learner)
    return replace(teacher, denoiser=role(teacher.denoiser), learner=learner)


def new_student(
    teacher: Teacher, start: str | None = None, network: Mapping[str, Any] | None = None, field: str = ""
) -> Denoiser:
    """Make a denoiser to train, with the prediction of `teacher.initial` and its schedule up to `teacher.start_time`.

    Args:
        start: where its weights come from: None for the teacher's, "untrained", or a folder of the same network, or,
            where an adapter is trained, a folder of an adapter of the same base, layers and rank.
        network: options of the teacher's network class that differ, such as block_out_channels; it starts untrained.
        field: the method's name, for messages.

    Raises:
        BadInput: options that the class does not have, a folder with another network, or both at once.
    """
    own = teacher.initial
    schedule = own.schedule if teacher.start_time is None else own.schedule.until(teacher.start_time)
    if isinstance(own.network, Adapted):
        if network or start == "untrained":
            given = f"with {field}.network" if network else f"with {field}.start = untrained"
            raise BadInput("lora", given, "absent: an adapter changes the teacher's own network")
        student = trainable_copy(Denoiser(own.network, schedule, own.prediction))
        if start is not None:
            assert isinstance(student.network, Adapted)
            first, base = origin(start), own.network.base.origin
            if first.below is None or first.sha256 != base.sha256 or base.below:
                raise BadInput(f"{field}.start", start, "a folder that holds an adapter of the teacher")
            start_from(student.network, first.below, start)
        return student
    if start not in (None, "untrained"):
        if network:
            raise BadInput(f"{field}.network", dict(network), f"absent, for the student starts as {start}")
        opened = read_pipeline(str(start)).denoiser
        if not isinstance(opened, Denoiser):
            raise BadInput(f"{field}.start", start, "a folder of one network, such as one of its students")
        shapes = [{k: v.shape for k, v in d.network.state_dict().items()} for d in (opened, own)]
        if shapes[0] != shapes[1] or opened.prediction != own.prediction:
            raise BadInput(f"{field}.start", start, "a folder whose network and prediction are the teacher's")
        begun = opened.network
    elif start is None and not network:
        begun = own.network
    else:
        begun = rebuilt(own.network, network or {}, field)
    return trainable_copy(Denoiser(begun, schedule, own.prediction))


def rebuilt(network: nn.Module, options: Mapping[str, Any], field: str) -> nn.Module:
    """Build a network of the same class with random weights and these options changed; BadInput for wrong ones."""
    kind: Any = type(network)
    config: Any = network.config if hasattr(network, "config") else network.options
    known = {k: v for k, v in dict(config).items() if not k.startswith("_")}
    for key in options:
        if key not in known:
            raise BadInput(f"{field}.network.{key}", options[key], f"options of {kind.__name__}: " + ", ".join(known))
    try:
        built: nn.Module = kind(**{**known, **options})
    except (TypeError, ValueError) as error:
        raise BadInput(f"{field}.network", dict(options), f"options of {kind.__name__} ({error})") from None
    return built


def slow_copy(module: M) -> M:
    """Make a deep copy that only `follow` changes: a target network or an evaluation average."""
    return frozen(copy.deepcopy(module))


@torch.no_grad()
def follow(slow: nn.Module, fast: nn.Module, decay: float) -> None:
    """Update an average in place: slow <- decay slow + (1 - decay) fast. Buffers are copied."""
    kept, new = ([local_part(p) for p in net.parameters()] for net in (slow, fast))
    if kept:  # torch refuses an empty list
        torch._foreach_lerp_(kept, new, 1 - decay)
    for buffer, value in zip(slow.buffers(), fast.buffers(), strict=True):
        buffer.copy_(value)


def split_batch(batch: Batch) -> tuple[Tensor, dict[str, Tensor] | None]:
    """Split a batch into clean data and condition (None when there is none)."""
    cond = {k: v for k, v in batch.items() if k not in ("x0", "loser")}
    return batch["x0"], cond or None
