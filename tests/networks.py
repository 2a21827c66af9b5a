"""Tiny untrained networks and folders, and what stock diffusers makes of them."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel, UNet2DModel
from processes import run

from distillers.generator import Generator
from distillers.models.codec import PixelUnshuffle, Vae
from distillers.models.denoiser import Denoiser
from distillers.models.schedule import (
    EDM,
    Prediction,
    RectifiedFlow,
    Trigonometric,
    VariancePreserving,
)
from distillers.teacher import Teacher
from distillers.weights.manifest import Info
from distillers.weights.write import lcm_times

SCHEDULES = [EDM(), VariancePreserving.from_betas(), RectifiedFlow(), Trigonometric()]
VP = SCHEDULES[1]


def unet(**options: Any) -> UNet2DModel:
    torch.manual_seed(0)
    small: dict[str, Any] = dict(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
    )
    return UNet2DModel(**{**small, **options}).eval()


SCRIPT = Path(__file__).parent / "draw_with_diffusers.py"
LABELS = ["Forest", "River", "Sea Lake"]
NETWORK = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}


def describe(task: str = "image", sampler: str = "ddim", **more: Any) -> Info:
    role = {"ddim": "teacher", "consistency": "student"}[sampler]
    if task == "class-to-image":
        more["labels"] = LABELS
    if task == "sar-to-optical":
        more["sar"] = {"channels": 1, "range": [-1, 1]}
    if sampler == "consistency":
        more.setdefault("step_times", {k: lcm_times(VariancePreserving.from_betas(), k) for k in (1, 2, 4, 8)})
    base = dict(name="tiny", task=task, method="test", role=role, data="shapes", sampler=sampler, size=(16, 16))
    return Info(**{**base, **more})


def untrained(info: Info, prediction: Prediction = "v", schedule: dict[str, Any] | None = None) -> Generator:
    torch.manual_seed(0)
    codec = PixelUnshuffle(info.patch)
    denoiser = Teacher.random(info, NETWORK, schedule or {"name": "vp"}, prediction, codec).denoiser
    return Generator(denoiser, codec, info).eval()


def transformer(info: Info) -> Generator:
    """A tiny DiT with a learned variance, in the latent space of a tiny VAE."""
    torch.manual_seed(0)
    net: Any = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=8,
        num_embeds_ada_norm=len(LABELS), norm_num_groups=4,
    )  # fmt: skip
    vae: Any = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, sample_size=16, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    denoiser = Denoiser(net, VariancePreserving.from_betas(), "eps")
    return Generator(denoiser, Vae(vae), replace(info, codec="vae", patch=2)).eval()


def draw_with_diffusers(out: Path, *folders: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(out), *map(str, folders)]
    return run(command, env=environment, cwd=out)


def warnings_of(stderr: str) -> str:
    """What stock diffusers says of a folder, but for its complaint that JSON's keys are strings, as in its own DiT."""
    return "".join(line for line in stderr.splitlines(True) if not line.startswith("Expected types for id2label"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def tiny(task: str, role: str, labels: tuple[str, ...] = (), seed: int = 0, guidance_scale: float = 1.0) -> Generator:
    torch.manual_seed(seed)
    network = UNet2DModel(
        sample_size=16, in_channels=4 if task == "sar-to-optical" else 3, out_channels=3, layers_per_block=1,
        block_out_channels=(8, 16), norm_num_groups=4, down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2, num_class_embeds=len(labels) + 1 if labels else None,
    )  # fmt: skip
    info = Info(
        name=f"tiny-{role}", task=task, method="consistency", role=role, data="shapes", size=(16, 16),
        sampler="ddim" if role == "teacher" else "consistency", labels=list(labels), teacher="tiny-teacher",
        step_times={} if role == "teacher" else {1: [999.0], 2: [999.0, 499.0]}, guidance_scale=guidance_scale,
        sar={"channels": 1} if task == "sar-to-optical" else None,
    )  # fmt: skip
    return Generator(Denoiser(network, VariancePreserving.from_betas(), "v"), PixelUnshuffle(1), info).eval()
