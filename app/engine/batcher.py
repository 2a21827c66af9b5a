"""Decide what runs next: a bounded queue for each key, from which a free worker takes batches. No torch, no HTTP.

There is no timer. A free worker takes what is there: a lone order runs at once, and under load orders gather while the
worker is busy, so batches form by themselves. Cancelled orders are skipped, and every order gets exactly one answer: a
result, an error, or its own cancellation.

The next key is chosen by start-time fair queueing (Goyal, Vin and Cheng 1996): every order is tagged with the virtual
time at which its key would reach it if all waiting keys shared the worker evenly, and the smallest tag goes first. Keys
with few orders are served in the sequence of arrival; a key that floods the queue waits behind its own flood. A patient
key lets others pass: its orders are tagged with the time at which it would end, had it but a part of the worker.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

Key = TypeVar("Key", bound=Hashable)
KeyIn = TypeVar("KeyIn", bound=Hashable, contravariant=True)
Order = TypeVar("Order")
Result = TypeVar("Result")


class Full(Exception):
    """The orders do not fit into the queue; none of them was taken."""

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.seconds = seconds  # predicted, until there is room for these orders


class Closed(Exception):
    """The batcher takes no more orders."""


class Costs(Protocol[KeyIn]):
    """Predicts what the work costs: see `app.engine.batch_cost`."""

    def batch_size(self, key: KeyIn, waiting: int) -> int:
        """Return how many of the waiting orders should run together now, at least 1."""

    def seconds(self, key: KeyIn, count: int) -> float:
        """Predict the seconds of so many orders of this key."""

    def patience(self, key: KeyIn) -> float:
        """Return how many times an order's own seconds others may run before it; 0 for its turn at once."""

    def ready(self, key: KeyIn) -> bool:
        """Return whether orders of this key may run now. `Batcher.ring` tells when it may have changed."""


@dataclass(eq=False, slots=True)
class QueueEntry(Generic[Order, Result]):
    """Holds a waiting order and the future of its answer."""

    order: Order
    number: int  # in the sequence of arrival
    arrived: float  # by the batcher's clock
    tag: float  # virtual start time, in seconds of device time
    answer: Future[Result] = field(default_factory=Future)


class Batcher(Generic[Key, Order, Result]):
    """Keeps a queue for each key, with one limit on all of them together.

    Args:
        limit: orders that may wait.
        costs: predicts how many orders of a key should run together, and how long they take.
        limit_s: predicted seconds of work that may wait. An empty queue takes whatever fits `limit`.
        clock: gives the time in seconds.
    """

    def __init__(
        self,
        limit: int,
        costs: Costs[Key],
        limit_s: float = float("inf"),
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.limit, self.limit_s, self.costs, self.clock = limit, limit_s, costs, clock
        self._queues: dict[Key, deque[QueueEntry[Order, Result]]] = {}
        self._last_tag: dict[Key, float] = {}  # virtual time at which a waiting key's last order would be done
        self._virtual = 0.0
        self._waiting = self._number = 0
        self.closed = False
        self._lock, self._bell, self._asleep = threading.Lock(), threading.Lock(), False
        self._bell.acquire()  # take() sleeps by acquiring it again

    def __len__(self) -> int:
        """Count the orders that wait, including cancelled ones that were not removed yet."""
        return self._waiting

    def waiting(self) -> dict[Key, int]:
        """Count the orders that wait and were not cancelled, by key."""
        with self._lock:
            return {key: count for key, queue in self._queues.items() if (count := sum(_wanted_ones(queue)))}

    def backlog_s(self) -> float:
        """Predict the seconds of all that waits, without what lets others pass."""
        with self._lock:
            self._forget_cancelled()
            return self._backlog_s()

    def put(self, orders: Sequence[tuple[Key, Order]], limited: bool = True) -> list[Future[Result]]:
        """Queue all orders, each under its key, and return their futures in the same sequence.

        Args:
            limited: whether there must be room for them.

        Raises:
            Full: they do not fit; none of them was queued.
            Closed: after `close`.
        """
        with self._lock:
            if self.closed:
                raise Closed
            if limited and self._full(len(orders)):
                self._forget_cancelled()
                if self._full(len(orders)):
                    backlog, surplus = self._backlog_s(), self._waiting + len(orders) - self.limit
                    # of the present work so much has to be done first, as a number of orders or as seconds
                    raise Full(max(backlog * min(1.0, surplus / max(1, self._waiting)), backlog - self.limit_s))
            now = self.clock()
            entries = []
            for key, order in orders:
                start, patience = max(self._virtual, self._last_tag.get(key, 0.0)), self.costs.patience(key)
                seconds = self.costs.seconds(key, 1)
                self._last_tag[key] = start + max(1.0, patience) * seconds
                entry = QueueEntry[Order, Result](order, self._number, now, start + patience * seconds)
                self._queues.setdefault(key, deque()).append(entry)
                entries.append(entry)
                self._number += 1
            self._waiting += len(entries)
            asleep, self._asleep = self._asleep, False
        if asleep:  # after the lock is free, which the woken thread needs at once
            self._bell.release()
        return [entry.answer for entry in entries]

    def take(self) -> tuple[Key, list[QueueEntry[Order, Result]]] | None:
        """Wait for the next batch of at least one order, each marked as running: it can no longer be cancelled.

        Only one thread may call it, and must answer every entry. None once the batcher is closed.
        """
        while True:
            with self._lock:
                if self.closed:
                    return None
                self._drop_cancelled_heads()
                while ready := [
                    (q[0].tag, q[0].number, key) for key, q in self._queues.items() if self.costs.ready(key)
                ]:
                    key = min(ready)[2]  # no two have the same number
                    if batch := self._pop(key):
                        return key, batch
                    self._drop_cancelled_heads()
                self._asleep = True
            self._bell.acquire()

    def ring(self) -> None:
        """Let a `take` that waits look again at which keys are ready."""
        with self._lock:
            asleep, self._asleep = self._asleep, False
        if asleep:
            self._bell.release()

    def close(self) -> None:
        """Take no more orders, and answer those that wait with Closed. Batches already taken stay their taker's."""
        with self._lock:
            self.closed = True
            left = [entry for queue in self._queues.values() for entry in queue]
            self._queues.clear()
            self._last_tag.clear()
            self._waiting = 0
        self.ring()
        for entry in left:
            if entry.answer.set_running_or_notify_cancel():
                entry.answer.set_exception(Closed())

    def _pop(self, key: Key) -> list[QueueEntry[Order, Result]]:
        """Take as many of a key's oldest wanted orders as should run together."""
        queue = self._queues[key]
        count, batch = self.costs.batch_size(key, sum(_wanted_ones(queue))), list[QueueEntry[Order, Result]]()
        self._virtual = max(self._virtual, queue[0].tag)
        while queue and len(batch) < count:
            entry = queue.popleft()
            self._waiting -= 1
            if entry.answer.set_running_or_notify_cancel():
                batch.append(entry)
        self._forget_if_empty(key)
        return batch

    def _drop_cancelled_heads(self) -> None:
        """Remove cancelled orders from the heads of the queues, whose tags decide what runs next."""
        for key in list(self._queues):
            queue = self._queues[key]
            while queue and queue[0].answer.cancelled():
                queue.popleft().answer.set_running_or_notify_cancel()  # it stays cancelled
                self._waiting -= 1
            self._forget_if_empty(key)

    def _forget_cancelled(self) -> None:
        """Remove all cancelled orders, so that they keep no others out."""
        for key in list(self._queues):
            queue = self._queues[key]
            # for a cancelled future set_running_or_notify_cancel is False, and it stays cancelled
            living = deque(t for t in queue if not t.answer.cancelled() or t.answer.set_running_or_notify_cancel())
            self._waiting -= len(queue) - len(living)
            self._queues[key] = living
            self._forget_if_empty(key)

    def _forget_if_empty(self, key: Key) -> None:
        """Remove an empty queue. Its last tag stays while the key is ahead of its share."""
        if not self._queues[key]:
            del self._queues[key]
        if not self._queues:  # no key is behind its share
            self._virtual = max(self._virtual, *self._last_tag.values())
            self._last_tag.clear()
        elif self._last_tag[key] <= self._virtual and key not in self._queues:
            del self._last_tag[key]

    def _full(self, more: int) -> bool:
        return self._waiting + more > self.limit or (self._waiting > 0 and self._backlog_s() > self.limit_s)

    def _backlog_s(self) -> float:
        costs = self.costs
        return sum(costs.seconds(key, len(queue)) for key, queue in self._queues.items() if not costs.patience(key))


def _wanted_ones(queue: Iterable[QueueEntry[Order, Result]]) -> Iterator[bool]:
    return (not entry.answer.cancelled() for entry in queue)
