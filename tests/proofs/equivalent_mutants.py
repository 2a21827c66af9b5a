"""Mutants that no test can tell from the original, each with the reason: what is changed makes no difference."""

LAST_TWO = "of a picture's four dimensions the last two are those from the second on"
SYMMETRIC = "the normal distribution is symmetric"
ONCE = "the noise is used once, so other noise is as good"
SHAPE = "only shape, dtype and device are read, which are the same"
NO_GRAPH = "the network is frozen and its input carries no gradient, so there is no graph to leave out"
BELOW = "whatever lies below t_min becomes t_min"

EQUIVALENT: dict[str, str] = {
    "losses.blurred: `-2` -> `2`": LAST_TWO,
    "losses.focal_frequency: `-2` -> `2`": LAST_TWO,
    "losses.best_shift: `-2` -> `2`": LAST_TWO,
    "losses.best_shift: `a` -> `b`": "both pictures have one size",
    "losses.best_shift: `(grey[:, i:i + height, j:j + width] - target).square().mean((1, 2))` -> "
    "`(grey[:, i:i + height, j:j + width] - target).square().sum((1, 2))`": "the least mean is the least sum",
    "losses.lognormal_times: `log_mean + log_std * torch.randn(count, device=device, dtype=torch.float64)` -> "
    "`log_mean - log_std * torch.randn(count, device=device, dtype=torch.float64)`": SYMMETRIC,
    "losses.ratio_weight: `1` -> `2` (2)": "2 / (1 + r) is as 1 / (1 + r) where weights have mean one",
    "losses.feature_distance: `a` -> `b`": SHAPE,
    "adversarial_consistency.AdversarialConsistency.step: `eps` -> `torch.randn_like(eps)`": ONCE,
    "boot.Boot.step: `eps` -> `torch.randn_like(eps)` (3)": SHAPE,
    "boot.Boot.step: `eps` -> `torch.randn_like(eps)` (5)": SHAPE,
    "boot.Boot.step: `with torch.no_grad(): y_top = teacher(schedule.start(eps[:k], top), top, first)` -> "
    "`if 1: y_top = teacher(schedule.start(eps[:k], top), top, first)`": NO_GRAPH,
    "consistency.Consistency.step: `eps` -> `torch.randn_like(eps)`": ONCE,
    "consistency.Consistency.step: `t` -> `s` (3)": SHAPE,
    "consistency.Consistency.tuning_times: `below.clamp_min(0)` -> `below`": BELOW,
    "diffusion.Diffusion.step: `self.log_mean + self.log_std * torch.randn(len(x0), device=x0.device, "
    "dtype=torch.float64)` -> `self.log_mean - self.log_std * torch.randn(len(x0), device=x0.device, "
    "dtype=torch.float64)`": SYMMETRIC,
    "disback.DisBack.target: `0` -> `1`": "until `back` the node is 1 or more, and then the teacher is taken",
    "disback.Path.load: `0` -> `1`": SHAPE,
    "disback.Path.load: `with torch.no_grad(): vector_to_parameters(state, own)` -> "
    "`if 1: vector_to_parameters(state, own)`": "it assigns the data of parameters, which is never recorded",
    "disback.Path.watch: `torch.distributed.all_reduce(gap)` -> `pass`": "one process has nobody to average with",
    "dmd2.Pairs.forward: `64` -> `65`": "how many pairs are made at a time",
    "hyper_sd.HyperSD.step: `with torch.no_grad(): fake, real = (features(x_b.detach()), features(y))` -> "
    "`if 1: fake, real = (features(x_b.detach()), features(y))`": NO_GRAPH,
    "hyper_sd.HyperSD.step: `x_b.detach()` -> `x_b`": "it stands in a block without gradients",
    "losses.score_matching: `with torch.no_grad(): x0_teacher = teacher(x_t, t, cond)` -> "
    "`if 1: x0_teacher = teacher(x_t, t, cond)`": NO_GRAPH,
    "pso.Pso.offline: `with torch.no_grad(): won_ref, lost_ref = (error(reference,  ...  error(reference, loser))` "
    "-> `if 1: won_ref, lost_ref = (error(reference, winner), error(reference, loser))`": NO_GRAPH,
    "pso.Pso.log_ratio: `with torch.no_grad(): least = squared(reference)` -> "
    "`if 1: least = squared(reference)`": NO_GRAPH,
    "pso.Pso.judged_rollouts: `1` -> `2` (5)": "the first of two rows drawn alike",
    "scm.ContinuousConsistency.step: `x_t` -> `x0` (3)": SHAPE,
    "scm.derivative_along: `x_t` -> `x0` (2)": SHAPE,
    "scm.derivative_along: `x_t` -> `x0` (3)": SHAPE,
    "scm.derivative_along: `x_t` -> `x0` (5)": SHAPE,
    "scm.ContinuousConsistency.derivative: `x_t` -> `x0` (4)": SHAPE,
    "scm.ContinuousConsistency.derivative: `x_t` -> `x0` (5)": SHAPE,
    "scm.ContinuousConsistency.derivative: `(phi - self.tangent_step).clamp_min(0)` -> "
    "`phi - self.tangent_step`": BELOW,
}
