"""What batches cost: measured at load, corrected at work, and the source of every prediction. It knows no torch.

A bucket is a batch size that is run as it is; fewer pictures are padded to it. Which buckets are worth having differs
by network, size and device (on a CPU often none but 1), so they are measured, never assumed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

WORTH = 1.03  # a larger bucket is kept when it makes pictures this much faster than the smaller ones
TRUST = 0.1  # of each observation at work
REACH = 4  # times the largest bucket that plans look ahead
Plan = tuple[tuple[int, float], ...]  # (bucket, seconds), ascending


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
        self._observed = 0.0  # seconds per picture, where there are no buckets

    def take(self, waiting: int) -> int:
        """How many of so many waiting pictures run next: the first part of the fastest way to draw them all."""
        plan = self._plan()
        if not plan:
            return min(waiting, self.largest)
        table = _table(plan)
        return min(waiting, table[min(waiting, len(table) - 1)][1])

    def bucket(self, count: int) -> int:
        """The batch size in which so many pictures run: the cheapest bucket that holds them, or as they are."""
        holding = [(seconds, bucket) for bucket, seconds in self._plan() if bucket >= count]
        return min(holding)[1] if holding else count

    def predict(self, count: int) -> float:
        """Seconds of so many pictures."""
        plan = self._plan()
        if not plan:
            return count * (self._observed or self.guess)
        table = _table(plan)
        whole, rest = divmod(count, len(table) - 1)
        return whole * table[-1][0] + table[rest][0]

    def observe(self, count: int, seconds: float) -> None:
        """A pass at work: the device may have become slower, or busier, than it was."""
        bucket = self.bucket(count)
        if bucket in self.seconds:
            self.seconds[bucket] += TRUST * (seconds - self.seconds[bucket])
        elif self._observed:
            self._observed += TRUST * (seconds / count - self._observed)
        else:
            self._observed = seconds / count

    def halve(self, count: int) -> None:
        """So many did not fit into memory: never again."""
        self.largest = max(1, count // 2)
        self.seconds = {bucket: s for bucket, s in self.seconds.items() if bucket <= self.largest}

    def _plan(self) -> Plan:
        """Rounded, so that it is worked out anew only when something has changed."""
        return tuple(
            sorted((bucket, float(f"{s:.3g}")) for bucket, s in self.seconds.items() if bucket <= self.largest)
        )


def worth_having(seconds: Mapping[int, float]) -> dict[int, float]:
    """Of measured buckets 1, 2, 4, ... those that make pictures faster than every smaller one; 1 always."""
    kept = dict[int, float]()
    for bucket, spent in sorted(seconds.items()):
        if not kept or spent / bucket * WORTH < min(s / b for b, s in kept.items()):
            kept[bucket] = spent
    return kept


@lru_cache(maxsize=256)
def _table(plan: Plan) -> list[tuple[float, int]]:
    """For 0, 1, 2, ... pictures: the least seconds, and the bucket to begin with: the largest of the fastest way, for
    it answers most callers soonest. Five may be a padded eight, or four and one."""
    found = [(0.0, 0)]
    for count in range(1, REACH * max(bucket for bucket, _ in plan) + 1):
        ways = ((s + found[max(0, count - b)][0], -max(b, found[max(0, count - b)][1])) for b, s in plan)
        seconds, first = min(ways)
        found.append((seconds, -first))
    return found
