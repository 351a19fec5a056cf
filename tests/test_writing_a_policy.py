"""What `docs/writing-a-policy.md` shows is built, installed, tested and used."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.long  # builds a package

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "writing-a-policy.md").read_text()
FILE = re.compile(r"^`([\w.]+)`:\n\n```\w+\n(.*?)^```", re.MULTILINE | re.DOTALL)
FILES = dict(FILE.findall(PAGE))
EXAMPLES = re.findall(r"^```python\n(.*?)^```", FILE.sub("", PAGE), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the page's package in it, as pip would have put it there."""
    project, site = tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("site")
    for name, text in FILES.items():
        (project / name).write_text(text)
    build = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", "dist", "."]
    subprocess.run(build, cwd=project, capture_output=True, timeout=120, check=True)
    (wheel,) = (project / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


def run(site: Path, cwd: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_page_has_the_files_that_it_announces() -> None:
    assert set(FILES) == {"pyproject.toml", "lora_cache_idle.py", "test_lora_cache_idle.py"}
    assert len(EXAMPLES) == 1


def test_its_tests_pass(site: Path, tmp_path: Path) -> None:
    name = "test_lora_cache_idle.py"
    (tmp_path / name).write_text(FILES[name])
    output = run(site, tmp_path, "-m", "pytest", "-q", "-p", "no:cacheprovider", name)
    passed = re.search(r"^(\d+) passed", output, re.MULTILINE)
    assert passed is not None
    assert int(passed[1]) > 5  # the contract is in it


def test_it_is_found_by_name(site: Path, tmp_path: Path) -> None:
    run(site, tmp_path, "-c", EXAMPLES[0])
    code = (
        "from lora_cache.policies import make_policy\n"
        "made = make_policy('idle-over-cost')\n"
        "print(type(made).__module__, type(made).__name__)"
    )
    assert run(site, tmp_path, "-c", code).split() == ["lora_cache_idle", "IdleOverCost"]
    with pytest.raises(AssertionError, match="unknown policy 'idle-over-cost'"):
        run(tmp_path, tmp_path, "-c", code)
