"""Prepared corpora on disk: found by name, and checked before a model reads them."""

import hashlib
import json
from pathlib import Path

import numpy as np

from minitron_nemo.data.corpus_facts import read_facts
from minitron_nemo.data.corpus_index import MAKE_IT, CorpusIndex, check_index, open_index, with_suffix
from minitron_nemo.data.tokenizer import Tokenizer
from minitron_nemo.data.verified import verify_once
from minitron_nemo.errors import UserError

SCANNED_TOKENS = 1_000_000  # at each end of a corpus that comes without facts


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


def check_corpus(prefix: Path, *, tokenizer: Tokenizer, vocab_size: int, cache: Path | None) -> None:
    """Raises UserError for a damaged pair, another tokenizer than the model's, or token ids the model does not have.

    The content is read only with `cache`, the folder that remembers which files were found right; else sizes and facts
    are all that is looked at.
    """
    index = open_index(prefix)
    if cache is not None:
        check_index(index, prefix)
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{tokenizer.folder}: the tokenizer has {tokenizer.vocab_size} ids and the model a vocabulary of "
            f"{vocab_size}; use the tokenizer the model was made with"
        )
    facts_path = with_suffix(prefix, ".json")
    if not facts_path.is_file():
        if cache is not None:
            _scan(prefix, index, vocab_size=vocab_size)
        return
    facts = read_facts(facts_path)
    if facts.tokenizer != tokenizer.fingerprint:
        raise UserError(
            f"{prefix}: prepared with another tokenizer ({facts.tokenizer[:12]}, {facts.vocab_size} ids) than the "
            f"model's ({tokenizer.fingerprint[:12]}, {tokenizer.vocab_size} ids); prepare it again with "
            f"`python recipes/prepare_data.py prepare_data.tokenizer={tokenizer.folder}`"
        )
    if facts.tokens != index.num_tokens:
        raise UserError(f"{prefix}: {facts_path.name} says {facts.tokens} tokens, .idx {index.num_tokens}; {MAKE_IT}")
    if cache is not None:
        expected = {with_suffix(prefix, f".{suffix}"): sha for suffix, sha in facts.sha256.items()}
        verify_once(expected, cache=cache, remedy=MAKE_IT)


def _scan(prefix: Path, index: CorpusIndex, *, vocab_size: int) -> None:
    """Both ends of a corpus that somebody else prepared: no fingerprint says which tokenizer made it."""
    path = with_suffix(prefix, ".bin")
    tokens = np.memmap(path, dtype=index.dtype, mode="r")
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
