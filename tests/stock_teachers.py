"""Train small teachers with stock diffusers classes alone, as people who come with a teacher of their own have them.

    python tests/stock_teachers.py grey-ddpm PICTURES OUT [--minutes 30]

`grey-ddpm` is a DDPM of one channel that predicts noise, with the clipping that diffusers' scheduler has by default;
`zero-snr` predicts v and its schedule ends at zero signal; `edm` is preconditioned as Karras et al. 2022. Nothing of
Fewstep is imported: what these folders say is what diffusers says. A run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, EDMEulerScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

SIDE, BATCH, RATE = 24, 64, 8e-4
SCHEDULERS: dict[str, Any] = {
    "grey-ddpm": lambda: DDPMScheduler(),
    "zero-snr": lambda: DDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False
    ),
    "edm": lambda: EDMEulerScheduler(),
}


def pictures(folder: Path, mode: str) -> Tensor:
    """Read all pictures of a folder, (N, C, 24, 24), uint8."""
    files = sorted(file for file in folder.rglob("*") if file.suffix in (".webp", ".png", ".jpg"))
    read = [np.asarray(Image.open(f).convert(mode).resize((SIDE, SIDE), Image.Resampling.BOX)) for f in files]
    return torch.tensor(np.stack(read)).reshape(len(read), SIDE, SIDE, -1).permute(0, 3, 1, 2).contiguous()


def network(channels: int) -> UNet2DModel:
    """Build the U-Net of all three teachers, 2.7 M weights."""
    return UNet2DModel(
        sample_size=SIDE,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(32, 64, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=16,
    )


def loss(kind: str, scheduler: Any, unet: Any, x0: Tensor) -> Tensor:
    """Compute the training loss of diffusers' tutorials, or EDM's (Karras et al. 2022, eq. 2 and table 1)."""
    noise = torch.randn_like(x0)
    if kind == "edm":
        sigma = (torch.randn(len(x0), 1, 1, 1) * 1.2 - 1.2).exp()
        total = (sigma**2 + 0.25).sqrt()
        output = unet((x0 + sigma * noise) / total, sigma.flatten().log() / 4).sample.float()
        denoised = 0.25 / total**2 * (x0 + sigma * noise) + sigma * 0.5 / total * output
        return ((total / (sigma * 0.5)) ** 2 * (denoised - x0) ** 2).mean()
    t = torch.randint(0, 1000, (len(x0),))
    target = noise if kind == "grey-ddpm" else scheduler.get_velocity(x0, noise, t)
    return F.mse_loss(unet(scheduler.add_noise(x0, noise, t), t).sample.float(), target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=SCHEDULERS)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=30, help="of a core, earlier runs included")
    given = parser.parse_args()
    data = pictures(given.pictures, "L" if given.kind == "grey-ddpm" else "RGB")
    torch.manual_seed(0)
    unet, scheduler = network(data.shape[1]), SCHEDULERS[given.kind]()
    average = EMAModel(unet.parameters(), decay=0.999)
    optimizer = torch.optim.Adam(unet.parameters(), lr=RATE)
    state, done, spent = given.out / "training.pt", 0, 0.0
    if state.is_file():
        kept = torch.load(state, weights_only=True)
        unet.load_state_dict(kept["unet"]), average.load_state_dict(kept["average"])
        optimizer.load_state_dict(kept["optimizer"])
        done, spent = kept["done"], kept["spent"]
    given.out.mkdir(parents=True, exist_ok=True)
    began, total = time.process_time() - spent, 0.0
    while (seconds := time.process_time() - began) < 60 * given.minutes:
        chosen = torch.randint(len(data), (BATCH,), generator=torch.Generator().manual_seed(done))
        x0 = data[chosen] / 127.5 - 1
        share = seconds / (60 * given.minutes)
        for group in optimizer.param_groups:  # a rise of 200 iterations, and a linear fall over the last third
            group["lr"] = RATE * min(1, (done + 1) / 200, max(0.02, 3 * (1 - share)))
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(given.kind, scheduler, unet, x0)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step(), average.step(unet.parameters())
        done, total = done + 1, total + float(value.detach())
        if done % 100 == 0:
            print(f"{done} iterations, {seconds:.0f} s, loss {total / 100:.4f}", flush=True)
            total = 0.0
        if done % 500 == 0:
            kept = {"unet": unet.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**kept, "done": done, "spent": time.process_time() - began}, state)
    average.copy_to(unet.parameters())
    DDPMPipeline(unet, scheduler).save_pretrained(given.out)
    print(f"{done} iterations of {BATCH} pictures in {time.process_time() - began:.0f} s: {given.out}")


if __name__ == "__main__":
    main()
