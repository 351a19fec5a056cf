"""Traces: what was asked, when.  Read as a stream, and refused where they are malformed."""

from __future__ import annotations

import csv
import gzip
import json
import math
import zlib
from collections.abc import Callable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TextIO

from lora_cache.errors import ConfigError

REQUIRED = ("time_s", "adapter", "input_tokens", "output_tokens")
OPTIONAL = ("nbytes", "rank")


class Request(NamedTuple):
    """One request of a trace.

    Attributes:
        time_s: seconds since whatever the trace begins with; never goes back.
        adapter: its name; two names are two adapters.
        input_tokens, output_tokens: of the prompt, and generated.
        nbytes: of the adapter's weights, or None where the trace does not say.
        rank: of the adapter, likewise.
    """

    time_s: float
    adapter: str
    input_tokens: int
    output_tokens: int
    nbytes: int | None = None
    rank: int | None = None


class Trace(Protocol):
    """Requests in order of time, from a file or made up.  Each iteration starts anew."""

    @property
    def name(self) -> str:
        """What the user wrote to name it."""
        ...

    @property
    def requests(self) -> int | None:
        """How many there are, where that is known beforehand."""
        ...

    def __iter__(self) -> Iterator[Request]: ...


class FileTrace:
    """A trace in a file: ``.csv`` or ``.jsonl``, either of them also ``.gz``.

    CSV has a header.  Both need the fields of `REQUIRED` and may have those of `OPTIONAL`; others
    are ignored, and so are empty lines.  Memory does not grow with the file.

    Iterating raises `ConfigError`, with file and line, at the first row that is malformed, lacks
    a field or goes back in time, and where the file ends too early or cannot be read.

    Raises:
        ConfigError: the name ends in none of these, or there is no such file.
    """

    requests = None  # known only once it has been read

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)
        self.name = str(path)
        suffixes = self.path.name.lower().removesuffix(".gz").rpartition(".")
        self._rows = {"csv": _csv_rows, "jsonl": _json_rows}.get(suffixes[2])
        if self._rows is None:
            raise ConfigError(f"{path}: a trace is a .csv or .jsonl file, or one of them as .gz")
        if not self.path.exists():
            raise ConfigError(f"{path}: no such file")

    def __iter__(self) -> Iterator[Request]:
        assert self._rows is not None
        line, before = 0, -math.inf
        try:
            with self._open() as file:
                for line, request in self._rows(file):
                    if request[0] < before:
                        raise _Malformed(line, f"time goes back from {before} to {request[0]}")
                    before = request[0]
                    yield request
        except _Malformed as error:
            raise ConfigError(f"{self.name}, line {error.line}: {error}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"{self.name}, after line {line}: not UTF-8 text") from error
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ConfigError(f"{self.name}, after line {line}: damaged gzip: {error}") from error
        except OSError as error:
            raise ConfigError(f"{self.name}: {error.strerror or error}") from error

    def _open(self) -> TextIO:
        # utf-8-sig: spreadsheets write a byte order mark.
        if self.path.name.lower().endswith(".gz"):
            return gzip.open(self.path, "rt", encoding="utf-8-sig", newline="")
        return open(self.path, encoding="utf-8-sig", newline="")


class _Malformed(Exception):  # noqa: N818 - never leaves this module
    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


_Rows = Iterator[tuple[int, Request]]


def _csv_rows(file: TextIO) -> _Rows:
    reader = csv.reader(file, strict=True)
    try:
        header = next(reader, None)
        if header is None:
            raise _Malformed(1, f"empty: a header is expected: {','.join(REQUIRED)}")
        header = [name.strip() for name in header]
        for name in header:
            if header.count(name) > 1:
                raise _Malformed(1, f"column {name!r} comes twice")
        for name in REQUIRED:
            if name not in header:
                raise _Malformed(1, f"no column {name!r}: the header is {','.join(header)!r}")
        read = _csv_reader(header)
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                raise _Malformed(
                    reader.line_num, f"{len(row)} fields, and the header has {len(header)}"
                )
            try:
                yield reader.line_num, read(row)
            except ValueError as error:
                raise _Malformed(reader.line_num, str(error)) from error
    except csv.Error as error:
        raise _Malformed(reader.line_num, str(error)) from error


def _csv_reader(header: list[str]) -> Callable[[list[str]], Request]:
    """What makes a request of a row with this header."""
    time_at, adapter_at, input_at, output_at = (header.index(name) for name in REQUIRED)
    optional = [(name, header.index(name)) for name in OPTIONAL if name in header]

    def read(row: list[str]) -> Request:
        try:
            time_s, inputs, outputs = float(row[time_at]), int(row[input_at]), int(row[output_at])
        except ValueError:
            time_s = inputs = outputs = -1  # which of them it was is found out below
        adapter = row[adapter_at]
        if not (0 <= time_s < math.inf and inputs >= 0 and outputs >= 0 and adapter.strip()):
            return _checked(dict(zip(header, row, strict=True)), _number)
        if optional:
            sizes = {name: _count(name, row[at], _number, 1) for name, at in optional if row[at]}
            return Request(time_s, adapter, inputs, outputs, **sizes)
        return Request(time_s, adapter, inputs, outputs)

    return read


def _json_rows(file: TextIO) -> _Rows:
    for line, text in enumerate(file, 1):
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _Malformed(line, f"not JSON: {error}") from error
        if not isinstance(record, dict):
            raise _Malformed(line, "not an object")
        for name in REQUIRED:
            if name not in record:
                raise _Malformed(line, f"no field {name!r}")
        try:
            yield line, _checked(record, _as_it_is)
        except ValueError as error:
            raise _Malformed(line, str(error)) from error


_Convert = Callable[[Any], float]


def _number(text: str) -> float:
    try:
        return int(text)
    except ValueError:
        return float(text)


def _as_it_is(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(value)  # noqa: TRY004 - of a value in a file, as for CSV
    return value


def _checked(record: dict[str, Any], convert: _Convert) -> Request:
    """Make a request of a record that has the required fields; ValueError says what is wrong."""
    try:
        time_s = float(convert(record["time_s"]))
    except (ValueError, OverflowError):
        time_s = math.nan
    if not 0 <= time_s < math.inf:
        raise ValueError(f"time_s is {record['time_s']!r}, not a finite number of seconds")
    adapter = record["adapter"]
    if isinstance(adapter, int) and not isinstance(adapter, bool):
        adapter = str(adapter)
    if not isinstance(adapter, str) or not adapter.strip():
        raise ValueError(f"adapter is {adapter!r}, not a name")
    tokens = (_count(name, record[name], convert, 0) for name in REQUIRED[2:])
    given = [name for name in OPTIONAL if record.get(name) not in (None, "")]
    sizes = {name: _count(name, record[name], convert, 1) for name in given}
    return Request(time_s, adapter, *tokens, **sizes)


def _count(name: str, value: Any, convert: _Convert, least: int) -> int:
    try:
        number = convert(value)
    except ValueError:
        number = math.nan
    if not isinstance(number, int) or number < least:
        raise ValueError(f"{name} is {value!r}, not a whole number of at least {least}")
    return number
