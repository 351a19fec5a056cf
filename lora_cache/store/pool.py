"""A bounded pool of threads that fetch, the most urgent first."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import count

from lora_cache.adapter import Adapter, AdapterKey
from lora_cache.sources.base import RemoteSource
from lora_cache.store.fetch import Fetch, FetchCancelledError
from lora_cache.store.store import Store

_LONGEST_NAP_S = 0.1


class Urgency(IntEnum):
    """Who waits for a fetch; the lowest number goes first."""

    LEASE = 0
    SPECULATION = 1


@dataclass
class Job:
    """One fetch in the pool, shared by everybody who wants its key.

    Attributes:
        interested: how many do; the fetch is cancelled when the last one leaves.
    """

    fetch: Fetch
    urgency: Urgency
    number: int
    future: Future[Adapter] = field(default_factory=Future)
    interested: int = 0


class FetchPool:
    """Runs fetches into one store.  Thread-safe.

    Args:
        workers: threads, made when they are needed.  Speculation gets all but one of them, so a
            lease does not wait for a download that nobody waits for.
    """

    def __init__(self, store: Store, workers: int = 4) -> None:
        self._store = store
        self._workers = max(1, workers)
        self._jobs: dict[AdapterKey, Job] = {}
        self._queue: list[Job] = []
        self._running: list[Job] = []
        self._threads = 0
        self._numbers = count()
        self._buckets: dict[int, _Bucket] = {}
        self._changed = threading.Condition()
        self._closed = False

    def join(self, fetch: Fetch, urgency: Urgency) -> Job:
        """Have `fetch` done, or share the one that is under way for its key.

        Every `join` needs a `leave`.
        """
        with self._changed:
            job = self._jobs.get(fetch.remote.key)
            if self._closed:
                job = Job(fetch, urgency, next(self._numbers))
                job.future.cancel()
            elif job is None:
                job = Job(fetch, urgency, next(self._numbers))
                fetch.throttle = self._throttle_for(fetch.source)
                self._jobs[fetch.remote.key] = job
                self._queue.append(job)
                self._start_thread()
            job.interested += 1
            self._hurry(job, urgency)
            self._changed.notify_all()
            return job

    def hurry(self, job: Job, urgency: Urgency) -> None:
        """Somebody more urgent waits for `job` now."""
        with self._changed:
            self._hurry(job, urgency)
            self._changed.notify_all()

    def leave(self, job: Job) -> None:
        """Do not wait for `job` any more; the last one to leave ends it."""
        with self._changed:
            job.interested -= 1
            if job.interested or job.future.done():
                return
            self._forget(job)
            if job in self._queue:
                self._queue.remove(job)
                job.future.cancel()
        job.fetch.cancel()

    def close(self) -> None:
        """Cancel everything; threads end by themselves."""
        with self._changed:
            self._closed = True
            jobs = [*self._queue, *self._running]
            for job in self._queue:
                job.future.cancel()
            self._queue.clear()
            self._jobs.clear()
            self._changed.notify_all()
        for job in jobs:
            job.fetch.cancel()

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until no fetch runs.  Returns whether that is so."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._running, timeout_s)

    # ------------------------------------------------------------------ inside

    def _hurry(self, job: Job, urgency: Urgency) -> None:
        job.urgency = min(job.urgency, urgency)
        self._queue.sort(key=lambda queued: (queued.urgency, queued.number))

    def _start_thread(self) -> None:
        if self._threads < self._workers:
            self._threads += 1
            name = f"lora-cache-fetch-{self._threads}"
            threading.Thread(target=self._work, name=name, daemon=True).start()

    def _work(self) -> None:
        while (job := self._take()) is not None:
            try:
                adapter = job.fetch.run(self._store)
            except FetchCancelledError:
                self._end(job)
                job.future.cancel()
            except BaseException as error:  # whatever it was, somebody waits to hear of it
                self._end(job)
                job.future.set_exception(error)
            else:
                self._end(job)
                job.future.set_result(adapter)

    def _take(self) -> Job | None:
        """The next job that may run; None when the pool is closed."""
        with self._changed:
            while not self._closed:
                for job in self._queue:
                    if self._may_run(job):
                        self._queue.remove(job)
                        self._running.append(job)
                        return job
                self._changed.wait()
            return None

    def _may_run(self, job: Job) -> bool:
        source = job.fetch.source
        same = sum(other.fetch.source is source for other in self._running)
        if same >= source.max_concurrent:
            return False
        if job.urgency is Urgency.LEASE or self._workers == 1:
            return True
        speculative = sum(other.urgency is Urgency.SPECULATION for other in self._running)
        return speculative < self._workers - 1

    def _end(self, job: Job) -> None:
        with self._changed:
            self._running.remove(job)
            self._forget(job)
            self._changed.notify_all()

    def _forget(self, job: Job) -> None:
        key = job.fetch.remote.key
        if self._jobs.get(key) is job:
            del self._jobs[key]

    def _throttle_for(self, source: RemoteSource) -> _Bucket:
        if id(source) not in self._buckets:
            self._buckets[id(source)] = _Bucket(source)
        return self._buckets[id(source)]


class _Bucket:
    """A token bucket over all fetches from one source."""

    def __init__(self, source: RemoteSource) -> None:
        self._source = source  # kept, so that its id stays its own
        self._lock = threading.Lock()
        self._free_at = 0.0

    def __call__(self, nbytes: int, stopped: threading.Event) -> None:
        rate = self._source.bytes_per_s
        if rate is None:
            return
        with self._lock:
            now = time.monotonic()
            due = max(self._free_at, now)
            self._free_at = due + nbytes / rate
        while (nap := due - time.monotonic()) > 0 and not stopped.wait(min(nap, _LONGEST_NAP_S)):
            pass
