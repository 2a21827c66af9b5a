"""PSO: its losses against their formulas, what it refuses and doubts, and its proof on targets that are known.

The last part, marked slow, tunes a few-step student of the ring, and does so with broken copies, too.
"""

import copy
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from folders import write_pairs
from mutate import mutated
from preference_report import (
    MOVING,
    NOISE,
    PAIRED,
    REFERENCE,
    REWARDED,
    TARGETS,
    WRONG,
    held_against,
    modes,
    rewarded,
    strain,
    tuned,
    untuned,
)
from torch import Tensor
from trainings import iterate, teacher_for

from distillers.data import open_data
from distillers.errors import BadInput
from distillers.generator import Generator
from distillers.methods import pso
from distillers.methods.pso import Pso
from distillers.models.conditions import Cond
from distillers.models.denoiser import Denoiser
from distillers.models.lora import LoraSettings
from distillers.models.schedule import EDM, NoiseSchedule, RectifiedFlow, Trigonometric
from distillers.teacher import Teacher
from distillers.training.distiller import Batch, Networks, on_one_base
from distillers.training.losses import sampling_times
from distillers.training.toy import exact_teacher, ring

LN2 = math.log(2)


# rewards of points (B, 2), "test_pso:<function>"
def rightness(points: Tensor, cond: Cond | None) -> Tensor:
    return points[:, 0]


def leftness(points: Tensor, cond: Cond | None) -> Tensor:
    return -points[:, 0]


def indifferent(points: Tensor, cond: Cond | None) -> Tensor:
    return torch.zeros(len(points))


def judged(**options: Any) -> Pso:
    return Pso(mode="online", **{"reward": "test_pso:rightness", **options})


def few_step(sampler: str = "consistency", schedule: NoiseSchedule | None = None) -> Teacher:
    """A few-step model of points, untrained."""
    teacher = exact_teacher(ring())
    if schedule:
        teacher.denoiser.schedule = schedule
    times = {k: sampling_times(teacher.denoiser.schedule, k) for k in (1, 2, 4)}
    info = replace(teacher.info, sampler=sampler, step_times=times, default_steps=1)
    return replace(teacher, info=info)


def begin(method: Pso, teacher: Teacher | None = None, learned: float = 0.0) -> Networks:
    """The networks; `learned`: std of the adapter's B, as after a training."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nets = method.networks(on_one_base(copy.deepcopy(teacher or few_step()), LoraSettings(rank=8)))
    with torch.no_grad():
        for name, parameter in nets["student"].named_parameters():
            if name.endswith("B.weight") and learned:
                parameter.normal_(std=learned)
    return nets


def pair(n: int = 64) -> Batch:
    rng = torch.Generator().manual_seed(1)
    return {"x0": ring().sample(n, rng), "loser": ring().sample(n, rng)}


def loss_of(method: Any, nets: Networks, batch: Batch, seed: int = 2) -> Tensor:
    torch.manual_seed(seed)
    (turn,) = method.step(nets, batch, 0.0)
    assert turn[0] == "student"
    return turn[1]


def gradient(method: Any, nets: Networks, batch: Batch) -> Tensor:
    """Of everything that learns, as one vector."""
    learning = [p for p in nets["student"].parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss_of(method, nets, batch), learning)])


@contextmanager
def margins(module: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """What ln sigmoid is taken of inside."""
    found: list[Tensor] = []

    def noted(x: Tensor) -> Tensor:
        found.append(x.detach())
        return torch.nn.functional.logsigmoid(x)

    with monkeypatch.context() as patch:
        patch.setattr(module, "F", type("F", (), {"logsigmoid": staticmethod(noted)}))
        yield found


@contextmanager
def calls(nets: Networks) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """x_t and t of every call of the student inside."""
    found: list[tuple[Tensor, Tensor]] = []
    both = [nets[name] for name in ("student", "reference")]
    handles = [net.register_forward_pre_hook(lambda _, given: found.append((given[0], given[1]))) for net in both]
    yield found
    for handle in handles:
        handle.remove()


# --- the losses ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", [Pso(), Pso(steps=2), judged(), judged(policy_std=0.2)], ids=str)
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_at_the_start_the_margin_is_exactly_zero_and_the_loss_ln_2(
    method: Pso, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    nets = begin(method)
    half = torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16")
    with margins(pso, monkeypatch) as found, half:
        loss = loss_of(method, nets, pair())
    assert not any(margin.any() for margin in found) and found[0].numel() >= 64
    assert float(loss.detach()) == pytest.approx(LN2, abs=1e-6)
    learning = [p for p in nets["student"].parameters() if p.requires_grad]
    assert any(g.any() for g in torch.autograd.grad(loss, learning)), "there is a way to go"


def test_swapped_pairs_pull_the_other_way() -> None:
    swapped = {"x0": pair()["loser"], "loser": pair()["x0"]}
    one, other = (gradient(Pso(), begin(Pso()), batch) for batch in (pair(), swapped))
    assert one.norm() > 1e-3
    torch.testing.assert_close(one, -other)
    judges = (judged(), judged(reward="test_pso:leftness"))
    one, other = (gradient(method, begin(method), pair()) for method in judges)
    assert one.norm() > 1e-3
    torch.testing.assert_close(one, -other)


def formula(method: Pso, nets: Networks, batch: Batch, base: Denoiser, seed: int = 2) -> Tensor:
    """The offline loss once more, with a copy of the base for reference, sample by sample."""
    torch.manual_seed(seed)
    times = torch.tensor(nets["sampler"].times, dtype=torch.float64)
    t = times[torch.randint(len(times), (len(batch["x0"]),))]
    eps, schedule, errors = torch.randn_like(batch["x0"]), base.schedule, {}
    for who, network in (("student", nets["student"]), ("base", base)):
        for side in ("x0", "loser"):
            alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
            x_t = (alpha * batch[side] + sigma * eps).float()
            errors[who, side] = ((network(x_t, t) - batch[side]).double() / sigma).square().mean(1)
    if method.mode == "finetune":
        return errors["student", "x0"].mean()
    if method.mode == "personalise":
        gap = errors["student", "loser"] - errors["student", "x0"]
        return ((1 - method.beta * gap).clamp_min(0) + errors["student", "loser"] / 2).mean()
    better = errors["base", "x0"] - errors["base", "loser"] - errors["student", "x0"] + errors["student", "loser"]
    return (1 + (-method.beta * better).exp()).log().mean()


@pytest.mark.parametrize("mode", ["offline", "personalise", "finetune"])
@pytest.mark.parametrize("schedule", [Trigonometric(), RectifiedFlow(), EDM()], ids=lambda s: s.name)
def test_the_loss_is_the_formula(mode: Any, schedule: NoiseSchedule) -> None:
    method, teacher = Pso(mode=mode, beta=2.0), few_step(schedule=schedule)
    nets = begin(method, teacher, learned=0.1)
    expected = formula(method, nets, pair(), teacher.denoiser)
    assert float(loss_of(method, nets, pair()).detach()) == pytest.approx(float(expected.detach()), rel=1e-4)


def same_noise_and_time(module: Any) -> bool:
    """Whether policy and reference see winner and loser under one noise, each sample at one time of the sampler."""
    method, batch = module.Pso(), pair()
    nets = begin(method)
    with calls(nets) as found:
        loss_of(method, nets, batch)
    schedule, seen = nets["student"].schedule, []
    for (x_t, t), x0 in zip(found, (batch["x0"], batch["loser"]) * 2, strict=True):
        seen.append(schedule.eps_from(x0, x_t, t))
        assert t.shape == (64,) and set(t.tolist()) == set(nets["sampler"].times), "all of its times"
    times = [t for _, t in found]
    return all(torch.equal(t, times[0]) for t in times) and all(torch.allclose(e, seen[0], atol=1e-4) for e in seen)


def test_winner_and_loser_are_seen_under_the_same_noise_and_time() -> None:
    assert same_noise_and_time(pso)
    assert not same_noise_and_time(mutated(pso, NOISE, NOISE.replace("eps", "torch.randn_like(x0)")))


def test_a_reference_that_learns_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    moving, teacher = mutated(pso, REFERENCE, MOVING), few_step()
    for module, right in ((pso, True), (moving, False)):
        method = module.Pso()
        nets = begin(method, teacher, learned=0.1)
        expected = float(formula(Pso(), nets, pair(), teacher.denoiser).detach())
        assert (float(loss_of(method, nets, pair()).detach()) == pytest.approx(expected, rel=1e-4)) == right


@pytest.mark.parametrize("method", [Pso(), judged(), Pso(mode="personalise")], ids=str)
def test_the_reference_is_exactly_the_base_after_many_updates(method: Pso) -> None:
    teacher = few_step()
    nets, x_t, t = begin(method, teacher), torch.randn(100, 2), torch.rand(100)
    for _ in range(10):
        iterate(method, nets, pair(), 0.0)
    student = nets["student"]
    with torch.no_grad():
        assert not torch.equal(student(x_t, t), teacher.denoiser(x_t, t))
        assert torch.equal(nets["reference"](x_t, t), teacher.denoiser(x_t, t))


def test_losers_come_from_the_data_or_from_the_reference() -> None:
    """The reference draws them as the base is served, even when the student has moved on."""
    method, teacher = Pso(), few_step()
    nets = begin(method, teacher, learned=0.3)
    with calls(nets) as found:
        loss_of(method, nets, pair())
    assert len(found) == 4
    with calls(nets) as found:
        loss_of(method, nets, {"x0": pair()["x0"]})
    assert len(found) == 4 + 4, "four steps of the sampler"
    torch.manual_seed(2)
    drawn = Generator(teacher.denoiser, teacher.codec, teacher.info)(torch.randn(64, 2), steps=4)
    eps = nets["student"].schedule.eps_from(pair()["x0"], *found[4])
    torch.testing.assert_close(nets["student"].schedule.eps_from(drawn, *found[5]), eps, atol=1e-3, rtol=1e-3)
    with calls(nets) as found:
        loss_of(Pso(mode="finetune"), nets, pair())
    assert len(found) == 1


# --- rollouts --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("sampler", ["consistency", "ddim"])
@pytest.mark.parametrize("schedule", [Trigonometric(), EDM()], ids=lambda s: s.name)
def test_a_rollout_is_what_the_generator_draws(sampler: str, schedule: NoiseSchedule) -> None:
    teacher = few_step(sampler, schedule)
    base = Generator(teacher.denoiser, teacher.codec, teacher.info)
    noise = torch.randn(8, 2)
    torch.manual_seed(3)
    path = pso.Sampler(base, 4).rollout(teacher.denoiser, noise, None)
    torch.manual_seed(3)
    assert len(path) == 5
    torch.testing.assert_close(path[-1], base(noise, steps=4))


@pytest.mark.parametrize("j", [0, 1, 3])
def test_the_log_ratio_is_that_of_two_gaussians(j: int) -> None:
    method, teacher = judged(policy_std=0.3, clip=0.999), few_step()
    nets = begin(method, teacher, learned=0.02)
    path = nets["sampler"].rollout(nets["student"], torch.randn(64, 2), None)
    path[-1] = path[-1] + 0.3 * torch.randn(64, 2)
    t, schedule = torch.tensor(nets["sampler"].times, dtype=torch.float64), teacher.denoiser.schedule
    scale, std = (schedule.alpha(t[j + 1]), schedule.sigma(t[j + 1])) if j < 3 else (1.0, 0.3)

    def density(network: Denoiser) -> Tensor:
        normal = torch.distributions.Normal((scale * network(path[j], t[j])).double(), std)
        return normal.log_prob(path[j + 1].double()).mean(1)

    expected = (density(nets["student"]) - density(teacher.denoiser)).detach()
    assert expected.abs().max() > 1e-3
    expected = expected.clamp(math.log(1 - 0.999), math.log(1 + 0.999))
    torch.testing.assert_close(method.log_ratio(nets, path, j, None).detach().double(), expected, atol=1e-5, rtol=1e-3)


def test_the_winners_steps_become_likelier() -> None:
    method = judged()
    nets, before = begin(method), None
    for _ in range(5):
        loss = loss_of(method, nets, pair())
        assert before is None or loss < before
        before = loss.detach()
        learning = [p for p in nets["student"].parameters() if p.requires_grad]
        with torch.no_grad():
            for p, g in zip(learning, torch.autograd.grad(loss, learning), strict=True):
                p -= 1e-2 * g


def test_ties_and_clipped_and_saturated_pairs_teach_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tied = judged(reward="test_pso:indifferent")
    nets = begin(tied, learned=0.1)
    assert not gradient(tied, nets, pair()).any()
    assert float(loss_of(tied, nets, pair()).detach()) == pytest.approx(LN2)

    far, near = judged(clip=1e-6), judged()
    nets = begin(near, learned=0.3)
    assert not gradient(far, nets, pair()).any() and gradient(near, nets, pair()).any()

    nets, batch = begin(Pso(), learned=0.1), pair()
    with margins(pso, monkeypatch) as found:
        loss_of(Pso(), nets, batch)
    wrong = (found[0] < 0)[:, None]
    batch = {"x0": batch["x0"].where(~wrong, batch["loser"]), "loser": batch["loser"].where(~wrong, batch["x0"])}
    assert gradient(Pso(), nets, batch).any() and not gradient(Pso(beta=1e7), nets, batch).any()


# --- what is tuned, refused, doubted ---------------------------------------------------------------------------------
def test_it_leaves_as_it_came() -> None:
    """Sampler, times and guidance are the base's; the tuned step count is the default."""
    method, teacher = Pso(steps=2), few_step()
    made = method.generator(begin(method, teacher), teacher)
    assert made.info == replace(teacher.info, default_steps=2)
    data = open_data("shapes", size=8)
    guided = teacher_for("class-to-image", data)
    guided = replace(guided, info=replace(guided.info, guidance_scale=3.0))
    nets = begin(Pso(), guided)
    label, noise = torch.tensor([0, 5]), torch.randn(2, 3, 8, 8)
    base = Generator(guided.denoiser, guided.codec, guided.info)
    path = nets["sampler"].rollout(nets["student"], noise, {"label": label})
    torch.testing.assert_close(path[-1], base(noise, {"label": label}, steps=4), atol=1e-4, rtol=1e-4)


def test_each_pair_is_judged_by_one_of_several_rewards() -> None:
    """Two opposite rewards: about half of the pairs each, and all steps of a pair alike."""
    both = judged(reward=("test_pso:rightness", "test_pso:leftness"))
    nets, one = begin(both), judged()
    single = begin(one)
    torch.manual_seed(3)
    a, b, h = both.judged_rollouts(nets, torch.zeros(400, 2), None)
    right = (rightness(a[-1], None) - rightness(b[-1], None)).sign()
    agree = (h == right).double().mean()
    assert 0.4 < float(agree) < 0.6 and bool((h.abs() == 1).all())
    torch.manual_seed(3)
    assert torch.equal(one.judged_rollouts(single, torch.zeros(400, 2), None)[2], right)


def test_rollouts_are_reused_over_inner_epochs() -> None:
    """Three turns learn from one pair of rollouts; the student's margin over the reference grows from nothing."""
    method = judged(inner_epochs=3)
    nets, drawn = begin(method), list[tuple[Tensor, ...]]()
    rollout = nets["sampler"].rollout
    nets["sampler"].rollout = lambda *given: drawn.append(given) or rollout(*given)
    optimizer = torch.optim.SGD([p for p in nets["student"].parameters() if p.requires_grad], lr=0.1)
    losses = []
    torch.manual_seed(2)
    for player, loss in method.step(nets, pair(), 0.0):
        assert player == "student" and len(drawn) == 2
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] == pytest.approx(math.log(2)) and losses == sorted(losses, reverse=True) and len(losses) == 3


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"steps": 0}, "pso.steps"),
        ({"inner_epochs": 0}, "pso.inner_epochs"),
        ({"mode": "online", "reward": ()}, "pso.reward"),
        ({"beta": 0.0}, "pso.beta"),
        ({"clip": 1.0}, "pso.clip"),
        ({"clip": 0.0}, "pso.clip"),
        ({"policy_std": -0.1}, "pso.policy_std"),
        ({"mode": "online"}, "pso.reward"),
        ({"reward": "test_pso:rightness"}, "pso.reward"),
        ({"policy_std": 0.1}, "pso.policy_std"),
        ({"mode": "online", "reward": "test_pso:rightness", "steps": 1}, "pso.steps"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], field: str) -> None:
    with pytest.raises(BadInput) as refused:
        Pso(**options)
    assert refused.value.field == field


def test_steps_without_noise_have_no_likelihood() -> None:
    with pytest.raises(BadInput, match=r'no likelihood; mode = "offline"; or policy_std above 0'):
        judged(steps=1)
    with pytest.raises(BadInput, match=r'sampled by ddim.*no likelihood; mode = "offline"; or policy_std above 0'):
        judged().networks(few_step("ddim"))
    for method, sampler in ((judged(steps=1, policy_std=0.1), "consistency"), (judged(policy_std=0.1), "ddim")):
        nets = begin(method, few_step(sampler))
        assert gradient(method, nets, pair()).any()


def test_a_step_count_that_the_base_was_not_published_with_is_refused() -> None:
    with pytest.raises(BadInput, match="steps: got 3; allowed: 1, 2, 4"):
        Pso(steps=3).networks(few_step())


@pytest.mark.parametrize(
    ("method", "doubt"),
    [
        (judged(clip=0.1), r"2 beta ln\(1 \+ clip\) = 0\.95, below 3\.8: samples may leave the data"),
        (judged(beta=50.0, clip=0.1), "beta = 50, clip = 0.1 hardly learns in two dimensions"),
        (Pso(steps=1), "steps = 1 is experimental"),
        (judged(steps=1, policy_std=0.1), "steps = 1 is experimental"),
        (judged(), None),
        (Pso(), None),
        (Pso(mode="finetune", steps=1), None),
    ],
    ids=str,
)
def test_settings_that_were_seen_to_fail_are_warned_of(method: Pso, doubt: str | None) -> None:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        method.networks(few_step())
    assert len([w for w in found if "pso" in str(w.message)]) == (doubt is not None)
    if doubt:
        with pytest.warns(UserWarning, match=doubt):
            method.networks(few_step())


def test_preferred_pictures_reach_the_loss(tmp_path: Path) -> None:
    """From a folder of pairs: encoded like x0, turned alike, and no part of the condition."""
    data = open_data("preferences", path=write_pairs(tmp_path / "liked"), size=8)
    shapes = open_data("shapes", size=8)
    teacher = teacher_for("class-to-image", shapes)
    batch = teacher.encode_batch(data.draw(4, np.random.default_rng(0)), "cpu")
    assert set(batch) == {"x0", "loser", "label"} and batch["loser"].shape == batch["x0"].shape
    method = Pso()
    nets = begin(method, teacher)
    with calls(nets) as found:
        loss_of(method, nets, batch)
    assert len(found) == 4, "no loser is drawn"


# --- proofs on known targets, and broken copies that must not pass ---------------------------------------------------
@pytest.mark.slow
@pytest.mark.proof
@pytest.mark.parametrize("name", ["opposite modes", "one mode"])  # the report has a third
def test_pairs_move_the_four_step_samples_to_the_target(name: str) -> None:
    target = modes(TARGETS[name])
    before, after = (held_against(target, g) for g in (untuned(0), tuned(PAIRED["pso, beta 2"], 0, target)))
    assert all(share < 1 for share in strain(before, after).values()), (before, after)


@pytest.mark.slow
@pytest.mark.proof
@pytest.mark.parametrize("wrong", WRONG)
def test_a_broken_copy_does_not_get_there(wrong: str) -> None:
    target = modes(TARGETS["opposite modes"])
    broken = mutated(pso, *WRONG[wrong]).Pso(beta=2.0)
    before, after = (held_against(target, g) for g in (untuned(0), tuned(broken, 0, target)))
    assert any(share > 1 for share in strain(before, after).values()), (before, after)


@pytest.mark.slow
@pytest.mark.proof
def test_a_reward_is_climbed_near_the_data() -> None:
    before, after = (rewarded(g, 4) for g in (untuned(0), tuned(REWARDED["online, beta 5, eps 0.5"], 0)))
    assert all(share < 1 for share in strain(before, after).values()), (before, after)
