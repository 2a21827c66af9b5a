"""The checkpoints of a run folder: checkpoints/NNNNNNNN/{state.pt, about.json}, and best.pt of a watched training.

A checkpoint is written beside and renamed, so it is whole or absent, and the two newest are kept. Only the main process
writes; every process reads.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distillers.errors import BadInput
from distillers.training.settings import BESIDE
from distillers.weights.manifest import read_json

KEPT = 2


class Checkpoints:
    """The checkpoints of one run.

    Args:
        out: the run folder.
        description: of the run, as JSON; a checkpoint of another description is refused.
    """

    def __init__(self, out: Path, description: dict[str, Any]) -> None:
        self.out, self.folder = out, out / "checkpoints"
        self.description = json.loads(json.dumps(description))  # as a checkpoint gives it back

    def save(self, iteration: int, state: dict[str, Any], about: dict[str, Any]) -> None:
        """Write checkpoints/NNNNNNNN: `state` by torch.save, `about` as JSON. Older checkpoints are pruned."""
        self.folder.mkdir(exist_ok=True)
        temporary, final = self.folder / f".{iteration:08d}", self.folder / f"{iteration:08d}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        with open(temporary / "state.pt", "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        entries = {"iteration": iteration, "description": self.description, **about}
        (temporary / "about.json").write_text(json.dumps(entries))
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        self.prune()

    def load(self, device: torch.device) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Read the newest checkpoint: (state, about), None if there is none.

        Raises:
            BadInput: it belongs to a run of another description; `decisive` says in what they may differ.
        """
        newest = newest_checkpoint(self.out)
        if newest is None:
            return None
        about = read_about(newest)
        if decisive(about["description"]) != decisive(self.description):
            allowed = "an empty folder, or the recipe that began there"
            raise BadInput(str(self.out), "checkpoints of another recipe", allowed)
        return _load(newest / "state.pt", device), about

    def prune(self) -> None:
        """Keep the two newest; remove older ones, and what a killed process left half written or half deleted."""
        kept = whole_checkpoints(self.out)[-KEPT:]
        for old in {*self.folder.glob("[0-9]*"), *self.folder.glob(".[0-9]*")} - {*kept}:
            shutil.rmtree(old)

    def save_best(self, averages: dict[str, nn.Module]) -> None:
        """Write best.pt, the averaged weights that the watch found best so far."""
        torch.save({name: net.state_dict() for name, net in averages.items()}, self.out / "best.pt.new")
        (self.out / "best.pt.new").rename(self.out / "best.pt")

    def load_best(self, averages: dict[str, nn.Module]) -> None:
        """Load best.pt into the averages. Raises BadInput if there is none."""
        file = self.out / "best.pt"
        if not file.is_file():
            raise BadInput("train.publish", "best", f"last: {self.out} has no watched weights yet")
        for name, values in _load(file, "cpu").items():
            averages[name].load_state_dict(values)


def _load(file: Path, device: str | torch.device) -> dict[str, Any]:
    """Read tensors and numbers. Raises BadInput for a damaged file."""
    try:
        state: dict[str, Any] = torch.load(file, map_location=device, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        allowed = f"a whole file; without {file.parent} an earlier checkpoint is taken"
        raise BadInput(str(file), str(error).splitlines()[0] if str(error) else type(error).__name__, allowed) from None
    return state


def decisive(description: dict[str, Any]) -> dict[str, Any]:
    """Leave out what may change while a training goes on: its length, and what leaves the weights as they are."""
    train = {k: v for k, v in description.get("train", {}).items() if k not in ("iterations", *BESIDE)}
    return {**description, "train": train}


def read_about(checkpoint: Path) -> dict[str, Any]:
    """Read what a checkpoint says of itself. Raises BadInput if that is damaged."""
    about = read_json(checkpoint / "about.json")
    if not isinstance(about.get("description"), dict) or not isinstance(about.get("iteration"), int):
        raise BadInput(str(checkpoint / "about.json"), sorted(about), "a description and an iteration")
    return about


def whole_checkpoints(out: Path) -> list[Path]:
    """List the whole checkpoints of a run folder, the newest last."""
    return sorted(p for p in out.glob("checkpoints/[0-9]*") if (p / "about.json").is_file())


def newest_checkpoint(out: Path) -> Path | None:
    """Find the newest whole checkpoint of a run folder; None if there is none."""
    return next(reversed(whole_checkpoints(out)), None)
