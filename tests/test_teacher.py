"""Teachers are diffusers pipelines: what diffusers saved opens, means the same, or is refused by name."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from folders import save
from torch import Tensor, nn
from typer.testing import CliRunner

from distillers.cli import app as command
from distillers.data import Part
from distillers.errors import BadInput
from distillers.generator import Generator
from distillers.jobs.inputs import load_data, load_teacher
from distillers.jobs.publish import adopt
from distillers.jobs.recipe import Recipe
from distillers.models.clipping import Clipping
from distillers.models.codec import PixelUnshuffle, Vae
from distillers.models.denoiser import unclipped
from distillers.models.guidance import Guided
from distillers.models.schedule import RectifiedFlow
from distillers.teacher import Teacher
from distillers.training.distiller import trainable_copy
from distillers.weights.manifest import Info

SIDE = 8
NETWORK = {
    "sample_size": SIDE,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
    "add_attention": False,
}
NULL = 1000  # the null class that stock DiTPipeline guides by, whatever the model


def unet(**options: Any) -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DModel(**{**NETWORK, **options})


def save_parts(folder: Path, **parts: Any) -> Path:
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    return folder


def dit_pipeline(scheduler: Any, out_channels: int = 8, sample_size: int = 4, classes: int = NULL) -> Any:
    """A tiny DiT in the latent space of a tiny VAE; 8 output channels: learned variance, as the published ones."""
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=out_channels, num_layers=2,
        sample_size=sample_size, patch_size=2, num_embeds_ada_norm=classes, norm_num_groups=4,
    ).eval()  # fmt: skip
    for parameter in transformer.parameters():  # far enough from its start, where all classes look alike
        nn.init.normal_(parameter, std=0.2) if parameter.ndim > 1 else None
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4, 8), norm_num_groups=4, sample_size=8, layers_per_block=1, scaling_factor=0.3,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()  # fmt: skip
    return diffusers.DiTPipeline(transformer, vae, scheduler)


def ddim(**options: Any) -> Any:
    return diffusers.DDIMScheduler(**{"clip_sample": False, "timestep_spacing": "trailing", **options})


# --- U-Nets and their schedulers


@pytest.mark.parametrize("pipeline", ["DDPMPipeline", "DDIMPipeline"])
@pytest.mark.parametrize(
    "options",
    [
        {"prediction_type": "epsilon"},
        {"prediction_type": "v_prediction"},
        {"prediction_type": "sample"},
        {"prediction_type": "epsilon", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2"},
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
        {"prediction_type": "sample", "trained_betas": np.linspace(0.01, 0.2, 50).tolist(), "num_train_timesteps": 50},
    ],
    ids=lambda options: " ".join(str(v) for v in options.values() if not isinstance(v, list)),
)
def test_a_unet_pipeline_means_what_its_scheduler_says(pipeline: str, options: dict[str, Any], tmp_path: Path) -> None:
    scheduler = {"DDPMPipeline": diffusers.DDPMScheduler, "DDIMPipeline": diffusers.DDIMScheduler}[pipeline](**options)
    getattr(diffusers, pipeline)(unet(), scheduler).save_pretrained(tmp_path)
    teacher = Teacher.from_pretrained(tmp_path)
    info = teacher.info
    assert (info.task, info.role, info.sampler, info.size) == ("image", "teacher", "ddim", (SIDE, SIDE))
    assert isinstance(teacher.codec, PixelUnshuffle) and teacher.codec.factor == 1
    assert not teacher.denoiser.training and not any(p.requires_grad for p in teacher.denoiser.parameters())

    stock: Any = diffusers.DDIMScheduler.from_config(scheduler.config)
    stock.set_timesteps(10)
    last = stock.config.num_train_timesteps - 1
    every = torch.arange(last + 1)
    alpha, sigma = teacher.denoiser.schedule.alpha(every), teacher.denoiser.schedule.sigma(every)
    torch.testing.assert_close(alpha.square().float(), stock.alphas_cumprod, atol=2e-6, rtol=1e-4)
    torch.testing.assert_close(alpha.square() + sigma.square(), torch.ones_like(alpha))

    network = diffusers.UNet2DModel.from_pretrained(tmp_path / "unet").eval()
    x_t = torch.randn(2, 3, SIDE, SIDE)
    for t in (0, last // 2, last):
        with torch.no_grad():
            expected = stock.step(network(x_t, t).sample, t, x_t).pred_original_sample
            torch.testing.assert_close(teacher.denoiser(x_t, torch.tensor(t)), expected, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("prediction", ["v_prediction", "sample", "epsilon"])
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_a_pipeline_draws_its_own_pictures(prediction: str, steps: int, tmp_path: Path) -> None:
    pipeline = diffusers.DDIMPipeline(unet(), ddim(prediction_type=prediction))
    pipeline.save_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    rngs = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    stock = pipeline(batch_size=2, generator=rngs, num_inference_steps=steps, output_type="np").images
    ours = Generator.from_pretrained(tmp_path).sample([5, 6], steps=steps)
    assert ours.std() > 0.1
    torch.testing.assert_close((ours + 1) / 2, torch.from_numpy(stock).permute(0, 3, 1, 2), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "kind",
    [
        "PNDMScheduler",
        "EulerDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
        "LCMScheduler",
        "TCDScheduler",
        "DDPMParallelScheduler",
        "SASolverScheduler",
    ],
)
def test_any_scheduler_with_ddpms_clock_gives_the_same_schedule(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"beta_schedule": "linear", "beta_start": 2e-4, "beta_end": 0.03, "prediction_type": "v_prediction"}
    save_parts(tmp_path, unet=unet(), scheduler=getattr(diffusers, kind)(**options))
    teacher = Teacher.from_pretrained(tmp_path)
    alphas: Tensor = diffusers.DDIMScheduler(**options).alphas_cumprod  # type: ignore[attr-defined]
    every = torch.arange(1000)
    torch.testing.assert_close(teacher.denoiser.schedule.alpha(every).square().float(), alphas, atol=2e-6, rtol=1e-4)
    assert teacher.denoiser.prediction == "v" and not caplog.text


def test_a_learned_variance_is_left_aside(tmp_path: Path) -> None:
    save_parts(tmp_path, unet=unet(out_channels=6), scheduler=diffusers.DDPMScheduler(variance_type="learned_range"))
    teacher = Teacher.from_pretrained(tmp_path)
    assert teacher.info.task == "image"
    x_t, t = torch.randn(1, 3, SIDE, SIDE), torch.tensor(400)
    with torch.no_grad():
        torch.testing.assert_close(teacher.denoiser.output(x_t, t), unet(out_channels=6).eval()(x_t, 400).sample[:, :3])


def test_a_flow_matching_pipeline(tmp_path: Path) -> None:
    """x_t = (1 - sigma) x0 + sigma eps, and the network is told 1000 sigma: as the stock scheduler has it."""
    stock: Any = diffusers.FlowMatchEulerDiscreteScheduler()
    diffusers.DDPMPipeline(unet(), stock).save_pretrained(tmp_path)
    teacher = Teacher.from_pretrained(tmp_path)
    assert isinstance(teacher.denoiser.schedule, RectifiedFlow) and teacher.denoiser.prediction == "flow"
    network = unet().eval()
    stock.set_timesteps(sigmas=[0.9, 0.6, 0.3])
    x = torch.randn(2, 3, SIDE, SIDE)
    ours = x
    times = torch.tensor([0.9, 0.6, 0.3, 0.0])
    with torch.no_grad():
        for i, timestep in enumerate(stock.timesteps):
            x = stock.step(network(x, timestep).sample, timestep, x).prev_sample
            x0 = teacher.denoiser(ours, times[i])
            ours = teacher.denoiser.schedule.step(ours, x0, times[i], times[i + 1])
    torch.testing.assert_close(ours, x, atol=1e-4, rtol=1e-4)
    assert Generator.from_pretrained(tmp_path).sample([0], steps=3).shape == (1, 3, SIDE, SIDE)


def test_a_flow_of_another_clock_and_shift(tmp_path: Path) -> None:
    stock: Any = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=500, shift=3.0)
    save_parts(tmp_path / "flow", unet=unet(), scheduler=stock)
    generator = Generator.from_pretrained(tmp_path / "flow")
    schedule = generator.denoiser.schedule
    stock.set_timesteps(sigmas=[0.75, 0.5, 0.25])
    times = torch.tensor(generator.times(4))
    torch.testing.assert_close(times[1:].float(), stock.sigmas[:3], atol=3e-3, rtol=0)  # ours ends at t_min, not at 0
    torch.testing.assert_close(schedule.network_time(times[1:].float()), stock.timesteps, atol=1.5, rtol=0)
    x, t = torch.randn(2, 3, SIDE, SIDE), torch.tensor(0.6)
    with torch.no_grad():
        torch.testing.assert_close(generator.denoiser(x, t), x - 0.6 * unet().eval()(x, 300).sample)
    generator.save_pretrained(tmp_path / "ours")
    again: Any = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "ours", subfolder="scheduler")
    assert (again.config.num_train_timesteps, again.config.shift) == (500, 3.0)
    assert Generator.from_pretrained(tmp_path / "ours").times(4) == generator.times(4)


@pytest.mark.parametrize("kind", ["sigmoid", "laplace"])
def test_beta_schedules_of_ddpm_alone(kind: str, tmp_path: Path) -> None:
    """Other schedulers do not know them by name, so a folder that we write spells the betas out."""
    stock: Any = diffusers.DDPMScheduler(beta_schedule=kind, prediction_type="v_prediction")
    save_parts(tmp_path / "theirs", unet=unet(), scheduler=stock)
    generator = Generator.from_pretrained(tmp_path / "theirs")
    generator.save_pretrained(tmp_path / "ours")
    again: Any = diffusers.DDIMScheduler.from_pretrained(tmp_path / "ours", subfolder="scheduler")
    every = torch.arange(1000)
    for schedule in (generator.schedule, Generator.from_pretrained(tmp_path / "ours").schedule):
        torch.testing.assert_close(schedule.alpha(every).square().float(), stock.alphas_cumprod, atol=2e-6, rtol=1e-4)
    torch.testing.assert_close(again.alphas_cumprod, stock.alphas_cumprod, atol=2e-6, rtol=1e-4)


def test_what_a_scheduler_leaves_out_is_its_own_default(tmp_path: Path) -> None:
    """LCM's betas are other ones than DDIM's, and DDPM clips where LCM does not."""
    for kind in ("LCMScheduler", "DDPMScheduler"):
        save_parts(tmp_path / kind, unet=unet(), scheduler=ddim())
        written = {"_class_name": kind, "prediction_type": "v_prediction"}
        (tmp_path / kind / "scheduler" / "scheduler_config.json").write_text(json.dumps(written))
        denoiser = Teacher.from_pretrained(tmp_path / kind).denoiser
        stock: Any = getattr(diffusers, kind)()
        alphas = denoiser.schedule.alpha(torch.arange(1000)).square().float()
        torch.testing.assert_close(alphas, stock.alphas_cumprod, atol=2e-6, rtol=1e-4)
        assert (denoiser.clipping is not None) == stock.config.clip_sample == (kind == "DDPMScheduler")


def test_noise_predicted_where_there_is_no_signal_is_warned_of(tmp_path: Path) -> None:
    for prediction, told in (("epsilon", 1), ("v_prediction", 0)):
        save_parts(tmp_path, unet=unet(), scheduler=ddim(prediction_type=prediction, rescale_betas_zero_snr=True))
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            schedule = Teacher.from_pretrained(tmp_path).denoiser.schedule
        said = [str(one.message) for one in seen if "signal-to-noise" in str(one.message)]
        assert len(said) == told
        assert all(f"{float(schedule.noise_ratio(torch.tensor(999.0))):.2g}" in one for one in said)


# --- clipping

CLIPPED: list[dict[str, Any]] = [
    {"clip_sample": True},
    {"clip_sample": True, "clip_sample_range": 0.5},
    {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5},
]


@pytest.mark.parametrize("options", CLIPPED, ids=["clip_sample", "clip_sample_range", "thresholding"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_pipeline_that_clips_is_drawn_clipped(prediction: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Between its steps stock DDIM keeps the noise that the network predicted beside the clipped estimate."""
    pipeline = diffusers.DDIMPipeline(unet(), ddim(prediction_type=prediction, **options))
    pipeline.save_pretrained(tmp_path / "theirs")
    pipeline.set_progress_bar_config(disable=True)
    rngs = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    stock = pipeline(batch_size=2, generator=rngs, num_inference_steps=10, output_type="np").images
    stock = torch.from_numpy(stock).permute(0, 3, 1, 2)
    generator = Generator.from_pretrained(tmp_path / "theirs")
    ours = (generator.sample([5, 6], steps=10) + 1) / 2
    torch.testing.assert_close(ours, stock, atol=1e-3, rtol=0)
    generator.denoiser = unclipped(generator.denoiser)
    assert float(((generator.sample([5, 6], steps=10) + 1) / 2 - ours).abs().max()) > 0.05

    scheduler: Any = pipeline.scheduler
    scheduler.set_timesteps(10)
    x_t, teacher = torch.randn(2, 3, SIDE, SIDE), Teacher.from_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        expected = scheduler.step(pipeline.unet(x_t, 700).sample, 700, x_t).pred_original_sample
        torch.testing.assert_close(teacher.denoiser(x_t, torch.tensor(700)), expected, atol=1e-4, rtol=1e-4)


def test_clipping_goes_over_guidance(tmp_path: Path) -> None:
    """As the stock pipeline does it; in training targets as in pictures."""
    pipeline = dit_pipeline(ddim(clip_sample=True, clip_sample_range=0.3))
    pipeline.save_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    stock = pipeline([1], 4.0, torch.Generator().manual_seed(5), num_inference_steps=4, output_type="np").images
    generator, teacher = Generator.from_pretrained(tmp_path), Teacher.from_pretrained(tmp_path)
    generator.info = replace(generator.info, guidance_scale=4.0)
    ours = generator.sample([5], labels=[1], steps=4)
    torch.testing.assert_close((ours + 1) / 2, torch.from_numpy(stock).permute(0, 3, 1, 2), atol=1e-3, rtol=0)

    x_t, t, label = torch.randn(1, 4, 4, 4), torch.tensor(900.0), torch.tensor([1])
    with torch.no_grad():
        conditional, null = (unclipped(teacher.denoiser)(x_t, t, {"label": torch.tensor([row])}) for row in (1, NULL))
        expected = (null + 4 * (conditional - null)).clamp(-0.3, 0.3)
        torch.testing.assert_close(teacher.guided(4.0)(x_t, t, {"label": label}), expected, atol=1e-3, rtol=0)
        single = {"label": label, "guidance": torch.tensor([4.0])}
        torch.testing.assert_close(teacher.guided(0.0)(x_t, t, single), expected, atol=1e-3, rtol=0)


def test_what_is_trained_is_not_clipped_and_says_so(tmp_path: Path) -> None:
    save_parts(tmp_path / "theirs", unet=unet(), scheduler=ddim(clip_sample=True, clip_sample_range=0.125))
    teacher = Teacher.from_pretrained(tmp_path / "theirs")
    x_t, t = torch.randn(2, 3, SIDE, SIDE), torch.tensor(900.0)
    learner = trainable_copy(teacher.denoiser)
    x0 = learner(x_t, t)
    assert float(x0.detach().abs().max()) > 0.125 >= float(teacher.denoiser(x_t, t).abs().max())
    x0[x0 > 0.125].sum().backward()
    assert float(learner.network.conv_out.weight.grad.abs().max()) > 0  # type: ignore[union-attr, operator]
    for name, denoiser, says in (("student", learner, False), ("adopted", teacher.denoiser, True)):
        Generator(denoiser, teacher.codec, teacher.info).save_pretrained(tmp_path / name)
        scheduler: Any = diffusers.DDIMScheduler.from_pretrained(tmp_path / name, subfolder="scheduler")
        assert scheduler.config.clip_sample is says
        assert Teacher.from_pretrained(tmp_path / name).denoiser.clipping == (Clipping(0.125) if says else None)


@pytest.mark.parametrize(
    "wrong",
    [
        {"clip_sample": True, "clip_sample_range": None},
        {"clip_sample": True, "clip_sample_range": -1.0},
        {"thresholding": True, "dynamic_thresholding_ratio": 2},
        {"num_train_timesteps": "many"},
    ],
    ids=str,
)
def test_options_that_are_none_are_refused(wrong: dict[str, Any], tmp_path: Path) -> None:
    save_parts(tmp_path, unet=unet(), scheduler=ddim())
    path = tmp_path / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **wrong}))
    with pytest.raises(BadInput, match=r"scheduler|clip_sample_range|dynamic_thresholding_ratio"):
        Teacher.from_pretrained(tmp_path)


def test_dynamic_thresholds_are_written_as_they_were_read(tmp_path: Path) -> None:
    save_parts(tmp_path / "theirs", unet=unet(), scheduler=ddim(**CLIPPED[2]))
    generator = Generator.from_pretrained(tmp_path / "theirs")
    generator.save_pretrained(tmp_path / "ours")
    assert Teacher.from_pretrained(tmp_path / "ours").denoiser.clipping == Clipping(1.5, 0.9)


def test_the_first_pipelines_lie_flat_in_their_folder(tmp_path: Path) -> None:
    """As google/ddpm-* do: no subfolders, and the index names the parts."""
    unet().save_pretrained(tmp_path)
    diffusers.DDPMScheduler(prediction_type="sample").save_pretrained(tmp_path)
    index = {
        "_class_name": "DDPMPipeline",
        "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", "DDPMScheduler"],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    teacher = Teacher.from_pretrained(tmp_path)
    assert teacher.denoiser.prediction == "x0" and teacher.info.task == "image"


def test_a_network_that_is_not_square(tmp_path: Path) -> None:
    save_parts(tmp_path, unet=unet(sample_size=(8, 12)), scheduler=ddim())
    assert Generator.from_pretrained(tmp_path).sample([0], steps=1).shape == (1, 3, 8, 12)


# --- classes


def test_all_rows_of_a_foreign_unet_are_classes_and_none_is_null(tmp_path: Path) -> None:
    save_parts(tmp_path, unet=unet(num_class_embeds=5), scheduler=ddim(prediction_type="v_prediction"))
    teacher = Teacher.from_pretrained(tmp_path)
    assert (teacher.info.task, teacher.info.labels) == ("class-to-image", ["0", "1", "2", "3", "4"])
    assert teacher.guided(1.0) is teacher.denoiser
    with pytest.raises(BadInput, match=r"guidance_scale.*null class"):
        teacher.guided(2.0)
    generator = Generator.from_pretrained(tmp_path)
    pictures = generator.sample([0, 0], labels=[0, 4], steps=1)
    assert not torch.allclose(pictures[0], pictures[1], atol=1e-3)
    generator.info = replace(generator.info, guidance_scale=2.0)
    with pytest.raises(BadInput, match="guidance_scale"):
        generator.sample([0], labels=[0])


@pytest.mark.parametrize("null", [0, 2, 4])
def test_adopting_says_which_row_is_the_null_class(null: int, tmp_path: Path) -> None:
    save_parts(tmp_path / "theirs", unet=unet(num_class_embeds=5), scheduler=ddim(prediction_type="v_prediction"))
    before = Teacher.from_pretrained(tmp_path / "theirs").denoiser
    options = ["--null-class", str(null), "--guidance", "3"]
    done = CliRunner().invoke(command, ["adopt", str(tmp_path / "theirs"), str(tmp_path / "ours"), *options])
    assert done.exit_code == 0, done.output
    teacher = Teacher.from_pretrained(tmp_path / "ours")
    assert (teacher.info.labels, teacher.info.guidance_scale) == (["0", "1", "2", "3"], 3.0)
    x_t, t = torch.randn(4, 3, SIDE, SIDE), torch.tensor(500.0)
    rows = torch.tensor([row for row in range(5) if row != null])
    with torch.no_grad():
        named, none = (before(x_t, t, {"label": label}) for label in (rows, torch.full((4,), null)))
        ours = teacher.guided(3.0)(x_t, t, {"label": torch.arange(4)})
    torch.testing.assert_close(ours, none + 3 * (named - none), atol=2e-2, rtol=0)  # float16 weights
    assert float((named - none).abs().max()) > 0.1


def test_a_null_class_that_cannot_be_is_refused(tmp_path: Path) -> None:
    save_parts(tmp_path / "classes", unet=unet(num_class_embeds=5), scheduler=ddim())
    save_parts(tmp_path / "none", unet=unet(), scheduler=ddim())
    dit_pipeline(ddim()).save_pretrained(tmp_path / "dit")
    for name, row, allowed in (("classes", 5, "0 to 4"), ("none", 0, "absent"), ("dit", NULL, "absent")):
        with pytest.raises(BadInput, match=f"null_class: got {row}; allowed: {allowed}"):
            adopt(tmp_path / name, tmp_path / "out", [], "ddim", None, row)


def test_our_own_teachers_have_a_null_class_behind_the_last(tmp_path: Path) -> None:
    info = Info(
        name="x",
        task="class-to-image",
        method="m",
        role="teacher",
        data="d",
        sampler="ddim",
        size=(8, 8),
        labels=["a", "b"],
    )
    network = {key: value for key, value in NETWORK.items() if key != "sample_size"}
    teacher = Teacher.random(info, network, {"name": "vp"}, "v", PixelUnshuffle())
    guided = teacher.guided(3.0)
    assert isinstance(guided, Guided)
    x_t, t, label = torch.randn(2, 3, 8, 8), torch.tensor(500.0), torch.tensor([0, 1])
    with torch.no_grad():
        chosen = teacher.denoiser(x_t, t, {"label": label})
        null = teacher.denoiser(x_t, t, {"label": torch.tensor([2, 2])})
        torch.testing.assert_close(guided(x_t, t, {"label": label}), null + 3 * (chosen - null), atol=1e-5, rtol=1e-4)
    assert teacher.guided(1.0) is teacher.denoiser


def test_a_teacher_without_classes_cannot_be_guided(tmp_path: Path) -> None:
    save_parts(tmp_path, unet=unet(), scheduler=ddim())
    with pytest.raises(BadInput, match="guidance_scale"):
        Teacher.from_pretrained(tmp_path).guided(2.0)


# --- DiT


@pytest.mark.parametrize("out_channels", [4, 8], ids=["fixed variance", "learned variance"])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_dit_draws_its_own_pictures(out_channels: int, guidance_scale: float, tmp_path: Path) -> None:
    pipeline = dit_pipeline(ddim(), out_channels)
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())  # with names, as the published ones have them
    (tmp_path / "model_index.json").write_text(
        json.dumps({**index, "id2label": {"0": "tench, Tinca", "1": "goldfish"}})
    )
    pipeline.set_progress_bar_config(disable=True)
    rngs = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    stock = pipeline([1, 999], guidance_scale, rngs, num_inference_steps=4, output_type="np").images
    generator = Generator.from_pretrained(tmp_path)
    info = generator.info
    assert (info.task, info.size, info.codec, len(info.labels)) == ("class-to-image", (8, 8), "vae", NULL)
    assert info.labels[:3] == ["tench, Tinca", "goldfish", "2"]
    generator.info = replace(info, guidance_scale=guidance_scale)
    ours = generator.sample([5, 6], labels=[1, 999], steps=4)
    assert ours.std() > 0.05
    torch.testing.assert_close((ours + 1) / 2, torch.from_numpy(stock).permute(0, 3, 1, 2), atol=1e-4, rtol=0)


@pytest.mark.parametrize("synonyms", [False, True])
def test_class_folders_are_matched_with_the_teachers_classes_by_name(synonyms: bool, tmp_path: Path) -> None:
    """ImageNet's order is not the alphabet's, in which folders are sorted."""
    names = ["tench", "goldfish", "shark", "ray"]
    pipeline = dit_pipeline(ddim(), classes=len(names))
    pipeline.register_to_config(
        id2label={str(i): f"{name}, {name.title()} sp." if synonyms else name for i, name in enumerate(names)}
    )
    pipeline.save_pretrained(tmp_path / "theirs")
    for i, name in enumerate(names):
        save(tmp_path / "data" / name / "a.png", np.full((8, 8, 3), 60 * i, np.uint8))
    table = {"name": "x", "method": "consistency", "teacher": str(tmp_path / "theirs")}
    recipe = Recipe.from_table(table | {"data": {"kind": "images", "path": str(tmp_path / "data")}})
    data = load_data(recipe)
    teacher = load_teacher(recipe, data)
    Generator(teacher.denoiser, teacher.codec, teacher.info).save_pretrained(tmp_path / "ours")
    assert list(data.labels) == teacher.info.labels == Info.read(tmp_path / "ours").labels
    assert list(diffusers.DiTPipeline.from_pretrained(tmp_path / "ours").labels)[:1] == [
        "Goldfish sp." if synonyms else "goldfish"
    ]
    part = Part(data, [data.labels[3]])
    for items in (data.items(range(4)), data.draw(9, np.random.default_rng(0)), part.draw(3, np.random.default_rng(0))):
        shown = ((items["image"].mean((1, 2, 3)) + 1) * 127.5 / 60).round().long()
        assert torch.equal(shown, items["label"])
    save(tmp_path / "data" / "eel" / "a.png", np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(
        BadInput, match=r"data: got '1 class name \(eel\)'; allowed: all of the teacher's 4 class names"
    ):
        load_teacher(recipe, load_data(recipe))


def test_dit_with_another_solver_and_in_the_older_spelling(tmp_path: Path) -> None:
    pipeline = dit_pipeline(diffusers.DPMSolverMultistepScheduler())
    pipeline.save_pretrained(tmp_path)
    before = Generator.from_pretrained(tmp_path).sample([0], labels=[1], steps=2)
    config = json.loads((tmp_path / "transformer" / "config.json").read_text())
    old = {**config, "_class_name": "Transformer2DModel", "norm_type": "ada_norm_zero"}
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(old))
    assert torch.equal(Generator.from_pretrained(tmp_path).sample([0], labels=[1], steps=2), before)


def test_dit_sizes(tmp_path: Path) -> None:
    dit_pipeline(ddim()).save_pretrained(tmp_path)
    generator = Generator.from_pretrained(tmp_path)
    assert generator.size_multiple == 4  # the VAE's 2 times patches of 2
    assert generator.sample([0], labels=[0], steps=1, size=(12, 12)).shape == (1, 3, 12, 12)
    for size in ((8, 10), (8, 12), (4, 4)):
        with pytest.raises(BadInput, match=r"size.*square"):
            generator.sample([0], labels=[0], steps=1, size=size)


def test_the_vae_scales_and_shifts_its_latents(tmp_path: Path) -> None:
    vae: Any = dit_pipeline(ddim()).vae
    vae.register_to_config(shift_factor=0.25)
    codec, pixels = Vae(vae), torch.rand(2, 3, 8, 8) * 2 - 1
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.mean
        torch.testing.assert_close(codec.encode(pixels), (latents - 0.25) * 0.3)
        torch.testing.assert_close(codec.decode(codec.encode(pixels)), vae.decode(latents).sample, atol=1e-5, rtol=1e-4)
    assert (codec.factor, codec.channels(3), tuple(codec.encode(pixels).shape)) == (2, 4, (2, 4, 4, 4))


# --- SAR


def test_a_sar_conditioned_unet(tmp_path: Path) -> None:
    """Four channels in, three out: the fourth is the SAR, without noise, at every step."""
    save_parts(tmp_path, unet=unet(in_channels=4, out_channels=3), scheduler=ddim(prediction_type="sample"))
    teacher, generator = Teacher.from_pretrained(tmp_path), Generator.from_pretrained(tmp_path)
    assert (teacher.info.task, teacher.info.sar) == ("sar-to-optical", {"channels": 1, "range": [-1, 1]})
    sar = torch.rand(2, 1, 12, 8) * 2 - 1
    batch = teacher.encode_batch({"image": torch.rand(2, 3, 12, 8), "sar": sar}, "cpu")
    assert batch.keys() == {"x0", "sar"} and torch.equal(batch["sar"], sar)
    x_t = torch.randn(2, 3, 12, 8)
    network = unet(in_channels=4, out_channels=3).eval()
    with torch.no_grad():
        expected = network(torch.cat([x_t, sar], dim=1), 300).sample
        torch.testing.assert_close(
            teacher.denoiser(x_t, torch.tensor(300), {"sar": sar}), expected, atol=1e-5, rtol=1e-4
        )
    pictures = generator.sample([1, 1], sar=sar, steps=2)
    assert pictures.shape == (2, 3, 12, 8) and not torch.allclose(pictures[0], pictures[1], atol=1e-3)


def test_a_patched_batch_is_unshuffled_alike() -> None:
    info = Info(
        name="x",
        task="sar-to-optical",
        method="m",
        role="teacher",
        data="d",
        sampler="ddim",
        size=(8, 8),
        sar={"channels": 1},
        patch=2,
    )
    network = {key: value for key, value in NETWORK.items() if key != "sample_size"}
    teacher = Teacher.random(info, network, {"name": "vp"}, "v", PixelUnshuffle(2))
    assert (teacher.denoiser.network.config.in_channels, teacher.denoiser.network.config.sample_size) == (16, 4)  # type: ignore[union-attr]
    image, sar = torch.rand(1, 3, 8, 8), torch.rand(1, 1, 8, 8)
    batch = teacher.encode_batch({"image": image, "sar": sar}, "cpu")
    assert batch["x0"].shape == (1, 12, 4, 4) and batch["sar"].shape == (1, 4, 4, 4)
    torch.testing.assert_close(batch["sar"][0, 3, 1, 2], sar[0, 0, 3, 5])  # the lower right of each 2 x 2


# --- refused


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "latents without a VAE": (lambda p: (dit_pipeline(ddim()).save_pretrained(p), shutil.rmtree(p / "vae")), "vae"),
    "timestep classes": (lambda p: save_parts(p, unet=unet(class_embed_type="timestep"), scheduler=ddim()), "classes"),
    "SAR and classes": (
        lambda p: save_parts(p, unet=unet(in_channels=4, out_channels=3, num_class_embeds=3), scheduler=ddim()),
        "classes",
    ),
    "no size": (lambda p: save_parts(p, unet=unet(sample_size=None), scheduler=ddim()), "sample_size"),
    "no scheduler": (lambda p: save_parts(p, unet=unet()), "scheduler"),
    "another clock": (
        lambda p: save_parts(p, unet=unet(), scheduler=diffusers.CMStochasticIterativeScheduler()),
        "CMStochasticIterativeScheduler",
    ),
    "EDM's other spacing": (
        lambda p: save_parts(p, unet=unet(), scheduler=diffusers.EDMEulerScheduler(sigma_schedule="exponential")),
        "sigma_schedule",
    ),
    "EDM and x0": (
        lambda p: save_parts(
            p, unet=unet(), scheduler=diffusers.EDMDPMSolverMultistepScheduler(prediction_type="sample")
        ),
        "EDMDPMSolverMultistepScheduler with sample",
    ),
    "a beta schedule of Heun's alone": (
        lambda p: save_parts(p, unet=unet(), scheduler=diffusers.HeunDiscreteScheduler(beta_schedule="exp")),
        "beta_schedule: got 'exp'.*sigmoid, laplace",
    ),
    "times that are noise levels": (
        lambda p: save_parts(p, unet=unet(), scheduler=diffusers.EulerDiscreteScheduler(timestep_type="continuous")),
        "timestep_type: got 'continuous'; allowed: discrete",
    ),
    "a flow of another direction": (
        lambda p: save_parts(p, unet=unet(), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)),
        "invert_sigmas: got True",
    ),
    "a shift that depends on the size": (
        lambda p: save_parts(
            p, unet=unet(), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        ),
        "use_dynamic_shifting: got True",
    ),
    "another prediction": (
        lambda p: save_parts(
            p, unet=unet(),
            scheduler=diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction"),
        ),
        "flow_prediction",
    ),
    "another network": (lambda p: save_parts(p, unet=diffusers.UNet1DModel(
        block_out_channels=(32,), down_block_types=("DownBlock1DNoSkip",), up_block_types=("UpBlock1DNoSkip",),
    ), scheduler=ddim()), "UNet1DModel"),
    "another autoencoder": (
        lambda p: save_parts(
            p, unet=unet(), scheduler=ddim(), vae=diffusers.VQModel(block_out_channels=(4,), norm_num_groups=4)
        ),
        "VQModel",
    ),
    "a folder of nothing": (lambda p: p.mkdir(exist_ok=True), "unet or transformer"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_we_cannot_teach_from_is_refused_by_name(what: str, tmp_path: Path) -> None:
    make, named = REFUSED[what]
    make(tmp_path)
    for kind in (Teacher, Generator):
        with pytest.raises(BadInput, match=named):
            kind.from_pretrained(tmp_path)


def test_an_unknown_pipeline_is_refused_by_its_class(tmp_path: Path) -> None:
    diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler()).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "_class_name": "KolorsPipeline"}))
    with pytest.raises(BadInput, match=r"KolorsPipeline.*DDPMPipeline.*DiTPipeline"):
        Teacher.from_pretrained(tmp_path)


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_a_damaged_part_is_named(part: str, tmp_path: Path) -> None:
    dit_pipeline(ddim()).save_pretrained(tmp_path)
    path = tmp_path / part / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(BadInput, match=part):
        Teacher.from_pretrained(tmp_path)


def test_missing_folders_and_files_are_no_teachers(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for given in (tmp_path / "nowhere", tmp_path / "file", str(tmp_path / "nowhere"), "nowhere", "./no/where", "a/b/c"):
        with pytest.raises(BadInput, match=r"model: got .*(nowhere|file|no/where|a/b/c)"):
            Teacher.from_pretrained(given)


def test_a_misspelt_folder_does_not_ask_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weights").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match=r"weights/misspelt.*owner/name$"):
        Teacher.from_pretrained("weights/misspelt")


@pytest.mark.process
def test_a_hub_id_opens_from_the_local_cache_and_is_refused_when_out_of_reach(tmp_path: Path) -> None:
    """The hub client's own cache layout, offline, in a process of its own: it reads its settings once."""
    cached = tmp_path / "hub" / "models--owner--teacher"
    diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler()).save_pretrained(cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    script = (
        "from distillers.errors import BadInput\n"
        "from distillers.teacher import Teacher\n"
        "print(Teacher.from_pretrained('owner/teacher').info.task)\n"
        "try:\n"
        "    Teacher.from_pretrained('owner/unknown')\n"
        "except BadInput as error:\n"
        "    print(error)\n"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    task, error = done.stdout.splitlines()
    assert task == "image" and "owner/unknown" in error and "reachable hub id" in error


def test_a_network_that_cannot_be_built_is_refused() -> None:
    info = Info(name="x", task="image", method="m", role="teacher", data="d", sampler="ddim", size=(8, 8))
    for network in ({"block_out_channels": [8]}, {"norm_num_groups": 5}, {"surprise": 1}):
        with pytest.raises(BadInput, match="network"):
            Teacher.random(info, network, {"name": "vp"}, "v", PixelUnshuffle())
