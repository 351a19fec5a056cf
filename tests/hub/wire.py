"""HTTP for the proxy: a listener that streams answers, and a client that streams olah's."""

from __future__ import annotations

import contextlib
import http.client
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from tests.hub.faults import Answer, Hangup

CHUNK_NBYTES = 1 << 16
UPSTREAM_TIMEOUT_S = 60.0

#: Headers of one connection, not of the answer.
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "te", "upgrade", "date", "server"}


@dataclass(frozen=True)
class Request:
    server: str  #: "hub" or "cdn"
    method: str
    target: str  #: path and query, as they came
    headers: dict[str, str]  #: by lower-case name
    payload: bytes = b""

    @property
    def token(self) -> str | None:
        scheme, _, token = self.headers.get("authorization", "").partition(" ")
        return token if scheme.lower() == "bearer" else None


@dataclass
class Seen:
    """One request in the log.  Of a token it only says that there was one."""

    server: str
    method: str
    target: str
    range: str | None
    authorized: bool
    status: int | None = None  #: None before the answer, and if there was none
    nbytes: int = 0  #: bytes of the body that were sent
    complete: bool = False  #: the whole answer was sent


class Listener(ThreadingHTTPServer):
    """Listens on a free port of 127.0.0.1, one thread a connection, from creation to `stop`."""

    daemon_threads = False  # so that closing waits for them
    request_queue_size = 128

    def __init__(
        self,
        name: str,
        respond: Callable[[Request], Answer],
        see: Callable[[Seen], None],
        closing: threading.Event,
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.name, self.respond, self.see, self.closing = name, respond, see, closing
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        #: What went wrong in the proxy itself.
        self.errors: list[BaseException] = []
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,), name=f"rig-{name}")
        self._thread.start()

    def opened(self, connection: socket.socket) -> None:
        with self._lock:
            self._connections.add(connection)

    def closed(self, connection: socket.socket) -> None:
        with self._lock:
            self._connections.discard(connection)

    def stop(self) -> None:
        """`closing` must be set before."""
        self.shutdown()
        self._thread.join()
        with self._lock:
            for connection in self._connections:
                _shut(connection)
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients may vanish; that is no error, and `_Handler` keeps what is one."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Listener
    connection: socket.socket

    def setup(self) -> None:
        super().setup()
        self.server.opened(self.connection)

    def finish(self) -> None:
        self.server.closed(self.connection)
        super().finish()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  the base class's name
        pass

    def _handle(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        nbytes = int(headers.get("content-length", 0))
        payload = self.rfile.read(nbytes)
        if len(payload) < nbytes:  # the client died meanwhile: olah would wait for the rest
            self.close_connection = True
            return
        request = Request(self.server.name, self.command, self.path, headers, payload)
        seen = Seen(
            request.server,
            request.method,
            request.target,
            headers.get("range"),
            "authorization" in headers,
        )
        self.server.see(seen)
        answer: Answer | None = None
        try:
            answer = self.server.respond(request)
            seen.status = answer.status
            self._send(answer, seen)
            seen.complete = True
        except Hangup as hangup:
            self._hang_up(reset=hangup.reset)
        except ConnectionError:
            self.close_connection = True
        except Exception as error:
            if not self.server.closing.is_set():
                self.server.errors.append(error)
            self._hang_up(reset=False)
        finally:
            if answer is not None:
                answer.close()

    do_GET = do_HEAD = do_POST = _handle  # noqa: N815  the base class's names

    def _send(self, answer: Answer, seen: Seen) -> None:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        chunked = self.command != "HEAD" and "content-length" not in map(str.lower, answer.headers)
        if chunked:
            self.send_header("Transfer-Encoding", "chunked")
        if answer.last:
            self.send_header("Connection", "close")  # also sets close_connection
        self.end_headers()
        if self.command == "HEAD":
            return
        for chunk in answer.body:
            if chunk:
                self.wfile.write(b"%x\r\n%b\r\n" % (len(chunk), chunk) if chunked else chunk)
                seen.nbytes += len(chunk)
            elif self._client_is_gone():
                raise Hangup
        if chunked:
            self.wfile.write(b"0\r\n\r\n")

    def _client_is_gone(self) -> bool:
        readable, _, _ = select.select([self.connection], [], [], 0)
        return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)

    def _hang_up(self, *, reset: bool) -> None:
        self.close_connection = True
        if reset:  # closing with a linger time of 0 sends RST
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.server.closed(self.connection)
            self.connection.close()
        else:
            _shut(self.connection)


def _shut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # the client was first
        connection.shutdown(socket.SHUT_RDWR)


@dataclass
class Upstream:
    """Passes requests on to olah; thread-safe, one connection a request."""

    url: str
    _netloc: str = field(init=False)

    def __post_init__(self) -> None:
        self._netloc = urlsplit(self.url).netloc

    def forward(self, request: Request, *, instead_of_us: str) -> Answer:
        """olah's answer, as it is; but its own address in it becomes `instead_of_us`."""
        headers = {k: v for k, v in request.headers.items() if k not in HOP_BY_HOP}
        connection = http.client.HTTPConnection(self._netloc, timeout=UPSTREAM_TIMEOUT_S)
        try:
            connection.request(request.method, request.target, request.payload or None, headers)
            response = connection.getresponse()
        except BaseException:
            connection.close()
            raise
        kept = {k: v for k, v in response.getheaders() if k.lower() not in HOP_BY_HOP}
        for name in kept:
            if name.lower() in ("location", "link"):
                kept[name] = kept[name].replace(self.url, instead_of_us)
        length = response.getheader("content-length")
        return Answer(
            response.status,
            kept,
            _chunks(response),
            None if length is None else int(length),
            close=connection.close,
        )

    def ask(self, method: str, target: str) -> tuple[int, dict[str, str], bytes]:
        """A small request of the proxy's own: status, headers by lower-case name, body."""
        connection = http.client.HTTPConnection(self._netloc, timeout=UPSTREAM_TIMEOUT_S)
        try:
            connection.request(method, target)
            response = connection.getresponse()
            headers = {name.lower(): value for name, value in response.getheaders()}
            return response.status, headers, response.read()
        finally:
            connection.close()


def _chunks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    while chunk := response.read1(CHUNK_NBYTES):
        yield chunk
