"""A recipe describes a job: a TOML file, read, checked, overridden and written. It opens neither data nor networks.

name = "eurosat-consistency"        # the folder it makes
method = "consistency"              # a file in distillers/methods
teacher = "weights/eurosat-teacher" # folder or hub id; absent for methods that learn from data alone
[data]                              # kind = "images" | "captions" | "pairs" | "shapes" ..., and that kind's options
[method options under the method's own name, e.g. [consistency]]
[train]                             # TrainSettings
[student]                           # StudentSettings: what the student predicts, where its sampling starts
[lora]                              # LoraSettings: all that learns is an adapter on the teacher's frozen network
[model]                             # only for "diffusion": task, patch or autoencoder, prediction, schedule, network
"""

from __future__ import annotations

import copy
import tomllib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import tomli_w

from distillers import methods
from distillers.errors import BadInput, checked
from distillers.models.lora import LoraSettings
from distillers.models.schedule import Prediction
from distillers.training.distiller import Distiller
from distillers.training.head import StudentSettings
from distillers.training.settings import TrainSettings

SHIPPED = Path(__file__).parents[1] / "recipes"
NAMES = (
    "name",
    "method",
    "teacher",
    "path",
    "autoencoder",
    "start",
    "reward",
    "pairs",
)  # of what lies on disk: strings, always
LONGEST_NAME = 100  # bytes; others are made of it: NAME-student-1, .NAME.new


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The [model] table describes the untrained network that a method such as "diffusion" trains."""

    task: Literal["image", "class-to-image", "sar-to-optical", "text-to-image"] = "image"
    patch: int = 1  # pixel-unshuffle factor
    channels: int = 3  # bands of its pictures: 3 = RGB, 1 = grey
    autoencoder: str | None = None  # in whose latents it works, in place of `patch`: a folder or hub id with a vae/
    prediction: Prediction = "v"
    schedule: dict[str, Any] = field(default_factory=lambda: {"name": "vp"})
    network: dict[str, Any] = field(default_factory=dict)  # options of diffusers' UNet2DModel, or with text the other
    text: dict[str, Any] = field(default_factory=dict)  # of text-to-image: `TextSettings`
    sar: dict[str, Any] | None = None
    start: str | None = None  # a folder or hub id whose weights it begins with; layers that this lacks stay random

    def __post_init__(self) -> None:
        for name in ("patch", "channels"):
            if getattr(self, name) < 1:
                raise BadInput(f"model.{name}", getattr(self, name), "1 or more")
        if self.text and self.task != "text-to-image":
            raise BadInput("model.text", self.text, 'absent: only task = "text-to-image" reads text')
        if self.task == "text-to-image" and self.autoencoder is None:
            raise BadInput("model.autoencoder", None, "a folder or hub id: text-to-image pipelines work in latents")
        if self.autoencoder is not None and self.patch > 1:
            raise BadInput("model.patch", self.patch, "absent: the autoencoder has its own factor")
        if self.autoencoder is not None and self.task == "sar-to-optical":
            raise BadInput("model.autoencoder", self.autoencoder, f"absent for {self.task}: no autoencoder knows SAR")
        sampled = {"vp": ("x0", "eps", "v"), "edm": ("edm", "edm-v")}  # by diffusers' schedulers
        name = self.schedule.get("name", "vp")
        if name not in sampled:
            raise BadInput("model.schedule.name", name, "vp or edm, which diffusers' schedulers can sample")
        if self.prediction not in sampled[name]:
            raise BadInput("model.prediction", self.prediction, f"{', '.join(sampled[name])} with the schedule {name}")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A checked description of a job. `Recipe.load` and `Recipe.from_table` build one."""

    name: str
    method: str
    data: dict[str, Any]
    teacher: str | None = None
    options: dict[str, Any] = field(default_factory=dict)  # the method's own table
    train: dict[str, Any] = field(default_factory=dict)
    student: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] | None = None

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
        """Check a table and build the recipe. Raises BadInput as `load` does."""
        method = table.get("method")
        kind = methods.find(method) if isinstance(method, str) else None
        if kind is None:
            raise BadInput("method", method, ", ".join(methods.names()))
        assert isinstance(method, str)
        known = {"name", "method", "teacher", "lora", "data", "train", "student", "model", method, "versions"}
        for key in table:
            if key not in known:
                raise BadInput(key, table[key], "one of " + ", ".join(sorted(known - {"versions"})))
        name = table.get("name")
        if not isinstance(name, str) or not name.isprintable() or not 0 < len(name.encode()) <= LONGEST_NAME:
            raise BadInput("name", name, f"the name of the folder to make, {LONGEST_NAME} bytes at most")
        if "/" in name or "\\" in name or name.startswith("."):
            raise BadInput("name", name, "a name without / and \\, and without a dot at its start")
        teacher, named = table.get("teacher"), kind.starts_from == "teacher"
        if not named and teacher is not None:
            raise BadInput("teacher", teacher, f"absent: {method} trains from data")
        if named and not (isinstance(teacher, str) and teacher):
            raise BadInput("teacher", teacher, "a folder or hub id")
        recipe = cls(
            name=name,
            method=method,
            teacher=teacher,
            data=_table(table, "data"),
            options=_table(table, method),
            train=_table(table, "train"),
            student=_table(table, "student"),
            model=_table(table, "model"),
            lora=_table(table, "lora") if "lora" in table else None,
        )
        (
            recipe.distiller(),
            recipe.settings(),
            recipe.student_settings(),
            recipe.model_settings(),
            recipe.lora_settings(),
        )  # refuse wrong keys before anything is opened
        return recipe

    def table(self) -> dict[str, Any]:
        """Build the TOML table that `from_table` reads."""
        raw = asdict(self)
        options = raw.pop("options")
        table = {k: v for k, v in raw.items() if v not in (None, {})}
        return {**table, **({self.method: options} if options else {})}

    def inputs(self) -> list[str]:
        """List all that the recipe names to be read: folders, hub ids, files."""
        return list(_named(self.table(), NAMES[2:]))

    def write(self, file: Path, versions: dict[str, Any]) -> None:
        """Write the TOML file, with a table of the package versions that the job ran with."""
        file.write_text(tomli_w.dumps({**self.table(), "versions": versions}))

    # --- typed views of the tables -----------------------------------------------------------------------------------
    def distiller(self) -> Distiller:
        """Build the method with the options of its own table."""
        kind = methods.find(self.method)
        for where, options in ((self.method, self.options), (f"{self.method}.options", self.options.get("options"))):
            if isinstance(options, dict) and "lora_rank" in options:  # its name until all methods had adapters
                allowed = (
                    f"absent: lora = {{ rank = {options['lora_rank']} }}, above all tables, says it for any method"
                )
                raise BadInput(f"{where}.lora_rank", options["lora_rank"], allowed)
        return kind(**checked(kind, self.options, self.method))

    def settings(self) -> TrainSettings:
        """Build the settings of the [train] table."""
        return TrainSettings(**checked(TrainSettings, self.train, "train"))

    def student_settings(self) -> StudentSettings:
        """Build the settings of the [student] table."""
        if self.student and methods.find(self.method).starts_from != "teacher":
            raise BadInput("student", self.student, f"absent: {self.method} has no teacher whose student it makes")
        return StudentSettings(**checked(StudentSettings, self.student, "student"))

    def model_settings(self) -> ModelSettings:
        """Build the settings of the [model] table."""
        if self.model and methods.find(self.method).starts_from != "model":
            builders = " or ".join(f'"{name}"' for name in methods.names() if methods.find(name).starts_from == "model")
            raise BadInput("model", sorted(self.model), f"absent: only method = {builders} builds a network")
        return ModelSettings(**checked(ModelSettings, self.model, "model"))

    def lora_settings(self) -> LoraSettings | None:
        """Build the settings of the [lora] table; None where it is absent, and whole networks are trained."""
        if self.lora is None:
            return None
        if self.lora and methods.find(self.method).starts_from != "teacher":
            raise BadInput(
                "lora", self.lora, f"absent: {self.method} has no teacher whose network adapters could change"
            )
        if not self.lora:
            raise BadInput("lora", self.lora, "a table such as { rank = 16 }, or absent")
        return LoraSettings(**checked(LoraSettings, self.lora, "lora"))

    # --- jobs of several trainings -----------------------------------------------------------------------------------
    def parts(self) -> list[Recipe]:
        """Split the job into recipes of one training each; each is named after the options that tell it apart."""
        whole, parts = self.whole(), self.distiller().parts()
        return [
            replace(
                self,
                name=whole.name + "".join(f"-{key}-{value}" for key, value in part.items()),
                options={**self.options, **part},
            )
            for part in parts
        ]

    def named(self) -> Recipe:
        """Name a recipe of one part after that part, such as NAME-student-1; a whole job keeps its name."""
        parts = self.parts()
        return parts[0] if len(parts) == 1 else self

    def whole(self) -> Recipe:
        """Return the recipe of the job that this is a part of; of a whole job that is itself."""
        parts = self.distiller().parts()
        if len(parts) > 1:
            return self
        (part,) = parts
        suffix = "".join(f"-{key}-{value}" for key, value in part.items())
        options = {key: value for key, value in self.options.items() if key not in part}
        return replace(self, name=self.name.removesuffix(suffix), options=options)


def shipped() -> list[str]:
    """List the names of the recipes inside the package."""
    return sorted(p.stem for p in SHIPPED.glob("*.toml"))


def read_toml(file: Path) -> dict[str, Any]:
    """Read the table in a TOML file. Raises BadInput if it is none."""
    try:
        return tomllib.loads(file.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(str(file), str(error), "valid TOML") from None


def _named(table: Any, keys: Collection[str]) -> Iterator[str]:
    """Find the strings under these keys in a table, and in the tables and lists within it."""
    for key, value in table.items() if isinstance(table, dict) else ():
        if key in keys and isinstance(value, str):
            yield value
        for inner in value if isinstance(value, list) else (value,):
            yield from _named(inner, keys)


def value_of(key: str, text: str) -> Any:
    """Read the value of an option from a command line: as in TOML, but bare words, and all that names, are strings."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return text if key in NAMES and not isinstance(value, str) else value


def _read(path: str | Path) -> dict[str, Any]:
    """Read a recipe's file, or the shipped one of this name."""
    file = Path(path)
    if not file.is_file() and (SHIPPED / f"{path}.toml").is_file():
        file = SHIPPED / f"{path}.toml"
    if not file.is_file():
        raise BadInput("recipe", str(path), "a TOML file or one of " + ", ".join(shipped()))
    return read_toml(file)


def overridden(table: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Copy a recipe's table with some `key=value` set; BadInput for what is none."""
    changed = copy.deepcopy(table)
    for override in overrides:
        _override(changed, override)
    return changed


def _override(table: dict[str, Any], override: str) -> None:
    """Set one `key=value` in the table, where key is a path such as train.batch."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise BadInput("override", override, "key=value, for example train.batch=32")
    *path, last = key.split(".")
    for part in path:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise BadInput(key, override, f"a key below a table; {part} is a value")
    table[last] = value_of(last, text)


def _table(table: dict[str, Any], key: str) -> dict[str, Any]:
    """Return the sub-table of this key, {} where it is absent. Raises BadInput if it is a plain value."""
    value = table.get(key, {})
    if not isinstance(value, dict):
        raise BadInput(key, value, f"a table [{key}]")
    return value
