"""Prepared corpora on disk: found by name, and checked before a model reads them."""

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minitron_nemo.data.corpus_facts import read_facts
from minitron_nemo.data.tokenizer import Tokenizer
from minitron_nemo.errors import UserError

MAKE_IT = "make it with `python recipes/prepare_data.py`"
SCANNED_TOKENS = 1_000_000  # at each end of a corpus that comes without facts

# Megatron's index file: magic, version, dtype code, sequences, documents; then lengths (int32), byte offsets
# (int64) and the sequence at which each document begins (int64).
HEADER = struct.Struct("<9sQBQQ")
MAGIC = b"MMIDIDX\x00\x00"
DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}


@dataclass(frozen=True)
class IndexHeader:
    dtype: np.dtype
    num_tokens: int


def find_corpus(name: str, prepared: Path) -> Path:
    """The prefix of a corpus's .bin and .idx: `name` under `prepared`, else `name` as a path."""
    for prefix in (prepared / name, Path(name)):
        if all(with_suffix(prefix, suffix).is_file() for suffix in (".bin", ".idx")):
            return prefix
    known = sorted(path.stem for path in prepared.glob("*.idx")) if prepared.is_dir() else []
    raise UserError(
        f"data.blend.{name}: no {name}.bin and {name}.idx in {prepared} (it has {', '.join(known) or 'none'}) nor at "
        f"that path; {MAKE_IT}"
    )


def with_suffix(prefix: Path, suffix: str) -> Path:
    """Appended, not replaced: a corpus may be called `web.v2`."""
    return prefix.parent / f"{prefix.name}{suffix}"


def check_corpus(prefix: Path, *, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises UserError for a damaged pair, another tokenizer than the model's, or token ids the model does not have."""
    header = read_header(prefix)
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{tokenizer.folder}: the tokenizer has {tokenizer.vocab_size} ids and the model a vocabulary of "
            f"{vocab_size}; use the tokenizer the model was made with"
        )
    facts_path = with_suffix(prefix, ".json")
    if not facts_path.is_file():
        _scan(prefix, header, vocab_size=vocab_size)
        return
    facts = read_facts(facts_path)
    if facts.tokenizer != tokenizer.fingerprint:
        raise UserError(
            f"{prefix}: prepared with another tokenizer ({facts.tokenizer[:12]}, {facts.vocab_size} ids) than the "
            f"model's ({tokenizer.fingerprint[:12]}, {tokenizer.vocab_size} ids); prepare it again with "
            f"`python recipes/prepare_data.py prepare_data.tokenizer={tokenizer.folder}`"
        )
    if facts.tokens != header.num_tokens:
        raise UserError(f"{prefix}: {facts_path.name} says {facts.tokens} tokens, .idx {header.num_tokens}; {MAKE_IT}")


def read_header(prefix: Path) -> IndexHeader:
    """Type and number of the tokens. Raises UserError unless the .idx and the .bin are whole and fit each other."""
    idx, tokens = with_suffix(prefix, ".idx"), with_suffix(prefix, ".bin")
    with idx.open("rb") as file:
        raw = file.read(HEADER.size)
    magic, version, code, sequences, documents = HEADER.unpack(raw) if len(raw) == HEADER.size else (b"", 0, 0, 0, 0)
    if magic != MAGIC or version != 1 or code not in DTYPES:
        raise UserError(f"{idx}: not a Megatron index file (bad header); {MAKE_IT}")
    if idx.stat().st_size < (expected := HEADER.size + 12 * sequences + 8 * documents):
        raise UserError(f"{idx}: {idx.stat().st_size} bytes, {expected} expected: truncated; {MAKE_IT}")
    dtype = np.dtype(DTYPES[code])
    num_tokens = int(np.fromfile(idx, dtype="<i4", count=sequences, offset=HEADER.size).sum(dtype=np.int64))
    if num_tokens == 0 or tokens.stat().st_size != num_tokens * dtype.itemsize:
        raise UserError(
            f"{tokens}: {tokens.stat().st_size} bytes, {num_tokens * dtype.itemsize} expected by its .idx; {MAKE_IT}"
        )
    return IndexHeader(dtype, num_tokens)


def _scan(prefix: Path, header: IndexHeader, *, vocab_size: int) -> None:
    """Both ends of a corpus that somebody else prepared: no fingerprint says which tokenizer made it."""
    path = with_suffix(prefix, ".bin")
    tokens = np.memmap(path, dtype=header.dtype, mode="r")
    for start in {0, max(len(tokens) - SCANNED_TOKENS, 0)}:
        part = np.asarray(tokens[start : start + SCANNED_TOKENS])
        wrong = np.flatnonzero((part < 0) | (part >= vocab_size))
        if len(wrong):
            raise UserError(
                f"{path}: token {start + wrong[0]} is {part[wrong[0]]}, the model has ids 0..{vocab_size - 1}; "
                "prepare the text with the model's tokenizer: python recipes/prepare_data.py"
            )


def content_fingerprint(prefix: Path) -> str:
    """sha256 that changes with the corpus: from its facts, else from the index and the size and time of the tokens."""
    if (path := with_suffix(prefix, ".json")).is_file():
        facts = read_facts(path)
        return hashlib.sha256(json.dumps(facts.sha256, sort_keys=True).encode()).hexdigest()
    stat = with_suffix(prefix, ".bin").stat()
    digest = hashlib.sha256(f"{stat.st_size} {stat.st_mtime_ns}".encode())
    with with_suffix(prefix, ".idx").open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
