"""Texts of a data set are encoded once, each different one by itself, and training draws what was encoded."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distillers.data import Batch, ImageData, OfShapes
from distillers.models.captions import pack, unpack
from distillers.models.conditions import Prompt, picture_size
from distillers.training.stored import Stored, name_of

TOGETHER = 32  # texts that are encoded at a time
PROBED = 16  # texts whose encodings tell how large all will be


class EncodedTexts:
    """Data whose batches hold what a frozen encoder makes of their captions, beside "caption".

    What the encoder says of each different text is kept in bfloat16, without the positions that its mask leaves out,
    which networks do not attend to; the side without a prompt, for guidance, is kept once. `items` gives captions as
    before.

    Args:
        texts: all that `draw` may give.
        condition: of the teacher, with its encoder.
        folder: where the files are kept, beside the run.
        device: where the encoder runs for this.
    """

    def __init__(
        self, data: ImageData, texts: Sequence[str], condition: Prompt, folder: Path, device: str | torch.device
    ) -> None:
        self.name, self.size, self.labels, self.channels = data.name, data.size, data.labels, data.channels
        self.captioned, self.pictured, self.data = data.captioned, data.pictured, data
        self.texts, self.condition, self.folder, self.device = sorted(set(texts)), condition, folder, device

    def __len__(self) -> int:
        return len(self.data)

    # --- what is encoded ----------------------------------------------------------------------------------------------
    def _encoded(self, texts: Sequence[str], size: tuple[int, int]) -> dict[str, Tensor]:
        """Encode texts as a batch of training would, on the CPU."""
        encoder = self.condition.encoder
        assert encoder is not None
        encoder.to(self.device)
        sizes = torch.tensor([size] * len(texts))
        found = self.condition.encode_items({"caption": pack(texts), "size": sizes}, self.device)
        return {name: value.cpu() for name, value in found.items()}

    def _rows(self, texts: Sequence[str]) -> list[dict[str, Tensor]]:
        """Encode texts to what is kept of each."""
        rows = list[dict[str, Tensor]]()
        for first in range(0, len(texts), TOGETHER):
            found = self._encoded(texts[first : first + TOGETHER], self.size)
            told = {k: v for k, v in found.items() if not (k.startswith("null_") or k == "ids")}
            for i in range(len(next(iter(told.values())))):
                length = int(told["mask"][i].sum()) if self.ragged else None
                row = {k: v[i, :length] if k in self.ragged else v[i] for k, v in told.items() if k != "mask"}
                row |= {} if self.ragged or "mask" not in told else {"mask": told["mask"][i]}
                rows.append({k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in row.items()})
        return rows

    @cached_property
    def fixed(self) -> dict[tuple[int, int], dict[str, Tensor]]:
        """What does not depend on the text, (1, ...), by the size of the pictures: ids, the side without a prompt."""
        found = {size: self._encoded([""], size) for size in getattr(self.data, "sizes", [self.data.size])}
        return {s: {k: v for k, v in one.items() if k.startswith("null_") or k == "ids"} for s, one in found.items()}

    @cached_property
    def ragged(self) -> tuple[str, ...]:
        """The names of what has a row for each token, where a mask says which tokens count: the first ones."""
        found = self._encoded(["", *self.texts[:1]], self.size)
        mask = found.get("mask")
        if mask is None or not torch.equal(mask.long(), mask.long().cummin(1).values):
            return ()
        return tuple(k for k, v in found.items() if v.ndim > 2 and v.shape[:2] == mask.shape and "null_" not in k)

    @cached_property
    def empty(self) -> dict[str, Tensor]:
        """What there is of a text in which no token counts, (...) each: where ragged parts are written into."""
        found = self._encoded([""], self.size)
        half = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in found.items()}
        return {k: torch.zeros_like(half[k][0]) for k in (*self.ragged, "mask") if k in half}

    def bytes_needed(self) -> float:
        """Estimate how much the files will take, from some of the texts."""
        every = [self.texts[i * len(self.texts) // PROBED] for i in range(PROBED)]
        rows = self._rows(sorted(set(every)))
        return len(self.texts) * float(np.mean([sum(v.nbytes for v in row.values()) for row in rows]))

    @cached_property
    def stored(self) -> Stored:
        """All texts, encoded at the first use."""
        assert self.condition.encoder is not None
        name = f"texts-{name_of(self.texts, self.condition.encoder)}"

        def make(places: Sequence[int]) -> list[dict[str, Tensor]]:
            return self._rows([self.texts[i] for i in places])

        on_cpu = torch.device(self.device).type == "cpu"
        return Stored(self.folder / name, len(self.texts), make, ragged=self.ragged, on_cpu=on_cpu)

    def encode(self) -> None:
        """Encode all texts that are not yet encoded, and leave the encoder on the CPU."""
        assert self.condition is not None and self.condition.encoder is not None
        assert self.fixed and self.empty is not None and len(self.stored)
        self.condition.encoder.to("cpu")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "condition": None}  # processes that draw need no encoder

    # --- data ---------------------------------------------------------------------------------------------------------
    def choose_shape(self, rng: np.random.Generator) -> int:
        """Choose the shape of a batch, as the data do."""
        return self.data.choose_shape(rng) if isinstance(self.data, OfShapes) else 0

    def draw(self, n: int, rng: np.random.Generator, shape: int | None = None) -> Batch:
        """Draw the same items as the data themselves for these arguments."""
        batch = self.data.draw(n, rng, shape) if isinstance(self.data, OfShapes) else self.data.draw(n, rng)
        texts = unpack(batch["caption"])
        rows = [self._whole(self.stored[self._place[text]]) for text in texts]
        batch |= {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        fixed = self.fixed[picture_size(batch, self.size)]
        return batch | {name: value.expand(n, *value.shape[1:]) for name, value in fixed.items()}

    def _whole(self, row: dict[str, Tensor]) -> dict[str, Tensor]:
        """Give a row the tokens back that do not count, as zeros, and its mask."""
        if not self.ragged:
            return row
        full = {name: value.clone() for name, value in self.empty.items()}
        for name in self.ragged:
            full[name][: len(row[name])] = row[name]
        full["mask"][: len(row[self.ragged[0]])] = 1
        return row | full

    @cached_property
    def _place(self) -> dict[str, int]:
        return {text: i for i, text in enumerate(self.texts)}

    def items(self, indices: Sequence[int]) -> Batch:
        """Return the items of these positions, with their captions."""
        return self.data.items(indices)
