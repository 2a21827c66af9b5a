"""The weights folder: what the two halves of the house share.

A folder is a diffusers pipeline (safetensors only) plus `fewstep.json`, which says what the pipeline cannot: the task, the
published step counts and their times, the labels' names, how the picture is laid out, and a sha256 of each part. A folder
without `fewstep.json` is any diffusers pipeline and opens as a teacher.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distillers.codec import ImageCodec, PixelUnshuffle, Vae
from distillers.denoiser import Denoiser
from distillers.errors import BadInput
from distillers.schedule import NoiseSchedule, Prediction, VariancePreserving, from_config, from_diffusers

MANIFEST = "fewstep.json"
TASKS = ("image", "class-to-image", "sar-to-optical")
NETWORKS = ("UNet2DModel", "DiTTransformer2DModel", "Transformer2DModel")
_PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}


@dataclass(frozen=True, kw_only=True)
class Info:
    """`fewstep.json`. Sizes are pixels; times are in the schedule's unit, descending."""

    name: str
    task: str
    method: str
    role: str  # "teacher" | "student"
    data: str  # name of the data set it was trained on
    sampler: str  # "consistency": re-noise between steps; "ddim": deterministic probability-flow steps
    size: tuple[int, int]
    step_times: dict[int, list[float]] = field(default_factory=dict)  # published step counts; empty = any (teachers)
    default_steps: int = 1
    labels: list[str] = field(default_factory=list)
    codec: str = PixelUnshuffle.kind
    patch: int = 1  # pixels a side that become one position of the network
    guidance_scale: float = 1.0
    teacher: str | None = None
    sar: dict[str, Any] | None = None  # channels and value range of the SAR input
    sha256: dict[str, str] = field(default_factory=dict)
    format: int = 1

    @classmethod
    def read(cls, folder: Path) -> Info:
        """Read and check a manifest. Raises BadInput naming what is wrong with it."""
        path = folder / MANIFEST
        try:
            raw = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise BadInput(str(path), str(error), "a readable fewstep.json") from None
        known = {f.name for f in fields(cls)}
        unknown, missing = set(raw) - known, {"name", "task", "method", "role", "sampler", "size"} - set(raw)
        if unknown or missing:
            raise BadInput(str(path), f"unknown {sorted(unknown)}, missing {sorted(missing)}", ", ".join(sorted(known)))
        if raw["task"] not in TASKS:
            raise BadInput(f"{path}: task", raw["task"], ", ".join(TASKS))
        raw["size"] = tuple(raw["size"])
        raw["step_times"] = {int(k): v for k, v in raw.get("step_times", {}).items()}
        return cls(**raw)

    def write(self, folder: Path) -> None:
        (folder / MANIFEST).write_text(json.dumps(asdict(self), indent=2) + "\n")


@dataclass(frozen=True)
class Parts:
    """An opened folder."""

    denoiser: Denoiser
    codec: ImageCodec
    info: Info


def find(root: Path) -> dict[str, Path]:
    """Published folders below root, by name."""
    return {p.parent.name: p.parent for p in sorted(Path(root).glob(f"*/{MANIFEST}"))}


def read(path_or_hub_id: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Parts:
    """Open a weights folder or any supported diffusers pipeline (folder or hub id).

    Raises:
        BadInput: no such folder, a pipeline or network class we do not know, missing or damaged weights.
    """
    folder = _local(path_or_hub_id)
    index = _json(folder / "model_index.json")
    part = next((p for p in ("unet", "transformer") if (folder / p / "config.json").is_file()), None)
    if part is None:
        raise BadInput(
            str(folder), index.get("_class_name", "no unet or transformer"), "a diffusers pipeline with a unet or transformer"
        )
    network = _network(folder / part)
    scheduler = _json(folder / "scheduler" / "scheduler_config.json")
    info = Info.read(folder) if (folder / MANIFEST).is_file() else None
    if info:
        verify(folder, info)
    codec = _codec(folder, info, device)
    if info is None:
        info = _describe(folder, network, codec, index)
    denoiser = Denoiser(network.to(device, dtype), _schedule(folder, scheduler), _prediction(folder, scheduler))
    return Parts(denoiser.eval().requires_grad_(False), codec, info)


def write(folder: Path, network: nn.Module, schedule: NoiseSchedule, prediction: Prediction, codec: ImageCodec, info: Info) -> None:
    """Save a network and its manifest as a folder that stock diffusers opens. fp16 safetensors.

    Class-conditional and plain U-Nets in pixel space get a `model_index.json` naming `ConsistencyModelPipeline`: it is
    diffusers' only pipeline that hands labels to a UNet2DModel, and it works with any of its schedulers.
    """
    import copy

    import diffusers

    folder.mkdir(parents=True, exist_ok=True)
    part = "unet" if type(network).__name__ == "UNet2DModel" else "transformer"
    copy.deepcopy(network).to("cpu", torch.float16).save_pretrained(folder / part)
    _scheduler(schedule, prediction, info).save_pretrained(folder / "scheduler")
    if isinstance(codec, Vae):
        codec.vae.save_pretrained(folder / "vae")
    if part == "unet" and codec.factor == 1 and info.task != "sar-to-optical":
        scheduler_class = "LCMScheduler" if info.sampler == "consistency" else "DDIMScheduler"
        index = {
            "_class_name": "ConsistencyModelPipeline",
            "_diffusers_version": diffusers.__version__,
            "unet": ["diffusers", "UNet2DModel"],
            "scheduler": ["diffusers", scheduler_class],
        }
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    replace(info, sha256=_digests(folder)).write(folder)


def verify(folder: Path, info: Info) -> None:
    """Raise BadInput if a part listed in the manifest is missing or is not the file that was published."""
    for name, digest in info.sha256.items():
        path = folder / name
        if not path.is_file():
            raise BadInput(str(path), "missing", "the file listed in fewstep.json")
        if _sha256(path) != digest:
            raise BadInput(str(path), "a file with another sha256", f"sha256 {digest} as listed in fewstep.json")


def _digests(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): _sha256(p) for p in sorted(folder.glob("*/*.safetensors"))}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _local(path_or_hub_id: str | Path) -> Path:
    """A folder on disk: the given one, or diffusers' download of a hub id."""
    path = Path(path_or_hub_id)
    if path.is_dir():
        return path
    if isinstance(path_or_hub_id, str) and path_or_hub_id.count("/") == 1 and not path_or_hub_id.startswith((".", "/")):
        from diffusers import DiffusionPipeline

        try:
            return Path(DiffusionPipeline.download(path_or_hub_id, use_safetensors=True))
        except Exception as error:  # the hub client raises many kinds; all mean that the model cannot be had
            raise BadInput("model", path_or_hub_id, f"an existing folder or a reachable hub id ({type(error).__name__})") from None
    raise BadInput("model", str(path_or_hub_id), "an existing folder or a hub id of the form owner/name")


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise BadInput(str(path), str(error), "valid JSON") from None
    return value


def _network(folder: Path) -> nn.Module:
    import diffusers

    kind = _json(folder / "config.json").get("_class_name")
    if kind not in NETWORKS:
        raise BadInput(str(folder / "config.json"), kind, "a network of class " + ", ".join(NETWORKS))
    try:
        network: nn.Module = getattr(diffusers, kind).from_pretrained(folder, use_safetensors=True, low_cpu_mem_usage=False)
    except Exception as error:  # damaged safetensors surface as several private exception types
        raise BadInput(str(folder), f"{type(error).__name__}: {str(error).splitlines()[0]}", "readable safetensors weights") from None
    return network


def _schedule(folder: Path, scheduler: dict[str, Any]) -> NoiseSchedule:
    if not scheduler:
        raise BadInput(str(folder / "scheduler"), "missing", "scheduler/scheduler_config.json")
    return from_config(scheduler["fewstep"]) if "fewstep" in scheduler else from_diffusers(scheduler)


def _prediction(folder: Path, scheduler: dict[str, Any]) -> Prediction:
    kind = scheduler.get("_class_name", "")
    if "FlowMatch" in kind:
        return "flow"
    given = scheduler.get("prediction_type", "epsilon")
    if given not in _PREDICTIONS or kind.startswith(("CM", "EDM")):
        raise BadInput(str(folder / "scheduler"), f"{kind} with {given}", "prediction_type " + ", ".join(_PREDICTIONS))
    return _PREDICTIONS[given]


def _codec(folder: Path, info: Info | None, device: str | torch.device) -> ImageCodec:
    for part in ("vae", "vqvae"):
        if (folder / part / "config.json").is_file():
            from diffusers import AutoencoderKL

            kind = _json(folder / part / "config.json").get("_class_name")
            if kind != "AutoencoderKL":
                raise BadInput(str(folder / part), kind, "AutoencoderKL")
            return Vae(AutoencoderKL.from_pretrained(folder / part, use_safetensors=True).to(device))
    return PixelUnshuffle(info.patch if info else 1)


def _describe(folder: Path, network: nn.Module, codec: ImageCodec, index: dict[str, Any]) -> Info:
    """What can be told of a pipeline that is not ours."""
    config: Any = network.config
    side = config.sample_size if isinstance(config.sample_size, int) else config.sample_size[0]
    classes = config.get("num_class_embeds") or config.get("num_embeds_ada_norm")
    names = index.get("id2label") or {}
    labels = [str(names.get(str(i), i)) for i in range(classes)] if classes else []
    extra = config.in_channels - config.out_channels
    task = "sar-to-optical" if isinstance(codec, PixelUnshuffle) and extra > 0 else "class-to-image" if labels else "image"
    return Info(
        name=folder.name,
        task=task,
        method="diffusion",
        role="teacher",
        data=folder.name,
        sampler="ddim",
        size=(side * codec.factor, side * codec.factor),
        default_steps=50,
        labels=labels,
        codec=codec.kind,
        patch=codec.factor,
        sar={"channels": extra, "range": [-1, 1]} if task == "sar-to-optical" else None,
    )


def _scheduler(schedule: NoiseSchedule, prediction: Prediction, info: Info) -> Any:
    """The stock scheduler that walks the same path as `Generator`."""
    import diffusers

    if not isinstance(schedule, VariancePreserving):
        raise BadInput("schedule", schedule.name, "vp for a folder that diffusers' schedulers can sample")
    kind = {v: k for k, v in _PREDICTIONS.items()}[prediction]
    config = {**schedule.betas_config, "prediction_type": kind, "clip_sample": False}
    if info.sampler == "consistency":
        return diffusers.LCMScheduler(**config, original_inference_steps=LCM_POINTS)
    return diffusers.DDIMScheduler(**config, timestep_spacing="trailing", set_alpha_to_one=True)


LCM_POINTS = 50  # LCMScheduler picks its times from this many points (Luo et al. 2023)


def lcm_times(schedule: VariancePreserving, steps: int) -> list[float]:
    """The times stock LCMScheduler visits in so many steps, descending."""
    import diffusers

    scheduler = diffusers.LCMScheduler(
        num_train_timesteps=int(schedule.t_max) + 1, original_inference_steps=LCM_POINTS
    )
    scheduler.set_timesteps(steps)
    return [float(t) for t in scheduler.timesteps]
