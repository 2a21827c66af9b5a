"""What batches cost: the plan for a queue is the fastest there is, and what is learned at work is kept."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.engine.batch_cost import BatchCost, worth_having

# a larger bucket costs more, by however little
BUCKETS = st.lists(st.floats(0.01, 8), max_size=3).map(
    lambda more: {2 << i: 1 + sum(more[: i + 1]) for i in range(len(more))}
)


def cheapest(seconds: dict[int, float], count: int) -> float:
    """By trying every multiset of buckets that holds so many."""
    best = float("inf")
    for amounts in itertools.product(*(range(-(-count // bucket) + 1) for bucket in seconds)):
        if sum(a * b for a, b in zip(amounts, seconds, strict=True)) >= count:
            best = min(best, sum(a * s for a, s in zip(amounts, seconds.values(), strict=True)))
    return best


@given(BUCKETS, st.integers(1, 12))
def test_the_plan_is_the_fastest(more: dict[int, float], count: int) -> None:
    cost = BatchCost({1: 1.0, **more}, largest=8)
    assert cost.predict(count) == pytest.approx(cheapest(cost.seconds, count), rel=0.01)
    spent, left = 0.0, count
    while left:  # what `take` dispatches one after the other takes as long as predicted
        taken = cost.batch_size(left)
        assert 1 <= taken <= left
        spent += cost.seconds[cost.bucket(taken)]
        left -= taken
    assert spent == pytest.approx(cheapest(cost.seconds, count), rel=0.01)


def test_five_that_wait_are_a_padded_eight_or_four_and_one() -> None:
    padded = BatchCost({1: 1.0, 4: 2.0, 8: 2.5})
    assert (padded.batch_size(5), padded.bucket(5), padded.predict(5)) == (5, 8, 2.5)
    split = BatchCost({1: 1.0, 4: 2.0, 8: 3.9})
    assert (split.batch_size(5), split.bucket(4), split.predict(5)) == (4, 4, 3.0)


def test_buckets_that_gain_nothing_are_not_kept() -> None:
    assert worth_having({1: 1.0, 2: 1.9, 4: 4.0, 8: 6.0}) == {1: 1.0, 2: 1.9, 8: 6.0}
    assert worth_having({1: 1.0, 2: 1.99, 4: 3.99}) == {1: 1.0}


def test_what_was_not_measured_is_learned_at_work() -> None:
    cost = BatchCost(largest=4, guess=0.5)
    assert (cost.batch_size(9), cost.bucket(3), cost.predict(4)) == (4, 3, 2.0)
    cost.observe(4, 0.4)
    assert cost.predict(4) == pytest.approx(0.4)
    for _ in range(100):
        cost.observe(2, 0.4)
    assert cost.predict(1) == pytest.approx(0.2, rel=0.01)


@pytest.mark.parametrize(
    ("rates", "limit"),
    [
        ({16: 1.0, 8: 0.6, 4: 0.5, 2: 0.7, 1: 1.0}, 4),
        ({16: 1.0, 8: 1.5}, 16),
        (dict.fromkeys((16, 8, 4, 2, 1), 1.0), 1),
    ],
)
def test_the_size_of_batches_is_found_at_work(rates: dict[int, float], limit: int) -> None:
    """A cache that holds four pictures; a device that larger batches suit; one to which they are all the same."""
    cost = BatchCost(largest=16)
    for _ in range(20):
        taken = cost.batch_size(40)
        cost.observe(taken, taken * rates[taken])
    assert cost.batch_size(40) == limit
    assert cost.predict(10) == pytest.approx(10 * rates[limit], rel=0.15)


def test_batches_that_do_not_fill_the_limit_say_nothing_about_it() -> None:
    cost = BatchCost(largest=16)
    for _ in range(20):
        cost.observe(3, 3.0)
    assert cost.batch_size(40) == 16


def test_plans_follow_a_bucket_that_became_slower() -> None:
    cost = BatchCost({1: 1.0, 4: 2.0})
    assert cost.batch_size(4) == 4
    for _ in range(100):
        cost.observe(4, 8.0)
    assert cost.batch_size(4) == 1 and cost.predict(4) == pytest.approx(4.0)


def test_a_device_that_became_slower_is_believed_step_by_step() -> None:
    cost = BatchCost({1: 1.0, 2: 1.5})
    cost.observe(1, 2.0)
    assert cost.seconds == {1: pytest.approx(1.1), 2: 1.5}
    for _ in range(100):
        cost.observe(1, 2.0)
    assert cost.seconds[1] == pytest.approx(2.0, rel=0.1)


def test_a_stop_of_the_process_is_forgotten() -> None:
    """A minute in the middle of one pass: a lone picture still runs alone, and what is predicted comes back."""
    cost = BatchCost({1: 0.006, 2: 0.011, 4: 0.020})
    cost.observe(1, 60.0)
    assert cost.predict(1) < 0.02 and cost.batch_size(1) == cost.bucket(1) == 1
    for _ in range(40):
        cost.observe(cost.batch_size(1), 0.006)
    assert cost.seconds[1] == pytest.approx(0.006, rel=0.05)


def test_what_did_not_fit_into_memory_is_never_tried_again() -> None:
    cost = BatchCost({1: 1.0, 2: 1.1, 4: 1.2, 8: 1.3})
    cost.halve(8)
    assert cost.batch_size(8) == 4 and 8 not in cost.seconds
    cost.halve(1)
    assert cost.batch_size(8) == 1
