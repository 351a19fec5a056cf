"""HTTP for sources: questions, and resumable streams that any thread can close.

No error of it names a secret: neither a token, nor a URL, which may be signed.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from email.utils import parsedate_to_datetime
from typing import Any

from lora_cache.errors import (
    AccessDeniedError,
    AdapterNotFoundError,
    LoraCacheError,
    SourceError,
)
from lora_cache.sources.patience import Patience

logger = logging.getLogger(__name__)

_PIECE_BYTES = 1 << 18
_CONNECTIONS = 32
_ATTEMPTS = 4  # to ask a question
_MOST_ANSWER_BYTES = 64 << 20
_SILENT_S = 10.0  # a server that did not answer is not asked again for so long

#: Our error for an answer with some ``X-Error-Code``, or None for the usual one.
Explain = Callable[[str, str], LoraCacheError | None]


class HttpClient:
    """Asks one server, and reads from wherever that redirects to.  Thread-safe.

    Proxies and certificates are taken from the environment, as `requests` does.  Credentials are
    sent to the host that they were given for, and to none that it redirects to.

    Args:
        timeout_s: to connect, and between two bytes.
        explain: called with the code of an error answer, and with what was asked for.
    """

    def __init__(self, timeout_s: float, explain: Explain = lambda _, __: None) -> None:
        self._timeout_s = timeout_s
        self._explain = explain
        self._session: Any = None
        self._lock = threading.Lock()
        self._silent_until = 0.0

    def ask(
        self,
        url: str,
        headers: Mapping[str, str],
        what: str,
        form: Mapping[str, Any] | None = None,
    ) -> Any:
        """The JSON that `url` answers; asked a few times if need be.

        A server that is out of reach is left alone for a while: not every question waits for it.

        Args:
            what: how errors call it.
            form: is posted, if given.

        Raises:
            AdapterError, SourceError: by the server's answer.
        """
        patience = Patience(_ATTEMPTS)
        while True:
            if (silent_s := self._silent_until - time.monotonic()) > 0:
                raise SourceError(
                    f"{what}: the server did not answer a moment ago; it is asked again in "
                    f"{silent_s:.0f} s"
                )
            began = time.monotonic()
            answered = False
            try:
                answer = self._ask_once(url, headers, what, form)
                answered = True
                if not isinstance(answer, LoraCacheError):
                    return answer
                raise answer
            except SourceError as error:
                try:
                    if time.monotonic() - began >= self._timeout_s:
                        raise  # waiting so long once is enough
                    pause_s = patience.pause_after(error)
                except SourceError:
                    if not answered:
                        self._silent_until = time.monotonic() + _SILENT_S
                    raise
                logger.info("%s; asking again in %.1f s", error, pause_s)
            time.sleep(pause_s)

    def open(self, url: str, headers: Mapping[str, str], offset: int, what: str) -> HttpBody:
        """Begin to read `url`, from `offset` on if the server can.

        Raises:
            AdapterError, SourceError: by the server's answer.
        """
        wanted = {**headers, "Range": f"bytes={offset}-"} if offset else headers
        response = self._send("GET", url, wanted, what)
        if response.status_code == 416 and offset:  # nothing is there any more: begin anew
            response.close()
            return self.open(url, headers, 0, what)
        if response.status_code not in (200, 206):
            raise self._error_of(response, what)
        return HttpBody(response, offset if response.status_code == 206 else 0, what)

    def _ask_once(
        self, url: str, headers: Mapping[str, str], what: str, form: Mapping[str, Any] | None
    ) -> Any:
        response = self._send("GET" if form is None else "POST", url, headers, what, form)
        if response.status_code != 200:
            return self._error_of(response, what)
        body, answer = HttpBody(response, 0, what), bytearray()
        try:
            for piece in body:
                answer += piece
                if len(answer) > _MOST_ANSWER_BYTES:
                    raise SourceError(f"{what}: the server's answer has no end")
            return json.loads(answer)
        except ValueError:
            raise SourceError(f"{what}: the server's answer is not JSON") from None
        finally:
            body.close()

    def _send(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        what: str,
        form: Mapping[str, Any] | None = None,
    ) -> Any:
        import requests

        wanted = {**headers, "Accept-Encoding": "identity"}
        credentials = wanted.pop("authorization", None) or wanted.pop("Authorization", None)
        try:
            return self._get_session().request(
                method,
                url,
                headers=wanted,
                data=form,
                auth=_Credentials(credentials),
                stream=True,
                timeout=self._timeout_s,
            )
        except requests.Timeout:
            raise SourceError(f"{what}: no answer within {self._timeout_s:g} s") from None
        except requests.RequestException as error:
            raise SourceError(f"{what}: no answer ({_reason(error)})") from None

    def _error_of(self, response: Any, what: str) -> LoraCacheError:
        response.close()
        code = response.headers.get("X-Error-Code", "")
        return self._explain(code, what) or _status_error(response, what)

    def _get_session(self) -> Any:
        with self._lock:
            if self._session is None:
                import requests
                from requests.adapters import HTTPAdapter

                self._session = requests.Session()
                for scheme in ("https://", "http://"):
                    self._session.mount(scheme, HTTPAdapter(pool_maxsize=_CONNECTIONS))
            return self._session


class HttpBody:
    """The bytes of one answer, from `offset` of the file on."""

    def __init__(self, response: Any, offset: int, what: str) -> None:
        self._response = response
        self._what = what
        self.offset = offset
        if response.status_code == 206:
            self.offset = _start_of(response.headers.get("Content-Range", ""), offset, what)

    def __iter__(self) -> Iterator[bytes]:
        try:
            # As they arrive: `stream` collects whole pieces, and what it has of one that breaks
            # off is lost.
            while piece := self._response.raw.read1(_PIECE_BYTES, decode_content=False):
                yield piece
        except Exception as error:  # urllib3's, the socket's, or what a closed response raises
            raise SourceError(f"{self._what}: the transfer broke off ({_reason(error)})") from None

    def close(self) -> None:
        with suppress(Exception):  # it may be closed already, or not support it
            self._response.raw.shutdown()  # wakes a thread that waits for bytes
        with suppress(Exception):
            self._response.close()


def _status_error(response: Any, what: str) -> LoraCacheError:
    status = int(response.status_code)
    if status in (401, 403, 407, 451):
        return AccessDeniedError(
            f"{what}: access denied (HTTP {status}); set HF_TOKEN to a token that may read it"
        )
    if status in (404, 410):
        return AdapterNotFoundError(f"{what} is not there (HTTP {status})")
    wait_s = _retry_after(response.headers.get("Retry-After", ""))
    asked = f", asked to wait {wait_s:.0f} s" if wait_s else ""
    return SourceError(f"{what}: HTTP {status}{asked}", retry_after_s=wait_s)


def _retry_after(value: str) -> float:
    """Seconds, of either form that the header may have."""
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return 0.0


def _reason(error: BaseException) -> str:
    """The innermost cause in words; the messages further out hold the URL."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.strerror:
            return seen.strerror
        inner = getattr(seen, "reason", None) or next(
            (arg for arg in seen.args if isinstance(arg, BaseException)), None
        )
        seen = inner if isinstance(inner, BaseException) else seen.__cause__ or seen.__context__
    return type(error).__name__


def _start_of(content_range: str, offset: int, what: str) -> int:
    """``bytes 100-199/200`` → 100, which must be what was asked for."""
    first = content_range.removeprefix("bytes ").partition("-")[0]
    if not first.isdigit() or int(first) != offset:
        raise SourceError(f"{what}: the server sent another range than it was asked for")
    return offset


class _Credentials:
    """As an `auth` of requests, so that it puts none from ~/.netrc in their place."""

    def __init__(self, value: str | None) -> None:
        self._value = value

    def __call__(self, request: Any) -> Any:
        if self._value:
            request.headers["Authorization"] = self._value
        return request

    def __repr__(self) -> str:
        return "_Credentials(…)"
