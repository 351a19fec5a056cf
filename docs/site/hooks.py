"""The tour as a page: its script is the only place where it is written."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

CELL = re.compile(r"^# %%(.*)\n", re.MULTILINE)
PRINTED = "# > "


def page_of(script: str) -> str:
    """Markdown for a script in the percent format: prose as it is, code and its output in blocks.

    Lines of a code cell that start with ``# >`` are what it printed.
    """
    _, *parts = CELL.split(script)
    page = []
    for kind, cell in zip(parts[::2], parts[1::2], strict=True):
        lines = cell.strip().splitlines()
        if "[markdown]" in kind:
            page.append("\n".join(line.removeprefix("#").removeprefix(" ") for line in lines))
            continue
        page.append(_block("python", [line for line in lines if not line.startswith(PRINTED)]))
        if printed := [line.removeprefix(PRINTED) for line in lines if line.startswith(PRINTED)]:
            page.append(_block("text", printed))
    return "\n\n".join(page) + "\n"


def _block(language: str, lines: list[str]) -> str:
    code = "\n".join(lines).strip()
    return f"```{language}\n{code}\n```"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    script = Path(config.docs_dir, "examples", "tour.py").read_text()
    files.append(File.generated(config, "tour.md", content=page_of(script)))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Links lead to the script, which is what there is in the repository."""
    return markdown.replace("(examples/tour.py)", "(tour.md)")
