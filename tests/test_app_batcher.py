"""The batcher by simulation and under threads: every order gets exactly one answer, and everybody his turn."""

import random
import threading
from collections import Counter
from concurrent.futures import CancelledError, Future
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from app.engine.batcher import Batcher, Closed, Full, QueueEntry

LIMIT = 6
LARGEST = {"a": 1, "b": 2, "c": 4}


class Even:
    """Every order costs the same, and keys have the largest batches of LARGEST; some wait, some let others pass."""

    def __init__(self, seconds: float = 1.0) -> None:
        self.each, self.held, self.patient = seconds, set[str](), dict[str, float]()

    def batch_size(self, key: str, waiting: int) -> int:
        return min(waiting, LARGEST[key])

    def seconds(self, key: str, count: int) -> float:
        return self.each * count

    def patience(self, key: str) -> float:
        return self.patient.get(key, 0.0)

    def ready(self, key: str) -> bool:
        return key not in self.held


class Simulation(RuleBasedStateMachine):
    """Arrivals, cancellations, keys that must wait, turns that succeed and fail, in any sequence, against a model."""

    def __init__(self) -> None:
        super().__init__()
        self.costs = Even()
        self.batcher: Batcher[str, int, int] = Batcher(LIMIT, self.costs)
        self.futures: list[Future[int]] = []
        self.key: list[str] = []
        self.waiting: set[int] = set()  # neither taken nor cancelled
        self.met: set[int] = set()  # taken
        self.seen: Counter[int] = Counter()  # answers

    @rule(key=st.sampled_from(sorted(LARGEST)), count=st.integers(1, 5))
    def arrive(self, key: str, count: int) -> None:
        orders = list(range(len(self.futures), len(self.futures) + count))
        if len(self.waiting) + count > LIMIT:
            with pytest.raises(Full):
                self.batcher.put([(key, order) for order in orders])
            return
        for order, future in zip(orders, self.batcher.put([(key, order) for order in orders]), strict=True):
            future.add_done_callback(lambda _, order=order: self.seen.update([order]))
            self.futures.append(future)
            self.key.append(key)
            self.waiting.add(order)

    @rule(which=st.integers(0, 1000))
    @precondition(lambda self: self.futures)
    def cancel(self, which: int) -> None:
        order = which % len(self.futures)
        assert self.futures[order].cancel() == (order in self.waiting or self.futures[order].cancelled())
        self.waiting.discard(order)

    @rule(keys=st.sets(st.sampled_from(sorted(LARGEST))))
    def hold(self, keys: set[str]) -> None:
        self.costs.held = keys

    @rule(patience=st.dictionaries(st.sampled_from(sorted(LARGEST)), st.integers(1, 8)))
    def become_patient(self, patience: dict[str, float]) -> None:
        self.costs.patient = patience

    @rule(works=st.booleans())
    @precondition(lambda self: any(self.key[order] not in self.costs.held for order in self.waiting))
    def turn(self, works: bool) -> None:
        turn = self.batcher.take()
        assert turn is not None
        key, entries = turn
        orders = [entry.order for entry in entries]
        assert orders == sorted(orders) and 1 <= len(orders) <= LARGEST[key]
        assert {self.key[order] for order in orders} == {key} and set(orders) <= self.waiting
        assert key not in self.costs.held
        older = [o for o in self.waiting if self.key[o] == key and o < orders[-1] and o not in orders]
        assert not older  # within a key, the sequence of arrival
        self.met |= set(orders)
        self.waiting -= set(orders)
        for entry in entries:
            if works:
                entry.answer.set_result(entry.order)
            else:
                entry.answer.set_exception(ArithmeticError(entry.order))

    @invariant()
    def all_are_counted(self) -> None:
        assert sum(self.batcher.waiting().values()) == len(self.waiting) <= len(self.batcher) <= LIMIT

    def teardown(self) -> None:
        self.batcher.close()
        for order, future in enumerate(self.futures):
            assert future.done() and self.seen[order] == 1  # exactly one answer
            if order in self.met:
                error = future.exception()
                assert future.result() == order if error is None else error.args == (order,)
            elif not future.cancelled():
                assert isinstance(future.exception(), Closed)
        with pytest.raises(Closed):
            self.batcher.put([("a", 0)])
        assert self.batcher.take() is None


TestEveryOrderGetsExactlyOneAnswer = Simulation.TestCase
TestEveryOrderGetsExactlyOneAnswer.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


def orders(turn: tuple[str, list[QueueEntry[int, int]]] | None) -> list[int]:
    assert turn is not None
    return [entry.order for entry in turn[1]]


def test_those_who_ask_little_are_served_in_the_sequence_of_arrival() -> None:
    batcher: Batcher[str, int, int] = Batcher(LIMIT, Even())
    for key, order in [("b", 0), ("c", 1), ("a", 2)]:
        batcher.put([(key, order)])
    assert [orders(batcher.take()) for _ in range(3)] == [[0], [1], [2]]


def test_who_floods_the_queue_waits_behind_his_own_flood() -> None:
    batcher: Batcher[str, int, int] = Batcher(100, Even())
    batcher.put([("b", order) for order in range(50)])
    assert orders(batcher.take()) == [0, 1]
    batcher.put([("a", 100)])
    assert orders(batcher.take()) == [100]
    assert orders(batcher.take()) == [2, 3]


def test_what_is_patient_runs_when_nobody_else_would_and_takes_its_share_of_a_full_device() -> None:
    costs, limit = Even(), 1000
    costs.patient = {"b": 8.0}
    batcher: Batcher[str, int, int] = Batcher(limit, costs)
    batcher.put([("b", 0)])
    batcher.put([("a", 1)])
    assert batcher.backlog_s() == 1  # what lets others pass delays nobody
    assert [orders(batcher.take()) for _ in range(2)] == [[1], [0]]
    batcher.put([("a", order) for order in range(900)])
    served = Counter[str]()
    for _ in range(90):
        if not batcher.waiting().get("b"):
            batcher.put([("b", 0)])
        served[(batcher.take() or ("", []))[0]] += 1
    assert 9 <= served["b"] <= 10


def test_who_must_wait_keeps_nobody_else_and_runs_when_it_may() -> None:
    costs = Even()
    batcher: Batcher[str, int, int] = Batcher(LIMIT, costs)
    costs.held = {"a"}
    batcher.put([("a", 0)])
    batcher.put([("b", 1)])
    assert orders(batcher.take()) == [1]
    seen: list[Any] = []
    taker = threading.Thread(target=lambda: seen.append(batcher.take()), daemon=True)
    taker.start()
    while not batcher._asleep:
        pass
    costs.held = set()
    batcher.ring()
    taker.join(timeout=300)
    assert orders(seen[0]) == [0]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32))
def test_nobody_starves_and_shares_are_even(seed: int) -> None:
    """Two keys that always have work get half of the time each, whatever the sizes of their batches."""
    draw, batcher = random.Random(seed), Batcher[str, int, int](10_000, Even())
    batcher.put([("a", 0) for _ in range(300)])
    served: Counter[str] = Counter()
    for turn in range(120):
        if turn < 60:
            batcher.put([("c", 0) for _ in range(draw.randint(4, 9))])
        key, entries = batcher.take() or ("", [])
        if turn >= 10:
            served[key] += len(entries)
        if turn == 70:
            break
    assert abs(served["a"] - served["c"]) <= 8


def test_predicted_seconds_bound_the_queue_too_but_never_an_empty_one() -> None:
    batcher: Batcher[str, int, int] = Batcher(1000, Even(seconds=10), limit_s=25)
    batcher.put([("a", order) for order in range(3)])  # 30 seconds at once
    with pytest.raises(Full) as full:
        batcher.put([("a", 3)])
    assert batcher.backlog_s() == 30 and full.value.seconds == 5  # which is what is beyond the 25
    for _ in range(2):
        batcher.take()
    batcher.put([("a", 3)])


@pytest.mark.parametrize(("count", "seconds"), [(1, 10), (3, 30), (4, 40), (100, 40)])
def test_who_finds_no_room_is_told_when_there_is_room_for_his_orders(count: int, seconds: float) -> None:
    """Not when all is done that waits, unless so much has to be."""
    batcher: Batcher[str, int, int] = Batcher(4, Even(seconds=10))
    batcher.put([("a", order) for order in range(4)])
    with pytest.raises(Full) as full:
        batcher.put([("c", order) for order in range(count)])
    assert full.value.seconds == seconds


def test_a_cancelled_head_gives_its_place_away() -> None:
    batcher: Batcher[str, int, int] = Batcher(LIMIT, Even())
    (left,), _, _ = batcher.put([("b", 0)]), batcher.put([("a", 1)]), batcher.put([("b", 2)])
    assert left.cancel()
    assert orders(batcher.take()) == [1]


def test_calls_that_come_one_after_the_other_leave_nothing_behind() -> None:
    batcher: Batcher[str, int, int] = Batcher(LIMIT, Even())
    for order in range(1000):
        batcher.put([(random.choice("abc"), order)])
        assert orders(batcher.take()) == [order]
    assert not batcher._queues and not batcher._last_tag


def test_under_threads_nothing_is_lost_and_nothing_cancelled_is_run() -> None:
    batcher: Batcher[str, tuple[int, int], tuple[int, int]] = Batcher(10_000, Even())
    ran: list[tuple[int, int]] = []

    def work() -> None:
        while (turn := batcher.take()) is not None:
            for entry in turn[1]:
                ran.append(entry.order)
                entry.answer.set_result(entry.order)

    cancelled: set[tuple[int, int]] = set()
    futures: dict[tuple[int, int], Future[tuple[int, int]]] = {}

    def ask(caller: int) -> None:
        chance = random.Random(caller)
        for number in range(300):
            order = (caller, number)
            (futures[order],) = batcher.put([(chance.choice("abc"), order)])
            if chance.random() < 0.3 and futures[order].cancel():
                cancelled.add(order)

    worker, callers = (
        threading.Thread(target=work, daemon=True),
        [threading.Thread(target=ask, args=(i,)) for i in range(4)],
    )
    for thread in (worker, *callers):
        thread.start()
    for thread in callers:
        thread.join()
    for order, future in futures.items():
        if order in cancelled:
            with pytest.raises(CancelledError):
                future.result(timeout=300)
        else:
            assert future.result(timeout=300) == order
    batcher.close()
    worker.join(timeout=300)
    assert not worker.is_alive()
    assert sorted(ran) == sorted(futures.keys() - cancelled)


def test_take_waits_without_a_timer_until_there_is_work() -> None:
    batcher: Batcher[str, int, int] = Batcher(4, Even())
    seen: list[Any] = []
    taker = threading.Thread(target=lambda: seen.append(batcher.take()), daemon=True)
    taker.start()
    (first,) = batcher.put([("a", 1)])
    taker.join(timeout=300)
    assert seen[0][0] == "a" and seen[0][1][0].answer is first


def test_those_who_left_do_not_keep_others_out() -> None:
    batcher: Batcher[str, int, int] = Batcher(2, Even())
    for future in batcher.put([("a", 1), ("a", 2)]):
        future.cancel()
    (kept,) = batcher.put([("b", 3)])
    turn = batcher.take()
    assert turn is not None and turn[1][0].answer is kept
