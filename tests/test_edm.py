"""Teachers preconditioned as in Karras et al. 2022: opened, distilled by every method, drawn by stock diffusers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adm_reference import DhariwalUNet, EDMPrecond
from diffusers import DDPMPipeline, DiffusionPipeline, EDMDPMSolverMultistepScheduler, EDMEulerScheduler
from folders import noise, save
from networks import unet
from torch import Tensor
from trainings import NETWORK, batch_for, iterate, teacher_for
from typer.testing import CliRunner

from distillers import methods
from distillers.cli import app as command
from distillers.data import ImageData, open_data
from distillers.errors import BadInput
from distillers.generator import Generator
from distillers.jobs.distill import distill
from distillers.jobs.recipe import Recipe
from distillers.models.denoiser import Denoiser
from distillers.models.fixed_time import as_first_timestep
from distillers.models.schedule import EDM, VariancePreserving, from_config
from distillers.teacher import Teacher
from distillers.weights.manifest import AUTOENCODER, EDM_PREDICTIONS

ROOT = Path(__file__).resolve().parents[1]
RANGE: dict[str, Any] = {"sigma_min": 0.003, "sigma_max": 40.0, "sigma_data": 0.37, "rho": 5.0}
every_kind = pytest.mark.parametrize("kind", EDM_PREDICTIONS)


def stock(folder: Path, scheduler: Any, **options: Any) -> Path:
    """Save a pipeline by diffusers' own classes, untrained."""
    DDPMPipeline(unet(sample_size=16, **options), scheduler).save_pretrained(folder)  # type: ignore[arg-type]
    return folder


def drawn_by_stock(folder: Path, seed: int, steps: int, **more: Any) -> Tensor:
    """Draw one picture (1, C, H, W) in [-1, 1] by the pipeline that a folder's index names."""
    pipeline: Any = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    start = torch.Generator().manual_seed(seed)
    images = pipeline(num_inference_steps=steps, generator=start, output_type="np", **more).images
    return torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1


@every_kind
def test_the_network_is_read_as_diffusers_schedulers_read_it(kind: str) -> None:
    scheduler = EDMEulerScheduler(**RANGE, prediction_type=kind)  # type: ignore[arg-type]
    schedule = EDM(0.003, 40.0, 0.37, 5.0)
    torch.manual_seed(0)
    x0, output = torch.randn(2, 6, 4).unbind(0)
    for sigma in (0.003, 0.4, 40.0):
        t = torch.tensor(sigma, dtype=torch.float64)
        x_t = schedule.add_noise(x0, torch.randn_like(x0), t)
        theirs = scheduler.precondition_outputs(x_t, output, t.float())
        ours = schedule.x0_from(EDM_PREDICTIONS[kind], output, x_t, t)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        again = schedule.output_from(EDM_PREDICTIONS[kind], ours, x_t, t)
        torch.testing.assert_close(again, output, atol=1e-2 if sigma < 0.01 else 1e-4, rtol=1e-3)
        told: list[Tensor] = []

        def network(x: Tensor, time: Tensor, told: list[Tensor] = told) -> Tensor:
            told += [x, time]
            return output

        module: Any = torch.nn.Module()
        module.forward = network
        torch.testing.assert_close(Denoiser(module, schedule, EDM_PREDICTIONS[kind])(x_t, t), ours)
        torch.testing.assert_close(told[0], scheduler.precondition_inputs(x_t, t.float()))
        torch.testing.assert_close(told[1], scheduler.precondition_noise(t.float()).expand(6), atol=1e-6, rtol=1e-5)


def test_the_target_has_unit_size_at_every_time() -> None:
    schedule = EDM()
    for t in schedule.grid(7):
        x0, eps = 0.5 * torch.randn(20_000), torch.randn(20_000)
        target = schedule.output_from("edm", x0, schedule.add_noise(x0, eps, t), t)
        assert float(target.std()) == pytest.approx(1, rel=0.03)


def test_under_unit_data_and_variance_preserving_noise_it_is_the_velocity() -> None:
    schedule, t = VariancePreserving.from_betas(), torch.tensor(600.0)
    x_t, x0 = torch.randn(2, 5)
    torch.testing.assert_close(schedule.output_from("edm-v", x0, x_t, t), schedule.v_from(x0, x_t, t))


@every_kind
@pytest.mark.parametrize("solver", [EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
def test_a_teacher_draws_what_a_stock_loop_draws(kind: str, solver: Any, tmp_path: Path) -> None:
    folder = stock(tmp_path / "t", solver(**RANGE, prediction_type=kind))
    teacher, network = Generator.from_pretrained(folder), unet(sample_size=16)
    assert teacher.schedule.to_config() == {
        "name": "edm",
        "t_min": 0.003,
        "t_max": 40.0,
        "sigma_data": 0.37,
        "rho": 5.0,
    }
    for steps in (1, 2, 7):
        scheduler: Any = EDMEulerScheduler(**RANGE, prediction_type=kind)  # type: ignore[arg-type]
        scheduler.set_timesteps(steps)
        x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(3)) * scheduler.init_noise_sigma
        with torch.no_grad():
            for t in scheduler.timesteps:
                x = scheduler.step(network(scheduler.scale_model_input(x, t), t).sample, t, x).prev_sample
        torch.testing.assert_close(teacher.sample([3], steps=steps), x.clamp(-1, 1), atol=5e-5, rtol=0)
    teacher.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(
        drawn_by_stock(tmp_path / "again", 3, 7), teacher.sample([3], steps=7), atol=5e-3, rtol=0
    )


@pytest.fixture(scope="module")
def data() -> ImageData:
    return open_data("shapes", size=8)


def preconditioned(data: ImageData, kind: str = "class-to-image") -> Teacher:
    """A teacher with labels, or another task, on EDM's schedule."""
    teacher = teacher_for(kind, data)
    teacher.denoiser.schedule, teacher.denoiser.prediction = EDM(0.003, 40.0, 0.37, 5.0), "edm-v"
    return teacher


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in methods.names()
        if AUTOENCODER not in methods.find(name).tasks and "class-to-image" in methods.find(name).tasks
    ],
)
def test_every_methods_student_draws_the_same_picture_in_stock_diffusers(
    name: str, data: ImageData, tmp_path: Path
) -> None:
    teacher, method = preconditioned(data), methods.find(name)()
    nets = method.networks(teacher)
    assert iterate(method, nets, batch_for(teacher, data, method.draws(0.0)), 0.0)
    made = method.generator(nets, teacher).eval()
    made.save_pretrained(tmp_path / "made")
    opened, steps = Generator.from_pretrained(tmp_path / "made"), made.info.default_steps
    ours = opened.sample([5], steps=steps, labels=[2])
    torch.testing.assert_close(ours, made.sample([5], steps=steps, labels=[2]), atol=2e-2, rtol=0)
    if (tmp_path / "made" / "model_index.json").is_file():
        torch.testing.assert_close(drawn_by_stock(tmp_path / "made", 5, steps, class_labels=2), ours, atol=2e-4, rtol=0)
    else:  # noise between steps, which no stock scheduler of EDM adds
        assert steps > 1 and opened.info.sampler == "consistency"


def test_the_steps_of_a_student_are_those_of_the_stock_scheduler(data: ImageData, tmp_path: Path) -> None:
    """Ends of four segments, below each other in the grid of eight."""
    teacher = preconditioned(data)
    times = teacher.denoiser.schedule.segment_grid(8)[1:].flip(0)[::2].tolist()
    info = teacher.info.__class__(**{**vars(teacher.info), "step_times": {4: times}, "default_steps": 4})
    Generator(teacher.denoiser, teacher.codec, info).save_pretrained(tmp_path / "x")
    ours = Generator.from_pretrained(tmp_path / "x").sample([5], labels=[2])
    torch.testing.assert_close(drawn_by_stock(tmp_path / "x", 5, 4, class_labels=2), ours, atol=2e-4, rtol=0)


def test_a_network_called_at_one_time_is_rewritten_for_another(data: ImageData) -> None:
    own = Denoiser(unet(num_class_embeds=4), EDM(), "x0").eval()
    rewritten, eps = as_first_timestep(own), torch.randn(3, 3, 8, 8)
    cond = {"label": torch.tensor([0, 1, 3])}
    t, zero = torch.tensor(own.schedule.t_min, dtype=torch.float64), torch.zeros(())
    with torch.no_grad():
        expected = own(own.schedule.start(eps, t), t, cond)
        torch.testing.assert_close(
            rewritten(rewritten.schedule.start(eps, zero), zero, cond), expected, atol=1e-5, rtol=1e-4
        )
    fourier = Denoiser(unet(time_embedding_type="fourier"), EDM(), "x0")
    with pytest.raises(BadInput, match="UNet2DModel with fourier times"):
        as_first_timestep(fourier)
    teacher = teacher_for("image", data)
    teacher.denoiser.network, teacher.denoiser.schedule = fourier.network, EDM()
    with pytest.raises(BadInput, match="fourier"):
        methods.find("boot")().networks(teacher)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for i in range(6):
        save(tmp_path / "mine" / f"{i}.png", noise(i))
    return tmp_path / "mine"


@pytest.mark.parametrize("method", ["consistency", "boot", "dmd2", "hyper_sd"])
def test_from_a_stock_folder_to_a_stock_folder(method: str, pictures: Path, tmp_path: Path) -> None:
    teacher = stock(tmp_path / "t", EDMEulerScheduler(**RANGE))
    train = {"iterations": 1, "batch": 2, "samples": 1, "tracker": "none"}
    table = {"name": "mine", "method": method, "teacher": str(teacher), "train": train}
    distill(Recipe.from_table({**table, "data": {"path": str(pictures)}}), tmp_path / "made", "cpu")
    ours = Generator.from_pretrained(tmp_path / "made").sample([4], steps=1)
    torch.testing.assert_close(drawn_by_stock(tmp_path / "made", 4, 1), ours, atol=2e-4, rtol=0)


def test_a_student_may_start_at_a_lower_noise_and_the_folder_says_so(pictures: Path, tmp_path: Path) -> None:
    teacher = stock(tmp_path / "t", EDMEulerScheduler(**RANGE))
    train = {"iterations": 1, "batch": 2, "samples": 1, "tracker": "none"}
    table = {"name": "mine", "method": "consistency", "teacher": str(teacher), "train": train}
    table["data"] = {"path": str(pictures)}
    distill(Recipe.from_table({**table, "student": {"start_time": 2.5}}), tmp_path / "made", "cpu")
    student = Generator.from_pretrained(tmp_path / "made")
    assert student.times(1) == [student.schedule.t_max] == pytest.approx([2.5])
    torch.testing.assert_close(drawn_by_stock(tmp_path / "made", 4, 1), student.sample([4], steps=1), atol=2e-4, rtol=0)
    for wrong in (41.0, 0.003):
        with pytest.raises(BadInput, match=r"student\.start_time: got .*; allowed: a sigma above 0.003, up to 40"):
            distill(Recipe.from_table({**table, "student": {"start_time": wrong}}), tmp_path / "no", "cpu")


def test_a_recipe_trains_one(pictures: Path, tmp_path: Path) -> None:
    model = {"prediction": "edm", "schedule": {"name": "edm", "sigma_data": 0.4}, "network": NETWORK}
    train = {"iterations": 1, "batch": 2, "samples": 1, "tracker": "none"}
    table = {"name": "t", "method": "diffusion", "data": {"path": str(pictures), "size": 8}, "model": model}
    table["diffusion"] = {"log_std": 1.2, "log_mean": -1.2, "sampling_steps": 2}
    distill(Recipe.from_table({**table, "train": train}), tmp_path / "t", "cpu")
    denoiser = Teacher.from_pretrained(tmp_path / "t").denoiser
    assert (denoiser.prediction, denoiser.schedule.sigma_data) == ("edm", 0.4)


def test_adopted_teachers_are_served_with_their_preconditioning(tmp_path: Path) -> None:
    teacher = stock(tmp_path / "t", EDMDPMSolverMultistepScheduler(**RANGE, prediction_type="v_prediction"))  # type: ignore[arg-type]
    done = CliRunner().invoke(command, ["adopt", str(teacher), str(tmp_path / "a")])
    assert done.exit_code == 0, done.output
    pair = [Generator.from_pretrained(folder).sample([1], steps=4) for folder in (teacher, tmp_path / "a")]
    torch.testing.assert_close(*pair, atol=1e-2, rtol=0)


@pytest.mark.parametrize("wrong", [{"t_max": 0.001}, {"t_min": -1.0}, {"sigma_data": 0.0}, {"rho": 0.0}])
def test_ranges_that_are_none_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(BadInput, match="sigma_data"):
        from_config({"name": "edm", **wrong})


def test_the_schedule_is_described_whole() -> None:
    config = {"name": "edm", "t_min": 0.01, "t_max": 50.0, "sigma_data": 0.3, "rho": 5.0}
    schedule = from_config(config)
    assert schedule.to_config() == config
    scheduler = EDMEulerScheduler(sigma_min=0.01, sigma_max=50.0, sigma_data=0.3, rho=5.0)
    scheduler.set_timesteps(9)
    np.testing.assert_allclose(schedule.sampling_times(9), scheduler.sigmas[:9].numpy(), rtol=1e-5)


# --- the converter of public pickles
def converter() -> Any:
    """The script of docs/, which is no module of the library."""
    spec = importlib.util.spec_from_file_location("convert_edm", ROOT / "docs" / "convert-edm.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("bands", "labels"), [(3, 5), (1, 0)])
def test_a_public_network_is_converted_exactly(bands: int, labels: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = EDMPrecond(DhariwalUNet(8, bands, labels), 8, bands, labels, sigma_data=0.4)
    assert converter().convert(net, tmp_path / "made") < 1e-4
    teacher = Teacher.from_pretrained(tmp_path / "made")
    assert (teacher.denoiser.schedule.sigma_data, teacher.info.channels, len(teacher.info.labels)) == (
        0.4,
        bands,
        labels,
    )
    x, sigma, label = 9 * torch.randn(2, bands, 8, 8), torch.tensor([0.5, 20.0]), torch.tensor([1, 4])
    with torch.no_grad():
        theirs = net(x, sigma, torch.eye(labels)[label] if labels else None)
        ours = teacher.denoiser(x, sigma, {"label": label} if labels else None)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_what_no_network_of_diffusers_is_like_is_refused(tmp_path: Path) -> None:
    net = EDMPrecond(DhariwalUNet(8, 3, 0), 8, 3, 0)
    net.model.__class__ = type("SongUNet", (DhariwalUNet,), {})
    with pytest.raises(SystemExit, match="EDMPrecond over SongUNet"):
        converter().convert(net, tmp_path / "made")
    other = EDMPrecond(DhariwalUNet(8, 3, 0), 8, 3, 0)
    other.model.dec["8x8_block0"].norm1 = torch.nn.GroupNorm(16, 128)  # type: ignore[index, union-attr]
    with pytest.raises(SystemExit, match=r"norms of \[16, 32\] groups"):
        converter().convert(other, tmp_path / "made")
    other.model.dec["8x8_block0"].norm1 = torch.nn.GroupNorm(32, 128)  # type: ignore[index, union-attr]
    other.model.enc["4x4_down"].resample = "sharper"  # type: ignore[index, union-attr]
    other.model.enc["4x4_down"].resized = lambda x: x[..., ::2, ::2]  # type: ignore[index, union-attr, method-assign]
    with pytest.raises(SystemExit, match=r"differs by .* nothing is written"):
        converter().convert(other, tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_the_library_never_unpickles() -> None:
    for file in [*(ROOT / "distillers").rglob("*.py"), *(ROOT / "app").rglob("*.py")]:
        text = file.read_text()
        assert "pickle.load(" not in text and "weights_only=False" not in text, file
        assert "pickle.loads(" not in text or file.name == "batches.py", file  # what its own processes send each other
        assert text.count("torch.load(") == text.count("weights_only=True"), file
