"""`x0 = denoiser(x_t, t, cond)`, whatever the network predicts, how it is told the time, where the condition goes."""

import math
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from networks import SCHEDULES, VP, unet
from torch import Tensor, nn

from distillers.errors import BadInput
from distillers.models.denoiser import Denoiser
from distillers.models.guidance import Guided, GuidedTime, embed_guidance, fold_guidance
from distillers.models.schedule import (
    EDM,
    PREDICTIONS,
    NoiseSchedule,
    Prediction,
    RectifiedFlow,
    Trigonometric,
)

LABELS = 3  # the null label of guidance is the next one

each_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.name)


class Recorder(nn.Module):
    """A plain network that keeps what it was called with and answers what it was told to."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer, self.calls = answer, list[tuple[Tensor, Tensor, dict[str, Any]]]()

    def forward(self, x: Tensor, time: Tensor, **cond: Any) -> Tensor:
        self.calls.append((x, time, cond))
        return self.answer


@pytest.fixture(scope="module")
def conditional() -> Denoiser:
    return Denoiser(unet(num_class_embeds=LABELS + 1), VP, "eps")


@pytest.fixture
def noisy() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """x_t, t and labels of four pictures."""
    x_t = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return x_t, torch.tensor([0.0, 250.0, 600.5, 999.0]), {"label": torch.tensor([0, 1, 2, 0])}


# --- predictions, time, scale ----------------------------------------------------------------------------------------
@each_schedule
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_network_that_is_right_gives_the_clean_data(schedule: NoiseSchedule, prediction: Prediction) -> None:
    x0, eps = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0))
    t = schedule.grid(8)[1:-1]  # at the ends float32 itself loses digits
    x_t = schedule.add_noise(x0, eps, t)
    denoiser = Denoiser(Recorder(schedule.output_from(prediction, x0, x_t, t)), schedule, prediction)
    torch.testing.assert_close(denoiser(x_t, t), x0, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("schedule", "t", "told"),
    [
        (VP, 617.0, 617.0),
        (EDM(), 2.0, math.log(2.0) / 4),
        (RectifiedFlow(), 0.25, 250.0),
        (Trigonometric(), 0.5, 0.5),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_the_network_is_told_the_time_in_its_own_unit_once_per_sample(
    schedule: NoiseSchedule, t: float, told: float
) -> None:
    network = Recorder(torch.zeros(2, 3))
    Denoiser(network, schedule, "x0")(torch.randn(2, 3), torch.tensor(t, dtype=torch.float64))
    ((_, time, cond),) = network.calls
    torch.testing.assert_close(time, torch.tensor([told, told]))
    assert cond == {}


def test_only_a_variance_exploding_input_is_scaled_to_unit_variance() -> None:
    for schedule in SCHEDULES:
        t = schedule.grid(5)
        x_t = schedule.add_noise(0.5 * torch.randn(5, 20_000), torch.randn(5, 20_000), t)
        network = Recorder(torch.zeros_like(x_t))
        Denoiser(network, schedule, "x0")(x_t, t)
        if isinstance(schedule, EDM):
            torch.testing.assert_close(network.calls[0][0].std(1), torch.ones(5), atol=0.02, rtol=0)
        else:
            assert torch.equal(network.calls[0][0], x_t)


def test_an_unknown_prediction_is_refused_when_the_denoiser_is_made() -> None:
    with pytest.raises(BadInput, match="prediction: got 'noise'"):
        Denoiser(nn.Identity(), VP, "noise")  # type: ignore[arg-type]


# --- diffusers' networks and conditions ------------------------------------------------------------------------------
def test_labels_and_times_reach_a_unet(conditional: Denoiser, noisy: Any) -> None:
    x_t, t, cond = noisy
    with torch.no_grad():
        expected = conditional.network(x_t, t, class_labels=cond["label"]).sample
        assert torch.equal(conditional.output(x_t, t, cond), expected)
        assert not torch.equal(conditional.output(x_t, t, {"label": cond["label"].flip(0)}), expected)


def test_sar_is_concatenated_without_noise(noisy: Any) -> None:
    x_t, t, _ = noisy
    denoiser, sar = Denoiser(unet(in_channels=5), VP, "v"), torch.rand(4, 2, 8, 8)
    with torch.no_grad():
        expected = denoiser.network(torch.cat([x_t, sar], 1), t).sample
        assert torch.equal(denoiser.output(x_t, t, {"sar": sar}), expected)
    assert expected.shape == x_t.shape


def test_a_dit_is_told_the_exact_time_and_its_learned_variance_is_left_out(noisy: Any) -> None:
    torch.manual_seed(0)
    network = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=3,
        out_channels=6,
        num_layers=1,
        sample_size=8,
        patch_size=4,
        num_embeds_ada_norm=LABELS,
    ).eval()
    x_t, t, cond = noisy
    with torch.no_grad():
        both = network(x_t, timestep=t, class_labels=cond["label"]).sample
        assert both.shape[1] == 6
        assert torch.equal(Denoiser(network, VP, "eps").output(x_t, t, cond), both[:, :3])


# --- guidance --------------------------------------------------------------------------------------------------------
def test_guidance_one_is_the_conditional_teacher_bit_for_bit(conditional: Denoiser, noisy: Any) -> None:
    x_t, t, cond = noisy
    with torch.no_grad():
        assert torch.equal(Guided(conditional, 1.0, null_label=LABELS)(x_t, t, cond), conditional(x_t, t, cond))


def test_guidance_zero_is_the_unconditional_teacher(conditional: Denoiser, noisy: Any) -> None:
    x_t, t, cond = noisy
    null = {"label": torch.full_like(cond["label"], LABELS)}
    with torch.no_grad():
        guided, uncond = Guided(conditional, 0.0, null_label=LABELS)(x_t, t, cond), conditional(x_t, t, null)
        torch.testing.assert_close(guided, uncond, atol=1e-4, rtol=1e-5)
        assert bool((uncond - conditional(x_t, t, cond)).abs().max() > 0.01)


@pytest.mark.parametrize(
    "t", [torch.tensor(600.0), torch.tensor([600.0, 20.0, 400.0, 900.0])], ids=["one time", "times"]
)
def test_lcm_counts_guidance_from_zero_and_it_acts_alike_on_noise(conditional: Denoiser, noisy: Any, t: Tensor) -> None:
    """LCM: cond + w (cond - uncond). Our scale is w + 1, and guiding eps instead of x0 gives the same x0."""
    x_t, _, cond = noisy
    null, w = {"label": torch.full_like(cond["label"], LABELS)}, 2.5
    with torch.no_grad():
        with_label, without = conditional.output(x_t, t, cond), conditional.output(x_t, t, null)
        lcm = VP.x0_from("eps", with_label + w * (with_label - without), x_t, t)
        torch.testing.assert_close(
            Guided(conditional, w + 1, null_label=LABELS)(x_t, t, cond), lcm, atol=1e-2, rtol=1e-4
        )


def test_guidance_without_a_label_is_no_guidance(noisy: Any) -> None:
    x_t, t, _ = noisy
    plain = Denoiser(unet(), VP, "eps")
    with torch.no_grad():
        assert torch.equal(Guided(plain, 4.0, null_label=0)(x_t, t, None), plain(x_t, t))


def test_a_scale_for_each_sample_is_the_scalar_wrapper_for_each(conditional: Denoiser, noisy: Any) -> None:
    """In the condition it takes the place of the one scale, and it does not reach the network that is guided."""
    x_t, t, cond = noisy
    scales = torch.tensor([0.0, 1.0, 2.5, 7.0])
    with torch.no_grad():
        each = Guided(conditional, 99.0, null_label=LABELS)(x_t, t, {**cond, "guidance": scales})
        for i, w in enumerate(scales.tolist()):
            scalar = Guided(conditional, w, null_label=LABELS)(x_t, t, cond)
            torch.testing.assert_close(each[i], scalar[i], atol=1e-3, rtol=1e-4)
        assert not torch.allclose(each[3], Guided(conditional, 6.0, null_label=LABELS)(x_t, t, cond)[3], atol=1e-2)
        of_one = Guided(conditional, 1.0, null_label=LABELS)(x_t, t, {**cond, "guidance": scales})
        torch.testing.assert_close(of_one, each)
    asked = Asked()
    Guided(asked, 1.0, LABELS)(x_t, t, {**cond, "guidance": scales})
    assert set(asked.cond) == {"label"} and asked.cond["label"].tolist() == [0, 1, 2, 0] + 4 * [LABELS]


class Asked(nn.Module):
    """A denoiser that keeps the condition it was last asked under."""

    schedule = VP

    def forward(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        self.cond = cond
        return x_t


# --- a network that is told the guidance scale -----------------------------------------------------------------------
def dit() -> DiTTransformer2DModel:
    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=3, out_channels=6, num_layers=2, sample_size=8,
        patch_size=4, num_embeds_ada_norm=LABELS,
    ).eval()  # fmt: skip


TOLD = {"unet": lambda: unet(num_class_embeds=LABELS + 1), "transformer": dit}
each_told = pytest.mark.parametrize("kind", TOLD)


def told(network: nn.Module) -> nn.Module:
    """The network with a scale embedding that has learnt something."""
    torch.manual_seed(1)
    embed_guidance(network)
    for module in network.modules():
        if isinstance(module, GuidedTime):
            nn.init.normal_(module.project.weight, std=0.2)
    return network


def scales(w: float) -> dict[str, Tensor]:
    return {"guidance": torch.full((4,), w)}


@each_told
@torch.no_grad()
def test_a_new_scale_embedding_changes_nothing(kind: str, noisy: Any) -> None:
    x_t, t, cond = noisy
    network = TOLD[kind]()
    before = Denoiser(network, VP, "eps")(x_t, t, cond)
    assert embed_guidance(network) is network
    for w in (1.0, 5.0):
        assert torch.equal(Denoiser(network, VP, "eps")(x_t, t, {**cond, **scales(w)}), before)


@each_told
@torch.no_grad()
def test_a_network_that_learnt_the_scale_answers_to_each_sample_its_own(kind: str, noisy: Any) -> None:
    x_t, t, cond = noisy
    denoiser = Denoiser(told(TOLD[kind]()), VP, "x0")
    alike = {w: denoiser(x_t, t, {**cond, **scales(w)}) for w in (1.0, 3.0, 5.0)}
    assert min((alike[a] - alike[b]).abs().max() for a, b in ((1.0, 3.0), (3.0, 5.0))) > 1e-3
    mixed = denoiser(x_t, t, {**cond, "guidance": torch.tensor([5.0, 3.0, 1.0, 3.0])})
    for i, w in enumerate((5.0, 3.0, 1.0, 3.0)):
        torch.testing.assert_close(mixed[i], alike[w][i], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(denoiser(x_t, t, cond), alike[1.0])  # not told, after it was: none, not the last one


@each_told
@pytest.mark.parametrize("w", [1.0, 3.5])
@torch.no_grad()
def test_folded_it_is_a_stock_network_that_answers_as_if_told(kind: str, w: float, noisy: Any) -> None:
    x_t, t, cond = noisy
    stock, network = TOLD[kind](), told(TOLD[kind]())
    expected = Denoiser(network, VP, "x0")(x_t, t, {**cond, **scales(w)})
    assert fold_guidance(network, w) is network
    assert network.state_dict().keys() == stock.state_dict().keys()
    assert [type(m) for m in network.modules()] == [type(m) for m in stock.modules()]
    torch.testing.assert_close(Denoiser(network, VP, "x0")(x_t, t, cond), expected, atol=1e-5, rtol=1e-5)
    plain = Denoiser(stock, VP, "x0")(x_t, t, cond)
    assert (plain - expected).abs().max() > 1e-3


def test_what_has_no_time_embedding_cannot_be_told() -> None:
    with pytest.raises(BadInput, match="guidance_range"):
        embed_guidance(nn.Linear(2, 2))


# --- features --------------------------------------------------------------------------------------------------------
def test_features_are_the_named_activations_in_the_order_asked(conditional: Denoiser, noisy: Any) -> None:
    x_t, t, cond = noisy
    seen: list[Tensor] = []
    handle = conditional.network.mid_block.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with torch.no_grad():
        middle, first = conditional.features(x_t, t, cond, layers=["mid_block", "down_blocks.0"])
    handle.remove()
    assert torch.equal(middle, seen[0]) and middle.shape == (4, 16, 4, 4)
    assert first.shape == (4, 8, 4, 4), "a block that also returns its skips gives its first output"


def test_features_leave_no_hooks_and_carry_gradients(conditional: Denoiser, noisy: Any) -> None:
    x_t, t, cond = noisy
    x_t = x_t.clone().requires_grad_()
    (middle,) = conditional.features(x_t, t, cond)
    middle.square().sum().backward()
    assert x_t.grad is not None and bool(x_t.grad.abs().sum() > 0)
    assert not any(module._forward_hooks for module in conditional.network.modules())


def test_features_leave_the_network_at_the_last_of_the_layers(conditional: Denoiser, noisy: Any) -> None:
    """Also when the last one asked is not the last one called; and the network is whole again afterwards."""
    x_t, t, cond = noisy
    calls = list[str]()
    names = ["down_blocks.0", "mid_block", "up_blocks.0", "conv_out"]
    handles = [
        conditional.network.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
        for name in names
    ]
    with torch.no_grad():
        for layers, run in ((["down_blocks.0"], 1), (["mid_block", "down_blocks.0"], 2), (["up_blocks.0"], 3)):
            calls.clear()
            assert len(conditional.features(x_t, t, cond, layers)) == len(layers)
            assert calls == names[:run]
        calls.clear()
        conditional(x_t, t, cond)
        assert calls == names
        calls.clear()
        twice = conditional.features(x_t, t, cond, ["mid_block", "mid_block"])
        assert torch.equal(*twice) and calls == names[:2]
    for handle in handles:
        handle.remove()


def test_features_of_a_list_of_layers_are_refused(conditional: Denoiser, noisy: Any) -> None:
    """ "down_blocks" is a name in the network, but nothing is ever called by it."""
    x_t, t, cond = noisy
    with pytest.raises(BadInput, match="layers"):
        conditional.features(x_t, t, cond, layers=["down_blocks"])


def test_features_refuse_a_layer_that_is_not_there(conditional: Denoiser, noisy: Any) -> None:
    x_t, t, cond = noisy
    with pytest.raises(BadInput, match=r"layers: got \['middle'\]; .*mid_block"):
        conditional.features(x_t, t, cond, layers=["mid_block", "middle"])
