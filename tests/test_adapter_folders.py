"""Folders of adapters: what stock diffusers makes of them on their base, and which base they want."""

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from networks import contents
from PIL import Image
from processes import run
from safetensors.torch import load_file, save_file
from stock_pipelines import build
from test_families import CLOSE, STUDENTS, TOLD_THE_SCALE, consistency_pictures
from torch import nn

from distillers.errors import BadInput
from distillers.generator import Generator
from distillers.jobs.card import write_card
from distillers.models.lora import LoraSettings, Origin, network_digest
from distillers.teacher import Teacher
from distillers.training.distiller import on_one_base, trainable_copy
from distillers.training.losses import consistency_generator
from distillers.weights.manifest import ADAPTER, COMFY, Info, sha256_of
from distillers.weights.read import origin, read_info

RANK = LoraSettings(rank=4, alpha=6)
U_NETS = ("sd", "sdxl")  # that ComfyUI knows


def student(base: Path, *steps: int, origin: Origin | None = None) -> Generator:
    """A student whose adapter has learnt something."""
    opened = Generator.from_pretrained(base)
    teacher = Teacher(opened.denoiser, opened.codec, replace(opened.info, name=base.name))  # type: ignore[arg-type]
    teacher = on_one_base(teacher, RANK, origin)
    learner = trainable_copy(teacher.denoiser)
    torch.manual_seed(3)
    for parameter in learner.parameters():
        nn.init.normal_(parameter, std=0.05)
    made = consistency_generator(learner, teacher, steps)
    made.info, made.prompts = replace(made.info, name="student", teacher=base.name, role="student"), opened.prompts
    return made.eval()


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    for name in STUDENTS:
        build(name, root / name.replace(" ", "-"))
    return {name: root / name.replace(" ", "-") for name in STUDENTS}


@pytest.mark.process
def test_on_its_base_an_adapter_draws_in_stock_diffusers_what_it_draws_here(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    """Every family, 1, 2 and 4 steps; U-Nets' by ComfyUI's file too. A process that cannot import a line of ours."""
    jobs: list[dict[str, Any]] = []
    for name, base in bases.items():
        for steps in (1, 2, 4):
            folder = base.parent / f"{base.name}-adapter-{steps}"
            student(base, steps).save_pretrained(folder)
            guidance = Generator.from_pretrained(base).info.guidance_scale if name in TOLD_THE_SCALE else 1.0
            job = {"base": str(base), "adapter": str(folder), "steps": steps, "guidance": guidance}
            jobs.append({**job, "file": ADAPTER, "name": folder.name})
            if name in U_NETS and steps == 1:
                jobs.append({**job, "file": COMFY, "name": f"{folder.name}-comfy"})
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).parent / "load_adapters.py"
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(tmp_path), str(tmp_path / "jobs.json")]
    done = run(command, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    pipes = {str(base): build(name, tmp_path / "pipe") for name, base in bases.items()}
    apart = {}
    for job in jobs:
        stock, bare = (np.load(tmp_path / f"{job['name']}{end}.npy") for end in ("", "-bare"))
        ours = consistency_pictures(Generator.from_pretrained(job["adapter"]), job["steps"], pipes[job["base"]])
        apart[job["name"]] = float(np.abs(ours - stock).max()), float(np.abs(stock - bare).max())
    wrong = {name: found for name, found in apart.items() if not found[0] < CLOSE < 10 * CLOSE < found[1]}
    assert not wrong


@pytest.mark.parametrize("name", ["sd", "pixart"])  # whose pipelines load adapters, and do not
def test_the_code_on_the_card_draws(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(name, tmp_path / "base")
    student(tmp_path / "base", 1).save_pretrained(tmp_path / "student")
    write_card(tmp_path / "student")
    code = (tmp_path / "student" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert "distillers" not in code
    monkeypatch.chdir(tmp_path)
    own = ", use_resolution_binning=False" if name == "pixart" else ""  # or it draws 1024 px first
    exec(code.replace('"a prompt"', f'"a prompt", height=32, width=32{own}'), {"__name__": "card"})
    assert Image.open("sample.png").size == (32, 32)


# --- its base


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion and an adapter of it, side by side."""
    root = tmp_path_factory.mktemp("sd")
    build("sd", root / "base")
    student(root / "base", 1).save_pretrained(root / "adapter")
    return root


def test_the_folder_is_the_adapter_alone_and_names_its_base(sd: Path) -> None:
    files = set(contents(sd / "adapter"))
    assert files == {ADAPTER, COMFY, "scheduler/scheduler_config.json", "fewstep.json"}
    info = Info.read(sd / "adapter")
    assert info.lora and (info.lora.rank, info.lora.base, info.lora.id) == (4, "base", None)
    assert info.lora.sha256 == network_digest(Generator.from_pretrained(sd / "base").denoiser.network)
    assert len(info.sha256) == 3
    comfy = load_file(sd / "adapter" / COMFY)
    layer = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0"
    down, up, alpha = (comfy[f"{layer}.{part}"] for part in ("lora_down.weight", "lora_up.weight", "alpha"))
    assert down.shape == (4, 32) and up.shape == (32, 4) and float(alpha) == 4
    assert len(comfy) == len(load_file(sd / "adapter" / ADAPTER)) // 2 * 3


def test_a_copy_of_the_base_at_half_precision_is_the_base(sd: Path, tmp_path: Path) -> None:
    shutil.copytree(sd / "adapter", tmp_path / "adapter")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(sd / "base", safety_checker=None)
    pipe.to(torch.float16).save_pretrained(tmp_path / "base", variant="fp16")
    made, whole = (
        Generator.from_pretrained(root / "adapter").sample([0], prompts=["a barn"]) for root in (tmp_path, sd)
    )
    assert (made - whole).abs().max() < 0.02


def changed(state: dict[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    first = next(iter(state))
    return {
        "of other layers": {key.replace("conv_in", "conv_inn"): value for key, value in state.items()},
        "of other shapes": {**state, first: state[first][:, :1].contiguous()},
        "without a half": {key: value for key, value in state.items() if key != first},
    }[how]


@pytest.mark.parametrize("how", ["of other layers", "of other shapes", "without a half"])
def test_an_adapter_that_does_not_fit_is_refused_by_layer(how: str, sd: Path, tmp_path: Path) -> None:
    shutil.copytree(sd, tmp_path / "sd")
    file = tmp_path / "sd" / "adapter" / ADAPTER
    save_file(changed(load_file(file), how), file)
    manifest = json.loads((file.parent / "fewstep.json").read_text())
    manifest["sha256"][ADAPTER] = sha256_of(file)
    (file.parent / "fewstep.json").write_text(json.dumps(manifest))
    with pytest.raises(BadInput, match=rf"{ADAPTER}: unet\..*an adapter of layers of this UNet2DConditionModel"):
        Generator.from_pretrained(file.parent)


def test_another_base_is_refused_and_both_are_named(sd: Path, tmp_path: Path) -> None:
    shutil.copytree(sd / "adapter", tmp_path / "adapter")
    torch.manual_seed(11)
    build("sd of noise", tmp_path / "base")  # the same classes, other weights
    unet = tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(unet)
    save_file({key: value + 0.01 for key, value in state.items()}, unet, {"format": "pt"})
    with pytest.raises(BadInput) as refused:
        Generator.from_pretrained(tmp_path / "adapter")
    assert str(tmp_path / "base") in str(refused.value) and "base, the base of student" in str(refused.value)


def test_a_base_is_found_beside_at_its_id_or_where_the_recipe_says(
    sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(sd / "adapter", folder)
    with pytest.raises(BadInput, match="a folder base beside it"):
        Generator.from_pretrained(folder)
    (folder / "recipe.toml").write_text(f'teacher = "{sd / "base"}"')
    assert Generator.from_pretrained(folder).sample([0], prompts=["a barn"]).isfinite().all()

    origin = Origin(id="someone/diffusion", revision="abc")
    student(sd / "base", 1, origin=origin).save_pretrained(tmp_path / "of-the-hub")
    asked = []

    def download(name: str, revision: str | None = None, **_: Any) -> str:
        asked.append((name, revision))
        return str(sd / "base")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert Generator.from_pretrained(tmp_path / "of-the-hub").info.name == "student"
    assert asked == [("someone/diffusion", "abc")]


def test_a_model_of_the_hub_has_its_own_name_and_origin(
    sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not its revision's, by which the local copy is called."""
    place = tmp_path / "snapshots" / "0123abc"
    shutil.copytree(sd / "base", place)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(place))
    assert Generator.from_pretrained("someone/diffusion").info.name == "diffusion"
    assert read_info("someone/diffusion").name == "diffusion"
    assert origin("someone/diffusion") == Origin(id="someone/diffusion", revision="0123abc")
    assert origin(str(sd / "base")) == Origin()


def test_an_adapter_that_is_tuned_further_leaves_as_one_of_the_same_base(sd: Path, tmp_path: Path) -> None:
    """As by `pso`, whose teacher is a few-step student: stock pipelines need know of one adapter only."""
    shutil.copytree(sd, tmp_path / "sd")
    root = tmp_path / "sd"
    opened = Generator.from_pretrained(root / "adapter")
    teacher = Teacher(opened.denoiser, opened.codec, opened.info, opened.prompts)  # type: ignore[arg-type]
    settings = LoraSettings(rank=2, alpha=3, targets=("to_q", "to_v"))
    teacher = on_one_base(teacher, settings, origin(str(root / "adapter")))
    tuned = trainable_copy(teacher.denoiser)
    for parameter in tuned.parameters():
        nn.init.normal_(parameter, std=0.3)
    made = Generator(tuned, opened.codec, replace(opened.info, name="tuned", teacher="student"), opened.prompts).eval()
    made.save_pretrained(root / "tuned")
    info = Info.read(root / "tuned")
    before = Info.read(root / "adapter").lora
    assert info.lora and before and info.lora == replace(before, rank=4 + 2)
    state = load_file(root / "tuned" / ADAPTER)
    assert {len(value) for key, value in state.items() if ".lora_A." in key} == {6}
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(root / "base", safety_checker=None)
    pipe.load_lora_weights(root / "tuned", weight_name=ADAPTER)
    ours, again, student = (
        generator.sample([0], prompts=["a barn"])
        for generator in (made, Generator.from_pretrained(root / "tuned"), Generator.from_pretrained(root / "adapter"))
    )
    assert (ours - again).abs().max() < CLOSE < 10 * CLOSE < (ours - student).abs().max()
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 32)
    with torch.no_grad():
        theirs = pipe.unet(x, 500, text).sample
        assert (
            theirs - Generator.from_pretrained(root / "tuned").denoiser.network(x, 500, text).sample
        ).abs().max() < 1e-4
    shutil.rmtree(root / "base")
    (root / "tuned" / "recipe.toml").write_text(f'teacher = "{root / "adapter"}"')
    (root / "adapter" / "recipe.toml").write_text(f'teacher = "{sd / "base"}"')
    assert torch.equal(Generator.from_pretrained(root / "tuned").sample([0], prompts=["a barn"]), again)
