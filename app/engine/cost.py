"""What batches cost: measured at load, corrected at work, and the source of every prediction. It knows no torch.

A bucket is a batch size that is run as it is; fewer pictures are padded to it. Which buckets are worth having differs
by network, size and device (on a CPU often none but 1), so they are measured, never assumed. Where nothing was
measured, batches run as large as they come, and a limit to them is found at work.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

WORTH = 1.03  # a larger batch is preferred when it makes pictures this much faster than a smaller one
TRUST = 0.1  # of each observation at work
LEAP = 4  # times what was expected that one observation is believed
STIR = 0.05  # change of a bucket's seconds after which plans are made anew
REACH = 4  # times the largest bucket that plans look ahead


@dataclass
class Cost:
    """Seconds of one kind of pass by bucket.

    Args:
        seconds: measured for buckets; {} where nothing was measured yet.
        largest: pictures in one pass at most.
        guess: seconds of a picture before anything is known.
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

    def take(self, waiting: int) -> int:
        """How many of so many waiting pictures run next: the first part of the fastest way to draw them all."""
        table = self._table
        return min(waiting, table[min(waiting, len(table) - 1)][1] if table else self._limit)

    def bucket(self, count: int) -> int:
        """The batch size in which so many pictures run: the smallest bucket that holds them, or as they are.

        Not the one that is thought to be cheapest: a bucket that once seemed dear would never be seen again.
        """
        return min((bucket for bucket in self._planned if bucket >= count), default=count)

    def predict(self, count: int) -> float:
        """Seconds of so many pictures."""
        table = self._table
        if not table:
            return count * self._recent
        whole, rest = divmod(count, len(table) - 1)
        return whole * table[-1][0] + table[rest][0]

    def observe(self, count: int, seconds: float) -> None:
        """A pass at work: the device may have become slower, or busier, than it was.

        What takes far longer is believed step by step: most likely the process was stopped, or the machine.
        """
        bucket = self.bucket(count)
        if bucket not in self.seconds:
            return self._learn(count, seconds / count)
        self.seconds[bucket] += TRUST * (min(seconds, LEAP * self.seconds[bucket]) - self.seconds[bucket])
        if abs(self.seconds[bucket] - self._planned[bucket]) > STIR * self._planned[bucket]:
            self._replan()

    def halve(self, count: int) -> None:
        """So many did not fit into memory: never again."""
        self.largest = max(1, count // 2)
        self._limit = min(self._limit, self.largest)
        self.seconds = {bucket: s for bucket, s in self.seconds.items() if bucket <= self.largest}
        self._replan()

    def _learn(self, count: int, rate: float) -> None:
        """Of batches that fill the limit: half of it is tried once, and goes on being the limit if it is as fast."""
        self._recent += TRUST * (min(rate, LEAP * self._recent) - self._recent) if self._rates else rate - self._recent
        size = 1 << (count - 1).bit_length()
        known = self._rates.get(size, rate)
        self._rates[size] = known + TRUST * (min(rate, LEAP * known) - known)
        if count < self._limit:
            return
        half, double = self._rates.get(size // 2, 0.0), self._rates.get(2 * size)
        if double is not None and double * WORTH < self._rates[size] and size < self.largest:
            self._limit = min(2 * size, self.largest)
        elif size > 1 and half < self._rates[size] * WORTH:
            self._limit = size // 2

    def _replan(self) -> None:
        """Not after every pass: the way to draw so many pictures is worked out anew only when it may be another."""
        self._planned = {bucket: s for bucket, s in self.seconds.items() if bucket <= self.largest}
        self._table = _table(self._planned) if self._planned else []


def worth_having(seconds: Mapping[int, float]) -> dict[int, float]:
    """Of measured buckets 1, 2, 4, ... those that make pictures faster than every smaller one; 1 always."""
    kept = dict[int, float]()
    for bucket, spent in sorted(seconds.items()):
        if not kept or spent / bucket * WORTH < min(s / b for b, s in kept.items()):
            kept[bucket] = spent
    return kept


def _table(seconds: Mapping[int, float]) -> list[tuple[float, int]]:
    """For 0, 1, 2, ... pictures: the least seconds, and the bucket to begin with: the largest of the fastest way, for
    it answers most callers soonest. Five may be a padded eight, or four and one."""
    found = [(0.0, 0)]
    for count in range(1, REACH * max(seconds) + 1):
        ways = ((s + found[max(0, count - b)][0], -max(b, found[max(0, count - b)][1])) for b, s in seconds.items())
        spent, first = min(ways)
        found.append((spent, -first))
    return found
