"""Measure whether pictures show what their prompts name: adherence, with the diversity that it must not cost.

A judge reads pictures by a program. It says attribute by attribute what a prompt names and what a picture shows of it;
a prompt is followed when everything that it names is found. Prompts may leave attributes out, which asks for nothing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from distillers.errors import BadInput
from distillers.evaluation.attributes import FOUND, AttributeNet
from distillers.evaluation.scene_reader import ASKED, compare, parse_scene, read_scenes

FOLDERS = {"avatars": "judge-avatars"}
SHAPES = "shapes"


@dataclass(frozen=True)
class Verdict:
    """Hold what B prompts name and what their pictures show of it.

    asked, found: bool (B, attributes); found is False where nothing was asked.
    uncounted: attributes that the judge does not find reliably; a prompt is followed without them.
    """

    attributes: tuple[str, ...]
    asked: Tensor
    found: Tensor
    uncounted: tuple[str, ...] = ()

    @property
    def followed(self) -> Tensor:
        """Whether everything that counts of what a prompt names was found, bool (B,)."""
        counts = torch.tensor([name not in self.uncounted for name in self.attributes])
        return (self.found | ~self.asked | ~counts).all(1)

    def shares(self, where: Tensor | None = None) -> dict[str, float]:
        """Compute the shares of prompts followed, "followed", and of each attribute found where it was asked for.

        Args:
            where: bool (B,), the prompts that count; all without. "n" is their number.
        """
        asked, found, followed = self.asked, self.found, self.followed
        if where is not None:
            asked, found, followed = asked[where], found[where], followed[where]
        counts = asked.sum(0).tolist()
        by_attribute = {a: float(found[:, k].sum()) / counts[k] for k, a in enumerate(self.attributes) if counts[k]}
        return {"n": len(followed), "followed": float(followed.double().mean()), **by_attribute}

    def groups(self, unseen: Tensor | None) -> dict[str, dict[str, float]]:
        """Compute the shares of all prompts, and where that is known of those without and with an unseen pair."""
        groups = {"all": self.shares()}
        if unseen is not None:
            parts = {"seen": ~unseen, "unseen": unseen}
            groups |= {name: self.shares(where) for name, where in parts.items() if where.any()}
        return groups

    @classmethod
    def joined(cls, verdicts: Sequence[Verdict]) -> Verdict:
        """Join the verdicts of one judge."""
        asked, found = (torch.cat([getattr(one, name) for one in verdicts]) for name in ("asked", "found"))
        return cls(verdicts[0].attributes, asked, found, verdicts[0].uncounted)


class Judge(Protocol):
    """The interface of a judge."""

    @property
    def name(self) -> str:
        """Its name; a model that has learnt from a network of this name is not judged by it."""

    @property
    def attributes(self) -> tuple[str, ...]:
        """What it can find, in the order of a verdict's columns."""

    def describe(self) -> str:
        """Name it, with how often it finds what captions say of real pictures where that was measured."""

    def __call__(self, pictures: Tensor, captions: Sequence[str]) -> Verdict:
        """Judge pictures (B,3,H,W) in [-1,1].

        Raises:
            BadInput: another number of captions, a caption with unknown words, pictures that are not finite.
        """

    def unseen(self, captions: Sequence[str], learnt: Sequence[str]) -> Tensor:
        """Say of each caption whether it names two things that no caption learnt from names together, bool (B,)."""


class AttributeJudge:
    """Judge pictures by a classifier of attributes: a value is found if it has more than half of the probability."""

    def __init__(self, net: AttributeNet) -> None:
        self.net, self.name, self.attributes = net, net.card.name, tuple(net.attributes)
        self.uncounted = tuple(net.card.missed)

    def describe(self) -> str:
        card = self.net.card
        if not card.accuracy:
            return f"the classifier {self.name}"
        tables = {"real pictures": card.accuracy, "their reconstructions": card.reconstructed}
        least = [
            f"{100 * min(share for name, share in table.items() if name not in self.uncounted):.1f} % or more on {kind}"
            for kind, table in tables.items()
            if set(table) - set(self.uncounted)
        ]
        left = [
            f"{name} ({' and '.join(f'{100 * share:.1f} %' for share in shares)})"
            for name, shares in card.missed.items()
        ]
        without = f", without {', '.join(left)}, which do not count" if left else ""
        return f"the classifier {self.name} ({' and '.join(least)}, {card.n_test} of each, by attribute{without})"

    @torch.no_grad()
    def __call__(self, pictures: Tensor, captions: Sequence[str]) -> Verdict:
        _check(pictures, captions)
        likelihood, asked = self.net.likelihoods(pictures, captions)
        found = (likelihood.exp() > FOUND) & asked
        return Verdict(self.attributes, asked.cpu(), found.cpu(), self.uncounted)

    def unseen(self, captions: Sequence[str], learnt: Sequence[str]) -> Tensor:
        return self.net.vocabulary.unseen(captions, learnt)


class ShapesJudge:
    """Judge pictures of captioned shapes by reading the objects off them, exactly from 48 px on."""

    name, attributes = SHAPES, ASKED

    def describe(self) -> str:
        return "a program without a network"

    def __call__(self, pictures: Tensor, captions: Sequence[str]) -> Verdict:
        _check(pictures, captions)
        asked, found = (torch.zeros(len(captions), len(ASKED), dtype=torch.bool) for _ in range(2))
        wanted = [parse_scene(caption) for caption in captions]
        for i, (scene, shown) in enumerate(zip(wanted, read_scenes(pictures), strict=True)):
            for name, match in compare(scene, shown).items():
                asked[i, ASKED.index(name)], found[i, ASKED.index(name)] = True, match
        return Verdict(ASKED, asked, found)

    def unseen(self, captions: Sequence[str], learnt: Sequence[str]) -> Tensor:
        known = set().union(*(self._pairs(caption) for caption in learnt))
        return torch.tensor([not self._pairs(caption) <= known for caption in captions])

    def _pairs(self, caption: str) -> set[tuple[str | None, str | None]]:
        """List the forms and colours that a caption names together."""
        return {(one.shape, one.colour) for one in parse_scene(caption).things}


def load_judge(name: str | Path, weights: str | Path | None = None, device: str | torch.device = "cpu") -> Judge:
    """Open a judge by name ("avatars", "shapes") or by the folder of a classifier of attributes.

    Named folders are sought where `features.load_features` seeks its own.

    Raises:
        BadInput: an unknown name, or a folder that holds no such classifier.
    """
    if str(name) == SHAPES:
        return ShapesJudge()
    beside, folder = Path(__file__).resolve().parents[2] / "weights", FOLDERS.get(str(name), str(name))
    roots = [Path(root) for root in (weights, os.environ.get("FEWSTEP_WEIGHTS"), beside, "weights") if root]
    for candidate in [*(root / folder for root in roots), Path(name)]:
        if (candidate / "config.json").is_file():
            return AttributeJudge(AttributeNet.load(candidate, device))
    raise BadInput("judge", str(name), f"{', '.join(FOLDERS)}, {SHAPES}, or a folder; looked in {roots}")


def _check(pictures: Tensor, captions: Sequence[str]) -> None:
    """Refuse with BadInput what no judge can read."""
    if pictures.ndim != 4 or len(pictures) != len(captions) or not len(pictures):
        given = (tuple(pictures.shape), len(captions))
        raise BadInput("pictures, captions", given, "(B,3,H,W) and B captions, one or more")
    if not bool(pictures.isfinite().all()):
        raise BadInput("pictures", "values that are not finite", "numbers in [-1,1]")


@torch.no_grad()
def diversity(drawn: Sequence[Tensor], features: nn.Module) -> float:
    """Compute how far pictures of one prompt lie apart, as a share of how far those of different prompts do.

    Both are mean Euclidean distances in a feature space. 0: one picture a prompt, whatever the seed; near 1: the prompt
    decides nothing.

    Args:
        drawn: one tensor (prompts, 3, H, W) in [-1,1] for each seed, all of the same prompts in the same order.

    Raises:
        BadInput: fewer than two seeds or two prompts, or all pictures alike.
    """
    if len(drawn) < 2 or len(drawn[0]) < 2 or any(one.shape != drawn[0].shape for one in drawn):
        raise BadInput("drawn", [tuple(one.shape) for one in drawn], "two seeds and two prompts or more, all alike")
    seen = torch.stack([features(one).double().cpu() for one in drawn])  # (seeds, prompts, d)
    seeds, prompts = seen.shape[:2]
    apart = torch.cdist(seen.flatten(0, 1)[None], seen.flatten(0, 1)[None])[0]
    prompt = torch.arange(seeds * prompts) % prompts
    same, other = prompt[:, None] == prompt, prompt[:, None] != prompt
    between = float(apart[other].mean())
    if not between > 0:
        raise BadInput("drawn", "pictures that are all alike", "pictures that differ from prompt to prompt")
    return float(apart[same & ~torch.eye(len(prompt), dtype=torch.bool)].mean()) / between
