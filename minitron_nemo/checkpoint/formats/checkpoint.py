"""An opened checkpoint, whatever its format: what a conversion, an audit and every writer go by."""

from dataclasses import dataclass
from pathlib import Path

import torch

from minitron_nemo.artefacts.contents import Contents
from minitron_nemo.checkpoint.source import TensorSource
from minitron_nemo.shape.arch import ModelArch


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checkpoint whose config, names, shapes and dtype have been checked; its weights are read on demand.

    `format` is its name in `formats.known`; `tokenizer` has its tokenizer files, None where it carries none; `notes` are
    what is worth knowing besides, a line each: who wrote it, in which layout.
    """

    path: Path
    format: str
    arch: ModelArch
    dtype: torch.dtype
    weights: TensorSource
    tokenizer: Contents | None = None
    notes: tuple[str, ...] = ()
