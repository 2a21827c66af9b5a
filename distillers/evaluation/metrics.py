"""Compute distances between sets of pictures in a feature space, and between pairs of pictures in pixels.

Pictures are (B, C, H, W) in [-1, 1]; features are (N, d) float64.
"""

import math
import warnings

import torch
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from distillers.errors import BadInput

PSNR_CAP = 100.0  # dB; identical pictures would be infinite, which JSON cannot say

SSIM_WINDOW = 11  # pixels; smaller pictures have no SSIM


# --- distances between sets of features


class _Extracted(nn.Identity):
    """Give torchmetrics features that are already extracted: one pass of the network serves every distance."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


@torch.no_grad()
def extract(features: nn.Module, pictures: Tensor, batch: int = 64) -> Tensor:
    """Compute features (N,d), float64 on the CPU, of pictures (N,C,H,W) in [-1,1] by a module that returns (B,d)."""
    return torch.cat([features(part).double().cpu() for part in pictures.split(batch)])


def frechet_distance(real: Tensor, fake: Tensor, *, few: bool = False) -> float:
    """Compute the squared Frechet distance of (N,d) and (M,d) as Gaussians: |m-m'|^2 + Tr(C + C' - 2(CC')^1/2).

    Heusel et al. 2017, eq. 6, by torchmetrics in float64.

    Args:
        few: allow sets of 2 or more, whose covariances are singular; the caller says so beside the number.

    Raises:
        BadInput: sets that do not exceed d, other shapes, values that are not finite.
    """
    _check_features(real, fake, 2 if few else real.shape[1] + 1)
    metric = FrechetInceptionDistance(feature=_Extracted(real.shape[1]), normalize=True)
    metric.update(real.double(), real=True)
    metric.update(fake.double(), real=False)
    return max(float(metric.compute()), 0.0)


def kernel_distance(real: Tensor, fake: Tensor, *, subsets: int = 20, seed: int = 0) -> tuple[float, float]:
    """Compute KID, its mean and standard deviation over random subsets of half the smaller set, at most 1000.

    It is unbiased, so it may be slightly negative; the deviation is between overlapping subsets. Binkowski et al. 2018,
    by torchmetrics.

    Raises:
        BadInput: fewer than 4 pictures in a set, other shapes, values that are not finite.
    """
    _check_features(real, fake, 4)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # "will save all extracted features in buffer"
        torch.manual_seed(seed)
        size = min(len(real) // 2, len(fake) // 2, 1000)
        metric = KernelInceptionDistance(feature=_Extracted(real.shape[1]), subsets=subsets, subset_size=size)
        metric.update(real.double(), real=True)
        metric.update(fake.double(), real=False)
        mean, deviation = metric.compute()
    return float(mean), float(deviation)


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Compute precision, the share of fakes inside the real manifold, and recall, of reals inside the fake one.

    The manifold of a set is the union of balls around its points that reach the k-th nearest other point
    (Kynkaanniemi et al. 2019, eq. 1-2).

    Raises:
        BadInput: k or fewer pictures in a set, other shapes, values that are not finite.
    """
    _check_features(real, fake, k + 1)
    return _inside(fake, real, k), _inside(real, fake, k)


def distances(real: Tensor, fake: Tensor) -> dict[str, float]:
    """Compute the figures of a row that compare two sets of features, (N,d) and (M,d)."""
    kid_mean, kid_std = kernel_distance(real, fake)
    precision, recall = precision_recall(real, fake)
    return {
        "frechet": frechet_distance(real, fake),
        "kid_mean": kid_mean,
        "kid_std": kid_std,
        "precision": precision,
        "recall": recall,
    }


def _inside(points: Tensor, manifold: Tensor, k: int) -> float:
    """Return the share of points inside the manifold of a set."""
    distances = (torch.cdist(part, manifold) for part in manifold.split(1000))
    # k + 1: the nearest is the point itself
    radius = torch.cat([part.topk(k + 1, dim=1, largest=False).values[:, k] for part in distances])
    near = [(torch.cdist(part, manifold) <= radius).any(1) for part in points.split(1000)]
    return float(torch.cat(near).double().mean())


def _check_features(real: Tensor, fake: Tensor, least: int) -> None:
    """Refuse with BadInput features of other shapes, fewer than `least` in a set, or values that are not finite."""
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise BadInput("features", (tuple(real.shape), tuple(fake.shape)), "(N,d) and (M,d) with one d")
    if min(len(real), len(fake)) < least:
        raise BadInput(
            "n", min(len(real), len(fake)), f"{least} or more pictures in each set ({real.shape[1]} features)"
        )
    if bad := int((~torch.cat([real, fake]).isfinite()).any(1).sum()):  # LAPACK may crash on them
        raise BadInput("features", f"no finite ones for {bad} pictures", "finite pictures: look at the model's weights")


# --- pairs of pictures


def psnr(fake: Tensor, real: Tensor) -> Tensor:
    """Compute the peak signal-to-noise ratio (B,) in dB of pictures in [-1,1], at most PSNR_CAP."""
    value = peak_signal_noise_ratio(fake.float(), real.float(), data_range=2.0, reduction="none", dim=(1, 2, 3))
    return value.clamp(max=PSNR_CAP)


def ssim(fake: Tensor, real: Tensor) -> Tensor:
    """Compute the structural similarity (B,) with an 11-pixel Gaussian window; nan where a side is under 11 pixels."""
    if min(real.shape[-2:]) < SSIM_WINDOW:
        return torch.full((len(real),), math.nan)
    value = structural_similarity_index_measure(
        (fake.float() + 1) / 2, (real.float() + 1) / 2, data_range=1.0, reduction="none"
    )
    assert isinstance(value, Tensor)  # a pair only where the full image is asked for
    return value.reshape(len(real))


def shifted_psnr(fake: Tensor, real: Tensor, reach: int = 2) -> Tensor:
    """Compute the best PSNR (B,) in dB over shifts of up to `reach` pixels, for pairs that are registered no better."""
    inner, (height, width) = real[..., reach:-reach, reach:-reach], real.shape[-2:]
    tried = [
        psnr(fake[..., dy : height - 2 * reach + dy, dx : width - 2 * reach + dx], inner)
        for dy in range(2 * reach + 1)
        for dx in range(2 * reach + 1)
    ]
    return torch.stack(tried).amax(0)


def copy_ratio(fake: Tensor, real: Tensor, sar: Tensor) -> Tensor:
    """Divide mean |fake - SAR| by mean |fake - real|, (B,), for grey SAR (B,1,H,W); below 1 it is nearly copied."""
    return (fake - sar).abs().mean((1, 2, 3)) / (fake - real).abs().mean((1, 2, 3)).clamp_min(1e-6)


def rmse(fake: Tensor, real: Tensor) -> Tensor:
    """Compute the root mean square difference (B,) of pictures, in units of their range [-1,1]."""
    return (fake.float() - real.float()).square().mean((1, 2, 3)).sqrt()


def mean(values: Tensor) -> float | None:
    """Average figures of pictures (B,) to a number; None where one is nan."""
    value = float(values.double().mean())
    return None if math.isnan(value) else value
