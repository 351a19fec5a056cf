"""What can go wrong between a client and the Hub; `HubProxy.on` says when it does.

Faults of the body (`BodyFault`) happen to answers 200 and 206 to a `GET`, so they leave redirects
alone; the others happen to any request.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

#: The wording by which huggingface_hub tells a bad token from a missing repository.
BAD_TOKEN = "Invalid credentials in Authorization header"


class Hangup(Exception):  # noqa: N818  no error of the proxy, but what was asked of it
    """Ends the connection at once."""

    def __init__(self, *, reset: bool = False) -> None:
        self.reset = reset


@dataclass
class Answer:
    """An answer on its way to the client; `nbytes` is the true length of the body, if known."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: Iterator[bytes] = field(default_factory=lambda: iter(()))
    nbytes: int | None = None
    #: The connection cannot be used again after it.
    last: bool = False
    #: Frees what the body comes from, sent or not.
    close: Callable[[], object] = lambda: None


def error(
    status: int, code: str = "", message: str = "", headers: dict[str, str] | None = None
) -> Answer:
    """An error as the Hub words it."""
    text = f'{{"error":"{message or status}"}}'.encode()
    named = {"X-Error-Code": code, "X-Error-Message": message}
    return Answer(
        status,
        {
            "Content-Type": "application/json",
            "Content-Length": str(len(text)),
            **{name: value for name, value in named.items() if value},
            **(headers or {}),
        },
        iter([text]),
        len(text),
    )


class Fault:
    """Happens before the request is passed on."""

    def before(self, closing: threading.Event) -> Answer | None:
        """May wait, but no longer than until `closing`; an answer goes out instead of olah's."""


@dataclass(frozen=True)
class Status(Fault):
    """An error instead of an answer."""

    status: int
    code: str = ""
    message: str = ""
    retry_after_s: int | None = None

    def before(self, closing: threading.Event) -> Answer:
        wait = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        return error(self.status, self.code, self.message, wait)


UNAUTHORIZED = Status(401, message=BAD_TOKEN)
FORBIDDEN = Status(403, message="Forbidden")
GATED = Status(403, "GatedRepo", "Access to this model is restricted: you must be authorized")
REPO_NOT_FOUND = Status(404, "RepoNotFound", "Repository not found")
ENTRY_NOT_FOUND = Status(404, "EntryNotFound", "Entry not found")
REVISION_NOT_FOUND = Status(404, "RevisionNotFound", "Invalid rev id")
BROKEN = Status(500, message="Internal Error")
UNAVAILABLE = Status(503, message="Service Unavailable")


def too_many_requests(retry_after_s: int = 1) -> Status:
    return Status(429, message="Too many requests", retry_after_s=retry_after_s)


@dataclass(frozen=True)
class Delay(Fault):
    """Nothing, not even headers, for a while."""

    seconds: float

    def before(self, closing: threading.Event) -> None:
        closing.wait(self.seconds)


@dataclass(frozen=True)
class Call(Fault):
    """Calls a function (on a thread of the proxy), then goes on: moves a branch in between, say."""

    function: Callable[[], object]

    def before(self, closing: threading.Event) -> None:
        self.function()


@dataclass(frozen=True)
class Drop(Fault):
    """The connection ends without an answer; reset, or closed."""

    reset: bool = False

    def before(self, closing: threading.Event) -> None:
        raise Hangup(reset=self.reset)


class BodyFault:
    """Happens to the body of an answer, whose true length is in `answer.nbytes`."""

    def spoil(self, answer: Answer, closing: threading.Event) -> None:
        raise NotImplementedError


@dataclass(frozen=True)
class Slow(BodyFault):
    """No more than so many bytes a second."""

    bytes_per_s: float

    def spoil(self, answer: Answer, closing: threading.Event) -> None:
        step = max(1, int(self.bytes_per_s / 20))

        def trickle(body: Iterator[bytes]) -> Iterator[bytes]:
            for chunk in body:
                for start in range(0, len(chunk), step):
                    piece = chunk[start : start + step]
                    yield piece
                    if closing.wait(len(piece) / self.bytes_per_s):
                        raise Hangup

        answer.body = trickle(answer.body)


@dataclass(frozen=True)
class Stall(BodyFault):
    """So many bytes, then nothing: until the client gives up, or the proxy stops."""

    after_nbytes: int

    def spoil(self, answer: Answer, closing: threading.Event) -> None:
        def stall(body: Iterator[bytes]) -> Iterator[bytes]:
            yield from _first(body, self.after_nbytes)
            while not closing.wait(0.05):
                yield b""  # the proxy looks whether the client is still there
            raise Hangup

        answer.body = stall(answer.body)


@dataclass(frozen=True)
class Cut(BodyFault):
    """The connection ends after so many tenths of the body; reset, or closed."""

    tenths: float
    reset: bool = False

    def spoil(self, answer: Answer, closing: threading.Event) -> None:
        def cut(body: Iterator[bytes]) -> Iterator[bytes]:
            yield from _first(body, int(_length(answer) * self.tenths / 10))
            raise Hangup(reset=self.reset)

        answer.body = cut(answer.body)


@dataclass(frozen=True)
class Short(BodyFault):
    """Only so many tenths of the body, in an answer that is otherwise in order."""

    tenths: float

    def spoil(self, answer: Answer, closing: threading.Event) -> None:
        nbytes = int(_length(answer) * self.tenths / 10)
        answer.body = _first(answer.body, nbytes)
        answer.nbytes = nbytes
        if "Content-Length" in answer.headers:
            answer.headers["Content-Length"] = str(nbytes)


@dataclass(frozen=True)
class WrongLength(BodyFault):
    """`Content-Length` says so many bytes more (or, negative, less) than come."""

    by_nbytes: int

    def spoil(self, answer: Answer, closing: threading.Event) -> None:
        answer.headers["Content-Length"] = str(_length(answer) + self.by_nbytes)
        answer.last = True


@dataclass(frozen=True)
class Flip(BodyFault):
    """So many bytes are other ones, from so many tenths of the body on; the length stays."""

    tenths: float = 5
    count: int = 1

    def spoil(self, answer: Answer, closing: threading.Event) -> None:
        start = int(_length(answer) * self.tenths / 10)
        stop = start + self.count

        def flip(body: Iterator[bytes]) -> Iterator[bytes]:
            position = 0
            for chunk in body:
                first, last = max(start - position, 0), min(stop - position, len(chunk))
                position += len(chunk)
                if first < last:
                    flipped = bytes(byte ^ 0xFF for byte in chunk[first:last])
                    yield chunk[:first] + flipped + chunk[last:]
                else:
                    yield chunk

        answer.body = flip(answer.body)


def _length(answer: Answer) -> int:
    if answer.nbytes is None:
        raise ValueError("this fault needs the length of the body, and olah does not tell it")
    return answer.nbytes


def _first(body: Iterator[bytes], nbytes: int) -> Iterator[bytes]:
    left = nbytes
    for chunk in body:
        if left <= 0:
            return
        yield chunk[:left]
        left -= len(chunk)
