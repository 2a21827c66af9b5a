"""Scene throughput: the figures are those of what ran, in the units they are printed in."""

from pathlib import Path

import pytest
import torch

from distillers.benchmarks.scene import measure, table
from distillers.errors import BadInput
from distillers.generator import Generator
from distillers.models.codec import PixelUnshuffle
from distillers.models.radiometry import SENTINEL1_DB
from distillers.models.schedule import VariancePreserving
from distillers.teacher import Teacher
from distillers.weights.manifest import Info
from distillers.weights.write import lcm_times

pytest.importorskip("rasterio", reason="scenes need rasterio: pip install 'fewstep[raster]'")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    schedule = VariancePreserving.from_betas()
    info = Info(
        name="tiny", task="sar-to-optical", method="test", role="student", data="d", sampler="consistency",
        size=(64, 64), step_times={1: lcm_times(schedule, 1)}, patch=2, sar=SENTINEL1_DB.to_dict(),
    )  # fmt: skip
    network = {
        "block_out_channels": (8,), "layers_per_block": 1, "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",), "norm_num_groups": 4, "add_attention": False,
    }  # fmt: skip
    teacher = Teacher.random(info, network, schedule.to_config(), "x0", PixelUnshuffle(2))
    made = tmp_path_factory.mktemp("weights") / "tiny"
    Generator(teacher.denoiser, teacher.codec, info).save_pretrained(made)
    return made


@pytest.mark.process
def test_throughput_is_measured_from_file_to_file_beside_the_bare_pass(folder: Path) -> None:
    found = measure(folder, [512], rounds=1, widths=[1500], samples=[2])
    (size,), (memory,) = found.sizes, found.memory
    assert (found.model, found.steps, size.side, size.tiles) == ("tiny", 1, 512, 9)
    assert size.overlap == pytest.approx(9 * 256**2 / 512**2)
    assert size.tile_megapixels_per_second == pytest.approx(size.megapixels_per_second * size.overlap)
    assert size.ratio == pytest.approx(size.tile_megapixels_per_second / size.bare_megapixels_per_second, rel=1e-6)
    assert 0 < size.ratio < 1.5 and 0 < size.idle_mb < size.peak_mb + 50 and size.peak_mb < 2000
    assert (memory.width, memory.samples) == (1500, 2) and 0 < memory.above_mb < 400
    assert "| 512 x 512 | 9 |" in table(found) and "2.25" in table(found) and "| 1500 x 512 | 2 |" in table(found)


@pytest.mark.parametrize(("sides", "rounds"), [([100], 1), ([512], 0)])
def test_what_cannot_be_measured_is_refused(folder: Path, sides: list[int], rounds: int) -> None:
    with pytest.raises(BadInput, match="sides, rounds"):
        measure(folder, sides, rounds=rounds)
    with pytest.raises(BadInput, match="samples"):
        measure(folder, [512], rounds=1, widths=[512], samples=[0])
