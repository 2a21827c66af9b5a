"""Predict what batches cost, from times measured at load and corrected at work. It knows no torch.

A bucket is a batch size that runs as it is; fewer pictures are padded to it. Which buckets are worth having differs by
network, size and device (on a CPU often none but 1), so they are measured, never assumed. Where nothing was measured,
batches run as large as they come, and their limit is learnt at work.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

MIN_GAIN = 1.03  # a larger batch is preferred when it makes pictures this much faster than a smaller one
SMOOTHING = 0.1  # weight of each observation at work
MAX_JUMP = 4  # an observation counts as at most this many times the expected time
REPLAN_CHANGE = 0.05  # change of a bucket's seconds after which the plan is made anew
LOOKAHEAD = 4  # the plan reaches to this many times the largest bucket


@dataclass
class BatchCost:
    """Predicts the seconds of forward passes of one kind, and learns from them.

    Args:
        seconds: measured for buckets; {} where nothing was measured yet.
        largest: pictures in one pass at most.
        guess: seconds of a picture before anything was observed.
    """

    seconds: dict[int, float] = field(default_factory=dict)
    largest: int = 16
    guess: float = 0.1

    def __post_init__(self) -> None:
        # where there are no buckets: seconds per picture in passes of up to 1, 2, 4, ... pictures, and of the last ones
        self._rates: dict[int, float] = {}
        self._recent = self.guess
        self._limit = self.largest
        self._replan()

    def batch_size(self, waiting: int) -> int:
        """Return how many of the waiting pictures run next: the first batch of the fastest way to draw them all."""
        table = self._table
        return min(waiting, table[min(waiting, len(table) - 1)][1] if table else self._limit)

    def bucket(self, count: int) -> int:
        """Return the batch size that so many pictures are padded to: the smallest bucket that holds them, if any.

        Not the bucket that seems cheapest: one that was slow once would never be measured again.
        """
        return min((bucket for bucket in self._planned if bucket >= count), default=count)

    def predict(self, count: int) -> float:
        """Predict the seconds of so many pictures."""
        table = self._table
        if not table:
            return count * self._recent
        whole, rest = divmod(count, len(table) - 1)
        return whole * table[-1][0] + table[rest][0]

    def observe(self, count: int, seconds: float) -> None:
        """Correct the times by a pass at work, for the device may have become slower or busier.

        A pass that took far longer counts only in part: most likely the process was stopped, or the machine.
        """
        bucket = self.bucket(count)
        if bucket not in self.seconds:
            return self._learn(count, seconds / count)
        self.seconds[bucket] += SMOOTHING * (min(seconds, MAX_JUMP * self.seconds[bucket]) - self.seconds[bucket])
        if abs(self.seconds[bucket] - self._planned[bucket]) > REPLAN_CHANGE * self._planned[bucket]:
            self._replan()

    def halve(self, count: int) -> None:
        """Halve the limit after so many pictures did not fit into memory."""
        self.largest = max(1, count // 2)
        self._limit = min(self._limit, self.largest)
        self.seconds = {bucket: s for bucket, s in self.seconds.items() if bucket <= self.largest}
        self._replan()

    def _learn(self, count: int, rate: float) -> None:
        """Learn the limit where there are no buckets: half a full batch is tried once, and stays if it is as fast."""
        self._recent += (
            SMOOTHING * (min(rate, MAX_JUMP * self._recent) - self._recent) if self._rates else rate - self._recent
        )
        size = 1 << (count - 1).bit_length()
        known = self._rates.get(size, rate)
        self._rates[size] = known + SMOOTHING * (min(rate, MAX_JUMP * known) - known)
        if count < self._limit:
            return
        half, double = self._rates.get(size // 2, 0.0), self._rates.get(2 * size)
        if double is not None and double * MIN_GAIN < self._rates[size] and size < self.largest:
            self._limit = min(2 * size, self.largest)
        elif size > 1 and half < self._rates[size] * MIN_GAIN:
            self._limit = size // 2

    def _replan(self) -> None:
        """Plan anew how many pictures run together; called only when the plan may have changed."""
        self._planned = {bucket: s for bucket, s in self.seconds.items() if bucket <= self.largest}
        self._table = _table(self._planned) if self._planned else []


def worth_having(seconds: Mapping[int, float]) -> dict[int, float]:
    """Return the measured buckets 1, 2, 4, ... that make pictures faster than every smaller one; 1 always."""
    kept = dict[int, float]()
    for bucket, spent in sorted(seconds.items()):
        if not kept or spent / bucket * MIN_GAIN < min(s / b for b, s in kept.items()):
            kept[bucket] = spent
    return kept


def _table(seconds: Mapping[int, float]) -> list[tuple[float, int]]:
    """Return, for 0, 1, 2, ... pictures, the least seconds and the bucket to run first.

    The first is the largest bucket of the fastest division, for it answers most callers soonest. Five pictures may be
    fastest as a padded eight, or as four and one.
    """
    table = [(0.0, 0)]
    for count in range(1, LOOKAHEAD * max(seconds) + 1):
        rests = {bucket: table[max(0, count - bucket)] for bucket in seconds}
        spent, first = min((s + rests[b][0], -max(b, rests[b][1])) for b, s in seconds.items())
        table.append((spent, -first))
    return table
