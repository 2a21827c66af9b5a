"""The inputs of a job: the data and the teacher that a recipe names, opened and checked against each other."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from distillers import methods
from distillers.data import ImageData, Part, open_data, options_of
from distillers.data.pixels import listed
from distillers.errors import BadInput, Notice, checked
from distillers.jobs.recipe import Recipe
from distillers.models.captions import unpack
from distillers.models.class_names import class_numbers
from distillers.models.codec import ImageCodec, PixelUnshuffle, fold_shift
from distillers.models.denoiser import Denoiser
from distillers.models.radiometry import Radiometry
from distillers.models.text import PromptEncoder
from distillers.teacher import Teacher
from distillers.training.text_encoder import TextSettings, untrained_encoder
from distillers.weights.manifest import AUTOENCODER, Info
from distillers.weights.network import size_multiple
from distillers.weights.read import read_autoencoder, read_info, read_pipeline


# --- data ------------------------------------------------------------------------------------------------------------
def load_data(
    recipe: Recipe, split: str | None = None, path: Path | None = None, drawn: Info | None = None
) -> ImageData:
    """Open the data of a recipe, all classes of it: `Distiller.data` says which part a training learns from.

    Pictures have the size and the channels that the teacher draws, where the recipe does not say otherwise, and classes
    the numbers that the teacher has for their names.

    Args:
        split: "test" or "train"; None for the one that the recipe trains on.
        path: where the data are now, if not where the recipe says.
        drawn: the manifest of the model that draws, in place of the teacher's.

    Raises:
        BadInput: no such data or option, a kind of data without this split, or folders of images without a size where
            no teacher says one.
    """
    options = dict(recipe.data)
    kind = str(options.pop("kind", "images"))
    options |= {} if split is None else {"split": split}
    options |= {} if path is None else {"path": str(path)}
    if drawn is None and recipe.teacher is not None:
        drawn = read_info(recipe.teacher)
    fitting = _as_drawn(drawn) if drawn is not None else {"channels": recipe.model_settings().channels}
    accepted = options_of(kind)
    options = {name: value for name, value in fitting.items() if name in accepted} | options
    if "size" not in options and kind in SIZED:
        raise BadInput("data.size", None, "a side in pixels, such as 64, or [height, width]: no teacher says it")
    return open_data(kind, labels=drawn.labels if drawn is not None else (), **options)


SIZED = ("images", "captions", "preferences", "prompts")  # kinds whose files have any size, so that none can be guessed


def _as_drawn(info: Info) -> dict[str, Any]:
    """Return the options of data whose pictures are like those of a model."""
    height, width = info.size
    return {"size": height if height == width else [height, width], "channels": info.channels}


def hold_out(recipe: Recipe) -> Recipe:
    """Let a training on a folder of images that names no split keep pictures for `fewstep evaluate`.

    Returns:
        The recipe with data.split = "train" where the images can be divided, else as it is. A Notice says which.

    Raises:
        BadInput: what the data refuse.
    """
    divided = replace(recipe, data={**recipe.data, "split": "train"}) if _whole_folder(recipe) else recipe
    try:
        test = load_data(divided, "test")
    except BadInput as error:
        load_data(recipe)  # refuses data that can be no training's
        text = f"no data are held out, so `fewstep evaluate` will need others by --path ({error})"
        warnings.warn(text, Notice, stacklevel=2)
        return recipe
    if divided is not recipe:
        text = f'{len(test)} pictures of {test.name} are held out for `fewstep evaluate`: data.split = "train"'
        warnings.warn(text, Notice, stacklevel=2)
    return divided


def _whole_folder(recipe: Recipe) -> bool:
    """Say whether the recipe learns from a folder of pictures without a split."""
    return recipe.data.get("kind", "images") in ("images", "captions") and recipe.data.get("split") is None


def held_out_data(recipe: Recipe) -> ImageData:
    """Open the test split of a recipe's data; the training data themselves where there is none."""
    try:
        return load_data(recipe, "test")
    except BadInput:
        return load_data(recipe)


def held_out(folder: Path, path: Path | None = None) -> tuple[ImageData, ImageData]:
    """Open the test and the train split of the data that a published folder was trained on.

    The data are those of its recipe, or those in `path`; of a student of some classes, their items alone.
    """
    if not (folder / "recipe.toml").is_file():
        raise BadInput("weights", str(folder), "a folder with a recipe.toml, which says what data it was trained on")
    recipe = Recipe.load(folder / "recipe.toml")
    if path is None and _whole_folder(recipe):
        allowed = "another folder of pictures, by --path: the model has learnt from all of these"
        raise BadInput("path", recipe.data.get("path"), allowed)
    info = Info.read(folder)
    test, train = load_data(recipe, "test", path, info), load_data(recipe, "train", path, info)
    if len(info.classes) == len(info.labels):
        return test, train
    names = [test.labels[label] for label in info.classes]
    return Part(test, names), Part(train, names)


def find_teacher(folder: Path) -> str | None:
    """Find the teacher of a published folder: beside it, by name, or where its recipe says; None where there is none.

    Returns:
        A folder or a hub id.
    """
    info, file = Info.read(folder), folder / "recipe.toml"
    if info.teacher and (beside := folder.absolute().parent / info.teacher).is_dir():
        return str(beside)
    return Recipe.load(file).teacher if file.is_file() else None


# --- teacher ---------------------------------------------------------------------------------------------------------
def load_teacher(recipe: Recipe, data: ImageData, device: str = "cpu") -> Teacher:
    """Open the teacher of a recipe; a method that learns from data alone gets an untrained network, or none.

    A teacher whose classes have numbers in place of names takes the names of the data's.

    Raises:
        BadInput: a teacher that cannot be opened, is not for the method's tasks, or does not fit the data.
    """
    if not data.pictured and recipe.distiller().needs_pictures:
        raise BadInput("data.kind", recipe.data.get("kind"), f"data with pictures: {recipe.method} learns from them")
    starts_from = methods.find(recipe.method).starts_from
    if starts_from == "data":
        return Teacher.absent(_untrained_info(recipe, data))
    if starts_from == "model":
        return _fitting(_untrained(recipe, data, device), data)
    assert recipe.teacher is not None
    teacher = Teacher.from_pretrained(recipe.teacher, device)
    info = teacher.info
    if info.task == "class-to-image" and list(data.labels) != info.labels:
        if info.labels != [str(i) for i in range(len(data.labels))]:
            numbers = class_numbers(info.labels)
            strange = [name for name in data.labels if name not in numbers] or list(data.labels)
            raise BadInput(
                "data", listed(strange, "class name"), f"all of the teacher's {listed(info.labels, 'class name')}"
            )
        info = replace(info, labels=list(data.labels))
        named = [f"{i} is {name}" for i, name in enumerate(data.labels)]
        text = f"the teacher numbers its classes, the data name them in this order: {listed(named, 'label')}"
        warnings.warn(text, Notice, stacklevel=2)
    if info.task not in (allowed := methods.find(recipe.method).tasks):
        raise BadInput("teacher", f"{recipe.teacher}, a teacher of {info.task}", " or ".join(allowed))
    return _fitting(replace(teacher, info=info), data)


def _untrained_info(recipe: Recipe, data: ImageData) -> Info:
    """Describe a model that is trained from data alone, before anything of it is known but the size of its pictures."""
    return Info(
        name=recipe.name,
        task=AUTOENCODER,
        method=recipe.method,
        role="teacher",
        data=data.name,
        sampler="ddim",
        size=data.size,
        channels=data.channels,
    )


def _untrained(recipe: Recipe, data: ImageData, device: str) -> Teacher:
    """Build the untrained network of the recipe's [model] table, with weights of the recipe's seed."""
    model = recipe.model_settings()
    if model.task == "class-to-image" and not data.labels:
        raise BadInput("model.task", model.task, "image: the data have no class folders")
    codec: ImageCodec = PixelUnshuffle(model.patch)
    trained_with: list[str] = []
    if model.autoencoder is not None:
        codec, about = read_autoencoder(model.autoencoder, device)
        if model.task == "text-to-image":
            codec = fold_shift(codec)
        trained_with = about.trained_with if about else []
        if (bands := codec.vae.config.in_channels) != model.channels:
            raise BadInput("model.channels", model.channels, f"{bands}, as the autoencoder's pictures have")
    sar = {**getattr(data, "radiometry", Radiometry()).to_dict(), **(model.sar or {})}  # the data's, with remarks
    info = replace(
        _untrained_info(recipe, data),
        task=model.task,
        labels=list(data.labels) if model.task == "class-to-image" else [],
        codec=codec.kind,
        patch=codec.factor,
        channels=model.channels,
        trained_with=trained_with,
        sar=sar if model.task == "sar-to-optical" else None,
    )
    torch.manual_seed(recipe.settings().seed)
    prompts = None
    if model.task == "text-to-image":
        text = TextSettings(**checked(TextSettings, model.text, "model.text"))
        prompts = untrained_encoder(_captions(data), text)
    made = Teacher.random(info, model.network, model.schedule, model.prediction, codec, prompts)
    if model.start is not None:
        _begin_with(model.start, made)
    return made


def _begin_with(start: str, made: Teacher) -> None:
    """Load what a published teacher has learnt into an untrained one, which may have layers more.

    Raises:
        BadInput: a folder of several networks, of another prediction or vocabulary, or with weights that do not fit.
    """
    parts = read_pipeline(start)
    if not isinstance(parts.denoiser, Denoiser) or parts.denoiser.prediction != made.denoiser.prediction:
        raise BadInput("model.start", start, f"a folder of one network that predicts {made.denoiser.prediction}")
    pairs = [("network", parts.denoiser.network, made.denoiser.network)]
    if made.denoiser.text is not None:
        if parts.prompts is None or _vocabulary(parts.prompts) != _vocabulary(made.prompts):
            raise BadInput("model.start", start, "a text-to-image folder with the vocabulary of these captions")
        pairs.append(("text encoder", parts.prompts.encoders["text_encoder"], made.denoiser.text))
    for what, old, new in pairs:
        given, own = old.state_dict(), new.state_dict()
        wrong = [name for name, value in given.items() if name not in own or own[name].shape != value.shape]
        if wrong:
            raise BadInput("model.start", f"{start}, whose {what} has {listed(wrong, 'weight')}", "layers of this one")
        new.load_state_dict({**own, **given})


def _vocabulary(prompts: PromptEncoder | None) -> dict[str, int]:
    """Return the tokens that the one tokenizer of an encoder knows, with their numbers."""
    assert prompts is not None
    found: dict[str, int] = prompts.tokenizers["tokenizer"].get_vocab()
    return found


def _captions(data: ImageData, count: int = 2000) -> list[str]:
    """Take the captions of the data, of endless ones the first."""
    _check_captions(data)
    texts: list[str] | None = getattr(data, "texts", None)
    return texts or unpack(data.items(range(min(count, len(data))))["caption"])


def _check_captions(data: ImageData) -> None:
    """Refuse with BadInput data without captions."""
    if not getattr(data, "captioned", False):
        raise BadInput("data", data.name, 'pictures with captions: kind = "captions", or captions = true for shapes')


def _fitting(teacher: Teacher, data: ImageData) -> Teacher:
    """Return the teacher if it can learn from these data or teach on them. Raises BadInput otherwise."""
    if teacher.condition.paired:
        if "sar" not in data.items([0]):
            raise BadInput("data", data.name, 'kind = "pairs": the task needs SAR')
        expected, found = Radiometry.of(teacher.info.sar), getattr(data, "radiometry", None)
        if found is not None and replace(expected, range=None) != replace(found, range=None):
            raise BadInput("data.radiometry", found.to_dict(), f"what the model sees: {expected.to_dict()}")
        teacher = replace(teacher, info=replace(teacher.info, size=data.size))  # a translator takes any
    elif teacher.info.task == "text-to-image":  # its networks draw other sizes than the one they are published with
        _check_captions(data)
        teacher = replace(teacher, info=replace(teacher.info, size=data.size))
    elif data.size != tuple(teacher.info.size):
        raise BadInput("data.size", data.size, f"absent, or what the teacher draws: {tuple(teacher.info.size)}")
    if data.channels != teacher.info.channels:
        raise BadInput("data.channels", data.channels, f"{teacher.info.channels}, as the teacher's pictures have")
    multiple = size_multiple(teacher.denoiser.network, teacher.codec)
    wrong = [size for size in (data.size, *getattr(data, "sizes", ())) if any(side % multiple for side in size)]
    if wrong:
        field = "data.size" if wrong[0] == data.size else "data.bucket_step"
        raise BadInput(field, wrong[0], f"a multiple of {multiple}: the patch times the network's downsampling")
    return teacher
