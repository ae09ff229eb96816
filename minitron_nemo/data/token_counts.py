"""How often each token occurs in what a model will be trained on: its vocabulary is pruned by it."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

from minitron_nemo.artefacts.atomic import write_text_atomically
from minitron_nemo.artefacts.strict_json import parse_json
from minitron_nemo.data.blend import Blend
from minitron_nemo.data.corpus_files import content_fingerprint
from minitron_nemo.data.corpus_index import open_index, with_suffix
from minitron_nemo.errors import UserError
from minitron_nemo.progress import ProgressReporter, progress

BLOCK = 1 << 22  # tokens counted at a time: tens of megabytes, whatever the size of the corpus
WORTH_A_LINE = 10**8  # tokens: fewer take a second or two


def token_frequencies(blend: Blend) -> np.ndarray:
    """Share of each id among the training tokens of a blend, [vocab_size] float64, corpora by their weights.

    Each corpus is read once through a memory map; its counts are kept in `blend.cache`. Raises UserError for a corpus
    that is missing, damaged or holds an id that the model does not have.
    """
    prefixes = blend.check()
    total = sum(blend.weights.values())
    frequencies = np.zeros(blend.vocab_size)
    for name, prefix in prefixes.items():
        counts = _counts(prefix, blend)
        frequencies += blend.weights[name] / total * counts / max(int(counts.sum()), 1)
    return frequencies


def training_tokens(prefix: Path, split: str) -> int:
    """Tokens of the documents that Megatron draws training samples from: the first share of the split."""
    shares = [float(share) for share in split.split(",")]
    index = open_index(prefix)
    documents = round(shares[0] / sum(shares) * len(index.lengths))
    return int(np.sum(index.lengths[:documents], dtype=np.int64))


def _counts(prefix: Path, blend: Blend) -> np.ndarray:
    """Occurrences of each id in the training part of a corpus, [vocab_size] int64."""
    tokens = training_tokens(prefix, blend.split)
    key = hashlib.sha256(f"{content_fingerprint(prefix)} {tokens} {blend.vocab_size}".encode()).hexdigest()
    cached = blend.cache / f"token_counts_{key[:16]}.json"
    if (found := _cached(cached, blend.vocab_size)) is not None and found.sum() == tokens:
        return found
    counts = np.zeros(blend.vocab_size, dtype=np.int64)
    with progress(tokens, f"count {prefix.name}", unit="token", enabled=tokens >= WORTH_A_LINE) as bar:
        for block in _blocks(prefix, tokens, bar):
            low, high = int(block.min()), int(block.max())
            if low < 0 or high >= blend.vocab_size:
                raise UserError(
                    f"{with_suffix(prefix, '.bin')}: holds an id of {low if low < 0 else high}, the model has ids "
                    f"0..{blend.vocab_size - 1}; prepare the text with the model's tokenizer"
                )
            counts += np.bincount(block, minlength=blend.vocab_size)
    with suppress(OSError, UserError):  # keeping is for speed alone
        write_text_atomically(cached, json.dumps(counts.tolist()))
    return counts


def _blocks(prefix: Path, tokens: int, bar: ProgressReporter) -> Iterator[np.ndarray]:
    if not tokens:
        return
    mapped = np.memmap(with_suffix(prefix, ".bin"), dtype=open_index(prefix).dtype, mode="r", shape=(tokens,))
    for start in range(0, tokens, BLOCK):
        block = np.asarray(mapped[start : start + BLOCK])
        yield block
        bar.advance(len(block))


def _cached(path: Path, size: int) -> np.ndarray | None:
    """Counts kept by an earlier run; None where there are none, or none that can be read."""
    try:
        counts = np.array(parse_json(path.read_bytes()), dtype=np.int64)
    except (OSError, ValueError, TypeError, OverflowError, RecursionError):
        return None
    return counts if counts.shape == (size,) and counts.min(initial=0) >= 0 else None
