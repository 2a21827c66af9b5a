"""Commands that serve: run, serve, key."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from distillers.cli.arguments import Device, Root, device_of
from distillers.cli.evaluation import evaluate
from distillers.cli.training import distill
from distillers.errors import BadInput


def serve(
    weights: Root = Path("weights"),
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    device: Device = "auto",
    root_path: Annotated[
        str, typer.Option(help="Path below which a proxy serves it, such as /fewstep; the proxy takes it off.")
    ] = "",
) -> None:
    """Serve every folder below --weights over HTTP: OpenAI's image routes, SAR translation, benchmarks, a page at /.

    Example: `fewstep serve --weights weights --port 8000`, then open http://127.0.0.1:8000.
    """
    import os
    import re

    import uvicorn

    if not 0 <= port <= 65535:
        raise BadInput("port", port, "0 to 65535; 0 takes a free one")
    if root_path and not re.fullmatch(r"(/[A-Za-z0-9._~-]+)+", root_path):
        raise BadInput("root-path", root_path, "a path such as /fewstep, without a slash at its end")
    if not weights.is_dir():
        raise BadInput("weights", str(weights), "an existing folder of weights folders")
    if (weights / "fewstep.json").is_file():
        raise BadInput(
            "weights", str(weights), f"the folder that it lies in ({weights.resolve().parent}): all are served"
        )
    if host not in ("127.0.0.1", "::1", "localhost") and not os.environ.get("FEWSTEP_KEYS"):
        typer.echo("without FEWSTEP_KEYS whoever reaches this address may draw: see `fewstep key`", err=True)
    os.environ["FEWSTEP_WEIGHTS"], os.environ["FEWSTEP_DEVICE"] = str(weights), device
    for one in device.split(","):
        if one.startswith("cuda"):
            device_of(one)
    uvicorn.run(
        "app.main:create_app",
        factory=True,
        http="app.middleware.connections:GuardedProtocol",
        root_path=root_path,
        host=host,
        port=port,
        log_level="info",
        server_header=False,
        timeout_keep_alive=75,  # s; proxies keep theirs for 60, and lose a request on one that is being closed
    )


def key(
    name: Annotated[str, typer.Argument(help="Whose it is; it stands in the service's log.", show_default=False)],
    scopes: Annotated[str, typer.Option(help="With commas: infer, benchmark, admin (load models), metrics.")] = "infer",
) -> None:
    """Make an API key for the service: the key for the caller, and the entry for the file that FEWSTEP_KEYS names.

    The file holds the key's hash alone, so the key is shown this once, beside the entry, and on stderr:
    `fewstep key web >> keys.toml`, then `FEWSTEP_KEYS=keys.toml fewstep serve`. A running service reads it by itself.
    """
    import hashlib
    import re
    import secrets

    import tomli_w

    asked, known = [scope.strip() for scope in scopes.split(",")], ("infer", "benchmark", "admin", "metrics")
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name):
        raise BadInput("name", name, "1 to 64 of letters, digits, dots, dashes and underscores")
    if not set(asked) <= set(known):
        raise BadInput("scopes", scopes, f"one or more of {', '.join(known)}, with commas")
    made = f"fewstep-{secrets.token_urlsafe(32)}"
    entry = {"name": name, "sha256": hashlib.sha256(made.encode()).hexdigest(), "scopes": asked}
    typer.echo(tomli_w.dumps({"keys": [entry]}))
    typer.echo(f"the key, not to be seen again: {made}", err=True)


def run(
    weights: Root = Path("weights"),
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    serving: Annotated[
        bool, typer.Option("--serve/--no-serve", help="Serve afterwards, or stop after the table.")
    ] = True,
) -> None:
    """Distil a small teacher into four steps (once), show what that cost in quality, and serve everything."""
    folder = weights / "shapes-quickstart"
    if not (folder / "report.json").is_file():
        distill("shapes-quickstart", [f"teacher={weights / 'shapes-teacher'}"], out=folder)
        evaluate(folder, n=256)
    else:
        from distillers.jobs.card import read_report

        typer.echo(read_report(folder).get("markdown", ""))
    typer.echo(f"pictures: {folder / 'grid.png'}")
    if serving:
        serve(weights, host, port)
