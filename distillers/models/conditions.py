"""Conditions: what a model draws its picture from beside noise, with one class for each task.

A condition has two forms. A caller gives `Given`, the keyword arguments of `Generator.sample`: class numbers, SAR
pictures, prompts. A network takes `Cond`, tensors by name. The class of a task checks the first and encodes it into
the second, makes up examples, takes conditions from data sets and shows them to people; nothing else in the library
asks what a model is conditioned on. A new kind of condition is a class here, its arguments in `Given`, and its name in
`KINDS`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from distillers.errors import BadInput
from distillers.models.captions import pack, unpack
from distillers.models.codec import ImageCodec
from distillers.models.families import TOLD
from distillers.models.radiometry import Radiometry

if TYPE_CHECKING:
    from distillers.models.text import PromptEncoder

# "label": int64 (B,); "sar": float (B, C, H, W) in the network's own layout; "guidance": float (B,), where it varies;
# "text", "pooled", "ids" as `PromptEncoder` gives, and the same of no prompt behind "null_", for guidance
Cond = dict[str, Tensor]

PROMPTS = ("a photograph of a forest", "a river from above, oil on canvas", "a red circle", "a street at night")
LONGEST_PROMPT = 2000  # characters; a network does not see what exceeds its encoder's tokens, as in diffusers


class Given(TypedDict, total=False):
    """A condition as callers give it, one entry per picture; None is the same as absent."""

    labels: Sequence[int] | None  # class numbers
    sar: Tensor | None  # (B, C, H, W) in [-1, 1]
    prompts: Sequence[str] | None
    negative_prompts: Sequence[str | None] | None  # beside prompts: what guidance leads away from; None: the usual


def gather(orders: Iterable[Any]) -> Given:
    """Make the condition of a batch from orders of one picture each: `label`, `prompt`, `negative_prompt`, `sar`."""
    columns = ((one.label, one.prompt, one.negative_prompt, one.sar) for one in orders)
    labels, prompts, negatives, sar = zip(*columns, strict=True)
    given: Given = {}
    if labels[0] is not None:
        given["labels"] = labels
    if prompts[0] is not None:
        given["prompts"] = prompts
    if any(negative is not None for negative in negatives):
        given["negative_prompts"] = negatives
    if sar[0] is not None:
        given["sar"] = torch.from_numpy(np.stack(sar))
    return given


def scatter(given: Given, count: int) -> list[dict[str, Any]]:
    """Take the condition of a batch apart into the fields of orders of one picture each: see `gather`."""
    sar = given.get("sar")
    columns = {
        "label": given.get("labels"),
        "prompt": given.get("prompts"),
        "negative_prompt": given.get("negative_prompts"),
        "sar": None if sar is None else sar.numpy(),
    }
    return [{name: column[i] for name, column in columns.items() if column is not None} for i in range(count)]


def subset(given: Given, first: int, end: int) -> Given:
    """Take the conditions of pictures `first` to `end` - 1."""
    return {key: None if value is None else value[first:end] for key, value in given.items()}  # type: ignore[return-value, index]


def split(batch: Cond, parts: int) -> list[Cond]:
    """Cut every tensor of a batch into micro-batches along its first axis."""
    chunks = {key: value.tensor_split(parts) for key, value in batch.items()}
    return [{key: value[i] for key, value in chunks.items()} for i in range(parts)]


# --- one class for each task -----------------------------------------------------------------------------------------
class Condition:
    """The condition of a model that draws from noise alone, and the interface of all others.

    Attributes:
        argument: the keyword of `Given` that holds it.
        refusal: what a model of another task answers to that keyword.
        paired: whether data hold one true picture for each condition.
        from_data: whether pictures are shown under conditions taken from data, which are better than made-up ones.
        channels: how many channels it adds to the noisy image at the network's input.
    """

    argument: ClassVar[str] = ""
    refusal: ClassVar[str] = ""
    paired: ClassVar[bool] = False
    from_data: ClassVar[bool] = False
    channels: int = 0

    def __init__(self, name: str) -> None:
        self.name = name

    def check(self, given: Given, count: int | None = None) -> None:
        """Refuse what this model cannot be given, and any other number of conditions than `count`.

        Raises:
            BadInput: naming the argument.
        """
        for kind in KINDS.values():
            value: Any = given.get(kind.argument)
            if value is not None and kind.argument != self.argument:
                shown = tuple(value.shape) if isinstance(value, Tensor) else list(value)
                raise BadInput(kind.argument, shown, f"nothing: {self.name} {kind.refusal}")
        self.check_negative(given.get("negative_prompts") or ())

    def check_negative(self, negatives: Sequence[str | None]) -> None:
        """Refuse a negative prompt with BadInput where no guidance leads away from it."""
        for negative in negatives:
            if negative is not None and not self.leads_away:
                raise BadInput("negative_prompt", negative, f"nothing: {self.name} {self.no_negative}")

    @property
    def leads_away(self) -> bool:
        """Whether guidance takes a pass without the condition, where a negative prompt can stand."""
        return False

    @property
    def no_negative(self) -> str:
        """Why there is no place for a negative prompt."""
        return Prompt.refusal

    def encode(self, given: Given, device: torch.device, size: tuple[int, int] | None = None) -> Cond | None:
        """Bring a checked condition into the network's form, for pictures of (H, W) pixels; None: the published."""
        return None

    def encode_items(self, items: Mapping[str, Tensor], device: str | torch.device) -> Cond:
        """Encode the conditions of items of a data set, for training."""
        return {}

    def of_items(self, items: Mapping[str, Tensor]) -> Given:
        """Take the conditions of items of a data set."""
        return {}

    def of_picture(self, grey: NDArray[np.floating], bands: str | None = None, file: str = "") -> NDArray[np.float32]:
        """Make a condition (C, H, W) of a grey picture (H, W), 0 black to 1 white.

        bands, file: what may say which polarisation it has: see `Radiometry.band_of_picture`.
        """
        raise BadInput("image", f"a picture of {grey.shape}", f"nothing: {self.name} {SarPicture.refusal}")

    def in_turn(self, numbers: Sequence[int], real: Tensor | None = None) -> Given:
        """Give picture number i the i-th of all conditions, over and over; `real` are those that cannot be made up.

        Raises:
            BadInput: this kind cannot be made up, and there are no real ones.
        """
        return {}

    def spread(self, count: int) -> Given:
        """Spread `count` pictures evenly over all conditions, in their order."""
        return {}

    def probe(self, count: int, classes: Sequence[int] | None = None) -> Given:
        """Make up conditions to test a model with; `classes` limits the labels."""
        return {}

    def example(self) -> Cond | None:
        """Make up one encoded condition, (1, ...), for its shapes."""
        return None

    def random(self, count: int, rng: torch.Generator) -> Cond | None:
        """Make up `count` encoded conditions that differ, without data."""
        return None

    def size(self, given: Given) -> tuple[int, int] | None:
        """Tell the height and width in pixels that a condition sets for its picture; None if it sets none."""
        return None

    def null_label(self, class_rows: int) -> int | None:
        """Tell the label that stands for no condition under classifier-free guidance; None without guidance.

        class_rows: rows of the network's class embedding. -1: the encoded condition holds its own null.
        """
        return None

    @property
    def choices(self) -> str:
        """What a caller may choose from, for messages; "" where that is no list."""
        return ""

    def names(self, given: Given, count: int) -> list[str | None]:
        """Name the condition of each of `count` pictures; None for what has no name."""
        return [None] * count

    def pictures(self, given: Given) -> dict[str, Tensor]:
        """Show the condition as pictures (B, 1, H, W) in [-1, 1], by the title of their row."""
        return {}

    def files(self, given: Given) -> dict[str, Tensor]:
        """Show each condition as a picture (1, H, W) in [-1, 1] that a caller can send, by the name of its file."""
        return {}


class ClassLabel(Condition):
    """The condition of a class-to-image model: the number of a class.

    Args:
        labels: names of all classes.
        classes: numbers of those that this model draws, ascending.
    """

    argument = "labels"
    refusal = "takes no class"

    def __init__(self, name: str, labels: Sequence[str], classes: Sequence[int]) -> None:
        super().__init__(name)
        self.labels, self.classes = labels, classes

    def check(self, given: Given, count: int | None = None) -> None:
        super().check(given, count)
        labels, allowed, known = given.get("labels"), f"one class per image, {self.choices}", set(self.classes)
        if labels is None:
            raise BadInput("labels", None, allowed)
        wrong = [label for label in labels if label not in known]
        if wrong or (count is not None and len(labels) != count):
            raise BadInput("labels", wrong or list(labels), allowed)

    def encode(self, given: Given, device: torch.device, size: tuple[int, int] | None = None) -> Cond | None:
        return {"label": torch.tensor(list(given["labels"] or ()), device=device)}

    def encode_items(self, items: Mapping[str, Tensor], device: str | torch.device) -> Cond:
        return {"label": items["label"].to(device)}

    def of_items(self, items: Mapping[str, Tensor]) -> Given:
        return {"labels": items["label"].tolist()}

    def in_turn(self, numbers: Sequence[int], real: Tensor | None = None) -> Given:
        return {"labels": [self.classes[i % len(self.classes)] for i in numbers]}

    def spread(self, count: int) -> Given:
        return {"labels": [self.classes[i * len(self.classes) // count] for i in range(count)]}

    def probe(self, count: int, classes: Sequence[int] | None = None) -> Given:
        asked = classes or self.classes
        return {"labels": [asked[i % len(asked)] for i in range(count)]}

    def example(self) -> Cond | None:
        return {"label": torch.zeros(1, dtype=torch.long)}

    def random(self, count: int, rng: torch.Generator) -> Cond | None:
        return {"label": torch.arange(count) % len(self.labels)}

    def null_label(self, class_rows: int) -> int | None:
        return len(self.labels) if 0 < len(self.labels) < class_rows else None

    @property
    def choices(self) -> str:
        """Name the classes by number: "0 to 23"; of a student that draws a share of them, the share."""
        first, last = self.classes[0], self.classes[-1]
        gapless = list(self.classes) == list(range(first, last + 1))
        numbers = f"{first} to {last}" if gapless else ", ".join(map(str, self.classes))
        return numbers + (f", the share of {self.name}" if len(self.classes) < len(self.labels) else "")

    def names(self, given: Given, count: int) -> list[str | None]:
        return [self.labels[label] for label in given.get("labels") or ()]


class SarPicture(Condition):
    """The condition of a sar-to-optical model: a picture of backscatter, from which one optical picture is right.

    Args:
        radiometry: which bands the model takes, and in what range.
        size: the published height and width in pixels.
    """

    argument = "sar"
    refusal = "is no translator"
    paired = True
    from_data = True

    def __init__(self, name: str, radiometry: Radiometry, codec: ImageCodec, size: tuple[int, int]) -> None:
        super().__init__(name)
        self.radiometry, self.codec, self.published = radiometry, codec, size
        self.channels = sar_channels(radiometry, codec)

    def check(self, given: Given, count: int | None = None) -> None:
        super().check(given, count)
        sar, channels = given.get("sar"), self.radiometry.channels
        if sar is None or sar.ndim != 4 or sar.shape[1] != channels or (count is not None and len(sar) != count):
            shape = None if sar is None else tuple(sar.shape)
            raise BadInput("sar", shape, f"shape ({count or 'B'}, {channels}, H, W) in [-1, 1]")
        if not bool((sar.abs() <= 1 + 1e-3).all()):  # also refuses NaN
            raise BadInput("sar", f"{sar.min()} to {sar.max()}", "values in [-1, 1]")

    def encode(self, given: Given, device: torch.device, size: tuple[int, int] | None = None) -> Cond | None:
        return self.encode_items({"sar": _sar_of(given)}, device)

    def encode_items(self, items: Mapping[str, Tensor], device: str | torch.device) -> Cond:
        return {"sar": encode_sar(items["sar"].to(device, torch.float32), self.radiometry, self.codec)}

    def of_items(self, items: Mapping[str, Tensor]) -> Given:
        return {"sar": items["sar"]}

    def of_picture(self, grey: NDArray[np.floating], bands: str | None = None, file: str = "") -> NDArray[np.float32]:
        return self.radiometry.from_picture(grey, self.radiometry.band_of_picture(bands, file))

    def in_turn(self, numbers: Sequence[int], real: Tensor | None = None) -> Given:
        if real is None or not len(real):
            allowed = "real SAR tiles (B,1,H,W) in [-1,1]: this model translates SAR, and noise is no SAR"
            raise BadInput("sar", None, allowed)
        return {"sar": real[[i % len(real) for i in numbers]]}

    def probe(self, count: int, classes: Sequence[int] | None = None) -> Given:
        """Make up a ramp of backscatter at the published size, the same in all channels."""
        down, across = (torch.linspace(-1, 1, length) for length in self.published)
        return {"sar": ((down[:, None] + across) / 2).expand(count, self.radiometry.channels, *self.published)}

    def example(self) -> Cond | None:
        return {"sar": torch.zeros(1, self.channels, *(length // self.codec.factor for length in self.published))}

    def random(self, count: int, rng: torch.Generator) -> Cond | None:
        side = (length // self.codec.factor for length in self.published)
        noise = torch.randn(count, self.codec.channels(self.radiometry.channels), *side, generator=rng)
        return {"sar": encode_sar(self.codec.decode(noise), self.radiometry, self.codec)}

    def size(self, given: Given) -> tuple[int, int] | None:
        height, width = _sar_of(given).shape[-2:]
        return height, width

    def pictures(self, given: Given) -> dict[str, Tensor]:
        seen = [self.radiometry.to_picture(one)[0] for one in _sar_of(given).cpu().numpy()]
        return {"SAR": torch.from_numpy(np.stack(seen))[:, None] * 2 - 1}

    def files(self, given: Given) -> dict[str, Tensor]:
        found = {}
        for i, one in enumerate(_sar_of(given).cpu().numpy()):
            grey, band = self.radiometry.to_picture(one)
            found[f"{i}-{band}.png" if band else f"{i}.png"] = torch.from_numpy(grey)[None] * 2 - 1
        return found


class Prompt(Condition):
    """The condition of a text-to-image model: a text.

    Args:
        encoder: the pipeline's; None where only the manifest was read.
        size: the published height and width in pixels, of which SDXL's encoder makes a condition.
        guided: whether the encoded condition holds that of the empty prompt, for classifier-free guidance.
    """

    argument = "prompts"
    refusal = "reads no text"
    from_data = True

    def __init__(self, name: str, encoder: PromptEncoder | None, size: tuple[int, int], guided: bool) -> None:
        super().__init__(name)
        self.encoder, self.published, self.guided = encoder, size, guided

    def check(self, given: Given, count: int | None = None) -> None:
        super().check(given, count)
        prompts = given.get("prompts")
        if prompts is None:
            raise BadInput("prompts", None, "one text per image")
        if count is not None and len(prompts) != count:
            raise BadInput("prompts", f"{len(prompts)} of them", f"one text per image, {count}")
        negatives = given.get("negative_prompts") or [None] * len(prompts)
        if len(negatives) != len(prompts):
            raise BadInput(
                "negative_prompts", f"{len(negatives)} of them", f"one text or none per image, {len(prompts)}"
            )
        texts = [("prompt", prompt) for prompt in prompts]
        texts += [("negative_prompt", negative) for negative in negatives if negative is not None]
        for field, text in texts:
            if not isinstance(text, str) or len(text) > LONGEST_PROMPT:
                shown = f"{len(text)} characters" if isinstance(text, str) else type(text).__name__
                raise BadInput(field, shown, f"a text of at most {LONGEST_PROMPT} characters")

    @property
    def leads_away(self) -> bool:
        return self.guided and self.encoder is not None and self.encoder.guides

    @property
    def no_negative(self) -> str:
        if self.encoder is not None and not self.encoder.guides:
            return "is told the scale of guidance, or distilled for one, and takes no pass without the prompt"
        return "draws without guidance (it is in a student's weights), so there is nothing to lead away from"

    def encode(self, given: Given, device: torch.device, size: tuple[int, int] | None = None) -> Cond | None:
        assert self.encoder is not None
        prompts = given["prompts"] or ()
        cond = self.encoder(prompts, size or self.published, given.get("negative_prompts"), guided=self.guided)
        return {name: value.to(device) for name, value in cond.items()}  # the encoders may stay on the CPU

    def encode_items(self, items: Mapping[str, Tensor], device: str | torch.device) -> Cond:
        """Encode captions, and no caption beside them: teachers are guided, and teachers to be learn to be."""
        if "text" in items:  # `training.encoded_texts` has encoded them before
            kinds = {k: torch.float32 if v.is_floating_point() else v.dtype for k, v in items.items()}
            return {k: v.to(device, kinds[k]) for k, v in items.items() if k.removeprefix("null_") in TOLD}
        assert self.encoder is not None
        prompts = unpack(items["caption"])
        if not self.encoder.learns:
            return self.encoder.to(device)(prompts, picture_size(items, self.published), guided=True)
        tokens = self.encoder.tokens([*prompts, ""]).to(device)
        return {"tokens": tokens[:-1], "null_tokens": tokens[-1:].expand_as(tokens[:-1])}

    def of_items(self, items: Mapping[str, Tensor]) -> Given:
        return {"prompts": unpack(items["caption"])}

    def in_turn(self, numbers: Sequence[int], real: Tensor | None = None) -> Given:
        return {"prompts": [PROMPTS[i % len(PROMPTS)] for i in numbers]}

    def spread(self, count: int) -> Given:
        return {"prompts": [PROMPTS[i * len(PROMPTS) // count] for i in range(count)]}

    def probe(self, count: int, classes: Sequence[int] | None = None) -> Given:
        return {"prompts": [PROMPTS[i % len(PROMPTS)] for i in range(count)]}

    def example(self) -> Cond | None:
        return None if self.encoder is None else self.encode_items({"caption": pack(PROMPTS[:1])}, "cpu")

    def random(self, count: int, rng: torch.Generator) -> Cond | None:
        return None if self.encoder is None else self.encode(self.probe(count), torch.device("cpu"))

    def null_label(self, class_rows: int) -> int | None:
        return -1

    def names(self, given: Given, count: int) -> list[str | None]:
        prompts = given.get("prompts")
        return [None] * count if prompts is None else list(prompts)


KINDS: dict[str, type[Condition]] = {
    "image": Condition,
    "class-to-image": ClassLabel,
    "sar-to-optical": SarPicture,
    "text-to-image": Prompt,
}


def picture_size(items: Mapping[str, Tensor], otherwise: tuple[int, int]) -> tuple[int, int]:
    """Tell the height and width in pixels of the pictures of a batch: "size" (B, 2), or of its "image"."""
    if "size" in items:
        height, width = items["size"][0].tolist()
        return height, width
    return tuple(items["image"].shape[-2:]) if "image" in items else otherwise  # type: ignore[return-value]


# --- SAR as channels beside the noisy image --------------------------------------------------------------------------
def encode_sar(sar: Tensor, radiometry: Radiometry, codec: ImageCodec) -> Tensor:
    """Turn SAR (B, C, H, W) in [-1, 1] into the channels (B, `sar_channels`, H / factor, W / factor) of a network.

    The pixels alone do not tell a network how bright a place is: group normalisation (Wu and He 2018) subtracts each
    tile's mean, so that smooth sea and smooth soil look alike. So the local mean is given besides as a phase, whose
    sine and cosine at several frequencies vary within the tile (Tancik et al. 2020, "Fourier Features Let Networks
    Learn High Frequency Functions"). The manifest says which of this a model takes (`Radiometry.levels`,
    `Radiometry.calibrated`); without them it takes the pixels alone.

    In this order: the bands' pixels, space to depth; for each size of window the sines, then the cosines of the local
    means, frequency by frequency, band by band; 1 for each band that is there, 0 for one that is 0 everywhere; the
    plane that says whether levels are absolute.
    """
    bands = sar[:, : radiometry.band_count]
    parts = [codec.encode(bands)]
    if radiometry.levels:
        cells = F.avg_pool2d(bands, codec.factor)
        for n in radiometry.levels.cells:  # a window counts only what lies inside the picture
            mean = F.avg_pool2d(cells, n, stride=1, padding=n // 2, count_include_pad=False)
            phases = [math.pi / 2 * 2**k * mean for k in range(radiometry.levels.frequencies)]  # the first: monotone
            parts += [torch.sin(phase) for phase in phases] + [torch.cos(phase) for phase in phases]
        there = (bands != 0).any(-1).any(-1).to(cells)  # without it a missing band would look like a middle level
        parts.append(there[..., None, None].expand_as(cells))
    if radiometry.calibrated:
        parts.append(F.avg_pool2d(sar[:, radiometry.band_count :], codec.factor))
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


def sar_channels(radiometry: Radiometry, codec: ImageCodec) -> int:
    """Count the channels that `encode_sar` returns."""
    count = codec.channels(radiometry.band_count) + radiometry.calibrated
    if radiometry.levels:
        count += radiometry.band_count * (2 * len(radiometry.levels.cells) * radiometry.levels.frequencies + 1)
    return count


def _sar_of(given: Given) -> Tensor:
    sar = given.get("sar")
    assert sar is not None, "checked before"
    return sar
