"""One served weights folder on one device: its generator, how it is run, and what the outside may know of it."""

import json
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from app.engine.cost import Cost
from app.media.images import Pixels
from distillers.errors import BadInput
from distillers.runtime import device_name

if TYPE_CHECKING:
    from torch import Tensor, nn

    from app.engine.backends import Backend, Inputs, Prepare, Way
    from app.engine.profile import Profile
    from distillers.generator import Generator
    from distillers.weights.manifest import Info


OFTEN = 8  # passes after which a shape is worth preparing
WAYS = 24  # shapes prepared for one network at most


@dataclass(frozen=True)
class Order:
    """One picture to draw.

    Args:
        prompt: for text-to-image models.
        sar: (channels, H, W) in [-1, 1], for translators.
        start: (3, H, W) in [-1, 1], a picture to begin from, noised to the time of the first step taken.
        partial: told, on the engine's thread, the index of a step but the last, and its picture (H, W, 3) uint8.
        shown: of these steps.
    """

    seed: int
    label: int | None = None
    prompt: str | None = None
    sar: NDArray[np.float32] | None = None
    start: NDArray[np.float32] | None = None
    partial: Callable[[int, Pixels], None] | None = None
    shown: Collection[int] = ()


class Model:
    """A generator under its name. What can change after it is opened is how it is run, by `install`."""

    def __init__(self, name: str, folder: Path, generator: "Generator", device: str, max_steps: int) -> None:
        import torch

        from app.engine.backends import Executed

        if device.startswith("cuda"):  # float32 means float32; speed is for the backends that are held against it
            torch.backends.cudnn.allow_tf32 = False
        self.name, self.folder, self.generator, self.device, self.max_steps = name, folder, generator, device, max_steps
        self.created = int((folder / "fewstep.json").stat().st_mtime)
        self.used = time.monotonic()  # by a request
        self.profile: Profile | None = None  # None: not measured
        self.step_s: float | None = None  # of one picture, as it was opened: what is known before backends are measured
        self.tuning = False
        self.siblings: Sequence[Model] = (self,)  # itself among the same weights on every device
        self.threads: int | None = None  # of torch; None: its own choice
        self._opened: list[Prepare] = []
        denoiser: Any = generator.denoiser
        self.executed: list[Executed] = []
        for student in getattr(denoiser, "students", [denoiser]):
            student.network = Executed(student.network)
            self.executed.append(student.network)
        self.students = len(self.executed)
        codec: Any = generator.codec
        if generator.prompts is not None:
            self.executed.append(Executed(generator.prompts.towers))
            generator.prompts.towers = self.executed[-1]  # type: ignore[assignment]
        if hasattr(codec, "decoder"):
            codec.decoder = Executed(codec.decoder)
            self.executed.append(codec.decoder)

    @classmethod
    def open(cls, name: str, folder: Path, device: str, max_steps: int) -> "Model":
        """Reads the folder onto the device. Slow, and imports torch. BadInput for a folder that cannot be opened."""
        from distillers.generator import Generator

        return cls(name, folder, Generator.from_pretrained(folder, device).eval(), device, max_steps)

    # -- drawing: on the engine's thread ---------------------------------------------------------------------------

    def draw(self, steps: int, orders: Sequence[Order], first: int = 0, strict: bool = False) -> Pixels:
        """Pictures (B, H, W, 3) uint8 of B orders of one shape.

        Args:
            first: steps left out at the beginning.
            strict: by the reference backend with one thread, so that the bytes depend on nothing but the order, the
                processor's kind and torch's version.
        """
        import torch

        from distillers.generator import seeded_noise
        from distillers.models.conditions import gather

        generator, shown = self.generator, {step for order in orders for step in order.shown}
        # beside a GPU there is nothing to share: waking threads costs more than they do
        self._set_threads(1 if strict or self.device != "cpu" else self.threads)
        for executed in self.executed:
            executed.strict = strict
        with torch.inference_mode():
            cond = generator.encode_condition(len(orders), **gather(orders))
            start = _stacked([order.start for order in orders])
            factor, channels = generator.codec.factor, generator.codec.channels(3)
            height, width = orders[0].sar.shape[-2:] if orders[0].sar is not None else self.info.size
            noises = seeded_noise([o.seed for o in orders], (channels, height // factor, width // factor))

            def watch(step: int, x0: "Tensor") -> None:
                if step not in shown:
                    return
                for order, picture in zip(orders, self._pixels(x0), strict=True):
                    if order.partial and step in order.shown:
                        order.partial(step, picture)

            x0 = generator.forward(
                next(noises).to(self.device),
                cond,
                steps,
                noises,
                start=None if start is None else generator.codec.encode(start.to(self.device)),
                first=first,
                watch=watch if shown else None,
            )
            return self._pixels(x0)

    def _pixels(self, x0: "Tensor") -> Pixels:
        import torch

        images = self.generator.codec.decode(x0).float().clamp(-1, 1)
        levels = images.add_(1).mul_(127.5).round_().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
        if levels.device.type == "cpu":
            return levels.numpy()
        host = torch.empty(levels.shape, dtype=torch.uint8, pin_memory=True)  # from torch's cache of pinned memory
        host.copy_(levels, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        done.synchronize()  # this copy, not the device
        return host.numpy()

    def _set_threads(self, threads: int | None) -> None:
        import torch

        if threads and torch.get_num_threads() != threads:
            torch.set_num_threads(threads)

    # -- how it is run: for `tuning` -------------------------------------------------------------------------------

    @property
    def networks(self) -> "list[nn.Module]":
        """One, or each student's; then those that read its words and decode its latents."""
        return [executed.network for executed in self.executed]

    @property
    def fewest_steps(self) -> int:
        """What it is measured at."""
        return min(self.steps or [1])

    def probes(self, count: int, student: int = 0) -> list[Order]:
        """Orders at the published size that a student answers, for measuring and comparing."""
        from distillers.models.conditions import singles

        given = self.generator.condition.probe(count, self.info.shares[student] if self.info.shares else None)
        return [Order(seed, **one) for seed, one in enumerate(singles(given, count))]

    def inputs(self, size: int, network: int) -> "list[Inputs]":
        """What one of its networks is asked when so many pictures are drawn together."""
        with self.executed[network].recording() as seen:
            self.draw(self.fewest_steps, self.probes(size, network if network < self.students else 0))
        return seen

    @contextmanager
    def using(self, ways: "list[dict[Any, Way]] | None", threads: int | None) -> Iterator[None]:
        """Other ways for a while."""
        kept = [executed.ways for executed in self.executed], self.threads
        for executed, some in zip(self.executed, ways or kept[0], strict=True):
            executed.ways = some
        self.threads = threads or self.threads
        try:
            yield
        finally:
            for executed, some in zip(self.executed, kept[0], strict=True):
                executed.ways = some
            self.threads = kept[1]

    def install(
        self, backend: "Backend", opened: "list[Prepare]", ways: "list[dict[Any, Way]]", profile: "Profile"
    ) -> None:
        """From the next pass on. `opened` is what prepares further shapes, exactly."""
        for executed, some in zip(self.executed, ways, strict=True):
            executed.ways = some
        self._opened, self.threads, self.profile = opened, backend.threads, profile
        for executed in self.executed:
            executed.missed = {}  # eager passes while it was measured

    def catch_up(self) -> None:
        """Prepares what was asked for again and again and is not prepared: a scene's tiles, uploads of other sizes.

        In the exact variant of the backend, for nothing was compared at these shapes. In the caller's thread.
        """
        for executed, prepare in zip(self.executed, self._opened, strict=False):
            for shape, (count, inputs) in list(executed.missed.items()):
                if count >= OFTEN and len(executed.ways) < WAYS:
                    executed.ways = {**executed.ways, shape: prepare(inputs)}
                    del executed.missed[shape]

    def cost(self, steps: int, height: int, width: int, largest: int) -> Cost:
        """What passes of a shape cost, as far as it was measured: in proportion to steps and pixels."""
        pixels = height * width / (self.info.size[0] * self.info.size[1])
        if self.profile is None or not self.profile.buckets:
            return Cost(largest=largest) if self.step_s is None else Cost({}, largest, self.step_s * steps * pixels)
        share = steps / self.profile.steps
        if (height, width) == self.info.size:
            return Cost({n: s * share for n, s in self.profile.buckets.items() if n <= largest}, largest)
        return Cost({}, largest, self.profile.buckets[1] * share * pixels)

    def look(self) -> None:
        """Draws what it is known by, and once more with a watch, for the first pass pays for more than itself.

        Raises:
            BadInput: it draws what it should not.
        """
        from distillers.evaluation.self_check import check

        check(self.generator, self.folder)
        steps, started = (self.steps or [1])[0], time.perf_counter()
        self.draw(steps, self.probes(1))
        self.step_s = (time.perf_counter() - started) / steps

    # -- what the outside may know ---------------------------------------------------------------------------------

    @property
    def info(self) -> "Info":
        """What the folder says about itself."""
        return self.generator.info

    @cached_property
    def translates(self) -> bool:
        """From SAR, instead of drawing from noise alone."""
        return self.generator.condition.argument == "sar"

    @property
    def steps(self) -> list[int] | None:
        """The published steps of a student; None: any number up to max_steps."""
        return sorted(self.info.step_times) or None

    @property
    def default_steps(self) -> int:
        """The folder's default, as far as this server allows it."""
        return self.info.default_steps if self.steps else min(self.info.default_steps, self.max_steps)

    @property
    def bytes(self) -> int:
        """Memory of the parameters, all students'; a backend's own copies are about as much again."""
        return sum(p.numel() * p.element_size() for p in self.generator.parameters())

    def check_steps(self, steps: int | None) -> int:
        """The steps to take. BadInput for a number the model was not published with."""
        allowed = self.steps or range(1, self.max_steps + 1)
        if steps is not None and steps not in allowed:
            names = ", ".join(map(str, self.steps)) if self.steps else f"1..{self.max_steps}"
            raise BadInput("steps", steps, f"{names} ({self.name})")
        return steps or self.default_steps

    def nfe(self, steps: int) -> int:
        """Network evaluations per picture: guidance asks twice in every step."""
        return steps * (1 if self.info.guidance_scale == 1 else 2)

    @property
    def revision(self) -> str:
        """Of the weights: the same for the same bytes."""
        return self.info.digest[:16]

    def describe(self) -> dict[str, Any]:
        """The model in OpenAI's form, with what a caller needs to use it."""
        info = self.info
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "fewstep",
            "task": info.task,
            "role": info.role,
            "method": info.method,
            "data": info.data,
            "teacher": info.teacher,
            "labels": list(info.labels),
            "students": max(1, len(info.shares)),
            "shares": info.shares or ([info.classes] if info.labels else []),  # positions in labels, by student
            "parameters_mb": round(self.bytes / 2**20, 3),
            "reads_text": self.generator.prompts is not None,
            "size": {"height": info.size[0], "width": info.size[1]},
            "steps": self.steps,
            "max_steps": max(self.steps or [self.max_steps]),
            "default_steps": self.default_steps,
            "sar": info.sar,
            "revision": self.revision,
        }

    def how(self) -> dict[str, Any]:
        """How it is run here, and what was measured: milliseconds of a pass by batch size."""
        told: dict[str, Any] = {"device": self.device, "device_name": device_name(self.device), "tuning": self.tuning}
        if self.profile is None:
            return told | {"name": "eager", "measured": False}
        profile = asdict(self.profile)
        return told | {
            "name": profile.pop("backend"),
            "measured": True,
            "batch_ms": {n: round(1e3 * s, 3) for n, s in profile.pop("buckets").items()},
            **profile,
        }

    def report(self) -> Any:
        """The measurements published with the folder, or None."""
        try:
            return json.loads((self.folder / "report.json").read_text())
        except (OSError, ValueError):
            return None


def _stacked(parts: "Sequence[NDArray[np.float32] | None]") -> "Tensor | None":
    import torch

    given = [part for part in parts if part is not None]
    return torch.from_numpy(np.stack(given)) if given else None
