"""No server: the forward pass in a loop, with and without encoding. Commands come as JSON lines, results go back so."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from work import Work, png


def main() -> None:
    """`expect`: the pictures of the orders, one by one, into a .npy; `time`: a loop of so many seconds."""
    work = Work()
    orders: list[Any] = []
    for line in sys.stdin:
        told = json.loads(line)
        if told["do"] == "expect":
            orders = [
                work.order(body, Path(body["file"]).read_bytes() if "file" in body else None) for body in told["orders"]
            ]
            np.save(told["path"], np.concatenate([work.draw([order]) for order in orders]))
            answer: dict[str, Any] = {}
        else:
            answer = loop(work, orders, told["batch"], told["encode"], told["seconds"])
        print(json.dumps(answer), flush=True)


def loop(work: Work, orders: list[Any], batch: int, encoding: bool, seconds: float) -> dict[str, Any]:
    """Images a second, milliseconds of a pass (median) and of processor time per image."""
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
