"""The bound that diffusers' DDPM and DDIM samplers put on the clean estimate: `clip_sample`, and dynamic thresholding.

A network that was published with it is drawn with it: without, the errors of a noise prediction at the noisiest times,
where x0 = (x_t - sigma eps) / alpha divides by almost nothing, blow the picture out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distillers.errors import BadInput


@dataclass(frozen=True)
class Clipping:
    """A bound on clean estimates x0 (B, ...): each value, or with a `quantile` each picture's own spread.

    Args:
        limit: x0 is held within [-limit, limit]; with a quantile it is the largest threshold.
        quantile: of a picture's |x0| that becomes its threshold s, from 1 to `limit`: x0 is held within [-s, s] and
            divided by s (Saharia et al. 2022, sec. 2.3); None for the plain bound.

    Raises:
        BadInput: a limit that is not above 0, a quantile outside 0 to 1.
    """

    limit: float = 1.0
    quantile: float | None = None

    def __post_init__(self) -> None:
        if not self.limit > 0:
            raise BadInput("clip_sample_range, sample_max_value", self.limit, "a number above 0")
        if self.quantile is not None and not 0 <= self.quantile <= 1:
            raise BadInput("dynamic_thresholding_ratio", self.quantile, "0 to 1")

    def __call__(self, x0: Tensor) -> Tensor:
        """Clip x0, in its own dtype."""
        if self.quantile is None:
            return x0.clamp(-self.limit, self.limit)
        s = torch.quantile(x0.float().abs().flatten(1), self.quantile, dim=1).clamp(1, self.limit)
        s = s.to(x0).reshape(-1, *[1] * (x0.ndim - 1))
        return x0.clamp(-s, s) / s

    @classmethod
    def from_diffusers(cls, options: Mapping[str, Any]) -> Clipping | None:
        """Read the bound from a scheduler's options; None where it says none. Thresholding goes before clipping."""
        if options.get("thresholding"):
            return cls(float(options["sample_max_value"]), float(options["dynamic_thresholding_ratio"]))
        return cls(float(options["clip_sample_range"])) if options.get("clip_sample") else None

    def to_diffusers(self) -> dict[str, Any]:
        """Describe the bound as options of diffusers' DDIM and LCM schedulers."""
        if self.quantile is None:
            return {"clip_sample": True, "clip_sample_range": self.limit}
        return {"thresholding": True, "dynamic_thresholding_ratio": self.quantile, "sample_max_value": self.limit}
