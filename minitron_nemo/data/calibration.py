"""The calibration set: the fixed samples on which importance is estimated."""

import dataclasses
import hashlib
from dataclasses import dataclass

import torch

from minitron_nemo.data.blend import Blend
from minitron_nemo.data.datasets import batch, build_datasets


@dataclass(frozen=True)
class CalibrationSet:
    """`tokens` is int64 [num_samples, s]; `fingerprint` is the sha256 of exactly these tokens.

    `labels` and `loss_mask`, [num_samples, s] each, are for who takes a loss; activations need none. `documents`, of
    the same shape, numbers each token's document in its sample; None where they are not kept apart.
    """

    tokens: torch.Tensor
    fingerprint: str
    labels: torch.Tensor | None = None
    loss_mask: torch.Tensor | None = None
    documents: torch.Tensor | None = None

    def batch(self, first: int, count: int, *, device: torch.device) -> dict[str, torch.Tensor]:
        """A micro-batch of samples `first`.., each [count, s], on a device."""
        values = {
            "tokens": self.tokens,
            "labels": self.labels,
            "loss_mask": self.loss_mask,
            "documents": self.documents,
        }
        return {name: x[first : first + count].to(device) for name, x in values.items() if x is not None}


def calibration_set(blend: Blend, *, num_samples: int) -> CalibrationSet:
    """`num_samples` samples drawn from the training part of the blend (both papers: 1024), the same in every layout.

    Raises UserError as `build_datasets` does.
    """
    # With the training seed it would be the first batches of training again.
    own = dataclasses.replace(blend, purpose="calibration")
    train, _ = build_datasets(own, num_train=num_samples, num_valid=0)
    assert train is not None
    values = batch(train, range(num_samples), documents=blend.reset_attention_mask)
    del values["sources"]  # scores know no sources
    return CalibrationSet(fingerprint=tokens_fingerprint(values["tokens"]), **values)


def tokens_fingerprint(tokens: torch.Tensor) -> str:
    """sha256 hex of the shape and the ids as little-endian int64."""
    digest = hashlib.sha256(f"{list(tokens.shape)}".encode())
    digest.update(tokens.to("cpu", torch.int64).contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()
