"""Calibration against a world where the right answer is known: truth and samples from one distribution, or not."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from distillers.errors import BadInput
from distillers.evaluation.calibration import LEVELS, SHARES, Calibration, calibrate
from distillers.evaluation.metrics import copy_ratio, psnr, shifted_psnr
from distillers.generator import Generator
from distillers.models.band import BINS, Band, count_errors, fit_half_widths, share_held
from distillers.models.codec import PixelUnshuffle
from distillers.models.denoiser import Denoiser
from distillers.models.schedule import VariancePreserving
from distillers.weights.manifest import Info

DEVIATION = (0.05, 0.25)  # of dark and of bright ground, in units of [-1, 1]


class World:
    """Optical is half the SAR plus noise, five times as much of it where the SAR is bright."""

    name, size, labels, channels = "world", (16, 16), (), 3

    def __len__(self) -> int:
        return 64

    def items(self, indices: Sequence[int]) -> dict[str, Tensor]:
        rng = torch.Generator().manual_seed(5)
        bright = (torch.rand(64, 1, 16, 16, generator=rng) > 0.5).float()
        truth = (
            0.4 * bright
            - 0.2
            + (DEVIATION[0] + bright * (DEVIATION[1] - DEVIATION[0])) * torch.randn(64, 3, 16, 16, generator=rng)
        )
        return {"sar": bright[list(indices)] * 1.6 - 0.8, "image": truth[list(indices)]}

    def draw(self, n: int, rng: np.random.Generator) -> dict[str, Tensor]:
        return self.items(rng.integers(64, size=n).tolist())


class Sampler(nn.Module):
    """Draws what the world draws, its deviation times `spread`."""

    def __init__(self, spread: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(spread))
        self.config = type("config", (dict,), {"__getattr__": dict.__getitem__})(block_out_channels=(8,))

    def forward(self, x: Tensor, time: Tensor) -> Any:
        noise, bright = x[:, :3], (x[:, 3:] > 0).float()
        deviation = DEVIATION[0] + bright * (DEVIATION[1] - DEVIATION[0])
        return type("out", (), {"sample": 0.4 * bright - 0.2 + self.weight * deviation * noise})


def sampler(spread: float, task: str = "sar-to-optical") -> Generator:
    info = Info(
        name="sampler", task=task, method="test", role="student", data="world", sampler="consistency", size=(16, 16),
        step_times={1: [999.0]}, sar={"channels": 1},
    )  # fmt: skip
    return Generator(Denoiser(Sampler(spread), VariancePreserving.from_betas(), "x0"), PixelUnshuffle(1), info)


def test_samples_of_the_true_distribution_are_calibrated() -> None:
    found = calibrate(sampler(1.0), World(), samples=15)
    assert found.n == 64 and sum(found.ranks) == pytest.approx(1)
    assert np.array(found.ranks) == pytest.approx(np.full(16, 1 / 16), abs=0.004)
    for should, is_ in found.coverage():
        assert is_ == pytest.approx(should, abs=0.01)
    assert found.spread_over_skill == pytest.approx(1, abs=0.02)
    assert found.deviation == pytest.approx(LEVELS * np.sqrt(np.mean(np.square(DEVIATION))), rel=0.03)
    assert found.rank_correlation > 0.6 and not found.collapsed
    assert found.ause < 0.5 * found.ause_of_chance


def test_too_narrow_samples_are_found_out() -> None:
    found = calibrate(sampler(0.4), World(), samples=15)
    should, is_ = found.coverage()[0]
    assert should == 14 / 16 and is_ < 0.65
    assert found.ranks[0] > 2 / 16 and found.spread_over_skill == pytest.approx(0.4, abs=0.02)
    assert "too narrow" in found.markdown()


def test_a_student_without_spread_has_collapsed() -> None:
    found = calibrate(sampler(0.0), World(), samples=4)
    assert found.collapsed and found.rank_correlation == 0 and "collapsed to a point" in found.markdown()


def test_sparsification_knows_the_best_order_and_chance() -> None:
    found = calibrate(sampler(1.0), World(), samples=15)
    assert found.by_error[0] == found.by_deviation[0] == pytest.approx(1)
    assert all(a >= b for a, b in zip(found.by_deviation, found.by_error, strict=True))
    assert found.by_error[-1] < 0.1 and sorted(found.by_error, reverse=True) == found.by_error
    half = SHARES.index(0.5)  # without the bright half, the dark half's error is left
    rest = DEVIATION[0] / np.sqrt(np.mean(np.square(DEVIATION)))
    assert found.by_deviation[half] == pytest.approx(rest, abs=0.03)
    assert found.ause_of_chance > found.ause > 0


def test_the_report_is_written_with_curves_and_tiles(tmp_path: Path) -> None:
    found = calibrate(sampler(1.0), World(), samples=5, n=12, picture=tmp_path / "tiles.png")
    found.save(tmp_path / "calibration.json")
    told = json.loads((tmp_path / "calibration.json").read_text())
    assert told["shares"] == SHARES and told["markdown"] == found.markdown()
    again = Calibration(**{k: v for k, v in told.items() if k not in ("shares", "markdown")})
    assert again == found
    with Image.open(tmp_path / "calibration.png") as curves, Image.open(tmp_path / "tiles.png") as tiles:
        assert curves.width > curves.height and tiles.height > 5 * 16 * 8


# --- the band


@pytest.mark.parametrize("spread", [0.0, 0.4, 1.0, 3.0])
def test_the_fitted_band_holds_what_it_says_whatever_the_samples_do(spread: float) -> None:
    found = calibrate(sampler(spread), World(), samples=15)
    band = Band(**found.band)
    assert band.measured == pytest.approx(0.9, abs=0.02) and band.worst > 0.85  # steps of a quarter level, rounded up
    assert abs(band.uncorrected - 0.9) > 0.05 or spread == 1
    assert f"{100 * band.measured:.1f}" in found.markdown() and "not at every place" in found.markdown()


def test_half_widths_follow_the_deviation() -> None:
    """Truth of deviation d around the mean of 15 samples: 90 % lie within 1.645 d sqrt(1 + 1/15)."""
    band = Band(**calibrate(sampler(0.4), World(), samples=15).band)
    dark, bright = (1.645 * deviation * LEVELS * np.sqrt(1 + 0.16 / 15) for deviation in DEVIATION)
    low, high = band.around(np.full(2, 100.0), 0.4 * LEVELS * np.array(DEVIATION))
    assert (high - low) / 2 == pytest.approx([dark, bright], rel=0.08)
    low, high = band.around(np.array([1.0, 254.0]), np.array([50.0, 50.0]))
    assert low[0] == 0 and high[1] == 255


def test_a_half_width_is_the_smallest_that_holds_the_share_of_its_level() -> None:
    errors = np.arange(1, 20) / BINS  # 19 errors: the ceil(20 * 0.9) = 18th smallest
    limits, half_widths = fit_half_widths(count_errors(np.zeros(19), errors))
    assert limits == [] and half_widths == [18 / BINS]
    limits, half_widths = fit_half_widths(count_errors(np.repeat([1.0, 9.0], 19), np.concatenate([errors, 3 * errors])))
    assert limits == [1.0] and half_widths == [18 / BINS, 54 / BINS]
    assert share_held(count_errors(np.array([1.0, 1.0, 1.1]), np.array([4.5, 4.6, 13.5])), limits, half_widths) == 2 / 3


def test_a_band_is_read_from_the_folder_and_a_damaged_one_refused(tmp_path: Path) -> None:
    assert Band.read(tmp_path) is None
    found = calibrate(sampler(1.0), World(), samples=5)
    found.save(tmp_path / "calibration.json")
    assert Band.read(tmp_path).to_dict() == found.band
    few = calibrate(sampler(1.0), World(), samples=5, n=9)  # too few tiles to hold a part back
    assert few.band is None
    few.save(tmp_path / "calibration.json")
    assert Band.read(tmp_path) is None
    for wrong in ({**found.band, "limits": [3.0, 1.0]}, {**found.band, "half_widths": "wide"}, {"share": 0.9}, [1]):
        (tmp_path / "calibration.json").write_text(json.dumps({"band": wrong}))
        with pytest.raises(BadInput, match="band"):
            Band.read(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "field"), [({"samples": 1}, "samples, n"), ({"n": 0}, "samples, n"), ({"task": "image"}, "model")]
)
def test_what_cannot_be_calibrated_is_refused(arguments: dict[str, Any], field: str) -> None:
    model = sampler(1.0, arguments.pop("task", "sar-to-optical"))
    with pytest.raises(BadInput) as caught:
        calibrate(model, World(), **arguments)
    assert caught.value.field == field


# --- pictures that lie a pixel off, and pictures that are the SAR


def test_a_shift_of_two_pixels_is_forgiven_and_one_of_three_is_not() -> None:
    real = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for shift in ((2, -2), (0, 1)):
        moved = real.roll(shift, (2, 3))
        assert shifted_psnr(moved, real).min() > 50 > 12 > psnr(moved, real).max()
    assert shifted_psnr(real.roll(3, 2), real).max() < 12
    assert torch.allclose(shifted_psnr(real, real), psnr(real, real))


def test_the_copy_ratio_is_small_for_a_copy() -> None:
    sar, real = torch.full((2, 1, 8, 8), -0.5), torch.full((2, 3, 8, 8), 0.5)
    assert copy_ratio(sar.expand(2, 3, 8, 8) + 0.01, real, sar).max() < 0.02
    assert copy_ratio(real - 0.01, real, sar).min() > 90
