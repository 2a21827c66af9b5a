"""One served weights folder: its generator, opened on the device, and what the outside may know of it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from distillers.errors import BadInput

if TYPE_CHECKING:
    from distillers.generator import Generator
    from distillers.weights import Info


@dataclass(frozen=True, eq=False)
class Model:
    """A generator under its name. Everything here is read-only after it is opened."""

    name: str
    folder: Path
    generator: "Generator"
    max_steps: int  # for a teacher, which can take any number
    created: int  # unix time of its fewstep.json

    @classmethod
    def open(cls, name: str, folder: Path, device: str, max_steps: int) -> "Model":
        """Reads the folder onto the device. Slow, and imports torch: for the engine's thread."""
        from distillers.generator import Generator

        generator = Generator.from_pretrained(folder, device)
        generator.eval()
        return cls(name, folder, generator, max_steps, int((folder / "fewstep.json").stat().st_mtime))

    @property
    def info(self) -> "Info":
        """What the folder says about itself."""
        return self.generator.info

    @property
    def translates(self) -> bool:
        """From SAR, instead of drawing from noise alone."""
        return self.info.task == "sar-to-optical"

    @property
    def steps(self) -> list[int] | None:
        """The published steps of a student; None: any number up to max_steps."""
        return sorted(self.info.step_times) or None

    @property
    def default_steps(self) -> int:
        """The folder's default, as far as this server allows it."""
        return self.info.default_steps if self.steps else min(self.info.default_steps, self.max_steps)

    @property
    def parameters_mb(self) -> float:
        """Memory of the parameters in MB: all students are resident."""
        return sum(p.numel() * p.element_size() for p in self.generator.parameters()) / 2**20

    def check_steps(self, steps: int | None) -> int:
        """The steps to take. BadInput for a number the model was not published with."""
        allowed = self.steps or range(1, self.max_steps + 1)
        if steps is not None and steps not in allowed:
            names = ", ".join(map(str, self.steps)) if self.steps else f"1..{self.max_steps}"
            raise BadInput("steps", steps, f"{names} ({self.name})")
        return steps or self.default_steps

    def sees(self, sar: NDArray[np.float32]) -> NDArray[np.float32]:
        """(channels, H, W) of one band (H, W) in [-1, 1], whose white is the display's: digital numbers of VV."""
        from distillers.radiometry import Radiometry, decibels

        own = Radiometry.of(self.info.sar)
        if own.form == "amplitude":
            return np.repeat(sar[None], own.channels, 0)
        band = own.bands[0]
        return own.unit({band: decibels((sar + 1) / 2, "dn") + np.float32(own.level(band))})

    def nfe(self, steps: int) -> int:
        """Network evaluations per picture: guidance asks twice in every step."""
        return steps * (1 if self.info.guidance_scale == 1 else 2)

    def describe(self) -> dict[str, Any]:
        """The model in OpenAI's form, with what a caller needs to use it."""
        info = self.info
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "fewstep",
            "task": info.task,
            "role": info.role,
            "method": info.method,
            "data": info.data,
            "teacher": info.teacher,
            "labels": list(info.labels),
            "students": max(1, len(info.shares)),
            "shares": info.shares or ([info.classes] if info.labels else []),  # positions in labels, by student
            "parameters_mb": round(self.parameters_mb, 3),
            "size": {"height": info.size[0], "width": info.size[1]},
            "steps": self.steps,
            "max_steps": max(self.steps or [self.max_steps]),
            "default_steps": self.default_steps,
            "sar": info.sar,
        }

    def report(self) -> Any:
        """The measurements published with the folder, or None."""
        try:
            return json.loads((self.folder / "report.json").read_text())
        except (OSError, ValueError):
            return None
