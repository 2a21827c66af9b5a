"""Serve by Ray Serve: one replica with a `@serve.batch` that does not wait, behind its proxy or HAProxy."""

import signal
import tempfile
import threading
from typing import Any

import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response
from work import BATCH, PORT, Work, png


@serve.deployment(num_replicas=1, max_ongoing_requests=4 * BATCH, ray_actor_options={"num_cpus": 1})
class Pictures:
    """Draw the batches that `@serve.batch` makes."""

    def __init__(self) -> None:
        self.work = Work()

    @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=0)
    async def draw(self, orders: list[Any]) -> list[bytes]:
        """Draw and encode all orders in one batch."""
        return [png(picture) for picture in self.work.draw(orders)]

    async def __call__(self, request: Request) -> Response:
        """Draw a PNG of an order in JSON, or of a picture's bytes with the seed in the query."""
        if request.headers["content-type"] == "image/png":
            order = self.work.order(dict(request.query_params), await request.body())
        else:
            order = self.work.order(await request.json())
        return Response(await self.draw(order), media_type="image/png")


if __name__ == "__main__":
    gone = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: gone.set())
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, _temp_dir=tempfile.gettempdir())
    serve.start(http_options={"host": "127.0.0.1", "port": PORT}, logging_config={"enable_access_log": False})
    serve.run(Pictures.bind(), route_prefix="/draw", name="pictures")
    gone.wait()
    ray.shutdown()
