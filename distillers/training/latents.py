"""What training draws is encoded once: the pictures of a folder to latents, and the texts beside them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distillers.data import Batch, ImageData
from distillers.data.captioned import CaptionedFolder, Prompts
from distillers.data.image_folder import ImageFolder
from distillers.errors import Notice
from distillers.models.codec import Vae
from distillers.models.conditions import Prompt
from distillers.teacher import Teacher
from distillers.training.encoded_texts import EncodedTexts
from distillers.training.stored import Stored, check_room, name_of

BATCH = 64  # pictures encoded at a time


class Latents:
    """A folder of pictures whose batches hold "latent" (n, C, h, w), float16, in place of "image".

    A picture is encoded in each of the ways it may be turned when it is drawn, for an encoder does not commute with
    flips: twice as many latents for `flip`, eight times for `dihedral`. All are made at the first draw and stay in
    memory; a folder of 14,000 pictures at 8 x 16 x 16 and their flips take 114 MB. `items` gives pictures as before.

    folder: where latents are kept in files instead, beside the run.
    """

    def __init__(self, data: ImageFolder | CaptionedFolder, codec: Vae, folder: Path | None = None) -> None:
        self.name, self.size, self.labels, self.channels = data.name, data.size, data.labels, data.channels
        self.sizes, self.captioned, self.pictured = data.sizes, data.captioned, data.pictured
        self.data, self.codec, self.folder = data, codec, folder

    def __len__(self) -> int:
        return len(self.data)

    @cached_property
    def latents(self) -> dict[int, list[Tensor] | list[Stored]]:
        """Encode all pictures: operation -> latents (N, C, h, w) of the pictures of each shape, turned by it."""
        device = next(self.codec.parameters()).device

        def encoded(index: np.ndarray, operation: int) -> Tensor:
            pictures = self.data.turned(index, np.full(len(index), operation))["image"]
            return self.codec.encode(pictures.to(device)).half().cpu()

        def in_memory(shape: int, operation: int) -> Tensor:
            places = self.data.places(shape)
            parts = [places[first : first + BATCH] for first in range(0, len(places), BATCH)]
            return torch.cat([encoded(part, operation) for part in parts])

        def in_files(folder: Path, shape: int, operation: int) -> Stored:
            places = self.data.places(shape)
            own = name_of(self.codec, self.sizes[shape], [self._named(i) for i in places])

            def make(rows: Sequence[int]) -> list[dict[str, Tensor]]:
                return [{"latent": latent} for latent in encoded(places[list(rows)], operation)]

            return Stored(
                folder / f"latents{shape}.{operation}-{own}", len(places), make, each=BATCH, on_cpu=device.type == "cpu"
            )

        shapes = range(len(self.sizes))
        if self.folder is None:
            return {way: [in_memory(k, way) for k in shapes] for way in self.data.operations}
        return {way: [in_files(self.folder, k, way) for k in shapes] for way in self.data.operations}

    def _named(self, i: int) -> str:
        """Name a picture by its file."""
        return self.data.found[i].name if isinstance(self.data, CaptionedFolder) else str(self.data.files[i])

    def bytes_needed(self) -> float:
        """Compute how much the latents of all pictures take."""
        factor, channels = self.codec.factor, self.codec.channels(self.channels)
        areas = [len(self.data.places(k)) * height * width for k, (height, width) in enumerate(self.sizes)]
        return 2.0 * channels * sum(areas) / factor**2 * len(self.data.operations)

    def choose_shape(self, rng: np.random.Generator) -> int:
        """Choose the shape of a batch, as the folder does."""
        return self.data.choose_shape(rng)

    def draw(self, n: int, rng: np.random.Generator, shape: int | None = None) -> Batch:
        """Draw the same items, turned in the same ways, as the folder itself for these arguments."""
        index, operation = self.data.choose(n, rng, shape)
        of_shape, rows = self.data.rows(index)
        kept = [(self.latents[way][of_shape], i) for i, way in zip(rows.tolist(), operation.tolist(), strict=True)]
        latents = torch.stack([one[i]["latent"] if isinstance(one, Stored) else one[i] for one, i in kept])
        size = {"size": torch.tensor([self.sizes[of_shape]] * n)} if len(self.sizes) > 1 else {}
        return {"latent": latents, **size, **self.data.conditions(index, rng)}

    def items(self, indices: Sequence[int]) -> Batch:
        """Return the pictures of these positions as they are."""
        return self.data.items(indices)


def encoded_once(
    data: ImageData,
    teacher: Teacher,
    folder: Path | None = None,
    limit: float = 0.0,
    device: str | None = None,
) -> ImageData:
    """Let training draw what was encoded once, where encoding costs a network and what is drawn is finite.

    Pictures become latents, in memory where they are turned at random and in files where not; texts become what the
    frozen encoders say of them, in files. Other data come back as they are, and are encoded whenever they are drawn.

    Args:
        folder: for the files; without one, latents are kept in memory and texts encoded when drawn.
        limit: of all files, in GB; 0 encodes everything when it is drawn.
        device: where the encoders run for this: "cpu", or None for the GPU where there is one.

    Raises:
        BadInput: files that would take more than the limit.
    """
    if folder is not None and not limit:
        return data
    where = _device(device)
    made, latents, texts = data, None, None
    if isinstance(teacher.codec, Vae) and isinstance(data, ImageFolder | CaptionedFolder):
        made = latents = Latents(data, teacher.codec, folder if data.operations == (0,) else None)
    drawn, condition = texts_drawn(data), teacher.condition
    if (
        folder is not None
        and drawn
        and isinstance(condition, Prompt)
        and condition.encoder is not None
        and not condition.encoder.learns
    ):
        made = texts = EncodedTexts(made, drawn, condition, folder, where)
    in_files = latents is not None and latents.folder is not None
    needed = {"latents": latents.bytes_needed() if latents and in_files else 0.0}
    check_room(needed | {"encoded texts": texts.bytes_needed() if texts else 0.0}, limit if folder else np.inf)
    if latents and in_files:
        teacher.codec.to(where)
        assert latents.latents
    if texts:
        texts.encode()
    return made


def tell_unread(data: ImageData, teacher: Teacher) -> None:
    """Count, in a Notice, the texts of the data that an encoder of the teacher does not read to their end."""
    condition = teacher.condition
    if not isinstance(data, CaptionedFolder | Prompts) or not isinstance(condition, Prompt):
        return
    if condition.encoder is None:
        return
    texts = sorted(set(data.texts))
    unread = {text: condition.encoder.unread(text) for text in texts}
    for name in condition.encoder.towers:
        cut = [text for text in texts if name in unread[text]]
        if cut:
            left = f"of {cut[0]!r} the end {unread[cut[0]][name]!r}"
            text = f"{name} does not read {len(cut)} of {len(texts)} texts to their end: {left}"
            warnings.warn(text, Notice, stacklevel=2)


def _device(name: str | None) -> torch.device:
    """Return the device that a training of this process will run on."""
    from accelerate import PartialState

    return torch.device("cpu") if name == "cpu" else PartialState().device


def texts_drawn(data: ImageData) -> list[str] | None:
    """Return all texts that data may draw; None where there are none, or too many to tell."""
    if isinstance(data, CaptionedFolder | Prompts) and not data.clause_dropout:
        return data.texts
    return None
