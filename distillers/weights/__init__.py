"""The weights folder: what the two halves of the house share.

A folder is a diffusers pipeline (safetensors only) plus `fewstep.json`, which says what the pipeline cannot: the task,
the published step counts and their times, the labels' names, how the picture is laid out, and a sha256 of each part. A
folder without `fewstep.json` is any diffusers pipeline and opens as a teacher. A student that is an adapter is saved
twice: added to its teacher's weights, which is what opens and is served, and alone, for those who have the teacher.
Students that answer for a share of the labels each lie in students/0, students/1, ..., each a network folder. A folder
of the task "autoencoder" holds a vae/ alone: it reconstructs pictures and draws none, so `read` refuses it.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distillers.errors import BadInput
from distillers.models import conditions
from distillers.models.codec import ImageCodec, PixelUnshuffle, Vae
from distillers.models.denoiser import Denoiser, Guided, Routed
from distillers.models.lora import fused, has_lora, lora_rank, lora_state
from distillers.models.radiometry import Radiometry
from distillers.models.schedule import (
    NoiseSchedule,
    Prediction,
    RectifiedFlow,
    VariancePreserving,
    from_diffusers,
)
from distillers.models.text import PromptEncoder, read_prompts

MANIFEST = "fewstep.json"
ADAPTER = "pytorch_lora_weights.safetensors"  # diffusers' own name
AUTOENCODER = "autoencoder"
TASKS = ("image", "class-to-image", "sar-to-optical", "text-to-image", AUTOENCODER)
SAMPLERS = ("consistency", "ddim")
ROLES = ("teacher", "student")
PIPELINES = (
    "DDPMPipeline", "DDIMPipeline", "PNDMPipeline", "LDMPipeline", "ConsistencyModelPipeline", "DiTPipeline",
    "StableDiffusionPipeline", "StableDiffusionXLPipeline",
)  # fmt: skip
NETWORKS = (  # the last is DiT as older diffusers saved it
    "UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel", "Transformer2DModel",
)  # fmt: skip
BETAS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
STUDENTS = "students"
TEXT = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
PARTS = ("unet", "transformer", STUDENTS, "vae", *TEXT, "scheduler")  # the network first: see `staged`
_PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}


@dataclass(frozen=True, kw_only=True)
class Lora:
    """The adapter of a folder. Its alpha is its rank, whatever it was trained with: see `lora_state`."""

    rank: int
    base: str | None  # name of the teacher whose network it changes


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
    sar: dict[str, Any] | None = None  # what the model sees of SAR: `Radiometry` in words
    shares: list[list[int]] = field(default_factory=list)  # labels of each student; empty = one network has all
    trained_with: list[str] = field(default_factory=list)  # feature spaces that a loss compared in: no report may
    lora: Lora | None = None  # set by `write` if the folder holds an adapter
    sha256: dict[str, str] = field(default_factory=dict)
    format: int = 1

    @classmethod
    def read(cls, folder: Path) -> Info:
        """Read and check a manifest. Raises BadInput naming what is wrong with it."""
        from pydantic import TypeAdapter, ValidationError

        path = folder / MANIFEST
        try:
            raw = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise BadInput(str(path), str(error), "a readable fewstep.json") from None
        if not isinstance(raw, dict):
            raise BadInput(str(path), type(raw).__name__, "a JSON object")
        known = {f.name for f in fields(cls)}
        unknown, missing = set(raw) - known, {"name", "task", "method", "role", "sampler", "size"} - set(raw)
        if unknown or missing:
            raise BadInput(str(path), f"unknown {sorted(unknown)}, missing {sorted(missing)}", ", ".join(sorted(known)))
        try:
            info = TypeAdapter(cls).validate_python(raw)
        except ValidationError as error:
            first = error.errors()[0]
            raise BadInput(f"{path}: {'.'.join(map(str, first['loc']))}", first["input"], first["msg"]) from None
        info._check(path)
        return info

    def _check(self, path: Path) -> None:
        values = {"task": TASKS, "sampler": SAMPLERS, "role": ROLES, "format": (1,)}
        for key, allowed in values.items():
            if getattr(self, key) not in allowed:
                raise BadInput(f"{path}: {key}", getattr(self, key), ", ".join(map(str, allowed)))
        if not all(len(times) == steps for steps, times in self.step_times.items()):
            raise BadInput(f"{path}: step_times", self.step_times, "as many times as steps")
        if self.step_times and self.default_steps not in self.step_times:
            raise BadInput(f"{path}: default_steps", self.default_steps, f"one of {sorted(self.step_times)}")
        if self.patch < 1 or min(self.size) < 1 or not isinstance(self.sar_channels, int):
            raise BadInput(f"{path}: patch, size, sar", (self.patch, self.size, self.sar), "whole numbers above 0")
        if self.shares:
            self._check_shares(f"{path}: shares")
        if self.lora and (self.lora.rank < 1 or ADAPTER not in self.sha256):
            raise BadInput(f"{path}: lora", self.lora, f"a rank of 1 or more, and {ADAPTER} under sha256")

    def _check_shares(self, where: str) -> None:
        every, found = range(len(self.labels)), [label for share in self.shares for label in share]
        covered = set(found) == set(every) if len(self.shares) > 1 else set(found) <= set(every)
        if not (covered and len(set(found)) == len(found) and all(self.shares)):
            raise BadInput(
                where, self.shares, f"0 to {len(every) - 1}, each in one share, all of them if there are two"
            )
        if self.guidance_scale != 1:
            raise BadInput(f"{where}, guidance_scale", self.guidance_scale, "1: no student knows the null class")

    @property
    def classes(self) -> list[int]:
        """The labels that are answered for, ascending: all, or a lone student's share."""
        return sorted(label for share in self.shares for label in share) or list(range(len(self.labels)))

    @property
    def classes_in_words(self) -> str:
        """What may be asked for, for messages: "0 to 23", or a lone student's share by number."""
        classes = self.classes
        gapless = classes == list(range(classes[0], classes[-1] + 1))
        numbers = f"{classes[0]} to {classes[-1]}" if gapless else ", ".join(map(str, classes))
        return numbers + (f", the share of {self.name}" if len(classes) < len(self.labels) else "")

    def student_of(self, label: int | None) -> int:
        """Which of its networks answers for a label."""
        return next((k for k, share in enumerate(self.shares) if label in share), 0)

    @property
    def sar_channels(self) -> int:
        """Pixel channels of the SAR input; 0 for models that take none."""
        return (self.sar or {}).get("channels", 1) if self.task == "sar-to-optical" else 0

    def condition_channels(self, codec: ImageCodec) -> int:
        """Channels that stand beside the noisy image at the network's input, what SAR becomes there; 0 without SAR."""
        return conditions.channels(Radiometry.of(self.sar), codec) if self.task == "sar-to-optical" else 0

    def write(self, folder: Path) -> None:
        entries = asdict(self)
        for name in ("lora", "shares", "trained_with"):  # unknown to folders and readers older than they are
            if not entries[name]:
                del entries[name]
        (folder / MANIFEST).write_text(json.dumps(entries, indent=2) + "\n")


@dataclass(frozen=True)
class Parts:
    """An opened folder."""

    denoiser: Denoiser | Routed
    codec: ImageCodec
    info: Info
    prompts: PromptEncoder | None = None  # of text-to-image


def find(root: Path) -> dict[str, Path]:
    """Published folders below root, by name. Hidden ones are on their way: see `staged`."""
    folders = (p.parent for p in sorted(Path(root).glob(f"*/{MANIFEST}")))
    return {folder.name: folder for folder in folders if not folder.name.startswith(".")}


def draws(folder: Path) -> bool:
    """Whether a published folder draws pictures. All but autoencoders do; of a broken one `read` says what is wrong."""
    try:
        return bool(_json(folder / MANIFEST).get("task") != AUTOENCODER)
    except BadInput:
        return True


def read_autoencoder(path_or_hub_id: str | Path, device: str | torch.device = "cpu") -> tuple[Vae, Info | None]:
    """Open the autoencoder of a folder or hub id, whatever else lies beside its vae/; and the manifest, if it has one.

    Raises:
        BadInput: no such folder, no AutoencoderKL in it, missing or damaged weights.
    """
    folder = _local(path_or_hub_id)
    info = Info.read(folder) if (folder / MANIFEST).is_file() else None
    if info:
        verify(folder, info)
    codec = _codec(folder, info)
    if not isinstance(codec, Vae):
        raise BadInput("autoencoder", str(path_or_hub_id), "a folder or hub id with an AutoencoderKL in vae/")
    return codec.to(device), info


def write_autoencoder(folder: Path, codec: Vae, info: Info) -> None:
    """Save an autoencoder and its manifest as a folder; stock `AutoencoderKL.from_pretrained` opens its vae/. fp16."""
    with staged(folder) as new:
        _save_half(codec.vae, new / "vae")
        replace(info, sha256=_digests(new)).write(new)


def read(path_or_hub_id: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Parts:
    """Open a weights folder or any supported diffusers pipeline (folder or hub id).

    Raises:
        BadInput: no such folder, a pipeline or network class we do not know, missing or damaged weights.
    """
    folder = _local(path_or_hub_id)
    index = _json(folder / "model_index.json")
    if index.get("_class_name") not in (None, *PIPELINES):
        raise BadInput(f"{folder}: pipeline", index["_class_name"], ", ".join(PIPELINES))
    info = Info.read(folder) if (folder / MANIFEST).is_file() else None
    if info and info.task == AUTOENCODER:
        allowed = "a folder that draws pictures; this one reconstructs them, for a recipe's model.autoencoder"
        raise BadInput(f"{folder}: task", info.task, allowed)
    if info:
        verify(folder, info)
    places = _networks(folder, index, info)
    place = _part(folder, index, "scheduler")
    scheduler = _json(place / "scheduler_config.json")
    schedule, prediction = _schedule(place, scheduler), _prediction(place, scheduler)
    networks = [_load(place, NETWORKS, dtype) for place in places]
    codec, prompts = _codec(folder, info, dtype), None
    if type(networks[0]).__name__ == "UNet2DConditionModel":
        zeros = bool(index.get("force_zeros_for_empty_prompt", False))
        prompts = read_prompts(folder, zeros, dtype).to(device)
    info = info or _describe(folder, networks[0], codec, index)
    for network in networks:
        _check_fit(folder, network, codec, info, prompts)
    denoisers = [Denoiser(network.to(device), schedule, prediction) for network in networks]
    denoiser = denoisers[0] if len(denoisers) == 1 else Routed(denoisers, info.shares).to(device)
    return Parts(denoiser.eval().requires_grad_(False), codec.to(device), info, prompts)


def _networks(folder: Path, index: dict[str, Any], info: Info | None) -> list[Path]:
    """Where the network lies, or each student's."""
    if info and len(info.shares) > 1:
        return [folder / STUDENTS / str(k) for k in range(len(info.shares))]
    for part in ("unet", "transformer"):
        if (place := _part(folder, index, part) / "config.json").is_file():
            return [place.parent]
    raise BadInput(str(folder), "no unet or transformer", "a diffusers pipeline with a unet or transformer")


def write(
    folder: Path, denoiser: Denoiser | Routed, codec: ImageCodec, info: Info, prompts: PromptEncoder | None = None
) -> None:
    """Save a network and its manifest as a folder that stock diffusers opens. fp16 safetensors.

    A network with a LoRA stays as it is; its folder holds the adapter beside the fused network.
    """
    scheduler = _scheduler(denoiser.schedule, denoiser.prediction, info)
    lora, index = None, None
    with staged(folder) as new:
        if isinstance(denoiser, Routed):  # no stock pipeline routes
            for k, student in enumerate(denoiser.students):
                _save_half(student.network, new / STUDENTS / str(k))  # type: ignore[arg-type]
        else:
            network = denoiser.network
            if has_lora(network):
                lora = Lora(rank=lora_rank(network), base=info.teacher)
                _save_adapter(network, new / ADAPTER)
                network = fused(network)
            part = "unet" if type(network).__name__.startswith("UNet2D") else "transformer"
            _save_half(network, new / part)
            index = _model_index(network, scheduler, codec, info, prompts)
        scheduler.save_pretrained(new / "scheduler")
        if isinstance(codec, Vae):
            _save_half(codec.vae, new / "vae")
        if prompts:
            for suffix, encoder, tokenizer in zip(("", "_2"), prompts.encoders, prompts.tokenizers, strict=False):
                _save_half(encoder, new / f"text_encoder{suffix}")
                tokenizer.save_pretrained(new / f"tokenizer{suffix}")
        if index:
            (new / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
        replace(info, sha256=_digests(new), lora=lora).write(new)


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, whose content takes the place of the old when the block ends without error.

    What is not published (training/) stays. The network goes first and the manifest, with the digests of all parts,
    comes last: killed at any moment, the folder is the old one, the new one, or refused; never a mixture that opens.
    """
    folder = folder.resolve()
    new = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)  # left behind by a killed process
    new.mkdir(parents=True)
    try:
        yield new
        folder.mkdir(exist_ok=True)
        for name in (*PARTS, ADAPTER, "model_index.json", "report.json", "golden.json"):  # they tell of the old weights
            _remove(folder / name)
        for item in sorted(new.iterdir(), key=lambda item: item.name == MANIFEST):
            if item.is_dir():
                _remove(folder / item.name)
            item.replace(folder / item.name)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _save_half(network: nn.Module, folder: Path) -> None:
    # nn.Module.to, not diffusers' own: that one warns about every cast, also where no module needs float32.
    saved: Any = nn.Module.to(copy.deepcopy(network), "cpu", torch.float16)
    saved.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):  # safetensors writes for the owner alone; a server may be another user
        file.chmod(0o644)
    config = _json(folder / "config.json")
    config.pop("_name_or_path", None)  # where the teacher lay on this machine
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _save_adapter(network: nn.Module, file: Path) -> None:
    from safetensors.torch import save_file

    state = {key: value.to("cpu", torch.float16) for key, value in lora_state(network).items()}
    save_file(state, file, {"format": "pt"})
    file.chmod(0o644)


def verify(folder: Path, info: Info) -> None:
    """Raise BadInput if a part listed in the manifest is missing or is not the file that was published."""
    parts = sorted(p for part in PARTS for p in folder.glob(f"{part}/**/*.safetensors"))
    for path in (*parts, *folder.glob(ADAPTER)):
        if str(path.relative_to(folder)) not in info.sha256:
            raise BadInput(str(path), "a file that is not listed", "the files listed in fewstep.json")
    for name, digest in info.sha256.items():
        path = folder / name
        if not path.is_file():
            raise BadInput(str(path), "missing", "the file listed in fewstep.json")
        if _sha256(path) != digest:
            raise BadInput(str(path), "a file with another sha256", f"sha256 {digest} as listed in fewstep.json")


def _digests(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): _sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _local(path_or_hub_id: str | Path) -> Path:
    """A folder on disk: the given one, or the local copy of a hub id: JSON and safetensors, never code."""
    path = Path(path_or_hub_id)
    if path.is_dir():
        return path
    is_hub_id = isinstance(path_or_hub_id, str) and path_or_hub_id.count("/") == 1 and path_or_hub_id[0] not in "./~"
    if not is_hub_id or path.parent.is_dir():  # weights/misspelt is no hub id where there is a weights/
        raise BadInput("model", str(path_or_hub_id), "an existing folder or a hub id of the form owner/name")
    from huggingface_hub import snapshot_download

    weights = "diffusion_pytorch_model"
    try:
        return Path(
            snapshot_download(
                str(path_or_hub_id),
                allow_patterns=[
                    "*.json",
                    "tokenizer*/*.txt",
                    "text_encoder*/model*.safetensors",
                    f"*{weights}.safetensors",
                    f"*{weights}-*.safetensors",
                    ADAPTER,
                ],
            )
        )
    except Exception as error:  # the hub client raises many kinds; all mean that the model cannot be had
        raise BadInput(
            "model", path_or_hub_id, f"an existing folder or a reachable hub id ({type(error).__name__})"
        ) from None


def _part(folder: Path, index: dict[str, Any], name: str) -> Path:
    """Where a part of a pipeline lies: its own folder or, in the first pipelines of diffusers, the root."""
    return folder if name in index and not (folder / name).is_dir() else folder / name


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BadInput(str(path), str(error), "valid JSON") from None
    if not isinstance(value, dict):
        raise BadInput(str(path), type(value).__name__, "a JSON object")
    return value


def _load(folder: Path, classes: tuple[str, ...], dtype: torch.dtype = torch.float32) -> nn.Module:
    """One network of a folder, whole: diffusers itself would fill what is missing with random numbers."""
    import diffusers

    kind = _json(folder / "config.json").get("_class_name")
    if kind not in classes:
        raise BadInput(str(folder / "config.json"), kind, "a network of class " + ", ".join(classes))
    network: nn.Module
    try:
        network, report = getattr(diffusers, kind).from_pretrained(
            folder, use_safetensors=True, low_cpu_mem_usage=False, torch_dtype=dtype, output_loading_info=True
        )
    except Exception as error:  # damaged safetensors surface as several private exception types
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise BadInput(str(folder), reason, "readable safetensors weights") from None
    if report["missing_keys"] or type(network).__name__ == "Transformer2DModel":
        reason = f"{type(network).__name__} without {sorted(report['missing_keys'])[:3]}"
        raise BadInput(str(folder), reason, "a whole network of class " + ", ".join(classes))
    return network


def _schedule(folder: Path, scheduler: dict[str, Any]) -> NoiseSchedule:
    from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers

    kind = scheduler.get("_class_name", "no scheduler")
    known = {k.name for k in KarrasDiffusionSchedulers} - {"EDMEulerScheduler"} | {"LCMScheduler"}
    if kind not in known and not kind.startswith("FlowMatch"):  # any other has another clock, and would be read wrongly
        raise BadInput(str(folder), kind, "scheduler_config.json of FlowMatch... or " + ", ".join(sorted(known)))
    try:
        return from_diffusers({key: value for key, value in scheduler.items() if key in ("_class_name", *BETAS)})
    except BadInput:
        raise
    except Exception as error:  # whatever diffusers' constructor makes of wrong options
        raise BadInput(str(folder), f"{type(error).__name__}: {error}", "options of diffusers' DDIMScheduler") from None


def _prediction(folder: Path, scheduler: dict[str, Any]) -> Prediction:
    kind = scheduler.get("_class_name", "")
    if "FlowMatch" in kind:
        return "flow"
    given = scheduler.get("prediction_type", "epsilon")
    if given not in _PREDICTIONS:
        raise BadInput(str(folder / "scheduler"), f"{kind} with {given}", "prediction_type " + ", ".join(_PREDICTIONS))
    return _PREDICTIONS[given]


def _codec(folder: Path, info: Info | None, dtype: torch.dtype = torch.float32) -> ImageCodec:
    for part in ("vae", "vqvae"):
        if (folder / part / "config.json").is_file():
            return Vae(_load(folder / part, ("AutoencoderKL",), dtype))
    return PixelUnshuffle(info.patch if info else 1)


GUIDANCE = {"StableDiffusionPipeline": 7.5, "StableDiffusionXLPipeline": 5.0}  # diffusers' defaults


def _describe(folder: Path, network: nn.Module, codec: ImageCodec, index: dict[str, Any]) -> Info:
    """What can be told of a pipeline that is not ours."""
    config: Any = network.config
    side = config.sample_size
    if not side:
        raise BadInput(f"{folder}: sample_size", side, "the size the network was trained at")
    height, width = (side, side) if isinstance(side, int) else side
    classes = config.get("num_class_embeds") or config.get("num_embeds_ada_norm")
    names = index.get("id2label") or {}
    labels = [str(names.get(str(i), i)) for i in range(classes)] if classes else []
    extra = config.in_channels - codec.channels(3)
    task = "class-to-image" if labels else "image"
    if type(network).__name__ == "UNet2DConditionModel":
        task = "text-to-image"
    elif isinstance(codec, PixelUnshuffle) and extra > 0:
        task = "sar-to-optical"
    return Info(
        name=folder.name,
        task=task,
        method="diffusion",
        role="teacher",
        data=folder.name,
        sampler="ddim",
        size=(height * codec.factor, width * codec.factor),
        default_steps=50,
        labels=labels,
        codec=codec.kind,
        patch=codec.factor,
        guidance_scale=GUIDANCE.get(index.get("_class_name", ""), 1.0),
        sar={"channels": extra, "range": [-1, 1]} if task == "sar-to-optical" else None,
    )


def _check_fit(folder: Path, network: nn.Module, codec: ImageCodec, info: Info, prompts: PromptEncoder | None) -> None:
    """Refuse a network that the manifest does not describe; it would fail later, deep inside torch."""
    _check_words(folder, network, info, prompts)
    config: Any = network.config
    channels, sar, rows = codec.channels(3), info.sar_channels, class_rows(network)
    if (info.codec == Vae.kind) != isinstance(codec, Vae) or (sar and isinstance(codec, Vae)):
        raise BadInput(f"{folder}: codec", codec.kind, f"{info.codec} as in fewstep.json; no VAE for SAR")
    expected = channels + info.condition_channels(codec)
    if config.in_channels != expected or (config.out_channels or expected) not in (channels, 2 * channels):
        given = f"{config.in_channels} in, {config.out_channels} out"
        raise BadInput(f"{folder}: channels", given, f"{expected} in, {channels} out (or twice that: learned variance)")
    classes = len(info.labels) if info.task == "class-to-image" else 0
    if config.get("class_embed_type") or rows not in ((classes, classes + 1) if classes else (0,)):
        raise BadInput(
            f"{folder}: classes", config.get("class_embed_type") or rows, f"an embedding of {classes} classes"
        )


def _check_words(folder: Path, network: nn.Module, info: Info, prompts: PromptEncoder | None) -> None:
    config: Any = network.config
    if (info.task == "text-to-image") != (prompts is not None):
        raise BadInput(f"{folder}: task", info.task, "text-to-image for a UNet2DConditionModel, and for no other")
    if prompts is None:
        return
    if config.get("time_cond_proj_dim"):
        raise BadInput(f"{folder}: time_cond_proj_dim", config.time_cond_proj_dim, "null: no embedded guidance scale")
    kind = config.get("addition_embed_type")
    if config.cross_attention_dim != prompts.width or kind != ("text_time" if prompts.xl else None):
        given = f"{config.cross_attention_dim} wide, {kind} besides"
        raise BadInput(f"{folder}: unet", given, f"a network that is told what its encoders say, {prompts.width} wide")


def class_rows(network: nn.Module) -> int:
    """Rows of a network's class embedding. DiT has one more than the classes it counts, for the null class."""
    config: Any = network.config
    counted = config.get("num_embeds_ada_norm")
    return counted + 1 if counted else config.get("num_class_embeds") or 0


def guided(denoiser: Denoiser | Routed, info: Info, guidance_scale: float) -> nn.Module:
    """The denoiser under classifier-free guidance; 1 is the denoiser itself. The null class follows the last label."""
    if guidance_scale == 1:
        return denoiser
    if info.task == "text-to-image":  # what no words say comes with the condition
        return Guided(denoiser, guidance_scale, null_label=-1)
    if not info.labels or class_rows(denoiser.network) <= len(info.labels):
        raise BadInput("guidance_scale", guidance_scale, f"1: {info.name} has no null class to be guided by")
    return Guided(denoiser, guidance_scale, null_label=len(info.labels))


def size_multiple(network: nn.Module, codec: ImageCodec) -> int:
    """H and W in pixels must be multiples of this: the codec's factor times the network's patch or downsampling."""
    config: Any = network.config
    return codec.factor * (config.get("patch_size") or 2 ** (len(config.block_out_channels) - 1))


def _model_index(
    network: nn.Module, scheduler: Any, codec: ImageCodec, info: Info, prompts: PromptEncoder | None
) -> dict[str, Any] | None:
    """The stock pipeline that draws this folder's pictures; None where there is none and parts open one by one.

    For U-Nets it is `ConsistencyModelPipeline`: the only one that hands labels to a UNet2DModel, and it works with
    LCM's and DDIM's schedulers. It knows neither guidance nor a learned variance.
    """
    import diffusers

    config: Any = network.config
    parts, more = {"scheduler": scheduler}, dict[str, Any]()
    if prompts is not None and isinstance(codec, Vae):
        kind, parts["unet"], parts["vae"] = "StableDiffusionPipeline", network, codec.vae
        for suffix, encoder, tokenizer in zip(("", "_2"), prompts.encoders, prompts.tokenizers, strict=False):
            more[f"text_encoder{suffix}"] = ["transformers", type(encoder).__name__]
            more[f"tokenizer{suffix}"] = ["transformers", type(tokenizer).__name__]
        if prompts.xl:
            kind, more["force_zeros_for_empty_prompt"] = "StableDiffusionXLPipeline", prompts.zeros_for_empty
        else:
            more |= {part: [None, None] for part in ("safety_checker", "feature_extractor")}
            more["requires_safety_checker"] = False
    elif isinstance(codec, Vae) and type(network).__name__ == "DiTTransformer2DModel":
        kind, parts["transformer"], parts["vae"] = "DiTPipeline", network, codec.vae
    elif (
        isinstance(codec, PixelUnshuffle)
        and codec.factor == 1
        and config.in_channels == config.out_channels
        and info.guidance_scale == 1
        and hasattr(scheduler, "scale_model_input")
    ):
        kind, parts["unet"] = "ConsistencyModelPipeline", network
    else:
        return None
    named = {name: ["diffusers", type(part).__name__] for name, part in parts.items()}
    return {"_class_name": kind, "_diffusers_version": diffusers.__version__, **more, **named}


def _scheduler(schedule: NoiseSchedule, prediction: Prediction, info: Info) -> Any:
    """The stock scheduler that walks the same path as `Generator`."""
    import diffusers

    if isinstance(schedule, RectifiedFlow) and prediction == "flow":
        return diffusers.FlowMatchEulerDiscreteScheduler()
    kinds = {v: k for k, v in _PREDICTIONS.items()}
    if not isinstance(schedule, VariancePreserving) or prediction not in kinds:
        given = f"{schedule.name} with {prediction}"
        raise BadInput(
            "schedule, prediction", given, f"flow with flow, or vp with {', '.join(kinds)}: what diffusers samples"
        )
    config = {
        **schedule.betas_config,
        "num_train_timesteps": _clock(schedule),
        "prediction_type": kinds[prediction],
        "clip_sample": False,
    }
    if info.sampler == "consistency":
        return diffusers.LCMScheduler(**config, original_inference_steps=_lcm_points(schedule))
    # One step at t_min, as BOOT's students are called, is what "leading" makes of one step.
    spacing = "leading" if info.step_times == {1: [schedule.t_min]} else "trailing"
    return diffusers.DDIMScheduler(**config, timestep_spacing=spacing, set_alpha_to_one=True)


LCM_POINTS = 50  # LCMScheduler picks its times from this many points (Luo et al. 2023)


def _clock(schedule: VariancePreserving) -> int:
    return int(schedule.t_max) + 1


def _lcm_points(schedule: VariancePreserving) -> int:
    return min(LCM_POINTS, _clock(schedule))


def lcm_times(schedule: VariancePreserving, steps: int) -> list[float]:
    """The times stock LCMScheduler visits in so many steps, descending. Raises BadInput for none or over 50."""
    import diffusers

    if not 1 <= steps <= _lcm_points(schedule):
        raise BadInput("steps", steps, f"1 to {_lcm_points(schedule)}")
    scheduler: Any = diffusers.LCMScheduler(
        num_train_timesteps=_clock(schedule), original_inference_steps=_lcm_points(schedule)
    )
    scheduler.set_timesteps(steps)
    return [float(t) for t in scheduler.timesteps]
