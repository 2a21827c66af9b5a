"""Folders of pictures and pairs, written for one test."""

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from distillers.data.preferences import Preferred, write_preferences
from distillers.data.shapes import LABELS

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def real(name: str) -> Path:
    """A folder of the real data, which is not part of the project."""
    if not (SHARED / name).is_dir():
        pytest.skip(f"the real data set {name} does not stand at ../shared/data/{name}")
    return SHARED / name


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def save(path: Path, pixels: NDArray[np.uint8]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, lossless=True)
    return path


def noise(seed: int, height: int = 16, width: int = 16, channels: int = 3) -> NDArray[np.uint8]:
    return rng(seed).integers(0, 256, (height, width, channels) if channels > 1 else (height, width), dtype=np.uint8)


def save_pair(sar: Path, optical: Path, seed: int, side: int = 48) -> None:
    """A pair whose optical image is its SAR in false colour, so every pixel shows whether both were treated alike."""
    grey = noise(seed, side, side, 1)
    save(sar, grey)
    save(optical, np.stack([grey, 255 - grey, grey // 2], axis=2))


CAPTION = "picture {}, of noise, with colours"


def write_captioned(root: Path, count: int = 5, side: int = 16, jsonl: bool = True) -> Path:
    """Pictures of noise, seed i of them with the caption of number i, in metadata.jsonl or in a .txt beside each."""
    texts = {f"{i}.png": CAPTION.format(i) for i in range(count)}
    for i, name in enumerate(texts):
        save(root / name, noise(i, side, side))
        if not jsonl:
            (root / name).with_suffix(".txt").write_text(texts[name] + "\n")
    if jsonl:
        lines = [json.dumps({"file_name": name, "text": text, "seed": 1}) for name, text in texts.items()]
        (root / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return root


def write_pairs(root: Path, labels: tuple[str, ...] = LABELS, count: int = 5, side: int = 16) -> Path:
    """Preference pairs whose loser is the negative of the winner, so every pixel shows whether both were turned."""
    winners = [noise(i, side, side) for i in range(count)]
    names = [labels[3 * i % len(labels)] if labels else None for i in range(count)]
    pairs = (Preferred(winner=w, loser=255 - w, label=name) for w, name in zip(winners, names, strict=True))
    assert write_preferences(root, pairs, labels) == count
    return root
