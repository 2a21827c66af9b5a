"""The batcher by simulation and under threads: every order gets exactly one answer, the oldest head goes first."""

import random
import threading
from concurrent.futures import CancelledError, Future
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.engine.batcher import Batcher, Closed, Full

LIMIT = 6
LARGEST = {"a": 1, "b": 2, "c": 4}
MOVES = st.one_of(
    st.tuples(st.just("put"), st.sampled_from(sorted(LARGEST)), st.integers(1, 5)),
    st.tuples(st.just("take"), st.booleans()),
    st.tuples(st.just("cancel"), st.integers(0, 100)),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(MOVES, max_size=60))
def test_every_order_gets_exactly_one_answer(moves: list[Any]) -> None:
    batcher: Batcher[str, int, int] = Batcher(LIMIT, LARGEST.__getitem__)
    futures: list[Future[int]] = []
    waiting: list[tuple[str, int]] = []  # the model: (key, order) in the sequence of arrival, cancelled ones removed
    taken: set[int] = set()
    for move, *rest in moves:
        if move == "put":
            key, count = rest
            orders = list(range(len(futures), len(futures) + count))
            if len(waiting) + count > LIMIT:
                with pytest.raises(Full):
                    batcher.put([(key, order) for order in orders])
            else:
                futures += batcher.put([(key, order) for order in orders])
                waiting += [(key, order) for order in orders]
        elif move == "cancel" and futures:
            order = rest[0] % len(futures)
            assert futures[order].cancel() == (order not in taken)
            waiting = [(key, other) for key, other in waiting if other != order]
        elif move == "take" and waiting:
            turn = batcher.take()
            assert turn is not None
            key, tickets = turn
            expected = [order for other, order in waiting if other == waiting[0][0]][: LARGEST[waiting[0][0]]]
            assert (key, [ticket.order for ticket in tickets]) == (waiting[0][0], expected)
            waiting = [(other, order) for other, order in waiting if order not in expected]
            taken |= set(expected)
            for ticket in tickets:
                if rest[0]:
                    ticket.answer.set_result(ticket.order)
                else:
                    ticket.answer.set_exception(ArithmeticError(ticket.order))
    batcher.close()
    for order, future in enumerate(futures):
        assert future.done()
        if future.cancelled():
            assert order not in taken
        elif order in taken:
            error = future.exception()
            assert future.result() == order if error is None else error.args == (order,)
        else:
            assert isinstance(future.exception(), Closed)
    with pytest.raises(Closed):
        batcher.put([("a", 0)])
    assert batcher.take() is None


def test_a_cancelled_head_gives_its_place_away() -> None:
    batcher: Batcher[str, int, int] = Batcher(LIMIT, LARGEST.__getitem__)
    (left,), _, _ = batcher.put([("b", 0)]), batcher.put([("a", 1)]), batcher.put([("b", 2)])
    assert left.cancel()
    turn = batcher.take()
    assert turn is not None and (turn[0], [ticket.order for ticket in turn[1]]) == ("a", [1])


def test_under_threads_nothing_is_lost_and_nothing_cancelled_is_run() -> None:
    batcher: Batcher[int, tuple[int, int], tuple[int, int]] = Batcher(10_000, lambda key: 8)
    ran: list[tuple[int, int]] = []

    def work() -> None:
        while (turn := batcher.take()) is not None:
            for ticket in turn[1]:
                ran.append(ticket.order)
                ticket.answer.set_result(ticket.order)

    cancelled: set[tuple[int, int]] = set()
    futures: dict[tuple[int, int], Future[tuple[int, int]]] = {}

    def ask(caller: int) -> None:
        chance = random.Random(caller)
        for number in range(300):
            order = (caller, number)
            (futures[order],) = batcher.put([(chance.randrange(3), order)])
            if chance.random() < 0.3 and futures[order].cancel():
                cancelled.add(order)

    worker, callers = threading.Thread(target=work), [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in (worker, *callers):
        thread.start()
    for thread in callers:
        thread.join()
    for order, future in futures.items():
        if order in cancelled:
            with pytest.raises(CancelledError):
                future.result(timeout=10)
        else:
            assert future.result(timeout=10) == order
    batcher.close()
    worker.join(timeout=10)
    assert not worker.is_alive()
    assert sorted(ran) == sorted(futures.keys() - cancelled)


def test_take_waits_without_a_timer_until_there_is_work() -> None:
    batcher: Batcher[str, int, int] = Batcher(4, lambda key: 4)
    seen: list[Any] = []
    taker = threading.Thread(target=lambda: seen.append(batcher.take()))
    taker.start()
    (first,) = batcher.put([("a", 1)])
    taker.join(timeout=10)
    assert seen[0][0] == "a" and seen[0][1][0].answer is first


def test_those_who_left_do_not_keep_others_out() -> None:
    batcher: Batcher[str, int, int] = Batcher(2, lambda key: 4)
    for future in batcher.put([("a", 1), ("a", 2)]):
        future.cancel()
    (kept,) = batcher.put([("b", 3)])
    turn = batcher.take()
    assert turn is not None and turn[1][0].answer is kept
