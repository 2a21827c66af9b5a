"""Train and load classifiers of the attributes that captions name, such as the colour of an avatar's hair.

Two are shipped in `weights/`, of different architectures and trained on different halves of the data, because a network
that has served as a reward may not judge what learnt from it:

    python -m distillers.evaluation.attributes judge --data PATH --out weights/judge-avatars
    python -m distillers.evaluation.attributes reward --data PATH --out weights/reward-avatars

Only what a picture's caption says is learnt: a capped head has no colour of hair, though the drawing program chose one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from distillers.autoencoder import Autoencoder
from distillers.data.captioned import CaptionedFolder
from distillers.errors import BadInput
from distillers.evaluation.clauses import AVATARS, UNSEEN, Vocabulary
from distillers.evaluation.features import write_network
from distillers.evaluation.part_exchange import PartExchange
from distillers.evaluation.pictures import to_pixels
from distillers.models.bands import as_rgb

GATE = 0.98  # of what captions name: an attribute that is found less often counts for nothing
FOUND = 0.5  # of the probability: a value above it is seen, for no other can be as likely
SHIFT = 4  # pixels that training moves pictures by, at most


@dataclass(frozen=True, kw_only=True)
class AttributeCard:
    """Describe a classifier of attributes and how often it finds what captions say of held-out pictures."""

    name: str
    data: str
    body: Literal["residual", "plain"]
    phrases: Mapping[str, Mapping[str, str]]  # as in `Vocabulary`, like the four below
    hides: Mapping[str, Sequence[str]]
    kinds: str
    parts: Sequence[Sequence[str]] = ()
    lost: Sequence[str] = ()
    size: int = 128  # pixels
    widths: tuple[int, ...] = ()  # channels of the stages
    part: int = 0  # of the training pictures: 0 = those at even positions, 1 = at odd ones
    n_train: int = 0
    iterations: int = 0
    batch: int = 0
    seed: int = 0
    bf16: bool = False
    begun: str = ""  # what its weights began with; empty for random ones
    n_test: int = 0
    accuracy: Mapping[str, float] = field(default_factory=dict)  # attribute -> share, with the weights as stored
    reconstructed: Mapping[str, float] = field(default_factory=dict)  # the same of an autoencoder's reconstructions
    remark: str = ""  # on what it misses
    date: str = ""
    torch: str = ""
    licence: str = "Apache-2.0"
    attribution: str = ""

    @property
    def vocabulary(self) -> Vocabulary:
        """The phrases that it knows."""
        return Vocabulary(self.phrases, self.hides, self.kinds, self.parts, self.lost)

    @property
    def missed(self) -> dict[str, list[float]]:
        """The attributes found in less than `GATE` of pictures or of reconstructions, with the shares of both."""
        tables = [table for table in (self.accuracy, self.reconstructed) if table]
        shares = {name: [table.get(name, 0.0) for table in tables] for name in self.vocabulary.attributes}
        return {name: found for name, found in shares.items() if found and min(found) < GATE}


class _Residual(nn.Module):
    """Add two convolutions to their input (He et al. 2016)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*_conv(channels, channels), nn.ReLU(), *_conv(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.body(x))


def _conv(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
    """Make a 3x3 convolution with batch normalisation."""
    return [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)]


def _residual(widths: Sequence[int]) -> nn.Sequential:
    """Stack stages at a half, a quarter, ... of the side; all but the first with a residual block."""
    layers, before = list[nn.Module](), 3
    for i, width in enumerate(widths):
        layers += [*_conv(before, width, 2), nn.ReLU(), *([_Residual(width)] if i else [])]
        before = width
    return nn.Sequential(*layers)


def _plain(widths: Sequence[int]) -> nn.Sequential:
    """Stack plain convolutions with pooling between stages (Simonyan and Zisserman 2015), without residual blocks."""
    layers: list[nn.Module] = [*_conv(3, widths[0], 2), nn.SiLU()]
    for before, width in pairwise(widths):
        layers += [nn.MaxPool2d(2), *_conv(before, width), nn.SiLU(), *_conv(width, width), nn.SiLU()]
    return nn.Sequential(*layers)


BODIES: dict[str, Callable[[Sequence[int]], nn.Sequential]] = {"residual": _residual, "plain": _plain}
WIDTHS = {"residual": (32, 48, 96, 160), "plain": (32, 48, 96, 144)}
BODY_OF: tuple[Literal["residual", "plain"], ...] = ("residual", "plain")  # of judge and reward
BATCH = 64  # pictures measured at a time
MOST = 4  # times that a picture of something rare is shown in a round
REBUILT = 8  # pictures that an autoencoder is given at a time: twice as fast as 64, for they fit a processor's cache


class AttributeNet(nn.Module):
    """Compute the logits of each attribute's values from pictures (B,3,H,W) in [-1,1].

    Each attribute looks where it wants to: a softmax over positions, learnt for each, weighs the features of a
    convolutional network, and a linear layer reads the values off. The first logit is that the picture has none.
    """

    def __init__(self, card: AttributeCard) -> None:
        super().__init__()
        self.card, self.vocabulary = card, card.vocabulary
        self.attributes = self.vocabulary.attributes
        width = card.widths[-1]
        self.body = BODIES[card.body](card.widths)
        self.look = nn.Conv2d(width, len(self.attributes), 1)
        self.read = nn.ModuleList(nn.Linear(width, 1 + len(values)) for values in self.attributes.values())
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.look.weight.device

    def forward(self, pictures: Tensor) -> list[Tensor]:
        """Compute logits (B, 1 + values), attribute by attribute."""
        x, size = as_rgb(pictures).to(self.device, torch.float32), (self.card.size, self.card.size)
        if tuple(x.shape[-2:]) != size:
            x = F.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False)
        maps = self.body(x.contiguous(memory_format=torch.channels_last))
        where = self.look(maps).flatten(2).softmax(2)
        seen = torch.einsum("bap,bcp->abc", where, maps.flatten(2).to(where.dtype))
        return [read(one).float() for read, one in zip(self.read, seen, strict=True)]

    def likelihoods(self, pictures: Tensor, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Compute ln p of the values that captions name, (B, attributes), 0 where none is; and where one is, bool."""
        asked = torch.zeros(len(captions), len(self.attributes), dtype=torch.bool)
        values = torch.zeros(len(captions), len(self.attributes), dtype=torch.int64)
        for i, caption in enumerate(captions):
            named = self.vocabulary.named(caption)
            for k, (attribute, known) in enumerate(self.attributes.items()):
                if attribute in named:
                    asked[i, k], values[i, k] = True, 1 + known.index(named[attribute])
        asked, values = asked.to(self.device), values.to(self.device)
        logits = [one.log_softmax(1).gather(1, values[:, k : k + 1])[:, 0] for k, one in enumerate(self(pictures))]
        return torch.stack(logits, 1) * asked, asked

    def save(self, folder: str | Path) -> None:
        """Write `config.json` (the card), `model.safetensors` (float16) and a README.md."""
        write_network(self, asdict(self.card), _readme(self), Path(folder))

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> AttributeNet:
        """Open a folder that `save` has written. Raises BadInput for any other."""
        folder = Path(folder)
        try:
            config = json.loads((folder / "config.json").read_text())
            net = cls(AttributeCard(**{**config, "widths": tuple(config["widths"])}))
            net.load_state_dict(load_file(folder / "model.safetensors"))
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            allowed = f"a folder with config.json and model.safetensors of a classifier of attributes ({error})"
            raise BadInput("judge", str(folder), allowed) from error
        return net.to(device).eval().requires_grad_(False)


def is_attribute_net(folder: Path) -> bool:
    """Say whether a folder's config.json is that of a classifier of attributes."""
    try:
        return "phrases" in json.loads((folder / "config.json").read_text())
    except (OSError, ValueError, TypeError):
        return False


def to_pictures(pixels: NDArray[np.uint8]) -> Tensor:
    """Convert (B,H,W,3) uint8 to (B,3,H,W) float32 in [-1,1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def augmented(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror half of the pictures, move the batch by a few pixels, and make every second batch soft or noisy.

    Generated pictures come from an autoencoder, whose edges are softer than those of drawings. Colours stay, for
    captions name them.
    """
    mirrored = torch.rand(len(pictures), generator=generator) < 0.5
    pictures = torch.where(mirrored[:, None, None, None], pictures.flip(3), pictures)
    down, across = torch.randint(2 * SHIFT + 1, (2,), generator=generator).tolist()
    height, width = pictures.shape[-2:]
    pictures = F.pad(pictures, (SHIFT,) * 4, mode="replicate")[..., down : down + height, across : across + width]
    softness, noise = torch.rand(2, generator=generator).tolist()
    if softness < 0.5:  # half of the batches; to as little as 0.75 of the side and back
        small = F.interpolate(pictures, scale_factor=0.75 + 0.5 * softness, mode="bilinear", antialias=True)
        pictures = F.interpolate(small, (height, width), mode="bilinear")
    if noise < 0.5:
        pictures = pictures + 0.08 * noise * torch.randn(pictures.shape, generator=generator)
    return pictures


def repeats(targets: NDArray[np.int64]) -> NDArray[np.int64]:
    """Count how often each picture is shown in a round, (N,), 1 to `MOST`: more often where it shows something rare.

    That is sqrt(mean count / own count) of its rarest value, rounded; targets (N, A) as `Vocabulary.targets` gives.
    """
    rarity = np.ones(len(targets))
    for column in targets.T:
        counts = np.bincount(column[column >= 0], minlength=1)
        mean = counts.sum() / max(1, (counts > 0).sum())
        rarity = np.maximum(rarity, np.where(column >= 0, np.sqrt(mean / np.maximum(1, counts[column])), 1))
    return rarity.round().clip(1, MOST).astype(np.int64)


def train_attributes(
    pixels: NDArray[np.uint8],
    captions: Sequence[str],
    card: AttributeCard,
    *,
    iterations: int,
    batch: int = 64,
    lr: float = 3e-3,
    seed: int = 0,
    bf16: bool = False,
    start: AttributeNet | None = None,
    autoencoder: Autoencoder | None = None,
    device: str = "cpu",
    progress: Callable[[int, float, AttributeNet], None] | None = None,
) -> AttributeNet:
    """Train a classifier on one half of the pictures (N,H,W,3), the half that its card names, with parts exchanged.

    Pictures of rare values are shown more often: see `repeats`.

    The loss is the sum over attributes of the cross-entropy with label smoothing 0.05; AdamW, one-cycle rate up to lr.

    Args:
        bf16: autocast, worth it where the processor has bfloat16 arithmetic.
        start: the network whose weights it begins with.
        autoencoder: whose reconstructions of every second picture are learnt from as well: generated ones look so.
        progress: called with (iteration, loss, network).

    Raises:
        BadInput: a caption that the vocabulary does not know; not one caption for each picture.
    """
    if len(captions) != len(pixels):
        raise BadInput("captions", len(captions), f"one for each of the {len(pixels)} pictures")
    torch.manual_seed(seed)
    generator, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    net = AttributeNet(card).to(device).train()
    if start is not None:
        net.load_state_dict(start.state_dict())
    chosen = np.arange(card.part, len(pixels), 2)
    columns = list(net.attributes)
    parts = [[columns.index(name) for name in part] for part in card.parts]
    learnt, said = pixels[chosen], net.vocabulary.targets(captions).numpy()[chosen]
    if autoencoder is not None:
        again = learnt[::2].copy()
        for i in range(0, len(again), REBUILT):
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
                rebuilt = autoencoder.reconstruct(to_pictures(again[i : i + REBUILT]))
            again[i : i + REBUILT] = to_pixels(rebuilt)
        learnt, said = np.concatenate([learnt, again]), np.concatenate([said, said[::2]])
    examples = PartExchange(learnt, said, columns.index(card.kinds), parts)
    optimizer = torch.optim.AdamW(net.parameters(), lr, weight_decay=0.02)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=iterations, pct_start=0.2)
    times = repeats(said)
    times[len(chosen) :] *= 2  # so that half of what is shown is reconstructed
    order, repeated = np.empty(0, np.int64), np.repeat(np.arange(len(learnt)), times)
    for iteration in range(iterations):
        if len(order) < batch:
            order = np.concatenate([order, rng.permutation(repeated)])
        index, order = order[:batch], order[batch:]
        mixed, targets = examples(index, rng)
        pictures, wanted = augmented(to_pictures(mixed), generator).to(device), torch.from_numpy(targets).to(device)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
            logits = net(pictures)
        losses = [
            F.cross_entropy(one, wanted[:, k], ignore_index=UNSEEN, label_smoothing=0.05)
            for k, one in enumerate(logits)
        ]
        loss = torch.stack(losses).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        if progress:
            progress(iteration + 1, loss.item(), net)
    net = net.half().float().eval().requires_grad_(False)  # measured as stored
    net.card = replace(
        card,
        n_train=len(chosen),
        iterations=iterations,
        batch=batch,
        seed=seed,
        bf16=bf16,
        begun="" if start is None else f"{start.card.name} after {start.card.iterations} batches of {start.card.batch}",
        date=datetime.now(UTC).date().isoformat(),
        torch=torch.__version__,
    )
    return net


@torch.no_grad()
def shares_found(
    net: AttributeNet, pictures: Iterable[Tensor], captions: Sequence[str]
) -> tuple[dict[str, float], dict[str, float]]:
    """Compute how often values that are asked for are found, by attribute, and of each attribute the least of a value.

    Args:
        pictures: parts (B,3,H,W) in [-1,1], in the order of the captions.
    """
    found, wanted, targets = list[Tensor](), net.vocabulary.targets(captions), list[Tensor]()
    for part in pictures:
        rows = wanted[sum(map(len, targets)) :][: len(part)]
        p = [one.softmax(1).cpu() for one in net(part)]
        found.append(
            torch.stack([q.gather(1, rows[:, k : k + 1].clamp_min(0))[:, 0] for k, q in enumerate(p)], 1) > FOUND
        )
        targets.append(rows)
    right, value = torch.cat(found), torch.cat(targets)
    shares, least = {}, {}
    for k, (attribute, values) in enumerate(net.attributes.items()):
        asked = [v for v, name in enumerate(values, 1) if name not in net.vocabulary.lost]
        by_value = [right[value[:, k] == v, k].double() for v in asked]
        named = [one for one in by_value if len(one)]
        if named:
            shares[attribute] = float(torch.cat(named).mean())
            least[attribute] = min(float(one.mean()) for one in named)
    return shares, least


def measured(net: AttributeNet, data: CaptionedFolder, autoencoder: Autoencoder | None = None) -> AttributeNet:
    """Put into a network's card how often it finds what captions say of held-out pictures."""
    parts = [data.items(range(i, min(i + BATCH, len(data))))["image"] for i in range(0, len(data), BATCH)]
    net.card = replace(net.card, n_test=len(data), accuracy=shares_found(net, parts, data.texts)[0])
    if autoencoder is not None:
        parts = [autoencoder.reconstruct(part) for part in parts]
        net.card = replace(net.card, reconstructed=shares_found(net, parts, data.texts)[0])
    return net


def _readme(net: AttributeNet) -> str:
    """Write the card as a README.md."""
    card, count = net.card, sum(p.numel() for p in net.parameters())
    lines = []
    for attribute, values in net.attributes.items():
        shares = (table.get(attribute) for table in (card.accuracy, card.reconstructed))
        cells = " | ".join("-" if share is None else f"{100 * share:.2f}" for share in shares)
        lines.append(f"| {attribute} | {len(values)} | {cells} | {'no' if attribute in card.missed else 'yes'} |")
    role = ROLES[card.part]
    hidden = ", ".join(f"{' and '.join(what)} with {value}" for value, what in card.hides.items())
    use = {
        "judge": "It measures whether pictures show what their prompts name (`fewstep evaluate --judge avatars`).",
        "reward": "It serves as a reward (`weights/reward-avatars`), and then may not judge what learnt from it.",
    }
    table = "\n".join(lines)
    return f"""---
license: apache-2.0
library_name: fewstep
tags: [image-classification]
---
# Classifier of attributes `{card.name}`

A convolutional classifier of {count / 1e6:.2f} M parameters that reads off a picture what captions name. {use[role]}

Share of what captions name that was found on {card.n_test} held-out pictures, in percent, with the weights as stored
(float16); and on the reconstructions of the same pictures by the autoencoder `weights/avatars-autoencoder`:

| attribute | values | pictures | reconstructions | counts |
| --- | --- | --- | --- | --- |
{table}

A prompt is followed when every attribute that it names and that counts is found: those above {100 * GATE:.0f} % in \
both columns. {card.remark}

* Trained on the {("even", "odd")[card.part]} ones of the training pictures of {card.data}, {card.n_train}: \
{card.iterations} batches of {card.batch}, seed {card.seed}, {card.date}, torch {card.torch}\
{f"; its weights began with {card.begun}" if card.begun else ""}.
* Input: (B,3,H,W) in [-1,1], resized to {card.size} px.
* Not asked for, since they cannot be seen: {hidden}\
{f"; nor, since the autoencoder does not draw them: {', '.join(card.lost)}" if card.lost else ""}.
* Made again by: `python -m distillers.evaluation.attributes {role} --data PATH --out DIR \
--autoencoder weights/avatars-autoencoder --iterations {card.iterations} --batch {card.batch} --seed {card.seed}\
{" --bf16" if card.bf16 else ""}{" --start DIR" if card.begun else ""}`.

{card.attribution}
"""


ROLES = ("judge", "reward")
REMARK = (
    "What is missed in reconstructions is often gone to the eye as well: brows fade on dark faces, and walrus "
    "mustaches become pyramids."
)
ATTRIBUTION = "Pictures drawn by DiceBear from `bigSmile` by Ashley Seo and `personas` by Draftbit, both CC BY 4.0."


def main(argv: list[str] | None = None) -> None:
    """Train the judge or the reward of avatars and save it."""
    parser = argparse.ArgumentParser(prog="python -m distillers.evaluation.attributes", description=main.__doc__)
    parser.add_argument("role", choices=ROLES, help="the two have other architectures and other halves of the pictures")
    parser.add_argument("--data", required=True, help="the folder of avatars, with train/ and test/")
    parser.add_argument("--out", required=True, help="the folder to write")
    parser.add_argument("--autoencoder", help="learn from its reconstructions as well, and measure on them too")
    parser.add_argument("--iterations", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--start", help="a folder of such a classifier, with whose weights it begins")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 arithmetic, where the processor has it")
    given = parser.parse_args(argv)
    card = avatars_card(given.role)
    train, test = (CaptionedFolder(given.data, split=split, size=card.size) for split in ("train", "test"))
    autoencoder = Autoencoder.from_pretrained(given.autoencoder) if given.autoencoder else None

    def show(iteration: int, loss: float, net: AttributeNet) -> None:
        if iteration % 50 == 0 or iteration == given.iterations:
            print(f"{iteration}/{given.iterations}  loss {loss:.3f}", flush=True)

    net = train_attributes(
        train.pixels,
        train.texts,
        card,
        iterations=given.iterations,
        batch=given.batch,
        seed=given.seed,
        bf16=given.bf16,
        start=AttributeNet.load(given.start) if given.start else None,
        autoencoder=autoencoder,
        progress=show,
    )
    measured(net, test, autoencoder).save(given.out)
    print((Path(given.out) / "README.md").read_text())


def avatars_card(role: str) -> AttributeCard:
    """Describe the untrained judge or reward of avatars."""
    part = ROLES.index(role)
    body = BODY_OF[part]
    return AttributeCard(
        name=f"{role}-avatars",
        data="avatars",
        body=body,
        widths=WIDTHS[body],
        part=part,
        phrases=AVATARS.phrases,
        hides=AVATARS.hides,
        kinds=AVATARS.kinds,
        parts=AVATARS.parts,
        lost=AVATARS.lost,
        remark=REMARK,
        attribution=ATTRIBUTION,
    )


if __name__ == "__main__":
    main()
