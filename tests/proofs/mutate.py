"""Changes the loss code one thing at a time, runs the quick tests on each mutant, and fails when one survives.

    python tests/proofs/mutate.py                 # all; writes docs/results/mutants.md
    python tests/proofs/mutate.py --third         # the third that belongs to the checked-out commit
    python tests/proofs/mutate.py --only dmd2 pso # those whose name begins so

Tests are collected and run once, which tells what lines each of them runs. A mutant is then a forked process in which
the changed function has other code; it runs the tests that come by its line until one fails. Mutants that no test can
tell from the original are in `equivalent_mutants.py`, each with the reason.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import FrameType, ModuleType
from typing import TYPE_CHECKING, Any

from by_commit import in_turn

if TYPE_CHECKING:
    from mutants import Mutant

ROOT = Path(__file__).parents[2]
TESTS = ("tests/test_terms.py", "tests/test_losses.py")  # by hand, and no more than a minute for the slowest mutant

LONGEST = 4  # CPU seconds that a test may take on a mutant: some never end


def mutated(module: ModuleType, old: str, new: str) -> Any:
    """A second copy of a module in which `old`, which stands there exactly once, reads `new`. The first stays whole."""
    source = inspect.getsource(module)
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {module.__name__}"
    copy = ModuleType(module.__name__)  # its own name, by which dataclasses look their annotations up
    exec(compile(source.replace(old, new), f"{module.__file__} (mutated)", "exec"), vars(copy))
    return copy


# --- mutants against tests -------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Outcome:
    """What became of a mutant: the test that noticed it, or None."""

    name: str
    line: int
    kind: str
    noticed_by: str | None
    tests: int  # that come by its line
    seconds: float


@dataclass(frozen=True)
class Passage:
    """A test on the code as it is: does it pass, what lines of the loss code does it run, what does it cost."""

    passed: bool
    lines: frozenset[tuple[str, int]]
    seconds: float


class Mutation:
    """A pytest plugin that runs the collected tests on mutants in place of running them once."""

    def __init__(self, mutants: Sequence[Mutant], equivalent: Collection[str], jobs: int) -> None:
        self.mutants, self.equivalent, self.jobs = mutants, equivalent, jobs
        self.items: list[Any] = []
        self.passages: list[Passage] = []
        self.outcomes: list[Outcome] = []

    def pytest_runtestloop(self, session: Any) -> bool:
        global PLUGIN
        import torch

        torch.set_num_threads(1)
        self.items, PLUGIN = session.items, self
        fork, began = multiprocessing.get_context("fork"), time.monotonic()
        self.passages = _run_all()  # here, so that forked processes find imported and cached what the tests need
        failing = [item.nodeid for item, passage in zip(self.items, self.passages, strict=True) if not passage.passed]
        if failing:
            raise SystemExit("these tests fail without any mutant: " + ", ".join(failing))
        say(f"{len(self.items)} tests in {time.monotonic() - began:.0f} s, {len(self.mutants)} mutants")
        gc.collect()
        gc.freeze()  # a collection in a forked process would touch, and so copy, every page that it shares
        # a process for each mutant, so that none inherits what another one spoilt
        with fork.Pool(self.jobs, maxtasksperchild=1) as pool:
            for i, outcome in enumerate(pool.imap(_judge, range(len(self.mutants)), chunksize=1), 1):
                self.outcomes.append(outcome)
                if not outcome.noticed_by and outcome.name not in self.equivalent:
                    say(f"survived, line {outcome.line}, {outcome.tests} tests pass by: {outcome.name}")
                if i % 100 == 0:
                    say(f"{i} of {len(self.mutants)} in {time.monotonic() - began:.0f} s")
        return True

    def run(self, item: Any, following: Any) -> bool:
        """Run one test; whether it passes."""
        from _pytest.runner import runtestprotocol

        return not any(report.failed for report in runtestprotocol(item, nextitem=following, log=False))

    def judge(self, mutant: Mutant) -> Outcome:
        """Run the tests that come by the mutant's line, the cheapest first, until one fails."""
        began, place = time.process_time(), (mutant.file, mutant.line)
        pairs = [(i, p) for i, p in zip(self.items, self.passages, strict=True) if place in p.lines]
        chosen = [item for item, passage in sorted(pairs, key=lambda pair: pair[1].seconds)]
        mutant.apply()
        signal.signal(signal.SIGVTALRM, _too_long)
        noticed = None
        for item, following in pairwise([*chosen, None]):
            signal.setitimer(signal.ITIMER_VIRTUAL, LONGEST)
            if not self.run(item, following):
                noticed = item.nodeid
                break
        seconds = time.process_time() - began
        return Outcome(mutant.name, mutant.line, mutant.kind, noticed, len(chosen), seconds)


PLUGIN: Mutation  # in forked processes, where nothing but a number can be handed over


def _too_long(*_: Any) -> None:
    raise TimeoutError(f"a test that runs for {LONGEST} CPU seconds does not end")


def _judge(number: int) -> Outcome:
    return PLUGIN.judge(PLUGIN.mutants[number])


def _run_all() -> list[Passage]:
    files, lines = {mutant.file for mutant in PLUGIN.mutants}, set[tuple[str, int]]()

    def at_call(frame: FrameType, event: str, _: Any) -> Any:
        return at_line if frame.f_code.co_filename in files else None

    def at_line(frame: FrameType, event: str, _: Any) -> Any:
        lines.add((frame.f_code.co_filename, frame.f_lineno))
        return at_line

    found = []
    for item, following in pairwise([*PLUGIN.items, None]):
        lines.clear()
        began = time.process_time()
        sys.settrace(at_call)
        passed = PLUGIN.run(item, following)
        sys.settrace(None)
        found.append(Passage(passed, frozenset(lines), time.process_time() - began))
    return found


def say(text: str) -> None:
    print(text, file=sys.__stdout__, flush=True)


# --- the command -----------------------------------------------------------------------------------------------------
def page(outcomes: Sequence[Outcome], equivalent: dict[str, str], seconds: float) -> str:
    """docs/results/mutants.md."""
    by_function: dict[str, Counter[str]] = defaultdict(Counter)
    by_kind: dict[str, Counter[str]] = defaultdict(Counter)
    for outcome in outcomes:
        fate = "killed" if outcome.noticed_by else "equivalent" if outcome.name in equivalent else "survived"
        by_function[outcome.name.partition(":")[0]][fate] += 1
        by_kind[outcome.kind][fate] += 1
    fates = ("killed", "equivalent", "survived")

    def table(title: str, counted: dict[str, Counter[str]]) -> str:
        rows = [f"| {title} | mutants | killed | equivalent | survived |", "| --- | --- | --- | --- | --- |"]
        every: Counter[str] = sum(counted.values(), Counter())
        for name, counts in [*counted.items(), ("**all**", every)]:
            rows.append(f"| {name} | {counts.total()} | " + " | ".join(str(counts[fate]) for fate in fates) + " |")
        return "\n".join(rows)

    cost = sum(outcome.seconds for outcome in outcomes)
    equals = [f"- `{name.partition(':')[0]}`: {name.partition(': ')[2]}. {why}" for name, why in equivalent.items()]
    return "\n\n".join(
        [
            "# Mutants of the loss code",
            "One thing is changed at a time in the functions that losses come from, and the tests by hand run on each "
            "such mutant (`make mutate`; `make test` runs the third that belongs to the commit). Killed: a test fails. "
            "Equivalent: the mutant computes the same, or nothing that a user could tell from it; each is listed with "
            f"the reason. {len(outcomes)} mutants, {cost:.0f} CPU seconds, {seconds:.0f} s in all. Written by "
            "`python tests/proofs/mutate.py`.",
            table("kind of change", by_kind),
            table("function", by_function),
            "## Equivalent mutants",
            "\n".join(equals),
        ]
    ) + "\n"  # fmt: skip


def main() -> int:
    import pytest
    from equivalent_mutants import EQUIVALENT
    from mutants import mutants

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--third", action="store_true", help="only the third that belongs to the commit")
    parser.add_argument("--only", nargs="+", default=[""], help="only mutants whose name begins with one of these")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="mutants at a time")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results/mutants.md")
    given = parser.parse_args()
    began, every = time.monotonic(), mutants()
    wanted = [m for m in every if m.name.startswith(tuple(given.only))]
    chosen = [m for m in wanted if not given.third or in_turn(m.name, 3)]
    plugin = Mutation(chosen, EQUIVALENT, given.jobs)
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--capture=sys", "-W", "ignore"]
    code = pytest.main([*options, *(str(ROOT / test) for test in TESTS)], plugins=[plugin])
    if code or len(plugin.outcomes) < len(chosen):
        return int(code) or 1
    survivors = [o for o in plugin.outcomes if not o.noticed_by and o.name not in EQUIVALENT]
    told_apart = [o for o in plugin.outcomes if o.noticed_by and o.name in EQUIVALENT]
    stale = EQUIVALENT.keys() - {m.name for m in every}
    for outcome in told_apart:
        say(f"called equivalent, but {outcome.noticed_by} notices it: {outcome.name}")
    for name in sorted(stale):
        say(f"called equivalent, but there is no such mutant: {name}")
    say(f"{len(plugin.outcomes)} mutants, {len(survivors)} survived, in {time.monotonic() - began:.0f} s")
    if not given.third and given.only == [""]:
        given.out.write_text(page(plugin.outcomes, EQUIVALENT, time.monotonic() - began))
    return int(bool(survivors or told_apart or stale))


if __name__ == "__main__":
    sys.exit(main())
