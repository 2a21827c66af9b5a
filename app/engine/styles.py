"""Lay LoRAs that the operator allows over a served model, each with a weight of the request: `loras` of a body."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distillers.errors import BadInput

if TYPE_CHECKING:
    from torch import nn

    from app.engine.backends import Dispatch
    from distillers.models.text import PromptEncoder

KEPT = 4  # sets of LoRAs that a model keeps ready; each holds its LoRAs' weights


def find_loras(folder: Path | None) -> dict[str, Path]:
    """Find the LoRAs that requests may name: the files of a folder by their names without .safetensors."""
    return {} if folder is None else {file.stem: file for file in sorted(folder.glob("*.safetensors"))}


def chosen(folder: Path | None, names: Sequence[str]) -> list[Path]:
    """Return the files of named LoRAs. BadInput for a name that the folder does not have, or one that comes twice."""
    known = find_loras(folder)
    for name in names:
        if name not in known:
            raise BadInput(
                "loras", name, ", ".join(list(known)[:40]) or "none: this server has no folder FEWSTEP_LORAS"
            )
    if len(set(names)) < len(names):
        raise BadInput("loras", list(names), "each name once")
    return [known[name] for name in names]


class Style:
    """Holds twins of a model's networks, on the same weights, that carry some LoRAs.

    Args:
        networks: for each of the model's networks its twin, or None where no LoRA changes it.
        names: of the adapters in the twins.
    """

    def __init__(self, networks: "Sequence[nn.Module | None]", names: Sequence[str]) -> None:
        self.networks, self.names = networks, names

    def weigh(self, weights: Sequence[float]) -> None:
        """Set the factor of each LoRA. On the engine's thread, before a slice."""
        from distillers.models.lora import set_lora_scale

        for network in self.networks:
            for name, weight in zip(self.names, weights, strict=True):
                if network is not None:
                    set_lora_scale(network, weight, name)


class Styles:
    """Makes the styles of a model, and keeps the last few.

    Args:
        dispatches: the model's networks as the engine calls them: those of pictures, then the text encoders.
        pictures: how many networks of pictures there are.
        prompts: the text encoders.
    """

    def __init__(self, dispatches: "Sequence[Dispatch]", pictures: int, prompts: "PromptEncoder") -> None:
        self.dispatches, self.pictures, self.prompts = dispatches, pictures, prompts
        self._made: OrderedDict[Any, Style] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, files: Sequence[Path]) -> Style:
        """Return the style of some LoRAs. BadInput for a file that is no LoRA of this model. Reads files: slow."""
        key = tuple((file, file.stat().st_mtime_ns) for file in files)
        with self._lock:
            if key not in self._made:
                self._made[key] = self._make(files)
            self._made.move_to_end(key)
            while len(self._made) > KEPT:
                self._made.popitem(last=False)
            return self._made[key]

    def _make(self, files: Sequence[Path]) -> Style:
        from distillers.models.lora import attach, twin
        from distillers.weights.lora_file import read_lora

        networks: dict[int, nn.Module] = {}
        names = [f"style{i}" for i in range(len(files))]
        encoders = {name: self.pictures + i for i, name in enumerate(self.prompts.towers)}
        for name, file in zip(names, files, strict=True):
            try:
                found = read_lora(file, self.dispatches[0].network, self.prompts)
                for part, state in found.items():
                    for i in [encoders[part]] if part in encoders else range(self.pictures):
                        network: Any = networks.setdefault(i, twin(self.dispatches[i].network))
                        attach(network.encoder if part in encoders else network, state, name, file.stem)
            except BadInput as error:  # where the file lies is the operator's affair
                layer = error.field.removeprefix(str(file)).removeprefix(f"{file.stem}: ")
                reason = f"{file.stem}: {layer} {error.given}".replace(str(file.parent), "")
                raise BadInput("loras", reason, error.allowed) from None
        return Style([networks.get(i) for i in range(len(self.dispatches))], names)
