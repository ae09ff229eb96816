"""Where text comes from: a text file, a .jsonl file, or a folder of them, read as one stream of documents."""

import ast
import dataclasses
import json
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from minitron_nemo.artefacts.origin import fingerprint_of
from minitron_nemo.config.schema import CorpusConfig
from minitron_nemo.data.corpus_facts import Skipped
from minitron_nemo.errors import UserError

STDLIB = "stdlib"  # as `input`: the standard library of the running interpreter, text that every machine has
STDLIB_EXCLUDE = (
    "*/site-packages/*", "*/dist-packages/*", "*/__pycache__/*", "*/test/*", "*/tests/*", "*/idle_test/*",
    "*/lib2to3/tests/*", "*/encodings/*", "*/pydoc_data/*",
)  # fmt: skip


@dataclass(frozen=True)
class Span:
    """Bytes `start` to `end` of a file. A jsonl line belongs to the span in which it begins."""

    path: Path
    start: int
    end: int


def list_files(corpus: CorpusConfig, *, name: str) -> list[Path]:
    """The files of a corpus, sorted. Raises UserError when there are none."""
    is_stdlib = corpus.input == STDLIB
    source = Path(sysconfig.get_paths()["stdlib"] if is_stdlib else corpus.input)
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise UserError(
            f"prepare_data.corpora.{name}.input={corpus.input}: no such file or folder; give a text file, a .jsonl "
            f"file, a folder of them, or {STDLIB}"
        )
    exclude = [*corpus.exclude, *(STDLIB_EXCLUDE if is_stdlib else ())]
    try:
        found = sorted(path for path in source.glob(corpus.glob) if path.is_file())
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"prepare_data.corpora.{name}.glob={corpus.glob!r}: {error}; give one such as '**/*'") from None
    kept = [path for path in found if not _is_excluded(path.relative_to(source).as_posix(), exclude)]
    if not kept:
        raise UserError(
            f"prepare_data.corpora.{name}: {corpus.input} has no files for glob {corpus.glob!r} and "
            f"exclude {corpus.exclude} ({len(found)} before exclude)"
        )
    return kept


def _is_excluded(relative: str, patterns: list[str]) -> bool:
    # With the slash in front `*/tests/*` also finds a folder at the top.
    return any(fnmatchcase(relative, pattern) or fnmatchcase(f"/{relative}", pattern) for pattern in patterns)


def whole(path: Path) -> Span:
    return Span(path, 0, path.stat().st_size)


def is_jsonl(path: Path) -> bool:
    return path.suffix == ".jsonl"


def read_documents(corpus: CorpusConfig, *, name: str) -> Iterator[str]:
    """Every document of a corpus in the order of its files, duplicates included: what a tokenizer trains on."""
    for path in list_files(corpus, name=name):
        yield from read_span(whole(path), corpus, skipped=Skipped())


def read_span(span: Span, corpus: CorpusConfig, *, skipped: Skipped) -> Iterator[str]:
    """The documents of one span; what is left out is counted in `skipped`."""
    texts = _jsonl_texts(span, corpus.text_key) if is_jsonl(span.path) else _file_text(span.path, corpus, skipped)
    for text in texts:
        if text.strip():
            yield text
        else:
            skipped.empty += 1


def _file_text(path: Path, corpus: CorpusConfig, skipped: Skipped) -> Iterator[str]:
    try:
        # Bytes, not read_text: line ends are part of the text.
        text = path.read_bytes().decode("utf-8")
        docstrings = _docstrings(text) if corpus.docstrings_only else []
    except (UnicodeDecodeError, SyntaxError, ValueError, RecursionError):
        skipped.undecodable_files += 1
        return
    if not corpus.docstrings_only:
        yield text
    elif docstrings:
        yield "\n\n".join(docstrings)
    else:
        skipped.without_docstring += 1


def _docstrings(source: str) -> list[str]:
    """Docstrings of the module, its classes and functions, in the order of the file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old code has invalid escapes, which is not the user's concern here
        tree = ast.parse(source)
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, owners)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    return [text for node in nodes if (text := ast.get_docstring(node))]


def _jsonl_texts(span: Span, text_key: str) -> Iterator[str]:
    with span.path.open("rb") as file:
        if span.start:
            # The line that begins before the span belongs to the one before; from one byte back, a line that
            # begins exactly at `start` is kept.
            file.seek(span.start - 1)
            file.readline()
        while (begin := file.tell()) < span.end and (line := file.readline()):
            if line.strip():
                try:
                    yield _text_of(json.loads(line), text_key)
                except (ValueError, RecursionError) as error:
                    number = _line_number(span.path, begin)
                    raise UserError(f"{span.path}, line {number}: {error}") from None


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


def corpora_settings(corpora: dict[str, CorpusConfig]) -> dict[str, Any]:
    """What identifies the text of all corpora: each one's settings and the names, sizes and times of its files."""
    if not corpora:
        raise UserError("prepare_data.corpora is empty: give one, such as '+prepare_data.corpora={text: {input: DIR}}'")
    settings = {}
    for name, corpus in sorted(corpora.items()):
        files = [(str(path), *_size_and_time(path)) for path in list_files(corpus, name=name)]
        settings[name] = {**dataclasses.asdict(corpus), "files": fingerprint_of(files), "num_files": len(files)}
    return settings


def _size_and_time(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
