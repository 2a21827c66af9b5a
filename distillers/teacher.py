"""Teachers: a frozen denoiser, its codec and its manifest, and the encoding of training batches for it.

Any supported diffusers pipeline opens as a teacher; `random` builds an untrained network, which `method = "diffusion"`
trains.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distillers.errors import BadInput
from distillers.models.codec import ImageCodec, PixelUnshuffle
from distillers.models.conditions import Cond, Condition
from distillers.models.denoiser import Denoiser
from distillers.models.schedule import Prediction, RectifiedFlow, from_config
from distillers.models.text import PromptEncoder
from distillers.weights.manifest import Info
from distillers.weights.network import guided
from distillers.weights.read import read_pipeline


@dataclass(frozen=True)
class Teacher:
    """A frozen denoiser, its codec, and the manifest of the folder it came from.

    `learner` is what students and critics start as, where that is not the denoiser itself: see `training.head`.
    `prompts` holds the text encoders of text-to-image.
    `start_time` is where a student's sampling begins; None for the end of the learner's schedule.
    """

    denoiser: Denoiser
    codec: ImageCodec
    info: Info
    prompts: PromptEncoder | None = None
    learner: Denoiser | None = field(default=None, kw_only=True)
    start_time: float | None = field(default=None, kw_only=True)

    @property
    def initial(self) -> Denoiser:
        """Return the denoiser that students and critics start as."""
        return self.learner or self.denoiser

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str | Path, device: str | torch.device = "cpu") -> Teacher:
        """Open a folder that diffusers saved, or a hub id. Raises BadInput for what cannot be opened."""
        parts = read_pipeline(path_or_hub_id, device)
        if not isinstance(parts.denoiser, Denoiser):
            raise BadInput("teacher", str(path_or_hub_id), "a folder of one network, such as one of its students")
        return cls(parts.denoiser, parts.codec, parts.info, parts.prompts)

    @property
    def condition(self) -> Condition:
        """What the teacher is conditioned on."""
        return self.info.condition(self.codec, self.prompts)

    @classmethod
    def random(
        cls,
        info: Info,
        network: dict[str, Any],
        schedule: dict[str, Any],
        prediction: Prediction,
        codec: ImageCodec,
        prompts: PromptEncoder | None = None,
    ) -> Teacher:
        """Build an untrained U-Net for info's task; `network` holds the options of diffusers' own class.

        One embedding more than there are labels: the last is the null label of classifier-free guidance. With `prompts`
        it is a `UNet2DConditionModel` that attends to what they encode; where it adds that to the time's embedding
        (`addition_embed_type = "text"`), nothing is added at first.
        """
        import diffusers

        channels, side = codec.channels(info.channels), [length // codec.factor for length in info.size]
        options = {
            "sample_size": side[0] if side[0] == side[1] else side,
            "in_channels": channels + info.condition(codec).channels,
            "out_channels": channels,
            **network,
        }
        if info.labels:
            options["num_class_embeds"] = len(info.labels) + 1
        kind = "UNet2DModel"
        if prompts is not None:
            kind, options["cross_attention_dim"] = "UNet2DConditionModel", prompts.width
        unet: nn.Module
        try:
            unet = getattr(diffusers, kind)(**options)
        except (TypeError, ValueError) as error:
            raise BadInput("network", network, f"options of diffusers' {kind} ({error})") from None
        for name, parameter in unet.named_parameters():
            if name.startswith("add_embedding.norm2."):
                nn.init.zeros_(parameter)
        text = prompts.encoders["text_encoder"] if prompts is not None and prompts.learns else None
        return cls(Denoiser(unet, from_config(schedule), prediction, text=text), codec, info, prompts)

    @classmethod
    def absent(cls, info: Info) -> Teacher:
        """Make a teacher without a network, for a method that builds its own and needs only `info`."""
        return cls(Denoiser(nn.Identity(), RectifiedFlow(), "x0"), PixelUnshuffle(1), info)

    def guided(self, guidance_scale: float) -> nn.Module:
        """Put the denoiser under classifier-free guidance; scale 1 is the denoiser itself."""
        return guided(self.denoiser, self.info, guidance_scale)

    def example(self) -> tuple[Tensor, Cond | None]:
        """Make an example for shapes: zeros (1, C, H, W) in the network's space, and a condition of the task."""
        return self._zeros(1), self.condition.example()

    def _zeros(self, count: int) -> Tensor:
        side = (length // self.codec.factor for length in self.info.size)
        return torch.zeros(count, self.codec.channels(self.info.channels), *side)

    def encode_batch(self, batch: dict[str, Tensor], device: str | torch.device) -> dict[str, Tensor]:
        """Encode a batch of pictures (see `data.pixels.Batch`): "x0", "loser", and the condition's tensors.

        "latent" takes the place of "image" where `Latents` has encoded it before. Of data without pictures "x0" is
        zeros, which tell a method that learns without them how many it draws and of what shape. "caption" stays among
        the conditions, where rewards read it and networks do not.
        """
        if "latent" in batch:
            encoded: Cond = {"x0": batch["latent"].to(device, torch.float32)}
        elif "image" in batch:
            encoded = {"x0": self.codec.encode(batch["image"].to(device))}
        else:
            encoded = {"x0": self._zeros(len(next(iter(batch.values())))).to(device)}
        if "loser" in batch:
            encoded["loser"] = self.codec.encode(batch["loser"].to(device))
        if "caption" in batch:
            encoded["caption"] = batch["caption"].to(device)
        return encoded | self.condition.encode_items(batch, device)
