"""Serve one weights folder on one device: run its generator by a backend, and describe it to callers."""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from app.engine.batch_cost import BatchCost
from app.engine.passes import Pass, at_work, in_slice, sliced
from app.engine.styles import Style, Styles
from app.media.image_files import Pixels
from distillers.errors import BadInput
from distillers.runtime import device_name

if TYPE_CHECKING:
    from torch import Tensor, nn

    from app.engine.backends import Backend, Forward, Inputs, Prepare
    from app.engine.profile import Profile
    from distillers.generator import Generator
    from distillers.weights.manifest import Info
    from distillers.weights.read import Bases
    from distillers.weights.safety import SafetyChecker


MIN_CALLS = 8  # of a network with a shape before a function is prepared for it
MAX_PREPARED = 24  # shapes prepared for one network


@dataclass(frozen=True)
class Order:
    """Describes one picture to draw.

    Args:
        label: the class, for models with classes.
        prompt: for text-to-image models.
        negative_prompt: what guidance leads away from, for those that are guided; None for what is usual.
        size: (H, W) in pixels; None for the published size, or the SAR's.
        sar: (channels, H, W) in [-1, 1], for translators.
        start: (C, H, W) in [-1, 1], a picture that is diffused to the time of the first step taken.
        on_partial: called in the pass's thread with a step's index and its estimate, (H, W, C) uint8.
        partial_steps: the steps, all but the last, that it is called for.
        loras: names and weights of what is laid over the model: see `app.engine.styles`.
    """

    seed: int
    label: int | None = None
    prompt: str | None = None
    negative_prompt: str | None = None
    size: tuple[int, int] | None = None
    sar: NDArray[np.float32] | None = None
    start: NDArray[np.float32] | None = None
    on_partial: Callable[[int, Pixels], None] | None = None
    partial_steps: Collection[int] = ()
    loras: tuple[tuple[str, float], ...] = ()


class Model:
    """Draws with a generator under its served name. Only its backend changes after it is opened: see `install`."""

    def __init__(self, name: str, folder: Path, generator: "Generator", device: str, max_steps: int) -> None:
        import torch

        from app.engine.backends import Dispatch

        if device.startswith("cuda"):  # float32 means float32; speed is for the backends that are compared with it
            torch.backends.cudnn.allow_tf32 = False
        self.name, self.folder, self.generator, self.device, self.max_steps = name, folder, generator, device, max_steps
        self.created = int((folder / "fewstep.json").stat().st_mtime)
        self.used = time.monotonic()  # by a request, last
        self.profile: Profile | None = None  # None: not measured
        self.step_s: float | None = None  # of one picture when it was opened, known before backends are measured
        self.tuning = False
        self.replicas: Sequence[Model] = (self,)  # the same weights on every device, itself among them
        self.threads: int | None = None  # of torch; None: its own choice
        self._prepares: list[Prepare] = []
        denoiser: Any = generator.denoiser
        self.dispatches: list[Dispatch] = []
        for student in getattr(denoiser, "students", [denoiser]):
            student.network = Dispatch(student.network)
            self.dispatches.append(student.network)
        self.students = len(self.dispatches)
        codec: Any = generator.codec
        if generator.prompts is not None:
            generator.prompts.unread("")  # makes its own tokenizers, before others are used on the engine's thread
            # as a whole, for tokenizers are used by one thread alone
            generator.prompts.forward = sliced(generator.prompts.forward)  # type: ignore[method-assign]
            for tower in generator.prompts.towers.values():
                tower.rows = Dispatch(tower.rows)  # type: ignore[arg-type]
                self.dispatches.append(tower.rows)
        if hasattr(codec, "decoder"):
            codec.decoder = Dispatch(codec.decoder)
            self.dispatches.append(codec.decoder)
        prompts = generator.prompts
        self.safety: SafetyChecker | None = None
        if generator.safety is not None:
            from distillers.weights import safety

            self.safety = safety.SafetyChecker(generator.safety, device)
        self.styles = None if prompts is None else Styles(self.dispatches, self.students, prompts)

    @classmethod
    def open(
        cls,
        name: str,
        folder: Path,
        device: str,
        max_steps: int,
        bases: "Bases | None" = None,
        decoding: str = "whole",
    ) -> "Model":
        """Read a folder onto a device. It is slow, and imports torch. BadInput for a folder that cannot be opened.

        Args:
            bases: of the text-to-image folders that are open, so that adapters of one base share its weights.
            decoding: how much an autoencoder decodes at a time: "whole" batches, "slices" of one picture each, or
                "tiles" of large pictures too, by diffusers' own means.
        """
        from distillers.generator import Generator
        from distillers.models.codec import Vae

        generator = Generator.from_pretrained(folder, device, bases=bases)
        if isinstance(generator.codec, Vae) and decoding != "whole":
            generator.codec.vae.enable_slicing()
            if decoding == "tiles":
                generator.codec.vae.enable_tiling()
        return cls(name, folder, generator, device, max_steps)

    # -- drawing: on the engine's thread, or in slices from another --------------------------------------------------

    def draw(
        self,
        steps: int,
        orders: Sequence[Order],
        first: int = 0,
        strict: bool = False,
        style: Style | None = None,
    ) -> Pixels:
        """Draw the pictures of B orders of one shape, (B, H, W, C) uint8.

        Args:
            first: steps left out at the beginning.
            strict: by the reference backend with one thread, so that the bytes depend on nothing but the order, the
                processor's kind and torch's version.
            style: what the orders' `loras` are for this model.
        """
        import torch

        from distillers.generator import seeded_noise
        from distillers.models.conditions import gather

        generator, partial_steps = self.generator, {step for order in orders for step in order.partial_steps}
        outer = at_work()
        # beside a GPU there is nothing to share: waking threads costs more than they do
        threads = 1 if strict or self.device != "cpu" else outer.threads or self.threads
        networks = weigh = None
        if style is not None:
            networks = dict(zip(self.dispatches, style.networks, strict=False))
            weigh = partial(style.weigh, [weight for _, weight in orders[0].loras])
        with (
            Pass(strict, threads, outer.prepared, networks, weigh, outer.recorded, outer.turn),
            torch.inference_mode(),
        ):
            cond = generator.encode_condition(len(orders), size=orders[0].size, **gather(orders))
            start = _stacked([order.start for order in orders])
            factor, channels = generator.codec.factor, generator.codec.channels(generator.info.channels)
            sar, size = orders[0].sar, orders[0].size or self.info.size
            height, width = size if sar is None else sar.shape[-2:]
            noises = seeded_noise([o.seed for o in orders], (channels, height // factor, width // factor))

            def watch(step: int, x0: "Tensor") -> None:
                if step not in partial_steps:
                    return
                pictures = self._pixels(x0)
                for order, picture, flagged in zip(orders, pictures, self.flags(pictures), strict=True):
                    if order.on_partial and not flagged and step in order.partial_steps:
                        order.on_partial(step, picture)

            x0 = generator.forward(
                next(noises).to(self.device),
                cond,
                steps,
                noises,
                start=None if start is None else in_slice(lambda: generator.codec.encode(start.to(self.device))),
                first=first,
                watch=watch if partial_steps else None,
            )
            return self._pixels(x0)

    def flags(self, pictures: Pixels) -> list[bool]:
        """Tell which pictures the folder's safety checker flags; none where the folder has none."""
        safety = self.safety
        return in_slice(lambda: safety.flags(pictures)) if safety else [False] * len(pictures)

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

    def style(self, files: Sequence[Path]) -> Style:
        """Return what LoRAs make of this model. BadInput for one without prompts, or a file that is no LoRA of it."""
        if self.styles is None:
            raise BadInput("loras", [file.stem for file in files], f"nothing: {self.name} draws no prompts")
        return self.styles.of(files)

    # -- backends: for `tuning` ------------------------------------------------------------------------------------

    @property
    def networks(self) -> "list[nn.Module]":
        """Return the network, or each student's; then the text encoders and the decoder of latents, if any."""
        return [dispatch.network for dispatch in self.dispatches]

    @property
    def fewest_steps(self) -> int:
        """Return the number of steps at which backends are measured."""
        return min(self.steps or [1])

    def probes(self, count: int, student: int = 0) -> list[Order]:
        """Return orders at the published size that a student answers, for measuring and comparing."""
        from distillers.models.conditions import scatter

        given = self.generator.condition.probe(count, self.info.shares[student] if self.info.shares else None)
        if self.info.clusters:
            given = {"prompts": [self.info.clusters.examples[self.info.clusters.students[student]]] * count}
        return [Order(seed, **one) for seed, one in enumerate(scatter(given, count))]

    def inputs(self, size: int, network: int) -> "list[Inputs]":
        """Record the inputs of one of its networks while it draws a batch of `size` pictures."""
        recorded = list[Any]()
        with replace(at_work(), recorded=(self.dispatches[network], recorded)):
            self.draw(self.fewest_steps, self.probes(size, network if network < self.students else 0))
        return recorded

    def using(self, prepared: "list[dict[Any, Forward]] | None", threads: int | None) -> Pass:
        """Return the pass of this thread with other prepared functions and threads, as a context."""
        functions = None if prepared is None else dict(zip(self.dispatches, prepared, strict=True))
        return replace(at_work(), prepared=functions, threads=threads)

    def install(
        self, backend: "Backend", prepares: "list[Prepare]", prepared: "list[dict[Any, Forward]]", profile: "Profile"
    ) -> None:
        """Run the networks by a backend from the next pass on.

        Args:
            prepares: for each network, what prepares further shapes exactly.
            prepared: for each network, the functions that are ready, by shapes.
        """
        for dispatch, functions in zip(self.dispatches, prepared, strict=True):
            dispatch.prepared = functions
        self._prepares, self.threads, self.profile = prepares, backend.threads, profile
        for dispatch in self.dispatches:
            dispatch.unprepared = {}  # eager passes while it was measured

    def prepare_frequent_shapes(self) -> None:
        """Prepare shapes that came often without a function: a scene's tiles, uploads of other sizes.

        It takes the exact variant of the backend, for no pictures were compared at these shapes, and runs in the
        caller's thread.
        """
        for dispatch, prepare in zip(self.dispatches, self._prepares, strict=False):
            for shapes, (count, inputs) in list(dispatch.unprepared.items()):
                if count >= MIN_CALLS and len(dispatch.prepared) < MAX_PREPARED:
                    dispatch.prepared = {**dispatch.prepared, shapes: prepare(inputs)}
                    del dispatch.unprepared[shapes]

    def cost(self, steps: int, height: int, width: int, largest: int) -> BatchCost:
        """Predict what batches of a shape cost, in proportion to steps and pixels, as far as it was measured."""
        pixels = height * width / (self.info.size[0] * self.info.size[1])
        if self.profile is None or not self.profile.buckets:
            return (
                BatchCost(largest=largest)
                if self.step_s is None
                else BatchCost({}, largest, self.step_s * steps * pixels)
            )
        share = steps / self.profile.steps
        if (height, width) == self.info.size:
            return BatchCost({n: s * share for n, s in self.profile.buckets.items() if n <= largest}, largest)
        return BatchCost({}, largest, self.profile.buckets[1] * share * pixels)

    def warm_up(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """Check the picture that the folder was published with, then time one pass, no longer the first and slow one.

        Args:
            clock: gives the time in seconds.

        Raises:
            BadInput: it draws another picture, or none.
        """
        from distillers.evaluation.self_check import check

        check(self.generator, self.folder)
        steps, started = (self.steps or [1])[0], clock()
        self.draw(steps, self.probes(1))
        self.step_s = (clock() - started) / steps

    # -- what callers may know -------------------------------------------------------------------------------------

    @property
    def info(self) -> "Info":
        """Return the folder's manifest."""
        return self.generator.info

    @cached_property
    def translates(self) -> bool:
        """Return whether it translates SAR instead of generating from noise alone."""
        return self.generator.condition.argument == "sar"

    @property
    def steps(self) -> list[int] | None:
        """Return the published step counts of a student, ascending; None if any number up to max_steps is allowed."""
        return sorted(self.info.step_times) or None

    @property
    def default_steps(self) -> int:
        """Return the folder's default number of steps, at most what this server allows."""
        return self.info.default_steps if self.steps else min(self.info.default_steps, self.max_steps)

    @property
    def bytes(self) -> int:
        """Return the memory of the parameters of all students. A backend's own copies are about as much again."""
        return sum(self.bytes_by_parameter.values())

    @property
    def bytes_by_parameter(self) -> dict[int, int]:
        """Return the memory of each parameter by its identity, which adapters of one base have in common."""
        return {id(p): p.numel() * p.element_size() for p in self.generator.parameters()}

    def check_steps(self, steps: int | None) -> int:
        """Return the steps to take. BadInput for a number that the model was not published with."""
        allowed = self.steps or range(1, self.max_steps + 1)
        if steps is not None and steps not in allowed:
            names = ", ".join(map(str, self.steps)) if self.steps else f"1..{self.max_steps}"
            raise BadInput("steps", steps, f"{names} ({self.name})")
        return steps or self.default_steps

    def nfe(self, steps: int) -> int:
        """Return the network evaluations of one picture; guidance takes two in every step."""
        from distillers.weights.network import calls_per_step

        return steps * calls_per_step(self.generator.denoiser, self.info)

    @property
    def revision(self) -> str:
        """Return a short digest of the weights: the same for the same bytes."""
        return self.info.digest[:16]

    def describe(self) -> dict[str, Any]:
        """Describe the model in OpenAI's form, with what a caller needs to use it."""
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
            "students": info.students,
            "shares": info.shares or ([info.classes] if info.labels else []),  # positions in labels, by student
            "parameters_mb": round(self.bytes / 2**20, 3),
            "reads_text": self.generator.prompts is not None,
            "size": {"height": info.size[0], "width": info.size[1]},
            "channels": info.channels,
            "steps": self.steps,
            "max_steps": max(self.steps or [self.max_steps]),
            "default_steps": self.default_steps,
            "sar": info.sar,
            "revision": self.revision,
        }

    def backend_info(self) -> dict[str, Any]:
        """Describe the backend that runs it here and what was measured, in milliseconds of a pass by batch size."""
        info: dict[str, Any] = {"device": self.device, "device_name": device_name(self.device), "tuning": self.tuning}
        if self.profile is None:
            return info | {"name": "eager", "measured": False}
        profile = asdict(self.profile)
        return info | {
            "name": profile.pop("backend"),
            "measured": True,
            "sure": self.profile.sure,
            "batch_ms": {n: round(1e3 * s, 3) for n, s in profile.pop("buckets").items()},
            **profile,
        }

    def report(self) -> Any:
        """Read the measurements published with the folder; None where there are none, or no honest ones."""
        from distillers.weights.manifest import inside, load_json

        file = self.folder / "report.json"
        try:
            return load_json(file) if inside(self.folder, file) else None
        except (OSError, ValueError):
            return None


def _stacked(parts: "Sequence[NDArray[np.float32] | None]") -> "Tensor | None":
    import torch

    given = [part for part in parts if part is not None]
    return torch.from_numpy(np.stack(given)) if given else None
