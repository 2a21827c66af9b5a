"""Translate whole scenes as jobs, which are accepted at once, run one after the other and kept for a while.

A job's status follows from what has happened to it and is not stored. All methods run on the event loop but `_work`,
which runs in the jobs' only thread.
"""

import asyncio
import logging
import math
import secrets
import shutil
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from app.engine.scenes import Cancelled, SceneOrder, Scenes
from app.errors import ApiError, ErrorBody, from_exception, overloaded
from app.settings import Settings

if TYPE_CHECKING:
    from distillers.sar.options import SceneFacts

log = logging.getLogger("fewstep.jobs")
UNKNOWN = 60.0  # seconds, of a job that has not begun to tell
OPTICAL, UNCERTAINTY, PREVIEW, SAR = "optical.tif", "uncertainty.tif", "preview.png", "sar.png"


@dataclass(eq=False)
class SceneJob:
    """Tracks one scene, from the first byte of its upload until it is forgotten."""

    id: str
    folder: Path
    created: float = field(default_factory=time.time)
    cancelled: threading.Event = field(default_factory=threading.Event)
    work: Future[None] | None = None  # None: still arriving
    started: float | None = None  # time.perf_counter
    done: int = 0  # pixels
    pixels: int = 0
    facts: "SceneFacts | None" = None
    error: ErrorBody | None = None
    expires: float | None = None

    @property
    def status(self) -> Literal["queued", "running", "done", "failed", "cancelled"]:
        """Return the status, from what has happened to the job."""
        if self.cancelled.is_set():
            return "cancelled"
        if self.facts or self.error:
            return "done" if self.facts else "failed"
        return "queued" if self.started is None else "running"

    @property
    def ended(self) -> bool:
        """Return whether the job is done, failed or cancelled."""
        return self.status in ("done", "failed", "cancelled")

    @property
    def progress(self) -> float:
        """Return the share of finished pixels; 1 only when the files are there."""
        return 1.0 if self.status == "done" else min(0.999, self.done / max(1, self.pixels))

    @property
    def megapixels_per_second(self) -> float | None:
        """Return the speed until now, or of the whole scene; None while nothing is known."""
        if self.facts:
            return self.facts.megapixels_per_second
        if self.started is None or self.status != "running":
            return None
        return self.done / (time.perf_counter() - self.started) / 1e6

    @property
    def seconds_left(self) -> float:
        """Predict the seconds until a running job has ended, by its speed until now."""
        if self.started is None or not self.done:
            return UNKNOWN
        return (time.perf_counter() - self.started) * (max(self.pixels, self.done) / self.done - 1)

    @property
    def files(self) -> dict[str, Path]:
        """Return the files that can be fetched, by their public names."""
        if self.status != "done":
            return {}
        names = {OPTICAL: OPTICAL, UNCERTAINTY: "optical.uncertainty.tif", PREVIEW: PREVIEW, SAR: SAR}
        found = {name: self.folder / file for name, file in names.items()}
        return {name: file for name, file in found.items() if file.is_file()}


class SceneJobs:
    """Keeps and runs the jobs. It is a context: leaving it ends the running job at its next tile."""

    def __init__(self, scenes: Scenes, settings: Settings) -> None:
        self.scenes, self.settings = scenes, settings
        self._jobs: dict[str, SceneJob] = {}
        self._pool = ThreadPoolExecutor(1, "fewstep-job")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.cancel_all()
        self._pool.shutdown(cancel_futures=True)

    def open(self) -> SceneJob:
        """Reserve a job before its scene arrives, so that uploads cannot fill the disk. ApiError 503 without room."""
        if len(self._jobs) >= self.settings.max_jobs:
            oldest = next((job for job in self._jobs.values() if job.ended), None)
            if oldest is None:
                seconds = next((job.seconds_left for job in self._jobs.values() if job.status == "running"), UNKNOWN)
                raise overloaded(f"{len(self._jobs)} jobs wait already", max(1, math.ceil(seconds)), "job_queue_full")
            self.forget(oldest)
        id = secrets.token_hex(16)
        job = self._jobs[id] = SceneJob(id, self.scenes.scratch / f"job-{id}")
        job.folder.mkdir()
        return job

    def submit(self, job: SceneJob, order: SceneOrder) -> None:
        """Queue a job whose scene has arrived and was checked."""
        loop = asyncio.get_running_loop()
        job.work = self._pool.submit(self._work, job, order)
        job.work.add_done_callback(lambda _: self._ended(job, loop))

    def find(self, id: str) -> SceneJob:
        """Return a job by its id. ApiError 404 for an unknown one."""
        if id not in self._jobs:
            message = f"job: got {id[:40]!r}; allowed: the id of a job that was not forgotten yet"
            raise ApiError(404, message, param="id", code="job_not_found")
        return self._jobs[id]

    def cancel(self, job: SceneJob) -> None:
        """End a job at its next tile and remove its files. One that has ended already is forgotten."""
        if job.ended or job.work is None:
            self.forget(job)
        else:
            self._release(job)

    def forget(self, job: SceneJob) -> None:
        """Remove a job and its files."""
        self._jobs.pop(job.id, None)
        self._release(job)

    def cancel_all(self) -> None:
        """Cancel all jobs, because the server ends."""
        for job in self._jobs.values():
            job.cancelled.set()

    def _release(self, job: SceneJob) -> None:
        job.cancelled.set()
        if job.work is None:
            shutil.rmtree(job.folder, ignore_errors=True)
        else:
            job.work.cancel()
            job.work.add_done_callback(
                lambda _: shutil.rmtree(job.folder, ignore_errors=True)
            )  # at once if it has ended

    def _ended(self, job: SceneJob, loop: asyncio.AbstractEventLoop) -> None:
        job.expires = time.time() + self.settings.job_ttl
        if not loop.is_closed():
            loop.call_soon_threadsafe(loop.call_later, self.settings.job_ttl, self.forget, job)

    def _work(self, job: SceneJob, order: SceneOrder) -> None:
        """Translate a job's scene in the jobs' thread. An error ends this job alone."""

        def progress(done: int, pixels: int) -> None:
            if job.cancelled.is_set():
                raise Cancelled
            job.done, job.pixels = done, pixels

        job.started = time.perf_counter()
        try:
            facts, _ = self.scenes.translate(order, progress)
            pictures = self.scenes.previews(order, facts)
            for name, picture in zip((PREVIEW, SAR), pictures, strict=True):
                (job.folder / name).write_bytes(picture)
            job.facts = facts
        except Cancelled:
            pass
        except Exception as error:
            job.error = from_exception(error).body
        finally:
            order.scene.unlink(missing_ok=True)
