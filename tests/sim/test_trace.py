"""Traces are read as a stream, and refused at the first thing that is wrong with them."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path

import pytest

from lora_cache.errors import ConfigError
from lora_cache.sim import FileTrace, Request, open_trace

HEADER = "time_s,adapter,input_tokens,output_tokens"
ROWS = ["0.0,sql,10,20", "0.5,chat,1,0", "0.5,sql,7,9"]
REQUESTS = [Request(0.0, "sql", 10, 20), Request(0.5, "chat", 1, 0), Request(0.5, "sql", 7, 9)]


def write(path: Path, *lines: str) -> Path:
    data = "".join(f"{line}\n" for line in lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def as_json(*records: object) -> list[str]:
    return [json.dumps(record) for record in records]


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz", "T.CSV"])
def test_csv(tmp_path: Path, name: str) -> None:
    trace = FileTrace(write(tmp_path / name, HEADER, *ROWS))
    assert list(trace) == REQUESTS
    assert list(trace) == REQUESTS, "it can be read again"


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz"])
def test_jsonl(tmp_path: Path, name: str) -> None:
    records: list[dict[str, object]] = [
        {"time_s": r.time_s, "adapter": r.adapter, "input_tokens": r.input_tokens, "x": [],
         "output_tokens": r.output_tokens, "nbytes": None}
        for r in REQUESTS
    ]  # fmt: skip
    assert list(FileTrace(write(tmp_path / name, *as_json(*records)))) == REQUESTS


def test_columns_in_any_order_and_optional_ones(tmp_path: Path) -> None:
    path = write(
        tmp_path / "t.csv",
        "rank, adapter,note,output_tokens,input_tokens,time_s,nbytes",
        '8,"a,b",hello,2,1,3,1000',
        "",
        ",7,,2,1,3,",
    )
    assert list(FileTrace(path)) == [
        Request(3.0, "a,b", 1, 2, 1000, 8),
        Request(3.0, "7", 1, 2, None, None),
    ]


def test_an_adapter_may_be_a_number_in_json(tmp_path: Path) -> None:
    record = {"time_s": 1, "adapter": 7, "input_tokens": 1, "output_tokens": 2, "rank": 16}
    (request,) = FileTrace(write(tmp_path / "t.jsonl", *as_json(record)))
    assert request == Request(1.0, "7", 1, 2, None, 16)


def test_a_byte_order_mark_and_other_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([HEADER, *ROWS]).encode())
    assert list(FileTrace(path)) == REQUESTS


@pytest.mark.parametrize(
    ("lines", "line", "message"),
    [
        ([], 1, "a header is expected"),
        (["time_s,adapter,input_tokens"], 1, "no column 'output_tokens'"),
        ([f"{HEADER},adapter"], 1, "'adapter' comes twice"),
        ([HEADER, "0,a,1"], 2, "3 fields, and the header has 4"),
        ([HEADER, ROWS[0], "0,a,1,2,3"], 3, "5 fields"),
        ([HEADER, "soon,a,1,2"], 2, "time_s is 'soon'"),
        ([HEADER, "nan,a,1,2"], 2, "time_s is 'nan'"),
        ([HEADER, "inf,a,1,2"], 2, "time_s is 'inf'"),
        ([HEADER, "-1,a,1,2"], 2, "time_s is '-1'"),
        ([HEADER, "0,a,1.5,2"], 2, "input_tokens is '1.5'"),
        ([HEADER, "0,a,1,-2"], 2, "output_tokens is '-2'"),
        ([HEADER, "0, ,1,2"], 2, "adapter is ' '"),
        ([f"{HEADER},nbytes", "0,a,1,2,0"], 2, "nbytes is '0'"),
        ([f"{HEADER},rank", "0,a,1,2,many"], 2, "rank is 'many'"),
        ([HEADER, "1,a,1,2", "0.9,a,1,2"], 3, "time goes back from 1.0 to 0.9"),
        ([HEADER, '0,"a,1,2'], 2, "end of data"),
    ],
)
def test_malformed_csv(tmp_path: Path, lines: list[str], line: int, message: str) -> None:
    path = write(tmp_path / "bad.csv", *lines)
    with pytest.raises(ConfigError) as caught:
        list(FileTrace(path))
    assert f"{path}, line {line}: " in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


GOOD = {"time_s": 1.0, "adapter": "a", "input_tokens": 1, "output_tokens": 2}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "not an object"),
        ("[" * 100_000, "not JSON"),
        (json.dumps({**GOOD, "time_s": "1"}), "time_s is '1'"),
        (json.dumps({**GOOD, "time_s": True}), "time_s is True"),
        (json.dumps({**GOOD, "time_s": float("nan")}), "time_s is nan"),
        (json.dumps({**GOOD, "time_s": 10**400}), "time_s is 1000"),
        (json.dumps({**GOOD, "time_s": 0.5}), "time goes back"),
        (json.dumps({**GOOD, "adapter": ""}), "adapter is ''"),
        (json.dumps({**GOOD, "adapter": None}), "adapter is None"),
        (json.dumps({**GOOD, "adapter": True}), "adapter is True"),
        (json.dumps({**GOOD, "output_tokens": 2.0}), "output_tokens is 2.0"),
        (json.dumps({**GOOD, "nbytes": "1"}), "nbytes is '1'"),
        (json.dumps({k: v for k, v in GOOD.items() if k != "adapter"}), "no field 'adapter'"),
    ],
)
def test_malformed_json(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "bad.jsonl", json.dumps(GOOD), "", line)
    with pytest.raises(ConfigError) as caught:
        list(FileTrace(path))
    assert f"{path}, line 3: {message}" in str(caught.value)


def test_damaged_and_missing_files(tmp_path: Path) -> None:
    whole = gzip.compress("\n".join([HEADER, *ROWS * 2000]).replace("0.5", "0").encode())
    cases = {
        "cut.csv.gz": (whole[: len(whole) // 2], "damaged gzip"),
        "no.csv.gz": (b"time_s", "damaged gzip"),
        "latin.csv": (f"{HEADER}\n0,\xfc,1,2".encode("latin-1"), "not UTF-8"),
        "binary.csv": (b"\x00\x01", "line 1"),
    }
    for name, (data, message) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ConfigError, match=message) as caught:
            list(FileTrace(tmp_path / name))
        assert name in str(caught.value)
    (tmp_path / "dir.csv").mkdir()
    for name in ("dir.csv", "nowhere.csv"):
        with pytest.raises(ConfigError, match=name):
            list(FileTrace(tmp_path / name))
    with pytest.raises(ConfigError, match=r"\.csv or \.jsonl"):
        FileTrace("trace.parquet")


def test_what_lies_before_an_error_is_read(tmp_path: Path) -> None:
    """It is a stream: nobody looks ahead."""
    stream = iter(FileTrace(write(tmp_path / "t.csv", HEADER, *ROWS, "what is this")))
    assert [next(stream) for _ in ROWS] == REQUESTS
    with pytest.raises(ConfigError, match="line 5"):
        next(stream)


@pytest.mark.long
@pytest.mark.parametrize("suffix", ["csv", "csv.gz", "jsonl"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, suffix: str) -> None:
    def peak(rows: int) -> int:
        path = tmp_path / f"{rows}.{suffix}"
        if "csv" in suffix:
            write(path, HEADER, *(f"{number},a{number % 7},1,2" for number in range(rows)))
        else:
            write(path, *(json.dumps({**GOOD, "time_s": number}) for number in range(rows)))
        tracemalloc.start()
        assert sum(1 for _ in FileTrace(path)) == rows
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(100)
    assert peak(20_000) < peak(2000) + 50_000


def test_a_spec_or_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_trace("zipf:requests=5").requests == 5
    assert open_trace("zipf", seed=3).requests == 100_000
    monkeypatch.chdir(tmp_path)
    Path("zipf:x=1.csv").write_text("time_s,adapter,input_tokens,output_tokens")
    assert isinstance(open_trace("./zipf:x=1.csv"), FileTrace)
    with pytest.raises(ConfigError, match="unknown traffic 'zapf'"):
        open_trace("zapf:adapters=1")
    with pytest.raises(ConfigError, match=r"zipf\.txt: a trace is"):
        open_trace("zipf.txt")
