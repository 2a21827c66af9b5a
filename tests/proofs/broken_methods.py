"""Broken copies of the methods, trained like the whole ones: a proof that lets one of them pass proves nothing."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from exact_report import (
    BROKEN_BY,
    MATCHING,
    MIXTURES,
    PROOFS,
    SCM,
    SETTINGS,
    brief,
    exact_map,
    judge,
    judge_samples,
    prove,
    strain,
    teacher_for,
    train_on,
)
from mutate import mutated

from distillers.generator import Generator
from distillers.methods import boot, consistency, dmd2, hyper_sd
from distillers.methods.consistency import Consistency
from distillers.models.schedule import Prediction, like
from distillers.training.distiller import Distiller
from distillers.training.toy import GaussianMixture, exact_teacher, ring

BRIEF = brief(SETTINGS)


def trained(method: Distiller, seed: int, prediction: Prediction = "v") -> dict[str, float]:
    """What a method reaches on the ring after a brief training."""
    teacher = exact_teacher(ring(), seed, prediction=prediction)
    run = train_on(teacher, ring(), method, replace(BRIEF, seed=seed))
    return {"rmse": judge(run.generator(), "ring").rmse}


def without_the_boundary(seed: int) -> dict[str, float]:
    """A free x0 head, c_skip = 0, without anchors: nothing ties f to the data, and any constant is consistent."""
    free = patch.object(consistency, "consistency_function", lambda denoiser, x_t, t, cond=None: denoiser(x_t, t, cond))
    with free:
        return trained(Consistency(points=20, anchored=0.0), seed, prediction="x0")


def target_hardly_follows(seed: int) -> dict[str, float]:
    """mu = 0.999: the target hardly leaves its random start in as many iterations; the better network of the two."""
    teacher = exact_teacher(ring(), seed)
    run = train_on(teacher, ring(), Consistency(points=20, target_decay=0.999), replace(BRIEF, seed=seed))
    both = run.generator(), Generator(run.nets["target"], teacher.codec, run.generator().info)
    return {"rmse": min(judge(leaving, "ring").rmse for leaving in both)}


def exact_tangent_on_a_fast_clock(seed: int) -> dict[str, float]:
    """Six octaves of time features: the exact tangent diverges."""
    return prove("scm_fast_clock", "ring", seed, replace(PROOFS["scm_fast_clock"].brief(), distiller=SCM))[1]


def random_target_time(seed: int) -> dict[str, float]:
    """One network that is not told where to jump cannot jump to everywhere (METHODS: over-constrained)."""
    broken = mutated(
        hyper_sd, "b = grid[n], grid[n - 1], grid[first]", "b = grid[n], grid[n - 1], grid[somewhere(first, n)]"
    )
    broken.somewhere = lambda first, n: first + (torch.rand(n.shape) * (n - first)).long()
    return trained(broken.HyperSD(points=32, segments=(1,), adversarial_weights=(0.0,)), seed)


def fresh_noise(seed: int) -> dict[str, float]:
    """Every step of the bootstrap on another noise: no trajectory is followed."""
    broken = mutated(
        boot, "signal(student, eps, t, cond), eps, t)", "signal(student, eps, t, cond), torch.randn_like(eps), t)"
    )
    return trained(broken.Boot(delta=0.08), seed)


def consistency_head(seed: int) -> dict[str, float]:
    """c_skip -> 1 towards t_min returns the input, the noise and not the signal (EDM's form, sigma_data 0.5)."""
    head = "skip(student.schedule, eps, t) * eps + (1 - skip(student.schedule, eps, t)) * student(eps, t, cond)"
    broken = mutated(boot, "student(student.schedule.start(eps, t), t, cond)", head)
    broken.skip = lambda schedule, eps, t: like(0.25 / (0.25 + schedule.noise_ratio(t) ** 2), eps)
    run = train_on(exact_teacher(ring(), seed), ring(), broken.Boot(delta=0.08), replace(BRIEF, seed=seed))
    noise, exact = exact_map("ring")
    with torch.no_grad():
        y = broken.signal(run.averages["student"], noise, torch.tensor(ring().schedule.t_min, dtype=torch.float64))
    return {"rmse": float((y - exact).square().sum(1).mean().sqrt())}


def matched(method: Any, seed: int, score: GaussianMixture | None = None) -> dict[str, float]:
    """Samples of the asymmetric mixture's student after a brief training; the teacher's score may be another's."""
    name, settings = "asymmetric", replace(brief(MATCHING), seed=seed)
    teacher = teacher_for(replace(PROOFS["dmd2"].brief(), distiller=method), name, seed)
    if score:
        teacher = replace(teacher, mixture=score)
    run = train_on(teacher, MIXTURES[name](), method, settings)
    return judge_samples(run.generator(), MIXTURES[name]())


def critic_stands_still(seed: int) -> dict[str, float]:
    """The critic keeps the teacher's score: it never learns where the student's samples are."""
    broken = mutated(dmd2, 'yield "critic", loss', 'yield "critic", 0 * loss')
    return {"energy": matched(broken.Dmd2(), seed)["energy"]}


def equal_weights(seed: int) -> dict[str, float]:
    """The score of the same modes with equal weights: every mode is there, and none has its share."""
    true = MIXTURES["asymmetric"]()
    even = GaussianMixture(true.means, true.stds, torch.ones(len(true.weights)), true.schedule)
    return {"share_error": matched(dmd2.Dmd2(), seed, even)["share_error"]}


@dataclass(frozen=True)
class Broken:
    """A broken method: by whose limits it is judged, and how it is trained from a seed."""

    method: str
    train: Callable[[int], dict[str, float]]


BROKEN = {
    "a student without the boundary": Broken("consistency", without_the_boundary),
    "a target network that hardly follows": Broken("consistency", target_hardly_follows),
    "a fast clock with the exact tangent": Broken("scm_fast_clock", exact_tangent_on_a_fast_clock),
    "segments with a random target time": Broken("hyper_sd", random_target_time),
    "boot with fresh noise": Broken("boot", fresh_noise),
    "boot with a consistency head": Broken("boot", consistency_head),
    "matching with a critic that stands still": Broken("dmd2", critic_stands_still),
    "matching a score without the weights": Broken("dmd2", equal_weights),
}


def broken_copies(method: str) -> list[str]:
    """Name the broken copies that are judged by this method's limits."""
    return [name for name, broken in BROKEN.items() if broken.method == method]


def refute(name: str) -> None:
    """Train a broken copy on seed 0 and see it miss a limit by far, as the tests do."""
    found = BROKEN[name].train(0)
    assert not all(share < BROKEN_BY for share in strain(BROKEN[name].method, found).values()), found
