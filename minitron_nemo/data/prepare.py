"""Text to a Megatron `.bin/.idx` pair: tokenized in parallel, resumable, the same bytes however it was made."""

import hashlib
import json
import logging
import mmap
import multiprocessing
import os
import resource
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path

import numpy as np

from minitron_nemo.config.schema import CorpusConfig
from minitron_nemo.data.corpora import find_files
from minitron_nemo.data.corpus_facts import CorpusFacts, Skipped
from minitron_nemo.data.corpus_index import dtype_for, write_index
from minitron_nemo.data.shards import (
    ShardIndex,
    ShardJob,
    is_finished,
    plan_shards,
    read_index,
    start_worker,
    write_shard,
)
from minitron_nemo.data.tokenizer import Tokenizer
from minitron_nemo.errors import UserError
from minitron_nemo.progress import progress

logger = logging.getLogger(__name__)

SUFFIXES = (".bin", ".idx", ".json")
SPARE_FILES = 64  # what a process has open besides
MERGE_BYTES = 16 << 20  # written and hashed at a time


def prepare_corpus(
    name: str,
    corpus: CorpusConfig,
    *,
    tokenizer: Tokenizer,
    output: Path,
    add_bos: bool | None = None,
    workers: int = 1,
    work: Path | None = None,
    show_progress: bool = True,
) -> CorpusFacts:
    """Facts of the corpus written to `<output>/<name>.bin`, `.idx` and `.json`.

    Documents begin with `tokenizer.bos(add_bos)` where that is a token, and end with `tokenizer.eod`. The pair is a
    function of the set of documents, the tokenizer and `add_bos` alone: not of files, workers or restarts.
    Finished shards wait in `<work>/<name>.shards/` (`work` is `output` when not given) until all are there; a second
    call after a crash takes them up. Raises UserError for missing or bad input.
    """
    if not name or Path(name).name != name or name.startswith("."):
        raise UserError(f"prepare_data.corpora.{name}: a corpus name is a plain file name, without folders")
    found = find_files(corpus, name=name)
    if found.left_out:
        logger.info(f"{name}: not read: {found.describe()}; a glob that names a suffix, such as '**/*.csv', reads it")
    folder = (work or output) / f"{name}.shards"
    for place in (output, folder):
        place.mkdir(parents=True, exist_ok=True)
    dtype = dtype_for(tokenizer.vocab_size).name
    bos = tokenizer.bos(add_bos)
    jobs = plan_shards(found.files, corpus, tokenizer=tokenizer, bos=bos, dtype=dtype, folder=folder)
    _write_shards(jobs, workers=workers, label=f"prepare {name}", show_progress=show_progress)
    facts = _merge(jobs, output / name, tokenizer=tokenizer, bos=bos, dtype=dtype, corpus=corpus)
    shutil.rmtree(folder)
    if work and not any(work.iterdir()):
        work.rmdir()
    logger.info(f"{name}: {facts.documents} documents, {facts.tokens / 1e6:.2f} M tokens; {facts.skipped.describe()}")
    return facts


def _write_shards(jobs: list[ShardJob], *, workers: int, label: str, show_progress: bool) -> None:
    total = sum(job.num_bytes for job in jobs)
    todo = [job for job in jobs if not is_finished(job)]
    done = total - sum(job.num_bytes for job in todo)
    with progress(total, label, unit="byte", done=done, enabled=show_progress) as bar:
        for job in _finished(todo, min(workers, len(todo))):
            bar.advance(job.num_bytes)


def _finished(jobs: list[ShardJob], workers: int) -> Iterator[ShardJob]:
    """The jobs as they get done, in any order."""
    if workers <= 1:
        for job in jobs:
            write_shard(job)
            yield job
        return
    # Not fork: threads of the tokenizer or of torch in this process would be copied in mid-step.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker) as pool:
        futures = {pool.submit(write_shard, job): job for job in jobs}
        try:
            for future in as_completed(futures):
                future.result()
                yield futures[future]
        except BrokenProcessPool:
            raise UserError(
                f"prepare_data.workers={workers}: a worker process was killed, most likely for want of memory; give "
                "fewer workers, the finished part is kept"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _merge(
    jobs: list[ShardJob], prefix: Path, *, tokenizer: Tokenizer, bos: int | None, dtype: str, corpus: CorpusConfig
) -> CorpusFacts:
    """All shards as one pair, documents in the order of their digest, duplicates once; put in place at the end."""
    indices = [read_index(job) for job in jobs]
    skipped = Skipped()
    for index in indices:
        skipped.add(index.skipped)
    order = _order(np.concatenate([index.digests for index in indices]))
    lengths = np.concatenate([index.lengths for index in indices])
    if len(order) == 0:
        raise UserError(
            f"prepare_data.corpora.{prefix.name}: no documents in {corpus.input} (skipped {asdict(skipped)}); "
            "check input, glob, text_key and docstrings_only"
        )
    skipped.duplicates = len(lengths) - len(order)
    temps = {suffix: prefix.parent / f"{prefix.name}{suffix}.tmp" for suffix in SUFFIXES}
    sha256 = _write_pair(jobs, indices, order=order, dtype=dtype, temps=temps)
    facts = CorpusFacts(
        documents=len(order),
        tokens=int(lengths[order].sum()),
        text_bytes=int(np.concatenate([index.text_bytes for index in indices])[order].sum()),
        skipped=skipped,
        tokenizer=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod,
        dtype=dtype,
        sha256=sha256,
        bos=bos,
    )
    temps[".json"].write_text(json.dumps(asdict(facts), indent=2) + "\n", encoding="utf-8")
    _publish(temps, prefix)
    return facts


def _write_pair(
    jobs: list[ShardJob], indices: list[ShardIndex], *, order: np.ndarray, dtype: str, temps: dict[str, Path]
) -> dict[str, str]:
    """The documents of the shards in this order as a .bin and its .idx; returns the SHA-256 of both by suffix."""
    itemsize = np.dtype(dtype).itemsize
    shard = np.repeat(np.arange(len(jobs)), [len(index.lengths) for index in indices])[order]
    lengths = np.concatenate([index.lengths for index in indices])[order]
    ends = np.concatenate([np.cumsum(index.lengths) for index in indices])[order] * itemsize
    begins = ends - lengths * itemsize
    _allow_open_files(len(jobs) + SPARE_FILES)
    tokens = [_mapped(job.tokens_path) for job in jobs]
    digest = hashlib.sha256()
    with temps[".bin"].open("wb") as file:
        for part in _blocks(lengths * itemsize):
            places = zip(shard[part].tolist(), begins[part].tolist(), ends[part].tolist(), strict=True)
            block = b"".join([tokens[number][begin:end] for number, begin, end in places])
            file.write(block)
            digest.update(block)
    return {"bin": digest.hexdigest(), "idx": write_index(temps[".idx"], lengths, dtype=np.dtype(dtype))}


def _mapped(path: Path) -> mmap.mmap | bytes:
    """The bytes of a file. A slice of a mapping is a copy at half the price of a numpy or memoryview slice."""
    with path.open("rb") as file:
        # An empty file cannot be mapped, and no document points into it.
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""


def _allow_open_files(needed: int) -> None:
    """Every mapping holds a file open, and the usual limit of 1024 is less than the shards of a large corpus."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UserError(
            f"prepare_data: joining the shards needs {needed} open files and {hard} are allowed here; raise it "
            f"(`ulimit -Hn {needed}`) and run the same command again, the shards are kept"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _blocks(sizes: np.ndarray) -> Iterator[slice]:
    """Runs of documents of about `MERGE_BYTES` together, and at least one."""
    ends = np.cumsum(sizes)
    first = 0
    while first < len(sizes):
        before = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + MERGE_BYTES, side="right")))
        yield slice(first, last)
        first = last


def _order(digests: np.ndarray) -> np.ndarray:
    """Indices of the distinct documents, sorted by digest.

    Training takes the first documents and validation the last. Sorted by hash they are two fair draws from the
    corpus; in the order of the files validation would be whatever came last (one author, one year, one language).
    Sorted by text rather than by path, the order also survives files being moved, split or joined.
    """
    order = np.lexsort(tuple(digests.T[::-1]))
    ordered = digests[order]
    first = np.ones(len(order), dtype=bool)
    first[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    return order[first]


def _publish(temps: dict[str, Path], prefix: Path) -> None:
    """Put the files in place. Facts go first and come last: a pair without them is not taken for finished."""
    targets = {suffix: prefix.parent / f"{prefix.name}{suffix}" for suffix in temps}
    targets[".json"].unlink(missing_ok=True)
    for suffix, temp in temps.items():
        with temp.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temp, targets[suffix])
