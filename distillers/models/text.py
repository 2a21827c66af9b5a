"""The prompt encoders of diffusers' text-to-image pipelines: CLIP's hidden states.

Stable Diffusion has one encoder; SDXL has two, whose states stand side by side, and takes a pooled vector and the
picture's size besides (Podell et al. 2023, sec. 2.1, 2.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn


class TextEncoders(nn.Module):
    """The text encoders as one network: tokens to one row for each prompt, so that it runs as every other network does.

    A row holds the hidden states of all encoders side by side, then the pooled vector, if there is one.
    """

    def __init__(self, encoders: Sequence[nn.Module], penultimate: bool) -> None:
        super().__init__()
        self.encoders, self.penultimate = nn.ModuleList(encoders), penultimate
        self.config: Any = encoders[0].config

    def forward(self, *tokens: Tensor) -> Any:
        """Encode tokens, int64 (B, length) for each encoder, to `.sample` (B, length * width + pooled)."""
        hidden: list[Tensor] = []
        for encoder, ids in zip(self.encoders, tokens, strict=True):
            found: Any = encoder(input_ids=ids, output_hidden_states=self.penultimate)
            hidden.append(found.hidden_states[-2] if self.penultimate else found.last_hidden_state)
        rows = [torch.cat(hidden, -1).flatten(1)]
        if self.penultimate:
            rows.append(found.text_embeds)  # the last encoder's
        return SimpleNamespace(sample=torch.cat(rows, 1))


class PromptEncoder(nn.Module):
    """An encoder of prompts to "text" (B, length, width) and, for SDXL, "pooled" (B, P) and "ids" (B, 6).

    Args:
        tokenizers, encoders: CLIP's, one of each or two.
        zeros_for_empty: SDXL's convention for guidance: the side without a prompt is zeros. A prompt that is empty is
            encoded as any other.
    """

    def __init__(self, tokenizers: Sequence[Any], encoders: Sequence[nn.Module], zeros_for_empty: bool = False) -> None:
        super().__init__()
        self.tokenizers, self.zeros_for_empty = list(tokenizers), zeros_for_empty
        self.xl = len(encoders) == 2
        self.towers = TextEncoders([encoder.eval().requires_grad_(False) for encoder in encoders], self.xl)
        self.length = int(self.towers.config.max_position_embeddings)
        self.width = sum(tower.config.hidden_size for tower in self.encoders)

    @property
    def encoders(self) -> list[Any]:
        """The encoders as they were loaded."""
        towers: Any = getattr(self.towers, "network", self.towers)  # a server runs them in its own way
        return list(towers.encoders)

    @torch.no_grad()
    def forward(self, prompts: Sequence[str], size: tuple[int, int]) -> dict[str, Tensor]:
        """Encode B prompts for pictures of `size` (H, W) in pixels, on the encoders' device."""
        device = next(self.parameters()).device
        given = {"padding": "max_length", "max_length": self.length, "truncation": True, "return_tensors": "pt"}
        tokens = [tokenizer(list(prompts), **given).input_ids.to(device) for tokenizer in self.tokenizers]
        rows: Tensor = self.towers(*tokens).sample.float()
        text = rows[:, : self.length * self.width].unflatten(1, (self.length, self.width))
        if not self.xl:
            return {"text": text}
        ids = torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32, device=device)  # original, crop, target
        return {"text": text, "pooled": rows[:, self.length * self.width :], "ids": ids.expand(len(prompts), -1)}
