"""`olah`, a Hub server over plain git repositories, as a process of its own.

What olah 0.5.4 answers in this set-up (offline, over local repositories), and where the real Hub
differs (`tests/hub/manners.py` makes up for the difference on demand):

* `HEAD /ORG/NAME/resolve/REV/FILE`: 200, `content-length`, `x-repo-commit` (the full commit),
  `etag` without quotes: the git blob's SHA-1 of a plain file, the SHA-256 of the bytes of an LFS
  file.  No `x-linked-size`, `x-linked-etag`, `accept-ranges`, `content-type`; no redirect.
* `GET` of the same: 200, `transfer-encoding: chunked`, and none of the headers above.  `Range` is
  ignored: 200 and the whole body.  About 20 MB/s, of memory: it reads the whole file first.
* `GET /api/models/ORG/NAME`: 401 always, so `model_info` needs a revision.
  `…/revision/REV`: `sha` and the names of files; `?blobs=true` (sizes) is ignored.
  `…/tree/REV?recursive=true`: 307 to `…/tree/REV/?…` (absolute, from the `Host` header), then all
  files with `size`, `oid`, and `lfs: {oid, size}` for LFS files only; no pages.
  `…/refs`, `POST …/paths-info/REV`: as the Hub does.  `…/commits/REV`: not as the client wants it.
* REV is a branch, a tag (annotated ones are peeled), a full or short commit, or any expression of
  git.  A name with a slash (`feat/x`) works nowhere but in the answer to `/refs`.
* Missing repository: 401 `RepoNotFound` (`/refs`: 404 `EntryNotFound`).  Missing branch or tag: 401
  `RepoNotFound`; the Hub says 404 `RevisionNotFound`.  Unknown full commit: 500 (`/tree`: 404
  `EntryNotFound`), and the connection is closed: the next request on it may fail.  Missing file:
  401 to `HEAD`, 500 to `GET`; the Hub says 404 `EntryNotFound`.
* Nothing is cached: a branch that moves is seen by the next request.  There is no authentication.
* Other paths of two segments are taken for files of a cache: 200 and an empty body.
* A plain file of 121 to 149 bytes has to be UTF-8 (it could be an LFS pointer), or it is a 500.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import IO

#: Made by the Makefile.
OWN_PYTHON = Path(__file__).parents[2] / ".venv" / "hub" / "bin" / "python"

STARTS_WITHIN_S = 60.0
STOPS_WITHIN_S = 10.0

CONFIG = """\
[basic]
host = "127.0.0.1"
repos-path = "{cache}"
mirrors-path = ["{mirror}"]
[accessibility]
offline = true
"""

# It ends when its standard input does: that is, also when the tests are killed.
LAUNCHER = """\
import os, sys, threading
threading.Thread(target=lambda: (sys.stdin.buffer.read(), os._exit(0)), daemon=True).start()
from olah.server import main
main()
"""


def olah_python() -> Path | None:
    """The Python that has olah: `LORA_CACHE_OLAH`, or the one that `make` sets up."""
    chosen = os.environ.get("LORA_CACHE_OLAH")
    python = Path(chosen) if chosen else OWN_PYTHON
    return python if os.access(python, os.X_OK) else None


class OlahServer:
    """Serves the repositories at `mirror/models/ORG/NAME`, from `start` to `stop`."""

    def __init__(self, directory: Path, python: Path | None = None) -> None:
        python = python or olah_python()
        if python is None:
            raise FileNotFoundError(
                "no Python with olah: run `make .venv/hub/.ready`, or set LORA_CACHE_OLAH"
            )
        self.directory = directory
        self.mirror = directory / "mirror"
        self.url = ""
        self._python = python
        self._log_path = directory / "olah.log"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> OlahServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def log(self) -> str:
        return self._log_path.read_text(errors="replace") if self._log_path.exists() else ""

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        (self.mirror / "models").mkdir(parents=True, exist_ok=True)
        config = self.directory / "olah.toml"
        config.write_text(CONFIG.format(cache=self.directory / "cache", mirror=self.mirror))
        with self._log_path.open("wb") as log:
            self._process = self._launch(config, log)
        try:
            self.url = self._wait_until_ready(self._process)
        except BaseException:
            self.stop()
            raise

    def _launch(self, config: Path, log: IO[bytes]) -> subprocess.Popen[bytes]:
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "GIT_", "PYTHON"))
        }
        environment |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
        # Port 0: the system chooses a free one, and the log tells which.
        arguments = ["--config", str(config), "--port", "0", "--log-path", str(self.directory)]
        return subprocess.Popen(
            [str(self._python), "-u", "-c", LAUNCHER, *arguments],
            cwd=self.directory,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> str:
        deadline = time.monotonic() + STARTS_WITHIN_S
        while time.monotonic() < deadline:
            running = re.search(r"Uvicorn running on (http://127\.0\.0\.1:\d+)", self.log)
            if running:
                return running[1]
            if process.poll() is not None:
                raise RuntimeError(f"olah ended with {process.returncode}:\n{self.log}")
            time.sleep(0.05)
        raise TimeoutError(f"olah did not start within {STARTS_WITHIN_S} s:\n{self.log}")

    def stop(self) -> None:
        """Ends the process and its group; a second call does nothing."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            try:
                process.wait(STOPS_WITHIN_S)
            except subprocess.TimeoutExpired:
                continue
            return
