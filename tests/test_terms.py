"""Every term of every method's loss against its paper's formula, with weights other than 1 and networks of one line.

The networks are affine, so a loss is a short sum. What a method drew is read off its own calls: a call at x_t is one
of x0 if (x_t - alpha x0) / sigma is unit noise. So these tests hold however draws are ordered, and fail when
another sample, time, noise, sign, weight or player is used. `tests/proofs/mutate.py` changes one line at a time and
asks whether they do.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, softplus

from distillers.methods.adversarial_consistency import AdversarialConsistency
from distillers.methods.boot import Boot
from distillers.methods.consistency import Consistency
from distillers.methods.diffusion import Diffusion, without_condition
from distillers.methods.disback import DisBack, Path
from distillers.methods.dmd2 import Dmd2, Pairs
from distillers.methods.hyper_sd import HyperSD
from distillers.methods.multi_student import MultiStudent
from distillers.methods.pso import Pso, Sampler
from distillers.methods.refine import Refine
from distillers.methods.scm import ContinuousConsistency, TimeWeight, derivative_along
from distillers.models.codec import PixelUnshuffle
from distillers.models.denoiser import Denoiser
from distillers.models.schedule import EDM, Trigonometric, VariancePreserving
from distillers.training.distiller import Networks
from distillers.training.losses import (
    denoising,
    diffuse,
    discriminator_loss,
    focal_frequency,
    log_ratio_at,
    lognormal_times,
    neighbours,
    pseudo_huber,
    ratio_weight,
    sample_student,
    sampling_times,
    score_identity,
    teacher_end,
)

VP = VariancePreserving.from_betas()
N, D = 2400, 2  # samples of a batch, and their elements


# --- networks of one line, and what they were asked ------------------------------------------------------------------
def answer(network: nn.Module, x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
    """gain x + shift + t / 2000 + label / 4: another input, time or class gives another answer."""
    extra = t / 2000 if label is None else t / 2000 + label / 4
    return network.gain * x + network.shift + extra.to(x).reshape(-1, *[1] * (x.ndim - 1))


class Affine(nn.Module):
    """A network that gives that answer; `hidden`, what heads read, is the answer itself."""

    def __init__(self, gain: float, shift: float) -> None:
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.tensor(gain)), nn.Parameter(torch.tensor(shift))
        self.hidden = nn.Identity()

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        return self.hidden(answer(self, x, time, label))


class Head(nn.Module):
    """A logit of activations: scale times their mean plus an offset."""

    def __init__(self, scale: float = 0.8, offset: float = 0.3) -> None:
        super().__init__()
        self.scale, self.offset = nn.Parameter(torch.tensor(scale)), nn.Parameter(torch.tensor(offset))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return self.scale * features[0].flatten(1).mean(1) + self.offset


def affine(gain: float, shift: float, schedule: Any = VP) -> Denoiser:
    return Denoiser(Affine(gain, shift), schedule, "x0")


@dataclass
class Call:
    """One call of a network: which, with what, and whether its answer can carry a gradient."""

    who: str
    x_t: Tensor
    t: Tensor  # float64 (B,)
    label: Tensor | None = None
    gradient: bool = False


@dataclass
class Turn:
    """What a method yielded, and the calls since its last yield."""

    player: str
    loss: Tensor
    calls: list[Call]

    def of(self, who: str) -> list[Call]:
        return [call for call in self.calls if call.who == who]


def play(method: Any, nets: Any, batch: dict[str, Tensor], progress: float = 0.9, keep: bool = False) -> list[Turn]:
    """One iteration in which nobody learns; a target network that followed is put back unless that is to be kept."""
    calls: list[Call] = []
    target = copy.deepcopy(nets["target"].state_dict()) if "target" in nets else {}

    def watch(who: str) -> Any:
        def hook(_: nn.Module, given: Any, named: Any) -> None:
            x, time = given[:2]
            if torch._C._functorch.maybe_get_level(x) > 0:
                return  # inside a derivative
            gradient = torch.is_grad_enabled() and (x.requires_grad or nets[who].network.gain.requires_grad)
            calls.append(Call(who, x.detach().clone(), time.detach().double(), named.get("label"), gradient))

        return hook

    denoisers = [(who, net) for who, net in nets.items() if isinstance(net, Denoiser)]
    handles = [net.network.register_forward_pre_hook(watch(who), with_kwargs=True) for who, net in denoisers]
    turns = []
    torch.manual_seed(0)
    try:
        for player, loss in method.step(nets, batch, progress):
            turns.append(Turn(player, loss, list(calls)))
            for call in calls if "label" in batch and "pairs" not in nets else ():
                assert call.label is not None and torch.equal(call.label, torch.arange(len(call.x_t)) % 4), "its class"
            calls.clear()
            others = [p for who, net in nets.items() if who != player for p in net.parameters() if p.requires_grad]
            left = torch.autograd.grad(loss, others, retain_graph=True, allow_unused=True) if others else ()
            assert all(g is None for g in left), "a turn reaches its own player only"
    finally:
        for handle in handles:
            handle.remove()
    if target and not keep:
        nets["target"].load_state_dict(target)
    return turns


def drawn(net: Denoiser, call: Call) -> Tensor:
    """What a network answers there, with its parameters' gradients."""
    return answer(net.network, call.x_t, call.t, call.label)


def column(values: Tensor) -> Tensor:
    return values.double()[:, None]


def noise_in(call: Call, x0: Tensor, schedule: Any = VP) -> Tensor:
    """(x_t - alpha x0) / sigma."""
    return (call.x_t - column(schedule.alpha(call.t)) * x0) / column(schedule.sigma(call.t))


def is_noise(eps: Tensor, beside: Tensor) -> bool:
    """Whether this is unit Gaussian noise, independent of what it was added to; by moments, at five standard errors."""
    error, eps, beside = 5 / math.sqrt(eps.numel()), eps.flatten(), (beside - beside.mean(0)).flatten()
    moments = [eps.mean(), eps.square().mean() - 1, (eps * beside / beside.std()).mean(), eps.pow(4).mean() / 3 - 1]
    return all(abs(float(m)) < error * scale for m, scale in zip(moments, (1, 1.5, 1.2, 4), strict=True))


def shows(call: Call, x0: Tensor, schedule: Any = VP) -> bool:
    """Whether the call is at a diffused x0."""
    return is_noise(noise_in(call, x0.double(), schedule), x0.double())


def shows_exactly(call: Call, x0: Tensor) -> bool:
    """Whether the call is at these very samples, diffused, and not at others of their distribution."""
    eps = noise_in(call, x0.double())
    late = call.t < 100  # where there is little noise, that of other samples is far from unit size
    return abs(float(eps[late].square().mean()) - 1) < 0.3


def again(eps: Tensor, x0: Tensor, t: Tensor, schedule: Any = VP) -> Tensor:
    """x_t of the same noise and another, or a live, x0."""
    return (column(schedule.alpha(t)) * x0 + column(schedule.sigma(t)) * eps).float()


def data(n: int = N) -> dict[str, Tensor]:
    """Far from what any network here answers: mean 5, std 0.5; four classes in turn."""
    x0 = 5 + 0.5 * torch.randn(n, D, generator=torch.Generator().manual_seed(7))
    return {"x0": x0, "label": torch.arange(n) % 4}


DRAWS = {  # batches of an iteration, by progress: one for the student and one for each turn of a critic
    Dmd2(critic_turns=3): {0.0: 4, 0.9: 4},
    DisBack(critic_turns=3, record=0.1): {0.0: 1, 0.09: 1, 0.1: 4, 0.9: 4},
    HyperSD(segments=(2, 1), adversarial_weights=(0, 0), critic_turns=3, score_weight=1.0): {0.0: 1, 0.49: 1, 0.5: 4},
    HyperSD(critic_turns=3): {0.0: 1, 0.9: 1},
    Consistency(): {0.0: 1, 0.9: 1},
}


@pytest.mark.parametrize("method", DRAWS, ids=lambda method: type(method).__name__)
def test_every_turn_has_its_own_data(method: Any) -> None:
    assert {progress: method.draws(progress) for progress in DRAWS[method]} == DRAWS[method]


def data_for(method: Any, progress: float = 0.9) -> dict[str, Tensor]:
    """N samples for each draw of an iteration."""
    return data(N * method.draws(progress))


def weight(t: Tensor, cap: float = 20.0) -> Tensor:
    """min(SNR, cap) + 1."""
    return (VP.alpha(t) ** 2 / VP.sigma(t) ** 2).clamp(max=cap) + 1


def mse(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().mean(1)


def huber(a: Tensor, b: Tensor) -> Tensor:
    """sqrt(||a - b||^2 + c^2) - c, c = 0.00054 sqrt(D)."""
    c = 0.00054 * math.sqrt(D)
    return ((a - b).square().sum(1) + c * c).sqrt() - c


def same(turn: Turn, expected: Tensor, net: nn.Module, player: str = "student") -> None:
    """The turn is this player's; its loss and its gradient are those of `expected`."""
    assert turn.player == player
    torch.testing.assert_close(turn.loss.double(), expected.double(), atol=1e-6, rtol=2e-4)
    learning = [p for p in net.parameters() if p.requires_grad]
    ours, by_hand = (
        torch.autograd.grad(loss, learning, retain_graph=True, allow_unused=True, materialize_grads=True)
        for loss in (turn.loss, expected)
    )
    for one, other in zip(ours, by_hand, strict=True):
        torch.testing.assert_close(one.double(), other.double(), atol=2e-5, rtol=2e-3)
    assert any(float(g.abs().max()) > 1e-4 for g in by_hand), "a gradient that could be missing"


# --- what methods share ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("cap", [None, 3.0])
def test_denoising_weighs_by_the_capped_signal_to_noise_ratio_plus_one(cap: float | None) -> None:
    """Times from snr 10,000 to 0.00004: many above the cap, many below."""
    net, x0 = affine(0.6, 0.2), torch.randn(200, D)
    t = torch.linspace(0, 999, 200).double()
    x_t = VP.add_noise(x0, torch.randn_like(x0), t)
    call = Call("", x_t, t, torch.arange(200) % 3)
    ours = denoising(net, x_t, t, x0, {"label": call.label}, *([] if cap is None else [cap]))
    by_hand = (weight(t, cap or 20.0) * mse(drawn(net, call), x0).double()).mean()
    torch.testing.assert_close(ours.double(), by_hand, rtol=1e-5, atol=0)


@pytest.mark.parametrize("c", [None, 0.5])
def test_the_pseudo_huber_distance_is_flat_at_zero(c: float | None) -> None:
    """sqrt(||a - b||^2 + c^2) - c, c = 0.00054 sqrt(D) unless it is given."""
    a, size = torch.zeros(4, 3), c or 0.00054 * math.sqrt(3)
    b = torch.tensor([0.0, 0.1, 1.0, 30.0])[:, None] * torch.tensor([[1.0, -2.0, 2.0]]) * size
    expected = [math.sqrt(9 * x * x + 1) * size - size for x in (0.0, 0.1, 1.0, 30.0)]
    assert pseudo_huber(a, b, c).tolist() == pytest.approx(expected, rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("schedule", [VP, Trigonometric()], ids=lambda s: s.name)
def test_samples_are_diffused_to_all_times_but_the_outer_two_hundredths(schedule: Any) -> None:
    """t is uniform from 2 to 98 % of the range, high noise and low alike."""
    torch.manual_seed(0)
    x0 = 3 + 0.5 * torch.randn(20_000, D)
    t, x_t = diffuse(schedule, x0)
    share = (t - schedule.t_min) / (schedule.t_max - schedule.t_min)
    assert 0.02 <= float(share.min()) < 0.021 and 0.979 < float(share.max()) <= 0.98
    expected = torch.linspace(0.02, 0.98, 11).double()
    torch.testing.assert_close(share.quantile(torch.linspace(0, 1, 11).double()), expected, atol=0.015, rtol=0)
    call = Call("", x_t, t)
    assert shows(call, x0, schedule) and not shows(call, x0 + 0.2, schedule)


def test_neighbours_are_next_to_each_other_and_every_pair_is_drawn() -> None:
    torch.manual_seed(0)
    t, s = neighbours(VP, 7, 6000, torch.device("cpu"))
    grid = torch.linspace(0, 999, 7).double()
    n = torch.searchsorted(grid, t - 1e-6)
    torch.testing.assert_close(grid[n], t), torch.testing.assert_close(grid[n - 1], s)
    counts = n.bincount(minlength=7)
    assert counts[0] == 0 and bool(((counts[1:] - 1000).abs() < 150).all())


@pytest.mark.parametrize("steps", [(4,), (1, 3)])
def test_each_call_of_the_sampler_is_trained_as_often(steps: tuple[int, ...]) -> None:
    """k uniform among the step counts, the trained call uniform among its k; the calls before it carry no gradient."""
    net, found = affine(0.9, 0.4), dict[tuple[int, int], int]()
    seen: list[Call] = []

    def note(_: nn.Module, given: Any, named: Any) -> None:
        seen.append(Call("", given[0].detach(), given[1].double(), named["label"], torch.is_grad_enabled()))

    net.network.register_forward_pre_hook(note, with_kwargs=True)
    plan = {k: sampling_times(VP, k) for k in steps}
    for seed in range(240):
        torch.manual_seed(seed)
        seen.clear()
        noise = torch.randn(500 if seed < 20 else 2, D)
        x = sample_student(net, noise, {"label": torch.arange(len(noise)) % 3}, steps)
        assert [call.gradient for call in seen] == [False] * (len(seen) - 1) + [True] and x.requires_grad
        assert torch.equal(seen[0].x_t, noise)
        torch.testing.assert_close(x, drawn(net, seen[-1]))
        times = [float(call.t[0]) for call in seen]
        (k,) = {k for k in steps if plan[k][: len(times)] == times and (len(times) > 1 or k == max(steps))} or {0}
        found[k, len(times)] = found.get((k, len(times)), 0) + 1
        for before, after in pairwise(seen if seed < 20 else []):
            assert shows(after, drawn(net, before).detach()), "re-noised with fresh noise"
    whole = 240 / len(steps)
    assert set(found) == {(max(steps), i + 1) for i in range(max(steps))}
    for (k, calls), count in found.items():
        extra = whole if calls == 1 and len(steps) == 2 else 0  # one-step draws look like the first call of more
        assert abs(count - whole / k - extra) < 35


def test_the_discriminator_wants_high_logits_of_real_and_low_ones_of_fake() -> None:
    fake, real = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 3.0])
    expected = (math.log1p(math.exp(2)) + math.log1p(math.exp(-1))) / 2
    expected += (math.log1p(math.exp(-0.5)) + math.log1p(math.exp(-3))) / 2
    assert float(discriminator_loss(fake, real)) == pytest.approx(expected)


def test_density_ratios_are_bounded() -> None:
    """One certain logit does not take the whole batch: r is cut at e^10 and e^-10."""
    weight = ratio_weight(torch.tensor([50.0, 10.0, -50.0, -10.0]), torch.zeros(4), "forward-kl")
    torch.testing.assert_close(weight[[0, 2]], weight[[1, 3]], rtol=1e-5, atol=0)
    assert float(weight[1] / weight[3]) == pytest.approx(math.exp(20), rel=1e-4)
    assert float(weight.mean()) == pytest.approx(1)


WEIGHTS: dict[Any, Any] = {  # h(r) = f''(r) r^2
    "reverse-kl": lambda r: 1.0,
    "forward-kl": lambda r: r,
    "jensen-shannon": lambda r: r / (1 + r),
    "jeffreys": lambda r: 1 + r,
    "squared-hellinger": lambda r: math.sqrt(r),
    "softened-reverse-kl": lambda r: 1 / (1 + r),
}


@pytest.mark.parametrize("divergence", WEIGHTS)
@pytest.mark.parametrize(("n", "bins"), [(20, 2), (7, 1), (8 * 9 + 7, 9), (80, 10), (200, 10)])
def test_the_weights_of_divergences_have_mean_one_among_similar_times(divergence: Any, n: int, bins: int) -> None:
    """Ten bins of time, or as many as leave eight samples to each."""
    rng = torch.Generator().manual_seed(n)
    logits, t = 2 * torch.randn(n, generator=rng), torch.rand(n, generator=rng)
    h = torch.tensor([WEIGHTS[divergence](math.exp(x)) for x in logits.tolist()])
    expected, order = torch.zeros(n), sorted(range(n), key=lambda i: float(t[i]))
    sizes = [n // bins + (i < n % bins) for i in range(bins)]
    for i in range(bins):
        similar = order[sum(sizes[:i]) : sum(sizes[: i + 1])]
        expected[similar] = h[similar] / h[similar].mean()
    torch.testing.assert_close(ratio_weight(logits, t, divergence), expected)


# --- consistency -----------------------------------------------------------------------------------------------------
def skip(t: Tensor) -> Tensor:
    """c_skip of the boundary condition, (B, 1): m^2 / ((r - m)^2 + m^2) with r = sigma/alpha and m that at t_min."""
    ratio, least = VP.noise_ratio(t), VP.noise_ratio(torch.tensor(0.0))
    return column(least**2 / ((ratio - least) ** 2 + least**2)).float()


def f_of(net: Denoiser, call: Call) -> Tensor:
    """The consistency function of an affine network."""
    return skip(call.t) * call.x_t + (1 - skip(call.t)) * drawn(net, call)


def ddim(call: Call, s: Tensor, net: Denoiser) -> Tensor:
    """alpha_s x0hat + sigma_s epshat, the step of the network's own estimates from t to s."""
    x0 = drawn(net, call)
    eps = (call.x_t - column(VP.alpha(call.t)) * x0) / column(VP.sigma(call.t))
    return again(eps, x0, s)


def heun(call: Call, s: Tensor, net: Denoiser) -> Tensor:
    """In u = x/alpha, r = sigma/alpha: du/dr = (u - x0)/r, averaged over both ends."""
    x_t, t, x_s = call.x_t, call.t, ddim(call, s, net)
    r_t, r_s, a_t, a_s = (column(v) for v in (VP.noise_ratio(t), VP.noise_ratio(s), VP.alpha(t), VP.alpha(s)))
    slopes = (x_t / a_t - drawn(net, call)) / r_t + (x_s / a_s - drawn(net, replace(call, x_t=x_s, t=s))) / r_s
    return (a_s * (x_t / a_t + (r_s - r_t) * slopes / 2)).float()


def consistency_nets(**more: nn.Module) -> Networks:
    nets = {"student": affine(0.7, 0.3), "target": affine(0.5, -0.2), "teacher": affine(0.4, 0.6)}
    nets["target"].requires_grad_(False), nets["teacher"].requires_grad_(False)
    return Networks({**nets, **more})


@pytest.mark.parametrize("distance", ["l2", "pseudo-huber"])
@pytest.mark.parametrize("solver", ["ddim", "heun"])
@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_consistency_by_hand(distance: Any, solver: Any, decay: float) -> None:
    """Student at x_t, target network (or the student) at the teacher's step from it, one grid point below."""
    nets, batch, points = consistency_nets(), data(), 9
    method = Consistency(points=points, solver=solver, distance=distance, target_decay=decay, anchored=0.0)
    (turn,) = play(method, nets, batch)
    at, below = (turn.of("student")[-1], turn.of("target")[0] if decay else turn.of("student")[0])
    assert shows(at, batch["x0"]) and at.gradient and not below.gradient
    torch.testing.assert_close(below.t, at.t - 999 / (points - 1), atol=2e-3, rtol=0)
    x_s = (heun if solver == "heun" else ddim)(at, below.t, nets["teacher"])
    torch.testing.assert_close(below.x_t, x_s, atol=2e-3, rtol=2e-3)
    d = mse if distance == "l2" else huber
    y = f_of(nets["target" if decay else "student"], below).detach()
    same(turn, d(f_of(nets["student"], at), y).mean(), nets["student"])


def test_a_guidance_scale_for_each_sample_reaches_teacher_student_and_target() -> None:
    """w ~ U[low, high], the same for all three."""
    seen: dict[str, Tensor] = {}

    class Told(nn.Module):
        def __init__(self, who: str) -> None:
            super().__init__()
            self.who, self.schedule, self.gain = who, VP, nn.Parameter(torch.ones(()))

        def forward(self, x_t: Tensor, t: Tensor, cond: Any = None) -> Tensor:
            seen[self.who] = cond["guidance"]
            assert "label" in cond, "beside the other conditions"
            return self.gain * x_t

    nets: Any = nn.ModuleDict({who: Told(who) for who in ("student", "target", "teacher")})
    torch.manual_seed(0)
    method = Consistency(guidance_range=(2.0, 5.0), guidance_scale=3.0, anchored=0.0)
    next(method.step(nets, data(), 0.5))
    w = seen["student"]
    assert torch.equal(w, seen["teacher"]) and torch.equal(w, seen["target"])
    assert 2 <= float(w.min()) < 2.02 and 4.98 < float(w.max()) <= 5 and float(w.mean()) == pytest.approx(3.5, abs=0.08)


def test_the_teachers_end_is_at_the_scale_of_the_least_time() -> None:
    """One midpoint step in u = x/alpha, r = sigma/alpha, from 1.2 down to t_min = 0.4, where alpha is 0.92."""
    schedule = Trigonometric(t_min=0.4)
    teacher, x_t, t = affine(0.4, 0.6, schedule), torch.randn(20, D), torch.full((20,), 1.2).double()
    r, r_end = math.tan(1.2), math.tan(0.4)
    middle = math.atan((r + r_end) / 2)
    with torch.no_grad():
        ends = teacher_end(teacher, x_t, t, None)
        x0 = teacher(x_t, t)
        x_middle = math.cos(middle) * x0 + math.sin(middle) * (x_t - math.cos(1.2) * x0) / math.sin(1.2)
        slope = (x_middle / math.cos(middle) - teacher(x_middle, torch.full((20,), middle).double())) / math.tan(middle)
    expected = math.cos(0.4) * (x_t / math.cos(1.2) - (r - r_end) * slope)
    torch.testing.assert_close(ends, expected, atol=1e-5, rtol=1e-4)


def test_anchored_times_begin_at_the_least_time() -> None:
    schedule = Trigonometric(t_min=0.2)
    nets = Networks({who: affine(0.5, 0.1, schedule) for who in ("student", "target", "teacher")})
    nets["target"].requires_grad_(False), nets["teacher"].requires_grad_(False)
    (turn,) = play(Consistency(points=9, anchored=0.5), nets, data(1000))
    low, highest = turn.of("student")[0].t[:500], math.atan(0.44)
    assert 0.2 <= float(low.min()) < 0.21 and highest - 0.01 < float(low.max()) <= highest + 1e-6


def test_what_has_little_noise_is_anchored_by_hand() -> None:
    """The first third, at sigma/alpha up to 0.44: the target is the teacher's end, by one midpoint step."""
    nets, batch, k = consistency_nets(), data(), N // 3
    (turn,) = play(Consistency(points=9, solver="ddim", anchored=1 / 3 + 1e-6, distance="l2"), nets, batch)
    (at,), (below,) = turn.of("student"), turn.of("target")
    first, middle = (call for call in turn.of("teacher") if len(call.t) == k)
    (over,) = (call for call in turn.of("teacher") if len(call.t) == N - k)
    assert shows(at, batch["x0"]) and torch.equal(over.x_t, at.x_t[k:]) and torch.equal(first.x_t, at.x_t[:k])
    torch.testing.assert_close(below.x_t, ddim(over, below.t, nets["teacher"]), atol=2e-3, rtol=2e-3)
    low, highest = first.t, float(VP.time_at_ratio(torch.tensor(0.44)))
    assert float(low.max()) < highest + 0.1 and float(low.median()) == pytest.approx(highest / 2, rel=0.1)
    assert float(at.t[k:].max()) == 999
    r, r_end = VP.noise_ratio(low), VP.noise_ratio(torch.tensor(0.0))
    torch.testing.assert_close(VP.noise_ratio(middle.t), (r + r_end) / 2, atol=1e-6, rtol=2e-4)
    torch.testing.assert_close(middle.x_t, ddim(first, middle.t, nets["teacher"]), atol=1e-4, rtol=1e-4)
    u, u_middle = first.x_t / column(VP.alpha(low)), middle.x_t / column(VP.alpha(middle.t))
    slope = (u_middle - drawn(nets["teacher"], middle)) / column(VP.noise_ratio(middle.t))
    ends = column(VP.alpha(torch.zeros(1))) * (u - column(r - r_end) * slope)
    y = torch.cat([ends.float(), f_of(nets["target"], below)]).detach()
    same(turn, mse(f_of(nets["student"], at), y).mean(), nets["student"])


@pytest.mark.parametrize("decay", [0.0, 0.9])
@pytest.mark.parametrize("distance", ["l2", "pseudo-huber"])
def test_tuning_by_hand(distance: Any, decay: float) -> None:
    """Both points share the noise; each sample is weighed by 1 / (t - r), in sigma/alpha (Geng et al. 2024)."""
    nets, batch = consistency_nets(), data()
    method = Consistency(source="data", distance=distance, target_decay=decay, ratio_base=2.0, stages=8)
    (turn,) = play(method, nets, batch, progress=0.4)  # fourth stage: r = t (1 - 2^-4 (1 + 8 sigmoid(-t)))
    at, below = turn.of("student")[-1], turn.of("target")[0] if decay else turn.of("student")[0]
    assert not turn.of("teacher") and not below.gradient
    ratio, lower = VP.noise_ratio(at.t), VP.noise_ratio(below.t)
    expected = (ratio * (1 - 2.0**-4 * (1 + 8 * torch.sigmoid(-ratio)))).clamp_min(VP.noise_ratio(torch.tensor(0.0)))
    torch.testing.assert_close(lower, expected, atol=1e-6, rtol=2e-4)
    assert shows(at, batch["x0"])
    eps = noise_in(at, batch["x0"].double())
    torch.testing.assert_close(below.x_t, again(eps, batch["x0"], below.t), atol=2e-3, rtol=1e-3)
    d = mse if distance == "l2" else huber
    y = f_of(nets["target" if decay else "student"], below).detach()
    each = d(f_of(nets["student"], at), y).double() / (ratio - lower)
    same(turn, each.mean(), nets["student"])


@pytest.mark.parametrize("last", [0.0, 0.3])
def test_lognormal_times_and_a_share_of_the_last_time(last: float) -> None:
    """ln(sigma/alpha) has the mean and the std that are asked for; a share is t_max."""
    torch.manual_seed(0)
    t = lognormal_times(VP, 20_000, 0.5, 0.7, last, torch.device("cpu"))
    assert float((t == 999).double().mean()) == pytest.approx(last, abs=0.015)
    ratio = VP.noise_ratio(t[t < 999]).log()
    assert float(ratio.mean()) == pytest.approx(0.5, abs=0.03)
    assert float(ratio.std()) == pytest.approx(0.7, abs=0.03)


@pytest.mark.parametrize("share", [0.0, 0.5, 2 / 3, 1.0])
def test_a_share_of_the_range_of_noise_levels(share: float) -> None:
    low, high = VP.noise_ratio(torch.tensor([0.0, 999.0]).double()).log().tolist()
    assert log_ratio_at(VP, share) == pytest.approx(low + share * (high - low))


@pytest.mark.parametrize(
    ("method", "share"),
    [(Consistency(source="data", last_time_share=0.0), 2 / 3), (ContinuousConsistency(last_time_share=0.0), 1 / 2)],
)
def test_times_without_a_mean_are_about_a_share_of_the_range(method: Any, share: float) -> None:
    """Two thirds of it for tuning, its middle for continuous time; std 2."""
    nets = consistency_nets(weight=TimeWeight(8))
    turn = play(method, nets, data())[0]
    ratio = VP.noise_ratio(turn.of("student")[-1].t).log()
    assert float(ratio.median()) == pytest.approx(log_ratio_at(VP, share), abs=0.25)


def test_tuning_begins_at_twice_the_least_level() -> None:
    low = Consistency(source="data", log_mean=-5.0, log_std=2.0, ratio_base=1.0001, stages=1, last_time_share=0.25)
    torch.manual_seed(0)
    t, s = low.tuning_times(VP, 4000, 0.0, torch.device("cpu"))
    ends = VP.noise_ratio(torch.tensor([0.0, 999.0]))
    assert float(VP.noise_ratio(t).min()) == pytest.approx(2 * float(ends[0]), rel=1e-6) and bool((s < t).all())
    assert float((t > 998.9).double().mean()) == pytest.approx(0.25, abs=0.04)


@pytest.mark.parametrize(
    ("first", "points", "grids"), [(0, 40, [40] * 5), (5, 40, [5, 5, 10, 20, 40]), (10, 40, [10, 10, 20, 40, 40])]
)
def test_the_grid_doubles_at_even_intervals(first: int, points: int, grids: list[int]) -> None:
    method = Consistency(points=points, first_points=first)
    assert [method.grid_points(p) for p in (0.0, 0.24, 0.36, 0.7, 1.0)] == grids
    assert Consistency(points=50, first_points=10).grid_points(0.99) == 50, "no more than asked for"


def test_the_target_network_follows_by_its_decay() -> None:
    nets = consistency_nets()
    for method in (
        Consistency(target_decay=0.75),
        HyperSD(segments=(1,), adversarial_weights=(0.0,), target_decay=0.75),
        AdversarialConsistency(adversarial_weight=0.0, target_decay=0.75),
    ):
        with torch.no_grad():
            nets["target"].network.gain.fill_(0.5)
        play(method, nets, data(8), keep=True)
        assert float(nets["target"].network.gain) == pytest.approx(0.75 * 0.5 + 0.25 * 0.7)


# --- continuous time -------------------------------------------------------------------------------------------------
def exactly(net: Denoiser, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
    """The consistency function of an affine network in double precision."""
    ratio, least = VP.noise_ratio(t), VP.noise_ratio(torch.tensor(0.0))
    share = column(least**2 / ((ratio - least) ** 2 + least**2))
    own = net.network.gain.item() * x + net.network.shift.item() + column(t / 2000 + label / 4)
    return share * x + (1 - share) * own


@pytest.mark.parametrize("source", ["teacher", "data"])
@pytest.mark.parametrize("tangent", ["normalised", "clipped"])
@pytest.mark.parametrize("tangent_step", [0.0, 2e-3])
@pytest.mark.parametrize(("progress", "faded"), [(0.15, 0.3), (0.8, 1.0)])
def test_continuous_consistency_by_hand(
    source: Any, tangent: Any, tangent_step: float, progress: float, faded: float
) -> None:
    """phi = atan(sigma / (0.7 alpha)); f moves by sin(phi) times the tangent, in units of 0.7; w(t) is learnt."""
    torch.manual_seed(5)
    uncertainty, sigma_d, batch = TimeWeight(8), 0.7, data()
    nn.init.normal_(uncertainty.linear.weight, std=0.3), nn.init.constant_(uncertainty.linear.bias, 0.2)
    nets = consistency_nets(weight=uncertainty)
    method = ContinuousConsistency(
        source=source, tangent=tangent, tangent_step=tangent_step, tangent_warmup=0.5, tangent_constant=0.2,
        sigma_data=sigma_d, log_mean=0.0, log_std=0.8, weight_cap=3.0, last_time_share=0.0,
    )  # fmt: skip
    turns = play(method, nets, batch, progress)
    assert [turn.player for turn in turns] == ["weight", "student"]
    at = turns[0].of("student")[-1]
    assert at.gradient and shows(at, batch["x0"])
    assert [torch.equal(call.x_t, at.x_t) for call in turns[0].of("teacher")] == [True] * (source == "teacher")
    x0 = (drawn(nets["teacher"], at) if source == "teacher" else batch["x0"]).double()
    ratio, x_t = VP.noise_ratio(at.t), at.x_t.double()
    phi, eps = torch.atan(ratio / sigma_d), (x_t - column(VP.alpha(at.t)) * x0) / column(VP.sigma(at.t))

    def f_at(angle: Tensor) -> Tensor:  # along the trajectory, whose clean end and noise stay
        s = VP.time_at_ratio(sigma_d * angle.tan())
        return exactly(nets["student"], column(VP.alpha(s)) * x0 + column(VP.sigma(s)) * eps, s, batch["label"])

    h = tangent_step or 1e-6
    df = (f_at(phi) - f_at(phi - h)) / h if tangent_step else (f_at(phi + h) - f_at(phi - h)) / (2 * h)
    sin, cos = column(phi.sin()), column(phi.cos())
    g = ((1 - faded) * cos**2 * (f_at(phi) - x0) / sin + faded * cos * df) / sigma_d
    g = g / ((g**2).mean(1, keepdim=True).sqrt() + 0.2) if tangent == "normalised" else g.clamp(-1, 1)
    f = f_of(nets["student"], at).double() / sigma_d
    error = (1 / sin[:, 0] ** 2).clamp(max=3) * mse(f, (f - sin * g).detach())
    w = uncertainty(ratio)
    loose = 0.02 if tangent_step else 2e-3  # a short difference of float32 answers
    for turn, expected, net in (
        (turns[0], (w.exp() * error.detach() - w).mean(), uncertainty),
        (turns[1], (w.detach().exp() * error).mean(), nets["student"]),
    ):
        learning = [p for p in net.parameters() if p.requires_grad]
        torch.testing.assert_close(turn.loss.double(), expected, atol=1e-5, rtol=loose)
        both = [torch.autograd.grad(loss, learning, retain_graph=True) for loss in (turn.loss, expected)]
        for ours, by_hand in zip(*both, strict=True):
            torch.testing.assert_close(ours.double(), by_hand.double(), atol=loose, rtol=loose)


@pytest.mark.parametrize("tangent_step", [0.0, 0.05])
def test_teacher_and_tangent_are_in_one_precision(tangent_step: float) -> None:
    """Under autocast only the call that is trained is in half precision."""
    nets = consistency_nets(weight=TimeWeight(8))
    halves: list[tuple[str, bool]] = []
    for who in ("student", "teacher"):
        nets[who].network.register_forward_pre_hook(
            lambda _, given, who=who: halves.append((who, torch.is_autocast_enabled("cpu")))
        )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        list(ContinuousConsistency(tangent_step=tangent_step).step(nets, data(20), 0.5))
    assert halves[-1] == ("student", True) and {half for _, half in halves[:-1]} == {False}
    assert [who for who, _ in halves[:-1]] == ["teacher"] + ["student"] * (2 if tangent_step else 1)


def test_the_tangent_at_the_least_time_is_nothing() -> None:
    """There is no way further down, and no division by its length."""
    student, x, t = affine(0.7, 0.3), torch.randn(20, D), torch.zeros(20).double()
    with torch.no_grad():
        f, df = ContinuousConsistency(tangent_step=0.05).derivative(student, x, t, x, None)
    assert not df.any() and torch.equal(f, x)


def test_the_learnt_weight_by_hand() -> None:
    """w = sum_i a_i sqrt(2) cos(2 pi f_i ln(r) / 4 + 2 pi p_i) + b, f normal and p uniform; it starts as 0."""
    torch.manual_seed(0)
    weight, ratio = TimeWeight(2000), torch.tensor([0.01, 1.0, 37.0]).double()
    assert not weight(ratio).any()
    assert float(weight.frequencies.std()) == pytest.approx(2 * math.pi, rel=0.06)
    assert 0 <= float(weight.phases.min()) < 0.05 and 6.2 < float(weight.phases.max()) < 2 * math.pi
    nn.init.normal_(weight.linear.weight), nn.init.constant_(weight.linear.bias, 0.4)
    angle = ratio.log()[:, None] / 4 * weight.frequencies.double() + weight.phases.double()
    expected = math.sqrt(2) * angle.cos() @ weight.linear.weight[0].double() + 0.4
    torch.testing.assert_close(weight(ratio).double(), expected, atol=2e-3, rtol=1e-4)


# --- adversarial consistency -----------------------------------------------------------------------------------------
class Judge(nn.Module):
    """A discriminator of two views whose logit is known: 0.4 and 0.9 of their means, the class added to both."""

    def __init__(self, schedule: Any = VP) -> None:
        super().__init__()
        self.scale, self.shown, self.schedule = nn.Parameter(torch.ones(())), list[tuple[Tensor, Tensor]](), schedule

    def encode(self, x: Tensor, t: Tensor, cond: Any = None) -> list[Tensor]:
        self.shown.append((x, t.expand(len(x))))
        return [x + cond["label"].reshape(-1, *[1] * (x.ndim - 1)) if cond else x]

    def forward(self, *views: list[Tensor]) -> Tensor:
        return self.scale * sum(w * view[0].flatten(1).mean(1) for w, view in zip((0.4, 0.9), views, strict=False))


@pytest.mark.parametrize("real", ["data", "target"])
@pytest.mark.parametrize(("progress", "ramped"), [(0.3, 0.0), (0.4, 0.25), (0.5, 0.5), (0.95, 1.0)])
def test_adversarial_consistency_by_hand(real: Any, progress: float, ramped: float) -> None:
    """lambda rises from 0.3 to 0.7 of the training to 2.5; D sees x_t at t beside a candidate at t_min."""
    judge, batch = Judge(), data()
    nets = consistency_nets(discriminator=judge, codec=PixelUnshuffle(1))
    method = AdversarialConsistency(
        real=real, adversarial_weight=2.5, adversarial_start=0.3, adversarial_ramp=0.4, points=9
    )
    turns = play(method, nets, batch, progress)
    calls = [call for turn in turns for call in turn.calls]
    at, below = (next(c for c in calls if c.who == who) for who in ("student", "target"))
    assert shows(at, batch["x0"]) and at.gradient and not below.gradient
    torch.testing.assert_close(below.t, at.t - 999 / 8, atol=2e-3, rtol=0)
    x_s = ddim(at, below.t, nets["teacher"])
    torch.testing.assert_close(below.x_t, x_s, atol=2e-3, rtol=2e-3)
    f, y = f_of(nets["student"], at), f_of(nets["target"], below).detach()
    loss = huber(f, y).mean()
    assert [turn.player for turn in turns] == (["discriminator", "student"] if ramped else ["student"])
    if not ramped:
        same(turns[0], loss, nets["student"])
        return
    for x, t in judge.shown:
        noisy = torch.equal(x, at.x_t)
        torch.testing.assert_close(t.double(), at.t if noisy else torch.zeros(N).double(), atol=1e-3, rtol=0)
    pull = lambda made: 0.4 * at.x_t.mean(1) + 0.9 * made.mean(1) + 1.3 * batch["label"]  # noqa: E731
    wanted = batch["x0"] if real == "data" else y
    same(
        turns[0],
        (softplus(judge.scale * pull(f.detach())) + softplus(-judge.scale * pull(wanted))).mean(),
        judge,
        "discriminator",
    )
    same(turns[1], loss + 2.5 * ramped * softplus(-judge.scale.detach() * pull(f)).mean(), nets["student"])


def test_adversarial_consistency_may_be_its_own_target() -> None:
    """Without a target network the student's answer below carries no gradient."""
    nets, batch = consistency_nets(), data()
    (turn,) = play(AdversarialConsistency(adversarial_weight=0.0, target_decay=0.0, points=9), nets, batch)
    below, at = turn.of("student")
    assert not below.gradient and at.gradient
    same(turn, huber(f_of(nets["student"], at), f_of(nets["student"], below).detach()).mean(), nets["student"])


def test_the_colour_term_by_hand() -> None:
    """3.5 times the squared difference of means over squares of 2 px, of the student's answer and the picture."""
    nets = consistency_nets(codec=PixelUnshuffle(1))
    x0 = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(3))

    def loss(colour_weight: float) -> Turn:
        method = AdversarialConsistency(
            adversarial_weight=0.0, colour_weight=colour_weight, colour_pixels=2, points=2, target_decay=0.9
        )
        return play(method, nets, {"x0": x0})[0]

    turn, without = loss(3.5), loss(0.0)
    at = turn.of("student")[0]  # two points: every t is t_max
    f = drawn(nets["student"], at)
    squares = (f - x0).unfold(2, 2, 2).unfold(3, 2, 2).mean((-2, -1))
    turn.loss = turn.loss - without.loss
    same(turn, 3.5 * squares.square().mean(), nets["student"])


# --- distribution matching -------------------------------------------------------------------------------------------
def matching_nets(**more: nn.Module) -> Networks:
    nets = {"student": affine(0.7, 0.3), "teacher": affine(0.4, 0.6), "critic": affine(0.5, -0.2)}
    nets["teacher"].requires_grad_(False)
    return Networks({**nets, **more})


def adversary(features: str) -> tuple[Networks, Head, Any]:
    """Networks whose heads read the critic or a frozen copy of the teacher; the head, and the logits of a call."""
    head, backbone = Head(), affine(0.9, 0.1).requires_grad_(False)
    nets = matching_nets(backbone=backbone, discriminator=head) if features == "teacher" else matching_nets()
    if features == "critic":
        nets["critic"].heads = head
    reader = backbone if features == "teacher" else nets["critic"]
    return nets, head, lambda call: head.scale * drawn(reader, call).mean(1) + head.offset


@pytest.mark.parametrize("features", ["critic", "teacher"])
def test_the_critics_turns_of_dmd2_by_hand(features: Any) -> None:
    """Each turn: denoise a fresh sample of the student; D on a diffused sample (fake) and diffused data (real)."""
    nets, head, logits = adversary(features)
    method = Dmd2(critic_turns=3, gan_weight=0.7, discriminator_weight=0.3, gan_features=features, layers=("hidden",))
    batch, samples, used, shown = data_for(method), list[Tensor](), list[int](), list[int]()
    turns, parts = play(method, nets, batch), batch["x0"].split(N)
    order = ["discriminator", "critic"] if features == "teacher" else ["critic"]
    assert [turn.player for turn in turns] == order * 3 + ["student"]
    for i in range(3):
        round_of = turns[len(order) * i : len(order) * (i + 1)]
        calls = [call for turn in round_of for call in turn.calls]
        samples += [drawn(nets["student"], call).detach() for call in calls if call.who == "student"]
        asked = [call for call in calls if call.who == "critic"]
        denoised = asked[0]
        judged = asked[1:] if features == "critic" else [call for call in calls if call.who == "backbone"]
        (k,) = (k for k, x in enumerate(samples) if shows(denoised, x))
        used.append(k)
        (fake,) = (call for call in judged if shows(call, samples[k]))
        ((real, part),) = ((call, i) for call in judged for i, x0 in enumerate(parts) if shows_exactly(call, x0))
        shown.append(part)
        critic = (weight(denoised.t) * mse(drawn(nets["critic"], denoised), samples[k]).double()).mean()
        gan = (softplus(logits(fake)) + softplus(-logits(real))).mean()
        if features == "critic":
            same(round_of[0], critic + 0.3 * gan, nets["critic"], "critic")
        else:
            same(round_of[0], gan, head, "discriminator")
            same(round_of[1], critic, nets["critic"], "critic")
    assert sorted(used) == [0, 1, 2], "every turn has its own sample"
    assert len({*shown}) == 3, "and its own data"


@pytest.mark.parametrize("features", ["critic", "teacher"])
@pytest.mark.parametrize("divergence", ["reverse-kl", "forward-kl", "jensen-shannon", "sid"])
def test_the_students_turn_of_dmd2_by_hand(features: Any, divergence: Any) -> None:
    nets, _, logits = adversary(features)
    named: dict[str, Any] = {"loss": "sid", "alpha": 0.8} if divergence == "sid" else {"divergence": divergence}
    method = Dmd2(critic_turns=1, gan_weight=0.7, gan_features=features, layers=("hidden",), **named)
    turns = play(method, nets, data_for(method))
    (noise,) = (call for turn in turns for call in turn.of("student") if call.gradient)
    assert is_noise(noise.x_t.double(), noise.x_t.double() * 0 + torch.randn(N, D)) and float(noise.t.min()) == 999
    x, calls = drawn(nets["student"], noise), [call for call in turns[-1].calls if call.who != "student"]
    at = calls[0]
    assert shows(at, x.detach()) and all(torch.equal(call.x_t, at.x_t) for call in calls)
    assert all(torch.equal(call.t, at.t) for call in calls)
    assert not any(call.gradient for call in calls if call.who == "teacher" and divergence != "sid"), "memory"
    live = replace(at, x_t=again(noise_in(at, x.detach().double()), x, at.t))
    logit = logits(live)
    if divergence == "sid":
        real, fake = drawn(nets["teacher"], live), drawn(nets["critic"], live)
        size = (x - real).detach().abs().mean(1, keepdim=True)
        loss = ((real - fake) * ((real - x) - 0.8 * (real - fake)) / size).mean()
    else:
        real, fake = drawn(nets["teacher"], at), drawn(nets["critic"], at)
        ratio = logit.detach().exp()
        h = {"reverse-kl": torch.ones(N), "forward-kl": ratio, "jensen-shannon": ratio / (ratio + 1)}[divergence]
        for similar in at.t.argsort().split(N // 10):
            h[similar] = h[similar] / h[similar].mean()
        gap = h[:, None] * (fake - real) / (x - real).abs().mean(1, keepdim=True)
        loss = ((x - (x - gap).detach()) ** 2).mean() / 2
    wanted = 0.7 * softplus(-logit).mean()
    same(turns[-1], loss + wanted, nets["student"])
    pulls = [torch.autograd.grad(term, x, retain_graph=True)[0].norm().item() for term in (loss, wanted)]
    assert [float(nets.pulls[name]) for name in ("loss", "adversary")] == pytest.approx(pulls, rel=1e-3)


def test_the_pairs_of_dmd2_by_hand() -> None:
    """0.6 times the distance of the student's samples of the pairs' noises to the teacher's pictures of them."""
    pairs = Pairs(50, 3, torch.zeros(1, D), 0)
    torch.manual_seed(1)
    pairs.noise.normal_(), pairs.x0.normal_(2.0), pairs.ready.fill_(True)
    nets = matching_nets(pairs=pairs)
    method = Dmd2(critic_turns=1, pairs=50, regression_weight=0.6)
    turns = play(method, nets, data_for(method))
    given, again_given = turns[-1].of("student")
    gap, x_T = turns[-1].of("critic")[0], drawn(nets["student"], given)
    real, fake = drawn(nets["teacher"], gap), drawn(nets["critic"], gap)
    step = (fake - real) / (x_T - real).abs().mean(1, keepdim=True)
    which = torch.cdist(again_given.x_t, pairs.noise).argmin(1)
    assert torch.equal(pairs.noise[which], again_given.x_t) and len(which) == N and len(which.unique()) == 50
    expected = ((x_T - (x_T - step).detach()) ** 2).mean() / 2
    expected = expected + 0.6 * mse(drawn(nets["student"], again_given), pairs.x0[which]).mean()
    same(turns[-1], expected, nets["student"])


def test_pairs_follow_the_teacher_down_the_grid() -> None:
    """Heun from t_max to t_min in so many steps, and the teacher's last word there; of the classes in turn."""
    teacher = affine(0.4, 0.6)
    pairs = Pairs(100, 4, torch.zeros(1, D), 3)
    torch.manual_seed(1)
    noise, x0, cond = pairs(teacher, 300)
    call = Call("", pairs.noise, torch.full((100,), 999.0).double(), torch.arange(100) % 3)
    for s in torch.linspace(999, 0, 5).double()[1:]:
        call = replace(call, x_t=heun(call, s.expand(100), teacher).detach(), t=s.expand(100))
    torch.testing.assert_close(pairs.x0, drawn(teacher, call), atol=1e-4, rtol=1e-4)
    kept = pairs.x0.clone()
    pairs(affine(2.0, 2.0), 5)
    assert torch.equal(pairs.x0, kept), "made once"
    which = torch.cdist(noise, pairs.noise).argmin(1)
    assert cond is not None and torch.equal(cond["label"], which % 3) and torch.equal(x0, pairs.x0[which])
    assert is_noise(pairs.noise.double(), torch.randn(100, D).double()) and len(which.unique()) > 80


def test_pairs_are_made_by_the_teacher_from_noise_at_its_own_scale() -> None:
    nets = matching_nets(pairs=Pairs(20, 2, torch.zeros(1, D), 0))
    method = Dmd2(critic_turns=1, pairs=20)
    play(method, nets, data_for(method))
    call = Call("", nets["pairs"].noise, torch.full((20,), 999.0).double())
    for s in (499.5, 0.0):
        s_t = torch.full((20,), s).double()
        call = replace(call, x_t=heun(call, s_t, nets["teacher"]).detach(), t=s_t)
    torch.testing.assert_close(nets["pairs"].x0, drawn(nets["teacher"], call).detach(), atol=1e-4, rtol=1e-4)
    exploding, given = affine(0.4, 0.6, EDM()), list[Tensor]()
    exploding.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    pairs = Pairs(20, 2, torch.zeros(1, D), 0)
    pairs(exploding, 5)
    torch.testing.assert_close(given[0], pairs.noise * math.sqrt(1 + 80**2))


def test_several_steps_of_dmd2_judge_what_the_sampler_makes() -> None:
    """The student's sample is of its own sampler of two or three steps, and the critic's samples, too."""
    nets = matching_nets()
    method, counts = Dmd2(critic_turns=2, steps=(2, 3)), set()
    for seed in range(30):
        batch = data(200)
        calls: list[tuple[bool, int]] = []
        nets["student"].network.register_forward_pre_hook(
            lambda _, g, calls=calls: calls.append((torch.is_grad_enabled(), int(g[1][0])))
        )
        torch.manual_seed(seed)
        list(method.step(nets, batch, 0.5))
        counts.add(len(calls))
        assert [gradient for gradient, _ in calls].count(True) == 1
        assert all(t in {*sampling_times(VP, 2), *sampling_times(VP, 3)} for _, t in calls)
    assert min(counts) >= 2 and max(counts) <= 9 and len(counts) > 3, "each sample takes one to three calls"


def test_the_ratio_of_sid_is_of_each_sample() -> None:
    x0, real, fake = (torch.randn(3, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
    by_hand = torch.stack(
        [
            ((r - f) * ((r - x) - 0.8 * (r - f))).mean() / (x - r).abs().mean()
            for x, r, f in zip(x0, real, fake, strict=True)
        ]
    )
    torch.testing.assert_close(score_identity(x0, real, fake, 0.8), by_hand.mean())


def test_a_sample_that_is_the_teachers_has_no_size_to_divide_by() -> None:
    x0, fake = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    assert bool(score_identity(x0, x0, fake, 0.8).isfinite())


# --- disback ---------------------------------------------------------------------------------------------------------
def way_back(recorded: int = 0, **options: Any) -> tuple[DisBack, Networks]:
    """Four nodes; of those that are recorded the affine network of node k answers x / (k + 2) - k."""
    method = DisBack(nodes=4, record=0.2, back=0.6, **options)
    nets = matching_nets(target=affine(9.0, 9.0), path=Path(4, affine(0.4, 0.6)))
    for k in range(1, recorded + 1):
        nets["path"].record(affine(1 / (k + 2), -float(k)))
    return method, nets


@pytest.mark.parametrize(("progress", "before", "after"), [(0.0, 0, 0), (0.049, 0, 0), (0.051, 0, 1), (0.16, 1, 3)])
def test_the_first_stage_of_disback_by_hand(progress: float, before: int, after: int) -> None:
    """The critic denoises one-step samples; its states are recorded at even times up to 0.2 of the training."""
    method, nets = way_back(before)
    (turn,) = play(method, nets, data(), progress)
    (given,), (asked,) = turn.of("student"), turn.of("critic")
    x = drawn(nets["student"], given).detach()
    assert shows(asked, x) and not given.gradient
    same(turn, (weight(asked.t) * mse(drawn(nets["critic"], asked), x).double()).mean(), nets["critic"], "critic")
    assert int(nets["path"].recorded) == after
    assert not nets["path"].states.requires_grad
    for state in nets["path"].states[before + 1 : after + 1]:
        assert state.tolist() == pytest.approx([0.5, -0.2])  # the critic's


@pytest.mark.parametrize(
    ("progress", "node"), [(0.2, 3), (0.33, 3), (0.34, 2), (0.46, 2), (0.47, 1), (0.59, 1), (0.6, 0), (1.0, 0)]
)
def test_the_way_back_of_disback_by_hand(progress: float, node: int) -> None:
    """P_3, P_2, P_1 for a third of the time from 0.2 to 0.6 each, then the teacher; its gradient is DMD's."""
    method, nets = way_back(4, critic_turns=2)
    turns, samples = play(method, nets, data_for(method, progress), progress, keep=True), list[Tensor]()
    assert [turn.player for turn in turns] == ["critic", "critic", "student"]
    used = []
    for turn in turns[:2]:
        samples += [drawn(nets["student"], call) for call in turn.of("student")]
        (asked,) = turn.of("critic")
        (k,) = (k for k, x in enumerate(samples) if shows(asked, x.detach()))
        used.append(k)
        expected = (weight(asked.t) * mse(drawn(nets["critic"], asked), samples[k].detach()).double()).mean()
        same(turn, expected, nets["critic"], "critic")
    assert sorted(used) == [0, 1] and int(nets["path"].loaded) == node
    (given,) = turns[-1].of("student")
    x = drawn(nets["student"], given)
    asked = turns[-1].of("critic")[0]
    assert shows(asked, x.detach()) and not asked.gradient
    real = drawn(affine(0.4, 0.6) if node == 0 else affine(1 / (node + 2), -float(node)), asked)
    gap = (drawn(nets["critic"], asked) - real) / (x - real).abs().mean(1, keepdim=True)
    same(turns[-1], ((x - (x - gap).detach()) ** 2).mean() / 2, nets["student"])


def test_the_plateau_of_disback_by_hand() -> None:
    """A running mean of a tenth; a fall below 0.99 of the best counts; after three without one the next node is due."""
    path = Path(4, affine(0.4, 0.6))
    gaps, mean, best, waited, node = (
        [1.0, 0.9, 0.9, 0.97, 0.98, 0.9, 0.2, 0.2, 0.3, 0.9, 2.0, 2.0, 2.0],
        None,
        math.inf,
        0,
        3,
    )
    for gap in gaps:
        path.watch(torch.tensor(gap), patience=3)
        mean = gap if mean is None else 0.9 * mean + 0.1 * gap
        waited, best = (0, mean) if mean < 0.99 * best else (waited + 1, best)
        if waited == 3:
            node, mean, best, waited = node - 1, None, math.inf, 0
        assert int(path.node) == node and int(path.waited) == waited
        assert float(path.best) == pytest.approx(best) and (mean is None or float(path.gap) == pytest.approx(mean))
    assert node < 3
    for _ in range(40):
        path.watch(torch.tensor(1.0), patience=3)
    assert int(path.node) == 0, "no further than the teacher"


def test_the_plateau_sees_the_gap_between_critic_and_target() -> None:
    method, nets = way_back(4, critic_turns=1, advance="plateau", patience=9)
    nets["path"].states[3] = torch.tensor([2.5, -0.2])  # on both sides of the critic
    turn = play(method, nets, data_for(method, 0.3), 0.3, keep=True)[-1]
    asked = turn.of("critic")[0]
    gap = (drawn(nets["critic"], asked) - drawn(affine(2.5, -0.2), asked)).abs().mean().detach()
    assert float(nets["path"].gap) == pytest.approx(float(gap), rel=1e-4)


def test_a_plateau_ends_on_the_teacher_when_it_is_reached_or_due() -> None:
    method, nets = way_back(4, critic_turns=1, advance="plateau")
    assert method.target(nets, 0.3) is nets["target"] and int(nets["path"].loaded) == 3
    assert method.target(nets, 0.7) is nets["teacher"], "whichever node it has come to"
    nets["path"].node.zero_()
    assert method.target(nets, 0.3) is nets["teacher"], "however early"


# --- hyper-sd --------------------------------------------------------------------------------------------------------
def segments_of(turn: Turn, k: int, points: int = 16) -> tuple[Call, Call, Tensor]:
    """The student's call at t, the target's at m, and the lower end of the segment."""
    grid = torch.tensor([0.0] + [float(round(i * 1000 / points) - 1) for i in range(1, points + 1)]).double()
    at, below = next(c for c in turn.of("student") if c.gradient), turn.of("target")[0]
    n = torch.cdist(at.t[:, None], grid[:, None]).argmin(1)
    torch.testing.assert_close(at.t, grid[n], atol=1e-3, rtol=0)
    torch.testing.assert_close(below.t, grid[n - 1], atol=1e-3, rtol=0)
    assert sorted(n.unique().tolist()) == list(range(1, points + 1))
    length = points // k
    return at, below, grid[(n - 1) // length * length]


@pytest.mark.parametrize(("progress", "k", "ratio"), [(0.1, 4, 0.6), (0.6, 1, 1.7)])
@pytest.mark.parametrize("distance", ["l2", "pseudo-huber"])
def test_the_terms_of_hyper_sd_by_hand(progress: float, k: int, ratio: float, distance: Any) -> None:
    """Consistency in the segment, and an adversary that compares at a random time of the segment.

    Its weight is what makes its gradient at the student's samples `ratio` times as long as that of the distance.
    """
    head, backbone = Head(), affine(0.9, 0.1).requires_grad_(False)
    nets, batch = consistency_nets(backbone=backbone, discriminator=head), data()
    method = HyperSD(segments=(4, 1), adversarial_weights=(0.6, 1.7), points=16, layers=("hidden",), distance=distance)
    turns = play(method, nets, batch, progress)
    assert [turn.player for turn in turns] == ["discriminator", "student"]
    at, below, b = segments_of(turns[0], k)
    assert shows(at, batch["x0"])
    x_m = ddim(at, below.t, nets["teacher"])
    torch.testing.assert_close(below.x_t, x_m, atol=2e-3, rtol=2e-3)
    x_b, y = ddim(at, b, nets["student"]), ddim(below, b, nets["target"]).detach()
    loss = (mse if distance == "l2" else huber)(x_b, y).mean()
    views = [call for turn in turns for call in turn.of("backbone")]
    assert len(views) == 3
    u = views[0].t
    high = b + (999 if k == 1 else 251)
    assert bool((u >= b - 1e-3).all()) and bool((u <= high).all()) and all(torch.equal(v.t, u) for v in views)
    grid = torch.tensor([0.0] + [float(round(i * 1000 / 16) - 1) for i in range(1, 17)]).double()
    places = [torch.cdist(time[:, None], grid[:, None]).argmin(1) for time in (u, b)]
    assert set((places[0] - places[1]).tolist()) == set(range(16 // k + 1)), "both ends and all between"
    assert len(turns[0].of("student") + turns[1].of("student")) == 1, "no sample without a use for it"
    # x_u = (a_u / a_b) x_b + what is missing of the noise
    scale = column(VP.alpha(u) / VP.alpha(b))
    noise = (column(VP.sigma(u)) ** 2 - (scale * column(VP.sigma(b))) ** 2).clamp_min(0).sqrt()
    above = u > b + 1
    fake = min(views[:2], key=lambda v: float((v.x_t - views[2].x_t).abs().max()))
    (real,) = (v for v in views[:2] if v is not fake)
    eps = ((fake.x_t - scale * x_b.detach()) / noise)[above]
    assert is_noise(eps.double(), x_b.detach()[above].double()) and float(above.double().mean()) > 0.5
    torch.testing.assert_close(real.x_t, (fake.x_t + scale * (y - x_b.detach())).float(), atol=5e-3, rtol=1e-3)
    x_u = (fake.x_t + scale * (x_b - x_b.detach())).float()

    def logits(call: Call) -> Tensor:
        return head.scale * drawn(backbone, call).mean(1) + head.offset

    same(turns[0], (softplus(logits(fake)) + softplus(-logits(real))).mean(), head, "discriminator")
    wanted = softplus(-logits(replace(fake, x_t=x_u))).mean()
    pulls = [torch.autograd.grad(term, x_b, retain_graph=True)[0].norm() for term in (loss, wanted)]
    same(turns[1], loss + ratio * pulls[0] / pulls[1] * (wanted - wanted.detach()), nets["student"])
    assert float(nets.pulls["adversary"] / nets.pulls["loss"]) == pytest.approx(ratio, rel=1e-3)


def test_stages_of_hyper_sd_share_the_first_half() -> None:
    method = HyperSD(segments=(8, 4, 2, 1), adversarial_weights=(0.0, 0.1, 0.2, 0.3))
    assert method.stage_starts() == pytest.approx([0, 1 / 6, 1 / 3, 1 / 2])
    assert [method.stage(p) for p in (0.0, 0.16, 0.17, 0.34, 0.5, 1.0)] == [
        (8, 0.0), (8, 0.0), (4, 0.1), (2, 0.2), (1, 0.3), (1, 0.3),
    ]  # fmt: skip
    assert HyperSD(segments=(1,), adversarial_weights=(0.3,)).stage_starts() == [0.0]


def test_hyper_sd_may_be_its_own_target_and_its_heads_may_be_silent() -> None:
    """Its answer below carries no gradient; heads that say nothing add nothing, and no division by nothing."""
    head = Head(scale=0.0)
    nets = consistency_nets(backbone=affine(0.9, 0.1).requires_grad_(False), discriminator=head)
    method = HyperSD(segments=(1,), adversarial_weights=(0.5,), points=16, target_decay=0.0, layers=("hidden",))
    turns = play(method, nets, data())
    at, below = turns[0].of("student")
    at, below = (at, below) if at.gradient else (below, at)
    assert at.gradient and not below.gradient
    b = torch.zeros(N).double()
    loss = huber(ddim(at, b, nets["student"]), ddim(below, b, nets["student"]).detach()).mean()
    same(turns[1], loss, nets["student"])


class Liking(nn.Module):
    """A reward of samples that is known: three times their mean, less one, and more for some classes."""

    def forward(self, x: Tensor, cond: Any) -> Tensor:
        return 3 * x.mean(1) - 1 + 0.8 * cond["label"]


@pytest.mark.parametrize("score", [0.0, 0.8])
@pytest.mark.parametrize("liked", [0.0, 0.45])
def test_the_one_step_terms_of_hyper_sd_by_hand(score: float, liked: float) -> None:
    """On one one-step sample: 0.8 times the score difference, 0.45 times relu(0.5 - reward); the critic denoises."""
    if not score and not liked:
        return
    nets = consistency_nets(critic=affine(0.6, -0.5), reward=Liking())
    method = HyperSD(
        segments=(2, 1), adversarial_weights=(0.0, 0.0), points=16, critic_turns=2, score_weight=score,
        reward="some:reward" if liked else None, reward_weight=liked, reward_margin=0.5,
    )  # fmt: skip
    (early,) = play(method, nets, data(), 0.2)
    at, below, b = segments_of(early, 2)
    same(early, huber(ddim(at, b, nets["student"]), ddim(below, b, nets["target"]).detach()).mean(), nets["student"])
    batch = data_for(method, 0.7)
    turns = play(method, nets, batch, 0.7)
    assert [turn.player for turn in turns] == ["critic"] * (2 if score else 0) + ["student"]
    at, below, b = segments_of(Turn("", turns[0].loss, [c for t in turns for c in t.calls]), 1)
    loss = huber(ddim(at, b, nets["student"]), ddim(below, b, nets["target"]).detach()).mean()
    samples = []
    for turn in turns[:-1]:
        samples += [drawn(nets["student"], c).detach() for c in turn.of("student") if not c.gradient]
        (asked,) = turn.of("critic")
        assert shows(asked, samples[-1])
        expected = (weight(asked.t) * mse(drawn(nets["critic"], asked), samples[-1]).double()).mean()
        same(turn, expected, nets["critic"], "critic")
    given = turns[-1].of("student")[-1]
    assert given.gradient and float(given.t.min()) == 999
    x = drawn(nets["student"], given)
    if score:
        asked = turns[-1].of("critic")[0]
        assert shows(asked, x.detach()) and not asked.gradient
        real, fake = drawn(nets["teacher"], asked), drawn(nets["critic"], asked)
        gap = (fake - real) / (x - real).abs().mean(1, keepdim=True)
        loss = loss + 0.8 * ((x - (x - gap).detach()) ** 2).mean() / 2
    if liked:
        loss = loss + 0.45 * (0.5 - (3 * x.mean(1) - 1 + 0.8 * batch["label"][:N])).relu().mean()
    same(turns[-1], loss, nets["student"])


# --- boot ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("solver", ["ddim", "heun"])
@pytest.mark.parametrize("beta", [0.0, 1.8])
def test_boot_by_hand(solver: Any, beta: float) -> None:
    """The bootstrap on every sample, over (1 - rho)^2; 1.8 times the boundary on the first third of them."""
    nets = consistency_nets()
    method = Boot(delta=0.1, solver=solver, boundary_weight=beta, boundary_share=1 / 3)
    (turn,) = play(method, nets, data(), 0.5)
    before, both = turn.of("student")
    carried, *_, top = turn.of("teacher")
    eps, k = before.x_t, N // 3
    assert is_noise(eps.double(), torch.randn(N, D).double()) and not before.gradient and both.gradient
    t, s = before.t, both.t[:N]
    assert 99.9 <= float(t.min()) < 102 and 997 < float(t.max()) <= 999.01
    assert float((t - 99.9).quantile(0.5)) == pytest.approx(0.9 * 999 / 2, rel=0.06), "uniform above delta"
    torch.testing.assert_close(s, t - 99.9, atol=1e-3, rtol=0)
    assert torch.equal(both.x_t, torch.cat([eps, eps[:k]])) and bool((both.t[N:] == 999).all())
    assert torch.equal(top.x_t, eps[:k]) and bool((top.t == 999).all())
    y_t = drawn(nets["student"], before).detach()
    x_t = again(eps.double(), y_t, t)
    torch.testing.assert_close(carried.x_t, x_t, atol=1e-3, rtol=1e-3)
    if solver == "ddim":  # the paper's own form
        rho = column(VP.sigma(s) * VP.alpha(t) / (VP.alpha(s) * VP.sigma(t)))
        y_s = y_t + (1 - rho) * (drawn(nets["teacher"], carried) - y_t)
    else:
        y_s = (heun(carried, s, nets["teacher"]) - column(VP.sigma(s)) * eps) / column(VP.alpha(s))
    rho = (VP.noise_ratio(s) / VP.noise_ratio(t)).double()
    y = drawn(nets["student"], both)
    bootstrap = (mse(y[:N], y_s.detach().float()).double() / (1 - rho) ** 2).mean()
    boundary = mse(y[N:], drawn(nets["teacher"], top)).mean()
    same(turn, bootstrap + beta * boundary, nets["student"])


def test_the_boundary_of_boot_takes_one_sample_at_least() -> None:
    for share, k in ((0.01, 1), (0.5, 10), (1.0, 20)):
        (turn,) = play(Boot(boundary_share=share), consistency_nets(), data(20))
        assert len(turn.of("teacher")[-1].x_t) == k


# --- multi-student, diffusion ----------------------------------------------------------------------------------------
def test_score_matching_by_hand() -> None:
    """The student matches the teacher's estimate at diffused data of every noise level, weighed by min(SNR, 20) + 1."""
    nets, batch = matching_nets(), data()
    method = MultiStudent(start="untrained", matching=0.4)
    (turn,) = play(method, nets, batch, 0.39)
    (asked,), (answered,) = turn.of("student"), turn.of("teacher")
    assert shows(asked, batch["x0"]) and torch.equal(asked.x_t, answered.x_t) and torch.equal(asked.t, answered.t)
    assert float(asked.t.min()) < 25 and float(asked.t.max()) > 975
    expected = (weight(asked.t) * mse(drawn(nets["student"], asked), drawn(nets["teacher"], asked)).double()).mean()
    same(turn, expected, nets["student"])
    assert play(method, nets, batch, 0.41)[0].player == "critic", "then the base method"


def test_the_base_of_multi_student_has_a_progress_and_stages_of_its_own() -> None:
    method = MultiStudent(start="untrained", matching=0.4, options={"critic_turns": 3})
    assert [method.draws(p) for p in (0.0, 0.39, 0.4, 1.0)] == [1, 1, 4, 4]
    assert method.base_progress(0.4) == 0 and method.base_progress(0.7) == pytest.approx(0.5)
    assert method.stage_starts() == [0.0, 0.4]
    vars(method)["method"] = HyperSD(segments=(2, 1), adversarial_weights=(0.0, 0.0))
    assert method.stage_starts() == pytest.approx([0.0, 0.4, 0.7])
    whole = MultiStudent(base="consistency")
    assert whole.stage_starts() == [0.0] and whole.base_progress(0.3) == pytest.approx(0.3)


@pytest.mark.parametrize("cap", [20.0, 4.0])
@pytest.mark.parametrize(("log_std", "log_mean"), [(0.0, 0.0), (0.8, -1.0)])
@pytest.mark.parametrize("last", [0.0, 0.3])
def test_diffusion_by_hand(cap: float, log_std: float, log_mean: float, last: float) -> None:
    """Times are uniform or lognormal in sigma/alpha, a share of them t_max; the weight is min(SNR, cap) + 1."""
    nets, batch = Networks({"student": affine(0.7, 0.3)}), {"x0": data()["x0"]}
    method = Diffusion(snr_cap=cap, log_std=log_std, log_mean=log_mean, last_time_share=last)
    (turn,) = play(method, nets, batch)
    (asked,) = turn.calls
    assert shows(asked, batch["x0"])
    same(
        turn, (weight(asked.t, cap) * mse(drawn(nets["student"], asked), batch["x0"]).double()).mean(), nets["student"]
    )
    at_end = asked.t == 999
    assert float(at_end.double().mean()) == pytest.approx(last, abs=0.05)
    inner = asked.t[~at_end]
    if log_std:
        ratio = VP.noise_ratio(inner).log()
        assert float(ratio.mean()) == pytest.approx(-1.0, abs=0.06) and float(ratio.std()) == pytest.approx(
            0.8, abs=0.05
        )
    else:
        expected = torch.linspace(0, 999, 11).double()
        torch.testing.assert_close(inner.quantile(torch.linspace(0, 1, 11).double()), expected, atol=45, rtol=0)


def test_uniform_times_of_diffusion_begin_at_the_least_time() -> None:
    schedule = Trigonometric(t_min=0.4)
    nets = Networks({"student": affine(0.7, 0.3, schedule)})
    (turn,) = play(Diffusion(), nets, {"x0": data()["x0"]})
    t = turn.calls[0].t
    assert 0.4 <= float(t.min()) < 0.41 and schedule.t_max - 0.01 < float(t.max()) <= schedule.t_max


def test_labels_are_dropped_for_the_null_class_at_their_share() -> None:
    seen: list[Tensor] = []

    class Classes(Affine):
        config = type("Config", (), {"num_class_embeds": 6})()

        def forward(self, x: Tensor, time: Tensor, class_labels: Tensor | None = None) -> Any:
            assert class_labels is not None
            seen.append(class_labels)
            return type("Output", (), {"sample": answer(self, x, time, class_labels)})()

    nets = Networks({"student": Denoiser(Classes(0.7, 0.3), VP, "x0")})
    label = torch.arange(N) % 5
    list(Diffusion(label_dropout=0.25).step(nets, {**data(), "label": label}, 0.0))
    dropped = seen[0] == 5
    assert float(dropped.double().mean()) == pytest.approx(0.25, abs=0.04) and torch.equal(
        seen[0][~dropped], label[~dropped]
    )


# --- refine ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("progress", "ramped"), [(0.0, 0.0), (0.05, 0.25), (0.1, 0.5), (0.6, 1.0)])
def test_the_adversary_of_refine_by_hand(progress: float, ramped: float) -> None:
    """1.6 times its loss over a ramp of a fifth, beside 0.7 times the pixels'; D sees both at t_min."""
    judge, x0 = Judge(), torch.randn(30, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    nets = Networks({"student": affine(0.7, 0.3), "discriminator": judge, "codec": PixelUnshuffle(1)})
    method = Refine(
        pixel_weight=0.7, perceptual_weight=0.0, frequency_weight=0.0, adversarial_weight=1.6, adversarial_ramp=0.2,
        shift=0, steps=(1,),
    )  # fmt: skip
    label = torch.arange(30) % 4
    turns = play(method, nets, {"x0": x0, "label": label}, progress)
    assert [turn.player for turn in turns] == ["discriminator", "student"]
    (given,) = (call for turn in turns for call in turn.of("student"))
    x = drawn(nets["student"], given)
    assert all(float(t.max()) == 0 for _, t in judge.shown)

    def logits(made: Tensor) -> Tensor:
        return 0.4 * judge.scale * (made.flatten(1).mean(1) + label)

    same(turns[0], (softplus(logits(x.detach())) + softplus(-logits(x0))).mean(), judge, "discriminator")
    expected = 0.7 * (x - x0).abs().mean() + 1.6 * ramped * softplus(-logits(x)).mean()
    same(turns[1], expected, nets["student"])


@pytest.mark.parametrize("term", ["frequency", "perceptual"])
def test_the_other_terms_of_refine_by_hand(term: str) -> None:
    """1.3 times the focal frequency loss of the pictures, or 2.1 times the distance of the start's own features."""
    x0 = torch.randn(30, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    nets = Networks({"student": affine(0.7, 0.3), "codec": PixelUnshuffle(1)})
    nets["teacher"] = affine(-0.6, 0.2).requires_grad_(False)
    weights = {
        "frequency_weight": 0.0,
        "perceptual_weight": 0.0,
        f"{term}_weight": {"frequency": 1.3, "perceptual": 2.1}[term],
    }
    method = Refine(pixel_weight=0.0, adversarial_weight=0.0, shift=0, steps=(1,), layers=("hidden",), **weights)
    (turn,) = play(method, nets, {"x0": x0, "label": torch.arange(30) % 4})
    x = drawn(nets["student"], turn.of("student")[0])
    if term == "frequency":
        same(turn, 1.3 * focal_frequency(x, x0).mean(), nets["student"])
        return
    clean = turn.of("teacher")[0]
    assert float(clean.t.max()) == 0
    made, real = (drawn(nets["teacher"], replace(clean, x_t=y)) for y in (x, x0))
    made, real = (y / y.square().sum(1, keepdim=True).sqrt() for y in (made, real))
    same(turn, 2.1 * (made - real).square().sum(1).mean(), nets["student"])


# --- pso -------------------------------------------------------------------------------------------------------------
class Tuned(Affine):
    """An affine network and a change of it, which alone learns."""

    def __init__(self, gain: float, shift: float, change: float) -> None:
        super().__init__(gain, shift)
        self.gain.requires_grad_(False), self.shift.requires_grad_(False)
        self.change = nn.Parameter(torch.tensor(change))

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        return answer(self, x, time, label) + self.change


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A four-step base that answers x/2 + 0.1, the reference, and its tuned copy, which answers 0.07 more."""
    from distillers.methods import pso

    monkeypatch.setattr(pso, "guided", lambda denoiser, info, scale: denoiser)
    sampler = Sampler.__new__(Sampler)
    nn.Module.__init__(sampler)
    sampler.info = type("Info", (), {"guidance_scale": 1.0})()
    sampler.times, sampler.renoises = sampling_times(VP, 4), True
    student, reference = (Denoiser(Tuned(0.5, 0.1, change), VP, "x0") for change in (0.07, 0.0))
    nets = Networks({"student": student, "reference": reference.requires_grad_(False), "sampler": sampler})
    nets["rewards"] = nn.ModuleList([Liking()])
    yield nets


def policy(nets: Networks, call: Call, on: bool = True) -> Tensor:
    return drawn(nets["student"], call) + nets["student"].network.change * on


@pytest.mark.parametrize("mode", ["offline", "personalise", "finetune"])
@pytest.mark.parametrize("beta", [0.3, 2.0])
def test_the_offline_losses_of_pso_by_hand(tuned: Networks, mode: Any, beta: float) -> None:
    """Winner and loser under one noise at one of the four times; errors are over sigma^2."""
    winner, loser = data()["x0"] - 4.5, data()["x0"].flip(0) - 5.5
    (turn,) = play(Pso(mode=mode, beta=beta), tuned, {**data(), "x0": winner, "loser": loser})
    first = turn.calls[0]
    eps = noise_in(first, winner.double())
    assert is_noise(eps, winner.double()) and set(first.t.tolist()) == set(sampling_times(VP, 4))
    counts = torch.bincount(torch.bucketize(first.t, torch.tensor([300.0, 600.0, 900.0]).double()))
    assert bool(((counts - N / 4).abs() < 120).all()), "every time as often"

    def error(x0: Tensor, on: bool = True) -> Tensor:
        x_t = again(eps, x0, first.t)
        return mse(policy(tuned, replace(first, x_t=x_t), on), x0).double() / VP.sigma(first.t) ** 2

    won, lost = error(winner), error(loser)
    expected = {
        "finetune": won.mean(),
        "personalise": ((1 - beta * (lost - won)).relu() + lost / 2).mean(),
        "offline": -logsigmoid(beta * ((error(winner, False) - error(loser, False)) - (won - lost)).detach()).mean(),
    }[mode]
    if mode == "offline":
        expected = -logsigmoid(beta * ((error(winner, False) - error(loser, False)).detach() - (won - lost))).mean()
    same(turn, expected, tuned["student"])


@pytest.mark.parametrize("policy_std", [0.0, 0.4])
@pytest.mark.parametrize("clip", [0.02, 0.05, 0.9])
def test_the_online_loss_of_pso_by_hand(tuned: Networks, clip: float, policy_std: float) -> None:
    """Two rollouts; each noisy step's log-ratio is cut at ln(1 - clip) and ln(1 + clip); the reward's sign leads."""
    method = Pso(mode="online", reward="some:reward", beta=3.0, clip=clip, policy_std=policy_std)
    (turn,) = play(method, tuned, data())
    times, calls = sampling_times(VP, 4), turn.calls
    a, b = calls[:4], calls[4:8]
    for path in (a, b):
        assert [float(call.t[0]) for call in path] == times
        for one, next_one in pairwise(path):
            assert shows(next_one, policy(tuned, one).detach())
    assert not torch.equal(a[0].x_t, b[0].x_t)
    ends = [policy(tuned, path[3]).detach() for path in (a, b)]
    noisy = range(4) if policy_std else range(3)
    if policy_std:  # the last step's Gaussian was drawn inside: found again by its seed
        torch.manual_seed(0)
        for _ in range(8):
            torch.randn(N, D)
        ends = [end + policy_std * torch.randn(N, D) for end in ends]
    h = (ends[0].mean(1) - ends[1].mean(1)).sign()
    both: list[list[Tensor]] = []
    for path, end in ((a, ends[0]), (b, ends[1])):
        ratios = []
        for j in noisy:
            scale, std = (
                (1.0, policy_std) if j == 3 else (float(VP.alpha(a[j + 1].t)[0]), float(VP.sigma(a[j + 1].t)[0]))
            )
            reached = end if j == 3 else path[j + 1].x_t

            def squared(on: bool, j: int = j, path: Any = path, scale: float = scale, to: Tensor = reached) -> Tensor:
                return mse(scale * policy(tuned, path[j], on), to)

            ratio = (squared(False).detach() - squared(True)) / (2 * std**2)
            ratios.append(ratio.clamp(math.log(1 - clip), math.log(1 + clip)))
        both.append(ratios)
    every = torch.stack([ratio.detach() for ratios in both for ratio in ratios])
    if clip == 0.02:
        assert bool((every == math.log(1 - clip)).any()) and bool((every == every.max()).sum() > 1), "both cuts bite"
    margins = torch.stack([h * (one - other) for one, other in zip(*both, strict=True)])
    same(turn, -logsigmoid(3.0 * margins).mean(), tuned["student"])


@pytest.mark.parametrize("mode", ["offline", "personalise", "finetune"])
def test_losers_of_pso_are_drawn_by_the_reference(tuned: Networks, mode: Any) -> None:
    """Where there are none in the batch: four steps of the base from fresh noise; plain fine-tuning needs none."""
    batch = data()
    batch["x0"] = batch["x0"] - 4.5
    (turn,) = play(Pso(mode=mode, beta=0.7), tuned, batch)
    if mode == "finetune":
        assert len(turn.calls) == 1
        return
    path, first = turn.calls[:4], turn.calls[4]
    assert is_noise(path[0].x_t.double(), torch.randn(N, D).double())
    assert [float(call.t[0]) for call in path] == sampling_times(VP, 4) and not any(call.gradient for call in path)
    for one, next_one in pairwise(path):
        assert shows(next_one, policy(tuned, one, False).detach())
    loser = policy(tuned, path[3], False).detach()
    eps = noise_in(first, batch["x0"].double())

    def error(x0: Tensor, on: bool = True) -> Tensor:
        x_t = again(eps, x0, first.t)
        return mse(policy(tuned, replace(first, x_t=x_t), on), x0).double() / VP.sigma(first.t) ** 2

    won, lost = error(batch["x0"]), error(loser)
    if mode == "personalise":
        same(turn, ((1 - 0.7 * (lost - won)).relu() + lost / 2).mean(), tuned["student"])
    else:
        gap = (error(batch["x0"], False) - error(loser, False)).detach() - (won - lost)
        same(turn, -logsigmoid(0.7 * gap).mean(), tuned["student"])


def test_a_sampler_without_noise_has_a_likelihood_at_its_last_step_alone(tuned: Networks) -> None:
    sampler = tuned["sampler"]
    noisy = Pso(mode="online", reward="some:reward", policy_std=0.2)
    plain = Pso(mode="online", reward="some:reward")
    assert noisy.noisy_steps(sampler, VP) == [0, 1, 2, 3] and plain.noisy_steps(sampler, VP) == [0, 1, 2]
    sampler.renoises = False
    assert noisy.noisy_steps(sampler, VP) == [3] and plain.noisy_steps(sampler, VP) == []


def test_a_rollout_of_pso_by_hand(tuned: Networks) -> None:
    """Without noise between its steps, from noise at the schedule's own scale."""
    sampler, net, noise = tuned["sampler"], affine(0.5, 0.1), torch.randn(20, D)
    sampler.renoises = False
    path = sampler.rollout(net, noise, {"label": torch.arange(20) % 4})
    call = Call("", noise, torch.full((20,), float(sampler.times[0])).double(), torch.arange(20) % 4)
    for reached, s in zip(path[1:], sampler.times[1:], strict=False):
        later = torch.full((20,), float(s)).double()
        call = replace(call, x_t=ddim(call, later, net).detach(), t=later)
        torch.testing.assert_close(reached, call.x_t, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(path[-1], drawn(net, call).detach())
    sampler.times = [80.0, 1.0]
    assert torch.equal(sampler.rollout(affine(0.5, 0.1, EDM()), noise, None)[0], noise * math.sqrt(1 + 80**2))


class ChannelsLast(nn.Module):
    """A group norm over a map whose channels lie innermost, as attention leaves them, and the time in its input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, 2)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        seen = x + time[:, None, None, None] * x.square()
        normed: Tensor = self.norm(seen.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2))
        return normed


def test_the_derivative_along_a_trajectory_passes_group_norms_and_leaves_nothing_behind() -> None:
    """x = cos(t) x0 + sin(t) eps on the trigonometric schedule, where phi is t; the slope by central difference."""
    torch.manual_seed(0)
    denoiser = Denoiser(ChannelsLast(), Trigonometric(), "x0")
    x0, eps, t = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([0.4, 0.8, 1.2], dtype=torch.float64)

    def at(time: Tensor) -> tuple[Tensor, Tensor]:
        return denoiser.schedule.add_noise(x0, eps, time), time

    value, slope = derivative_along(denoiser, *at(t), x0, None)
    assert not value.requires_grad and not slope.requires_grad
    assert not denoiser.network.norm._forward_pre_hooks  # type: ignore[union-attr]
    with torch.no_grad():
        ahead, behind = (denoiser(*at(t + h)) for h in (1e-3, -1e-3))
        torch.testing.assert_close(value, denoiser(*at(t)), atol=1e-3, rtol=0)
    torch.testing.assert_close(slope, (ahead - behind) / 2e-3, atol=2e-3, rtol=1e-2)


def test_dropped_conditions_become_their_null() -> None:
    """Classes the network's last row; encoded prompts what stands behind "null_", in every tensor alone."""
    drop = torch.tensor([True, False, True])
    network = SimpleNamespace(config=SimpleNamespace(num_class_embeds=5))
    labels = without_condition({"label": torch.tensor([0, 1, 2])}, drop, SimpleNamespace(network=network))  # type: ignore[arg-type]
    assert labels["label"].tolist() == [4, 1, 4]
    own = {"text": torch.ones(3, 2, 4), "pooled": torch.full((3, 4), 2.0)}
    null = {"null_text": torch.zeros(3, 2, 4), "null_pooled": torch.full((3, 4), -1.0)}
    found = without_condition(own | null, drop, SimpleNamespace(network=network))  # type: ignore[arg-type]
    assert set(found) == {"text", "pooled"}
    assert torch.equal(found["text"], torch.tensor([0.0, 1.0, 0.0])[:, None, None].expand(3, 2, 4))
    assert torch.equal(found["pooled"], torch.tensor([-1.0, 2.0, -1.0])[:, None].expand(3, 4))
