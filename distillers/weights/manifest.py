"""The manifest of a weights folder, `fewstep.json`: what stock pipelines have no place for, and the files' SHA-256."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from distillers.errors import BadInput
from distillers.models.clusters import Clusters
from distillers.models.codec import ImageCodec, PixelUnshuffle
from distillers.models.conditions import KINDS, ClassLabel, Condition, Prompt, SarPicture
from distillers.models.radiometry import Radiometry
from distillers.models.schedule import Prediction
from distillers.models.text import PromptEncoder

MANIFEST = "fewstep.json"
ADAPTER = "pytorch_lora_weights.safetensors"  # diffusers' own name
COMFY = "comfyui_lora.safetensors"  # the same, with the keys of ComfyUI and of Kohya's scripts
AUTOENCODER = "autoencoder"
TASKS = (*KINDS, AUTOENCODER)
SAMPLERS = ("consistency", "ddim")
ROLES = ("teacher", "student")
STUDENTS = "students"
TEXT = tuple(f"{part}{suffix}" for part in ("text_encoder", "tokenizer") for suffix in ("", "_2", "_3"))
SAFETY = ("safety_checker", "feature_extractor")
PARTS = ("unet", "transformer", STUDENTS, "vae", *TEXT, *SAFETY, "scheduler")  # the network first: see `staged`
EDM_PREDICTIONS: dict[str, Prediction] = {"epsilon": "edm", "v_prediction": "edm-v"}  # of diffusers' EDM schedulers
LARGEST_JSON = 16 << 20  # bytes; the centres of many clusters of prompts take a few million
DEEPEST_JSON = 64  # levels
DIFFUSERS_PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}


@dataclass(frozen=True, kw_only=True)
class Lora:
    """The adapter of a folder; its alpha equals its rank, whatever it was trained with: see `lora_state`.

    A folder without the network that it changes, as those of text to image are, says which that is by `sha256`.
    """

    rank: int
    base: str | None  # name of the teacher whose network it changes
    id: str | None = None  # the teacher's on the hub, if it comes from there
    revision: str | None = None
    sha256: str | None = None  # `network_digest` of the teacher's network
    network: str | None = None  # the class of the teacher's network in diffusers


@dataclass(frozen=True, kw_only=True)
class Info:
    """The content of `fewstep.json`. Sizes are (height, width) in pixels; times, in the schedule's unit, descend."""

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
    channels: int = 3  # bands of its pictures: 3 = RGB, 1 = grey; more are shown by their first three
    guidance_scale: float = 1.0
    teacher: str | None = None
    sar: dict[str, Any] | None = None  # `Radiometry.to_dict` of its SAR input
    shares: list[list[int]] = field(default_factory=list)  # labels of each student; empty = one network has all
    clusters: Clusters | None = None  # of prompts, for several students of text to image
    trained_with: list[str] = field(default_factory=list)  # feature spaces that a loss compared in: no report may
    lora: Lora | None = None  # set by `write_pipeline` if the folder holds an adapter
    sha256: dict[str, str] = field(default_factory=dict)
    format: int = 1

    @classmethod
    def read(cls, folder: Path) -> Info:
        """Read and check a manifest. Raises BadInput naming what is wrong with it."""
        from pydantic import TypeAdapter, ValidationError

        path = folder / MANIFEST
        try:
            raw = load_json(path)
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
        for name in self.sha256:
            if not inside(path.parent, path.parent / name) or Path(name).is_absolute() or ".." in Path(name).parts:
                raise BadInput(f"{path}: sha256", name, "paths of files in this folder")
        if not all(len(times) == steps for steps, times in self.step_times.items()):
            raise BadInput(f"{path}: step_times", self.step_times, "as many times as steps")
        if self.step_times and self.default_steps not in self.step_times:
            raise BadInput(f"{path}: default_steps", self.default_steps, f"one of {sorted(self.step_times)}")
        if min(self.patch, self.channels, *self.size) < 1 or not isinstance(self.sar_channels, int):
            given = (self.patch, self.channels, self.size, self.sar)
            raise BadInput(f"{path}: patch, channels, size, sar", given, "whole numbers above 0")
        if self.channels != 3 and self.task == "sar-to-optical":
            raise BadInput(f"{path}: channels", self.channels, f"3: {self.task} draws red, green and blue")
        if self.shares:
            self._check_shares(f"{path}: shares")
        if self.clusters:
            self.clusters.check(f"{path}: clusters")
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
    def digest(self) -> str:
        """One SHA-256 of all files that the manifest lists, in hexadecimal: the same for the same weights."""
        return hashlib.sha256(json.dumps(self.sha256, sort_keys=True).encode()).hexdigest()

    @property
    def alone(self) -> bool:
        """Tell whether the folder holds an adapter without the network that it changes."""
        return self.lora is not None and self.lora.sha256 is not None

    @property
    def classes(self) -> list[int]:
        """The labels that the model draws, ascending: all, or a lone student's share."""
        return sorted(label for share in self.shares for label in share) or list(range(len(self.labels)))

    def condition(self, codec: ImageCodec, prompts: PromptEncoder | None = None) -> Condition:
        """Tell what the model is conditioned on, with all that is done with such conditions."""
        kind = KINDS.get(self.task, Condition)
        if kind is ClassLabel:
            return ClassLabel(self.name, self.labels, self.classes)
        if kind is SarPicture:
            return SarPicture(self.name, Radiometry.of(self.sar), codec, self.size)
        if kind is Prompt:
            return Prompt(self.name, prompts, self.size, guided=self.guidance_scale != 1)
        return Condition(self.name)

    @property
    def students(self) -> int:
        """How many networks the folder holds."""
        return len(self.shares) or (len(self.clusters.students) if self.clusters else 1)

    @property
    def part(self) -> list[int]:
        """The classes or clusters of prompts of a lone student of several; [] for any other model."""
        own = self.clusters.students if self.clusters else (self.shares or [[]])[0]
        return own if self.students == 1 else []

    def student_of(self, label: int | None) -> int:
        """Find the number of the student that draws a label."""
        return next((k for k, share in enumerate(self.shares) if label in share), 0)

    @property
    def sar_channels(self) -> int:
        """The pixel channels of the SAR input; 0 for models that take none."""
        return (self.sar or {}).get("channels", 1) if self.task == "sar-to-optical" else 0

    def write(self, folder: Path) -> None:
        """Write the manifest into a folder."""
        entries = asdict(self)
        for name in (
            "lora",
            "shares",
            "clusters",
            "trained_with",
        ):  # unknown to folders and readers older than they are
            if not entries[name]:
                del entries[name]
        if self.channels == 3:
            del entries["channels"]
        if self.lora:
            entries["lora"] = {k: v for k, v in entries["lora"].items() if v is not None or k == "base"}
        (folder / MANIFEST).write_text(json.dumps(entries, indent=2) + "\n")


def find(root: Path) -> dict[str, Path]:
    """Find the published folders below root, by name; hidden ones are not complete: see `staged`."""
    folders = (p.parent for p in sorted(Path(root).glob(f"*/{MANIFEST}")))
    return {folder.name: folder for folder in folders if not folder.name.startswith(".")}


def base_beside(folder: Path) -> Path | None:
    """Find the base of a folder that holds an adapter alone in the folder of its name beside it, if it is there."""
    try:
        lora = read_json(folder / MANIFEST).get("lora") or {}
    except BadInput:
        return None
    alone = isinstance(lora, dict) and lora.get("sha256") and isinstance(lora.get("base"), str)
    name = Path(lora["base"]).name if alone else ""  # a base is named by its folder, never by a path
    place = folder.absolute().parent / name if name not in ("", "..") and name == lora["base"] else None
    return place if place and place.is_dir() else None


def draws(folder: Path) -> bool:
    """Tell whether a published folder draws pictures. All but autoencoders do; `read_pipeline` refuses a broken one."""
    try:
        return bool(read_json(folder / MANIFEST).get("task") != AUTOENCODER)
    except BadInput:
        return True


def verify(folder: Path, info: Info) -> None:
    """Raise BadInput if a part listed in the manifest is missing or is not the file that was published."""
    parts = sorted(p for part in PARTS for p in folder.glob(f"{part}/**/*.safetensors"))
    for path in (*parts, *folder.glob(ADAPTER), *folder.glob(COMFY)):
        if str(path.relative_to(folder)) not in info.sha256:
            raise BadInput(str(path), "a file that is not listed", "the files listed in fewstep.json")
    for name, digest in info.sha256.items():
        path = folder / name
        if not path.is_file():
            raise BadInput(str(path), "missing", "the file listed in fewstep.json")
        if sha256_of(path) != digest:
            raise BadInput(str(path), "a file with another sha256", f"sha256 {digest} as listed in fewstep.json")


def digests(folder: Path) -> dict[str, str]:
    """Compute the SHA-256 of every file below a folder, by its path relative to it."""
    return {str(p.relative_to(folder)): sha256_of(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def sha256_of(path: Path) -> str:
    """Compute a file's SHA-256, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file; {} where there is no file. Raises BadInput if it holds anything else."""
    if not path.is_file():
        return {}
    try:
        value: dict[str, Any] = load_json(path, infinite=True)
    except (OSError, ValueError) as error:
        raise BadInput(str(path), str(error), "valid JSON") from None
    if not isinstance(value, dict):
        raise BadInput(str(path), type(value).__name__, "a JSON object")
    return value


def load_json(path: Path, infinite: bool = False) -> Any:
    """Read a JSON file, whoever has written it.

    Args:
        infinite: whether numbers may be infinite, as bounds in configurations of stock schedulers are.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: no JSON; a number that is not finite; more than 16 MiB, or more than 64 levels deep.
    """
    if not path.is_file():  # opening a pipe would wait for its other end
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    with path.open("rb") as file:
        text = file.read(LARGEST_JSON + 1)
    if len(text) > LARGEST_JSON:
        raise ValueError(f"more than {LARGEST_JSON} bytes")
    try:
        value = json.loads(text, parse_float=_finite, parse_constant=_bound if infinite else _finite)
    except RecursionError:
        raise ValueError(f"more than {DEEPEST_JSON} levels deep") from None
    level, depth = [value], 0
    while level := [inner for outer in level for inner in _inner(outer)]:
        depth += 1
        if depth > DEEPEST_JSON:
            raise ValueError(f"more than {DEEPEST_JSON} levels deep")
    return value


def _bound(text: str) -> float:
    return float(text) if text.endswith("Infinity") else _finite(text)


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is no finite number")
    return value


def _inner(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def inside(folder: Path, path: Path) -> bool:
    """Tell whether a path leads into a folder, wherever links on the way lead."""
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):  # a circle of links; a name with a NUL
        return False
