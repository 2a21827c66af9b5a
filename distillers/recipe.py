"""Recipe: one description of a job. TOML file <-> dataclass <-> what is written into the weights folder.

name = "eurosat-consistency"        # the folder it makes
method = "consistency"              # a file in distillers/methods
teacher = "weights/eurosat-teacher" # folder or hub id; absent for method = "diffusion"
[data]                              # kind = "images" | "pairs" | "shapes", and that kind's options
[method options under the method's own name, e.g. [consistency]]
[train]                             # TrainSettings
[model]                             # only for method = "diffusion": task, patch, prediction, schedule, network
"""

from __future__ import annotations

import tomllib
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

from distillers import methods
from distillers.codec import PixelUnshuffle
from distillers.data import ImageData, open_data
from distillers.distiller import Distiller
from distillers.errors import BadInput
from distillers.schedule import Prediction
from distillers.teacher import Teacher
from distillers.trainer import TrainSettings
from distillers.weights import Info

SHIPPED = Path(__file__).parent / "recipes"


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The [model] table: the untrained network that method = "diffusion" trains."""

    task: str = "image"  # image | class-to-image | sar-to-optical
    patch: int = 1  # pixel-unshuffle factor
    prediction: Prediction = "v"
    schedule: dict[str, Any] = field(default_factory=lambda: {"name": "vp"})
    network: dict[str, Any] = field(default_factory=dict)  # options of diffusers' UNet2DModel
    sar: dict[str, Any] | None = None


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
        if (method == "diffusion") == ("teacher" in table):
            allowed = "absent: diffusion trains from data" if method == "diffusion" else "a folder or hub id"
            raise BadInput("teacher", table.get("teacher"), allowed)
        recipe = cls(
            name=table["name"],
            method=method,
            teacher=table.get("teacher"),
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
        return kind(**_checked(kind, self.options, self.method))

    def settings(self) -> TrainSettings:
        return TrainSettings(**_checked(TrainSettings, self.train, "train"))

    def model_settings(self) -> ModelSettings:
        if self.model and self.method != "diffusion":
            raise BadInput("model", sorted(self.model), 'absent: only method = "diffusion" builds a network')
        return ModelSettings(**_checked(ModelSettings, self.model, "model"))

    def open_data(self) -> ImageData:
        options = dict(self.data)
        return open_data(options.pop("kind", "images"), **options)

    def open_teacher(self, data: ImageData, device: str = "cpu") -> Teacher:
        """The teacher of the recipe, described under the recipe's name; for diffusion an untrained one."""
        from dataclasses import replace

        if self.teacher is not None:
            teacher = Teacher.from_pretrained(self.teacher, device)
            named = teacher.info.name
            info = replace(teacher.info, name=self.name, method=self.method, role="student", teacher=named, sha256={})
            if info.task == "class-to-image" and data.labels and list(data.labels) != info.labels:
                raise BadInput("data", list(data.labels), f"the teacher's classes {info.labels}")
            return Teacher(teacher.denoiser, teacher.codec, info)
        model = self.model_settings()
        if model.task == "class-to-image" and not data.labels:
            raise BadInput("model.task", model.task, "image: the data have no class folders")
        info = Info(
            name=self.name,
            task=model.task,
            method=self.method,
            role="teacher",
            data=data.name,
            sampler="ddim",
            size=(data.size, data.size),
            labels=list(data.labels) if model.task == "class-to-image" else [],
            patch=model.patch,
            sar=(model.sar or {"channels": 1, "range": [-1, 1]}) if model.task == "sar-to-optical" else None,
        )
        return Teacher.random(info, model.network, model.schedule, model.prediction, PixelUnshuffle(model.patch))


def shipped() -> list[str]:
    """Names of the recipes inside the package."""
    return sorted(p.stem for p in SHIPPED.glob("*.toml"))


def _read(path: str | Path) -> dict[str, Any]:
    file = Path(path)
    if not file.is_file() and (SHIPPED / f"{path}.toml").is_file():
        file = SHIPPED / f"{path}.toml"
    if not file.is_file():
        raise BadInput("recipe", str(path), "a TOML file or one of " + ", ".join(shipped()))
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


def _checked(kind: type, options: dict[str, Any], where: str) -> dict[str, Any]:
    """Options with TOML's types brought to the dataclass's; unknown and wrongly typed keys refused by name."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    hints, known = get_type_hints(kind), {f.name for f in fields(kind)}
    checked = {}
    for key, value in options.items():
        if key not in known:
            raise BadInput(f"{where}.{key}", value, ", ".join(sorted(known)))
        try:
            checked[key] = TypeAdapter(hints[key], config=ConfigDict(strict=False)).validate_python(value)
        except ValidationError as error:
            raise BadInput(f"{where}.{key}", value, error.errors()[0]["msg"]) from None
    return checked
