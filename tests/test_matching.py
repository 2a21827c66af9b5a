"""Distribution matching and its way back from the student: `dmd2`, `disback` and the losses they share.

Here every term is held against its formula; trainings on exact teachers are in proofs/.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from exact_report import MATCHING, train_on
from mutate import mutated
from torch import Tensor
from trainings import batch_for, iterate, settings, teacher_for

from distillers.data import ImageData, open_data
from distillers.errors import BadInput
from distillers.methods import disback, dmd2
from distillers.methods.disback import DisBack
from distillers.methods.dmd2 import Dmd2
from distillers.models.denoiser import Denoiser
from distillers.models.schedule import Trigonometric
from distillers.teacher import Teacher
from distillers.training import losses
from distillers.training.distiller import Networks, new_student
from distillers.training.losses import Divergence, denoising, diffuse, ratio_weight, sample_student, score_identity
from distillers.training.toy import GaussianMixture, Points, StudentNetwork, energy_distance, exact_teacher, ring
from distillers.training.trainer import begin

TOY = ("layers.3",)  # a layer of the toy network, for heads


@pytest.fixture(scope="module")
def shapes() -> ImageData:
    return open_data("shapes", size=8)


def toy_batch(n: int = 64) -> dict[str, Tensor]:
    return {"x0": ring().sample(n, torch.Generator().manual_seed(0))}


def digest(net: torch.nn.Module) -> str:
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in net.parameters())).hexdigest()


def played(
    method: Any, nets: Networks, batch: dict[str, Tensor], progress: float = 0.9
) -> Iterator[tuple[str, Tensor]]:
    torch.manual_seed(0)
    yield from method.step(nets, batch, progress)


# --- the losses ------------------------------------------------------------------------------------------------------
def test_energy_distance_has_its_closed_form_and_sees_a_lost_mode() -> None:
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(4000, 1, generator=rng), 1 + torch.randn(4000, 1, generator=rng)
    # E|N(m, 2)| = 2 phi(m / sqrt 2) sqrt 2 + m erf(m / 2), for differences of unit Gaussians
    far = 2 * (2 / torch.pi) ** 0.5 * torch.tensor(2.0).sqrt() / 2 * torch.tensor(-0.25).exp() + torch.erf(
        torch.tensor(0.5)
    )
    near = 2 / torch.pi**0.5
    assert energy_distance(a, b) == pytest.approx(float(2 * far - 2 * near), rel=0.1)
    mixture = ring()
    exact = mixture.sample(4000, torch.Generator().manual_seed(1))
    kept = exact[mixture.mode_of(exact) != 0]
    assert energy_distance(exact, mixture.sample(4000, torch.Generator().manual_seed(2))) < 0.002
    assert energy_distance(exact, kept) > 0.01


def ratio_gradient(module: Any, divergence: str) -> tuple[Tensor, float]:
    """d/d(a, b) of a divergence for x = a + b z, through the weighted loss with exact scores and density ratio."""
    a, b, m, s, n = 0.5, 1.2, -0.1, 0.9, 400_000
    z = torch.randn(1, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parameters = torch.tensor([a, b], dtype=torch.float64, requires_grad=True)
    x = parameters[0] + parameters[1] * z
    at = x.detach()
    real, fake = (m - at) / s**2, (a - at) / b**2  # scores, up to a constant the denoised estimates
    log_ratio = ((at - a) / b).square() / 2 - ((at - m) / s).square() / 2 + torch.log(torch.tensor(b / s))
    weight = module.ratio_weight(log_ratio[0], torch.zeros(n), divergence)
    # samples as rows of one element; the normaliser multiplied out again
    size = (x - (at + real)).abs().T.detach()[:, 0]
    module.distribution_matching(x.T, (at + real).T, (at + fake).T, weight * size).backward()
    assert parameters.grad is not None
    return parameters.grad, float(log_ratio.exp().mean())


def test_forward_kl_descends_the_forward_divergence() -> None:
    """KL(N(m, s^2) || N(a, b^2)): d/da = (a - m) / b^2, d/db = 1/b - (s^2 + (m - a)^2) / b^3."""
    a, b, m, s = 0.5, 1.2, -0.1, 0.9
    found, mean_ratio = ratio_gradient(losses, "forward-kl")
    assert mean_ratio == pytest.approx(1, abs=0.01)  # E_student[p / q] = 1, so scaling to mean 1 changes nothing here
    exact = torch.tensor([(a - m) / b**2, 1 / b - (s**2 + (m - a) ** 2) / b**3], dtype=torch.float64)
    torch.testing.assert_close(found, exact, atol=5e-3, rtol=2e-2)
    reverse = ratio_gradient(losses, "reverse-kl")[0]
    assert (reverse - exact).abs().max() > 0.05


def test_the_weights_of_divergences_follow_the_ratio() -> None:
    logits = torch.tensor([-3.0, -1.0, 0.0, 2.0])
    r = logits.exp()
    second_derivatives = {  # of f in the divergence E_student f(r), up to a constant (Xu et al. 2025, table 1)
        "reverse-kl": 1 / r**2,  # f = -ln r
        "forward-kl": 1 / r,  # r ln r
        "jensen-shannon": 1 / (r * (1 + r)),  # r ln r - (1 + r) ln((1 + r) / 2)
        "jeffreys": (1 + r) / r**2,  # (r - 1) ln r
        "squared-hellinger": r**-1.5,  # (1 - sqrt r)^2
        "softened-reverse-kl": 1 / (r**2 * (1 + r)),  # (1 + r) ln((1 + r) / (2 r))
    }
    assert second_derivatives.keys() == set(get_args(Divergence))
    for divergence, second in second_derivatives.items():
        h = second * r**2
        torch.testing.assert_close(ratio_weight(logits, torch.zeros(4), divergence), h / h.mean())  # type: ignore[arg-type]


def test_ratios_are_weighed_among_similar_times() -> None:
    """Eighty samples: ten bins of eight. Where there is little noise the ratios are larger, and count no more."""
    t = torch.rand(80, generator=torch.Generator().manual_seed(0))
    logits = torch.randn(80, generator=torch.Generator().manual_seed(1)) - 6 * t
    weight = ratio_weight(logits, t, "forward-kl")
    for similar in t.argsort().split(8):
        r = logits[similar].exp()
        torch.testing.assert_close(weight[similar], r / r.mean())
    few = ratio_weight(logits[:15], t[:15], "forward-kl")  # too few for two bins
    torch.testing.assert_close(few, logits[:15].exp() / logits[:15].exp().mean())


def test_score_identity_is_its_formula_and_nothing_at_equality() -> None:
    rng = torch.Generator().manual_seed(0)
    x0, real, fake = torch.randn(3, 5, 2, generator=rng)
    w = 1 / (x0 - real).abs().mean(1)
    expected = (w[:, None] * (real - fake) * ((real - x0) - 1.2 * (real - fake))).mean()
    torch.testing.assert_close(score_identity(x0, real, fake, 1.2), expected)
    assert score_identity(x0, real, real, 1.2) == 0


# --- dmd2 ------------------------------------------------------------------------------------------------------------
def exact_nets(method: Any, mixture: GaussianMixture | None = None) -> tuple[Networks, Teacher]:
    teacher = exact_teacher(mixture or ring())
    torch.manual_seed(0)
    return method.networks(teacher), teacher


@pytest.mark.parametrize("loss", ["dmd", "sid"])
def test_a_critic_that_is_the_teacher_leaves_the_student_where_it_is(loss: Any) -> None:
    method = Dmd2(loss=loss, critic_turns=1)
    nets, _ = exact_nets(method)
    nets["critic"] = nets["teacher"]  # the very mixture
    turns = method.step(nets, toy_batch(), 0.5)
    torch.manual_seed(0)
    assert next(turns)[0] == "critic"
    player, value = next(turns)
    value.backward()
    assert player == "student" and abs(float(value)) < 1e-10
    assert all(p.grad is None or p.grad.abs().max() < 1e-8 for p in nets["student"].parameters())


def moved_towards(module: Any, **options: Any) -> float:
    """Change of the samples' mean along x, after one step down the loss, with a critic that knows the student exactly.

    The student draws N(0.8, 0.3^2) in x, the teacher N(-0.2, 0.7^2): x has to fall.
    """
    schedule = Trigonometric()

    def single(mean: float, std: float) -> GaussianMixture:
        return GaussianMixture(torch.tensor([[mean, 0.0]]), torch.tensor([std]), torch.ones(1), schedule)

    class Linear(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean = torch.nn.Parameter(torch.tensor([0.8, 0.0]))

        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            return self.mean + 0.3 * x

    method = module.Dmd2(critic_turns=1, **options)
    nets, _ = exact_nets(method, single(-0.2, 0.7))
    nets["student"] = Denoiser(Linear(), schedule, "x0")
    nets["critic"] = single(0.8, 0.3)
    torch.manual_seed(0)
    *_, (_, value) = module.Dmd2.step(method, nets, toy_batch(2 * 4096), 0.5)
    value.backward()
    return -float(nets["student"].network.mean.grad[0])


@pytest.mark.parametrize("loss", ["dmd", "sid"])
def test_the_student_goes_towards_the_teacher(loss: str) -> None:
    assert moved_towards(dmd2, loss=loss) < -0.02
    swapped = mutated(
        dmd2,
        "score_identity(x, teacher(x_t, t, cond), critic(x_t, t, cond), self.alpha)"
        if loss == "sid"
        else "distribution_matching(x, real, fake, weight)",
        "score_identity(x, critic(x_t, t, cond), teacher(x_t, t, cond), self.alpha)"
        if loss == "sid"
        else "distribution_matching(x, fake, real, weight)",
    )
    assert moved_towards(swapped, loss=loss) > moved_towards(dmd2, loss=loss) + 0.02


OPTIONS: list[dict[str, Any]] = [
    {},
    {"steps": (1, 2, 4), "critic_turns": 3},
    {"loss": "sid"},
    {"gan_weight": 1e-2},
    {"gan_weight": 1e-2, "gan_features": "teacher"},
    {"gan_weight": 1e-2, "divergence": "jensen-shannon"},
    {"gan_weight": 1e-2, "loss": "sid", "gan_features": "teacher"},
    {"pairs": 6, "pair_steps": 2},
    {"network": {"block_out_channels": (4, 8)}},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("task", ["image", "class-to-image"])
def test_every_option_keeps_the_contract(options: dict[str, Any], task: str, shapes: ImageData) -> None:
    """Turns move their own player only, every parameter of it; frozen networks stay."""
    method, teacher = Dmd2(**options), teacher_for(task, shapes)
    nets = method.networks(teacher)
    frozen = {k: digest(nets[k]) for k in ("teacher", "backbone") if k in nets}
    torch.manual_seed(0)
    players = iterate(method, nets, batch_for(teacher, shapes, method.draws(0.5)), 0.5)
    one = ["discriminator"] * ("discriminator" in nets) + ["critic"]
    assert players == one * method.critic_turns + ["student"]
    assert {k: digest(nets[k]) for k in frozen} == frozen
    made = method.generator(nets, teacher).eval()
    assert sorted(made.info.step_times) == sorted(method.steps) and made.info.sampler == "consistency"


def gradients_outside_a_turn(module: Any, **options: Any) -> set[tuple[str, str]]:
    """(whose turn, who else got a gradient)."""
    method = module.Dmd2(critic_turns=2, gan_weight=1e-2, layers=TOY, **options)
    nets, _ = exact_nets(method)
    learners = {k for k in nets if any(p.requires_grad for p in nets[k].parameters())}
    found = set()
    for player, value in played(method, nets, toy_batch()):
        value.backward(retain_graph=True)
        found |= {(player, k) for k in learners - {player} if any(p.grad is not None for p in nets[k].parameters())}
        for k in learners:
            nets[k].zero_grad()
    return found


@pytest.mark.parametrize("options", [{}, {"loss": "sid"}, {"gan_features": "teacher"}], ids=str)
def test_the_critic_learns_from_the_student_and_never_teaches_it(options: dict[str, Any]) -> None:
    assert not gradients_outside_a_turn(dmd2, **options)
    attached = mutated(
        dmd2, "with torch.no_grad():\n                fake_x0", "with torch.enable_grad():\n                fake_x0"
    )
    assert ("critic", "student") in gradients_outside_a_turn(attached, **options)


@pytest.mark.parametrize("kind", [Dmd2, DisBack])
def test_every_turn_has_noise_data_and_conditions_of_its_own(kind: Any, shapes: ImageData) -> None:
    """Three turns of the critic and the student's: four samples, each of other labels, one of them with a gradient."""
    method, teacher = kind(critic_turns=3), teacher_for("class-to-image", shapes)
    nets, asked, seen = method.networks(teacher), list[tuple[bool, Tensor, Tensor]](), list[Tensor]()
    nets["student"].register_forward_hook(
        lambda _, given, made: asked.append((made.requires_grad, given[0], given[2]["label"]))
    )
    nets["critic"].register_forward_hook(lambda _, given, made: seen.append(given[2]["label"]))
    batch = batch_for(teacher, shapes, method.draws(0.5))
    batch["label"] = torch.arange(16)
    assert [player for player, _ in played(method, nets, batch, 0.5)] == ["critic"] * 3 + ["student"]
    assert [learns for learns, *_ in asked] == [False, False, False, True]
    assert torch.cat([label for *_, label in asked]).sort().values.tolist() == list(range(16))
    assert len({tuple(noise.flatten().tolist()) for _, noise, _ in asked}) == 4
    assert [label.tolist() for label in seen] == [label.tolist() for *_, label in asked]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_an_iteration_brings_a_batch_for_every_turn(accumulation: int, shapes: ImageData, tmp_path: Path) -> None:
    """Critic and student each get `train.batch` items, also in parts; DisBack's first stage has the critic alone."""
    chosen, teacher = settings(iterations=4, batch=4, accumulation=accumulation), teacher_for("image", shapes)
    for method, turns in (
        (Dmd2(critic_turns=2), [3] * 4),
        (DisBack(critic_turns=2, record=0.5, back=0.8), [1, 1, 3, 3]),
    ):
        run, sizes = begin(method, teacher, chosen, tmp_path, device="cpu"), list[int]()
        run.nets["student"].register_forward_hook(lambda _, given, made, sizes=sizes: sizes.append(len(given[0])))
        for i, count in enumerate(turns):
            sizes.clear()
            run.iteration(i, shapes)
            assert sizes == [4 // accumulation] * (count * accumulation)
        assert run.dry_run(shapes).turns  # of an early and a late iteration, each with its own batch
        run.close()


def test_pairs_are_the_teachers_and_of_all_classes() -> None:
    mixture = ring()
    pairs = dmd2.Pairs(count=300, steps=40, example=torch.zeros(1, 2), classes=0)
    torch.manual_seed(0)
    noise, x0, cond = pairs(mixture, 64)
    exact = mixture.flow_map(pairs.noise, mixture.schedule.t_max, mixture.schedule.t_min)
    close = (pairs.x0 - exact).square().sum(1).sqrt() < 0.05  # Heun in 40 steps; near a border it may go elsewhere
    assert cond is None and close.double().mean() > 0.9
    kept = pairs.x0.clone()
    again = pairs(mixture, 200)
    assert torch.equal(pairs.x0, kept) and len(again[0]) == 200
    where = [int((pairs.noise == row).all(1).nonzero()[0]) for row in noise]
    assert torch.equal(x0, pairs.x0[where])
    labelled = dmd2.Pairs(count=10, steps=1, example=torch.zeros(1, 2), classes=4)
    assert labelled.label.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]


def test_pairs_tie_a_noise_to_what_the_teacher_makes_of_it() -> None:
    """Alone, without the matching term's pull: the regression's gradient goes to the pairs' pictures."""
    method = Dmd2(pairs=64, pair_steps=10, regression_weight=1.0, critic_turns=1)
    nets, _ = exact_nets(method)
    nets["critic"] = nets["teacher"]
    *_, (_, value) = played(method, nets, toy_batch())
    noise, x0 = nets["pairs"].noise, nets["pairs"].x0
    with torch.no_grad():
        distances = (sample_student(nets["student"], noise) - x0).square().mean(1)
    assert distances.min() <= float(value) <= distances.max() and value > 0.1 * distances.mean()


def test_wrong_fields_of_dmd2_are_refused_by_name(shapes: ImageData) -> None:
    for options, name in (
        ({"steps": ()}, "steps"),
        ({"critic_turns": 0}, "critic_turns"),
        ({"gan_weight": -1.0}, "gan_weight"),
        ({"pairs": -1}, "pairs"),
        ({"divergence": "forward-kl"}, "divergence"),
        ({"divergence": "forward-kl", "gan_weight": 1.0, "loss": "sid"}, "divergence"),
    ):
        with pytest.raises(BadInput) as refused:
            Dmd2(**options)  # type: ignore[arg-type]
        assert refused.value.field == f"dmd2.{name}"
    with pytest.raises(BadInput, match=r"dmd2\.pairs"):
        Dmd2(pairs=4).networks(teacher_for("sar-to-optical", shapes))


# --- what a student starts as ----------------------------------------------------------------------------------------
def test_a_student_starts_as_the_teacher_untrained_or_smaller(shapes: ImageData, tmp_path: Path) -> None:
    teacher = teacher_for("class-to-image", shapes)
    count = sum(p.numel() for p in teacher.denoiser.parameters())
    own = new_student(teacher, None, None, "dmd2")
    assert digest(own) == digest(teacher.denoiser) and all(p.requires_grad for p in own.parameters())
    fresh = new_student(teacher, "untrained", None, "dmd2")
    assert digest(fresh) != digest(own) and sum(p.numel() for p in fresh.parameters()) == count
    small = new_student(teacher, None, {"block_out_channels": (4, 4)}, "dmd2")
    assert sum(p.numel() for p in small.parameters()) < count / 2 and small.prediction == teacher.denoiser.prediction
    Dmd2().generator(Networks({"student": own}), teacher).save_pretrained(tmp_path / "made")
    again = new_student(teacher, str(tmp_path / "made"), None, "dmd2")
    assert all(torch.equal(a.half(), b.half()) for a, b in zip(own.parameters(), again.parameters(), strict=True))
    toy = new_student(exact_teacher(ring()), None, {"width": 32}, "dmd2")
    assert isinstance(toy.network, StudentNetwork) and toy.network.options["width"] == 32


def test_impossible_starts_are_refused(shapes: ImageData, tmp_path: Path) -> None:
    teacher = teacher_for("class-to-image", shapes)
    small = replace(teacher, denoiser=new_student(teacher, None, {"block_out_channels": (4, 4)}, "x").eval())
    Dmd2().generator(Networks({"student": small.denoiser}), small).save_pretrained(tmp_path / "small")
    for start, network, field in (
        (None, {"widths": 3}, "dmd2.network.widths"),
        (None, {"block_out_channels": (5, 5)}, "dmd2.network"),
        (str(tmp_path / "small"), None, "dmd2.start"),
        (str(tmp_path / "small"), {"layers_per_block": 1}, "dmd2.network"),
        (str(tmp_path / "absent"), None, "model"),
    ):
        with pytest.raises(BadInput) as refused:
            new_student(teacher, start, network, "dmd2")
        assert refused.value.field == field


# --- disback ---------------------------------------------------------------------------------------------------------
WALKED = DisBack(nodes=3, record=0.5, back=0.9, start="untrained")


@pytest.fixture(scope="module")
def walked() -> Networks:
    """The networks after the way there and most of the way back."""
    return train_on(exact_teacher(ring()), ring(), WALKED, replace(MATCHING, iterations=600, ema=0.0)).nets


def test_the_path_goes_from_the_teacher_to_the_students_own_score(walked: Networks) -> None:
    """P0 is the teacher bit for bit; along the way the error on the untouched student's samples falls."""
    mixture = ring()
    path, before = walked["path"], exact_teacher(mixture).denoiser
    assert int(path.recorded) == 3
    node = exact_teacher(mixture).denoiser
    vector = torch.cat([p.detach().flatten() for p in before.parameters()])
    assert torch.equal(path.states[0], vector)
    errors = []
    start_of_student = stage_one_student(WALKED)
    for k in range(4):
        path.load(k, node)
        with torch.no_grad():
            torch.manual_seed(1)
            made = sample_student(start_of_student, torch.randn(4000, 2))
            t, x_t = diffuse(mixture.schedule, made)
            errors.append(float(denoising(node, x_t, t, made, None)))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.5 * errors[0], errors


def stage_one_student(method: DisBack) -> Denoiser:
    """The student as `train_on` begins with it."""
    torch.manual_seed(MATCHING.seed)
    student: Denoiser = method.networks(exact_teacher(ring()))["student"]
    return student


def walk(module: Any, **options: Any) -> list[str]:
    """Whom the student is matched to over the training: hashes, "teacher" for the teacher itself."""
    method = module.DisBack(nodes=4, record=0.2, back=0.6, critic_turns=1, **options)
    nets, _ = exact_nets(method)
    seen: list[str] = []
    optimizer = torch.optim.SGD(nets["critic"].parameters(), lr=1e-2)
    for i in range(100):
        student = digest(nets["student"])
        for player, value in played(method, nets, toy_batch(), i / 100):
            if player == "critic":
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
            else:
                target = method.target(nets, i / 100)
                seen.append("teacher" if target is nets["teacher"] else digest(target))
        assert digest(nets["student"]) == student
    return list(dict.fromkeys(seen))


def test_the_way_back_visits_every_node_in_order_and_ends_on_the_teacher() -> None:
    visited = walk(disback)
    assert len(visited) == 4 and visited[-1] == "teacher"  # P3, P2, P1, the teacher
    never = mutated(disback, 'path.load(node, nets["target"])', "pass")
    assert len(walk(never)) < 4  # a target that is never swapped is noticed


def test_stage_one_moves_the_critic_alone() -> None:
    method = DisBack(nodes=2, record=0.5, back=0.8)
    nets, _ = exact_nets(method)
    assert [player for player, _ in played(method, nets, toy_batch(), 0.1)] == ["critic"]
    assert [player for player, _ in played(method, nets, toy_batch(), 0.6)] == ["critic"] * 5 + ["student"]


def test_the_critic_starts_the_way_back_where_its_targets_are_near(walked: Networks) -> None:
    """|critic - target| at the start of stage 2 is far below plain matching's, whose target is the teacher."""
    mixture, target = ring(), exact_teacher(ring()).denoiser
    student, critic = stage_one_student(WALKED), exact_teacher(mixture).denoiser
    walked["path"].load(3, critic)
    walked["path"].load(2, target)
    with torch.no_grad():
        torch.manual_seed(2)
        t, x_t = diffuse(mixture.schedule, sample_student(student, torch.randn(4000, 2)))
        near = (critic(x_t, t) - target(x_t, t)).abs().mean()
        far = (critic(x_t, t) - mixture(x_t, t)).abs().mean()
    assert near < 0.3 * far, (near, far)


def test_the_walk_waits_while_the_gap_falls_and_goes_on_when_it_stays() -> None:
    path = disback.Path(3, StudentNetwork())
    assert int(path.node) == 2
    for i in range(40):
        path.watch(torch.tensor(1.0 / (i + 1)), patience=5)
    assert int(path.node) == 2
    nodes = []
    for _ in range(80):
        path.watch(torch.tensor(0.03), patience=5)
        nodes.append(int(path.node))
    assert nodes[-1] == 0 and nodes == sorted(nodes, reverse=True)
    assert walk(disback, advance="plateau", patience=3)[-1] == "teacher"


def test_the_nodes_stay_on_the_cpu_in_full_precision() -> None:
    method = DisBack(nodes=2)
    nets, _ = exact_nets(method)
    moved = nets.half().to("meta")
    assert moved["student"].network.layers[0].weight.device.type == "meta"
    assert moved["path"].states.device.type == "cpu" and moved["path"].states.dtype == torch.float32


@pytest.mark.parametrize("advance", ["interval", "plateau"])
def test_a_training_that_is_stopped_on_the_way_back_finds_its_node(advance: Any, tmp_path: Path) -> None:
    method = DisBack(nodes=4, record=0.25, back=0.8, critic_turns=1, advance=advance, patience=2)
    mixture = ring()
    chosen = replace(MATCHING, iterations=24, batch=16, checkpoint_every=12)

    def run(folder: str, iterations: range) -> Any:
        (tmp_path / folder).mkdir(exist_ok=True)
        one = begin(method, exact_teacher(mixture), chosen, tmp_path / folder, device="cpu")
        assert one.resume() == iterations.start
        for i in iterations:
            one.iteration(i, Points(mixture))
        one.save(iterations.stop)
        return one

    whole = run("whole", range(24))
    half = run("parts", range(14))
    resumed = run("parts", range(14, 24))
    assert 0 < int(half.nets["path"].loaded) < 4, "stopped inside stage 2"
    for name in ("student", "critic", "target", "path"):
        for a, b in zip(whole.nets[name].state_dict().values(), resumed.nets[name].state_dict().values(), strict=True):
            assert torch.equal(a, b) or (a.isnan().all() and b.isnan().all()), name


def test_wrong_fields_of_disback_are_refused_by_name() -> None:
    for options in ({"record": 0.6, "back": 0.5}, {"record": 0.0}, {"back": 1.0}):
        with pytest.raises(BadInput, match=r"disback\.record, back"):
            DisBack(**options)
    for name in ("nodes", "patience", "critic_turns"):
        with pytest.raises(BadInput, match=f"disback.{name}"):
            DisBack(**{name: 0})  # type: ignore[arg-type]


def test_nothing_here_warns(shapes: ImageData) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for method in (Dmd2(), DisBack()):
            method.networks(teacher_for("image", shapes))
