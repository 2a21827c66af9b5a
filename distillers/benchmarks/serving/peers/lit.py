"""Serve by LitServe: its batching loop with a `batch_timeout` of the benchmark's choice, binary answers, no log."""

from typing import Any

import litserve
from fastapi import Response
from work import BATCH, OPTIONS, PORT, Work, png


class Pictures(litserve.LitAPI):
    """Read requests and encode answers one by one, and draw them together, all in the worker."""

    def setup(self, device: str) -> None:
        """Open the model in the worker."""
        self.work = Work()

    def decode_request(self, request: dict[str, Any]) -> Any:
        """Read one order."""
        return self.work.order(request)

    def batch(self, inputs: list[Any]) -> list[Any]:
        """Keep the orders as a list."""
        return inputs

    def predict(self, x: list[Any]) -> Any:
        """Draw all orders in one batch."""
        return self.work.draw(x)

    def unbatch(self, output: Any) -> list[Any]:
        """Split the batch."""
        return list(output)

    def encode_response(self, output: Any) -> Response:
        """Encode a PNG."""
        return Response(content=png(output), media_type="image/png")


if __name__ == "__main__":
    api = Pictures(max_batch_size=BATCH, batch_timeout=OPTIONS["wait_s"], api_path="/draw")
    server = litserve.LitServer(api, accelerator="cpu", timeout=120, disable_openapi_url=True)
    server.run(host="127.0.0.1", port=PORT, log_level="warning", generate_client_file=False, access_log=False)
