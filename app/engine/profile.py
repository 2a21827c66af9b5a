"""Keep the profile of a served model: which backend runs it on this device, and what each batch size costs."""

import json
import math
import os
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from pydantic import TypeAdapter

from distillers.runtime import device_name, package_versions, usable_cores
from distillers.weights.manifest import Info, load_json

FILE = "profile.json"
NOISY, BUSY = 0.2, 1.5  # spread and load, beyond which a profile is measured again in an idle moment


@dataclass
class Profile:
    """Holds what was measured for one model on one device, at the model's own size and fewest steps."""

    backend: str = "eager"
    threads: int = 0
    levels: int = 0  # of 255: the most that a probe's pixel differs from the reference (eager, float32, one picture)
    steps: int = 1
    buckets: dict[int, float] = field(default_factory=dict)  # batch size: seconds
    dropped: dict[int, str] = field(default_factory=dict)  # batch sizes that are not used, and why
    against_one: dict[int, int] = field(default_factory=dict)  # batch size: levels that its pictures differ from alone
    tried: list[dict[str, Any]] = field(default_factory=list)
    date: str = ""
    spread: float | None = None  # of a batch size's passes, the worst: their quartiles' distance over their median
    load: float | None = None  # of the machine as measuring began: what wanted to run, per processor

    @property
    def sure(self) -> bool:
        """Return whether its measurements agree with each other, and were taken on a machine that had time for them."""
        spread, load = self.doubt
        return spread <= NOISY and load <= BUSY

    @property
    def doubt(self) -> tuple[float, float]:
        """Return spread and load, by which profiles are compared; one that was measured without them comes last."""
        return math.inf if self.spread is None else self.spread, math.inf if self.load is None else self.load

    @property
    def id(self) -> str:
        """Return the backend's id: its name and its number of threads."""
        return f"{self.backend}/{self.threads}"

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Self:
        """Read a stored profile, whose batch sizes are text in JSON. ValueError for one that nobody measured here."""
        profile = TypeAdapter(cls).validate_python(stored)
        measured = not profile.buckets or (
            1 in profile.buckets and min(*profile.buckets, *profile.buckets.values()) > 0
        )
        if not (measured and 0 <= profile.threads <= usable_cores() and profile.steps >= 1):
            raise ValueError("batch sizes, seconds, threads or steps that were never measured here")
        return profile


def profile_key(info: Info, device: str, tolerance: int, largest: int) -> str:
    """Name all that a profile depends on: device, versions, limits and weights."""
    versions = [f"{name} {version}" for name, version in package_versions("torch", "diffusers", "openvino").items()]
    limits = f"{usable_cores()} cores, tolerance {tolerance}, batches to {largest}"
    return " | ".join([device_name(device), platform.machine(), *versions, limits, f"weights {info.digest}"])


def read_profiles(folder: Path) -> dict[str, Any]:
    """Read the profiles kept beside a folder's weights, as JSON by key; {} where there are none."""
    try:
        stored = load_json(folder / FILE)
        return stored if isinstance(stored, dict) else {}
    except (OSError, ValueError):
        return {}


def write_profile(folder: Path, key: str, profile: Profile) -> None:
    """Keep a profile beside weights that several servers may serve. Raises OSError where nothing can be written."""
    stored = {**read_profiles(folder), key: asdict(profile)}
    new = folder / f".{FILE}.{platform.node()}.{os.getpid()}"
    try:
        new.write_text(json.dumps(stored, indent=1) + "\n")
        new.replace(folder / FILE)  # at once: half a file would read as none, and the others' profiles would go
    finally:
        new.unlink(missing_ok=True)
