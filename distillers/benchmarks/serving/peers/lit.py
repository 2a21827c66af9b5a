"""LitServe: its batching loop, binary answers, no extra log; `batch_timeout` is told."""

from typing import Any

import litserve
from fastapi import Response
from work import BATCH, PORT, TOLD, Work, png


class Pictures(litserve.LitAPI):
    """Requests are read and answers encoded one by one in the worker, drawn together."""

    def setup(self, device: str) -> None:
        """In the worker, once."""
        self.work = Work()

    def decode_request(self, request: dict[str, Any]) -> Any:
        """One order."""
        return self.work.order(request)

    def batch(self, inputs: list[Any]) -> list[Any]:
        """Orders stay a list."""
        return inputs

    def predict(self, x: list[Any]) -> Any:
        """All together."""
        return self.work.draw(x)

    def unbatch(self, output: Any) -> list[Any]:
        """One by one."""
        return list(output)

    def encode_response(self, output: Any) -> Response:
        """A PNG."""
        return Response(content=png(output), media_type="image/png")


if __name__ == "__main__":
    api = Pictures(max_batch_size=BATCH, batch_timeout=TOLD["wait_s"], api_path="/draw")
    server = litserve.LitServer(api, accelerator="cpu", timeout=120, disable_openapi_url=True)
    server.run(host="127.0.0.1", port=PORT, log_level="warning", generate_client_file=False, access_log=False)
