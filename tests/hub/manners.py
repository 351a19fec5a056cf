"""What the real Hub does and olah does not, on top of olah's answers.

* `resolve` of an LFS file is a 302 to a CDN: another origin (so the token must not follow), a
  signed URL, and the facts of the file on the redirect: `X-Repo-Commit`, `X-Linked-Size`,
  `X-Linked-ETag`.  `Content-Length` is that of the redirect.
* `resolve` of a plain file has `Content-Length`, `ETag` (in quotes) and `X-Repo-Commit`, on `GET`
  too.  Both kinds answer `Range` with 206 or 416, and respect `If-Range`.
* A missing revision is 404 `RevisionNotFound`, a missing file is 404 `EntryNotFound`.
* Branches with a slash work, and so does `model_info` without a revision.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote, unquote

from tests.hub.faults import ENTRY_NOT_FOUND, REVISION_NOT_FOUND, Answer, Status, error
from tests.hub.repos import lfs_path
from tests.hub.wire import Request, Upstream

RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/([^?]+)")
API = re.compile(r"/api/models/([^/?]+/[^/?]+)(?:/(revision|tree)/([^/?]+))?(?=$|[/?])(.*)")
CDN = re.compile(r"/([^/]+/[^/]+)/([0-9a-f]{64})/")

CDN_CHUNK_NBYTES = 1 << 18


@dataclass(frozen=True)
class HubManners:
    upstream: Upstream
    mirror: Path
    hub_url: str
    cdn_url: str

    def answer(self, request: Request) -> Answer:
        if found := RESOLVE.match(request.target):
            return self._resolve(request, found[1], unquote(found[2]), found[3])
        found = API.match(request.target)
        if found and (found[2] or found[4][:1] in ("", "?")):
            kind, name, rest = found[2] or "revision", unquote(found[3] or "main"), found[4]
            revision = self._without_slash(found[1], name)
            if revision is None or not self._has_revision(found[1], revision):
                return self._missing(found[1], name)
            target = f"/api/models/{found[1]}/{kind}/{quote(revision, safe='')}{rest}"
            request = replace(request, target=target)
        return self.upstream.forward(request, instead_of_us=self.hub_url)

    def _resolve(self, request: Request, repo: str, revision: str, path: str) -> Answer:
        plain = self._without_slash(repo, revision)
        target = f"/{repo}/resolve/{quote(plain or '', safe='')}/{path}"
        status, facts, _ = self.upstream.ask("HEAD", target) if plain else (404, {}, b"")
        if status != 200:
            return self._missing(repo, revision)
        etag, nbytes = facts["etag"], int(facts["content-length"])
        headers = {"X-Repo-Commit": facts["x-repo-commit"], "Accept-Ranges": "bytes"}
        if len(etag) == 64:  # SHA-256: it is in LFS
            location = f"{self.cdn_url}/{repo}/{etag}/{path}?Expires=3600&Signature=rig"
            text = f"Found. Redirecting to {location}".encode()
            headers |= {
                "Location": location,
                "Content-Length": str(len(text)),
                "X-Linked-Size": str(nbytes),
                "X-Linked-ETag": f'"{etag}"',
            }
            return Answer(302, headers, iter([text]), len(text))
        headers["Content-Type"] = "text/plain; charset=utf-8"
        whole = replace(request, target=target)
        if request.method == "HEAD":
            return _ranged(request, Answer(200, headers), etag, nbytes)
        answer = self.upstream.forward(whole, instead_of_us=self.hub_url)
        return _ranged(request, replace(answer, headers=headers), etag, nbytes)

    def cdn(self, request: Request) -> Answer:
        """The CDN that `_resolve` sends to.  It knows no tokens, only signed URLs."""
        found = CDN.match(request.target)
        stored = lfs_path(self.mirror / "models" / found[1], found[2]) if found else None
        if found is None or stored is None or "Signature=rig" not in request.target:
            return error(403, message="AccessDenied")
        if not stored.is_file():
            return error(404, message="NoSuchKey")
        headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"}
        answer = Answer(200, headers, _read(stored))
        return _ranged(request, answer, found[2], stored.stat().st_size)

    def _without_slash(self, repo: str, revision: str) -> str | None:
        """The revision by a name that olah takes, or None if there is no such branch or tag."""
        if "/" not in revision:
            return revision
        status, _, body = self.upstream.ask("GET", f"/api/models/{repo}/refs")
        refs = json.loads(body) if status == 200 else {}
        for ref in itertools.chain(refs.get("branches", ()), refs.get("tags", ())):
            if revision in (ref["name"], ref["ref"]):
                return str(ref["targetCommit"])
        return None

    def _has_revision(self, repo: str, revision: str) -> bool:
        target = f"/api/models/{repo}/revision/{quote(revision, safe='')}"
        return self.upstream.ask("GET", target)[0] == 200

    def _missing(self, repo: str, revision: str) -> Answer:
        """The right one of three errors: olah does not tell them apart."""
        if self.upstream.ask("GET", f"/api/models/{repo}/refs")[0] != 200:
            missing = Status(401, "RepoNotFound", "Repository not found")
            return error(missing.status, missing.code, missing.message)
        plain = self._without_slash(repo, revision)
        known = plain is not None and self._has_revision(repo, plain)
        missing = ENTRY_NOT_FOUND if known else REVISION_NOT_FOUND
        return error(missing.status, missing.code, missing.message)


def _ranged(request: Request, answer: Answer, etag: str, nbytes: int) -> Answer:
    """The part that was asked for, of an answer that is the whole file."""
    answer.headers["ETag"] = f'"{etag}"'
    first, stop = 0, nbytes
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", ""))
    if asked and any(asked.groups()) and request.headers.get("if-range", etag).strip('"') == etag:
        if asked[1]:
            first = int(asked[1])
            stop = min(int(asked[2]) + 1, nbytes) if asked[2] else nbytes
        else:
            first = max(nbytes - int(asked[2]), 0)
        if first >= stop:
            answer.close()
            return error(416, headers={"Content-Range": f"bytes */{nbytes}"})
        answer.status = 206
        answer.headers["Content-Range"] = f"bytes {first}-{stop - 1}/{nbytes}"
    answer.nbytes = stop - first
    answer.headers["Content-Length"] = str(answer.nbytes)
    answer.body = _between(answer.body, first, stop)
    return answer


def _between(body: Iterator[bytes], first: int, stop: int) -> Iterator[bytes]:
    position = 0
    for chunk in body:
        piece = chunk[max(first - position, 0) : max(stop - position, 0)]
        position += len(chunk)
        if piece:
            yield piece
        if position >= stop:
            return


def _read(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CDN_CHUNK_NBYTES):
            yield chunk
