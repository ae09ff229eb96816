"""Where text comes from: a file or a folder of files, read as one stream of documents."""

import ast
import dataclasses
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from minitron_nemo.artefacts.origin import fingerprint_of
from minitron_nemo.config.schema import CorpusConfig
from minitron_nemo.data.corpus_facts import Skipped
from minitron_nemo.data.text_files import (
    Kind,
    Span,
    is_known,
    kind_of,
    read_records,
    read_text,
    suffix_of,
    whole,
)
from minitron_nemo.errors import UserError

STDLIB = "stdlib"  # as `input`: the standard library of the running interpreter, text that every machine has
STDLIB_EXCLUDE = (
    "*/site-packages/*", "*/dist-packages/*", "*/__pycache__/*", "*/test/*", "*/tests/*", "*/idle_test/*",
    "*/lib2to3/tests/*", "*/encodings/*", "*/pydoc_data/*",
)  # fmt: skip


@dataclass(frozen=True)
class FoundFiles:
    """The files of a corpus, sorted, and how many were left out of each suffix that is not known to be text."""

    files: list[Path]
    left_out: dict[str, int]

    def describe(self) -> str:
        """`12 .csv, 3 without suffix`"""
        return ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in sorted(self.left_out.items()))


def find_files(corpus: CorpusConfig, *, name: str) -> FoundFiles:
    """The files of a corpus. Raises UserError when there are none, or one that cannot be read here."""
    is_stdlib = corpus.input == STDLIB
    source = Path(sysconfig.get_paths()["stdlib"] if is_stdlib else corpus.input)
    if source.is_file():
        return FoundFiles([source], {})
    if not source.is_dir():
        raise UserError(
            f"prepare_data.corpora.{name}.input={corpus.input}: no such file or folder; give a text file, a .jsonl, "
            f".json or .parquet file, a folder of them, or {STDLIB}"
        )
    exclude = [*corpus.exclude, *(STDLIB_EXCLUDE if is_stdlib else ())]
    try:
        found = sorted(path for path in source.glob(corpus.glob) if path.is_file())
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"prepare_data.corpora.{name}.glob={corpus.glob!r}: {error}; give one such as '**/*'") from None
    asked = [path for path in found if not _is_excluded(path.relative_to(source).as_posix(), exclude)]
    kept = [path for path in asked if _names_suffix(corpus.glob) or is_known(path)]
    left_out = Counter(suffix_of(path) for path in set(asked) - set(kept))
    result = FoundFiles(kept, dict(left_out))
    if not kept:
        raise UserError(
            f"prepare_data.corpora.{name}: {corpus.input} has no files for glob {corpus.glob!r} and "
            f"exclude {corpus.exclude} ({len(found)} before exclude; not known as text: {result.describe() or 'none'})"
        )
    return result


def list_files(corpus: CorpusConfig, *, name: str) -> list[Path]:
    """The files of `find_files`."""
    return find_files(corpus, name=name).files


def _names_suffix(glob: str) -> bool:
    """Whether a glob says what kind of file it wants: that is consent to read it, as plain text if need be."""
    last = glob.rsplit("/", 1)[-1]
    return "." in last and last.rsplit(".", 1)[-1] != "*"


def _is_excluded(relative: str, patterns: list[str]) -> bool:
    # With the slash in front `*/tests/*` also finds a folder at the top.
    return any(fnmatchcase(relative, pattern) or fnmatchcase(f"/{relative}", pattern) for pattern in patterns)


def read_documents(corpus: CorpusConfig, *, name: str) -> Iterator[str]:
    """Every document of a corpus in the order of its files, duplicates included: what a tokenizer trains on."""
    for path in list_files(corpus, name=name):
        yield from read_span(whole(path), corpus, skipped=Skipped())


def read_span(span: Span, corpus: CorpusConfig, *, skipped: Skipped) -> Iterator[str]:
    """The documents of one span; what is left out is counted in `skipped`."""
    is_plain = kind_of(span.path) is Kind.plain
    texts = _file_text(span.path, corpus, skipped) if is_plain else read_records(span, corpus.text_key)
    for text in texts:
        if text.strip():
            yield text
        else:
            skipped.empty += 1


def _file_text(path: Path, corpus: CorpusConfig, skipped: Skipped) -> Iterator[str]:
    try:
        text = read_text(path)
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


def corpora_settings(corpora: dict[str, CorpusConfig]) -> dict[str, Any]:
    """What identifies the text of all corpora: each one's settings and the names, sizes and times of its files."""
    if not corpora:
        raise UserError("prepare_data.corpora is empty: give one, such as '+prepare_data.corpora={text: {input: DIR}}'")
    settings = {}
    for name, corpus in sorted(corpora.items()):
        files = [(str(path), *_size_and_time(path)) for path in list_files(corpus, name=name)]
        settings[name] = {**dataclasses.asdict(corpus), "files": fingerprint_of(files), "num_files": len(files)}
    return settings


def corpora_paths(corpora: dict[str, CorpusConfig]) -> tuple[Path, ...]:
    """Where all corpora are read from."""
    return tuple(Path(corpus.input) for corpus in corpora.values() if corpus.input != STDLIB)


def _size_and_time(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
