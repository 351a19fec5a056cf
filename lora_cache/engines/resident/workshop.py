"""What the packer does with its jobs: several at a time, those first that somebody waits for."""

from __future__ import annotations

import ctypes
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from queue import PriorityQueue, SimpleQueue

from lora_cache.engines.resident import jobs
from lora_cache.engines.resident.hands import Hands, core_count
from lora_cache.engines.resident.image_store import ImageStore
from lora_cache.engines.resident.layout import Contents, Layout
from lora_cache.engines.resident.making import Making
from lora_cache.engines.resident.pages import populate
from lora_cache.errors import CannotPackError

logger = logging.getLogger(__name__)

_MOST_JOBS = 4
_MOST_EXAMINED = 16  # adapters that are kept open until there is memory for their images
_MOST_SAVING = 4  # adapters whose images stay in the arena for it, should they be evicted at once

_Kept = tuple[Layout, Contents, memoryview]


class Workshop:
    """Carries out jobs in threads of its own, which end with the process.

    Args:
        arena: where images go.
        store: keeps them on disk, too; None: nothing does.
        answer: called with every answer, from any thread; answers come as they are ready.
    """

    def __init__(
        self, arena: memoryview, store: ImageStore | None, answer: Callable[[jobs.Answer], None]
    ) -> None:
        self._arena = arena
        self._store = store
        self._answer = answer
        self._layouts: list[Layout] = []
        self._jobs: PriorityQueue[tuple[bool, int, jobs.Examine | jobs.Pack]] = PriorityQueue()
        self._rooms: SimpleQueue[jobs.Populate] = SimpleQueue()
        self._examined: OrderedDict[jobs.Wanted, Making] = OrderedDict()
        self._examining = threading.Lock()
        self._saves: SimpleQueue[tuple[int, str, list[_Kept]]] = SimpleQueue()
        self._may_save = threading.Semaphore(_MOST_SAVING)
        self._hands = Hands()
        for _ in range(min(_MOST_JOBS, max(1, core_count() // 4))):
            self._start(self._work, "packs")
        self._start(self._save, "saves")
        self._start(self._populate, "pages")

    def take(self, job: jobs.Job) -> None:
        """Carry out a job, soon."""
        if isinstance(job, jobs.Layouts):
            self._layouts = job.layouts
        elif isinstance(job, jobs.Populate):
            self._rooms.put(job)
        else:
            self._jobs.put((not job.wanted.urgent, job.job, job))

    def _start(self, work: Callable[[], None], name: str) -> None:
        threading.Thread(target=work, name=f"lora-cache-{name}", daemon=True).start()

    def _work(self) -> None:
        while True:
            _, _, job = self._jobs.get()
            try:
                if isinstance(job, jobs.Examine):
                    self._answer(self._examine(job))
                else:
                    self._pack(job)
            except CannotPackError as error:
                self._answer(jobs.Refused(job.job, str(error), unknown=True))
            except Exception as error:  # somebody waits for an answer, whatever it is
                logger.info("%s cannot be packed", job.wanted.directory, exc_info=True)
                self._answer(jobs.Refused(job.job, str(error), unknown=False))

    def _examine(self, job: jobs.Examine) -> jobs.Sizes:
        making = Making(job.wanted, self._layouts, self._store)
        sizes = jobs.Sizes(
            job.job,
            [part.contents for part in making.parts],
            [part.nbytes for part in making.parts],
        )
        with self._examining:
            former = self._examined.pop(job.wanted, None)
            self._examined[job.wanted] = making
            if former is None and len(self._examined) > _MOST_EXAMINED:
                _, former = self._examined.popitem(last=False)
        if former is not None:
            former.close()
        return sizes

    def _pack(self, job: jobs.Pack) -> None:
        started = time.monotonic()
        with self._examining:
            making = self._examined.pop(job.wanted, None)
        if making is None:  # by a packer that has died
            making = Making(job.wanted, self._layouts, self._store)
        try:
            fresh: list[_Kept] = []
            for index, (offset, nbytes) in enumerate(zip(job.offsets, job.nbytes, strict=True)):
                image = self._arena[offset : offset + nbytes]
                if making.fill(index, image, self._hands):
                    fresh.append((self._layouts[index], making.parts[index].contents, image))
            # Who has no room to wait does without: the next one to pack it keeps it.
            keep = fresh and making.is_worth_keeping() and self._may_save.acquire(blocking=False)
        finally:
            making.close()
        read, seconds = len(job.offsets) - len(fresh), time.monotonic() - started
        self._answer(jobs.Packed(job.job, seconds, read, saving=bool(keep)))
        if keep:
            self._saves.put((job.job, job.wanted.key, fresh))

    def _populate(self) -> None:
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._arena))
        while True:
            job = self._rooms.get()
            for offset, nbytes in zip(job.offsets, job.nbytes, strict=True):
                populate(start + offset, nbytes)
            self._answer(jobs.Populated(job.job))

    def _save(self) -> None:
        while True:
            job, key, images = self._saves.get()
            try:
                for layout, contents, image in images:
                    assert self._store is not None
                    self._store.write(layout.digest, key, contents, image)
            except Exception:
                logger.exception("a packed image could not be kept")
            self._may_save.release()
            self._answer(jobs.Saved(job))
