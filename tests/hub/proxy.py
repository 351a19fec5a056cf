"""A reverse proxy before olah that injects faults, asks for tokens and logs requests."""

from __future__ import annotations

import copy
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from tests.hub.faults import BAD_TOKEN, Answer, BodyFault, Fault, error
from tests.hub.manners import HubManners
from tests.hub.wire import Listener, Request, Seen, Upstream

AnyFault = TypeVar("AnyFault", Fault, BodyFault)

#: What belongs to a repository: its API, and its files.
API_OF, FILES_OF = r"^/api/models/{}(?:[/?]|$)", r"^/{}/resolve/"

#: huggingface_hub asks for this once in a process, whatever it was told to do: neither logged nor
#: counted, so that what a test sees does not depend on which was the first.
ASIDE = "/api/agent-harnesses"


@dataclass
class Rule:
    """A fault, and the requests that it happens to."""

    fault: Fault | BodyFault
    path: re.Pattern[str]
    method: str | None
    times: int | None
    skip: int
    matched: int = 0
    hits: int = 0  #: how often it has happened

    def claims(self, request: Request) -> bool:
        if self.method not in (None, request.method) or not self.path.search(request.target):
            return False
        self.matched += 1
        if self.matched <= self.skip or (self.times is not None and self.hits >= self.times):
            return False
        self.hits += 1
        return True


@dataclass(frozen=True)
class _Door:
    repo: str
    token: str = field(repr=False)
    gated: bool

    def refuses(self, request: Request) -> Answer | None:
        repo = re.escape(self.repo)
        # What a gated repository is, everybody may know; only its files are kept back.
        behind = FILES_OF if self.gated else f"{FILES_OF}|{API_OF}"
        if request.token == self.token or not re.search(behind.format(repo, repo), request.target):
            return None
        if self.gated:
            status = 401 if request.token is None else 403
            return error(status, "GatedRepo", f"Access to model {self.repo} is restricted")
        if request.token is None:
            return error(401, "RepoNotFound", "Repository not found")
        return error(401, message=BAD_TOKEN)


class HubProxy:
    """The Hub as clients see it, at `url`.  Control it from any thread.

    It passes on what olah answers; with `like_the_hub()` (see `tests.hub.manners`) it answers as
    the real Hub does, and sends to a CDN of its own for what is in LFS.
    """

    def __init__(self, upstream: str, *, mirror: Path) -> None:
        self._upstream = Upstream(upstream)
        self._lock = threading.Condition()
        self._rules: list[Rule] = []
        self._doors: dict[str, _Door] = {}
        self._log: list[Seen] = []
        self._like_the_hub = False
        self._closing = threading.Event()
        self._listeners = [
            Listener(name, respond, self._see, self._closing)
            for name, respond in (("hub", self._respond), ("cdn", self._respond_as_cdn))
        ]
        self.url, self.cdn_url = (listener.url for listener in self._listeners)
        self._manners = HubManners(self._upstream, mirror, self.url, self.cdn_url)

    def __enter__(self) -> HubProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends every connection and thread; a second call does nothing."""
        if not self._closing.is_set():
            self._closing.set()
            for listener in self._listeners:
                listener.stop()

    @property
    def errors(self) -> list[BaseException]:
        """What went wrong in the proxy itself; empty in a sound test."""
        return [error for listener in self._listeners for error in listener.errors]

    # What clients will meet.

    def on(
        self,
        fault: Fault | BodyFault,
        path: str = "",
        *,
        method: str | None = None,
        times: int | None = 1,
        skip: int = 0,
    ) -> Rule:
        """The fault happens to the requests whose path and query match the expression.

        To the first `times` of them (None: to all), after `skip`.  The rules are gone through in
        order; the first that answers ends it, and what it did not come to does not count.
        """
        rule = Rule(fault, re.compile(path), method, times, skip)
        with self._lock:
            self._rules.append(rule)
        return rule

    def off(self, *rules: Rule) -> None:
        """Ends these faults, or, without arguments, all."""
        with self._lock:
            self._rules = [rule for rule in self._rules if rules and rule not in rules]

    def private(self, repo: str, token: str) -> None:
        """Without the token the repository seems missing; a wrong token is an error of its own."""
        self._doors[repo] = _Door(repo, token, gated=False)

    def gated(self, repo: str, token: str) -> None:
        """Its files take the token of somebody with access."""
        self._doors[repo] = _Door(repo, token, gated=True)

    def public(self, repo: str) -> None:
        self._doors.pop(repo, None)

    def like_the_hub(self, on: bool = True) -> None:
        self._like_the_hub = on

    # What clients did.

    @property
    def requests(self) -> list[Seen]:
        """All requests so far, in order; those under way too."""
        with self._lock:
            return [copy.copy(seen) for seen in self._log]

    def seen(self, path: str = "", method: str | None = None) -> list[Seen]:
        """The requests whose path and query match."""
        return [
            seen
            for seen in self.requests
            if re.search(path, seen.target) and method in (None, seen.method)
        ]

    def nbytes(self, path: str = "") -> int:
        """Bytes of bodies sent in answer to requests whose path and query match."""
        return sum(seen.nbytes for seen in self.seen(path))

    def forget(self) -> None:
        """Empties the log."""
        with self._lock:
            self._log.clear()

    def wait_for(self, path: str, *, times: int = 1, timeout_s: float = 60) -> None:
        """Returns when so many requests that match have come (they may still be under way)."""
        deadline = time.monotonic() + timeout_s
        while len(self.seen(path)) < times:
            with self._lock:
                self._lock.wait(0.05)
            if time.monotonic() > deadline:
                raise TimeoutError(f"no {times} requests for {path!r} within {timeout_s} s")

    # On the listeners' threads.

    def _see(self, seen: Seen) -> None:
        if seen.target == ASIDE:
            return
        with self._lock:
            self._log.append(seen)
            self._lock.notify_all()

    def _respond(self, request: Request) -> Answer:
        if request.target == ASIDE:
            return error(404, message="Not Found")
        return self._with_faults(request, self._answer)

    def _respond_as_cdn(self, request: Request) -> Answer:
        return self._with_faults(request, self._manners.cdn)

    def _answer(self, request: Request) -> Answer:
        for door in tuple(self._doors.values()):
            if refused := door.refuses(request):
                return refused
        if self._like_the_hub:
            return self._manners.answer(request)
        return self._upstream.forward(request, instead_of_us=self.url)

    def _with_faults(self, request: Request, respond: Callable[[Request], Answer]) -> Answer:
        for fault in self._claim(request, Fault):
            if (instead := fault.before(self._closing)) is not None:
                return instead
        answer = respond(request)
        if request.method == "GET" and answer.status in (200, 206):
            for body_fault in self._claim(request, BodyFault):
                if answer.nbytes is None:
                    _, facts, _ = self._upstream.ask("HEAD", request.target)
                    answer.nbytes = int(facts["content-length"])
                body_fault.spoil(answer, self._closing)
        return answer

    def _claim(self, request: Request, kind: type[AnyFault]) -> Iterator[AnyFault]:
        with self._lock:
            rules = list(self._rules)
        for rule in rules:
            with self._lock:
                claimed = isinstance(rule.fault, kind) and rule.claims(request)
            if claimed and isinstance(rule.fault, kind):
                yield rule.fault
