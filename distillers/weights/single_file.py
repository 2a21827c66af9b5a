"""Checkpoints of one file, as Stable Diffusion and SDXL were published first, opened through diffusers' own loader."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from distillers.errors import BadInput

SUFFIX = ".safetensors"
NETWORK = "model.diffusion_model."  # how the keys of the network begin
KINDS = {"v1": "StableDiffusionPipeline", "v2": "StableDiffusionPipeline", "xl_base": "StableDiffusionXLPipeline"}
_folders: list[Any] = []  # of this process, which are deleted as it ends


def as_folder(file: Path) -> Path:
    """Convert a checkpoint of one file to a pipeline's folder, which lasts as long as this process.

    The file holds weights alone. The configurations and the tokenizers come from a folder beside it, of the file's
    name without the suffix: any pipeline of its kind has them. Without that they come from diffusers' usual hub ids.

    Raises:
        BadInput: another kind of checkpoint, a damaged file, no configurations.
    """
    return _converted(file.resolve(), file.stat().st_mtime_ns)


@cache
def _converted(file: Path, _changed: int) -> Path:
    import diffusers
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type, load_single_file_checkpoint

    try:
        checkpoint = load_single_file_checkpoint(str(file))
        weights = [value for key, value in checkpoint.items() if key.startswith(NETWORK)]
        kind = infer_diffusers_model_type(checkpoint) if weights else "no network, such as an adapter"
    except Exception as error:  # damaged safetensors surface as several private exception types
        raise BadInput(str(file), f"{type(error).__name__}: {error}".splitlines()[0], "readable safetensors") from None
    if kind not in KINDS:
        allowed = "a checkpoint of Stable Diffusion 1, 2 or SDXL; other families open as folders of diffusers"
        raise BadInput(str(file), kind, allowed)
    beside = file.with_suffix("")
    config = {"config": str(beside)} if (beside / "model_index.json").is_file() else {}
    try:
        pipeline = getattr(diffusers, KINDS[kind]).from_single_file(str(file), torch_dtype=weights[0].dtype, **config)
    except Exception as error:  # of the hub's client, or of a checkpoint that is not as its configurations say
        allowed = (
            f"weights as {beside}/ says, a folder with model_index.json, the parts' configurations and the tokenizers "
            "of any pipeline of this kind, or a reachable hub that has them"
        )
        raise BadInput(str(file), f"{type(error).__name__}: {error}".splitlines()[0], allowed) from None
    made = tempfile.TemporaryDirectory(prefix="fewstep-")
    _folders.append(made)
    folder = Path(made.name) / file.stem
    if getattr(pipeline, "safety_checker", None) is None and "requires_safety_checker" in pipeline.config:
        pipeline.register_to_config(requires_safety_checker=False)
    pipeline.save_pretrained(folder)
    return folder
