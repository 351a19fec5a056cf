"""Frames, whole and torn, and a channel between two threads."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_cache.engines.resident.layout import Contents
from lora_cache.engines.resident.wire import (
    Bye,
    Channel,
    Displaced,
    Done,
    Failed,
    Frames,
    Hello,
    Holding,
    Load,
    LoadNative,
    Message,
    Report,
    Unload,
    Welcome,
    WireError,
    encode,
)

MESSAGES: list[Message] = [
    Hello(0, 2, 77, "cuda:0", 8, b"\x00\xff", 84_000_000),
    Welcome("/proc/1/fd/9", 1 << 40),
    Load(1, (1 << 30) + 5, 3, 1 << 33, 84_000_000, Contents(16, b"\x7f"), 1 << 30),
    LoadNative(4, 7, -1, "/adapters/moe"),
    Unload(2, [1, 2]),
    Report(3),
    Bye(),
    Done(1, 0.002),
    Failed(2, "slot 3 holds nothing"),
    Holding(3, [0, 5, 0], [7], [5]),
    Displaced(3, 5, 6, 0.1),
]


@given(st.lists(st.sampled_from(MESSAGES), max_size=8), st.randoms())
def test_messages_survive_any_cutting(messages: list[Message], rng: object) -> None:
    stream = b"".join(map(encode, messages))
    frames, at = Frames(), 0
    got: list[Message] = []
    while at < len(stream):
        size = rng.randrange(1, 40)  # type: ignore[attr-defined]
        got += frames.feed(stream[at : at + size])
        at += size
    assert got == messages
    assert not frames.is_torn


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xff\xff\xff",
        b"\x00\x00\x00\x01\xc1",
        b"\x00\x00\x00\x02\x81\xc0",
        encode(Report(1)).replace(b"Report", b"Retort"),
    ],
)
def test_what_is_no_message_is_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        list(Frames().feed(data))


def test_too_long_a_message_is_not_sent() -> None:
    with pytest.raises(WireError, match="allowed"):
        encode(Failed(1, "x" * (17 << 20)))


def channels() -> tuple[Channel, Channel]:
    ours, theirs = socket.socketpair()
    return Channel(ours), Channel(theirs)


def test_a_channel_both_ways_and_its_end() -> None:
    one, other = channels()
    for message in MESSAGES:
        one.send(message)
    assert other.receive() == MESSAGES[0]
    assert other.has_message, "the rest came with it"
    assert [other.receive() for _ in MESSAGES[1:]] == MESSAGES[1:]
    other.send(Bye())
    assert one.receive() == Bye()
    other.close()
    with pytest.raises(EOFError, match="closed"):
        one.receive()
    one.close()


def test_a_torn_frame_is_told_from_a_clean_end() -> None:
    ours, theirs = socket.socketpair()
    theirs.sendall(encode(Report(1))[:-1])
    theirs.close()
    channel = Channel(ours)
    with pytest.raises(EOFError, match="middle"):
        channel.receive()
    channel.close()


def test_shutting_down_wakes_a_waiting_thread() -> None:
    one, other = channels()
    ended: list[str] = []

    def wait() -> None:
        with pytest.raises(EOFError):
            one.receive()
        ended.append("woken")

    thread = threading.Thread(target=wait)
    thread.start()
    one.shut_down()
    thread.join(5)
    assert ended == ["woken"]
    one.shut_down()
    one.close()
    other.close()


def test_nobody_listens(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="No such file"):
        Channel.connect(str(tmp_path / "no"))
    assert len(os.listdir("/proc/self/fd")) == before
