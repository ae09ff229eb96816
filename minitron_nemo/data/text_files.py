"""What is in one file of a corpus: plain text, JSON lines, a JSON array or a parquet table, perhaps compressed.

Imported by worker processes, so nothing heavy is imported here.
"""

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, BinaryIO

from minitron_nemo.errors import UserError

COMPRESSED = (".gz", ".zst")
LINES = (".jsonl", ".ndjson")
# What is read as plain text where no glob names a suffix: in a folder there may be anything.
PLAIN = (
    ".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".html", ".htm", ".xml", ".py", ".pyi", ".c", ".h", ".cc",
    ".cpp", ".cxx", ".hpp", ".cu", ".java", ".js", ".ts", ".go", ".rs", ".rb", ".php", ".sh", ".sql", ".r", ".jl",
    ".scala", ".kt", ".swift", ".lua", ".pl", ".hs", ".css", ".yaml", ".yml",
)  # fmt: skip
# Bytes of one document or JSON array: more is a slip or a bomb, and an .idx counts tokens up to here.
DOCUMENT_LIMIT = 2**31 - 1024


class Kind(Enum):
    plain = "plain"
    lines = "lines"
    json = "json"  # an array of objects, or lines under another name
    parquet = "parquet"


@dataclass(frozen=True)
class Span:
    """Bytes `start` to `end` of a file. A JSON line belongs to the span in which it begins."""

    path: Path
    start: int
    end: int


def whole(path: Path) -> Span:
    return Span(path, 0, path.stat().st_size)


def suffix_of(path: Path) -> str:
    """The suffix that says what a file holds, that of its compression taken off; in small letters."""
    return (Path(path.stem) if path.suffix.lower() in COMPRESSED else path).suffix.lower()


def kind_of(path: Path) -> Kind:
    suffix = suffix_of(path)
    if suffix in LINES:
        return Kind.lines
    return {".json": Kind.json, ".parquet": Kind.parquet}.get(suffix, Kind.plain)


def is_known(path: Path) -> bool:
    """Whether a file of this name is text for all we know."""
    return kind_of(path) is not Kind.plain or suffix_of(path) in PLAIN


def is_divisible(path: Path) -> bool:
    """Whether pieces of the file can be read on their own: lines that are not compressed."""
    if path.suffix.lower() in COMPRESSED:
        return False
    return kind_of(path) is Kind.lines or (kind_of(path) is Kind.json and not _is_array(path))


def read_text(path: Path) -> str:
    """The one document of a plain file; UnicodeDecodeError when it is not UTF-8."""
    with _open(path) as file:
        raw = _limited(path, lambda: file.read(DOCUMENT_LIMIT + 1))
    return raw.decode("utf-8")  # bytes, not text mode: line ends are part of the text


def read_records(span: Span, text_key: str) -> Iterator[str]:
    """The texts of a span of JSON lines, of a JSON array or a parquet table; UserError names what is wrong where."""
    kind = kind_of(span.path)
    if kind is Kind.parquet:
        yield from _parquet_texts(span.path, text_key)
    elif kind is Kind.json and _is_array(span.path):
        yield from _array_texts(span.path, text_key)
    else:
        yield from _line_texts(span, text_key)


def _open(path: Path) -> BinaryIO:
    """The content of a file, unpacked on the way."""
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix.lower() == ".zst":
        return io.BufferedReader(_ZstdReader(path))
    return path.open("rb")


class _ZstdReader(io.RawIOBase):
    """The content of all frames of a .zst. pyarrow unpacks it and lacks `tell`, which a buffered reader asks for."""

    def __init__(self, path: Path) -> None:
        import pyarrow

        self._content = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._content.readinto(buffer)

    def close(self) -> None:
        self._content.close()
        super().close()


def _limited(path: Path, read: Callable[[], bytes]) -> bytes:
    """What `read` gives, refused when it is damaged or longer than any document."""
    try:
        raw = read()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {error}; fetch it again") from None
    if len(raw) > DOCUMENT_LIMIT:
        raise UserError(f"{path}: one document of more than {DOCUMENT_LIMIT} bytes; divide it, one document a line")
    return raw


def _line_texts(span: Span, text_key: str) -> Iterator[str]:
    is_packed = span.path.suffix.lower() in COMPRESSED
    with _open(span.path) as file:
        if span.start:
            # The line that begins before the span belongs to the one before; from one byte back, a line that
            # begins exactly at `start` is kept.
            file.seek(span.start - 1)
            file.readline()
        first = begin = 0 if is_packed else file.tell()
        number = 0
        # The end of a packed file is not known in bytes of its content.
        while (is_packed or begin < span.end) and (line := _limited(span.path, _line_of(file))):
            number, begin = number + 1, begin + len(line)
            if line.strip():
                try:
                    yield _text_of(json.loads(line), text_key)
                except (ValueError, RecursionError) as error:
                    place = number if not first else number - 1 + _line_number(span.path, first)
                    raise UserError(f"{span.path}, line {place}: {error}") from None


def _line_of(file: BinaryIO) -> Callable[[], bytes]:
    return lambda: file.readline(DOCUMENT_LIMIT + 1)


def _is_array(path: Path) -> bool:
    """Whether a .json holds an array: by its first character."""
    with _open(path) as file:
        while block := _limited(path, lambda: file.read(4096)):
            if block.strip():
                return block.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
    return False


def _array_texts(path: Path, text_key: str) -> Iterator[str]:
    with _open(path) as file:
        raw = _limited(path, lambda: file.read(DOCUMENT_LIMIT + 1))
    try:
        records = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a JSON array: {error}") from None
    for number, record in enumerate(records, start=1):
        try:
            yield _text_of(record, text_key)
        except ValueError as error:
            raise UserError(f"{path}, entry {number}: {error}") from None


def _parquet_texts(path: Path, text_key: str) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        with closing(parquet.ParquetFile(path)) as table:
            names = table.schema_arrow.names
            if text_key not in names:
                raise UserError(f"{path}: no column {text_key!r}, it has {', '.join(map(repr, names))}; set text_key")
            kind = table.schema_arrow.field(text_key).type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise UserError(f"{path}: column {text_key!r} must hold strings, it holds {kind}; set text_key")
            for rows in table.iter_batches(batch_size=1024, columns=[text_key]):
                yield from (text or "" for text in rows.column(0).to_pylist())
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())}; fetch it again") from None


def _text_of(record: Any, text_key: str) -> str:
    """Raises ValueError, as json.loads does, for a record without usable text."""
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, got {type(record).__name__}")
    if text_key not in record:
        raise ValueError(f"no key {text_key!r}, it has {', '.join(map(repr, record))}; set text_key")
    text = record[text_key]
    if not isinstance(text, str):
        raise ValueError(f"{text_key!r} must be a string, got {type(text).__name__}")
    text.encode()  # a lone surrogate is no Unicode text and raises a ValueError
    return text


def _line_number(path: Path, offset: int) -> int:
    """Line at a byte offset, counted from 1; only an error needs it, so it is counted then."""
    number, left = 1, offset
    with path.open("rb") as file:
        while left and (block := file.read(min(left, 1 << 20))):
            number += block.count(b"\n")
            left -= len(block)
    return number
