"""Plain git repositories, laid out as olah serves them: `DIRECTORY/models/ORG/NAME`."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from tests.hub.files import Files

#: What the Hub keeps in LFS by default, among what comes with adapters.
LFS_SUFFIXES = (".safetensors", ".bin", ".pt")

GIT = ["git", "-c", "core.compression=0", "-c", "pack.compression=0"]


class HubRepos:
    """Makes repositories and commits without a working tree.  For one thread."""

    def __init__(self, directory: Path) -> None:
        self._models = directory / "models"
        # Every commit has a time of its own, so equal contents make different commits.
        self._time = itertools.count(1_700_000_000)

    def path(self, name: str) -> Path:
        return self._models / name

    def create(self, name: str, files: Files, *, lfs: bool = True) -> str:
        """A new repository `org/name` with one commit on `main`; returns the commit."""
        self.path(name).mkdir(parents=True)
        self._git(name, "init", "--quiet", "--initial-branch=main", "--template=")
        return self.commit(name, files, lfs=lfs)

    def commit(
        self,
        name: str,
        files: Files,
        *,
        branch: str = "main",
        remove: Iterable[str] = (),
        lfs: bool = True,
    ) -> str:
        """Adds or changes files on a branch (which may be new and without history).

        With `lfs`, files that the Hub would keep in LFS are kept so, else all are git blobs.
        """
        ref = f"refs/heads/{branch}"
        parts = [
            f"commit {ref}\ncommitter rig <rig@example.org> {next(self._time)} +0000\n".encode(),
            _data(b"commit"),
        ]
        if self._git(name, "for-each-ref", ref):
            parts.append(f"from {ref}^0\n".encode())
        parts += [f"D {path}\n".encode() for path in remove]
        for path, content in files.items():
            if lfs and path.endswith(LFS_SUFFIXES):
                content = self._store_in_lfs(name, content)
            parts += [f"M 100644 inline {path}\n".encode(), _data(content)]
        self._git(name, "fast-import", "--quiet", "--date-format=raw", stdin=b"".join(parts))
        return self.revision(name, ref)

    def tag(self, name: str, tag: str, at: str = "main", *, annotated: bool = False) -> None:
        """Makes a tag, or moves it."""
        annotation = ["--annotate", "--message=tag"] if annotated else []
        self._git(name, "tag", "--force", *annotation, tag, at)

    def branch(self, name: str, branch: str, at: str = "main") -> None:
        """Makes a branch, or moves it (also back, as after a forced push)."""
        self._git(name, "update-ref", f"refs/heads/{branch}", self.revision(name, at))

    def revision(self, name: str, revision: str = "main") -> str:
        """The full commit of a branch, tag or commit."""
        return self._git(name, "rev-parse", "--verify", f"{revision}^{{commit}}").strip()

    def content(self, name: str, revision: str, path: str) -> bytes:
        """A file as clients get it, also from LFS."""
        content = self._git_bytes(name, "cat-file", "blob", f"{revision}:{path}")
        found = re.match(rb"version https://git-lfs.*?\noid sha256:([0-9a-f]{64})\n", content)
        if found is None:
            return content
        return lfs_path(self.path(name), found[1].decode()).read_bytes()

    def delete(self, name: str) -> None:
        """Deletes a repository, or an organization with all that it has."""
        shutil.rmtree(self.path(name), ignore_errors=True)

    def _store_in_lfs(self, name: str, content: bytes) -> bytes:
        """Keeps the content where git-lfs does, and returns the pointer that git sees."""
        oid = hashlib.sha256(content).hexdigest()
        stored = lfs_path(self.path(name), oid)
        stored.parent.mkdir(parents=True, exist_ok=True)
        stored.write_bytes(content)
        head = "version https://git-lfs.github.com/spec/v1"
        return f"{head}\noid sha256:{oid}\nsize {len(content)}\n".encode()

    def _git(self, name: str, *arguments: str, stdin: bytes | None = None) -> str:
        return self._git_bytes(name, *arguments, stdin=stdin).decode()

    def _git_bytes(self, name: str, *arguments: str, stdin: bytes | None = None) -> bytes:
        # The user's own configuration (signing, hooks) must not matter.
        identity = {"NAME": "rig", "EMAIL": "rig@example.org"}
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("GIT_")},
            **{
                f"GIT_{who}_{key}": v
                for who in ("AUTHOR", "COMMITTER")
                for key, v in identity.items()
            },
            "GIT_CONFIG_GLOBAL": os.devnull,
            "GIT_CONFIG_NOSYSTEM": "1",
        }
        done = subprocess.run(
            [*GIT, *arguments],
            cwd=self.path(name),
            env=environment,
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            timeout=120,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"git {arguments[0]} in {name}: {done.stderr.decode()}")
        return done.stdout


def lfs_path(repository: Path, oid: str) -> Path:
    """Where the bytes of an LFS file lie."""
    return repository / ".git" / "lfs" / "objects" / oid[:2] / oid[2:4] / oid


def _data(content: bytes) -> bytes:
    return b"data %d\n%b\n" % (len(content), content)
