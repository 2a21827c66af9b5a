"""Recipe: one description of a job. TOML file <-> dataclass <-> what is written into the weights folder.

name = "eurosat-consistency"        # the folder it makes
method = "consistency"              # a file in distillers/methods
teacher = "weights/eurosat-teacher" # folder or hub id; absent for "diffusion" and "autoencoder", which learn from data
[data]                              # kind = "images" | "pairs" | "shapes" | "preferences", and that kind's options
[method options under the method's own name, e.g. [consistency]]
[train]                             # TrainSettings
[model]                             # only for "diffusion": task, patch or autoencoder, prediction, schedule, network
"""

from __future__ import annotations

import tomllib
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from distillers import methods
from distillers.data import ImageData, open_data
from distillers.errors import BadInput
from distillers.generator import Generator
from distillers.models.codec import ImageCodec, PixelUnshuffle
from distillers.models.radiometry import Radiometry
from distillers.models.schedule import Prediction
from distillers.teacher import Teacher
from distillers.training.distiller import Distiller
from distillers.training.options import checked
from distillers.training.settings import TrainSettings
from distillers.weights.manifest import AUTOENCODER, Info
from distillers.weights.read import read_autoencoder

SHIPPED = Path(__file__).parents[1] / "recipes"


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The [model] table: the untrained network that method = "diffusion" trains."""

    task: Literal["image", "class-to-image", "sar-to-optical"] = "image"
    patch: int = 1  # pixel-unshuffle factor
    autoencoder: str | None = None  # in whose latents it works, in place of `patch`: a folder or hub id with a vae/
    prediction: Prediction = "v"
    schedule: dict[str, Any] = field(default_factory=lambda: {"name": "vp"})
    network: dict[str, Any] = field(default_factory=dict)  # options of diffusers' UNet2DModel
    sar: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.patch < 1:
            raise BadInput("model.patch", self.patch, "1 or more")
        if self.autoencoder is not None and self.patch > 1:
            raise BadInput("model.patch", self.patch, "absent: the autoencoder has its own factor")
        if self.autoencoder is not None and self.task == "sar-to-optical":
            raise BadInput("model.autoencoder", self.autoencoder, f"absent for {self.task}: no autoencoder knows SAR")
        if self.schedule.get("name", "vp") != "vp":
            raise BadInput("model.schedule.name", self.schedule["name"], "vp, which diffusers' schedulers can sample")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A job, checked. Build one with `Recipe.load`."""

    name: str
    method: str
    data: dict[str, Any]
    teacher: str | None = None
    options: dict[str, Any] = field(default_factory=dict)  # the method's own table
    train: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, path: str | Path, overrides: list[str] | None = None) -> Recipe:
        """Read a TOML file (or the name of a shipped recipe) and apply `key=value` overrides such as `train.batch=32`.

        Raises:
            BadInput: no such recipe, invalid TOML, an unknown or wrongly typed key - named, with what is allowed.
        """
        table = _read(path)
        for override in overrides or []:
            _override(table, override)
        return cls.from_table(table)

    @classmethod
    def from_table(cls, table: dict[str, Any]) -> Recipe:
        """Check a table and build the recipe."""
        method = table.get("method")
        kind = methods.find(method) if isinstance(method, str) else None
        if kind is None:
            raise BadInput("method", method, ", ".join(methods.names()))
        assert isinstance(method, str)
        known = {"name", "method", "teacher", "data", "train", "model", method, "versions"}
        for key in table:
            if key not in known:
                raise BadInput(key, table[key], "one of " + ", ".join(sorted(known - {"versions"})))
        if not isinstance(table.get("name"), str) or not table["name"]:
            raise BadInput("name", table.get("name"), "the name of the folder to make")
        teacher = table.get("teacher")
        if not kind.taught and teacher is not None:
            raise BadInput("teacher", teacher, f"absent: {method} trains from data")
        if kind.taught and not (isinstance(teacher, str) and teacher):
            raise BadInput("teacher", teacher, "a folder or hub id")
        recipe = cls(
            name=table["name"],
            method=method,
            teacher=teacher,
            data=_table(table, "data"),
            options=_table(table, method),
            train=_table(table, "train"),
            model=_table(table, "model"),
        )
        recipe.distiller(), recipe.settings(), recipe.model_settings()  # refuse wrong keys before anything is opened
        return recipe

    def table(self) -> dict[str, Any]:
        """The TOML table that `from_table` reads."""
        raw = asdict(self)
        options = raw.pop("options")
        table = {k: v for k, v in raw.items() if v not in (None, {})}
        return {**table, **({self.method: options} if options else {})}

    # --- what the parts of a job are built from ----------------------------------------------------------------------
    def distiller(self) -> Distiller:
        kind = methods.find(self.method)
        return kind(**checked(kind, self.options, self.method))

    def settings(self) -> TrainSettings:
        return TrainSettings(**checked(TrainSettings, self.train, "train"))

    def model_settings(self) -> ModelSettings:
        if self.model and self.method != "diffusion":
            raise BadInput("model", sorted(self.model), 'absent: only method = "diffusion" builds a network')
        return ModelSettings(**checked(ModelSettings, self.model, "model"))

    def open_data(self) -> ImageData:
        """All of it: which part of it the method learns from, `Distiller.data` says."""
        options = dict(self.data)
        return open_data(str(options.pop("kind", "images")), **options)

    def open_teacher(self, data: ImageData, device: str = "cpu") -> Teacher:
        """The teacher of the recipe, described under the recipe's name; an untrained one for diffusion, else none."""
        if self.teacher is not None:
            teacher = Teacher.from_pretrained(self.teacher, device)
            info = replace(
                teacher.info,
                name=self.name,
                method=self.method,
                role="student",
                data=data.name,
                teacher=teacher.info.name,
                sha256={},
            )
            if info.task == "class-to-image" and list(data.labels) != info.labels:
                numbered = info.labels == [str(i) for i in range(len(data.labels))]  # a pipeline that has no names
                if not numbered:
                    raise BadInput("data", list(data.labels), f"the teacher's classes {info.labels}")
                info = replace(info, labels=list(data.labels))
            if info.task not in (allowed := methods.find(self.method).tasks):
                raise BadInput("teacher", f"{self.teacher}, a teacher of {info.task}", " or ".join(allowed))
            return _fitting(Teacher(teacher.denoiser, teacher.codec, info), data)
        untrained = Info(
            name=self.name,
            task=AUTOENCODER,
            method=self.method,
            role="teacher",
            data=data.name,
            sampler="ddim",
            size=(data.size, data.size),
        )
        if methods.find(self.method).tasks == (AUTOENCODER,):
            return Teacher.absent(untrained)
        model = self.model_settings()
        if model.task == "class-to-image" and not data.labels:
            raise BadInput("model.task", model.task, "image: the data have no class folders")
        codec: ImageCodec = PixelUnshuffle(model.patch)
        seen: list[str] = []
        if model.autoencoder is not None:
            codec, about = read_autoencoder(model.autoencoder, device)
            seen = about.trained_with if about else []
        info = replace(
            untrained,
            task=model.task,
            labels=list(data.labels) if model.task == "class-to-image" else [],
            codec=codec.kind,
            patch=codec.factor,
            trained_with=seen,
            sar=_radiometry(model, data) if model.task == "sar-to-optical" else None,
        )
        torch.manual_seed(self.settings().seed)
        return _fitting(Teacher.random(info, model.network, model.schedule, model.prediction, codec), data)


def _radiometry(model: ModelSettings, data: ImageData) -> dict[str, Any]:
    """What the manifest will say of the SAR: as the data show it, with the recipe's own remarks."""
    return {**getattr(data, "radiometry", Radiometry()).to_dict(), **(model.sar or {})}


def _fitting(teacher: Teacher, data: ImageData) -> Teacher:
    """The teacher, if it can learn from or teach on these data; else BadInput."""
    if teacher.info.task == "sar-to-optical":
        if "sar" not in data.items([0]):
            raise BadInput("data", data.name, 'kind = "pairs": the task needs SAR')
        seen, shown = Radiometry.of(teacher.info.sar), getattr(data, "radiometry", None)
        if shown is not None and replace(seen, range=None) != replace(shown, range=None):
            raise BadInput("data.radiometry", shown.to_dict(), f"what the model sees: {seen.to_dict()}")
    multiple = Generator(teacher.denoiser, teacher.codec, teacher.info).size_multiple
    if data.size % multiple:
        raise BadInput("data.size", data.size, f"a multiple of {multiple}: the patch times the network's downsampling")
    return teacher


def shipped() -> list[str]:
    """Names of the recipes inside the package."""
    return sorted(p.stem for p in SHIPPED.glob("*.toml"))


def _read(path: str | Path) -> dict[str, Any]:
    file = Path(path)
    if not file.is_file() and (SHIPPED / f"{path}.toml").is_file():
        file = SHIPPED / f"{path}.toml"
    if not file.is_file():
        raise BadInput("recipe", str(path), "a TOML file or one of " + ", ".join(shipped()))
    return read_toml(file)


def read_toml(file: Path) -> dict[str, Any]:
    """The table in a TOML file. Raises BadInput if it is none."""
    try:
        return tomllib.loads(file.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(str(file), str(error), "valid TOML") from None


def _override(table: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise BadInput("override", override, "key=value, for example train.batch=32")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string
    *path, last = key.split(".")
    for part in path:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise BadInput(key, override, f"a key below a table; {part} is a value")
    table[last] = value


def _table(table: dict[str, Any], key: str) -> dict[str, Any]:
    value = table.get(key, {})
    if not isinstance(value, dict):
        raise BadInput(key, value, f"a table [{key}]")
    return value
