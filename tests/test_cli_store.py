"""The commands that fetch into the store, and look after it, on a real Hub server."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from lora_cache import AdapterRef
from lora_cache.cli import app
from lora_cache.cli.options import parse_duration, parse_size
from lora_cache.store import Entry, Store
from tests.hub.faults import Delay, Slow, Stall
from tests.hub.files import WEIGHTS, adapter_files
from tests.hub.fixtures import Hub
from tests.real.parts import write_adapter

HIDDEN = "this_value_must_not_be_shown"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The store is in `home / "store"` unless a command is told otherwise."""
    directory = tmp_path / "lora-cache"
    monkeypatch.setenv("LORA_CACHE_HOME", str(directory))
    return directory


def invoke(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, list(arguments), input=stdin)


def load(*arguments: str, exit_code: int = 0) -> Any:
    result = invoke(*arguments, "--json")
    assert result.exit_code == exit_code, result.output
    return json.loads(result.stdout)


def start(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    """The program, as a shell starts it: Ctrl-C reaches it."""

    def interruptible() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    return subprocess.Popen(
        [sys.executable, "-m", "lora_cache", *arguments],
        text=True,
        stdout=subprocess.PIPE,
        preexec_fn=interruptible,
        **{"stderr": subprocess.PIPE, **options},
    )


def create(hub: Hub, *names: str, nbytes: int = 60_000) -> list[str]:
    """Adapters on the Hub; their full names."""
    for number, name in enumerate(names):
        hub.repos.create(hub.name(name), adapter_files(nbytes, seed=number))
    return [hub.name(name) for name in names]


def entries(root: Path) -> dict[str, Entry]:
    store = Store(root)
    try:
        return {entry.row.name: entry for entry in store.entries()}
    finally:
        store.close()


def set_used(root: Path, name: str, ago_s: float) -> None:
    """Have an adapter look unused for so long."""
    import sqlite3

    with sqlite3.connect(root / "index.sqlite") as database:
        database.execute("update adapters set used = ? where name = ?", (time.time() - ago_s, name))
    database.close()
    for path in (root / "adapters").glob(f"{name}-*"):  # the files say it, too
        os.utime(path, times=(time.time() - ago_s,) * 2)


# ---------------------------------------------------------------------- what is given


@pytest.mark.parametrize(
    ("text", "nbytes"), [("50GiB", 50 << 30), ("800MB", 800_000_000), ("0", 0), ("1.5 KiB", 1536)]
)
def test_sizes(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize(
    ("text", "seconds"), [("30d", 2_592_000), ("12h", 43_200), ("90m", 5400), ("1.5h", 5400)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "many", "-5GiB", "5 apples", "GiB", "inf"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        parse_size(text)


@pytest.mark.parametrize("text", ["", "30", "d", "-1d", "1y", "1d2h", "soon"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="30d, 12h"):
        parse_duration(text)


@pytest.mark.parametrize(
    "arguments",
    [
        ["pull"],
        ["pull", "--max-bytes", "many", "acme/sql"],
        ["pull", "--workers", "0", "acme/sql"],
        ["pull", "--file", "/no/such/list"],
        ["prune", "--unused-for", "30"],
        ["ls", ".", "--store", "x"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(arguments: list[str], home: Path) -> None:
    assert invoke(*arguments).exit_code == 2
    assert not home.exists()


# ---------------------------------------------------------------------- pull


def test_pull_fetches_and_says_what_was_here(hub: Hub, home: Path) -> None:
    sql, chat = create(hub, "sql", "chat")
    (row,) = load("pull", sql)
    commit = hub.repos.revision(sql)
    assert set(row) == {"ref", "name", "key", "path", "bytes", "how", "seconds", "error"}
    assert (row["ref"], row["name"], row["how"], row["error"]) == (sql, "sql", "fetched", None)
    assert row["key"] == f"hub:{sql}@{commit}"
    assert row["bytes"] == sum(map(len, adapter_files(60_000).values()))
    assert Path(row["path"]).parent == home / "store" / "adapters"

    result = invoke("pull", sql, chat, sql)
    assert result.exit_code == 0
    header, first, second, summary = result.stdout.splitlines()
    assert header.split() == ["name", "key", "size", "seconds", "path"]
    assert first.split()[:2] == ["sql", commit[:12]]
    assert "was here" in first
    assert "fetched" in second
    assert summary.startswith("1 adapter fetched, ")
    assert result.stderr == ""  # no terminal, no bars


def test_pull_reads_a_list(hub: Hub, tmp_path: Path) -> None:
    sql, chat, code = create(hub, "sql", "chat", "code")
    text = f"# ours\n\n{sql}\n  {chat}@main  # the newest\n"
    (tmp_path / "list").write_text(text)
    rows = load("pull", code, "--file", str(tmp_path / "list"))
    assert [row["ref"] for row in rows] == [code, sql, f"{chat}@main"]
    result = invoke("pull", "--json", "--file", "-", stdin=text)
    assert [row["how"] for row in json.loads(result.stdout)] == ["was here"] * 2


def test_pull_goes_on_after_errors(hub: Hub, tmp_path: Path) -> None:
    (sql,) = create(hub, "sql")
    (private,) = create(hub, "private")
    hub.proxy.private(private, "hf_good")
    missing = hub.name("missing")
    bad = ["no ref at all", missing, private, str(tmp_path / "nowhere")]
    rows = load("pull", *bad, sql, exit_code=1)
    assert [row["how"] for row in rows] == [None] * 4 + ["fetched"]
    assert all(row["error"] for row in rows[:4])

    result = invoke("pull", *bad, sql)
    assert result.exit_code == 1
    assert f"{missing}: " in result.stdout
    assert "0 adapters fetched, 0 B, 4 did not come" in result.stdout


def test_pull_takes_the_token_from_the_environment(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    (private,) = create(hub, "private")
    hub.proxy.private(private, HIDDEN)
    denied = invoke("pull", private)
    assert denied.exit_code == 1
    assert "set HF_TOKEN" in denied.stdout
    monkeypatch.setenv("HF_TOKEN", HIDDEN)
    came = invoke("pull", private)
    assert came.exit_code == 0
    assert HIDDEN not in denied.output + came.output


def test_pull_of_what_is_on_this_machine_already(hub: Hub, tmp_path: Path) -> None:
    from huggingface_hub import snapshot_download

    (sql,) = create(hub, "sql")
    snapshot = snapshot_download(sql, endpoint=hub.endpoint, cache_dir=hub.cache_dir)
    local = write_adapter(tmp_path / "mine")
    rows = load("pull", sql, str(local))
    assert [row["how"] for row in rows] == ["in place"] * 2
    assert [row["path"] for row in rows] == [snapshot, str(local)]


def test_pull_offline_names_what_is_missing(hub: Hub) -> None:
    sql, chat = create(hub, "sql", "chat")
    load("pull", sql)
    hub.proxy.stop()
    rows = load("pull", sql, chat, exit_code=1)
    assert (rows[0]["how"], rows[0]["error"]) == ("was here", None)
    assert "answer" in rows[1]["error"]


def test_pull_keeps_to_its_budget_and_to_what_it_fetched(hub: Hub, home: Path) -> None:
    """What was named first is not evicted for what was named later."""
    (old,) = create(hub, "old")
    (fetched,) = load("pull", old)
    budget = str(int(2.5 * fetched["bytes"]))
    names = create(hub, "a", "b", "c")
    rows = load("pull", *names, "--workers", "1", "--max-bytes", budget, exit_code=1)
    failed = [row for row in rows if row["error"]]
    assert len(failed) == 1
    assert "raise disk_bytes" in failed[0]["error"]
    assert all(Path(row["path"]).is_dir() for row in rows if not row["error"])
    assert "old" not in entries(home / "store")


def test_ctrl_c_is_prompt_and_keeps_what_came(hub: Hub, home: Path) -> None:
    hub.proxy.like_the_hub()
    quick, endless = create(hub, "quick", "endless", nbytes=3_000_000)
    hub.proxy.on(Stall(2_000_000), rf"/{hub.org}/endless/[0-9a-f]{{64}}/", times=None)
    process = start("pull", quick, endless)
    hub.proxy.wait_for(r"/endless/[0-9a-f]{64}/", timeout_s=30)
    partial = home / "store" / "partial"
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        sizes = [path.stat().st_size for path in partial.glob(f"*/{WEIGHTS}")]
        if len(list((home / "store" / "adapters").glob("quick-*"))) == 1 and any(sizes):
            break
        time.sleep(0.05)
    time.sleep(0.2)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert time.monotonic() - began < 3
    assert process.returncode == 130
    assert "Traceback" not in err
    assert f"{endless}: interrupted" in out
    assert "1 adapter fetched" in out

    listed = {row["name"]: row for row in load("ls")}
    assert (listed["quick"]["complete"], listed["endless"]["complete"]) == (True, False)
    hub.proxy.off()
    hub.proxy.forget()
    rows = load("pull", quick, endless)
    assert [row["how"] for row in rows] == ["was here", "fetched"]
    (rest,) = hub.proxy.seen(r"/endless/[0-9a-f]{64}/", "GET")
    assert rest.range is not None, "it went on where it was"


def test_ctrl_c_while_the_hub_is_silent(hub: Hub) -> None:
    (sql,) = create(hub, "sql")
    hub.proxy.on(Delay(30), rf"/api/models/{sql}", times=None)
    process = start("pull", sql)
    hub.proxy.wait_for(rf"/api/models/{sql}", timeout_s=30)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert (process.returncode, time.monotonic() - began < 4) == (130, True)


def test_pull_on_a_terminal_shows_bars_on_stderr(hub: Hub) -> None:
    hub.proxy.like_the_hub()
    (sql,) = create(hub, "sql", nbytes=2_000_000)
    hub.proxy.on(Slow(3_000_000), rf"/{sql}/[0-9a-f]{{64}}/")
    ours, theirs = pty.openpty()
    process = start(
        "pull", sql, stderr=theirs, env={**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    )
    os.close(theirs)
    shown = b""
    while select.select([ours], [], [], 20)[0]:
        try:
            shown += os.read(ours, 65536)
        except OSError:  # its end is closed
            break
    out, _ = process.communicate(timeout=20)
    os.close(ours)
    assert process.returncode == 0
    text = shown.decode()
    assert "0 of 1 adapter" in text
    assert sql in text
    assert "MiB of 1.9 MiB" in text or "KiB of 1.9 MiB" in text
    assert "\x1b" not in out
    assert "fetched" in out


def test_pull_imports_nothing_heavy(hub: Hub) -> None:
    (sql,) = create(hub, "sql")
    code = (
        "import atexit, os, sys\n"
        "atexit.register(lambda: print({'torch', 'vllm', 'transformers'} & {*sys.modules}))\n"
        f"sys.argv = ['lora-cache', 'pull', {sql!r}]\n"
        "from lora_cache.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines()[-1] == "set()"


# ---------------------------------------------------------------------- ls


def test_ls_lists_the_store(hub: Hub, home: Path) -> None:
    sql, chat = create(hub, "sql", "chat")
    load("pull", f"{sql}@main", chat)
    set_used(home / "store", "chat", 3 * 86_400)
    rows = load("ls")
    assert [row["name"] for row in rows] == ["sql", "chat"], "what was used last comes first"
    assert set(rows[0]) == {
        *("name", "key", "path", "bytes", "complete", "in_use", "created", "last_used", "uses"),
        *("source", "location", "revision", "rank", "error"),
    }
    assert (rows[0]["location"], rows[0]["revision"], rows[0]["rank"]) == (sql, "main", 8)
    assert rows[0]["key"] == f"hub:{sql}@{hub.repos.revision(sql)}"

    lines = invoke("ls").stdout.splitlines()
    assert lines[0].split() == [
        *("name", "rank", "size", "last", "used", "in", "use", "from", "key")
    ]
    assert f"{sql}@main" in lines[1]
    assert "3 d ago" in lines[2]
    assert lines[3].startswith("2 adapters, ")


def test_ls_says_what_is_in_use_and_what_is_broken(hub: Hub, home: Path) -> None:
    load("pull", *create(hub, "sql", "chat"))
    found = entries(home / "store")
    store = Store(home / "store")
    adapter = store.find(store.meaning(AdapterRef.parse(hub.name("sql"))))  # type: ignore[arg-type]
    assert adapter is not None
    hold = store.hold(adapter)
    assert hold is not None
    (found["chat"].path / WEIGHTS).write_bytes(b"garbage")
    with hold:
        rows = {row["name"]: row for row in load("ls", exit_code=1)}
        shown = invoke("ls").stdout
    store.close()
    assert (rows["sql"]["in_use"], rows["chat"]["in_use"]) == (True, False)
    assert rows["chat"]["error"]
    assert "chat: " in shown


def test_ls_of_no_store(home: Path, tmp_path: Path) -> None:
    assert invoke("ls").stdout == f"nothing in {home / 'store'}\n"
    assert load("ls", "--store", str(tmp_path / "other")) == []
    assert not (tmp_path / "other").exists()


def test_the_store_is_where_one_says(hub: Hub, home: Path, tmp_path: Path) -> None:
    other = str(tmp_path / "other")
    load("pull", *create(hub, "sql"), "--store", other)
    assert [row["name"] for row in load("ls", "--store", other)] == ["sql"]
    assert load("ls") == []


# ---------------------------------------------------------------------- verify


def damage(path: Path) -> None:
    weights = bytearray((path / WEIGHTS).read_bytes())
    weights[-1] ^= 1
    (path / WEIGHTS).write_bytes(weights)


def test_verify_finds_one_changed_bit(hub: Hub, home: Path) -> None:
    load("pull", *create(hub, "sql", "chat"))
    assert invoke("verify").stdout.startswith("2 adapters, ")
    damage(entries(home / "store")["chat"].path)
    rows = {row["name"]: row for row in load("verify", exit_code=1)}
    assert set(rows["chat"]) == {"name", "key", "path", "bytes", "error", "deleted"}
    assert rows["sql"]["error"] is None
    assert WEIGHTS in rows["chat"]["error"]
    assert rows["chat"]["deleted"] is False
    assert "1 damaged" in invoke("verify").stdout

    shown = invoke("verify", "--delete")
    assert shown.exit_code == 1
    assert "it is deleted" in shown.stdout
    assert list(entries(home / "store")) == ["sql"]
    assert invoke("verify").exit_code == 0
    assert load("pull", hub.name("chat"))[0]["how"] == "fetched"


def test_verify_deletes_nothing_that_is_in_use(hub: Hub, home: Path) -> None:
    (row,) = load("pull", *create(hub, "sql"))
    store = Store(home / "store")
    adapter = store.find(store.meaning(AdapterRef.parse(hub.name("sql"))))  # type: ignore[arg-type]
    assert adapter is not None
    damage(Path(row["path"]))
    hold = store.hold(adapter)
    assert hold is not None
    with hold:
        assert "stays, because it is in use" in invoke("verify", "--delete").stdout
    store.close()
    assert Path(row["path"]).is_dir()


# ---------------------------------------------------------------------- prune


def test_prune_removes_what_was_not_used(hub: Hub, home: Path) -> None:
    load("pull", *create(hub, "sql", "chat", "code"))
    set_used(home / "store", "chat", 40 * 86_400)
    set_used(home / "store", "code", 86_400)
    planned = load("prune", "--unused-for", "30d", "--dry-run")
    assert [(row["name"], row["reason"]) for row in planned] == [("chat", "unused")]
    assert set(planned[0]) == {"name", "key", "bytes", "last_used", "reason", "removed"}
    assert len(entries(home / "store")) == 3
    assert "would be free" in invoke("prune", "--unused-for", "30d", "-n").stdout
    assert "are free" in invoke("prune", "--unused-for", "30d").stdout
    assert set(entries(home / "store")) == {"sql", "code"}


def test_prune_to_a_size_removes_the_longest_unused(hub: Hub, home: Path) -> None:
    rows = load("pull", *create(hub, "a", "b", "c", "d"))
    for days, name in enumerate("dcba"):
        set_used(home / "store", name, days * 86_400)
    room = str(2 * rows[0]["bytes"] + 1)
    assert [row["name"] for row in load("prune", "--max-bytes", room)] == ["a", "b"]
    assert set(entries(home / "store")) == {"c", "d"}
    assert load("prune", "--max-bytes", room) == []


def test_prune_leaves_what_is_in_use_and_says_so(hub: Hub, home: Path) -> None:
    load("pull", *create(hub, "sql", "chat"))
    store = Store(home / "store")
    adapter = store.find(store.meaning(AdapterRef.parse(hub.name("sql"))))  # type: ignore[arg-type]
    assert adapter is not None
    hold = store.hold(adapter)
    assert hold is not None
    with hold:
        shown = invoke("prune", "--all")
    store.close()
    assert shown.exit_code == 0
    assert "stays: in use" in shown.stdout
    assert "1 adapter in use" in shown.stdout
    assert list(entries(home / "store")) == ["sql"]


def test_prune_without_a_criterion_removes_only_leftovers(hub: Hub, home: Path) -> None:
    load("pull", *create(hub, "sql"))
    store = home / "store"
    partial = store / "partial" / "half-0123456789abcdef"
    partial.mkdir()
    (partial / WEIGHTS).write_bytes(b"x" * 5000)
    (store / "trash" / "dead").mkdir()
    (store / "trash" / "dead" / WEIGHTS).write_bytes(b"x" * 3000)
    result = invoke("prune")
    assert result.exit_code == 0
    assert "half" in result.stdout
    assert "are free" in result.stdout
    assert "to remove adapters, too: --unused-for 30d" in result.stdout
    assert list(entries(store)) == ["sql"]
    assert not partial.exists()
    assert list((store / "trash").iterdir()) == []


def test_a_fetch_under_way_is_not_pruned(hub: Hub, home: Path) -> None:
    hub.proxy.like_the_hub()
    (sql,) = create(hub, "sql", nbytes=2_000_000)
    hub.proxy.on(Slow(1_000_000), rf"/{sql}/[0-9a-f]{{64}}/")
    process = start("pull", sql)
    hub.proxy.wait_for(rf"/{sql}/[0-9a-f]{{64}}/", timeout_s=30)
    assert load("prune", "--all") == []
    assert "being fetched" in invoke("ls").stdout
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert "1 adapter fetched" in out


def test_prune_of_no_store(home: Path) -> None:
    assert load("prune", "--all") == []
    assert not home.exists()
