"""Read an order, draw it and encode the picture, alike for every server of the benchmark.

The scripts of this folder run in other environments, one for each peer, in which this project's own packages are
appended to the path: same torch, same weights, same codec. Their options are JSON in `FEWSTEP_BENCHMARK`.
"""

import base64
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from app.media.image_files import decode_sar, encode

Pixels = NDArray[np.uint8]
OPTIONS: dict[str, Any] = json.loads(os.environ["FEWSTEP_BENCHMARK"])  # see Workload.script_options
BATCH: int = OPTIONS["batch"]
PORT: int = OPTIONS["port"]
MAX_PIXELS = 1 << 20


@dataclass(frozen=True)
class Order:
    """Describe one picture to draw."""

    seed: int
    label: int | None = None
    prompt: str | None = None
    negative_prompt: str | None = None
    sar: NDArray[np.float32] | None = None  # (channels, H, W) in [-1, 1]


class Work:
    """Draw by a generator, or return a constant picture in the workload without a forward pass."""

    def __init__(self) -> None:
        self.constant = constant(*OPTIONS["size"]) if OPTIONS["constant"] else None
        if self.constant is not None:
            return
        import torch

        from distillers.generator import Generator
        from distillers.models.conditions import scatter

        device, dtype = OPTIONS["device"], getattr(torch, OPTIONS["dtype"])
        self.generator = Generator.from_pretrained(OPTIONS["folder"], device, dtype)
        self.condition, self.pipe = self.generator.condition, None
        if OPTIONS.get("stock"):
            from diffusers import DiffusionPipeline

            if self.condition.argument != "prompts":
                raise SystemExit("stock diffusers has no pipeline for all that this folder needs")
            self.generator = None
            self.pipe = DiffusionPipeline.from_pretrained(OPTIONS["folder"], torch_dtype=dtype).to(device)
            self.pipe.set_progress_bar_config(disable=True)
        (first,) = scatter(self.condition.probe(1), 1)
        for count in (1, BATCH):  # so that the first caller does not pay for what is only done once
            self.draw([Order(0, **first)] * count)

    def order(self, body: Mapping[str, Any], picture: bytes | None = None) -> Order:
        """Read a request: {"seed", "label"?, "prompt"?, "bands"?, "image"?}, or a picture's bytes beside it."""
        if picture is None and "image" in body:
            picture = base64.b64decode(body["image"])
        sar = self._sar(picture, body.get("bands"))
        return Order(int(body["seed"]), body.get("label"), body.get("prompt"), sar=sar)

    def draw(self, orders: Sequence[Order]) -> Pixels:
        """Draw pictures (B, H, W, 3) of B orders of one shape."""
        if self.constant is not None:
            return np.broadcast_to(self.constant, (len(orders), *self.constant.shape))
        from distillers.evaluation.pictures import to_pixels
        from distillers.models.conditions import gather

        seeds = [order.seed for order in orders]
        given = gather(orders)
        if self.pipe is not None:
            return self._by_diffusers(seeds, list(given["prompts"]))
        return to_pixels(self.generator.sample(seeds, steps=OPTIONS["steps"], **given))

    def _by_diffusers(self, seeds: Sequence[int], prompts: list[str]) -> Pixels:
        """Draw by stock diffusers' own pipeline, on the same noises."""
        import torch

        noises = [torch.Generator().manual_seed(seed) for seed in seeds]
        output = self.pipe(
            prompts, num_inference_steps=OPTIONS["steps"], guidance_scale=1.0, generator=noises, output_type="np"
        )
        return (output.images * 255).round().astype(np.uint8)

    def _sar(self, picture: bytes | None, bands: str | None) -> NDArray[np.float32] | None:
        """Turn a PNG into the network's SAR, read as our server reads it."""
        if picture is None or self.constant is not None or self.condition.argument != "sar":
            return None
        return self.condition.of_picture((decode_sar(picture, MAX_PIXELS) + 1) / 2, bands)


def png(pixels: Pixels) -> bytes:
    """Encode a PNG by the project's codec, or by Pillow with its defaults."""
    if OPTIONS["codec"] == "project":
        return encode(pixels, "png")
    target = io.BytesIO()
    Image.fromarray(pixels).save(target, "PNG")
    return target.getvalue()


def constant(height: int, width: int) -> Pixels:
    """Make a picture of slopes and noise, which compresses as a photograph does."""
    slope = np.linspace(0, 200, height)[:, None, None] * np.linspace(0.4, 1, width)[None, :, None]
    noise = np.random.default_rng(0).normal(0, 6, (height, width, 3))
    return (slope * np.array([1.0, 0.8, 0.6]) + noise).clip(0, 255).astype(np.uint8)
