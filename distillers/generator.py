"""The sampler of a published model: a few-step student, or its many-step teacher, as one call.

A teacher samples by deterministic DDIM steps, a consistency student by adding fresh noise between its steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distillers.errors import BadInput
from distillers.models.band import Band
from distillers.models.codec import ImageCodec
from distillers.models.conditions import Cond, Condition, Given
from distillers.models.denoiser import Denoiser, Routed, clipping_of, unclipped
from distillers.models.families import UNET, family_of
from distillers.models.lora import plain
from distillers.models.text import PromptEncoder
from distillers.weights.manifest import Info
from distillers.weights.network import guided, size_multiple
from distillers.weights.read import Base, Bases, Parts, read_pipeline
from distillers.weights.write import write_pipeline

MAX_SEED = 2**63 - 1


def seeded_noise(seeds: Sequence[int], shape: tuple[int, ...]) -> Iterator[Tensor]:
    """Yield unit Gaussian noise (B, *shape), float32 on CPU, for ever; image i's stream depends on seeds[i] alone.

    The stream of one seed is what `torch.Generator().manual_seed(seed)` gives to diffusers' pipelines, so the same seed
    draws the same picture there. Like torch's CPU generator it knows a seed by its lower 32 bits.
    """
    if not len(seeds):
        raise BadInput("seeds", seeds, "one or more")
    for seed in seeds:
        if not 0 <= seed <= MAX_SEED:
            raise BadInput("seed", seed, f"an integer from 0 to {MAX_SEED}")
    streams = [torch.Generator().manual_seed(seed) for seed in seeds]
    while True:
        yield torch.stack([torch.randn(shape, generator=stream) for stream in streams])


class Generator(nn.Module):
    """A map from noise to x0 in a few network calls: as many as steps, or twice that under guidance.

    Args:
        denoiser: the network behind `x0 = denoiser(x_t, t, cond)`.
        codec: between x0 and pixels.
        info: the manifest.
        prompts: the text encoders of a text-to-image generator.
    """

    def __init__(
        self, denoiser: Denoiser | Routed, codec: ImageCodec, info: Info, prompts: PromptEncoder | None = None
    ) -> None:
        super().__init__()
        self.denoiser, self.codec, self.info, self.prompts = denoiser, codec, info, prompts
        self.schedule = denoiser.schedule
        self.base: Base | None = None
        self.safety: Path | None = None  # a folder with a safety checker: see `weights.safety`
        self.band: Band | None = None  # of a translator whose samples were calibrated on held-out pairs

    # --- the folder --------------------------------------------------------------------------------------------------
    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        bases: Bases | None = None,
    ) -> Generator:
        """Open a published folder, or any supported diffusers pipeline as a many-step generator.

        bases: lets several text-to-image generators share the weights of one base.
        """
        parts: Parts = read_pipeline(folder, device, dtype, bases)
        made = cls(parts.denoiser, parts.codec, parts.info, parts.prompts).eval()
        made.safety = parts.safety
        if made.condition.paired:
            made.band = Band.read(Path(folder))
        made.base = parts.base  # others find it for as long as this one has it
        return made

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a weights folder: fp16 safetensors, scheduler, manifest."""
        write_pipeline(Path(folder), self.denoiser, self.codec, self.info, self.prompts, safety=self.safety)

    # --- sampling ----------------------------------------------------------------------------------------------------
    def times(self, steps: int | None = None, size: tuple[int, int] | None = None) -> list[float]:
        """Return the times at which the network is called, descending.

        Args:
            size: pixels (H, W), on which those of some teachers depend; None for the published size.

        Raises:
            BadInput: a student asked for a number of steps it was not published with; a teacher for none, over 1000,
                or more than its schedule has.
        """
        steps = self.info.default_steps if steps is None else steps
        if self.info.step_times:
            if steps not in self.info.step_times:
                raise BadInput("steps", steps, ", ".join(map(str, sorted(self.info.step_times))))
            return self.info.step_times[steps]
        family, (height, width) = family_of(self.denoiser.network), size or self.info.size
        if family is None:  # no network of diffusers
            return self.schedule.sampling_times(steps)
        return family.times(self.schedule, steps, (height // self.size_multiple) * (width // self.size_multiple))

    def forward(
        self,
        noise: Tensor,
        cond: Cond | None = None,
        steps: int | None = None,
        fresh: Iterator[Tensor] | None = None,
        *,
        start: Tensor | None = None,
        first: int = 0,
        watch: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Sample x0 (B, C, H, W), in the network's space, from unit Gaussian noise of that shape.

        Args:
            noise: unit Gaussian; the start x_T is this times sqrt(alpha(T)^2 + sigma(T)^2).
            cond: as `encode_condition` gives.
            steps: network calls; None for the folder's default.
            fresh: where a consistency sampler takes its noise between steps; None draws from torch's global generator.
            start: x0 to diffuse to the time of step `first` and to start from, instead of from noise alone (SDEdit,
                Meng et al. 2022; for consistency models Song et al. 2023, Algorithm 4).
            first: steps left out at the beginning, below `steps`.
            watch: called with the index of every step but the last and its estimate of x0.
        """
        size = noise.shape[-2] * self.codec.factor, noise.shape[-1] * self.codec.factor
        times = torch.tensor(
            self.times(steps, size), dtype=torch.float64
        )  # on the CPU: see `NoiseSchedule._coefficients`
        if not 0 <= first < len(times):
            raise BadInput("first", first, f"0 to {len(times) - 1}")
        network = guided(unclipped(self.denoiser), self.info, self.info.guidance_scale)
        clipping = clipping_of(self.denoiser)
        if start is not None:
            x_t = self.schedule.add_noise(start, noise, times[first])
        else:
            x_t = self.schedule.start(noise, times[first])
        for i, t in enumerate(times[first:], first):
            predicted: Tensor = network(x_t, t, cond)
            x0 = predicted if clipping is None else clipping(predicted)
            if i + 1 == len(times):
                return x0
            if watch is not None:
                watch(i, x0)
            if self.info.sampler == "ddim":
                x_t = self.schedule.step(x_t, x0, t, times[i + 1], predicted)
            else:  # multi-step consistency sampling (Song et al. 2023, Algorithm 1)
                eps = next(fresh).to(noise) if fresh is not None else torch.randn_like(noise)
                x_t = self.schedule.add_noise(x0, eps, times[i + 1])
        raise AssertionError("times is never empty")

    @torch.inference_mode()
    def sample(
        self,
        seeds: Sequence[int],
        *,
        steps: int | None = None,
        size: tuple[int, int] | None = None,
        **condition: Unpack[Given],
    ) -> Tensor:
        """Sample pixels (B, C, H, W), float32 on CPU in [-1, 1]; image i depends on seeds[i] and its condition only.

        C is `info.channels`: 3 for RGB, 1 for grey; `distillers.models.bands` says how others are shown.

        Alone or in any batch it is the same picture to about 1e-5: torch may sum in another order at another size.

        Args:
            seeds: one per image, 0 .. 2**63-1.
            steps: see `times`.
            size: pixels (H, W) of multiples of `size_multiple`; None for the published size, or the SAR's.
            condition: one of these, as the model's task asks. `labels`: class index per image. `sar`: (B, C, H, W) in
                [-1, 1]; the result has its H and W. `prompts`: a text per image.
        """
        cond = self.encode_condition(len(seeds), size=size, **condition)
        height, width = self.condition.size(condition) or size or self.info.size
        self.check_size("size", height, width)
        shape = (self.codec.channels(self.info.channels), height // self.codec.factor, width // self.codec.factor)
        stream = seeded_noise(seeds, shape)
        x0 = self.forward(next(stream).to(self._weight.device), cond, steps, stream)
        pixels = self.codec.decode(x0).float().cpu()
        if not bool(pixels.isfinite().all()):
            allowed = f"weights that draw pictures at {self._weight.dtype}"
            raise BadInput("weights", f"{self.info.name} draws what is no number", allowed)
        return pixels.clamp(-1, 1)

    def draw_items(self, items: dict[str, Tensor]) -> Tensor:
        """Sample one picture for each item of a data set, of seeds 0, 1, ..., under the item's condition."""
        return self.sample(range(len(next(iter(items.values())))), **self.condition.of_items(items))

    def translate(self, sar: Tensor, *, seed: int = 0, steps: int | None = None) -> Tensor:
        """Translate a SAR picture (1, C, H, W) in [-1, 1] of any size to optical (1, 3, H, W), with padding."""
        least = max(8, self.size_multiple // 2 + 1)  # a reflection is shorter than the picture
        if sar.ndim != 4 or min(sar.shape[-2:]) < least:
            raise BadInput("sar", tuple(sar.shape), f"(1, 1, H, W), a picture of {least} pixels a side or more")
        height, width = sar.shape[-2:]
        below, right = -height % self.size_multiple, -width % self.size_multiple
        padded = F.pad(sar, (0, right, 0, below), mode="reflect")
        return self.sample([seed], sar=padded, steps=steps)[..., :height, :width]

    def encode_condition(
        self, count: int | None = None, *, size: tuple[int, int] | None = None, **condition: Unpack[Given]
    ) -> Cond | None:
        """Check the conditions of `count` pictures of (H, W) pixels and bring them into the network's form.

        size: of which some networks are told; None for the published size.

        Raises:
            BadInput: a condition that the model does not take, lacks, or that has the wrong number, shape or values.
        """
        own = self.condition
        own.check(condition, count)
        if own_size := own.size(condition):
            self.check_size(own.argument, *own_size)
        return own.encode(condition, self._weight.device, size)

    @property
    def _weight(self) -> Tensor:
        """Any weight of the network, for its device and precision."""
        return next(plain(self.denoiser.network).parameters())

    @property
    def condition(self) -> Condition:
        """What the model is conditioned on."""
        return self.info.condition(self.codec, self.prompts)

    def check_size(self, field: str, height: int, width: int) -> None:
        """Refuse with BadInput, naming the field, a size in pixels that the network or its autoencoder cannot draw."""
        multiple, family = self.size_multiple, family_of(self.denoiser.network) or UNET
        positions = family.largest(self.denoiser.network.config)
        most = math.inf if positions is None else positions * self.codec.factor
        if (
            height % multiple
            or width % multiple
            or min(height, width) < 8
            or max(height, width) > most
            or (family.square and height != width)
        ):
            allowed = f"multiples of {multiple}, 8 " + ("or more" if most == math.inf else f"to {most}")
            raise BadInput(field, (height, width), allowed + ", square" * family.square)

    @property
    def size_multiple(self) -> int:
        """What H and W in pixels must be multiples of."""
        return size_multiple(self.denoiser.network, self.codec)
