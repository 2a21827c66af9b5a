"""One base, many roles: adapters on a shared network learn what separate networks with the same adapters learn."""

import copy
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import describe, transformer, untrained
from stock_pipelines import build
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError, checkpoint
from trainings import digest, same, settings, teacher_for, values

from distillers.data import ImageData, open_data
from distillers.errors import BadInput
from distillers.generator import Generator
from distillers.jobs.distill import distill
from distillers.jobs.recipe import Recipe
from distillers.methods.adversarial_consistency import AdversarialConsistency
from distillers.methods.boot import Boot
from distillers.methods.consistency import Consistency
from distillers.methods.disback import DisBack
from distillers.methods.dmd2 import Dmd2
from distillers.methods.hyper_sd import HyperSD
from distillers.methods.multi_student import MultiStudent
from distillers.methods.pso import Pso
from distillers.methods.refine import Refine
from distillers.methods.scm import ContinuousConsistency
from distillers.models.captions import pack
from distillers.models.checkpointing import checkpoint_gradients
from distillers.models.conditions import Cond
from distillers.models.denoiser import Denoiser
from distillers.models.lora import Adapted, AdapterBase, LoraSettings, add_lora, fused, lora_state, plain
from distillers.teacher import Teacher
from distillers.training import trainer
from distillers.training.distiller import Batch, Distiller, Networks, follow, on_one_base, slow_copy, trainable_copy
from distillers.training.head import StudentSettings, head_of
from distillers.training.toy import exact_teacher, ring
from distillers.training.trainer import Run
from distillers.weights.manifest import Info

RANK = LoraSettings(rank=4, alpha=6)
DIT = ("transformer_blocks.0",)
UNET_METHODS: dict[str, tuple[Distiller, float]] = {
    "consistency": (Consistency(anchored=0.25), 0.5),
    "consistency, without a target network": (Consistency(target_decay=0, solver="ddim"), 0.5),
    "tuning": (Consistency(source="data"), 0.5),
    "adversarial consistency": (AdversarialConsistency(colour_weight=0.1, guidance_scale=2), 0.9),
    "scm": (ContinuousConsistency(), 0.5),
    "scm, exact derivative": (ContinuousConsistency(tangent_step=0), 0.5),
    "boot": (Boot(guidance_scale=2), 0.5),
    "dmd2": (Dmd2(critic_turns=2, steps=(1, 2), guidance_scale=3), 0.5),
    "dmd2, adversarial": (Dmd2(critic_turns=1, gan_weight=0.01), 0.5),
    "dmd2, of the teacher's features": (Dmd2(critic_turns=1, gan_weight=0.01, gan_features="teacher"), 0.5),
    "dmd2, score identity": (Dmd2(critic_turns=1, loss="sid"), 0.5),
    "dmd2, pairs": (Dmd2(critic_turns=1, pairs=4, pair_steps=2), 0.5),
    "disback, degradation": (DisBack(critic_turns=1), 0.05),
    "disback, on the path": (DisBack(critic_turns=1, nodes=3), 0.15),
    "disback, the teacher": (DisBack(critic_turns=1), 0.8),
    "hyper-sd": (HyperSD(), 0.3),
    "hyper-sd, last stage": (HyperSD(score_weight=0.5, critic_turns=1), 0.8),
    "multi-student": (MultiStudent(base="dmd2", options={"critic_turns": 1}), 0.5),
    "pso": (Pso(steps=2), 0.5),
    "pso, online": (Pso(mode="online", steps=2, reward="test_roles:brightness"), 0.5),
    "pso, personalise": (Pso(mode="personalise", steps=2), 0.5),
    "pso, finetune": (Pso(mode="finetune", steps=2), 0.5),
    "refine": (Refine(), 0.5),
}
DIT_METHODS: dict[str, tuple[Distiller, float]] = {
    "consistency": (Consistency(guidance_scale=2), 0.5),
    "dmd2, adversarial": (Dmd2(critic_turns=1, gan_weight=0.01, layers=DIT), 0.5),
    "adversarial consistency": (AdversarialConsistency(layers=DIT), 0.9),
    "hyper-sd": (HyperSD(layers=DIT, score_weight=0.5, critic_turns=1), 0.8),
    "scm, exact derivative": (ContinuousConsistency(tangent_step=0), 0.5),
}
CASES = [("unet", name) for name in UNET_METHODS] + [("transformer", name) for name in DIT_METHODS]


def brightness(pictures: Tensor, cond: Cond | None) -> Tensor:
    return pictures.flatten(1).mean(1)


def teacher_of(kind: str, method: Distiller) -> Teacher:
    """A frozen tiny teacher of the method's task, with attention; PSO's is a few-step student."""
    task = "sar-to-optical" if isinstance(method, Refine) else "class-to-image"
    info = describe(task, "consistency" if isinstance(method, Pso) else "ddim")
    made = (untrained if kind == "unet" else transformer)(info)
    assert isinstance(made.denoiser, Denoiser)
    return Teacher(made.denoiser.eval().requires_grad_(False), made.codec.requires_grad_(False), made.info)


def batch_for(teacher: Teacher, draws: int) -> Batch:
    torch.manual_seed(5)
    count = 4 * draws
    shape = teacher.example()[0].shape[1:]
    batch = {"x0": torch.randn(count, *shape).clamp(-1, 1)}
    if teacher.prompts is not None:
        texts = pack([f"a picture of {i}" for i in range(count)])
        batch |= teacher.condition.encode_items({"caption": texts}, "cpu")
    elif teacher.info.labels:
        batch["label"] = torch.arange(count) % len(teacher.info.labels)
    else:
        batch["sar"] = torch.randn(count, 1, *shape[1:]).clamp(-1, 1)
    return batch


def roles(nets: nn.Module) -> list[Adapted]:
    return [module for module in nets.modules() if isinstance(module, Adapted)]


def begin(stock: Teacher, method: Distiller, settings: LoraSettings = RANK) -> tuple[Teacher, Networks]:
    """A method's networks on one base, where every adapter has learnt something."""
    teacher = on_one_base(stock, settings)
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nets = method.networks(teacher)
    with torch.no_grad():
        for role in roles(nets):
            for parameter in role.parameters():
                parameter.normal_(std=0.1)
    return teacher, nets


def separate(nets: Networks, network: nn.Module) -> Networks:
    """The same networks, where every role has a copy of the base to itself: no adapter is ever switched."""
    twins = copy.deepcopy(nets)
    for own, twin in zip(nets.modules(), twins.modules(), strict=True):
        if isinstance(twin, Denoiser) and isinstance(own, Denoiser) and isinstance(own.network, Adapted):
            base = AdapterBase(copy.deepcopy(network), own.network.base.settings)
            role = Adapted(base, base.add() if own.network.name else None)
            for parameter, given in zip(role.parameters(), own.network.parameters(), strict=True):
                parameter.data, parameter.requires_grad = given.detach().clone(), given.requires_grad
            twin.network = role.train(own.network.training)
    assert len({id(role.base) for role in roles(twins)}) == len(roles(twins))
    return twins


def gradients(method: Distiller, nets: Networks, batch: Batch, progress: float) -> list[tuple[str, float, Tensor]]:
    """Player, loss and gradient of every turn of one iteration; nobody moves."""
    torch.manual_seed(2)
    turns = []
    for player, loss in method.step(nets, batch, progress):
        nets.zero_grad()
        loss.backward()
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in nets[player].parameters()]
        turns.append((player, float(loss.detach()), torch.cat([g.flatten() for g in found])))
    return turns


def compare(kind: str, name: str, checkpointing: bool) -> None:
    method, progress = (UNET_METHODS if kind == "unet" else DIT_METHODS)[name]
    agree(teacher_of(kind, method), method, progress, checkpointing)


def agree(stock: Teacher, method: Distiller, progress: float, checkpointing: bool) -> None:
    """Turns on a shared base are those of separate networks, and the base stays as it is."""
    network = copy.deepcopy(stock.denoiser.network)
    teacher, nets = begin(stock, method)
    assert {id(role.base.network) for role in roles(nets)} == {id(plain(teacher.denoiser.network))}
    batch, before = batch_for(teacher, method.draws(progress)), base_digest(teacher)
    expected = gradients(method, separate(nets, network), batch, progress)
    if checkpointing:
        checkpoint_gradients(module.network for module in nets.modules() if isinstance(module, Denoiser))
    found = gradients(method, nets, batch, progress)
    assert [turn[0] for turn in found] == [turn[0] for turn in expected]
    for (player, loss, gradient), (_, expected_loss, wanted) in zip(found, expected, strict=True):
        assert abs(loss - expected_loss) <= 1e-6 * max(1, abs(expected_loss)), player
        assert wanted.abs().max() > 0 and wanted.isfinite().all(), player
        assert (gradient - wanted).norm() <= 1e-6 * wanted.norm(), player
    assert base_digest(teacher) == before


def base_digest(teacher: Teacher) -> str:
    """The digest of the frozen base, without the adapters on it."""
    bare = fused(Adapted(teacher.initial.network.base))  # type: ignore[union-attr,arg-type]
    return digest(bare)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_shared_base_gives_the_gradients_of_separate_networks(kind: str, name: str, checkpointing: bool) -> None:
    compare(kind, name, checkpointing)


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux", "pixart", "sana"])
def test_every_family_gives_the_gradients_of_separate_networks(family: str, tmp_path: Path) -> None:
    """Whose blocks are called in other ways: recomputed, under the words of a prompt."""
    build(family, tmp_path / family)
    stock = Teacher.from_pretrained(tmp_path / family)
    stock = replace(stock, info=replace(stock.info, size=(16, 16)))
    agree(stock, Dmd2(critic_turns=1, gan_weight=0.01, guidance_scale=2), 0.5, checkpointing=True)


@pytest.mark.parametrize("name", ["dmd2", "hyper-sd, last stage", "disback, on the path", "consistency"])
def test_with_torchs_own_recomputation_the_gradients_are_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the cure is for: blocks that are recomputed under another adapter, or under none."""
    monkeypatch.setattr(
        "distillers.models.checkpointing._recomputed",
        lambda base, learners: lambda block, *inputs: checkpoint(block, *inputs, use_reentrant=False),
    )
    with pytest.raises((AssertionError, CheckpointError, RuntimeError)):
        compare("unet", name, checkpointing=True)


def test_recomputed_under_another_role_a_gradient_is_silently_wrong_without_the_cure() -> None:
    """The critic acts while the student's loss goes backward: all shapes fit, and nothing complains."""
    found = {}
    for exact in (None, True, False):
        torch.manual_seed(0)
        base = AdapterBase(teacher_of("unet", Consistency()).denoiser.network, RANK)
        student, critic = (Adapted(base, base.add()) for _ in range(2))
        for role in (student, critic):
            for parameter in role.parameters():
                nn.init.normal_(parameter, std=0.1)
        if exact:
            checkpoint_gradients([student, critic])
        elif exact is False:
            base.network.enable_gradient_checkpointing()  # type: ignore[operator]
        loss = student(torch.randn(2, 3, 16, 16), 500, class_labels=torch.tensor([0, 1])).sample.square().mean()
        with base.acting([str(critic.name)]):
            loss.backward()
        lost = [torch.zeros_like(p) if p.grad is None else p.grad for p in student.parameters()]
        found[exact] = torch.cat([gradient.flatten() for gradient in lost])
    assert (found[True] - found[None]).norm() <= 1e-6 * found[None].norm()
    assert (found[False] - found[None]).norm() > 0.1 * found[None].norm()


@pytest.mark.parametrize("name", ["dmd2, adversarial", "dmd2, score identity", "adversarial consistency"])
def test_whole_networks_are_recomputed_exactly_too(name: str) -> None:
    """A critic is frozen while the student's loss is built, and learns again before it goes backward."""
    method, progress = UNET_METHODS[name]
    turns = []
    for checkpointing in (False, True):
        teacher = teacher_of("unet", method)
        torch.manual_seed(1)
        nets = method.networks(teacher)
        if checkpointing:
            checkpoint_gradients(module.network for module in nets.modules() if isinstance(module, Denoiser))
        turns.append(gradients(method, nets, batch_for(teacher, method.draws(progress)), progress))
    for (player, _, found), (_, _, wanted) in zip(*turns, strict=True):
        assert (found - wanted).norm() <= 1e-6 * wanted.norm(), player


# --- a role


@pytest.mark.parametrize("kind", ["unet", "transformer"])
def test_a_role_is_a_network_with_pefts_own_adapter(kind: str) -> None:
    method = Consistency()
    stock = teacher_of(kind, method).denoiser.network
    base = AdapterBase(copy.deepcopy(stock), RANK)
    other, role = (Adapted(base, base.add()) for _ in range(2))
    add_lora(stock, RANK)
    own = [parameter for parameter in stock.parameters() if parameter.requires_grad]
    for parameter, twin in zip(role.parameters(), own, strict=True):
        nn.init.normal_(parameter, std=0.1)
        twin.data = parameter.detach().clone()
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    channels: Any = role.config.in_channels
    given: Any = dict(class_labels=torch.tensor([0, 2]), timestep=torch.tensor([7, 800]))
    x = torch.randn(2, channels, role.config.sample_size, role.config.sample_size)
    answers = [net(x, **given).sample for net in (role, stock)]
    assert torch.equal(*answers)
    for answer in answers:
        answer.square().mean().backward()
    assert all(torch.equal(p.grad, twin.grad) for p, twin in zip(role.parameters(), own, strict=True))
    assert all(p.grad is None for p in other.parameters())
    theirs, ours = lora_state(stock), lora_state(role)
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[key], ours[key]) for key in ours)


def test_copies_averages_and_states_are_of_adapters_alone() -> None:
    teacher, nets = begin(teacher_of("unet", Dmd2()), Dmd2())
    student = nets["student"]
    learning = list(student.parameters())
    assert {id(p) for p in learning} == {id(p) for p in student.parameters() if p.requires_grad}
    assert sum(p.numel() for p in learning) < sum(p.numel() for p in plain(student.network).parameters()) / 3
    average = slow_copy(student)
    assert not any(p.requires_grad for p in average.parameters()) and all(p.requires_grad for p in learning)
    start = [p.detach().clone() for p in learning]
    with torch.no_grad():
        for parameter in learning:
            parameter.add_(1)
    follow(average, student, 0.75)
    for slow, before in zip(average.parameters(), start, strict=True):
        torch.testing.assert_close(slow, before + 0.25)
    assert average.state_dict().keys() == student.state_dict().keys()
    assert all(".adapter." in key for key in student.state_dict())
    twin = trainable_copy(teacher.denoiser)
    twin.load_state_dict(student.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), learning, strict=True))
    assert not list(nets["teacher"].parameters())


def test_a_half_precision_base_carries_adapters_of_full_precision() -> None:
    teacher, nets = begin(teacher_of("unet", Dmd2()), Dmd2(critic_turns=1), LoraSettings(rank=4, base="bf16"))
    base = plain(teacher.denoiser.network)
    assert {p.dtype for name, p in base.named_parameters() if ".lora_" not in name} == {torch.bfloat16}
    assert {p.dtype for p in nets["student"].parameters()} == {torch.float32}
    turns = gradients(Dmd2(critic_turns=1), nets, batch_for(teacher, 2), 0.5)
    assert all(gradient.dtype == torch.float32 and gradient.abs().max() > 0 for _, _, gradient in turns)
    assert next(fused(nets["student"].network).parameters()).dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"rank": 0}, "lora.rank"),
        ({"rank": 9}, "lora.rank"),  # the first block is 8 wide
        ({"alpha": 0.0}, "lora.alpha"),
        ({"targets": ("to_q", "to_nothing")}, "lora.targets"),
        ({"rank": 17, "targets": ("to_q",)}, "lora.rank"),
    ],
)
def test_what_is_no_adapter_is_refused(options: dict[str, Any], named: str) -> None:
    network = teacher_of("unet", Consistency()).denoiser.network
    with pytest.raises(BadInput) as refused:
        add_lora(network, LoraSettings(**options))
    assert refused.value.field == named
    assert not hasattr(network, "peft_config")


def test_targets_are_the_layers_whose_names_end_so() -> None:
    base = AdapterBase(teacher_of("unet", Consistency()).denoiser.network, LoraSettings(rank=2, targets=("to_q",)))
    state = lora_state(Adapted(base, base.add()))
    assert state and all(".to_q.lora_" in key for key in state)


@pytest.mark.parametrize(
    ("method", "named"),
    [
        (Consistency(guidance_range=(1, 2)), "guidance_range"),
        (Dmd2(start="untrained"), "lora"),
        (Dmd2(network={"layers_per_block": 2}), "lora"),
    ],
)
def test_a_student_that_is_another_network_is_no_adapter(method: Distiller, named: str) -> None:
    with pytest.raises(BadInput, match=named):
        method.networks(on_one_base(teacher_of("unet", method), RANK))


# --- trainings


@pytest.fixture(scope="module")
def data() -> ImageData:
    return open_data("shapes", size=8)


def trained(method: Distiller, folder: Path, iterations: range, data: ImageData, **changes: Any) -> Run:
    """A training on a shared base from one iteration to another, saved at its end."""
    teacher = on_one_base(teacher_for("class-to-image", data), LoraSettings(rank=2))
    folder.mkdir(exist_ok=True)
    chosen = settings(iterations=6, checkpointing=True, ema=0.9, learning_rate=1e-2, **changes)
    run = trainer.begin(method, teacher, chosen, folder, device="cpu")
    before = digest(fused(teacher.denoiser.network))
    assert run.resume() == iterations.start
    for i in iterations:
        run.iteration(i, data)
    run.save(iterations.stop)
    assert digest(fused(teacher.denoiser.network)) == before, "the base has changed"
    return run


@pytest.mark.parametrize(
    "method",
    [
        AdversarialConsistency(adversarial_start=0),
        Dmd2(critic_turns=1, gan_weight=0.01),
        DisBack(critic_turns=1, nodes=2),
        HyperSD(segments=(2, 1), adversarial_weights=(0.1, 0.1), score_weight=0.5, critic_turns=1),
        Pso(steps=2),
    ],
    ids=lambda method: type(method).__name__,
)
def test_a_training_stores_adapters_alone_and_goes_on_with_the_same_bits(
    method: Distiller, data: ImageData, tmp_path: Path
) -> None:
    whole = trained(method, tmp_path / "whole", range(6), data)
    trained(method, tmp_path / "parts", range(3), data)
    parts = trained(method, tmp_path / "parts", range(3, 6), data)
    for name in whole.nets:
        assert same(values(whole.nets[name]), values(parts.nets[name])), name
    assert same(values(whole.averages["student"]), values(parts.averages["student"]))
    assert not same(values(whole.nets["student"]), values(whole.averages["student"]))
    stored = torch.load(tmp_path / "whole" / "checkpoints" / "00000006" / "state.pt", weights_only=True)
    base = {tuple(v.shape) for v in plain(whole.teacher.denoiser.network).state_dict().values()}
    for group in ("nets", "averages"):
        for name, state in stored[group].items():
            denoisers = {key for key in state if "network." in key}
            assert all(".adapter." in key for key in denoisers), (name, denoisers)
    student = sum(value.numel() for value in stored["nets"]["student"].values())
    assert student == sum(p.numel() for p in whole.nets["student"].parameters()) and base
    assert "teacher" not in stored["nets"] and "reference" not in stored["nets"]


def test_a_recipe_says_that_all_that_learns_is_an_adapter(data: ImageData, tmp_path: Path) -> None:
    base = teacher_for("class-to-image", data)
    Generator(base.denoiser, base.codec, base.info).save_pretrained(tmp_path / "tiny")
    table: dict[str, Any] = {
        "name": "adapted",
        "method": "dmd2",
        "teacher": str(tmp_path / "tiny"),
        "lora": {"rank": 2, "alpha": 4.0},
        "data": {"kind": "shapes", "size": 8},
        "dmd2": {"critic_turns": 1},
        "train": {"iterations": 2, "batch": 4, "warmup": 0, "samples": 2, "checkpointing": True},
    }
    recipe = Recipe.from_table(table)
    assert recipe.table() == table and recipe.lora_settings() == LoraSettings(rank=2, alpha=4)
    distill(recipe, tmp_path / "adapted", device="cpu")
    info = Info.read(tmp_path / "adapted")
    assert info.lora and info.lora.rank == 2
    opened, teacher = (Generator.from_pretrained(tmp_path / name) for name in ("adapted", "tiny"))
    pictures = opened.sample([0], labels=[1])
    assert pictures.isfinite().all()
    assert not torch.equal(pictures, teacher.sample([0], labels=[1], steps=2))
    # the student keeps its teacher's head, and its place in the manifest
    assert opened.denoiser.prediction == "v" and info.teacher == "tiny"


@pytest.mark.parametrize(
    ("method", "changes", "named", "allowed"),
    [
        ("hyper_sd", {"hyper_sd": {"lora_rank": 4}}, "hyper_sd.lora_rank", "lora = { rank = 4 }"),
        ("pso", {"pso": {"lora_rank": 8}}, "pso.lora_rank", "lora = { rank = 8 }"),
        (
            "multi_student",
            {"multi_student": {"base": "hyper_sd", "options": {"lora_rank": 4}}},
            "multi_student.options.lora_rank",
            "lora = { rank = 4 }",
        ),
        ("diffusion", {"teacher": None, "lora": {"rank": 4}}, "lora", "absent"),
        ("dmd2", {"lora": {}}, "lora", "{ rank = 16 }"),
        ("dmd2", {"lora": {"rank": 0}}, "lora.rank", "1 or more"),
        ("dmd2", {"lora": {"ranks": 4}}, "lora.ranks", "rank"),
        ("dmd2", {"lora": 4}, "lora", "a table"),
    ],
)
def test_recipes_are_refused_by_the_name_that_is_wrong(
    method: str, changes: dict[str, Any], named: str, allowed: str
) -> None:
    table = {"name": "x", "method": method, "teacher": "tiny", "data": {"kind": "shapes"}, **changes}
    with pytest.raises(BadInput) as refused:
        Recipe.from_table({key: value for key, value in table.items() if value is not None})
    assert refused.value.field == named and allowed in str(refused.value)


def test_an_adapter_keeps_its_teachers_head(data: ImageData) -> None:
    v = teacher_for("class-to-image", data)
    teacher = replace(v, denoiser=Denoiser(v.denoiser.network, v.denoiser.schedule, "eps"))
    assert head_of(StudentSettings(), Consistency(), teacher) == "v"
    assert head_of(StudentSettings(), Consistency(), teacher, adapters=True) == "eps"
    with pytest.raises(BadInput, match=r"student\.head"):
        head_of(StudentSettings(head="v"), Consistency(), teacher, adapters=True)


def test_what_cannot_be_recomputed_is_refused(tmp_path: Path) -> None:
    teacher = exact_teacher(ring())
    with pytest.raises(BadInput, match=r"train\.checkpointing"):
        trainer.begin(Consistency(), teacher, settings(checkpointing=True), tmp_path, device="cpu")


# --- optimizers


def test_an_optimizer_that_is_not_installed_is_named_with_what_installs_it(
    data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(BadInput, match=r"train\.optimizer: got 'adam8bit'.*fewstep\[adam8bit\]"):
        trained(Dmd2(critic_turns=1), tmp_path / "x", range(1), data, optimizer="adam8bit")


def test_8_bit_adam_goes_on_where_it_was(data: ImageData, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="the extra adam8bit is not installed")
    method = Consistency(target_decay=0)
    whole: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    for k, name in enumerate(("adam8bit", "adam")):
        teacher, place = teacher_for("class-to-image", data), tmp_path / name
        place.mkdir()
        run = trainer.begin(method, teacher, settings(iterations=4, optimizer=name, ema=0), place, device="cpu")
        run.resume()
        for i in range(4):
            run.iteration(i, data)
            if i == 1:
                run.save(2)
        whole[k].update({key: value.clone() for key, value in run.nets["student"].state_dict().items()})
        run = trainer.begin(method, teacher, settings(iterations=4, optimizer=name, ema=0), place, device="cpu")
        assert run.resume() == 2
        for i in range(2, 4):
            run.iteration(i, data)
        assert all(torch.equal(value, whole[k][key]) for key, value in run.nets["student"].state_dict().items())
    moved = max(float((whole[0][key] - whole[1][key]).abs().max()) for key in whole[1])
    assert 0 < moved < 4e-4, "nearly Adam: four steps of 1e-4"
