"""Turn a request into orders, one for each picture, checked against the model and the limits."""

import hashlib
import math
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from app.engine import budget
from app.engine.budget import Choice
from app.engine.engine import Engine, Order, in_time
from app.engine.model import Model
from app.media.image_files import MIN_SIDE, decode_picture, decode_sar, pad, too_many_pixels
from app.schemas import SEEDS, ContentFields, EditRequest, PictureFields, RealtimeRequest, SceneFields, SceneFormat
from distillers.errors import BadInput
from distillers.models.class_names import class_number

if TYPE_CHECKING:
    from distillers.sar.options import SceneOptions


@dataclass(frozen=True)
class Plan:
    """Holds the fields that all requests for pictures share, checked against the model and the limits."""

    model: Model
    steps: int
    seed: int
    n: int
    raw: bool  # answer with a picture's bytes instead of JSON
    output_format: SceneFormat
    quality: int
    strict: bool
    deadline: float | None  # time.perf_counter()
    choice: Choice | None  # with latency_budget_ms

    @property
    def seeds(self) -> range:
        """Return the seed of each picture."""
        return range(self.seed, self.seed + self.n)


@dataclass(frozen=True)
class Work:
    """Holds a request's orders, one for each picture, and what their answers need beside them."""

    plan: Plan
    orders: Sequence[Order]
    height: int
    width: int
    crop: tuple[int, int]  # (height, width) of the answer
    labels: Sequence[str | None]
    first: int = 0  # steps left out at the beginning
    unread: Mapping[str, str] | None = None  # the end of the prompt that an encoder does not read, by its name


async def make_plan(
    engine: Engine,
    body: PictureFields,
    *,
    fits: Callable[[Model], bool],
    n: int | None = None,
    raw: SceneFormat | None = None,
) -> Plan:
    """Check a body's common fields, and choose and open its model.

    With a latency budget, `budget.choose` chooses the steps and, where none is named, the model.

    Args:
        fits: whether a model is a candidate where the body names none.
        n: pictures; 1 when left out.
        raw: the format of an answer that is a picture's bytes; None for JSON.

    Raises:
        BadInput: a field out of its range, or no model that fits.
        ApiError: an unknown model, or one that is still being opened.
    """
    deadline = None if body.timeout_ms is None else time.perf_counter() + body.timeout_ms / 1e3
    n, limit = n or 1, engine.settings.max_n
    if n > limit:
        raise BadInput("n", n, f"1..{limit}")
    seed = secrets.randbelow(2**32) if body.seed is None else body.seed
    if seed + n > SEEDS:
        raise BadInput("seed", seed, f"0..{SEEDS - n}")
    if raw and n > 1:
        raise BadInput("n", n, "1 with Accept: one picture's bytes; several pictures are answered as JSON")
    choice = None
    if body.latency_budget_ms is None:
        model = await in_time(engine.open_for(body.model, fits), deadline)
        steps = model.check_steps(body.steps)
    else:
        if body.model is not None:
            candidates = [await in_time(engine.open_for(body.model, fits), deadline)]
        else:
            every = [*filter(fits, engine.models.values())]
            # who knows the prompt as one of its classes, before those who draw any text
            candidates = [model for model in every if model.info.task != "text-to-image"] or every
        if not candidates:
            raise BadInput("model", None, "a model that draws this; see /v1/models")
        choice = budget.choose(engine, candidates, body.latency_budget_ms, n)
        model, steps = choice.model, choice.steps
    quality = 90 if body.output_compression is None else body.output_compression
    output_format = raw or cast(SceneFormat, body.output_format)
    strict = body.determinism == "strict"
    return Plan(model, steps, seed, n, raw is not None, output_format, quality, strict, deadline, choice)


def check_task(model: Model, translates: bool) -> Model:
    """Return the model if it translates, or does not, as asked. BadInput names the route where it answers."""
    if model.translates != translates:
        other = "/v1/images/translations" if model.translates else "/v1/images/generations"
        raise BadInput("model", model.name, f"another kind of model here; this one answers at {other}")
    return model


# -- pictures from noise -----------------------------------------------------------------------------------------------


def generates(body: ContentFields, size: str | None = None) -> Callable[[Model], bool]:
    """Return the test for models that generate a picture; with a latency budget, of that content and size."""

    def fits(model: Model) -> bool:
        if model.translates:
            return False
        if not (body.prompt or "").strip() and body.label is None and size is None:
            return True
        try:
            check_size(model, size)
            orders_of(model, body, [0])
        except BadInput:
            return False
        return True

    return fits if getattr(body, "latency_budget_ms", None) is not None else lambda model: not model.translates


def from_noise(plan: Plan, body: ContentFields, size: str | None = None) -> Work:
    """Order pictures from noise, of a class or a prompt. BadInput for a model that translates."""
    model = check_task(plan.model, translates=False)
    height, width = check_size(model, size)
    orders = [replace(order, size=(height, width)) for order in orders_of(model, body, plan.seeds)]
    prompts = model.generator.prompts
    unread = prompts.unread(body.prompt or "") if prompts is not None else None
    return Work(plan, orders, height, width, (height, width), label_names(model, orders), unread=unread or None)


def orders_of(model: Model, body: ContentFields, seeds: Sequence[int]) -> list[Order]:
    """Return an order for every seed, with the content that the body describes."""
    if model.generator.prompts is None:
        if body.loras:
            raise BadInput("loras", [lora.name for lora in body.loras], f"nothing: {model.name} draws no prompts")
        model.generator.condition.check_negative([body.negative_prompt])
        return [Order(seed, label) for seed, label in zip(seeds, labels_of(model, body, seeds), strict=True)]
    if body.label is not None:
        raise BadInput("label", body.label, f"nothing: {model.name} draws what the prompt says")
    prompt, negative = body.prompt or "", body.negative_prompt
    model.generator.condition.check({"prompts": [prompt], "negative_prompts": [negative]})
    loras = tuple(sorted((lora.name, lora.weight) for lora in body.loras))  # in another sequence they share a batch
    return [Order(seed, prompt=prompt, negative_prompt=negative, loras=loras) for seed in seeds]


def label_names(model: Model, orders: Sequence[Order]) -> list[str | None]:
    """Return the name of each order's class."""
    return [None if order.label is None else model.info.labels[order.label] for order in orders]


def check_size(model: Model, size: str | None) -> tuple[int, int]:
    """Return the (height, width) to draw: the published one or, of a model that reads text, another shape as large.

    Raises:
        BadInput: a size that the model does not draw, or more pixels than the published size has.
    """
    height, width = model.info.size
    if size in (None, "auto", f"{width}x{height}"):
        return height, width
    given = re.fullmatch(r"(\d{1,5})x(\d{1,5})", str(size))
    if model.generator.prompts is None or not given or int(given[1]) * int(given[2]) > height * width:
        others = "" if model.generator.prompts is None else ", another shape of no more pixels"
        raise BadInput("size", size, f"{width}x{height}{others}, auto ({model.name})")
    width, height = int(given[1]), int(given[2])
    model.generator.check_size("size", height, width)
    return height, width


def labels_of(model: Model, body: ContentFields, seeds: Sequence[int]) -> list[int | None]:
    """Return a class for every seed: the body's label or prompt, or one that the seed chooses."""
    names, classes, prompt = model.info.labels, model.info.classes, (body.prompt or "").strip()
    if not names:
        if prompt or body.label is not None:
            field, given = ("prompt", prompt) if prompt else ("label", body.label)
            raise BadInput(field, given, f"nothing: {model.name} draws without a class")
        return [None for _ in seeds]
    label = body.label
    if prompt:
        label = class_number(prompt, names)
        if label is None:
            more = f" and {len(names) - 40} more in /v1/models/{model.name}" if len(names) > 40 else ""
            raise BadInput("prompt", prompt, ", ".join(names[:40]) + more)
        if label not in classes:  # a lone student's
            raise BadInput("prompt", prompt, ", ".join(names[k] for k in classes[:40]))
        if body.label not in (None, label):
            raise BadInput("label", body.label, f"{label}, which is {names[label]}, or no prompt beside it")
    if label is None:
        return [classes[class_of_seed(seed, len(classes))] for seed in seeds]
    if label not in classes:
        own = ", ".join(names[k] for k in classes[:40])
        raise BadInput("label", label, f"{model.generator.condition.choices}: {own}")
    return [label for _ in seeds]


def class_of_seed(seed: int, classes: int) -> int:
    """Return the class of a seed where none is asked for: the same on every machine and in every version."""
    return int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:8]) % classes


# -- pictures from pictures --------------------------------------------------------------------------------------------


def edits(engine: Engine, body: EditRequest | RealtimeRequest, size: str | None = None) -> Callable[[Model], bool]:
    """Return the test for models that edit a picture: those that generate, or where there are none any translator."""
    if any(not model.translates for model in engine.models.values()):
        return generates(body, size)
    return lambda model: True


async def from_picture(
    engine: Engine,
    plan: Plan,
    body: EditRequest | RealtimeRequest,
    data: bytes,
    size: str | None = None,
    file: str = "",
) -> Work:
    """Order pictures from a picture's bytes: a translator takes them as SAR, a generator starts from them.

    A generator diffuses the picture to the time of a later step and samples from there (SDEdit, Meng et al. 2022).
    `strength` is the share of the steps that are taken, at least one.
    """
    if plan.model.translates:
        work = await from_sar(engine, plan, data, body.bands, file)
        if size not in (None, "auto", f"{work.crop[1]}x{work.crop[0]}"):
            raise BadInput("size", size, f"{work.crop[1]}x{work.crop[0]}, the picture's, or auto")
        return work
    if body.bands is not None:
        raise BadInput("bands", body.bands, f"nothing: {plan.model.name} is no translator")
    height, width = check_size(plan.model, size)
    orders = [replace(order, size=(height, width)) for order in orders_of(plan.model, body, plan.seeds)]
    channels = plan.model.info.channels
    if channels not in (1, 3):
        raise BadInput("model", plan.model.name, f"a model of RGB or grey pictures; these have {channels} bands")
    start = await engine.decode(decode_picture, data, engine.settings.max_pixels, channels)
    if start.shape[1:] != (height, width):
        given = f"a picture of {start.shape[2]}x{start.shape[1]} pixels"
        raise BadInput("image", given, f"{width}x{height} pixels, what {plan.model.name} draws; nothing is resized")
    taken = max(1, math.ceil(round(body.strength * plan.steps, 6)))
    started = [replace(order, start=start) for order in orders]
    return Work(plan, started, height, width, (height, width), label_names(plan.model, orders), plan.steps - taken)


async def from_sar(
    engine: Engine, plan: Plan, data: bytes, bands: str | None, file: str, width: int | None = None
) -> Work:
    """Order translations of a plain SAR picture: a file's bytes or, with a width, its pixels 0..255 themselves.

    Args:
        bands, file: the field and the name that may say the polarisation: see `Radiometry.band_of_picture`.
    """
    limit = engine.settings.max_pixels
    sar = await engine.decode(decode_sar, data, limit) if width is None else _unpacked(data, width, limit)
    generator = plan.model.generator
    padded = generator.condition.of_picture((pad(sar, generator.size_multiple) + 1) / 2, bands, file)
    orders = [Order(seed, sar=padded) for seed in plan.seeds]
    return Work(plan, orders, padded.shape[1], padded.shape[2], (sar.shape[0], sar.shape[1]), [None for _ in orders])


def _unpacked(data: bytes, width: int, max_pixels: int) -> NDArray[np.float32]:
    """Turn bytes 0..255, line by line, into (H, W) in [-1, 1]."""
    height, rest = divmod(len(data), width)
    if len(data) > max_pixels:
        raise too_many_pixels(str(len(data)), max_pixels)
    if rest or min(height, width) < MIN_SIDE:
        raise BadInput("image", f"{len(data)} bytes", f"lines of width {width} each, {MIN_SIDE} or more of both")
    return np.frombuffer(data, np.uint8).reshape(height, width).astype(np.float32) / 127.5 - 1


def scene_options(body: SceneFields, steps: int, seed: int) -> "SceneOptions":
    """Return a scene's fields as the library's options. BadInput for what it refuses."""
    from distillers.sar.options import SceneOptions

    said = {name: value for name in SceneFields.model_fields if (value := getattr(body, name)) is not None}
    return SceneOptions(steps=steps, seed=seed, **said)
