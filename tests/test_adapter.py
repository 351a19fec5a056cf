"""What people write, and what it is read as."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cache.adapter import Adapter, AdapterKey, AdapterRef
from lora_cache.errors import AdapterError, AdapterNotFoundError, InvalidAdapterError
from lora_cache.manifest import read_manifest, read_stamp
from tests.real.parts import write_adapter

CONTROLS = ["\x00", "\n", "\t", "\x1b", "\x1f", "\x7f"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, and the home of the user."""
    work = tmp_path.resolve() / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", str(work.parent / "home"))
    return work


# ---------------------------------------------------------------------------- parse


@pytest.mark.parametrize(
    ("text", "location"),
    [
        ("/adapters/sql", "/adapters/sql"),
        ("/adapters/sql/", "/adapters/sql"),
        ("/adapters/../etc", "/etc"),
        ("/a@b", "/a@b"),
        ("./sql", "{here}/sql"),
        ("./org/name@v1", "{here}/org/name@v1"),
        ("../sql", "{up}/sql"),
        ("~", "{up}/home"),
        ("~/sql", "{up}/home/sql"),
    ],
)
def test_what_starts_like_a_path_is_one_whether_it_exists_or_not(
    here: Path, text: str, location: str
) -> None:
    expected = location.format(here=here, up=here.parent)
    assert AdapterRef.parse(text) == AdapterRef("local", expected)


@pytest.mark.parametrize(
    ("text", "repo_id", "revision"),
    [
        ("org/name", "org/name", None),
        ("org/name@main", "org/name", "main"),
        ("org/name@v1.0", "org/name", "v1.0"),
        ("org/name@refs/pr/3", "org/name", "refs/pr/3"),
        ("Org-1/na.me_2-x", "Org-1/na.me_2-x", None),
        (f"org/name@{'a' * 40}", "org/name", "a" * 40),
        (f"{'a' * 96}/{'b' * 96}", f"{'a' * 96}/{'b' * 96}", None),
    ],
)
@pytest.mark.usefixtures("here")
def test_org_and_name_are_the_hub(text: str, repo_id: str, revision: str | None) -> None:
    assert AdapterRef.parse(text) == AdapterRef("hub", repo_id, revision)


@pytest.mark.parametrize("text", ["sql", "org/name", "org/name@main", "a/b/c", ".", ".."])
def test_an_existing_directory_is_local_even_if_it_looks_like_the_hub(
    here: Path, text: str
) -> None:
    (here / text).mkdir(parents=True, exist_ok=True)
    assert AdapterRef.parse(text) == AdapterRef("local", os.path.normpath(here / text))


def test_an_existing_file_that_looks_like_the_hub_is_the_hub(here: Path) -> None:
    (here / "org").mkdir()
    (here / "org" / "name").write_text("no directory")
    assert AdapterRef.parse("org/name").source == "hub"


@pytest.mark.parametrize("text", ["org/name", "sql"])
def test_a_path_object_is_local_even_if_it_looks_like_the_hub(here: Path, text: str) -> None:
    assert AdapterRef.parse(Path(text)) == AdapterRef("local", str(here / text))


@pytest.mark.parametrize(
    "text",
    [
        "sql", "a/b/c", "org/", "org/name/", "org//name", " org/name", "org /name", "-org/name",
        ".org/name", "@main", "@", "örg/name", "org/näme", f"org/{'a' * 97}", "https://x.co/a/b",
    ],
)  # fmt: skip
@pytest.mark.usefixtures("here")
def test_what_is_neither_a_directory_nor_the_hub_is_not_found(text: str) -> None:
    with pytest.raises(AdapterNotFoundError, match=r"neither a directory here nor .*org/name"):
        AdapterRef.parse(text)


@pytest.mark.parametrize("text", ["org/..", "org/a..b", "o..g/name", "..org/name", "org/name@a..b"])
@pytest.mark.usefixtures("here")
def test_dots_never_climb_out_of_a_hub_id(text: str) -> None:
    with pytest.raises((InvalidAdapterError, AdapterNotFoundError), match=r"org/name|a branch"):
        AdapterRef.parse(text)


@pytest.mark.parametrize("text", ["org/name@", "org/name@a b", "org/name@@", "org/name@/etc"])
@pytest.mark.usefixtures("here")
def test_a_senseless_revision_is_invalid(text: str) -> None:
    with pytest.raises(InvalidAdapterError, match="give a branch, tag or commit"):
        AdapterRef.parse(text)


@pytest.mark.usefixtures("here")
def test_an_empty_text_is_invalid() -> None:
    with pytest.raises(InvalidAdapterError, match=r"neither a path nor org/name\[@revision\]"):
        AdapterRef.parse("")


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("text", ["/a{}b", "./a{}", "~/{}", "{}", "a{}b", "org{}/name", "{}/b"])
@pytest.mark.usefixtures("here")
def test_control_characters_are_invalid_wherever_they_stand(text: str, control: str) -> None:
    with pytest.raises(InvalidAdapterError) as caught:
        AdapterRef.parse(text.format(control))
    assert str(caught.value).isprintable()


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=30) | st.text("ab./~@-\x00\\ ", max_size=12))
def test_any_text_is_a_ref_or_an_adapter_error(text: str) -> None:
    try:
        ref = AdapterRef.parse(text)
    except AdapterError:
        return
    assert ref.source in ("local", "hub")
    assert (ref.source == "local") == os.path.isabs(ref.location)


# ---------------------------------------------------------------------------- local, hub


@pytest.mark.parametrize("text", ["", "\x00", "a\nb", "/a\x7f"])
def test_local_refuses_what_is_no_path(text: str) -> None:
    with pytest.raises(InvalidAdapterError, match="is not a usable path: give"):
        AdapterRef.local(text)


@pytest.mark.parametrize("spelling", ["sql", "./sql", "x/../sql", "sql/", "./././sql"])
def test_local_spellings_of_one_directory_are_one_ref(here: Path, spelling: str) -> None:
    assert AdapterRef.local(spelling) == AdapterRef.local(here / "sql")


@pytest.mark.parametrize(
    "repo_id", ["", "name", "org/name/x", "/name", "org/", "org/..", "a b/c", "../x", "org\x00/n"]
)
def test_hub_refuses_what_is_no_repository(repo_id: str) -> None:
    with pytest.raises(InvalidAdapterError, match="is not a Hub repository: write org/name"):
        AdapterRef.hub(repo_id)


@pytest.mark.parametrize("revision", ["", "a..b", "../x", "/x", "-x", "a b", "a\x00", "a" * 256])
def test_hub_refuses_what_is_no_revision(revision: str) -> None:
    with pytest.raises(InvalidAdapterError, match="is not a revision: give"):
        AdapterRef.hub("org/name", revision)


# ---------------------------------------------------------------------------- identity, text


def test_keys_are_equal_by_content_alone() -> None:
    one, two = AdapterKey("sha256:aa", "sql"), AdapterKey("sha256:aa", "other")
    assert one == two
    assert hash(one) == hash(two)
    assert len({one, two, AdapterKey("sha256:aa")}) == 1
    assert one != AdapterKey("sha256:ab", "sql")


@pytest.mark.parametrize(
    ("key", "text"),
    [
        (AdapterKey("sha256:0123456789abcdef", "sql"), "sql@0123456789ab"),
        (AdapterKey("sha256:0123456789abcdef"), "sha256:0123456789abcdef"),
        (AdapterKey("hub:org/name:0123456789abcdef", "name"), "name@0123456789ab"),
        (AdapterKey("short", "sql"), "sql@short"),
    ],
)
def test_a_key_reads_as_name_and_short_digest(key: AdapterKey, text: str) -> None:
    assert str(key) == text


def test_refs_with_another_revision_are_other_refs() -> None:
    plain, main = AdapterRef.hub("org/name"), AdapterRef.hub("org/name", "main")
    assert plain != main
    assert len({plain, main, AdapterRef.hub("org/name")}) == 2


@pytest.mark.parametrize("text", ["/adapters/sql", "org/name", "org/name@v1"])
@pytest.mark.usefixtures("here")
def test_a_ref_reads_as_it_was_written(text: str) -> None:
    assert str(AdapterRef.parse(text)) == text
    assert AdapterRef.parse(str(AdapterRef.parse(text))) == AdapterRef.parse(text)


# ---------------------------------------------------------------------------- adapters


def adapter_at(path: Path) -> Adapter:
    return Adapter(AdapterKey("test:1", "a"), path, read_manifest(path), read_stamp(path))


def test_an_adapter_is_unchanged_until_a_file_is_rewritten_or_gone(tmp_path: Path) -> None:
    adapter = adapter_at(write_adapter(tmp_path / "a", seed=1))
    assert adapter.is_unchanged()
    assert adapter.nbytes == adapter.manifest.nbytes > 0
    write_adapter(tmp_path / "a", seed=1, rank=8)
    assert not adapter.is_unchanged()
    (tmp_path / "a" / "adapter_config.json").unlink()
    assert not adapter.is_unchanged()


def test_an_adapter_without_a_stamp_never_changes(tmp_path: Path) -> None:
    manifest = read_manifest(write_adapter(tmp_path / "a"))
    assert Adapter(AdapterKey("test:1"), tmp_path / "gone", manifest).is_unchanged()
