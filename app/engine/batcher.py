"""What runs next: bounded queues by key, pulled by whoever is free to work. It knows neither torch nor HTTP.

There is no timer. A free engine takes what is there: a lone order runs at once, and under load orders gather while the
engine works, so batches form by themselves. The key whose oldest order has waited longest goes first; its orders leave
in the sequence in which they came. Cancelled orders are skipped. Every order gets exactly one answer: a result, an
error, or its own cancellation.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Order = TypeVar("Order")
Result = TypeVar("Result")


class Full(Exception):
    """The orders do not fit into the queue; none of them was taken."""


class Closed(Exception):
    """The batcher takes no more orders."""


@dataclass(eq=False)
class Ticket(Generic[Order, Result]):
    """One order and the future of its one answer."""

    order: Order
    number: int  # in the sequence of arrival
    arrived: float  # time.perf_counter
    answer: Future[Result] = field(default_factory=Future)


class Batcher(Generic[Key, Order, Result]):
    """Bounded keyed queues. `limit` counts the orders that wait, `largest(key)` is the largest batch of a key."""

    def __init__(self, limit: int, largest: Callable[[Key], int]) -> None:
        self.limit, self.largest = limit, largest
        self._queues: dict[Key, deque[Ticket[Order, Result]]] = {}
        self._waiting = self._number = 0
        self.closed = False
        self._changed = threading.Condition()

    def __len__(self) -> int:
        """Orders waiting, those cancelled but not yet met included."""
        return self._waiting

    def put(self, orders: Sequence[tuple[Key, Order]]) -> list[Future[Result]]:
        """Takes all orders or none (Full), each under its key; their futures, in the same sequence."""
        with self._changed:
            if self.closed:
                raise Closed
            if self._waiting + len(orders) > self.limit:
                self._forget_cancelled()
            if self._waiting + len(orders) > self.limit:
                raise Full
            now, first = time.perf_counter(), self._number
            tickets = [Ticket[Order, Result](order, first + i, now) for i, (_, order) in enumerate(orders)]
            for (key, _), ticket in zip(orders, tickets, strict=True):
                self._queues.setdefault(key, deque()).append(ticket)
            self._number += len(tickets)
            self._waiting += len(tickets)
            self._changed.notify()
            return [ticket.answer for ticket in tickets]

    def take(self) -> tuple[Key, list[Ticket[Order, Result]]] | None:
        """Waits for the next batch, at least one order, each marked as running: it can no more be cancelled.

        The caller answers every ticket. None once the batcher is closed.
        """
        with self._changed:
            while not self.closed:
                while self._queues:
                    self._drop_cancelled_heads()
                    if not self._queues:
                        break
                    key = min(self._queues, key=lambda key: self._queues[key][0].number)
                    if batch := self._pop(key):
                        return key, batch
                self._changed.wait()
            return None

    def close(self) -> None:
        """No more orders; those that wait are answered with Closed. What was taken is still its taker's to answer."""
        with self._changed:
            self.closed = True
            left = [ticket for queue in self._queues.values() for ticket in queue]
            self._queues.clear()
            self._waiting = 0
            self._changed.notify_all()
        for ticket in left:
            if ticket.answer.set_running_or_notify_cancel():
                ticket.answer.set_exception(Closed())

    def _pop(self, key: Key) -> list[Ticket[Order, Result]]:
        """Up to the largest batch of a key's oldest living orders."""
        queue = self._queues[key]
        batch: list[Ticket[Order, Result]] = []
        while queue and len(batch) < self.largest(key):
            ticket = queue.popleft()
            self._waiting -= 1
            if ticket.answer.set_running_or_notify_cancel():
                batch.append(ticket)
        if not queue:
            del self._queues[key]
        return batch

    def _drop_cancelled_heads(self) -> None:
        """Those who left must not hold a place in front for what came after them."""
        for key in list(self._queues):
            queue = self._queues[key]
            while queue and queue[0].answer.cancelled():
                queue.popleft().answer.set_running_or_notify_cancel()
                self._waiting -= 1
            if not queue:
                del self._queues[key]

    def _forget_cancelled(self) -> None:
        """Those who left must not keep others out."""
        for key in list(self._queues):
            queue = self._queues.pop(key)
            # for a cancelled future set_running_or_notify_cancel is False, and it stays cancelled
            living = deque(t for t in queue if not t.answer.cancelled() or t.answer.set_running_or_notify_cancel())
            self._waiting -= len(queue) - len(living)
            if living:
                self._queues[key] = living
