"""Whole scenes as jobs: taken at once, translated one after the other, kept for a while.

What a job is at is read off what has happened to it; there is no status to keep in step. All methods are the event
loop's but `_work`, which runs in the one thread of the jobs.
"""

import asyncio
import logging
import secrets
import shutil
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from app.engine.scenes import Cancelled, SceneOrder, Scenes
from app.errors import ApiError, ErrorBody, from_bad_input, internal_error, overloaded
from app.settings import Settings
from distillers.errors import BadInput

if TYPE_CHECKING:
    from distillers.sar.options import SceneFacts

log = logging.getLogger("fewstep.jobs")
OPTICAL, UNCERTAINTY, PREVIEW, SAR = "optical.tif", "uncertainty.tif", "preview.png", "sar.png"


@dataclass(eq=False)
class Job:
    """One scene, from the first byte of its upload until it is forgotten."""

    id: str
    folder: Path
    created: float = field(default_factory=time.time)
    gone: threading.Event = field(default_factory=threading.Event)
    work: Future[None] | None = None  # None: still arriving
    started: float | None = None  # time.perf_counter
    done: int = 0  # pixels
    pixels: int = 0
    facts: "SceneFacts | None" = None
    error: ErrorBody | None = None
    expires: float | None = None

    @property
    def status(self) -> Literal["queued", "running", "done", "failed", "cancelled"]:
        """What it is at."""
        if self.gone.is_set():
            return "cancelled"
        if self.facts or self.error:
            return "done" if self.facts else "failed"
        return "queued" if self.started is None else "running"

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.status in ("done", "failed", "cancelled")

    @property
    def progress(self) -> float:
        """Share of its pixels that are finished; 1 only when the files are there."""
        return 1.0 if self.status == "done" else min(0.999, self.done / max(1, self.pixels))

    @property
    def megapixels_per_second(self) -> float | None:
        """Until now, or of the whole scene."""
        if self.facts:
            return self.facts.megapixels_per_second
        if self.started is None or self.status != "running":
            return None
        return self.done / (time.perf_counter() - self.started) / 1e6

    @property
    def files(self) -> dict[str, Path]:
        """What can be fetched: its files by their names outside."""
        if self.status != "done":
            return {}
        names = {OPTICAL: OPTICAL, UNCERTAINTY: "optical.uncertainty.tif", PREVIEW: PREVIEW, SAR: SAR}
        found = {name: self.folder / file for name, file in names.items()}
        return {name: file for name, file in found.items() if file.is_file()}


class Jobs:
    """A context: on leaving it, the job at work has ended at its next tile."""

    def __init__(self, scenes: Scenes, settings: Settings) -> None:
        self.scenes, self.settings = scenes, settings
        self._jobs: dict[str, Job] = {}
        self._pool = ThreadPoolExecutor(1, "fewstep-job")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.cancel_all()
        self._pool.shutdown(cancel_futures=True)

    def open(self) -> Job:
        """A place for a scene, before its bytes arrive: else uploads could fill the disk."""
        if len(self._jobs) >= self.settings.max_jobs:
            oldest = next((job for job in self._jobs.values() if job.ended), None)
            if oldest is None:
                raise overloaded(f"{len(self._jobs)} jobs wait already", 60, "job_queue_full")
            self.forget(oldest)
        id = secrets.token_hex(16)
        job = self._jobs[id] = Job(id, self.scenes.scratch / f"job-{id}")
        job.folder.mkdir()
        return job

    def submit(self, job: Job, order: SceneOrder) -> None:
        """The scene has arrived and was found good."""
        loop = asyncio.get_running_loop()
        job.work = self._pool.submit(self._work, job, order)
        job.work.add_done_callback(lambda _: self._ended(job, loop))

    def find(self, id: str) -> Job:
        """The job, or 404."""
        if id not in self._jobs:
            message = f"job: got {id[:40]!r}; allowed: the id of a job that was not forgotten yet"
            raise ApiError(404, message, param="id", code="job_not_found")
        return self._jobs[id]

    def cancel(self, job: Job) -> None:
        """Ends it at its next tile; its files go, now or then. One that has ended already is forgotten."""
        if job.ended or job.work is None:
            self.forget(job)
        else:
            self._let_go(job)

    def forget(self, job: Job) -> None:
        """As if it had never been."""
        self._jobs.pop(job.id, None)
        self._let_go(job)

    def cancel_all(self) -> None:
        """The server is closing."""
        for job in self._jobs.values():
            job.gone.set()

    def _let_go(self, job: Job) -> None:
        job.gone.set()
        if job.work is None:
            shutil.rmtree(job.folder, ignore_errors=True)
        else:
            job.work.cancel()
            job.work.add_done_callback(lambda _: shutil.rmtree(job.folder, ignore_errors=True))  # at once if it is done

    def _ended(self, job: Job, loop: asyncio.AbstractEventLoop) -> None:
        job.expires = time.time() + self.settings.job_ttl
        if not loop.is_closed():
            loop.call_soon_threadsafe(loop.call_later, self.settings.job_ttl, self.forget, job)

    def _work(self, job: Job, order: SceneOrder) -> None:
        """In the jobs' thread. Whatever goes wrong ends the job, and nothing else."""

        def progress(done: int, pixels: int) -> None:
            if job.gone.is_set():
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
        except BadInput as error:
            job.error = from_bad_input(error).body
        except ApiError as error:
            job.error = error.body
        except Exception:
            log.exception("job %s failed", job.id)
            job.error = internal_error().body
        finally:
            order.scene.unlink(missing_ok=True)
