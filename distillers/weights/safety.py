"""The safety checker of a Stable Diffusion pipeline: a classifier of pictures that its authors publish with it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from distillers.errors import BadInput
from distillers.weights.manifest import SAFETY, read_json

CHECKER, EXTRACTOR = SAFETY


def safety_of(folder: Path) -> Path | None:
    """Return the folder again if its model_index.json names a safety checker.

    Raises:
        BadInput: a checker of another class than Stable Diffusion's, or one that is not there.
    """
    kind = (read_json(folder / "model_index.json").get(CHECKER) or [None, None])[1]
    if kind is None:
        return None
    if kind != "StableDiffusionSafetyChecker":
        raise BadInput(f"{folder}: {CHECKER}", kind, "StableDiffusionSafetyChecker, or null")
    for name in (f"{CHECKER}/config.json", f"{EXTRACTOR}/preprocessor_config.json"):
        if not (folder / name).is_file():
            raise BadInput(f"{folder}: {name}", "missing", f"the file of the {CHECKER} that model_index.json names")
    return folder


def copy_safety(source: Path, target: Path, index: dict[str, Any]) -> None:
    """Copy a pipeline's safety checker into another folder, and its entries into that folder's model_index.json."""
    told = read_json(source / "model_index.json")
    for part in (CHECKER, EXTRACTOR):
        (target / part).mkdir()
        for file in sorted((source / part).iterdir()):
            if file.suffix in (".json", ".safetensors"):
                shutil.copyfile(file, target / part / file.name)
        index[part] = told[part]
    index["requires_safety_checker"] = True


class SafetyChecker:
    """Tells which pictures the pipeline itself would black out.

    Args:
        folder: of the pipeline: see `safety_of`.

    Raises:
        BadInput: weights that cannot be read.
    """

    def __init__(self, folder: Path, device: str | torch.device = "cpu") -> None:
        from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
        from transformers import CLIPImageProcessor

        place, kind = folder / CHECKER, StableDiffusionSafetyChecker
        variant = None if (place / "model.safetensors").is_file() else "fp16"
        try:
            checker: Any = kind.from_pretrained(place, use_safetensors=True, dtype=torch.float32, variant=variant)
            self.processor: Any = CLIPImageProcessor.from_pretrained(folder / EXTRACTOR)
        except Exception as error:  # as with networks, damage surfaces as several kinds
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise BadInput(str(place), reason, "StableDiffusionSafetyChecker as safetensors") from None
        self.checker, self.device = checker.eval().to(device), device

    @torch.inference_mode()
    def flags(self, pictures: NDArray[np.uint8]) -> list[bool]:
        """Tell for each of B pictures (B, H, W, 3), uint8, whether it is flagged."""
        from PIL import Image

        seen = self.processor([Image.fromarray(picture) for picture in pictures], return_tensors="pt").pixel_values
        _, found = self.checker(clip_input=seen.to(self.device), images=np.zeros((len(pictures), 1)))
        return [bool(one) for one in found]
