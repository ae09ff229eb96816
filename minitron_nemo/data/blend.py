"""What samples are drawn from: prepared corpora and their weights, cut into sequences, for one tokenizer."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_nemo.data.corpus_files import check_corpus, content_fingerprint, find_corpus
from minitron_nemo.data.tokenizer import Tokenizer
from minitron_nemo.errors import UserError


@dataclass(frozen=True)
class Blend:
    """Corpora by name (under `prepared`, or a path prefix of a .bin/.idx pair), their weights, and how they are read.

    `split` gives the shares of the documents for training, validation and test, such as "98,2,0"; `cache` is where
    shuffled indices are kept; `tokenizer` and `vocab_size` are those of the model that reads. With `verify` the content
    of the files is checked, once for each file as `cache` remembers it: on the one process that speaks. `purpose` names
    who draws training samples, such as "distill"; held-out samples are the same for all. With `reset_attention_mask`
    no token sees those of the documents before its own.
    """

    weights: dict[str, float]
    prepared: Path
    cache: Path
    seq_length: int
    split: str
    seed: int
    tokenizer: Tokenizer
    vocab_size: int
    verify: bool = True
    purpose: str = ""
    reset_attention_mask: bool = False

    @property
    def training_seed(self) -> int:
        """The seed of the training samples: each purpose has its own, so that no two see them in the same order.

        With one order for all, a student would see what its teacher was corrected on, sample by sample.
        """
        if not self.purpose:
            return self.seed
        return int.from_bytes(hashlib.sha256(f"{self.purpose} {self.seed}".encode()).digest()[:4], "big")

    @property
    def sources(self) -> tuple[str, ...]:
        """The names of the corpora in the order in which micro-batches count them.

        Sorted, because Megatron breaks ties by position and the order of keys in a file should mean nothing.
        """
        return tuple(sorted(self.weights))

    def check(self) -> dict[str, Path]:
        """The path prefix of every corpus, by name; UserError for one that is missing, damaged or not this model's."""
        if not self.weights:
            raise UserError(
                "data.blend is empty: name at least one corpus and its weight, such as +data.blend.text=1.0"
            )
        prefixes = {name: find_corpus(name, self.prepared) for name in self.sources}
        for prefix in prefixes.values():
            cache = self.cache if self.verify else None
            check_corpus(prefix, tokenizer=self.tokenizer, vocab_size=self.vocab_size, cache=cache)
        return prefixes

    def identity(self) -> dict[str, Any]:
        """What decides which tokens a sample holds, as plain data; checks as `check` does."""
        content = {name: content_fingerprint(prefix) for name, prefix in self.check().items()}
        return dict(
            blend=self.weights,
            corpora=content,
            seq_length=self.seq_length,
            split=self.split,
            seed=self.seed,
            training_seed=self.training_seed,
            # Only where it is on, so that what was made without it stays what it is.
            **({"reset_attention_mask": True} if self.reset_attention_mask else {}),
        )
