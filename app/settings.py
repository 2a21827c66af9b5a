"""Read the settings of the service from FEWSTEP_* environment variables."""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, DirectoryPath, Field, ValidationError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from distillers.errors import BadInput

DEVICES = re.compile(r"auto|(cpu|cuda(:\d+)?)(,(cpu|cuda:\d+))*")
ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s,]+")


def _device(given: str) -> str:
    if not DEVICES.fullmatch(given):
        raise ValueError("auto, cpu, cuda, cuda:1, or several of them with commas")
    return given


def _writable(folder: Path) -> Path:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError("a folder that can be written")
    return folder


def _origins(given: Any) -> Any:
    """Read "https://a.example,https://b.example:8443"."""
    found = tuple(part.strip().lower() for part in given.split(",")) if isinstance(given, str) else given
    if not all(ORIGIN.fullmatch(origin) for origin in found):
        raise ValueError("origins with commas, as in https://a.example,http://localhost:3000")
    return found


def _aliases(given: Any) -> Any:
    """Read "gpt-image-1=eurosat-consistency,dall-e-3=eurosat-teacher"."""
    if not isinstance(given, str):
        return given
    found = {name.strip(): model.strip() for name, _, model in (part.partition("=") for part in given.split(","))}
    if not all((*found, *found.values())):
        raise ValueError("NAME=MODEL, several with commas")
    return found


class Settings(BaseSettings):
    """Holds the settings, as in FEWSTEP_WEIGHTS=weights FEWSTEP_DEVICE=cpu. The defaults suit a small machine."""

    model_config = SettingsConfigDict(env_prefix="FEWSTEP_", env_ignore_empty=True, extra="ignore")

    weights: Path = Field(
        default=Path("weights"), description="folder of weights folders; each with a fewstep.json is served"
    )
    loras: DirectoryPath | None = Field(
        default=None, description="folder of LoRAs that requests may lay over text-to-image models, by name"
    )
    device: Annotated[str, AfterValidator(_device)] = Field(
        default="auto",
        description="auto: cuda where there is one; several, as in cuda:0,cuda:1, share the work",
    )
    default_model: str | None = Field(default=None, description="served when a request names no model")
    model_aliases: Annotated[dict[str, str], NoDecode, BeforeValidator(_aliases)] = Field(
        default={}, description="other names, for clients that know only theirs: gpt-image-1=MODEL,dall-e-3=MODEL"
    )
    origins: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_origins)] = Field(
        default=(), description="sites whose pages may ask (CORS, WebSockets), with commas: https://a.example"
    )
    max_n: int = Field(default=16, ge=1, description="images per request")
    max_steps: int = Field(default=250, ge=1, le=1000, description="steps of a teacher per image")
    max_pixels: int = Field(default=1 << 20, ge=64, description="pixels per uploaded image, and of one batch together")
    max_body_bytes: int = Field(default=16 << 20, ge=1024, description="bytes per request body")
    max_scene_pixels: int = Field(
        default=4 << 20, ge=64, description="pixels of a scene translated at once, not as a job"
    )
    max_scenes: int = Field(default=4, ge=1, description="scenes translated at once; beyond it 503")
    max_scene_bytes: int = Field(default=4 << 30, ge=1024, description="bytes of a whole scene, sent as a job")
    max_jobs: int = Field(
        default=16, ge=1, description="jobs kept: an ended one makes room for a new one; 503 if none has ended"
    )
    job_ttl: float = Field(default=3600, gt=0, description="seconds that an ended job and its files are kept")
    scratch: Annotated[DirectoryPath, AfterValidator(_writable)] | None = Field(
        default=None, description="folder for scenes and results; the system's temporary one when left out"
    )
    max_batch: int = Field(default=16, ge=1, description="images per forward pass")
    tune_seconds: float = Field(
        default=20, ge=0, description="for measuring backends, per model, once; 0: none; 60 or more: torch.compile too"
    )
    tolerance: int = Field(
        default=2, ge=0, le=255, description="levels of 255 that a backend in bfloat16 may move a pixel by"
    )
    memory_mb: float | None = Field(
        default=None, gt=0, description="of all open models; beyond it the one not asked for the longest is put away"
    )
    decoding: Literal["whole", "slices", "tiles"] = Field(
        default="whole",
        description="autoencoders decode batches, single pictures, or also large pictures in tiles: less memory",
    )
    benchmark_seconds: float = Field(
        default=120, gt=0, description="that one /v1/benchmarks may have the device for; beyond it 504"
    )
    rescan_seconds: float = Field(default=5, gt=0, description="between looks for new and changed folders")
    max_wait_seconds: float = Field(default=30, gt=0, description="predicted, of all that waits; beyond it 503")
    queue_limit: int = Field(default=256, ge=1, description="images waiting; beyond it 503")
    codec_threads: int = Field(default=2, ge=1, description="threads that decode and encode images")
    keys: Path | None = Field(
        default=None, description="TOML file of API keys (`fewstep key`); without one everybody may infer"
    )
    body_seconds: float = Field(
        default=30, gt=0, description="for a request's headers, and then for a small body, to arrive; beyond it 408"
    )
    hang_seconds: float = Field(default=300, gt=0, description="of one forward pass; beyond it /livez says 503")
    drain_seconds: float = Field(default=25, ge=0, description="after SIGTERM, for what was accepted to be answered")
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"


def read_settings(**given: Any) -> Settings:
    """Read the settings, some of which may be given instead.

    Raises:
        BadInput: naming the variable, what it holds and what is allowed.
    """
    try:
        return Settings(**given)
    except ValidationError as error:
        first = error.errors()[0]
        name = "FEWSTEP_" + str(first["loc"][0]).upper()
        allowed = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        raise BadInput(name, first["input"], allowed) from None
