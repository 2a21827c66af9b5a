"""Complete the OpenAPI document that FastAPI makes of the routes."""

from typing import Any

from fastapi import FastAPI

from app.middleware.access import scope_of

SCHEME = "key"
DESCRIPTION = (
    "A key of `fewstep key`, where the server asks for keys. The list names the scope that it needs. "
    "A browser's WebSocket sends it as a subprotocol, `fewstep-key.KEY`."
)


def complete_description(app: FastAPI, with_keys: bool) -> None:
    """Say which routes need a key, add the schemas of bodies, and leave out the 422, which FastAPI adds in vain.

    Args:
        with_keys: whether the server asks for keys; without, only loading and unloading models needs one.
    """
    stock = app.openapi

    def openapi() -> dict[str, Any]:
        described = stock()
        described["components"]["securitySchemes"] = {
            SCHEME: {"type": "http", "scheme": "bearer", "description": DESCRIPTION}
        }
        for path, verbs in described["paths"].items():
            for verb, route in verbs.items():
                route["responses"].pop("422", None)
                for content in route.get("requestBody", {}).get("content", {}).values():
                    described["components"]["schemas"] |= content["schema"].get("$defs", {})
                scope = scope_of({"type": "http", "path": path, "method": verb.upper()})
                wanted: list[dict[str, list[str]]] = [{SCHEME: [scope]}] if scope else []
                route["security"] = wanted if with_keys or scope == "admin" or not scope else [{}, *wanted]
        return described

    app.openapi = openapi  # type: ignore[method-assign]
