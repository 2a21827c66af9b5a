"""`train` is the one loop of every method: turns, averages, samples, checkpoints, progress, tracker.

It knows no method: a `Distiller` yields (player, loss) turns and the loop moves that player. Exact resume costs no
state: iteration i draws its data and noise from generators seeded by (seed, i, process), so a run that is killed and
started again repeats what an uninterrupted one would have done, bit for bit on CPU.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
import warnings
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from distillers.autoencoder import Autoencoder
from distillers.data import ImageData
from distillers.errors import BadInput, Notice, TrainingStopped
from distillers.generator import Generator
from distillers.models.checkpointing import checkpoint_gradients
from distillers.models.conditions import split
from distillers.models.denoiser import Denoiser
from distillers.progress import progress_bar
from distillers.runtime import device_name
from distillers.teacher import Teacher
from distillers.training.batches import Batches
from distillers.training.checkpoints import Checkpoints, newest_checkpoint
from distillers.training.distiller import Distiller, Networks, Turn, follow, modes_kept, slow_copy
from distillers.training.execution import DryRun, Execution, fastest_execution, run_as
from distillers.training.head import warn_of_noise
from distillers.training.reward import judges_of
from distillers.training.settings import TrainSettings
from distillers.training.sharding import Shards, is_split, load_whole, load_whole_optimizer, local_part, whole
from distillers.training.watch import Watch

if TYPE_CHECKING:
    from accelerate import Accelerator

DRY_RUN_AT = (0.0, 0.9)  # shares of the training whose turns a dry run plays: some players enter late


def train(
    distiller: Distiller,
    teacher: Teacher,
    data: ImageData,
    settings: TrainSettings,
    out: Path,
    *,
    description: dict[str, Any] | None = None,
    device: str | None = None,
    held_out: ImageData | None = None,
) -> Generator | Autoencoder:
    """Train a method to its last iteration, resuming from `out` if it holds checkpoints.

    Args:
        out: run folder: checkpoints/, samples/, logs/, cost.json; with a watch also watch.jsonl and best.pt.
        description: recorded in each checkpoint; a checkpoint of another description is refused.
        held_out: what the watch compares with; the training data where there is nothing else.

    Returns:
        The generator or the autoencoder with the averaged weights, on CPU: the last ones, or the best where
        `settings.publish` says so.

    Raises:
        TrainingStopped: a loss was not finite; SIGTERM or SIGINT arrived (a checkpoint was written first).
        BadInput: the checkpoints in `out` belong to another recipe; a tracker or player that does not exist.
    """
    from rich.progress import TextColumn

    tracker = _tracker(settings.tracker)
    pauses = (settings.log_every, settings.sample_every, settings.watch_every, settings.checkpoint_every)
    out.mkdir(parents=True, exist_ok=True)
    run = begin(distiller, teacher, settings, out, description=description, device=device, tracker=tracker)
    accelerator, start = run.accelerator, run.resume()
    if tracker and accelerator.is_main_process:
        accelerator.init_trackers("fewstep")
    if start == 0:
        accelerator.print(f"networks run {run.choose_execution(data)}")
    watch = None
    if settings.watch_every and accelerator.is_main_process:
        watch = Watch(held_out or data, settings.watch_samples, settings.watch_steps, out)
    try:
        with (
            _Termination(alone=accelerator.num_processes == 1) as termination,
            progress_bar(TextColumn("{task.fields[loss]}"), disable=not accelerator.is_main_process) as progress,
        ):
            bar = progress.add_task("training", total=settings.iterations, completed=start, loss="")
            run.start_clock()
            for i in range(start, settings.iterations):
                run.iteration(i, data)
                done = i + 1
                last, stop = done == settings.iterations, run.any_process(termination.asked)
                if not (last or stop or any(every and done % every == 0 for every in pauses)):
                    continue
                run.stop_clock()
                if done % settings.log_every == 0 or last or stop:
                    losses = run.log(done)
                    shown = "  ".join(f"{player} {value:.4f}" for player, value in losses.items())
                    progress.update(bar, completed=done, loss=shown)
                    if not progress.console.is_terminal:  # a log file has no bar
                        progress.console.print(f"iteration {done} of {settings.iterations}: loss {shown}")
                if settings.sample_every and done % settings.sample_every == 0 and not last:
                    run.draw_samples(done, data)
                if watch and (done % settings.watch_every == 0 or last):
                    figures = run.watch(done, watch)
                    progress.console.print(f"iteration {done} of {settings.iterations}: {figures}")
                if done % settings.checkpoint_every == 0 or last or stop:
                    run.save(done)
                if stop and not last:
                    where = f"asked to stop at iteration {done}"
                    raise TrainingStopped(f"{where}; the same command continues from {run.checkpoints.folder}")
                run.start_clock()
        run.write_cost(settings.iterations)
        run.draw_samples(settings.iterations, data)
    finally:
        run.close()
    return run.generator(settings.publish)


def begin(
    distiller: Distiller,
    teacher: Teacher,
    settings: TrainSettings,
    out: Path,
    *,
    description: dict[str, Any] | None = None,
    device: str | None = None,
    tracker: str | None = None,
) -> Run:
    """Set up a run before its first iteration: networks, optimizers, seeds. Arguments as `train`'s."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import AutocastKwargs, set_seed

    AcceleratorState._reset_state(reset_partial_state=True)  # an earlier training of this process may have differed
    accelerator = Accelerator(
        mixed_precision=settings.precision,
        cpu=device == "cpu",
        log_with=tracker,
        project_dir=str(out / "logs"),
        # torch before 2.10 keeps a weight that a pass without gradients has cast for the next pass, which then has none
        kwargs_handlers=[AutocastKwargs(cache_enabled=False)],
    )
    set_seed(settings.seed)  # networks() may add fresh parameters
    return Run(distiller, teacher, settings, accelerator, out, description or {})


def _tracker(name: str) -> str | None:
    """Return the name if accelerate can log there, None for "none". Raises BadInput for any other."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    installed = sorted(str(tracker) for tracker in get_available_trackers())
    if name != "none" and name not in installed:
        others = ", ".join(sorted(set(LOGGER_TYPE_TO_CLASS) - set(installed)))
        raise BadInput("train.tracker", name, f"none, {', '.join(installed)}; once installed: {others}")
    return None if name == "none" else name


def _check_shard(settings: TrainSettings, teacher: Teacher, accelerator: Accelerator) -> None:
    """Raise BadInput where networks cannot be split over processes."""
    if accelerator.num_processes == 1:
        allowed = "false in one process; torchrun --nproc-per-node 2 -m distillers.cli distill ... starts two"
        raise BadInput("train.shard", True, allowed)
    if teacher.initial.text is not None:
        raise BadInput("train.shard", True, "false where a text encoder learns too")
    if settings.watch_every:
        raise BadInput("train.watch_every", settings.watch_every, "0 with train.shard: one process alone would draw")


def _optimizer_class(name: str) -> Callable[..., torch.optim.Optimizer]:
    """Find an optimizer by the recipe's name. Raises BadInput for one that is not installed."""
    if name == "adam8bit":
        try:
            from bitsandbytes.optim import Adam8bit
        except ImportError:
            allowed = "radam, adamw or adam; adam8bit once it is installed: pip install 'fewstep[adam8bit]'"
            raise BadInput("train.optimizer", name, allowed) from None
        return Adam8bit
    kinds = {"radam": torch.optim.RAdam, "adamw": torch.optim.AdamW, "adam": torch.optim.Adam}
    return partial(kinds[name], foreach=True)


class Run:
    """A run holds the state of one training: networks, optimizers, averages, counters."""

    def __init__(
        self,
        distiller: Distiller,
        teacher: Teacher,
        settings: TrainSettings,
        accelerator: Accelerator,
        out: Path,
        description: dict[str, Any],
    ) -> None:
        self.distiller, self.settings, self.accelerator = distiller, settings, accelerator
        self.teacher, self.out, self.checkpoints = teacher, out, Checkpoints(out, description)
        if settings.shard:
            _check_shard(settings, teacher, accelerator)
        self.nets = distiller.networks(teacher)
        if not settings.shard:
            self.nets.to(accelerator.device)
        teacher.codec.to(accelerator.device)
        made = distiller.generator(self.nets, teacher)  # what cannot be made afterwards is refused now
        if isinstance(made, Generator):
            warn_of_noise(made)
        self.of_teacher = {"teacher"}  # made of the teacher alone, and again on resume: checkpoints do not hold them
        of_teacher = {id(p) for own in (teacher.denoiser, teacher.initial) for p in own.parameters()}
        for name, net in self.nets.items():
            parameters = {id(p) for p in net.parameters()}
            if parameters <= of_teacher and (parameters or not net.state_dict()):
                self.of_teacher.add(name)
        players = {name: net for name, net in self.nets.items() if any(p.requires_grad for p in net.parameters())}
        for name in settings.learning_rates or {}:
            if name not in players:
                raise BadInput(f"train.learning_rates.{name}", name, "a player of this method: " + ", ".join(players))
        students = [name for name in players if name.startswith(distiller.published)]
        self.averages = {name: slow_copy(players[name]) for name in students} if settings.ema else {}
        if settings.checkpointing:
            checkpoint_gradients(m.network for m in self.nets.modules() if isinstance(m, Denoiser))
        self.shards = Shards((self.nets, *self.averages.values()), accelerator.device) if settings.shard else None
        self.nets.to(accelerator.device)
        self.optimizers = {name: accelerator.prepare(self._optimizer(name, net)) for name, net in players.items()}
        self.losses: dict[str, Tensor] = {}  # sums since the last log
        self.turns: Counter[str] = Counter()
        self.seconds, self.peak_mb, self._started = 0.0, 0.0, 0.0  # what it cost so far, resumed runs included
        self.execution = Execution()
        draws = [distiller.draws(i / settings.iterations) for i in range(settings.iterations)]
        pin_memory = accelerator.device.type == "cuda"
        self.batches = Batches(settings, accelerator.process_index, draws, pin_memory=pin_memory)
        if accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(accelerator.device)

    def _optimizer(self, name: str, net: nn.Module) -> torch.optim.Optimizer:
        """Build a player's optimizer; each of its groups remembers its peak learning rate."""
        s = self.settings
        rate = (s.learning_rates or {}).get(name, s.learning_rate)
        optimizer: torch.optim.Optimizer = _optimizer_class(s.optimizer)(
            [p for p in net.parameters() if p.requires_grad], lr=rate, betas=s.betas, weight_decay=s.weight_decay
        )
        for group in optimizer.param_groups:
            group["peak"] = rate
        return optimizer

    # --- one iteration -----------------------------------------------------------------------------------------------
    def iteration(self, i: int, data: ImageData) -> None:
        """Run one iteration: draw a batch, play its turns, update the averages."""
        s = self.settings
        micro = self._micro_batches(i, data)
        self.play([self.distiller.step(self.nets, part, i / s.iterations) for part in micro], self.rate(i))
        decay = min(s.ema, (1 + i) / (10 + i))  # a short memory at first, so that the start is forgotten
        for name, average in self.averages.items():
            follow(average, self.nets[name], decay)

    def _micro_batches(self, i: int, data: ImageData) -> list[dict[str, Tensor]]:
        """Draw iteration i's batch, encoded for the network and split for accumulation."""
        return self._encoded(self.batches.draw(data, i), i)

    def _encoded(self, pictures: dict[str, Tensor], i: int) -> list[dict[str, Tensor]]:
        """Encode iteration i's pictures for the network and split them into micro-batches."""
        torch.manual_seed(_mix(self.settings.seed, i, self.accelerator.process_index))
        return split(self.teacher.encode_batch(pictures, self.accelerator.device), self.settings.accumulation)

    def close(self) -> None:
        """End the loaders and the trackers, and run networks eagerly again. The process group stays for publishing."""
        run_as(self.nets, Execution())
        self.batches.close()
        for tracker in self.accelerator.trackers:
            tracker.finish()

    # --- how networks are run ----------------------------------------------------------------------------------------
    def choose_execution(self, data: ImageData) -> str:
        """Measure eager, channels-last and compiled networks, and run them in the fastest way that agrees.

        "auto" leaves short trainings eager, where compiling would take longer than it saves.

        Returns:
            What was chosen and why, in words.
        """
        from accelerate.utils import broadcast_object_list

        if self.shards:
            return f"{self.execution} (their weights are split over {self.accelerator.num_processes} processes)"
        s, chosen = self.settings, list[Any]([None, None])
        if self.accelerator.is_main_process:
            chosen = [*fastest_execution(lambda e: self.dry_run(data, e), s.compile, s.iterations, s.accumulation)]
        broadcast_object_list(chosen)
        self.execution, why = chosen
        run_as(self.nets, self.execution)
        return f"{self.execution} ({why})"

    def dry_run(self, data: ImageData, execution: Execution | None = None) -> DryRun:
        """Play the turns of an early and a late iteration with networks run in this way; no network changes."""
        run_as(self.nets, execution or Execution())
        before = {name: value.clone() for name, value in self.nets.state_dict().items()}
        seconds, turns = [], list[tuple[str, float, Tensor]]()
        for _ in range(4):  # the first warms up
            spent, turns = 0.0, []
            for progress in DRY_RUN_AT:
                i = int(progress * self.settings.iterations)
                batch = self._encoded(self.batches.draw_ahead(data, i), i)[0]
                started = time.perf_counter()
                turns += self._dry_turns(batch, i / self.settings.iterations)
                spent += time.perf_counter() - started
            seconds.append(spent / len(DRY_RUN_AT))
            self.nets.load_state_dict(before)
        for name in self.optimizers:
            self.nets[name].zero_grad()
        self.nets.pulls.clear()
        run_as(self.nets, Execution())
        return DryRun(turns, min(seconds[1:]))

    def _dry_turns(self, batch: dict[str, Tensor], progress: float) -> Iterator[tuple[str, float, Tensor]]:
        """Play the turns at this progress without moving any player; yield (player, loss, gradient) of each."""
        steps = self.distiller.step(self.nets, batch, progress)
        while True:
            with self._mixed_precision():
                turn = next(steps, None)
            if turn is None:
                return
            player, loss = turn
            self.nets[player].zero_grad()
            self.accelerator.backward(loss)
            parts = [p.grad.float().flatten() for p in self.nets[player].parameters() if p.grad is not None]
            yield player, float(loss.detach()), torch.cat(parts)

    def play(self, steps: list[Iterator[Turn]], rate: float) -> None:
        """Advance all micro-batches turn by turn; after each turn move that turn's player, and it only.

        The first micro-batch leads: what a method does after its last turn (its target network follows) happens once.
        """
        leader, *others = steps
        while True:
            with self._mixed_precision():
                turn = next(leader, None)
            if turn is None:
                return  # the others are dropped where they stand
            player, loss = turn
            optimizer = self.optimizers[player]
            optimizer.zero_grad()
            self._backward(player, loss, len(steps))
            for other in others:
                with self._mixed_precision():
                    player_again, loss = next(other)
                assert player_again == player, "micro-batches of one iteration take the same turns"
                self._backward(player, loss, len(steps))
            self._move(player, optimizer, rate)
            self.turns[player] += 1

    def _mixed_precision(self) -> contextlib.AbstractContextManager[Any]:
        """Choose the precision of the passes; where it is full, accelerate would look its packages up each time."""
        return contextlib.nullcontext() if self.settings.precision == "no" else self.accelerator.autocast()

    def _backward(self, player: str, loss: Tensor, parts: int) -> None:
        """Add the gradient of one of so many micro-batches, and its loss to the log."""
        self.accelerator.backward(loss / parts)
        self.losses[player] = self.losses.get(player, torch.zeros((), device=loss.device)) + loss.detach() / parts

    def _move(self, player: str, optimizer: Any, rate: float) -> None:
        """Average the player's gradients over processes, clip them and take an optimizer step."""
        parameters = [p for p in self.nets[player].parameters() if p.grad is not None]
        if self.accelerator.num_processes > 1:  # not by DDP, for turns call parts of a network
            for p in parameters:
                if not is_split(p):  # whose gradients are averaged as they are split
                    p.grad = self.accelerator.reduce(p.grad, "mean")
        self.accelerator.clip_grad_norm_(parameters, self.settings.clip)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        optimizer.step()

    def rate(self, i: int) -> float:
        """Compute the learning-rate factor of iteration i: linear warm-up, then the chosen decay, in every stage.

        A stage has its share of the warm-up, as it has of the iterations.
        """
        s, progress, stages = self.settings, i / self.settings.iterations, self.distiller.stage_starts()
        k = bisect_right(stages, progress) - 1
        length = [*stages, 1.0][k + 1] - stages[k]
        within = (progress - stages[k]) / length
        warm = min(1.0, (within * s.iterations + 1 / length) / max(s.warmup, 1))
        left = 1 - within
        return warm * {"constant": 1.0, "linear": left, "cosine": 0.5 - 0.5 * float(np.cos(np.pi * left))}[s.decay]

    # --- logs and samples ---------------------------------------------------------------------------------------------
    def log(self, done: int) -> dict[str, float]:
        """Log the mean losses since the last call. Raises TrainingStopped if any was not finite."""
        means = self.check(done)
        self.losses, self.turns, pulls = {}, Counter(), self.nets.pulls
        shown = {f"loss/{k}": v for k, v in means.items()}
        if "adversary" in pulls:  # what its weight comes to
            shown["gradient/adversary_over_loss"] = float(pulls["adversary"] / pulls["loss"].clamp_min(1e-12))
        pulls.clear()
        self.accelerator.log(shown, step=done)
        return means

    def check(self, done: int) -> dict[str, float]:
        """Compute the mean losses since the last log, over all processes so that they stop alike.

        Raises:
            TrainingStopped: a loss is not finite, or a weight (the gradient of a finite loss may be infinite).
        """
        means = {k: float(self.accelerator.reduce(total, "mean")) / self.turns[k] for k, total in self.losses.items()}
        parts = {k: [local_part(p) for p in self.nets[k].parameters()] for k in self.optimizers}
        finite = {k: torch.stack(torch._foreach_norm(values)).isfinite().all() for k, values in parts.items()}
        bad = [k for k in parts if not np.isfinite(means.get(k, 0.0)) or self.any_process(not finite[k])]
        if bad:
            raise TrainingStopped(
                f"the loss of {', '.join(bad)} is not finite at or shortly before iteration {done}; "
                f"last good checkpoint: {newest_checkpoint(self.out) or 'none yet'}. "
                "Start again in another folder with a lower train.learning_rate or train.clip"
                + (', or train.compile = "never".' if self.execution.compiled else ".")
            )
        return means

    def any_process(self, asked: bool) -> bool:
        """Say whether any process was asked to stop: all leave in the same iteration."""
        if self.accelerator.num_processes == 1:
            return asked
        return bool(self.accelerator.reduce(torch.tensor(float(asked), device=self.accelerator.device), "sum"))

    def generator(self, which: Literal["last", "best"] = "last") -> Generator | Autoencoder:
        """Build the generator or autoencoder from the averaged weights, on CPU: the last or the watch's best."""
        if which == "best" and self.accelerator.is_main_process:  # who measured, and publishes
            self.checkpoints.load_best(self.averages)
        if self.shards:
            self.shards.join()
        return self._averaged().requires_grad_(False).to("cpu")

    @torch.no_grad()
    def draw_samples(self, done: int, data: ImageData) -> None:
        """Draw fixed seeds and conditions: samples/NNNNNN.png, and .npy as uint8 (B, H, W, 3) for `evaluate`.

        A translator's stand between the SAR that they are made of and the real pictures. An autoencoder shows the same
        items reconstructed.
        """
        if not (self.accelerator.is_main_process or self.shards):  # networks in parts need all processes
            return
        from distillers.evaluation.pictures import grid_png, side_by_side, to_pixels

        count, folder = self.settings.samples, self.out / "samples"
        folder.mkdir(exist_ok=True)
        count = min(count, len(data))
        batch = data.items([i * len(data) // count for i in range(count)])  # of all classes that are learnt
        with modes_kept(self.nets):
            pictures = self._averaged().draw_items(batch)
        if not self.accelerator.is_main_process:
            return
        condition = self.teacher.condition
        if condition.paired:
            given = condition.pictures(condition.of_items(batch))
            side_by_side({**given, f"iteration {done}": pictures, "real": batch["image"]}, folder / f"{done:06d}.png")
        else:
            grid_png(pictures, columns=max(1, int(np.sqrt(count))), path=folder / f"{done:06d}.png")
        np.save(folder / f"{done:06d}.npy", to_pixels(pictures))
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({"samples": to_pixels(pictures)}, step=done, dataformats="NHWC")

    def _averaged(self) -> Generator | Autoencoder:
        """Build the generator or autoencoder from the averages as they are now."""
        nets = Networks({**self.nets, **self.averages})
        made = self.distiller.generator(nets, self.teacher).eval()
        made.info = replace(made.info, trained_with=sorted({*made.info.trained_with, *judges_of(nets.modules())}))
        return made

    @torch.no_grad()
    def watch(self, done: int, watch: Watch) -> str:
        """Measure the averaged weights on held-out data, log the figures, keep the weights if they are the best."""
        self.check(done)
        with modes_kept(self.nets):
            figures, best = watch.measure(self._averaged(), done)
        self.accelerator.log({f"watch/{name}": value for name, value in figures.items()}, step=done)
        if best and self.averages:
            self.checkpoints.save_best(self.averages)
        return ", ".join(f"{name} {value:.4g}" for name, value in figures.items()) + (" (best)" if best else "")

    # --- cost ---------------------------------------------------------------------------------------------------------
    def start_clock(self) -> None:
        """Start to count the seconds of iterations."""
        self._started = time.perf_counter()

    def stop_clock(self) -> None:
        """Add the seconds since `start_clock`. This waits for the device, so it is not done in every iteration."""
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize(self.accelerator.device)
        self.seconds += time.perf_counter() - self._started

    def cost(self, done: int) -> dict[str, Any]:
        """Report what `done` iterations took: wall seconds, without logs, samples and checkpoints, and peak memory.

        Memory in MB: tensors on a GPU; on CPU the resident size of the whole process, whatever else it did before.
        """
        device = self.accelerator.device
        self.peak_mb = max(self.peak_mb, _peak_memory(device))
        return {
            "iterations": done,
            "batch": self.settings.batch * self.accelerator.num_processes,  # images per iteration
            "seconds": self.seconds,
            "waited_for_data": self.batches.waited,  # seconds of these
            "execution": str(self.execution),
            "peak_memory_mb": self.peak_mb,
            "device": device_name(device),
            "threads": torch.get_num_threads(),
            "precision": self.settings.precision,
        }

    def write_cost(self, done: int) -> None:
        """Write cost.json into the run folder."""
        if self.accelerator.is_main_process:
            (self.out / "cost.json").write_text(json.dumps(self.cost(done), indent=2) + "\n")

    # --- checkpoints -------------------------------------------------------------------------------------------------
    def save(self, done: int) -> None:
        """Write the checkpoint of iteration `done`."""
        self.check(done)
        if not (self.accelerator.is_main_process or self.shards):
            return
        state = {
            "nets": {name: whole(net.state_dict()) for name, net in self.nets.items() if name not in self.of_teacher},
            "averages": {name: whole(net.state_dict()) for name, net in self.averages.items()},
            "optimizers": {name: whole(optimizer.state_dict()) for name, optimizer in self.optimizers.items()},
        }
        if not self.accelerator.is_main_process:
            return
        spent = {k: v for k, v in self.cost(done).items() if k in ("seconds", "waited_for_data", "peak_memory_mb")}
        self.checkpoints.save(done, state, {"execution": asdict(self.execution), **spent})
        self.write_cost(done)

    def resume(self) -> int:
        """Load the newest checkpoint and return the iteration to go on with, 0 if there is none."""
        found = self.checkpoints.load(torch.device("cpu") if self.shards else self.accelerator.device)
        if found is None:
            return 0
        state, about = found
        for kind, parts in (("nets", self.nets), ("averages", self.averages)):
            for name, values in state[kind].items():
                load_whole(parts[name], values)
        for name, values in state["optimizers"].items():
            load_whole_optimizer(self.optimizers[name], values)
        self.seconds, self.peak_mb = about.get("seconds", 0.0), about.get("peak_memory_mb", 0.0)
        self.batches.waited = about.get("waited_for_data", 0.0)
        self.execution = Execution(**about.get("execution", {}))
        run_as(self.nets, self.execution)
        if self.accelerator.is_main_process:
            self.checkpoints.prune()
        done, length = int(about["iteration"]), self.settings.iterations
        if done > length:
            raise BadInput("train.iterations", length, f"{done} or more, which {self.out} has had already")
        before, now = (
            described.get("train", {}).get("iterations", TrainSettings.iterations)
            for described in (about["description"], self.checkpoints.description)
        )
        if before != now:
            text = f"goes on from iteration {done} of what was a training of {before} iterations and is one of {now}"
            how = "learning rates and curricula follow the new length from there on"
            warnings.warn(f"{text}: {how}", Notice, stacklevel=2)
        return done


class _Termination:
    """A context that notes SIGTERM and SIGINT, so that the loop can write a checkpoint at the end of the iteration.

    A second SIGINT interrupts at once, unless there are several processes, to which torchrun sends each twice.
    """

    def __init__(self, *, alone: bool) -> None:
        self.asked, self.alone = False, alone

    def __enter__(self) -> _Termination:
        self.before: dict[int, Any] = {}
        with contextlib.suppress(ValueError):  # not the main thread: the caller owns the signals
            for number in (signal.SIGTERM, signal.SIGINT):
                self.before[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, _: Any) -> None:
        if self.asked and self.alone and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def _peak_memory(device: torch.device) -> float:
    """Measure MB: the most that tensors took on a GPU; elsewhere the most that this process has had resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, kilobytes elsewhere


def _mix(*numbers: int) -> int:
    """Mix several integers into one 63-bit seed (NumPy's SeedSequence)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
