"""Adapters that others have trained: few-step LoRAs become folders like ours, styles are laid over what is served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from stock_pipelines import build
from test_adapter_folders import student
from test_families import CLOSE, SIZE, WORDS, consistency_pictures, ours

from distillers.errors import BadInput
from distillers.generator import Generator
from distillers.jobs.publish import adopt
from distillers.models.lora import kohya_state, lora_state
from distillers.weights.lora_file import read_lora
from distillers.weights.manifest import Info
from distillers.weights.write import lcm_times

STEPS = (1, 2, 4)
ALPHA = 3.0  # of rank 4


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion and SDXL, and a LoRA of each in three kinds of keys, its alpha below its rank."""
    root = tmp_path_factory.mktemp("brought")
    for name in ("sd", "sdxl"):
        build(name, root / name)
        network = student(root / name, 1).denoiser.network
        kohya = {key: value.contiguous() for key, value in kohya_state(lora_state(network)).items()}
        save_file(
            {k: torch.tensor(ALPHA) if k.endswith("alpha") else v for k, v in kohya.items()},
            root / f"{name}-kohya.safetensors",
        )
        half = {k: v * ALPHA / 4 if ".lora_B." in k else v for k, v in lora_state(network).items()}
        save_file(half, root / f"{name}-peft.safetensors")
        old = {k.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): v for k, v in half.items()}
        save_file(old, root / f"{name}-diffusers.safetensors")
    return root


def stock(root: Path, name: str, file: Path, scheduler: str | None = None) -> Any:
    pipe: Any = diffusers.DiffusionPipeline.from_pretrained(root / name, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    kind = getattr(diffusers, scheduler or "LCMScheduler")
    more = {} if scheduler is None else {"timestep_spacing": "trailing"}
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **more)
    pipe.load_lora_weights(file.parent, weight_name=file.name, adapter_name="brought")
    return pipe


def theirs(pipe: Any, **more: Any) -> np.ndarray[Any, Any]:
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    given = {"height": SIZE[0], "width": SIZE[1], "output_type": "np", "guidance_scale": 1.0, **more}
    return np.asarray(pipe(WORDS, generator=generators, **given).images)


@pytest.mark.parametrize("keys", ["kohya", "peft", "diffusers"])
@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_a_few_step_lora_of_others_draws_what_it_draws_in_stock_diffusers(root: Path, name: str, keys: str) -> None:
    file = root / f"{name}-{keys}.safetensors"
    folder = root / f"{name}-{keys}-lcm"
    assert adopt(root / name, folder, STEPS, "consistency", None, lora=file).endswith("steps 1, 2, 4")
    generator, pipe = Generator.from_pretrained(folder), stock(root, name, file)
    assert generator.info.lora is not None and generator.info.lora.rank == 4 and generator.info.alone
    for steps in STEPS if keys == "kohya" else (1,):
        made = consistency_pictures(generator, steps, pipe)
        expected = theirs(pipe, num_inference_steps=steps)
        assert np.abs(made - expected).max() < CLOSE
        assert generator.info.step_times[steps] == lcm_times(generator.schedule, steps)  # type: ignore[arg-type]
        pipe.disable_lora()
        assert np.abs(theirs(pipe, num_inference_steps=steps) - expected).max() > 10 * CLOSE
        pipe.enable_lora()


def test_hyper_sds_and_dmd2s_times_are_what_is_said(root: Path) -> None:
    """The first samples by DDIM, trailing; the second at times of its own."""
    file = root / "sd-kohya.safetensors"
    adopt(root / "sd", root / "hyper", [1, 2], "ddim", None, lora=file)
    for steps in (1, 2):
        pipe = stock(root, "sd", file, "DDIMScheduler")
        made = ours(Generator.from_pretrained(root / "hyper"), steps)
        assert np.abs(made - theirs(pipe, num_inference_steps=steps)).max() < CLOSE
    times = [999.0, 749.0, 499.0, 249.0]
    adopt(root / "sd", root / "dmd2", [], "consistency", None, lora=file, times=times)
    info = Info.read(root / "dmd2")
    assert info.step_times == {4: times} and info.default_steps == 4
    pipe = stock(root, "sd", file)
    made = consistency_pictures(Generator.from_pretrained(root / "dmd2"), 4, pipe)
    assert np.abs(made - theirs(pipe, timesteps=[int(t) for t in times])).max() < CLOSE


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"steps": []}, "steps"),
        ({"times": [1.0, 2.0]}, "times"),
        ({"times": [2000.0]}, "times"),
        ({"pipeline": "sdxl"}, "down_blocks"),
        ({"lora": "sd/unet/diffusion_pytorch_model.safetensors"}, "a LoRA of StableDiffusionPipeline"),
        ({"lora": "sd/model_index.json"}, "a LoRA of StableDiffusionPipeline"),
        ({"folder": "elsewhere/x"}, "beside"),
    ],
)
def test_what_is_no_adapter_of_the_pipeline_is_refused(root: Path, changes: dict[str, Any], named: str) -> None:
    asked: dict[str, Any] = {"pipeline": "sd", "folder": "x", "steps": [4], "lora": "sd-kohya.safetensors", **changes}
    paths = {key: root / asked.pop(key) for key in ("pipeline", "folder", "lora")}
    with pytest.raises(BadInput, match=named):
        adopt(
            paths["pipeline"],
            paths["folder"],
            asked["steps"],
            "consistency",
            None,
            lora=paths["lora"],
            times=asked.get("times", ()),
        )
    assert not paths["folder"].exists()


def test_text_encoders_layers_are_read_with_their_scale_and_are_no_students(root: Path) -> None:
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(root / "sd", safety_checker=None)
    file = with_text(root, pipe)
    pipe.load_lora_weights(file.parent, weight_name=file.name)
    generator = Generator.from_pretrained(root / "sd")
    assert generator.prompts is not None
    found = read_lora(file, generator.denoiser.network, generator.prompts)
    assert set(found) == {"unet", "text_encoder"}
    layers = {k: m for k, m in pipe.text_encoder.named_modules() if hasattr(m, "lora_A")}
    assert len(layers) * 2 == len(found["text_encoder"]) > 2
    for name, layer in layers.items():
        own = found["text_encoder"]
        change = own[f"text_encoder.{name}.lora_B.weight"] @ own[f"text_encoder.{name}.lora_A.weight"]
        torch.testing.assert_close(change, layer.get_delta_weight("default_0").detach())
    with pytest.raises(BadInput, match="layers of text_encoder, unet"):
        adopt(root / "sd", root / "x", [4], "consistency", None, lora=file)


def with_text(root: Path, pipe: Any) -> Path:
    """A LoRA of Kohya's keys that changes the text encoder too."""
    network = student(root / "sd", 1).denoiser.network
    kohya = {key: value.contiguous() for key, value in kohya_state(lora_state(network)).items() if "attn" in key}
    torch.manual_seed(5)
    for layer in (
        "encoder_layers_0_self_attn_q_proj",
        "encoder_layers_0_self_attn_out_proj",
        "encoder_layers_1_mlp_fc1",
    ):
        out = 37 if "fc1" in layer else 32
        name = f"lora_te_text_model_{layer}"
        kohya |= {f"{name}.lora_down.weight": torch.randn(2, 32), f"{name}.lora_up.weight": torch.randn(out, 2)}
        kohya[f"{name}.alpha"] = torch.tensor(1.0)
    kohya = {k: torch.tensor(1.0) if k.endswith("alpha") else v for k, v in kohya.items()}
    save_file(kohya, root / "style-with-text.safetensors")
    return root / "style-with-text.safetensors"
