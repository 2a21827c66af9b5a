"""Run the service as a Ray Serve application: replicas of the whole server behind Ray's proxy, one for each device.

    serve run app.on_ray:application device=cuda weights=/models/weights

Each replica batches, measures and refuses as a server of its own does; Ray starts replicas, shares requests out among
them, and replaces one whose device hangs.
"""

from __future__ import annotations

import asyncio
from typing import Literal

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, DirectoryPath, Field
from ray import serve
from ray.serve import Application

from app.engine.engine import Engine
from app.main import create_app
from app.settings import read_settings


class Args(BaseModel):
    """Holds what `serve run app.on_ray:application name=value ...` may say; all else are FEWSTEP_* variables."""

    model_config = ConfigDict(extra="forbid")

    weights: DirectoryPath | None = Field(default=None, description="the weights folder; absent: FEWSTEP_WEIGHTS")
    device: Literal["cpu", "cuda"] = Field(default="cpu", description="cuda: a GPU for each replica")
    cpus: float = Field(default=2, gt=0, description="cores of a replica, as Ray counts them")
    min_replicas: int = Field(default=1, ge=1)
    max_replicas: int | None = Field(default=None, description="so many, as requests need them; absent: min_replicas")
    target_requests: float = Field(default=16, gt=0, description="requests at once that a replica is meant to have")


def application(args: Args) -> Application:
    """Describe the deployment to Ray Serve.

    Args:
        args: as read from the command or from a Serve configuration file.

    Raises:
        pydantic.ValidationError: an argument is unknown or out of range.
        BadInput: a setting is.
    """
    settings = read_settings(device=args.device)
    settings = settings.model_copy(update={"weights": (args.weights or settings.weights).resolve()})

    def build() -> FastAPI:
        return create_app(settings)

    @serve.deployment(
        name="fewstep",
        ray_actor_options={"num_cpus": args.cpus, "num_gpus": int(args.device == "cuda")},
        autoscaling_config={
            "min_replicas": args.min_replicas,
            "max_replicas": args.max_replicas or args.min_replicas,
            "target_ongoing_requests": args.target_requests,
        },
        max_ongoing_requests=settings.queue_limit,  # beyond it the server itself refuses, with the time to come back
        graceful_shutdown_timeout_s=settings.drain_seconds,
    )
    @serve.ingress(build)
    class Fewstep:
        async def check_health(self) -> None:
            """Wait until all models have drawn: Ray asks before it sends requests. Raise when the engine is lost."""
            engine: Engine = self.app.state.engine  # type: ignore[attr-defined]
            while engine.alive and not engine.opened:
                await asyncio.sleep(0.05)
            if engine.stuck or not engine.alive:
                raise RuntimeError("the device hangs" if engine.stuck else "the engine's thread has ended")

    return Fewstep.bind()  # type: ignore[attr-defined]  # a deployment, which its decorator does not tell
