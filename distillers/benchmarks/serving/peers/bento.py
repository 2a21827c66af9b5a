"""Serve by BentoML: one worker with a batchable method, which takes and gives JSON lists, so pictures go as base64."""

import base64
from typing import Any

import bentoml
from work import BATCH, Work, png


@bentoml.service(workers=1, traffic={"timeout": 120, "max_concurrency": 4096}, logging={"access": {"enabled": False}})
class Pictures:
    """Draw the batches that BentoML's adaptive dispatcher makes."""

    def __init__(self) -> None:
        self.work = Work()

    @bentoml.api(batchable=True, batch_dim=0, max_batch_size=BATCH, max_latency_ms=60000, route="/draw")
    def draw(self, orders: list[dict[str, Any]]) -> list[str]:
        """Draw a base64 PNG for each order."""
        pictures = self.work.draw([self.work.order(order) for order in orders])
        return [base64.b64encode(png(picture)).decode() for picture in pictures]
