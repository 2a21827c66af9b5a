"""Declare the bodies of requests and answers. Unknown fields are refused by name; OpenAI's unused ones are accepted."""

from base64 import b64decode
from dataclasses import fields
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic_core import from_json

from app.errors import ErrorBody, told
from distillers.errors import BadInput
from distillers.models.radiometry import Units
from distillers.sar.options import SceneFacts, SceneOptions

Format = Literal["png", "jpeg", "webp", "raw"]
SceneFormat = Literal["png", "jpeg", "webp", "raw", "geotiff"]
SEEDS = 2**63  # a seed is below it
STRENGTH = 0.6  # of an edit: some of the picture stays


def _no_url(value: object) -> object:
    if value == "url":
        raise BadInput("response_format", "url", "b64_json, or raw bytes by Accept: image/png; no picture is kept here")
    return value


ResponseFormat = Annotated[Literal["b64_json"], BeforeValidator(_no_url)]
Polarisation = Annotated[
    str | None,
    Field(max_length=80, description="Of a SAR picture for a translator: VV or VH, where its file's name has neither."),
]
Unused = Annotated[Any, Field(description="Accepted because OpenAI's clients send it; without effect.")]


class Body(BaseModel):
    """Refuses unknown fields of a request and names the known ones."""

    @model_validator(mode="before")
    @classmethod
    def known_fields(cls, body: object) -> object:
        """Refuse unknown fields before any other check, so that the error names a misspelt field."""
        if isinstance(body, dict):
            known = cls.model_fields
            for name in body:
                if name not in known:
                    raise BadInput(told(str(name)), body[name], f"no field of this name, but {', '.join(known)}")
        return body


class SeededFields(Body):
    """Declares the fields of every request that draws: model, seed and steps."""

    model: str | None = Field(None, description="A name of /v1/models. May be left out where the choice is clear.")
    seed: int | None = Field(
        None,
        ge=0,
        lt=SEEDS,
        description="Picture i is drawn from seed + i alone. Random when left out; the answer names it.",
    )
    steps: int | None = Field(None, ge=1, description="One of the model's steps; its default when left out.")


class PictureFields(SeededFields):
    """Declares the fields of every request whose answer holds a picture."""

    output_format: Format = Field("png", description="raw: the pixels, 3 bytes each, row by row.")
    output_compression: int | None = Field(None, ge=0, le=100, description="Quality of jpeg and webp; 90 by default.")
    determinism: Literal["fast", "strict"] = Field(
        "fast", description="strict: the same bytes whatever else is drawn at the time, for a little speed."
    )
    latency_budget_ms: float | None = Field(
        None,
        gt=0,
        le=3_600_000,
        description="Instead of steps: the best that fits, of the model, or of all models where none is named.",
    )
    timeout_ms: int | None = Field(
        None, ge=1, le=3_600_000, description="504 when it has not been drawn by then. No limit when left out."
    )

    @model_validator(mode="after")
    def steps_or_budget(self) -> Self:
        """Refuse steps beside a latency budget, which chooses them."""
        if self.steps is not None and self.latency_budget_ms is not None:
            raise BadInput("steps", self.steps, "nothing beside latency_budget_ms, which chooses the steps")
        return self


class BatchFields(PictureFields):
    """Declares the fields of generations, edits and translations."""

    n: int | None = Field(None, ge=1, description="Pictures: 1 (the default) to the server's limit.")
    response_format: ResponseFormat | None = Field(None, description="For raw bytes: Accept: image/png and n = 1.")


class LoraFields(Body):
    """Names a LoRA of the server's folder, and how strongly it acts."""

    name: str = Field(max_length=200)
    weight: float = Field(1.0, ge=-2, le=2, description="0 is without it, 1 as it was trained.")


def _from_text(value: object) -> object:
    """Read the JSON in a form's field."""
    return from_json(value) if isinstance(value, str) else value


class ContentFields(Body):
    """Declares the fields that say what is in the picture."""

    prompt: str | None = Field(
        None,
        description="What a text-to-image model is to draw. For a model with classes a class label in any case, for "
        "example Forest; empty or left out: each picture's class is drawn from its seed. Must be empty for others.",
    )
    negative_prompt: str | None = Field(
        None, description="What guidance leads away from; refused by models that draw without guidance, as students do."
    )
    label: int | None = Field(None, ge=0, description="The class by its index, instead of the prompt.")
    loras: Annotated[list[LoraFields], BeforeValidator(_from_text)] = Field(
        [],
        max_length=4,
        description="LoRAs of the server's folder, laid over a text-to-image model; in a form as JSON.",
    )


class OpenAIRequest(BatchFields, ContentFields):
    """Declares the fields of OpenAI's two requests."""

    size: str | None = Field(
        None,
        description='"WIDTHxHEIGHT" as the model draws it, or "auto"; of text to image any shape of no more pixels.',
    )
    stream: bool | None = Field(None, description="Server-sent events, as OpenAI sends them.")
    partial_images: int | None = Field(
        None, ge=0, le=3, description="With stream: views of the unfinished picture; fewer if there are fewer steps."
    )
    user: Unused = None
    safety_identifier: Unused = None
    quality: Unused = None
    background: Unused = None
    moderation: Unused = None


class ImageRequest(OpenAIRequest):
    """Extends OpenAI's images.generate by a few fields (`extra_body` in its Python client)."""

    model_config = ConfigDict(
        strict=True, json_schema_extra={"example": {"model": "eurosat-consistency", "prompt": "Forest", "seed": 7}}
    )

    style: Unused = None


class EditRequest(OpenAIRequest):
    """Declares the fields of OpenAI's images.edit, beside the file `image` of the form."""

    strength: float = Field(
        STRENGTH, gt=0, le=1, description="Share of the steps that are taken; 1 keeps least of the picture."
    )
    bands: Polarisation = None
    input_fidelity: Unused = None


def _from_data_url(value: object) -> object:
    """Read the bytes of a data URL. BadInput for any other address: this server fetches nothing."""
    if not isinstance(value, str):
        return value
    head, comma, data = value.partition(",")
    allowed = "data:image/png;base64,... with the picture itself; no address is fetched"
    if not (comma and head.startswith("data:") and head.endswith(";base64")):
        raise BadInput("images.0.image_url", value, allowed)
    try:
        return b64decode(data, validate=True)
    except ValueError:
        raise BadInput("images.0.image_url", value, allowed) from None


class ImageReference(Body):
    """Holds a picture in JSON, as OpenAI's edits take it."""

    image_url: Annotated[bytes, BeforeValidator(_from_data_url), WithJsonSchema({"type": "string"})] = Field(
        description="A data URL: data:image/png;base64,... No other address is fetched, and no files are kept here."
    )


class JsonEditRequest(EditRequest):
    """Declares the fields of OpenAI's images.edit in JSON, where the picture is one of the fields."""

    model_config = ConfigDict(strict=True)

    images: list[ImageReference] = Field(min_length=1, max_length=1, description="The picture: one.")


class RealtimeRequest(PictureFields, ContentFields):
    """Declares the fields of a text message at /v1/realtime."""

    model_config = ConfigDict(strict=True)

    seq: int = Field(ge=0, lt=SEEDS, description="Grows from message to message; the answer repeats it.")
    image: bool = Field(False, description="The next message is binary: the picture to translate or to begin from.")
    strength: float = Field(STRENGTH, gt=0, le=1, description="See edits.")
    bands: Polarisation = None
    output_format: Format = "jpeg"


def _of_options(name: str) -> Any:
    """Make a form's field of the library's option of that name; None stands for the option's default."""
    (option,) = (option for option in fields(SceneOptions) if option.name == name)
    return Field(None, **option.metadata)


class SceneFields(Body):
    """Declares how the numbers of a scene are read. Each field makes a TIFF a scene; `bands` goes with a PNG, too."""

    units: Units | None = _of_options("units")
    bands: str | None = _of_options("bands")
    nodata: float | None = _of_options("nodata")
    samples: int | None = _of_options("samples")


class TranslationRequest(BatchFields, SceneFields):
    """Declares a translation's parameters: form fields beside the file `image`, or the query of a raw body.

    A TIFF is a scene if it is georeferenced or BigTIFF, if it is not one band of 8 bit, 16 bit or float32 (or three of
    8 bit), or if units, bands, nodata, samples or output_format=geotiff are said. All else is a plain picture.
    """

    output_format: SceneFormat = Field(  # type: ignore[assignment]
        "png", description="geotiff: the scene's own grid, Cloud-Optimised; also by Accept: image/tiff, as raw bytes."
    )
    width: int | None = Field(
        None, ge=1, description="Of a body of application/octet-stream: pixels in a line, one byte each."
    )


class JobRequest(SeededFields, SceneFields):
    """Declares the parameters of a job: the query of a raw body, or form fields beside the file `image`."""


class BenchmarkRequest(Body):
    """Asks for a small measurement, made now, on the device that serves."""

    model_config = ConfigDict(strict=True, json_schema_extra={"example": {"model": "eurosat-consistency", "n": 16}})

    model: str | None = Field(None, description="A student whose teacher is served beside it.")
    steps: int | None = Field(None, ge=1, description="The student's steps; its default when left out.")
    n: int = Field(16, ge=2, le=256, description="Pictures of each; few, and the answer says so.")
    seed: int = Field(0, ge=0, lt=SEEDS)


class Timings(BaseModel):
    """Gives the milliseconds of each stage, and the largest batch that a picture of the request was drawn in.

    Of a scene: summed over its tiles; encoding is all else, reading and blending included.
    """

    queue_ms: float
    forward_ms: float
    encode_ms: float
    batch: int
    bucket: int = Field(description="The size that the batch was padded to; 0 for a scene.")


class Chosen(BaseModel):
    """Says what was chosen for latency_budget_ms, and why."""

    model: str
    steps: int
    expected_ms: float
    quality: float | None = Field(description="As published with the model; null where it was not measured.")
    why: str


class ImageData(BaseModel):
    """Holds one picture."""

    b64_json: str
    seed: int = Field(description="Draws this picture alone.")
    label: str | None = Field(None, description="Its class, where the model has classes.")


class SceneData(BaseModel):
    """Holds a scene's facts, two small PNG pictures of one size to overlay, and the statistics over samples."""

    facts: SceneFacts
    sar_png: str = Field(description="base64; 2 to 98 % of the decibels, grey")
    optical_png: str = Field(description="base64")
    uncertainty_geotiff: str | None = Field(None, description="base64, with samples > 1")


class ImagesAnswer(BaseModel):
    """Extends OpenAI's ImagesResponse by what is needed to draw the same again."""

    created: int
    data: list[ImageData]
    model: str
    steps: int
    nfe: int = Field(description="Network evaluations per picture.")
    seed: int
    output_format: SceneFormat
    size: str = Field(description="WIDTHxHEIGHT")
    timings: Timings
    chosen: Chosen | None = Field(None, description="With latency_budget_ms.")
    scene: SceneData | None = None
    loras: list[LoraFields] | None = Field(default=None, description="As they were asked for.")
    unread: dict[str, str] | None = Field(
        default=None, description="The end of the prompt that a text encoder does not read, by the encoder's name."
    )


class JobAnswer(BaseModel):
    """Describes a job: a whole scene that waits, runs or has ended."""

    id: str
    object: Literal["job"] = "job"
    status: Literal["queued", "running", "done", "failed", "cancelled"]
    progress: float = Field(ge=0, le=1)
    megapixels_per_second: float | None = Field(None, description="Until now, or of the whole scene.")
    created: int
    expires: int | None = Field(None, description="Unix time at which an ended job is forgotten, and its files.")
    facts: SceneFacts | None = None
    error: ErrorBody | None = None
    files: dict[str, str] = Field({}, description="What can be fetched, by name: its path.")
