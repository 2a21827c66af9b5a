"""Draws from weights folders with stock diffusers classes alone: `python draw_with_diffusers.py OUT FOLDER...`.

Writes OUT/<folder>.npz with one array `steps_<k>` (B, H, W, 3) in [0, 1] for each step count: the published ones of a
student, 1 and 5 of a teacher. Image i has seed i and the class that `labels_of` says, or the i-th of PROMPTS; a
translator's SAR is a ramp.
Importing `distillers` fails.
"""

import json
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from torch.nn import functional as F

COUNT = 2
PROMPTS = ["a cartoon head with teal hair, braids, a toothy smile", "a flat portrait with a beanie, glasses, a frown"]


def ramp(channels: int, height: int, width: int) -> torch.Tensor:
    """The SAR that is sent: (COUNT, channels, height, width) from -1 to 1."""
    row = torch.linspace(-1, 1, width).expand(COUNT, channels, height, width)
    return row.contiguous()


def condition(sar: torch.Tensor, about: dict, patch: int) -> torch.Tensor:
    """What stands beside the noisy image: SAR's pixels and, where fewstep.json has them, its levels."""
    planes = int(about.get("calibrated", False))  # beside the bands
    bands = sar[:, : sar.shape[1] - planes]
    told = [F.pixel_unshuffle(bands, patch)]
    if "levels" in about:
        cells = F.avg_pool2d(bands, patch)
        for n in about["levels"]["cells"]:
            mean = F.avg_pool2d(cells, n, stride=1, padding=n // 2, count_include_pad=False)
            for wave in (torch.sin, torch.cos):
                told += [wave(torch.pi * 2**k * mean / 2) for k in range(about["levels"]["frequencies"])]
        told.append((bands != 0).flatten(2).any(2).float()[:, :, None, None].expand_as(cells))
    if planes:
        told.append(F.avg_pool2d(sar[:, -planes:], patch))
    return torch.cat(told, dim=1)


def labels_of(about: dict) -> list[int]:
    """COUNT classes: of several students the first class of each in turn, of a lone one its own; else 0, 1, ..."""
    shares = about.get("shares") or [list(range(len(about["labels"])))]
    return [shares[i % len(shares)][i // len(shares)] for i in range(COUNT)]


def generators() -> list[torch.Generator]:
    """One random stream per image."""
    return [torch.Generator().manual_seed(seed) for seed in range(COUNT)]


def draw_with_pipeline(folder: Path, about: dict, steps: int) -> np.ndarray:
    """What the card's own lines do."""
    base = (about.get("lora") or {}).get("base")  # of an adapter alone
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder.parent / base if base else folder)
    pipeline.set_progress_bar_config(disable=True)
    if base:
        pipeline.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors")
        pipeline.scheduler = diffusers.LCMScheduler.from_pretrained(folder, subfolder="scheduler")
    options: dict[str, Any] = {"class_labels": labels_of(about)} if about["task"] == "class-to-image" else {}
    if about["task"] == "text-to-image":
        options |= {"prompt": PROMPTS, "guidance_scale": about["guidance_scale"]}
    elif type(pipeline).__name__ == "DiTPipeline":
        options["guidance_scale"] = 1.0
    else:
        options["batch_size"] = COUNT
    return pipeline(num_inference_steps=steps, generator=generators(), output_type="np", **options).images


@torch.no_grad()
def draw_with_parts(folder: Path, about: dict, steps: int) -> np.ndarray:
    """Network and scheduler opened one by one, where no stock pipeline exists; pixels are pixel_shuffle of x0.

    Or what the autoencoder in vae/ decodes, where there is one.
    """
    labels = labels_of(about) if about["task"] == "class-to-image" else [None] * COUNT
    places = [folder / "unet"] * COUNT
    if len(about.get("shares", [])) > 1:  # each image by the student that has its class
        places = [
            folder / "students" / str(k)
            for label in labels
            for k, share in enumerate(about["shares"])
            if label in share
        ]
    networks = [diffusers.UNet2DModel.from_pretrained(place).eval() for place in places]
    kind = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["_class_name"]
    scheduler = getattr(diffusers, kind).from_pretrained(folder / "scheduler")
    patch, (height, width) = about["patch"], about["size"]
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae").eval() if (folder / "vae").is_dir() else None
    channels = vae.config.latent_channels if vae else 3 * patch**2
    shape = (COUNT, channels, height // patch, width // patch)
    sar = ramp(about["sar"]["channels"], height, width) if about["task"] == "sar-to-optical" else None
    told = None if sar is None else condition(sar, about["sar"], patch)
    streams = generators()
    x = torch.stack([torch.randn(shape[1:], generator=stream) for stream in streams])
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x_in = x if told is None else torch.cat([x, told], dim=1)
        output = torch.cat(
            [
                network(x_in[[i]], t, class_labels=None if label is None else torch.tensor([label])).sample
                for i, (network, label) in enumerate(zip(networks, labels, strict=True))
            ]
        )[:, : shape[1]]
        x = scheduler.step(output, t, x, generator=streams).prev_sample
    scale, shift = (vae.config.scaling_factor, vae.config.shift_factor) if vae else (1.0, 0.0)
    pixels = vae.decode(x / scale + shift).sample if vae else F.pixel_shuffle(x, patch)
    return ((pixels + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def main() -> None:
    """Every folder, every step count."""
    sys.modules["distillers"] = None  # type: ignore[assignment]  # any import of it is an ImportError from here on
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    out, *folders = map(Path, sys.argv[1:])
    for folder in folders:
        about = json.loads((folder / "fewstep.json").read_text())
        piped = (folder / "model_index.json").is_file() or about["task"] == "text-to-image"
        draw = draw_with_pipeline if piped else draw_with_parts
        counts = [int(k) for k in about["step_times"]] or [1, 5]
        drawn: dict[str, Any] = {f"steps_{k}": draw(folder, about, k) for k in counts}
        np.savez(out / f"{folder.name}.npz", **drawn)
    assert not any(name.startswith("distillers.") for name in sys.modules)


if __name__ == "__main__":
    main()
