"""Draws with adapter folders on their bases by stock diffusers alone: `python load_adapters.py OUT JOBS.json`.

A job is {"base", "adapter", "file", "steps", "guidance", "name"}; OUT/<name>.npy is (B, H, W, 3) in [0, 1] of seeds 3
and 4, and OUT/<name>-bare.npy the same without the adapter. Importing `distillers` fails.
"""

import inspect
import json
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

WORDS = ["a red barn", "two small cats at sea"]
SIZE = (32, 64)


def draw(pipe: Any, steps: int, guidance: float) -> np.ndarray:
    """Two pictures, with torch's global generator seeded for schedulers that draw from it."""
    known = inspect.signature(type(pipe).__call__).parameters
    fixed = {"use_resolution_binning": False} if "use_resolution_binning" in known else {}
    torch.manual_seed(7)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    return pipe(
        WORDS, num_inference_steps=steps, height=SIZE[0], width=SIZE[1], output_type="np", generator=generators,
        guidance_scale=guidance, **fixed,
    ).images  # fmt: skip


def main() -> None:
    """Every job."""
    sys.modules["distillers"] = None  # type: ignore[assignment]  # any import of it is an ImportError from here on
    diffusers.utils.logging.disable_progress_bar()
    out, jobs = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    for job in jobs:
        pipe = diffusers.DiffusionPipeline.from_pretrained(job["base"])
        pipe.set_progress_bar_config(disable=True)
        scheduler = Path(job["adapter"]) / "scheduler"
        kind = json.loads((scheduler / "scheduler_config.json").read_text())["_class_name"]
        pipe.scheduler = getattr(diffusers, kind).from_pretrained(scheduler)
        np.save(out / f"{job['name']}-bare.npy", draw(pipe, job["steps"], job["guidance"]))
        if hasattr(pipe, "load_lora_weights"):
            pipe.load_lora_weights(job["adapter"], weight_name=job["file"])
        else:  # PixArt's

            class Network(type(pipe.transformer), diffusers.loaders.PeftAdapterMixin): ...

            pipe.transformer = Network.from_pretrained(job["base"], subfolder="transformer")
            pipe.transformer.load_lora_adapter(job["adapter"], weight_name=job["file"], prefix="transformer")
        np.save(out / f"{job['name']}.npy", draw(pipe, job["steps"], job["guidance"]))
    assert not any(name.startswith("distillers.") for name in sys.modules)


if __name__ == "__main__":
    main()
