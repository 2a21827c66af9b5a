"""Discriminators, and the two methods whose student plays against one: who learns in which turn, and from what."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from exact_report import SETTINGS, train_on
from mutate import mutated
from networks import VP, unet
from torch import Tensor, nn
from trainings import batch_for, iterate, teacher_for

from distillers.data import ImageData, open_data
from distillers.errors import BadInput
from distillers.generator import Generator
from distillers.jobs.inputs import load_data, load_teacher
from distillers.jobs.recipe import Recipe
from distillers.methods import adversarial_consistency, refine
from distillers.methods.adversarial_consistency import AdversarialConsistency
from distillers.methods.consistency import Consistency
from distillers.methods.hyper_sd import HyperSD
from distillers.methods.refine import Refine
from distillers.models.codec import PixelUnshuffle
from distillers.models.conditions import Cond
from distillers.models.denoiser import Denoiser
from distillers.models.schedule import EDM
from distillers.teacher import Teacher
from distillers.training.discriminator import Discriminator, Heads, frozen_gradients
from distillers.training.distiller import Networks
from distillers.training.losses import consistency_function, gan_loss, sample_student
from distillers.training.toy import StudentNetwork, exact_teacher, ring
from distillers.training.trainer import Run


@pytest.fixture(scope="module")
def shapes() -> ImageData:
    return open_data("shapes", size=8)


def transformer() -> DiTTransformer2DModel:
    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=3, out_channels=6, num_layers=2, sample_size=8,
        patch_size=4, num_embeds_ada_norm=3, norm_num_groups=4,
    ).eval()  # fmt: skip


# network, layers to read, what must never run
KINDS: dict[str, tuple[Callable[[], nn.Module], list[str], list[str]]] = {
    "unet": (lambda: unet(num_class_embeds=4), ["mid_block"], ["up_blocks.0", "conv_norm_out", "conv_out"]),
    "unet, two layers": (lambda: unet(add_attention=False), ["down_blocks.0", "mid_block"], ["up_blocks.0"]),
    "transformer": (transformer, ["transformer_blocks.0"], ["transformer_blocks.1", "proj_out_2"]),
    "toy": (StudentNetwork, ["layers.3"], ["layers.4", "layers.6"]),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def denoiser_of(kind: str) -> Denoiser:
    return Denoiser(KINDS[kind][0](), VP, "v").eval()


def samples(kind: str, n: int, level: float = 0.0) -> tuple[Tensor, Cond | None]:
    shape = (n, 2) if kind == "toy" else (n, 3, 8, 8)
    x = level + 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return x, None if kind in ("toy", "unet, two layers") else {"label": torch.arange(n) % 3}


def discriminator_of(kind: str, views: int = 1) -> tuple[Denoiser, Discriminator]:
    denoiser = denoiser_of(kind)
    torch.manual_seed(1)
    return denoiser, Discriminator(denoiser, KINDS[kind][1], *samples(kind, 1), views)


# --- the discriminator -----------------------------------------------------------------------------------------------
@each_kind
def test_nothing_of_the_learning_encoder_is_unused_or_the_teachers(kind: str) -> None:
    denoiser, judge = discriminator_of(kind, views=2)
    denoiser.requires_grad_(False)
    x, cond = samples(kind, 4)
    logits = judge(judge.encode(x, torch.tensor(900.0), cond), judge.encode(x.flip(0), torch.tensor(0.0), cond))
    assert logits.shape == (4,) and logits.dtype == torch.float32
    gan_loss(logits, real=True).backward()
    assert all(p.requires_grad and p.grad is not None for p in judge.parameters())
    theirs, ours = dict(denoiser.named_parameters()), dict(judge.encoder.named_parameters())
    assert not {id(p) for p in theirs.values()} & {id(p) for p in ours.values()}
    assert ours and all(torch.equal(p, theirs[name]) for name, p in ours.items()), "it begins as the teacher's own"
    assert not any(name.startswith(f"network.{gone}.") for name in ours for gone in KINDS[kind][2])


@each_kind
def test_it_costs_an_encoder(kind: str) -> None:
    """What comes after the layers is neither kept nor, in the teacher that features are read from, run."""
    _, layers, after = KINDS[kind]
    denoiser, (x, cond) = denoiser_of(kind), samples(kind, 2)
    called = list[str]()
    for name, module in denoiser.network.named_modules():
        module.register_forward_hook(lambda _module, _inputs, _output, name=name: called.append(name))
    denoiser.features(x, torch.tensor(500.0), cond, layers)
    assert called.count(layers[-1]) == 1 and not set(called) & {"", *after}
    with torch.no_grad():
        denoiser(x, torch.tensor(500.0), cond)
    assert set(after) <= set(called)
    _, judge = discriminator_of(kind)
    assert sum(p.numel() for p in judge.encoder.parameters()) < sum(p.numel() for p in denoiser.parameters())


@each_kind
def test_its_views_are_the_teachers_features(kind: str) -> None:
    denoiser, judge = discriminator_of(kind)
    x, cond = samples(kind, 3)
    t = torch.tensor([0.0, 300.0, 999.0])
    with torch.no_grad():
        for ours, theirs in zip(judge.encode(x, t, cond), denoiser.features(x, t, cond, KINDS[kind][1]), strict=True):
            assert torch.equal(ours, theirs)


@each_kind
def test_it_learns_to_tell_real_from_fake(kind: str) -> None:
    _, judge = discriminator_of(kind)
    (real, cond), (fake, _) = samples(kind, 16, 0.5), samples(kind, 16, -0.5)
    optimizer, clean = torch.optim.Adam(judge.parameters(), lr=5e-3), torch.tensor(0.0)

    def logits() -> tuple[Tensor, Tensor]:
        return judge(judge.encode(real, clean, cond)), judge(judge.encode(fake, clean, cond))

    for _ in range(15):
        yes, no = logits()
        optimizer.zero_grad()
        (gan_loss(yes, real=True) + gan_loss(no, real=False)).backward()
        optimizer.step()
    yes, no = logits()
    assert bool((yes > 0).all()) and bool((no < 0).all())


def test_views_are_told_apart() -> None:
    """(a, b) is another question than (b, a): noisy input and candidate are not a set."""
    _, judge = discriminator_of("unet", views=2)
    x, cond = samples("unet", 4)
    a, b = (judge.encode(x, torch.tensor(t), cond) for t in (0.0, 900.0))
    assert not torch.allclose(judge(a, b), judge(b, a))


def test_heads_are_a_logit_for_maps_tokens_and_vectors_alike() -> None:
    examples = [torch.randn(3, 8, 5, 7), torch.randn(3, 6, 10), torch.randn(3, 4), torch.randn(3, 8, 1, 1)]
    heads = Heads([e[:1] for e in examples])
    logits = heads(examples)
    assert logits.shape == (3,)
    each = [head(e).flatten(1).mean(1) for head, e in zip(heads.heads, examples, strict=True)]
    torch.testing.assert_close(logits, torch.stack(each).mean(0))
    alone = heads([e[1:2] for e in examples])
    torch.testing.assert_close(alone, logits[1:2], atol=1e-5, rtol=1e-5)


def test_gradients_are_frozen_for_the_block_only_even_if_it_fails() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    net[0].requires_grad_(False)
    x = torch.randn(3, 2, requires_grad=True)
    with pytest.raises(RuntimeError, match="x"), frozen_gradients(net):
        net(x).sum().backward()
        raise RuntimeError("x")
    assert x.grad is not None and all(p.grad is None for p in net.parameters())
    assert [p.requires_grad for p in net.parameters()] == [False, False, True, True]


# --- layers that are not there ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("layer", ["middle", "", "down_blocks", "mid_block.resnets"])
@pytest.mark.parametrize("kind", [AdversarialConsistency, HyperSD, Refine])
def test_a_layer_that_never_answers_is_refused_by_name(kind: Any, layer: str, shapes: ImageData) -> None:
    """Unknown, or a mere list of modules: such lists have names, and no output."""
    with pytest.raises(BadInput, match="layers"):
        kind(layers=(layer,)).networks(teacher_for("sar-to-optical", shapes))


def test_no_layers_are_refused(shapes: ImageData) -> None:
    for method in (AdversarialConsistency(layers=()), HyperSD(layers=()), Refine(layers=())):
        with pytest.raises(BadInput, match="layers"):
            method.networks(teacher_for("sar-to-optical", shapes))


# --- adversarial consistency -----------------------------------------------------------------------------------------
def test_without_its_adversary_it_is_consistency_bit_for_bit() -> None:
    """The real loop, three iterations on the ring: losses, students, targets."""

    def run(method: Any) -> Run:
        return train_on(exact_teacher(ring()), ring(), method, replace(SETTINGS, iterations=3, warmup=1, batch=64))

    given: dict[str, Any] = dict(points=12, solver="heun", target_decay=0.9)
    plain = run(Consistency(**given, anchored=0.0))
    for options in (dict(adversarial_weight=0.0), dict(adversarial_start=1.0, layers=("layers.3",))):
        ours = run(AdversarialConsistency(**given, **options))
        assert ours.losses["student"] == plain.losses["student"] and set(ours.losses) == {"student"}
        for name in ("student", "target"):
            pairs = zip(ours.nets[name].parameters(), plain.nets[name].parameters(), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
    other = run(AdversarialConsistency(**given, adversarial_start=0.0, adversarial_ramp=0.0, layers=("layers.3",)))
    assert other.losses["student"] != plain.losses["student"] and "discriminator" in other.losses


@pytest.mark.parametrize("task", ["class-to-image", "sar-to-optical"])
def test_without_its_adversary_it_is_consistency_on_pictures_too(task: str, shapes: ImageData) -> None:
    teacher = teacher_for(task, shapes)
    batch, students = batch_for(teacher, shapes), []
    for method in (AdversarialConsistency(adversarial_weight=0.0), Consistency(points=50, solver="ddim", anchored=0.0)):
        nets = method.networks(teacher)
        torch.manual_seed(0)
        for i in range(3):
            assert iterate(method, nets, batch, i / 3) == ["student"]
        students.append(nets["student"])
    assert all(torch.equal(a, b) for a, b in zip(*(s.parameters() for s in students), strict=True))


def touched(net: nn.Module) -> bool:
    return any(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("name", ["adversarial_consistency", "refine"])
def test_each_turn_leaves_the_other_player_alone(name: str, shapes: ImageData) -> None:
    teacher = teacher_for("sar-to-optical", shapes)
    method: Any = {"adversarial_consistency": AdversarialConsistency, "refine": Refine}[name]()
    nets, players = method.networks(teacher), []
    for player, loss in method.step(nets, batch_for(teacher, shapes), 0.9):
        loss.backward()
        assert {k for k in nets if touched(nets[k])} == {player}
        assert all(p.requires_grad for p in nets["discriminator"].parameters())
        nets.zero_grad()
        players.append(player)
    assert players == ["discriminator", "student"]


@pytest.mark.parametrize("name", ["adversarial_consistency", "refine"])
def test_the_student_is_pulled_to_where_the_judge_says_real(name: str, shapes: ImageData) -> None:
    """The sign of the adversarial term: what it adds to the student's gradient lowers softplus(-D)."""
    teacher = teacher_for("sar-to-optical", shapes)
    module: Any = {"adversarial_consistency": adversarial_consistency, "refine": refine}[name]
    kind: Any = {"adversarial_consistency": "AdversarialConsistency", "refine": "Refine"}[name]
    batch = batch_for(teacher, shapes)
    torch.manual_seed(3)
    nets = getattr(module, kind)().networks(teacher)

    def student_loss(weight: float, source: Any = module) -> Tensor:
        torch.manual_seed(0)
        method = getattr(source, kind)(adversarial_weight=weight)
        return next(loss for player, loss in method.step(nets, batch, 0.9) if player == "student")

    gradient = [
        torch.autograd.grad(student_loss(w), list(nets["student"].parameters()), allow_unused=True) for w in (1.0, 2.0)
    ]
    opinion = student_loss(2.0) - student_loss(1.0)
    with torch.no_grad():
        for p, one, two in zip(nets["student"].parameters(), *gradient, strict=True):
            p -= 1e-3 * (two - one)
        assert student_loss(2.0) - student_loss(1.0) < opinion
        mirrored = mutated(
            module,
            "gan_loss(fake_logits, real=True)",
            "gan_loss(fake_logits, real=False)",
        )
        assert student_loss(1.0, mirrored) != student_loss(1.0)


def test_real_is_the_picture_or_the_targets_answer(shapes: ImageData) -> None:
    teacher = teacher_for("sar-to-optical", shapes)
    batch = batch_for(teacher, shapes)
    torch.manual_seed(3)
    nets = AdversarialConsistency().networks(teacher)

    def judges_loss(real: str, source: Any = adversarial_consistency) -> Tensor:
        torch.manual_seed(0)
        return next(source.AdversarialConsistency(real=real).step(nets, batch, 0.9))[1].detach()

    # by hand: the same draws
    student, schedule, clean = nets["student"], VP, torch.tensor(0.0)
    torch.manual_seed(0)
    x0, cond = batch["x0"], {"sar": batch["sar"]}
    eps = torch.randn_like(x0)
    t, s = adversarial_consistency.neighbours(schedule, 50, len(x0), x0.device)
    x_t = schedule.add_noise(x0, eps, t)
    judge = nets["discriminator"]
    with torch.no_grad():
        y = consistency_function(nets["target"], schedule.step(x_t, nets["teacher"](x_t, t, cond), t, s), s, cond)
        made = consistency_function(student, x_t, t, cond)
        given = judge.encode(x_t, t, cond)
        fake = gan_loss(judge(given, judge.encode(made, clean, cond)), real=False)
        expected = {
            k: fake + gan_loss(judge(given, judge.encode(v, clean, cond)), real=True)
            for k, v in (("data", x0), ("target", y))
        }
    assert abs(float(expected["data"] - expected["target"])) > 1e-4
    for real, loss in expected.items():
        torch.testing.assert_close(judges_loss(real), loss, atol=1e-5, rtol=0)
    swapped = mutated(adversarial_consistency, 'x0 if self.real == "data" else y', 'y if self.real == "data" else x0')
    torch.testing.assert_close(judges_loss("data", swapped), expected["target"], atol=1e-5, rtol=0)


def test_the_judge_enters_late_and_rises(shapes: ImageData) -> None:
    teacher = teacher_for("image", shapes)
    method = AdversarialConsistency(adversarial_start=0.5, adversarial_ramp=0.2)
    nets, batch = method.networks(teacher), batch_for(teacher, shapes)
    for progress, players in ((0.0, ["student"]), (0.5, ["student"]), (0.51, ["discriminator", "student"])):
        assert iterate(method, nets, batch, progress) == players


class Fixed(nn.Module):
    """A network that answers one thing."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = nn.Parameter(answer)

    def forward(self, x: Tensor, time: Tensor, **cond: Any) -> Tensor:
        return self.answer


def test_the_colour_term_sees_a_cast_only(shapes: ImageData) -> None:
    teacher = teacher_for("image", shapes)
    batch = batch_for(teacher, shapes)
    nets = AdversarialConsistency(adversarial_weight=0.0).networks(teacher)

    def colour(answer: Tensor) -> float:
        nets["student"] = Denoiser(Fixed(answer), VP, "x0")
        losses = []
        for weight in (0.0, 1.0):
            torch.manual_seed(0)
            method = AdversarialConsistency(adversarial_weight=0.0, colour_weight=weight, colour_pixels=8)
            losses.append(float(next(method.step(nets, batch, 0.9))[1].detach()))
        return losses[1] - losses[0]

    x0 = batch["x0"]
    assert colour(x0) == pytest.approx(0, abs=1e-4)
    assert colour(x0 + 0.5) == pytest.approx(0.25, rel=0.05)  # a time at t_min in four draws would answer x_t
    assert colour(x0.roll((1, 1), (2, 3))) == pytest.approx(0, abs=1e-4), "8 px squares of 8 px pictures"


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"points": 1}, "points"),
        ({"colour_pixels": 0}, "colour_pixels"),
        ({"target_decay": 1.0}, "target_decay"),
        ({"steps": ()}, "steps"),
        ({"adversarial_weight": -1.0}, "adversarial_weight"),
        ({"colour_weight": -1.0}, "colour_weight"),
    ],
)
def test_wrong_fields_are_refused_by_name(options: dict[str, Any], field: str) -> None:
    with pytest.raises(BadInput) as refused:
        AdversarialConsistency(**options)
    assert refused.value.field.startswith("adversarial_consistency.") and field in refused.value.field


# --- refine ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("schedule", [VP, EDM()], ids=["vp", "edm"])
def test_what_is_judged_is_what_is_served(schedule: Any, shapes: ImageData) -> None:
    """A draw that ends at the sampler's last call is the generator's picture from the same noise, with a gradient."""
    teacher = teacher_for("sar-to-optical", shapes)
    teacher.denoiser.schedule = schedule
    method = Refine(steps=(1, 2, 4))
    nets = method.networks(teacher)
    cond = {"sar": batch_for(teacher, shapes)["sar"]}
    noise = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    generator, seen = method.generator(nets, teacher), set()
    for seed in range(40):
        torch.manual_seed(seed)
        k = method.steps[int(torch.randint(3, ()))]
        last = int(torch.randint(k, ()))
        torch.manual_seed(seed)
        made = sample_student(nets["student"], noise, cond, method.steps)
        assert made.requires_grad
        if last < k - 1:
            continue
        torch.manual_seed(seed)
        torch.randint(3, ()), torch.randint(k, ())
        with torch.no_grad():
            torch.testing.assert_close(made.detach(), generator(noise, cond, steps=k), atol=1e-5, rtol=1e-5)
        seen.add(k)
    assert seen == {1, 2, 4}


def test_refines_judge_calls_the_picture_real_and_the_draw_fake(shapes: ImageData) -> None:
    teacher = teacher_for("sar-to-optical", shapes)
    batch = batch_for(teacher, shapes)
    torch.manual_seed(3)
    nets, method, cond = Refine().networks(teacher), Refine(), {"sar": batch["sar"]}
    torch.manual_seed(0)
    player, loss = next(method.step(nets, batch, 0.9))
    torch.manual_seed(0)
    judge, made = (
        nets["discriminator"],
        sample_student(nets["student"], torch.randn_like(batch["x0"]), cond, method.steps),
    )
    fake, real = (judge(judge.encode(x, torch.tensor(0.0), cond)) for x in (made, batch["x0"]))
    assert player == "discriminator" and abs(float((real - fake).mean().detach())) > 1e-4
    torch.testing.assert_close(loss, gan_loss(fake, real=False) + gan_loss(real, real=True), atol=1e-6, rtol=0)


def refine_loss(made: Tensor, truth: Tensor, shapes: ImageData, **options: Any) -> float:
    """The student's loss when it draws `made`, without the judges that are not named."""
    teacher = teacher_for("sar-to-optical", shapes)
    weights = dict(pixel_weight=0.0, perceptual_weight=0.0, frequency_weight=0.0, adversarial_weight=0.0)
    method = Refine(**{**weights, **options})
    nets = method.networks(teacher)
    nets["student"] = Denoiser(Fixed(made), VP, "x0")
    sar = batch_for(teacher, shapes)["sar"][: len(truth)]
    return float(next(method.step(nets, {"x0": truth, "sar": sar}, 0.9))[1].detach())


@pytest.mark.parametrize("judge", ["pixel_weight", "perceptual_weight", "frequency_weight"])
def test_a_pair_that_is_a_pixel_off_is_no_fault(judge: str, shapes: ImageData) -> None:
    truth = torch.zeros(2, 3, 8, 8)
    truth[:, :, 3:5, 3:5] = torch.tensor([1.0, -0.5, 0.3])[:, None, None]  # away from the edges
    off = truth.roll((1, -2), (2, 3))
    assert refine_loss(truth, truth, shapes, **{judge: 1.0}) == pytest.approx(0, abs=1e-6)
    assert refine_loss(off, truth, shapes, **{judge: 1.0}, shift=2) == pytest.approx(0, abs=1e-6)
    assert refine_loss(off, truth, shapes, **{judge: 1.0}, shift=0) > 0.01
    assert refine_loss(0 * truth, truth, shapes, **{judge: 1.0}, shift=2) > 0.01


def test_the_terms_of_refine_add_up_with_their_weights(shapes: ImageData) -> None:
    truth = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    made = truth.roll(3, 3)
    each = {
        w: refine_loss(made, truth, shapes, **{w: 1.0})
        for w in ("pixel_weight", "perceptual_weight", "frequency_weight")
    }
    assert all(value > 0.01 for value in each.values())
    whole = refine_loss(made, truth, shapes, pixel_weight=1.0, perceptual_weight=5.0, frequency_weight=10.0)
    assert whole == pytest.approx(sum(w * v for w, v in zip((1, 5, 10), each.values(), strict=True)), rel=1e-4)


def test_refine_is_for_pairs_only(shapes: ImageData, tmp_path: Path) -> None:
    teacher = teacher_for("class-to-image", shapes)
    Generator(teacher.denoiser, PixelUnshuffle(1), teacher.info).save_pretrained(tmp_path / "teacher")
    recipe = Recipe.from_table(
        {"name": "x", "method": "refine", "teacher": str(tmp_path / "teacher"), "data": {"kind": "shapes", "size": 8}}
    )
    with pytest.raises(BadInput, match=r"teacher: .*class-to-image.*sar-to-optical"):
        load_teacher(recipe, load_data(recipe))


@pytest.mark.parametrize("field", ["pixel_weight", "adversarial_ramp", "shift"])
def test_wrong_weights_of_refine_are_refused_by_name(field: str) -> None:
    with pytest.raises(BadInput, match=rf"refine\.{field}"):
        Refine(**{field: -1})


def test_refines_teacher_is_what_it_started_as(shapes: ImageData) -> None:
    """The perceptual judge is the frozen start, not the student: it must not bend with the student."""
    teacher = teacher_for("sar-to-optical", shapes)
    method = Refine()
    nets: Networks = method.networks(teacher)
    assert nets["teacher"] is teacher.denoiser and isinstance(teacher, Teacher)
    before = [p.clone() for p in teacher.denoiser.parameters()]
    assert iterate(method, nets, batch_for(teacher, shapes), 0.9) == ["discriminator", "student"]
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.denoiser.parameters(), strict=True))
