"""Rewards: what is one, what is refused by name before anybody trains on it, and what feedback does with it."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from trainings import batch_for, iterate, teacher_for
from typer.testing import CliRunner

from distillers.cli import app
from distillers.data import ImageData, open_data
from distillers.data.preferences import PreferencePairs
from distillers.errors import BadInput
from distillers.evaluation.attributes import AttributeNet, avatars_card
from distillers.evaluation.features import FeatureCard, FeatureNet
from distillers.generator import Generator
from distillers.methods.hyper_sd import HyperSD
from distillers.models.captions import pack
from distillers.models.codec import PixelUnshuffle
from distillers.models.conditions import Cond
from distillers.training.reward import (
    Adherence,
    Recognised,
    Reward,
    choose_pairs,
    greenness,
    judges_of,
    load_reward,
)

LABELS = ("Forest", "River", "Sea Lake")


# rewards that a user might name, "test_reward:<function>"
def redness(pixels: Tensor, cond: Cond | None) -> Tensor:
    return pixels[:, 0].mean((1, 2)) - pixels[:, 1:].mean((1, 2, 3))


def not_a_number(pixels: Tensor, cond: Cond | None) -> Tensor:
    return pixels.mean((1, 2, 3)) * float("nan")


def one_for_all(pixels: Tensor, cond: Cond | None) -> Tensor:
    return pixels.mean()


def a_column(pixels: Tensor, cond: Cond | None) -> Tensor:
    return pixels.mean((2, 3))[:, :1]


def without_gradient(pixels: Tensor, cond: Cond | None) -> Tensor:
    return pixels.detach().mean((1, 2, 3))


def not_a_tensor(pixels: Tensor, cond: Cond | None) -> float:
    return 1.0


def counted(pixels: Tensor, cond: Cond | None) -> Tensor:
    return (pixels > 0).sum((1, 2, 3))


@pytest.fixture(scope="module")
def shapes() -> ImageData:
    return open_data("shapes", size=8)


@pytest.fixture(scope="module")
def classifier() -> FeatureNet:
    torch.manual_seed(0)
    return FeatureNet(FeatureCard(name="tiny", labels=LABELS, size=8, width=8)).eval().requires_grad_(False)


def example(task_labels: bool = True) -> tuple[Tensor, Cond | None]:
    return torch.zeros(1, 3, 8, 8), {"label": torch.zeros(1, dtype=torch.long)} if task_labels else None


# --- is it what was asked for? ---------------------------------------------------------------------------------------
def test_recognised_is_the_log_probability_of_the_asked_class(classifier: FeatureNet) -> None:
    pixels = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    label = torch.tensor([0, 1, 2, 2, 1, 0])
    reward = Recognised(classifier)(pixels, {"label": label})
    probability = classifier.classify(pixels)[1].softmax(1)
    torch.testing.assert_close(reward.exp(), probability[torch.arange(6), label])
    assert reward.shape == (6,) and bool((reward <= 0).all())
    every = torch.stack([Recognised(classifier)(pixels, {"label": torch.full((6,), k)}) for k in range(3)])
    torch.testing.assert_close(every.exp().sum(0), torch.ones(6))
    reward.sum().backward()
    assert pixels.grad is not None and bool(pixels.grad.flatten(1).any(1).all())
    assert all(p.grad is None for p in classifier.parameters())


def test_climbing_it_makes_the_class_likelier(classifier: FeatureNet) -> None:
    pixels, cond = 0.1 * torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1)), {"label": torch.arange(3)}
    judge = Recognised(classifier)
    start = judge(pixels, cond)
    for _ in range(20):
        pixels = pixels.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(judge(pixels, cond).sum(), pixels)
        pixels = pixels + 0.5 * gradient / gradient.flatten(1).norm(dim=1)[:, None, None, None]
    assert bool((judge(pixels, cond) > start).all())


@pytest.mark.parametrize("cond", [None, {"sar": torch.zeros(1, 1, 8, 8)}])
def test_a_classifier_has_no_opinion_without_a_label(classifier: FeatureNet, cond: Cond | None) -> None:
    with pytest.raises(BadInput, match=r"reward: got 'tiny'.*class-to-image"):
        Recognised(classifier)(torch.zeros(1, 3, 8, 8), cond)


# --- what can be measured exactly ------------------------------------------------------------------------------------
def test_greenness_counts_what_is_seen() -> None:
    colours = torch.tensor([[-1.0, 1, -1], [1, 1, 1], [0, 0.5, 0], [1, -1, 1], [-9, 9, -9]])
    pixels = colours[:, :, None, None].expand(-1, -1, 4, 4).clone().requires_grad_()
    assert greenness(pixels, None).tolist() == [2, 0, 0.5, -2, 2]
    greenness(pixels, None).sum().backward()
    assert pixels.grad is not None and bool(pixels.grad[2].any())


# --- pairs that a reward chooses -------------------------------------------------------------------------------------
@pytest.mark.parametrize("task", ["class-to-image", "image"])
def test_pairs_from_the_command(task: str, shapes: ImageData, tmp_path: Path) -> None:
    teacher, out = teacher_for(task, shapes), tmp_path / "pairs"
    generator = Generator(teacher.denoiser, teacher.codec, teacher.info)
    generator.save_pretrained(tmp_path / "model")
    command = ["pairs", str(tmp_path / "model"), "--out", str(out), "--reward", "distillers.training.reward:greenness"]
    done = CliRunner().invoke(app, [*command, "--n", "40", "--steps", "2", "--seed", "5", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    opened = PreferencePairs(out, size=8)
    batch = opened.items(range(len(opened)))
    assert len(opened) == 40 and opened.labels == (shapes.labels if task == "class-to-image" else ())
    rewards = [greenness(batch[key], None) for key in ("image", "loser")]
    assert bool((rewards[0] > rewards[1] - 1e-2).all()) and rewards[0].mean() > rewards[1].mean() + 1e-3
    told = [float(number) for number in re.findall(r"of (?:winners|losers) (-?[\d.]+\d)", done.output)]
    assert told == pytest.approx([float(reward.mean()) for reward in rewards], abs=5e-3) and "0 ties" in done.output
    if task == "class-to-image":
        assert batch["label"].tolist() == [i % 24 for i in range(40)]
    drawn = Generator.from_pretrained(tmp_path / "model")
    for i, line in enumerate(map(json.loads, (out / "pairs.jsonl").read_text().splitlines())):
        assert sorted(line["seeds"]) == [5 + 2 * i, 6 + 2 * i]
        labels = [i % 24] if task == "class-to-image" else None
        if i % 10 == 0:  # the seed makes the same picture again
            again = drawn.sample(line["seeds"][:1], labels=labels, steps=2)[0]
            assert (again - batch["image"][i]).abs().max() < 0.02
            assert line["rewards"][0] == pytest.approx(float(greenness(again[None], None)), abs=1e-3)
    refused = CliRunner().invoke(app, [*command, "--device", "cpu"])
    assert isinstance(refused.exception, BadInput) and refused.exception.field == "out"


def flat(pixels: Tensor, cond: Cond | None) -> Tensor:
    return torch.zeros(len(pixels))


def test_ties_are_left_out_and_what_cannot_be_compared_is_refused(shapes: ImageData, tmp_path: Path) -> None:
    teacher = teacher_for("image", shapes)
    generator = Generator(teacher.denoiser, teacher.codec, teacher.info)
    every_second = iter(np.tile([0.0, 1.0], 100))

    def sometimes(pixels: Tensor, cond: Cond | None) -> Tensor:
        steps = torch.arange(len(pixels)) // 2 * next(every_second)
        return steps.float()

    assert next(every_second) == 0  # the reward is tried once before it judges
    next(every_second)
    chosen = choose_pairs(generator, sometimes, tmp_path / "some", n=8, steps=1, seed=0)
    assert (chosen.pairs, chosen.ties) == (6, 2) and chosen.winners > chosen.losers
    with pytest.raises(BadInput, match="pairs: got 0"):
        choose_pairs(generator, flat, tmp_path / "none", n=4, steps=1, seed=0)
    with pytest.raises(BadInput, match="reward"):
        choose_pairs(generator, one_for_all, tmp_path / "none", n=4, steps=1, seed=0)
    with pytest.raises(BadInput, match="n: got 0"):
        choose_pairs(generator, flat, tmp_path / "none", n=0, steps=1, seed=0)
    generator.info = replace(generator.info, task="sar-to-optical")
    with pytest.raises(BadInput, match="no translator"):
        choose_pairs(generator, flat, tmp_path / "none", n=4, steps=1, seed=0)
    assert not (tmp_path / "none").exists()


# --- by name ---------------------------------------------------------------------------------------------------------
def test_a_folder_is_a_classifier_and_a_dotted_name_a_function(classifier: FeatureNet, tmp_path: Path) -> None:
    classifier.save(tmp_path / "tiny")
    loaded, pixels = load_reward(str(tmp_path / "tiny")), torch.randn(2, 3, 8, 8)
    cond = {"label": torch.tensor([0, 2])}
    torch.testing.assert_close(loaded(pixels, cond), Recognised(classifier)(pixels, cond), atol=1e-2, rtol=1e-2)
    assert isinstance(loaded, Recognised) and not any(p.requires_grad for p in loaded.parameters())
    assert torch.equal(load_reward("test_reward:redness")(pixels, None), redness(pixels, None))


@pytest.mark.parametrize(
    "name",
    [
        "no_such_module:f",
        "test_reward:no_such_function",
        "test_reward",
        "test_reward:",
        ":redness",
        "test_reward:LABELS",
        "weights/no-such-folder",
        "./rewards.py:redness",
    ],
)
def test_a_name_that_is_no_reward_is_refused(name: str) -> None:
    with pytest.raises(BadInput, match="reward: got"):
        load_reward(name)


def test_a_folder_without_a_classifier_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput):
        load_reward(str(tmp_path))


# --- tried before it is used -----------------------------------------------------------------------------------------
def test_a_reward_is_of_the_decoded_picture() -> None:
    x0 = torch.randn(4, 12, 4, 4)
    with torch.no_grad():  # it finds the gradient by itself
        reward = Reward(redness, PixelUnshuffle(2), torch.zeros(1, 12, 4, 4), None)
    torch.testing.assert_close(reward(x0, None), redness(PixelUnshuffle(2).decode(x0), None))
    assert reward(x0.bfloat16(), None).dtype == torch.float32


@pytest.mark.parametrize("function", [not_a_number, one_for_all, a_column, without_gradient, not_a_tensor, counted])
def test_what_is_no_number_per_picture_is_refused(function: object) -> None:
    for grad in (True, False):  # `networks` may be called under no_grad
        with torch.set_grad_enabled(grad), pytest.raises(BadInput, match="reward"):
            Reward(function, PixelUnshuffle(1), *example())  # type: ignore[arg-type]


def test_a_reward_that_only_compares_needs_no_gradient() -> None:
    Reward(without_gradient, PixelUnshuffle(1), *example(), differentiable=False)
    for function in (not_a_number, one_for_all, a_column, not_a_tensor):
        with pytest.raises(BadInput, match=r"reward.*one finite number per picture"):
            Reward(function, PixelUnshuffle(1), *example(), differentiable=False)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name", ["no_such_module:f", "test_reward:not_a_number", "test_reward:a_column", "test_reward:without_gradient"]
)
def test_a_method_with_a_wrong_reward_is_refused_before_the_first_iteration(name: str, shapes: ImageData) -> None:
    with pytest.raises(BadInput, match="reward"):
        HyperSD(reward=name).networks(teacher_for("image", shapes))


def test_a_classifier_as_the_reward_of_a_method(classifier: FeatureNet, shapes: ImageData, tmp_path: Path) -> None:
    """Frozen, asked in the last stage only, and refused where there are no labels."""
    classifier.save(tmp_path / "tiny")
    method = HyperSD(segments=(2, 1), adversarial_weights=(0.0, 0.0), reward=str(tmp_path / "tiny"), reward_weight=1.0)
    teacher = teacher_for("class-to-image", shapes)
    batch = {**batch_for(teacher, shapes), "label": torch.tensor([0, 1, 2, 0])}
    nets = method.networks(teacher)
    before = [p.clone() for p in nets["reward"].parameters()]
    losses = []
    for weight in (1.0, 0.0):
        weighed = HyperSD(
            segments=(2, 1), adversarial_weights=(0.0, 0.0), reward=str(tmp_path / "tiny"), reward_weight=weight
        )
        for progress in (0.2, 0.7):
            torch.manual_seed(0)
            losses.append(float(next(weighed.step(nets, batch, progress))[1].detach()))
    assert losses[0] == losses[2] and losses[1] > losses[3] + 0.1
    assert iterate(method, nets, batch, 0.7) == ["student"]
    assert before and all(torch.equal(a, b) for a, b in zip(before, nets["reward"].parameters(), strict=True))
    with pytest.raises(BadInput, match="reward"):
        method.networks(teacher_for("image", shapes))


# --- a classifier of attributes as the reward ------------------------------------------------------------------------
def attributes() -> AttributeNet:
    torch.manual_seed(0)
    card = replace(avatars_card("reward"), name="tiny-reward", size=16, widths=(8, 16))
    return AttributeNet(card).eval().requires_grad_(False)


def test_adherence_is_the_mean_log_probability_of_what_a_caption_names() -> None:
    net, captions = attributes(), ["a cartoon head with braids, cat ears", "on a pink background"]
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    logits = dict(zip(net.attributes, net(pixels), strict=True))

    def expected(i: int, **named: str) -> Tensor:
        logs = [
            logits[a][i].log_softmax(0)[1 + net.attributes[a].index(value)]
            for a, value in ((name.replace("_", " "), value) for name, value in named.items())
        ]
        return torch.stack(logs).mean()

    reward = Adherence(net)(pixels.requires_grad_(), {"caption": pack(captions)})
    first = expected(0, style="a cartoon head", hair="braids", accessory="cat ears")
    torch.testing.assert_close(reward, torch.stack([first, expected(1, background="on a pink background")]))
    reward.sum().backward()
    assert pixels.grad is not None and bool((pixels.grad.abs().amax((1, 2, 3)) > 0).all())


def test_adherence_needs_a_caption_and_is_tried_with_one_that_it_knows(tmp_path: Path) -> None:
    attributes().save(tmp_path / "reward")
    loaded = load_reward(str(tmp_path / "reward"))
    assert isinstance(loaded, Adherence)
    x0 = torch.zeros(2, 3, 16, 16)
    for cond in (None, {"label": torch.zeros(2, dtype=torch.long)}):
        with pytest.raises(BadInput, match=r"reward: got .tiny-reward.*text-to-image"):
            loaded(x0, cond)
    tried = Reward(loaded, PixelUnshuffle(1), x0, {"text": torch.zeros(2, 4, 8)})
    assert tried(x0, {"caption": pack(["braids", "a mohawk"])}).shape == (2,)
    with pytest.raises(BadInput, match="prompt: got 'a photograph of a forest'"):
        tried(x0, {"caption": pack(["a photograph of a forest"] * 2)})


def test_what_has_learnt_from_a_reward_says_so(tmp_path: Path) -> None:
    net = attributes()
    reward = Reward(Adherence(net), PixelUnshuffle(1), torch.zeros(1, 3, 16, 16), {"text": torch.zeros(1, 4, 8)})
    assert judges_of(nn.ModuleDict({"rewards": nn.ModuleList([reward])}).modules()) == {"tiny-reward"}
