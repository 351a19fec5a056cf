"""Streams over HTTP: resumable, closed from any thread, and with errors that name no secret."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from lora_cache.errors import (
    AccessDeniedError,
    AdapterNotFoundError,
    LoraCacheError,
    SourceError,
)

_PIECE_BYTES = 1 << 20
_CONNECTIONS = 32


class HttpClient:
    """Opens URLs.  Thread-safe.

    Proxies and certificates are taken from the environment, as `requests` does.  Credentials are
    sent to the host that they were given for, and to none that it redirects to.

    Args:
        timeout_s: to connect, and between two bytes.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._session: Any = None

    def open(self, url: str, headers: Mapping[str, str], offset: int, what: str) -> HttpBody:
        """Begin to read `url`, from `offset` on if the server can.

        Args:
            what: how errors call it; never the URL, which may be signed.

        Raises:
            AdapterError, SourceError: by the server's answer.
        """
        import requests

        wanted = {**headers, "Accept-Encoding": "identity"}
        credentials = wanted.pop("authorization", None) or wanted.pop("Authorization", None)
        if offset:
            wanted["Range"] = f"bytes={offset}-"
        try:
            response = self._get_session().get(
                url,
                headers=wanted,
                auth=_Credentials(credentials),
                stream=True,
                timeout=self._timeout_s,
            )
        except requests.RequestException as error:
            raise SourceError(f"no answer for {what} ({type(error).__name__})") from error
        if response.status_code == 416:  # there is nothing after `offset`: begin anew
            response.close()
            return self.open(url, headers, 0, what) if offset else _fail(response, what)
        if response.status_code not in (200, 206):
            response.close()
            _fail(response, what)
        return HttpBody(response, offset if response.status_code == 206 else 0, what)

    def _get_session(self) -> Any:
        if self._session is None:
            import requests
            from requests.adapters import HTTPAdapter

            session = requests.Session()
            for scheme in ("https://", "http://"):
                session.mount(scheme, HTTPAdapter(pool_maxsize=_CONNECTIONS))
            self._session = session
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
            yield from self._response.raw.stream(_PIECE_BYTES, decode_content=False)
        except Exception as error:  # urllib3's, the socket's, or what a closed response raises
            raise SourceError(
                f"the transfer of {self._what} broke off ({type(error).__name__})"
            ) from error

    def close(self) -> None:
        with suppress(Exception):  # it may be closed already, or not support it
            self._response.raw.shutdown()  # wakes a thread that waits for bytes
        with suppress(Exception):
            self._response.close()


def status_error(response: Any, what: str) -> LoraCacheError:
    """Our error for an HTTP answer that is none of the wanted ones.

    Args:
        response: with `status_code` and `headers`, of whatever library.
    """
    status = int(getattr(response, "status_code", 0) or 0)
    if status in (401, 403, 407):
        return AccessDeniedError(
            f"{what}: access denied (HTTP {status}); set HF_TOKEN to a token that may read it"
        )
    if status in (404, 410):
        return AdapterNotFoundError(f"{what} is not there (HTTP {status})")
    wait_s = _retry_after(getattr(response, "headers", {}).get("Retry-After", ""))
    asked = f", asked to wait {wait_s:g} s" if wait_s else ""
    return SourceError(f"{what}: HTTP {status}{asked}", retry_after_s=wait_s)


def _fail(response: Any, what: str) -> HttpBody:
    raise status_error(response, what)


def _retry_after(value: str) -> float:
    """Seconds; the form that is a date is rare, and means: not now."""
    try:
        return max(0.0, float(value))
    except ValueError:
        return 0.0


def _start_of(content_range: str, offset: int, what: str) -> int:
    """``bytes 100-199/200`` → 100, which must not be beyond what was asked for."""
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
