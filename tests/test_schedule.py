"""The mathematics that everything else trusts: conversions, discrete times, solver orders. Nothing is trained here."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor

from distillers.errors import BadInput
from distillers.models.schedule import (
    EDM,
    PREDICTIONS,
    NoiseSchedule,
    Prediction,
    RectifiedFlow,
    Trigonometric,
    VariancePreserving,
    from_config,
    from_diffusers,
)
from distillers.training.toy import GaussianMixture, gaussian_flow_map, ring

DDPM = dict(beta_schedule="linear", beta_start=1e-4, beta_end=0.02, num_train_timesteps=1000)
STABLE_DIFFUSION = dict(beta_schedule="scaled_linear", beta_start=8.5e-4, beta_end=0.012, num_train_timesteps=1000)
SCHEDULES = [EDM(), VariancePreserving.from_betas(), RectifiedFlow(), Trigonometric()]

each_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.name)


def noised(schedule: NoiseSchedule, n: int = 500, **dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x0, eps, x_t (n, 3) and t (n,), the times even over the whole range with both ends."""
    x0, eps = torch.randn(2, n, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(**dtype)
    t = torch.linspace(schedule.t_min, schedule.t_max, n, dtype=torch.float64)
    return x0, eps, schedule.add_noise(x0, eps, t), t


def solve(mixture: GaussianMixture, x: Tensor, points: int, *, heun: bool) -> Tensor:
    """The library's own steps down the schedule's grid, t_max to t_min."""
    schedule = mixture.schedule
    times = schedule.grid(points).flip(0)
    for t, s in pairwise(times):
        x0 = mixture(x, t)
        down = schedule.step(x, x0, t, s)
        x = schedule.heun_step(x, x0, mixture(down, s), t, s) if heun else down
    return x


# --- conversions -----------------------------------------------------------------------------------------------------
@each_schedule
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_prediction_gives_the_clean_data_back(schedule: NoiseSchedule, prediction: Prediction) -> None:
    x0, _, x_t, t = noised(schedule)
    output = schedule.output_from(prediction, x0, x_t, t)
    torch.testing.assert_close(schedule.x0_from(prediction, output, x_t, t), x0, atol=1e-9, rtol=0)


@each_schedule
def test_outputs_are_what_their_names_say(schedule: NoiseSchedule) -> None:
    x0, eps, x_t, t = noised(schedule)
    a, s = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    close = dict(atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(x_t, a * x0 + s * eps, **close)
    torch.testing.assert_close(schedule.eps_from(x0, x_t, t), eps, **close)
    torch.testing.assert_close(schedule.v_from(x0, x_t, t), a * eps - s * x0, **close)
    torch.testing.assert_close(schedule.output_from("flow", x0, x_t, t), eps - x0, **close)
    torch.testing.assert_close(schedule.score_from(x0, x_t, t), -eps / s, **close)
    torch.testing.assert_close(schedule.snr(t) ** -0.5, schedule.noise_ratio(t))


@each_schedule
def test_float32_data_stay_float32_and_lose_no_more_than_rounding(schedule: NoiseSchedule) -> None:
    exact, rounded = noised(schedule), noised(schedule, dtype=torch.float32)
    assert rounded[2].dtype == torch.float32
    torch.testing.assert_close(rounded[2].double(), exact[2], atol=1e-5, rtol=1e-6)


def test_an_unknown_prediction_is_refused_by_name() -> None:
    x = torch.zeros(1, 2)
    for convert in (SCHEDULES[0].x0_from, SCHEDULES[0].output_from):
        with pytest.raises(BadInput, match="prediction: got 'score'; allowed: x0, eps, v, flow"):
            convert("score", x, x, torch.tensor(1.0))  # type: ignore[arg-type]


@each_schedule
def test_noise_grows_with_t(schedule: NoiseSchedule) -> None:
    ratio = schedule.noise_ratio(torch.linspace(schedule.t_min, schedule.t_max, 4001, dtype=torch.float64))
    assert bool((ratio.diff() > 0).all())


@each_schedule
def test_a_time_is_found_again_by_its_noise_ratio(schedule: NoiseSchedule) -> None:
    t = torch.linspace(schedule.t_min, schedule.t_max, 4001, dtype=torch.float64)
    torch.testing.assert_close(
        schedule.time_at_ratio(schedule.noise_ratio(t)), t, atol=1e-9 * schedule.t_max, rtol=1e-9
    )


@each_schedule
def test_ratios_outside_the_range_give_the_nearer_end(schedule: NoiseSchedule) -> None:
    found = schedule.time_at_ratio(torch.tensor([0.0, 1e9], dtype=torch.float64))
    torch.testing.assert_close(found, torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64))


# --- diffusers' discrete times ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("config", [DDPM, STABLE_DIFFUSION], ids=["ddpm", "sd"])
def test_variance_preserving_is_diffusers_own_at_the_integers(config: dict) -> None:
    schedule = VariancePreserving.from_betas(**config)
    scheduler = DDPMScheduler(**config)
    t = torch.arange(1000)
    torch.testing.assert_close(schedule.alpha(t) ** 2, scheduler.alphas_cumprod.double(), rtol=2e-5, atol=0)
    x0, eps = torch.randn(2, 1000, 3)
    torch.testing.assert_close(schedule.add_noise(x0, eps, t), scheduler.add_noise(x0, eps, t), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("kind", "prediction"), [("epsilon", "eps"), ("v_prediction", "v"), ("sample", "x0")])
def test_a_step_is_diffusers_ddim_step(kind: str, prediction: Prediction) -> None:
    scheduler = DDIMScheduler(**DDPM, prediction_type=kind, clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(50)
    schedule = VariancePreserving.from_betas(**DDPM)
    x_t, output = torch.randn(2, 4, 3)
    theirs = scheduler.step(output, 499, x_t).prev_sample
    t, s = torch.tensor(499.0), torch.tensor(479.0)
    torch.testing.assert_close(
        schedule.step(x_t, schedule.x0_from(prediction, output, x_t, t), t, s), theirs, atol=1e-5, rtol=1e-5
    )


def test_the_variance_exploding_grid_is_diffusers_karras_grid() -> None:
    scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, rho=7.0)
    scheduler.set_timesteps(18)
    np.testing.assert_allclose(EDM().grid(18).flip(0).numpy(), scheduler.sigmas[:18].numpy(), rtol=1e-5)


def test_discrete_ends_are_neither_clean_nor_pure_noise() -> None:
    """Sigma at t = 0 and alpha at t = T."""
    for config, sigma_0, alpha_end in ((STABLE_DIFFUSION, 0.0292, 0.068), (DDPM, 0.0100, 0.0064)):
        schedule = VariancePreserving.from_betas(**config)
        assert float(schedule.sigma(torch.tensor(0.0))) == pytest.approx(sigma_0, abs=5e-5)
        assert float(schedule.alpha(torch.tensor(999.0))) == pytest.approx(alpha_end, rel=0.01)


def test_twenty_of_a_thousand_steps_at_the_noisy_end() -> None:
    """rho = exp(lambda_s - lambda_T), lambda = ln(sigma/alpha): 0.89 for Stable Diffusion, 0.82 for DDPM."""
    for config, rho in ((STABLE_DIFFUSION, 0.89), (DDPM, 0.82)):
        ratio = VariancePreserving.from_betas(**config).noise_ratio(torch.tensor([979.0, 999.0]))
        assert float(ratio[0] / ratio[1]) == pytest.approx(rho, abs=0.006)


# --- steps -----------------------------------------------------------------------------------------------------------
@each_schedule
def test_a_step_is_exact_while_the_clean_estimate_is_right(schedule: NoiseSchedule) -> None:
    """From any time to any other, through a third one: x_s = alpha_s x0 + sigma_s eps."""
    x0, eps, x_t, t = noised(schedule)
    middle, s = t.flip(0), t.roll(100)
    there = schedule.step(schedule.step(x_t, x0, t, middle), x0, middle, s)
    torch.testing.assert_close(there, schedule.add_noise(x0, eps, s), atol=1e-7, rtol=1e-7)


# RMSE against the exact map of N(0.3, 0.7^2), n points from 80 down to 0.002.
QUOTED = {False: {10: 0.182, 18: 0.103, 40: 0.047, 80: 0.024}, True: {10: 0.139, 18: 0.035, 40: 0.0062, 80: 0.0015}}


def gaussian_errors(schedule: NoiseSchedule, *, heun: bool) -> dict[int, float]:
    gaussian = GaussianMixture(torch.tensor([[0.3]]), torch.tensor([0.7]), torch.ones(1), schedule)
    rng = torch.Generator().manual_seed(0)
    top, bottom = torch.tensor(schedule.t_max), torch.tensor(schedule.t_min)
    eps = torch.randn(4000, 1, generator=rng, dtype=torch.float64)
    x = schedule.add_noise(gaussian.sample(4000, rng).double(), eps, top)
    exact = gaussian_flow_map(gaussian, x, top, bottom)
    return {n: float((solve(gaussian, x, n, heun=heun) - exact).square().mean().sqrt()) for n in QUOTED[heun]}


@pytest.mark.parametrize("heun", [False, True], ids=["euler", "heun"])
def test_solver_errors_on_the_gaussian_are_the_quoted_ones(heun: bool) -> None:
    assert gaussian_errors(EDM(), heun=heun) == pytest.approx(QUOTED[heun], rel=0.04)


@each_schedule
@pytest.mark.parametrize(("heun", "order"), [(False, 1), (True, 2)], ids=["euler", "heun"])
def test_solver_orders(schedule: NoiseSchedule, heun: bool, order: int) -> None:
    errors = gaussian_errors(schedule, heun=heun)
    assert math.log(errors[40] / errors[80]) / math.log(79 / 39) == pytest.approx(order, abs=0.2)


@each_schedule
def test_heun_beats_euler_where_it_is_used(schedule: NoiseSchedule) -> None:
    """At the ring's 20 points, also where sigma/alpha leaps from 1000 to 12 in the first step."""
    modes = ring()
    mixture = GaussianMixture(modes.means, modes.stds, modes.weights, schedule)
    top = torch.tensor(schedule.t_max)
    eps = torch.randn(200, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = eps * torch.hypot(schedule.alpha(top), schedule.sigma(top))
    exact = mixture.flow_map(x, schedule.t_max, schedule.t_min, steps=200)
    euler, heun = ((solve(mixture, x, 20, heun=heun) - exact).square().sum(1).mean().sqrt() for heun in (False, True))
    assert heun < euler / 2


@pytest.mark.parametrize(
    "schedule", [EDM(t_min=0.0), RectifiedFlow(t_min=0.0), Trigonometric(t_min=0.0)], ids=lambda s: s.name
)
def test_a_heun_step_to_zero_noise_is_the_first_order_step(schedule: NoiseSchedule) -> None:
    x_t, x0, x0_next = torch.randn(3, 5, 2)
    t, s = torch.tensor([0.3, 0.3, 0.3, 0.3, 0.3]), torch.tensor([0.0, 0.0, 0.0, 0.1, 0.1])
    down, heun = schedule.step(x_t, x0, t, s), schedule.heun_step(x_t, x0, x0_next, t, s)
    torch.testing.assert_close(heun[:3], down[:3])
    assert bool((heun[3:] - down[3:]).abs().min() > 1e-4)


# --- times and segments ----------------------------------------------------------------------------------------------
@each_schedule
def test_a_share_of_the_range_runs_from_end_to_end_in_the_grids_spacing(schedule: NoiseSchedule) -> None:
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    t = schedule.spaced(u)
    assert t[[0, -1]].tolist() == pytest.approx([schedule.t_min, schedule.t_max])
    assert bool((t.diff() > 0).all()) and torch.equal(t, schedule.grid(101))
    if schedule.rho == 1:
        torch.testing.assert_close(t.diff(), t.diff()[:1].expand(100))
    else:  # Karras et al. 2022, eq. 5
        low, high = schedule.t_min ** (1 / 7), schedule.t_max ** (1 / 7)
        assert float(t[50]) == pytest.approx(((low + high) / 2) ** 7)


@each_schedule
@pytest.mark.parametrize("k", [8, 4, 2, 1])
def test_segments_are_cut_from_one_grid(schedule: NoiseSchedule, k: int) -> None:
    fine = schedule.segment_grid(64)
    assert len(fine) == 65 and fine.dtype == torch.float64 and bool((fine.diff() > 0).all())
    assert fine[[0, -1]].tolist() == pytest.approx([schedule.t_min, schedule.t_max])
    torch.testing.assert_close(fine[:: 64 // k], schedule.segment_grid(k))


@pytest.mark.parametrize("clock", [1000, 30])
@pytest.mark.parametrize("k", [8, 5, 4, 3, 2, 1])
def test_discrete_segments_end_where_stock_ddim_steps(clock: int, k: int) -> None:
    scheduler = DDIMScheduler(num_train_timesteps=clock, timestep_spacing="trailing")
    scheduler.set_timesteps(k)
    schedule = VariancePreserving.from_betas(num_train_timesteps=clock)
    assert schedule.segment_grid(k)[1:].flip(0).tolist() == scheduler.timesteps.tolist()


@pytest.mark.parametrize("n", [0, -8, 501])
def test_more_segments_than_half_the_clock_or_none_are_refused(n: int) -> None:
    with pytest.raises(BadInput, match="grid points"):
        VariancePreserving.from_betas().segment_grid(n)
    grid = VariancePreserving.from_betas().segment_grid(500)
    assert bool((grid.diff() > 0).all()) and torch.equal(grid, grid.round())


@each_schedule
def test_noise_added_in_two_steps_is_noise_added_in_one(schedule: NoiseSchedule) -> None:
    """Signal a_t, noise s_t: the variance that x_s brings along and the fresh one add up."""
    t = schedule.grid(60)[1:]
    s = torch.cat([schedule.grid(60)[:-1][:30], t[30:]])  # below, and equal
    nothing, one = torch.zeros(59, 1, dtype=torch.float64), torch.ones(59, 1, dtype=torch.float64)
    brought, fresh = schedule.renoise(one, nothing, s, t), schedule.renoise(nothing, one, s, t)
    a_s, s_s, a_t, s_t = (f(time)[:, None] for time in (s, t) for f in (schedule.alpha, schedule.sigma))
    torch.testing.assert_close(brought * a_s, a_t, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close((brought * s_s) ** 2 + fresh**2, s_t**2, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(brought[30:], one[30:])
    assert float(fresh[30:].abs().max()) < 1e-6 < float(fresh[:30].min())


# --- files -----------------------------------------------------------------------------------------------------------
ODD = [
    VariancePreserving(torch.linspace(0.01, 0.2, 7)),
    VariancePreserving.from_betas("sigmoid"),
    RectifiedFlow(clock=500, shift=3.0),
    RectifiedFlow(stock={"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}),
]


@pytest.mark.parametrize("schedule", [*SCHEDULES, *ODD], ids=lambda s: s.name)
def test_a_schedule_survives_its_own_config(schedule: NoiseSchedule) -> None:
    again = from_config(schedule.to_config())
    t = torch.linspace(schedule.t_min, schedule.t_max, 50, dtype=torch.float64)
    assert type(again) is type(schedule) and (again.t_min, again.t_max) == (schedule.t_min, schedule.t_max)
    torch.testing.assert_close(again.noise_ratio(t), schedule.noise_ratio(t), rtol=1e-12, atol=0)
    assert torch.equal(again.grid(9), schedule.grid(9)) and torch.equal(again.network_time(t), schedule.network_time(t))


@pytest.mark.parametrize("tokens", [256, 1024, 4096])
@pytest.mark.parametrize("evenly", [False, True])
def test_a_stock_pipelines_times_are_its_schedulers(tokens: int, evenly: bool) -> None:
    """SD3's are shifted twice, by the scheduler itself; FLUX.1's evenly spaced, then shifted by the picture's size."""
    flow: Any = RectifiedFlow(stock={"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
    if not evenly:
        times = [1000 * t for t in flow.stock_times(4, tokens, evenly)]
        torch.testing.assert_close(torch.tensor(times), torch.tensor([1000, 858, 602, 9.0]), atol=0.5, rtol=0)
    flow.stock |= {"use_dynamic_shifting": True}
    mu = 0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256)  # Esser et al. 2024; FLUX.1's numbers
    stock: Any = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    stock.set_timesteps(4, mu=mu, sigmas=[1, 0.75, 0.5, 0.25] if evenly else None)
    assert flow.stock_times(4, tokens, evenly) == stock.sigmas[:4].tolist()
    assert flow.student_times(4) == [1, 0.75, 0.5, 0.25] and flow.segment_grid(4).tolist() == [1e-3, 0.25, 0.5, 0.75, 1]
    for wrong in (0, 1001):
        with pytest.raises(BadInput, match="steps"):
            flow.stock_times(wrong, tokens, evenly)
    dpm = {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True, "flow_shift": 3.0}
    sana: Any = DPMSolverMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction")
    sana.set_timesteps(5)
    assert RectifiedFlow(stock=dpm).stock_times(5, tokens, False) == sana.sigmas[:5].tolist()


def test_a_shifted_grid_has_the_same_ends_and_is_denser_in_the_noise() -> None:
    plain, shifted = RectifiedFlow().grid(11), RectifiedFlow(shift=3.0).grid(11)
    torch.testing.assert_close(shifted[[0, -1]], plain[[0, -1]])
    u = torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(shifted, 3 * u / (1 + 2 * u), atol=1.5e-3, rtol=0)


@pytest.mark.parametrize(
    "config", [DDPM, STABLE_DIFFUSION, {**DDPM, "rescale_betas_zero_snr": True}], ids=["ddpm", "sd", "zero-snr"]
)
def test_a_diffusers_scheduler_becomes_the_same_schedule(config: dict) -> None:
    scheduler = DDIMScheduler(**config)
    schedule = from_diffusers(dict(scheduler.config))
    t = torch.arange(999)  # the last one is infinitely noisy after rescaling
    torch.testing.assert_close(schedule.alpha(t) ** 2, scheduler.alphas_cumprod[:999].double(), rtol=1e-3, atol=1e-7)
    assert math.isfinite(float(schedule.noise_ratio(torch.tensor(999.0))))


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"name": "cosine"}, "schedule.name"),
        ({"name": "trig", "rho": 7}, "schedule"),
        ({"name": "vp", "betas": 3}, "schedule"),
        ({"name": "vp", "beta_schedule": "exp"}, "beta_schedule"),
        ({"name": "flow", "shift": 0.0}, "schedule.clock, shift"),
        ({"name": "flow", "clock": "many"}, "schedule"),
    ],
)
def test_a_wrong_schedule_table_is_refused_by_name(config: dict, field: str) -> None:
    with pytest.raises(BadInput) as refused:
        from_config(config)
    assert refused.value.field == field


@pytest.mark.parametrize("betas", [torch.tensor([0.1]), torch.tensor([0.1, 1.5]), torch.zeros(2, 2)])
def test_betas_that_are_no_schedule_are_refused(betas: Tensor) -> None:
    with pytest.raises(BadInput, match="betas"):
        VariancePreserving(betas)


def test_a_grid_needs_two_points() -> None:
    with pytest.raises(BadInput, match="grid points"):
        EDM().grid(1)
