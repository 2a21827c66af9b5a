"""Published autoencoders, which `method = "autoencoder"` trains: pictures to latents and back.

The network is a stock diffusers `AutoencoderKL`; a diffusion model trains in its latents (`model.autoencoder` of a
recipe) and publishes it along with itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from distillers.errors import BadInput
from distillers.models.codec import Vae
from distillers.weights.manifest import AUTOENCODER, Info
from distillers.weights.read import read_autoencoder
from distillers.weights.write import write_autoencoder

BATCH = 64  # pictures at a time


class Autoencoder(nn.Module):
    """A frozen autoencoder with its manifest."""

    def __init__(self, codec: Vae, info: Info) -> None:
        super().__init__()
        self.codec, self.info = codec, info

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | torch.device = "cpu") -> Autoencoder:
        """Open a folder that `save_pretrained` wrote. Raises BadInput for any other."""
        codec, info = read_autoencoder(folder, device)
        if info is None or info.task != AUTOENCODER:
            raise BadInput("weights", str(folder), f"a folder whose fewstep.json says the task {AUTOENCODER}")
        return cls(codec, info)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write vae/ (fp16 safetensors) and the manifest."""
        write_autoencoder(Path(folder), self.codec, self.info)

    @torch.no_grad()
    def reconstruct(self, pictures: Tensor) -> Tensor:
        """Encode pictures (B, C, H, W) in [-1, 1] to their latents' means and decode them, float32 on the CPU."""
        device = next(self.parameters()).device
        parts = [self.codec.decode(self.codec.encode(part.to(device))) for part in pictures.split(BATCH)]
        return torch.cat(parts).float().clamp(-1, 1).cpu()

    def draw_items(self, items: dict[str, Tensor]) -> Tensor:
        """Reconstruct the pictures of items of a data set."""
        return self.reconstruct(items["image"])

    def standardise(self, batches: Iterable[Tensor]) -> None:
        """Measure the mean and deviation of the pictures' latents and write them into the network's configuration.

        Afterwards the codec's latents have mean 0 and variance 1 over all pictures, channels and positions, as a
        diffusion process wants them (Rombach et al. 2022, appendix G, who measured the deviation alone).

        Args:
            batches: pictures (B, C, H, W) in [-1, 1], spread over the training data.
        """
        vae = self.codec.vae
        vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)
        plain, device = Vae(vae), next(vae.parameters()).device
        latents = torch.cat([plain.encode(batch.to(device)).cpu() for batch in batches]).double()
        vae.register_to_config(scaling_factor=float(1 / latents.std()), shift_factor=float(latents.mean()))
        self.codec = Vae(vae)
