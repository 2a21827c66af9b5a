"""Draw without a server: the forward pass in a loop, with and without encoding, on commands in JSON lines."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from work import Work, png


def main() -> None:
    """Answer `expect` (write the pictures of all orders, drawn one by one, to a .npy) and `time` (time a loop)."""
    work = Work()
    orders: list[Any] = []
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "expect":
            orders = [
                work.order(body, Path(body["file"]).read_bytes() if "file" in body else None)
                for body in command["orders"]
            ]
            np.save(command["path"], np.concatenate([work.draw([order]) for order in orders]))
            answer: dict[str, Any] = {}
        else:
            answer = loop(work, orders, command["batch"], command["encode"], command["seconds"])
        print(json.dumps(answer), flush=True)


def loop(work: Work, orders: list[Any], batch: int, encoding: bool, seconds: float) -> dict[str, Any]:
    """Time a loop: images a second, milliseconds of a pass (median) and of processor time per image."""
    passes, at = [], 0
    cpu, started = time.process_time(), time.perf_counter()
    while (begun := time.perf_counter()) < started + seconds or len(passes) < 3:
        pictures = work.draw([orders[(at + i) % len(orders)] for i in range(batch)])
        if encoding:
            for picture in pictures:
                png(picture)
        at += batch
        passes.append(time.perf_counter() - begun)
    spent = time.perf_counter() - started
    return {
        "images_per_second": at / spent,
        "pass_ms": 1e3 * float(np.median(passes)),
        "cpu_ms": 1e3 * (time.process_time() - cpu) / at,
    }


main()
