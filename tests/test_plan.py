"""`fewstep plan`: what it counts is what a training allocates; published dimensions; what to change."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import write_captioned
from stock_pipelines import build
from torch import Tensor, nn
from typer.testing import CliRunner

from distillers.cli import app as cli
from distillers.errors import BadInput
from distillers.jobs import plan as planning
from distillers.jobs.distill import with_head
from distillers.jobs.inputs import load_data, load_teacher
from distillers.jobs.plan import DIMENSIONS, Plan, changes, kept_bytes, plan, published, told_plan
from distillers.jobs.recipe import Recipe
from distillers.models.denoiser import Denoiser
from distillers.models.lora import Adapted
from distillers.models.schedule import from_config
from distillers.training.trainer import Run, begin
from distillers.weights.read import read_skeleton

LORA = {"rank": 4}


# --- what stays is exact


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("plan")
    for name in ("sd", "sana"):
        build(name, root / name)
    write_captioned(root / "pictures", 6, 64)
    return root


def recipe(stock: Path, family: str, method: str, lora: Any = None, **changes: Any) -> Recipe:
    table = {
        "name": "x",
        "method": method,
        "teacher": str(stock / family),
        "data": {"kind": "captions", "path": str(stock / "pictures"), "flip": False},
        "train": {"batch": 2, "iterations": 2, "compile": "never", **changes.pop("train", {})},
        **({"lora": lora} if lora else {}),
        **changes,
    }
    return Recipe.from_table(table)


def storages(tensors: Iterable[Tensor]) -> int:
    """The bytes that tensors lie in, each once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}.values())


def tensors(module: nn.Module) -> list[Tensor]:
    bases = {id(part.base): part.base.network for part in module.modules() if isinstance(part, Adapted)}
    return [t for one in (module, *bases.values()) for t in (*one.parameters(), *one.buffers())]


def allocated(run: Run) -> dict[str, int]:
    """What a training holds after an iteration, by torch's own account."""
    everything = tensors(run.nets)
    averages = [t for net in run.averages.values() for t in (*net.parameters(), *net.buffers())]
    state = [v for o in run.optimizers.values() for own in o.state.values() for v in own.values()]
    return {
        "weights": storages(set(everything) - set(averages)),  # an average on a base lies in the base, too
        "gradients": storages(t.grad for t in everything if t.grad is not None),
        "optimizer": storages(v for v in state if isinstance(v, Tensor)),
        "averages": storages(averages),
    }


CASES = [
    (family, method, lora, options)
    for family, method, options in (
        ("sd", "consistency", {}),
        ("sd", "dmd2", {"dmd2": {"critic_turns": 1}}),
        ("sd", "dmd2", {"dmd2": {"critic_turns": 1, "gan_weight": 0.01}}),
        ("sd", "hyper_sd", {}),
        ("sd", "disback", {"disback": {"critic_turns": 1}}),
        ("sd", "boot", {}),
        ("sana", "dmd2", {"dmd2": {"critic_turns": 1}, "train": {"optimizer": "adamw", "ema": 0}}),
        ("sd", "consistency", {"train": {"optimizer": "adam8bit"}}),
    )
    for lora in (None, LORA)
]


@pytest.mark.parametrize(("family", "method", "lora", "options"), CASES)
def test_what_is_counted_is_what_a_training_allocates(
    family: str, method: str, lora: Any, options: dict[str, Any], stock: Path, tmp_path: Path
) -> None:
    own = recipe(stock, family, method, lora, **options)
    counted = plan(own)
    if own.settings().optimizer == "adam8bit":
        pytest.importorskip("bitsandbytes", reason="8-bit Adam needs bitsandbytes: pip install 'fewstep[adam8bit]'")
    data = load_data(own)
    teacher = with_head(load_teacher(own, data), own, data, tmp_path, "cpu")
    run = begin(own.distiller(), teacher, own.settings(), tmp_path, device="cpu")
    for i in range(own.settings().iterations):
        run.iteration(i, data)
    found = allocated(run)
    run.close()
    roles = [role for role in counted.roles if role.name not in ("autoencoder", "text encoders")]
    assert {key: sum(getattr(role, key) for role in roles) for key in found} == found
    learning = sum(p.numel() for p in run.nets.parameters() if p.requires_grad)
    assert sum(role.learning for role in roles) == learning
    codec = next(role for role in counted.roles if role.name == "autoencoder")
    assert codec.weights == storages([*teacher.codec.parameters(), *teacher.codec.buffers()])
    words = next(role for role in counted.roles if role.name == "text encoders")
    assert teacher.prompts is not None and not words.on_device
    assert words.parameters == sum(p.numel() for p in teacher.prompts.parameters())
    assert counted.items == 6 and counted.static == sum(role.total for role in counted.roles if role.on_device)
    assert any(role.name == "base" for role in roles) == bool(lora)


def test_an_untrained_network_is_counted_too(tmp_path: Path) -> None:
    network = {
        "block_out_channels": [16, 32], "norm_num_groups": 8, "layers_per_block": 1,
        "down_block_types": ["DownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "UpBlock2D"],
    }  # fmt: skip
    own = Recipe.from_table(
        {
            "name": "x", "method": "diffusion", "data": {"kind": "shapes", "size": 16},
            "model": {"task": "class-to-image", "network": network}, "train": {"batch": 2, "compile": "never"},
        }
    )  # fmt: skip
    data = load_data(own)
    run = begin(own.distiller(), load_teacher(own, data), own.settings(), tmp_path, device="cpu")
    run.iteration(0, data)
    found, counted = allocated(run), plan(own)
    run.close()
    assert {key: sum(getattr(role, key) for role in counted.roles) for key in found} == found


# --- what a backward pass keeps


def test_what_is_kept_is_what_autograd_keeps() -> None:
    """Of a plain network: each layer keeps its input, and what is kept twice lies there once."""
    layers = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 4), nn.SiLU(), nn.Linear(4, 8))

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            found: Tensor = self.layers(x)
            return found

    own = Denoiser(Network().to("meta"), from_config({"name": "vp"}), "x0")
    x = torch.zeros(3, 8, device="meta")
    rows = 8 + 16 + 16 + 4 + 4  # inputs of the first layer, the first SiLU, the second layer, ...
    assert kept_bytes(own, x, None, "no") == 4 * 3 * rows
    weights = 8 * 16 + 16 * 4 + 4 * 8 + 16 + 4 + 8
    assert kept_bytes(own, x, None, "bf16") == 2 * 3 * rows + 2 * weights  # and the weights that are cast


def test_checkpointing_and_half_precision_keep_less(stock: Path) -> None:
    own = recipe(stock, "sd", "consistency")
    sizes = [
        plan(recipe(stock, "sd", "consistency", train=train)).activations
        for train in ({}, {"precision": "bf16"}, {"checkpointing": True}, {"accumulation": 2})
    ]
    assert sizes[0] == plan(own).activations and sizes[2] < sizes[0] and sizes[3] < sizes[0]
    assert sizes[0] - sizes[3] > 0.4 * (sizes[0] - planning.DEVICE_OWN)  # half the pictures, half of it


# --- published pipelines


@pytest.mark.parametrize(
    ("name", "millions", "encoders", "size"),
    [
        ("sd15", 859.521, 123.060, 512),
        ("sdxl", 2567.464, 817.720, 1024),
        ("sd35-medium", 2243.172, 5580.621, 1024),  # 2.47 B with its table of positions, which is no parameter
        ("flux-dev", 11901.408, 4885.371, 1024),
        ("sana-1600m", 1604.463, 2614.342, 1024),
    ],
)
def test_published_dimensions_have_the_published_parameters(
    name: str, millions: float, encoders: float, size: int
) -> None:
    parts, words = read_skeleton(DIMENSIONS / name)
    assert sum(p.numel() for p in parts.denoiser.parameters()) / 1e6 == pytest.approx(millions, abs=1e-3)
    assert sum(p.numel() for one in words.values() for p in one.parameters()) / 1e6 == pytest.approx(encoders, abs=1e-3)
    assert parts.info.size == (size, size) and parts.info.task == "text-to-image"
    for one in json.loads((DIMENSIONS / name / "model_index.json").read_text())["ids"]:
        assert published(one) == DIMENSIONS / name


def sdxl(**more: Any) -> Recipe:
    train = {"batch": 1, "precision": "bf16", "optimizer": "adamw", **more.pop("train", {})}
    table = {"name": "x", "method": "consistency", "teacher": "stabilityai/stable-diffusion-xl-base-1.0"}
    return Recipe.from_table({**table, "data": {"kind": "captions", "path": "no/such"}, "train": train, **more})


@pytest.mark.slow
def test_sdxl_needs_what_it_is_known_to_need() -> None:
    lora = plan(sdxl(lora={"rank": 64, "base": "bf16"}))
    assert lora.static / 1e9 == pytest.approx(9.9 + 0.3, abs=0.1)  # and the autoencoder
    assert 5e9 < lora.activations < 15e9 and lora.items is None
    assert lora.caches == {"a picture's latents": 2 * 4 * 128 * 128, "a text at most": 2 * (77 * 2048 + 1280)}
    whole = plan(sdxl(data={"kind": "captions", "path": "no/such", "size": 512}))
    assert whole.static / 1e9 == pytest.approx(7 * 2.567 * 4 + 0.3, abs=0.1)  # 72 GB and the autoencoder


def test_what_to_change_is_said_until_it_fits(stock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "DEVICE_OWN", 0.0)
    monkeypatch.setattr(planning, "GB", 1e6)
    own = recipe(stock, "sd", "dmd2", train={"batch": 4})
    full = plan(own)
    limit = 0.58 * full.total
    tried = changes(own, limit)
    totals = [made.total for _, made in tried]
    assert len(tried) >= 2 and "lora.rank=16 lora.base=bf16" in [change for change, _ in tried]
    assert totals == sorted(totals, reverse=True) and totals[-1] <= limit < totals[-2]
    said = told_plan(own, limit / 1e6).splitlines()
    assert any("does not fit into" in line for line in said) and said[-1].endswith(", which fits")
    assert "no change of the recipe makes it fit" in told_plan(own, 0.01)
    assert told_plan(own, 200).endswith("fits into 200 GB")


def test_more_devices_are_the_last_change(stock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "DEVICE_OWN", 0.0)
    monkeypatch.setattr(planning, "GB", 1e6)
    monkeypatch.setattr(planning, "CHANGES", ())
    own = recipe(stock, "sd", "consistency", train={"batch": 1})
    whole = plan(own)
    network = sum(role.total for role in whole.roles if role.name in ("student", "teacher", "target"))
    block = max(role.block for role in whole.roles)
    assert network > 4 * block > 0 and next(role for role in whole.roles if role.name == "autoencoder").block == 0
    assert whole.share(4) == pytest.approx(whole.total - network * 3 / 4 + 2 * block)
    limit = (whole.share(2) + whole.share(4)) / 2e6
    assert told_plan(own, limit).endswith(f"on 4 devices: {whole.share(4) / 1e6:.1f} GB each, which fits")
    split = recipe(stock, "sd", "consistency", train={"batch": 1, "shard": True})
    assert "on each of 4 devices" in told_plan(split, limit, 4) and "fits into" in told_plan(split, limit, 4)
    adapters = plan(recipe(stock, "sd", "consistency", LORA))
    assert [role.name for role in adapters.roles if role.block] == ["base"], "adapters stay whole"
    for wrong, devices in ((own, 2), (split, 1)):
        with pytest.raises(BadInput, match="devices: got"):
            told_plan(wrong, None, devices)


def test_the_command_prints_the_plan(stock: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    recipe(stock, "sd", "dmd2").write(file, {})
    told = CliRunner().invoke(cli, ["plan", str(file), "train.batch=1", "--device-memory", "24"])
    assert told.exit_code == 0, told.output
    for word in ("dmd2 of", "1 picture of 16 x 16 px at a time", "student", "critic", "fits into 24 GB", "optimizer"):
        assert word in told.output
    wrong = CliRunner().invoke(cli, ["plan", str(file), "--device-memory", "0"])
    assert isinstance(wrong.exception, BadInput)


def test_what_no_training_could_begin_with_is_refused(stock: Path) -> None:
    with pytest.raises(BadInput, match="a teacher of text-to-image"):
        plan(recipe(stock, "sd", "refine"))
    with pytest.raises(BadInput, match="an existing folder or a"):
        plan(recipe(stock, "nowhere", "dmd2"))
    assert isinstance(plan(recipe(stock, "sd", "dmd2", data={"kind": "prompts", "path": "no/such"})), Plan)
