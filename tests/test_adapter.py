"""LoRA students: the teacher at the start, gradients for the adapter alone, and a folder that stock diffusers reads."""

import copy
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel
from networks import contents, describe, transformer, untrained, warnings_of
from processes import run
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from distillers.errors import BadInput
from distillers.generator import Generator
from distillers.jobs.card import write_card
from distillers.models.lora import (
    Adapted,
    AdapterBase,
    LoraSettings,
    acting,
    add_lora,
    fused,
    has_lora,
    lora_rank,
    lora_state,
    plain,
    set_lora_scale,
)
from distillers.training.distiller import follow, slow_copy
from distillers.training.toy import StudentNetwork
from distillers.weights.manifest import ADAPTER, Info, Lora
from distillers.weights.write import _save_adapter

LOADERS: Any = diffusers.loaders
PIPELINE: Any = diffusers.DiffusionPipeline
KINDS = ("unet", "transformer", "toy")
STUDENT = describe("class-to-image", "consistency")


def network(kind: str) -> nn.Module:
    if kind == "toy":
        torch.manual_seed(0)
        return StudentNetwork()
    return (untrained if kind == "unet" else transformer)(describe("class-to-image")).denoiser.network


def answer(net: nn.Module) -> Tensor:
    rng = torch.Generator().manual_seed(3)
    time, label = torch.tensor([3.0, 700.0]), torch.tensor([0, 2])
    if isinstance(plain(net), StudentNetwork):
        out: Tensor = net(torch.randn(2, 2, generator=rng), time / 1000)
        return out
    config: Any = net.config
    x = torch.randn(2, config.in_channels, config.sample_size, config.sample_size, generator=rng)
    answered: Tensor = net(x, timestep=time, class_labels=label).sample
    return answered


def learned(net: nn.Module, rank: int = 4, alpha: float | None = 6) -> nn.Module:
    """The network with an adapter as after a training."""
    torch.manual_seed(1)
    add_lora(net, LoraSettings(rank=rank, alpha=alpha))
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.03)
    return net


def adapted(generator: Generator, name: str) -> Generator:
    learned(generator.denoiser.network)
    generator.info = replace(generator.info, name=name, teacher="teacher")
    return generator


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher and its LoRA student, as a U-Net and as a DiT with a VAE."""
    root = tmp_path_factory.mktemp("weights")
    for kind, make in (("unet", untrained), ("transformer", transformer)):
        teacher = make(describe("class-to-image"))
        teacher.info = replace(teacher.info, name="teacher")
        teacher.save_pretrained(root / kind / "teacher")
        adapted(make(STUDENT), "student").save_pretrained(root / kind / "student")
    return root


# --- the network


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_fresh_adapter_changes_nothing_and_scale_zero_gives_the_teacher_back(kind: str) -> None:
    net = network(kind)
    teacher, training = answer(net), net.training
    assert not has_lora(net) and teacher.std() > 0.01
    assert add_lora(net, LoraSettings(rank=4)) is net
    assert (has_lora(net), lora_rank(net), net.training) == (True, 4, training)
    assert torch.equal(answer(net), teacher)
    net = learned(network(kind))
    student = answer(net)
    assert (student - teacher).abs().max() > 0.01
    for scale, expected in ((0, teacher), (1, student), (0, teacher)):
        set_lora_scale(net, scale)
        assert torch.equal(answer(net), expected)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_base_without_an_adapter_is_the_teacher_whatever_its_roles_have_learnt(kind: str) -> None:
    teacher, base = answer(network(kind)), AdapterBase(network(kind), LoraSettings(rank=4))
    student, critic, bare = Adapted(base, base.add()), Adapted(base, base.add()), Adapted(base)
    assert torch.equal(answer(student), teacher)  # a fresh adapter changes nothing
    for parameter in student.parameters():
        parameter.normal_(std=0.1)
    changed = answer(student)
    assert torch.equal(answer(bare), teacher) and torch.equal(answer(critic), teacher)
    assert torch.equal(answer(student), changed) and not torch.equal(changed, teacher)
    with pytest.raises(RuntimeError), acting(student):
        raise RuntimeError
    assert torch.equal(answer(bare), teacher)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1, 0.5])
@torch.no_grad()
def test_fused_is_the_stock_network_and_answers_alike(kind: str, scale: float) -> None:
    net, stock = learned(network(kind)), network(kind)
    set_lora_scale(net, scale)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    plain = fused(net)
    assert type(plain) is type(stock) and not has_lora(plain)
    assert [(k, type(v)) for k, v in plain.named_modules()] == [(k, type(v)) for k, v in stock.named_modules()]
    assert plain.state_dict().keys() == stock.state_dict().keys()
    torch.testing.assert_close(answer(plain), answer(net), atol=1e-5, rtol=0)
    assert has_lora(net) and all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_has_an_adapter_and_only_adapters_learn(kind: str) -> None:
    layers = {name for name, m in network(kind).named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    net = learned(network(kind))
    learning = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
    assert learning == {f"{layer}.lora_{x}.default.weight" for layer in layers for x in "AB"}
    answer(net).square().sum().backward()
    for name, parameter in net.named_parameters():
        assert (parameter.grad is not None) == (name in learning), name
        assert parameter.grad is None or parameter.grad.abs().max() > 0, name


def test_the_start_is_a_function_of_the_global_seed() -> None:
    states = []
    for seed in (0, 0, 1):
        net = network("unet")
        torch.manual_seed(seed)
        states.append(lora_state(add_lora(net, LoraSettings(rank=2))))
    first, same, other = states
    assert first.keys() == same.keys() and all(torch.equal(first[key], same[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize(
    ("options", "named"), [({"rank": 0}, "rank"), ({"rank": -1}, "rank"), ({"alpha": 0.0}, "alpha")]
)
def test_what_is_no_adapter_is_refused(options: Any, named: str) -> None:
    net = network("toy")
    with pytest.raises(BadInput, match=rf"lora\.{named}"):
        add_lora(net, LoraSettings(**options))
    assert not has_lora(net)
    add_lora(net, LoraSettings(rank=1))
    with pytest.raises(ValueError, match="already"):
        add_lora(net, LoraSettings(rank=1))


def test_an_average_follows_an_adapter() -> None:
    generator = adapted(untrained(STUDENT), "student")
    fast, slow = generator.denoiser, slow_copy(generator.denoiser)
    assert not any(parameter.requires_grad for parameter in slow.parameters())
    start = copy.deepcopy(lora_state(fast.network))
    with torch.no_grad():
        for parameter in fast.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    follow(slow, fast, 0.75)
    weight = "unet.conv_in.lora_A.weight"
    torch.testing.assert_close(lora_state(slow.network)[weight], start[weight] + 0.25)
    base = fast.network.get_parameter("conv_in.base_layer.weight")
    assert torch.equal(slow.network.get_parameter("conv_in.base_layer.weight"), base)
    set_lora_scale(slow.network, 0)  # the copy's scale is its own
    assert not torch.equal(answer(fast.network), answer(slow.network))


# --- the folder


@pytest.mark.parametrize("kind", ["unet", "transformer"])
def test_the_folder_draws_the_students_pictures(kind: str, saved: Path) -> None:
    generator = adapted((untrained if kind == "unet" else transformer)(STUDENT), "student")
    opened = Generator.from_pretrained(saved / kind / "student")
    assert not has_lora(opened.denoiser.network) and has_lora(generator.denoiser.network)
    ours, theirs = (g.sample([0, 1], labels=[0, 2], steps=2) for g in (generator, opened))
    teacher = Generator.from_pretrained(saved / kind / "teacher").sample([0, 1], labels=[0, 2], steps=2)
    torch.testing.assert_close(theirs, ours, atol=1e-2, rtol=0)
    assert (ours - theirs).abs().mean() < 1e-3 < 1e-2 < (ours - teacher).abs().mean()


def stock_network(kind: str, teacher: Path, student: Path) -> Any:
    """The lines of the card: stock classes alone."""

    class Network(
        {"unet": UNet2DModel, "transformer": DiTTransformer2DModel}[kind],  # type: ignore[misc]
        LOADERS.PeftAdapterMixin,
    ): ...

    net = Network.from_pretrained(teacher, subfolder=kind)
    net.load_lora_adapter(student, weight_name=ADAPTER, prefix=kind)
    return net


@pytest.mark.parametrize("kind", ["unet", "transformer"])
@torch.no_grad()
def test_stock_diffusers_opens_the_network_and_puts_the_adapter_on_the_teachers(
    kind: str, saved: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    teacher, student = saved / kind / "teacher", saved / kind / "student"
    stock: Any = UNet2DModel if kind == "unet" else DiTTransformer2DModel
    whole, report = stock.from_pretrained(student / kind, output_loading_info=True)
    assert not any(report.values())
    net = stock_network(kind, teacher, student)
    torch.testing.assert_close(answer(net), answer(whole), atol=2e-3, rtol=0)
    assert (answer(net) - answer(stock.from_pretrained(teacher / kind))).abs().max() > 0.02
    net.fuse_lora()
    torch.testing.assert_close(answer(net), answer(whole), atol=2e-3, rtol=0)
    net.unload_lora()
    assert net.state_dict().keys() == whole.state_dict().keys()
    assert (caplog.text, *capfd.readouterr()) == ("", "", "")


def test_the_file_is_what_diffusers_own_loaders_read(tmp_path: Path) -> None:
    """`load_lora_weights` of Stable Diffusion's pipelines, and the mixin of a network that has it."""
    torch.manual_seed(0)
    base: Any = UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=8, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        sample_size=8, in_channels=4, out_channels=4,
    )  # fmt: skip
    net = learned(copy.deepcopy(base))
    state = lora_state(net)
    _save_adapter(state, tmp_path / ADAPTER)

    def ask(unet: nn.Module) -> Tensor:
        rng = torch.Generator().manual_seed(0)
        x, text = torch.randn(1, 4, 8, 8, generator=rng), torch.randn(1, 3, 8, generator=rng)
        answered: Tensor = unet(x, 5, text).sample.detach()
        return answered

    by_mixin = copy.deepcopy(base)
    by_mixin.load_lora_adapter(state, prefix="unet")
    torch.testing.assert_close(ask(by_mixin), ask(net), atol=1e-6, rtol=0)

    class Pipeline(PIPELINE, LOADERS.StableDiffusionLoraLoaderMixin):
        def __init__(self, unet: UNet2DConditionModel) -> None:
            super().__init__()
            self.register_modules(unet=unet)

    pipeline = Pipeline(copy.deepcopy(base))
    pipeline.text_encoder = None
    pipeline.load_lora_weights(tmp_path)
    torch.testing.assert_close(ask(pipeline.unet), ask(net), atol=2e-3, rtol=0)
    assert (ask(pipeline.unet) - ask(base)).abs().max() > 0.02


@pytest.mark.parametrize("kind", ["unet", "transformer"])
def test_the_adapter_is_one_listed_readable_half_precision_file(kind: str, saved: Path) -> None:
    folder = saved / kind / "student"
    info = Info.read(folder)
    assert info.lora == Lora(rank=4, base="teacher") and ADAPTER in info.sha256
    assert (folder / ADAPTER).stat().st_mode & 0o777 == 0o644
    state = load_file(folder / ADAPTER)
    assert {value.dtype for value in state.values()} == {torch.float16}
    expected = lora_state(learned(network(kind)))
    assert state.keys() == expected.keys()
    assert all(re.fullmatch(rf"{kind}\..+\.lora_[AB]\.weight", key) for key in state)
    assert all(torch.equal(state[key], expected[key].half()) for key in state)
    with safe_open(folder / ADAPTER, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_folder_without_an_adapter_says_nothing_of_it(saved: Path) -> None:
    assert "lora" not in json.loads((saved / "unet" / "teacher" / "fewstep.json").read_text())
    assert not (saved / "unet" / "teacher" / ADAPTER).exists()
    assert not has_lora(Generator.from_pretrained(saved / "unet" / "student").denoiser.network)


def test_published_again_without_an_adapter_the_file_is_gone(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "student"
    shutil.copytree(saved / "unet" / "student", folder)
    opened = Generator.from_pretrained(folder)
    assert opened.info.lora
    opened.save_pretrained(folder)
    again = Generator.from_pretrained(folder)
    assert again.info.lora is None and ADAPTER not in contents(folder) and ADAPTER not in again.info.sha256


@pytest.mark.parametrize("change", ["missing", "edited", "not listed", "rank", "manifest"])
def test_a_wrong_adapter_is_refused_by_name(change: str, saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    shutil.copytree(saved / "unet" / ("teacher" if change == "not listed" else "student"), folder)
    if change == "missing":
        (folder / ADAPTER).unlink()
    if change in ("edited", "not listed"):
        (folder / ADAPTER).write_bytes(b"another")
    manifest = json.loads((folder / "fewstep.json").read_text())
    if change == "rank":
        manifest["lora"]["rank"] = "four"
    if change == "manifest":
        del manifest["sha256"][ADAPTER]
    (folder / "fewstep.json").write_text(json.dumps(manifest))
    with pytest.raises(BadInput, match="lora" if change in ("rank", "manifest") else ADAPTER):
        Generator.from_pretrained(folder)


@pytest.mark.process
@pytest.mark.parametrize("kind", ["unet", "transformer"])
def test_the_cards_lines_load_the_adapter_without_a_line_of_ours(kind: str, saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / kind, tmp_path, dirs_exist_ok=True)
    write_card(tmp_path / "student")
    write_card(tmp_path / "teacher")
    blocks = (tmp_path / "student" / "README.md").read_text().split("```python\n")
    assert len(blocks) == 3 and "lora" not in (tmp_path / "teacher" / "README.md").read_text().lower()
    lines = blocks[2].split("```")[0]
    pipeline = f'import diffusers\npipe = diffusers.DiffusionPipeline.from_pretrained("student", {kind}=network)\n'
    pipeline += f"assert pipe.{kind} is network and pipe.{kind}.active_adapters()\n"
    code = f"import sys\nsys.modules['distillers'] = None\n{lines}{pipeline}"
    code = code.replace("import diffusers\n", "import diffusers\ndiffusers.utils.logging.disable_progress_bar()\n")
    done = run([sys.executable, "-c", code], cwd=tmp_path)
    assert (done.returncode, warnings_of(done.stderr)) == (0, "")


@pytest.mark.process
def test_the_package_is_light_to_import() -> None:
    code = (
        "import distillers.models.lora, distillers.weights, sys; assert not {'peft', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
