"""The calibration set: the fixed samples on which importance is estimated."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from minitron_nemo.config import DataConfig
from minitron_nemo.data.blend import batch, build_datasets
from minitron_nemo.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class CalibrationSet:
    """`tokens` is int64 [num_samples, s]; `fingerprint` is the sha256 of exactly these tokens."""

    tokens: torch.Tensor
    fingerprint: str


def calibration_set(
    data: DataConfig,
    *,
    blend: dict[str, float] | None = None,
    prepared: Path,
    cache: Path,
    num_samples: int,
    seed: int,
    tokenizer: Tokenizer,
    vocab_size: int,
) -> CalibrationSet:
    """`num_samples` samples drawn from the training blend (both papers: 1024), the same on every rank and layout.

    The other arguments are those of `build_datasets`. Raises UserError as it does.
    """
    train, _ = build_datasets(
        data, blend=blend, prepared=prepared, cache=cache, num_train=num_samples, num_valid=0,
        seed=_own_seed(seed), tokenizer=tokenizer, vocab_size=vocab_size,
    )  # fmt: skip
    assert train is not None
    tokens = batch(train, range(num_samples))["tokens"]
    return CalibrationSet(tokens=tokens, fingerprint=tokens_fingerprint(tokens))


def tokens_fingerprint(tokens: torch.Tensor) -> str:
    """sha256 hex of the shape and the ids as little-endian int64."""
    digest = hashlib.sha256(f"{list(tokens.shape)}".encode())
    digest.update(tokens.to("cpu", torch.int64).contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def _own_seed(seed: int) -> int:
    """A seed for calibration alone: with the training seed it would be the first batches of training again."""
    return int.from_bytes(hashlib.sha256(f"calibration {seed}".encode()).digest()[:4], "big")
