"""What runs next: bounded queues by key, pulled by whoever is free to work. It knows neither torch nor HTTP.

There is no timer. A free engine takes what is there: a lone order runs at once, and under load orders gather while the
engine works, so batches form by themselves. Cancelled orders are skipped, expired ones are told so, and every order
gets exactly one answer: a result, an error, or its own cancellation.

Whose turn it is, start-time fair queueing decides (Goyal, Vin and Cheng 1996): every order is tagged with the virtual
time at which its key would reach it if all waiting keys shared the engine evenly, and the smallest tag goes first. Keys
that ask little are served in the sequence of arrival, oldest head first; a key that floods the queue waits behind its
own flood, not before everybody else's orders.
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
        self.seconds = seconds  # predicted, until what waits now is done


class Closed(Exception):
    """The batcher takes no more orders."""


class Expired(Exception):
    """The order's deadline passed before its turn came."""


class Costs(Protocol[KeyIn]):
    """What is known of the work: see `app.engine.cost`."""

    def take(self, key: KeyIn, waiting: int) -> int:
        """How many of so many waiting orders should run together now, at least 1."""

    def seconds(self, key: KeyIn, count: int) -> float:
        """Predicted seconds of so many orders of this key."""


@dataclass(eq=False, slots=True)
class Ticket(Generic[Order, Result]):
    """One order and the future of its one answer."""

    order: Order
    number: int  # in the sequence of arrival
    arrived: float  # by the batcher's clock
    tag: float  # virtual start time, in seconds of device time
    deadline: float | None  # by the batcher's clock
    answer: Future[Result] = field(default_factory=Future)


class Batcher(Generic[Key, Order, Result]):
    """Bounded keyed queues.

    Args:
        limit: orders that may wait.
        costs: how many orders of a key run together, and how long they take.
        limit_s: predicted seconds of work that may wait. An empty queue takes whatever fits `limit`.
    """

    def __init__(
        self,
        limit: int,
        costs: Costs[Key],
        limit_s: float = float("inf"),
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.limit, self.limit_s, self.costs, self.clock = limit, limit_s, costs, clock
        self._queues: dict[Key, deque[Ticket[Order, Result]]] = {}
        self._last_tag: dict[Key, float] = {}  # virtual time at which a waiting key's last order would be done
        self._virtual = 0.0
        self._waiting = self._number = 0
        self.closed = False
        self._lock, self._bell, self._asleep = threading.Lock(), threading.Lock(), False
        self._bell.acquire()  # whoever takes sleeps by asking for it again

    def __len__(self) -> int:
        """Orders waiting, those cancelled but not yet met included."""
        return self._waiting

    def waiting(self) -> dict[Key, int]:
        """Orders that wait and are still wanted, by key."""
        with self._lock:
            return {key: count for key, queue in self._queues.items() if (count := sum(_living(queue)))}

    def backlog_s(self) -> float:
        """Predicted seconds of all that waits."""
        with self._lock:
            return self._backlog_s()

    def put(self, orders: Sequence[tuple[Key, Order]], deadline: float | None = None) -> list[Future[Result]]:
        """Takes all orders or none (Full), each under its key; their futures, in the same sequence."""
        with self._lock:
            if self.closed:
                raise Closed
            if self._waiting + len(orders) > self.limit or (self._waiting and self._backlog_s() > self.limit_s):
                self._forget_cancelled()
                backlog = self._backlog_s()
                if self._waiting + len(orders) > self.limit or (self._waiting and backlog > self.limit_s):
                    raise Full(backlog)
            now = self.clock()
            tickets = []
            for key, order in orders:
                start = max(self._virtual, self._last_tag.get(key, 0.0))
                self._last_tag[key] = start + self.costs.seconds(key, 1)
                ticket = Ticket[Order, Result](order, self._number, now, start, deadline)
                self._queues.setdefault(key, deque()).append(ticket)
                tickets.append(ticket)
                self._number += 1
            self._waiting += len(tickets)
            asleep, self._asleep = self._asleep, False
        if asleep:  # after the lock is free: who wakes up needs it at once
            self._bell.release()
        return [ticket.answer for ticket in tickets]

    def take(self) -> tuple[Key, list[Ticket[Order, Result]]] | None:
        """Waits for the next batch, at least one order, each marked as running: it can no more be cancelled.

        For one thread; it answers every ticket. None once the batcher is closed.
        """
        while True:
            with self._lock:
                if self.closed:
                    return None
                while self._queues:
                    self._drop_idle_heads()
                    if not self._queues:
                        break
                    key = min(self._queues, key=lambda key: (self._queues[key][0].tag, self._queues[key][0].number))
                    if batch := self._pop(key):
                        return key, batch
                self._asleep = True
            self._bell.acquire()

    def close(self) -> None:
        """No more orders; those that wait are answered with Closed. What was taken is still its taker's to answer."""
        with self._lock:
            self.closed = True
            left = [ticket for queue in self._queues.values() for ticket in queue]
            self._queues.clear()
            self._last_tag.clear()
            self._waiting = 0
            asleep, self._asleep = self._asleep, False
        if asleep:
            self._bell.release()
        for ticket in left:
            if ticket.answer.set_running_or_notify_cancel():
                ticket.answer.set_exception(Closed())

    def _pop(self, key: Key) -> list[Ticket[Order, Result]]:
        """As many of a key's oldest living orders as should run together."""
        queue = self._queues[key]
        count, batch = self.costs.take(key, sum(_living(queue))), list[Ticket[Order, Result]]()
        self._virtual = max(self._virtual, queue[0].tag)
        while queue and len(batch) < count:
            ticket = queue.popleft()
            self._waiting -= 1
            if self._wanted(ticket):
                batch.append(ticket)
        self._forget_if_empty(key)
        return batch

    def _wanted(self, ticket: Ticket[Order, Result]) -> bool:
        """Marks it as running, unless it was cancelled or is too late, which it is then told."""
        if not ticket.answer.set_running_or_notify_cancel():
            return False
        if ticket.deadline is not None and self.clock() > ticket.deadline:
            ticket.answer.set_exception(Expired())
            return False
        return True

    def _drop_idle_heads(self) -> None:
        """Those who left must not hold a place in front for what came after them."""
        for key in list(self._queues):
            queue = self._queues[key]
            while queue and queue[0].answer.cancelled():
                self._wanted(queue.popleft())
                self._waiting -= 1
            self._forget_if_empty(key)

    def _forget_cancelled(self) -> None:
        """Those who left must not keep others out."""
        for key in list(self._queues):
            queue = self._queues[key]
            # for a cancelled future set_running_or_notify_cancel is False, and it stays cancelled
            living = deque(t for t in queue if not t.answer.cancelled() or t.answer.set_running_or_notify_cancel())
            self._waiting -= len(queue) - len(living)
            self._queues[key] = living
            self._forget_if_empty(key)

    def _forget_if_empty(self, key: Key) -> None:
        """A key that has had more than its share is remembered until the others have had theirs."""
        if not self._queues[key]:
            del self._queues[key]
        if not self._queues:  # nobody is owed anything
            self._virtual = max(self._virtual, *self._last_tag.values())
            self._last_tag.clear()
        elif self._last_tag[key] <= self._virtual and key not in self._queues:
            del self._last_tag[key]

    def _backlog_s(self) -> float:
        return sum(self.costs.seconds(key, len(queue)) for key, queue in self._queues.items())


def _living(queue: Iterable[Ticket[Order, Result]]) -> Iterator[bool]:
    return (not ticket.answer.cancelled() for ticket in queue)
