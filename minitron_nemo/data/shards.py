"""Tokenized pieces of a corpus: the unit of parallel work and of resumption.

Imported by worker processes, so nothing heavy (torch, megatron) is imported here.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from minitron_nemo.config.schema import CorpusConfig
from minitron_nemo.data.corpora import read_span
from minitron_nemo.data.corpus_facts import Skipped
from minitron_nemo.data.text_files import Span, is_divisible, whole
from minitron_nemo.data.tokenizer import Tokenizer, load_tokenizer

SHARD_BYTES = 4 << 20  # a few seconds of one core
MAX_SHARDS = 4096  # shards of a huge corpus are larger: merging maps them all, and the kernel limits mappings
BATCH_CHARACTERS = 1 << 20  # text handed to the tokenizer at a time
FORMAT = 1  # of a shard on disk; a change makes old shards stale
DIGEST_WORDS = 2  # 128 bits of sha256: enough to tell any two documents apart


@dataclass(frozen=True)
class ShardJob:
    """One piece of work: tokenize `spans` into `<folder>/<key>.bin` and `.npz`."""

    spans: tuple[Span, ...]
    corpus: CorpusConfig
    tokenizer_folder: Path
    bos: int | None
    dtype: str
    folder: Path
    key: str

    @property
    def num_bytes(self) -> int:
        return sum(span.end - span.start for span in self.spans)

    @property
    def tokens_path(self) -> Path:
        return self.folder / f"{self.key}.bin"

    @property
    def index_path(self) -> Path:
        """Written last: its presence means that the shard is finished."""
        return self.folder / f"{self.key}.npz"


@dataclass(frozen=True)
class ShardIndex:
    """What a finished shard holds, one entry for each document."""

    lengths: np.ndarray  # in tokens
    text_bytes: np.ndarray
    digests: np.ndarray  # words [documents, DIGEST_WORDS]
    skipped: Skipped


def plan_shards(
    files: list[Path], corpus: CorpusConfig, *, tokenizer: Tokenizer, bos: int | None, dtype: str, folder: Path
) -> list[ShardJob]:
    """The input cut into pieces of like size: small files together, a large .jsonl by byte ranges. A
    compressed file cannot be divided, so a large one is one piece.

    The key of a piece names its files with their sizes and times, the tokenizer and the options, so that a shard
    is taken up again only if it would come out the same.
    """
    jobs = []
    size = max(SHARD_BYTES, sum(path.stat().st_size for path in files) // MAX_SHARDS)
    for spans in _group(files, size):
        stats = [(str(s.path), s.start, s.end, s.path.stat().st_size, s.path.stat().st_mtime_ns) for s in spans]
        parts = [FORMAT, tokenizer.fingerprint, bos, dtype, corpus.text_key, corpus.docstrings_only, stats]
        key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
        jobs.append(ShardJob(tuple(spans), corpus, tokenizer.folder, bos, dtype, folder, key))
    return jobs


def _group(files: list[Path], shard_bytes: int) -> Iterator[list[Span]]:
    pending: list[Span] = []
    size = 0
    for path in files:
        for span in _spans(path, shard_bytes):
            pending.append(span)
            size += span.end - span.start
            if size >= shard_bytes:
                yield pending
                pending, size = [], 0
    if pending:
        yield pending


def _spans(path: Path, shard_bytes: int) -> Iterator[Span]:
    if not is_divisible(path):
        yield whole(path)
        return
    size = path.stat().st_size
    for start in range(0, size, shard_bytes):
        yield Span(path, start, min(start + shard_bytes, size))


def start_worker() -> None:
    """Initializer of a worker process."""
    # The processes are the parallelism; threads of the tokenizer on top would fight over the same cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


@lru_cache(maxsize=1)
def _tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


def write_shard(job: ShardJob) -> str:
    """Tokenize the documents of one shard, `bos` before each where there is one and `eod` after, and return its key."""
    tokenizer = _tokenizer(job.tokenizer_folder)
    first = [] if job.bos is None else [job.bos]
    skipped, lengths, text_bytes, digests = Skipped(), [], [], []
    tokens_temp = job.tokens_path.with_suffix(f".bin.tmp-{os.getpid()}")
    index_temp = job.index_path.with_suffix(f".npz.tmp-{os.getpid()}")
    with tokens_temp.open("wb") as file:
        for texts in _batches(job, skipped):
            for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
                raw = text.encode()
                file.write(np.array([*first, *ids, tokenizer.eod], dtype=job.dtype).tobytes())
                lengths.append(len(first) + len(ids) + 1)
                digests.append(np.frombuffer(hashlib.sha256(raw).digest(), dtype=">u8")[:DIGEST_WORDS])
                text_bytes.append(len(raw))
    with index_temp.open("wb") as file:
        np.savez(
            file,
            lengths=np.array(lengths, dtype=np.int64),
            text_bytes=np.array(text_bytes, dtype=np.int64),
            digests=np.array(digests, dtype=np.uint64).reshape(-1, DIGEST_WORDS),
            skipped=np.array(list(asdict(skipped).values())),
        )
    os.replace(tokens_temp, job.tokens_path)
    os.replace(index_temp, job.index_path)
    return job.key


def _batches(job: ShardJob, skipped: Skipped) -> Iterator[list[str]]:
    texts: list[str] = []
    characters = 0
    for span in job.spans:
        for text in read_span(span, job.corpus, skipped=skipped):
            texts.append(text)
            characters += len(text)
            if characters >= BATCH_CHARACTERS:
                yield texts
                texts, characters = [], 0
    if texts:
        yield texts


def read_index(job: ShardJob) -> ShardIndex:
    with np.load(job.index_path, allow_pickle=False) as file:
        skipped = Skipped(*file["skipped"].tolist())
        return ShardIndex(file["lengths"], file["text_bytes"], file["digests"], skipped)


def is_finished(job: ShardJob) -> bool:
    """Whether the shard is on disk, whole: a machine that lost power may have kept names without contents."""
    try:
        expected = int(read_index(job).lengths.sum()) * np.dtype(job.dtype).itemsize
        return job.tokens_path.stat().st_size == expected
    except (OSError, ValueError, TypeError, KeyError, EOFError, BadZipFile):
        return False
