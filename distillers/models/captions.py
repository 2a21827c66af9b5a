"""Captions as tensors: batches carry texts as padded UTF-8 bytes, so that they travel as pictures do.

Worker processes, pinned memory and micro-batches handle tensors only, and data sets know no tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distillers.errors import BadInput


def pack(texts: Sequence[str], length: int | None = None) -> Tensor:
    """Write texts into one uint8 tensor (B, L) as UTF-8, padded with zeros at the end.

    length: L, in bytes; None for the longest text's.

    Raises:
        BadInput: a text that holds the character 0, or is longer than `length`.
    """
    rows = [text.encode() for text in texts]
    longest = max(map(len, rows), default=0)
    if any(b"\0" in row for row in rows):
        raise BadInput("caption", "a text with the character 0", "texts without it")
    if length is not None and longest > length:
        raise BadInput("caption", f"{longest} bytes", f"{length} bytes at most")
    width = longest if length is None else length
    padded = b"".join(row.ljust(width, b"\0") for row in rows)
    return torch.frombuffer(bytearray(padded), dtype=torch.uint8).view(len(rows), width) if padded else _none(len(rows))


def _none(count: int) -> Tensor:
    """Make the tensor of so many texts without a letter."""
    return torch.zeros(count, 0, dtype=torch.uint8)


def unpack(packed: Tensor) -> list[str]:
    """Read the texts of a tensor that `pack` made, on whatever device it is."""
    return [bytes(row).rstrip(b"\0").decode() for row in packed.cpu().numpy()]
