"""An opened checkpoint, whatever its format: what a conversion, an audit and every writer go by."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from minitron_nemo.artefacts.contents import Contents
from minitron_nemo.checkpoint.source import TensorSource
from minitron_nemo.shape.arch import ModelArch


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checkpoint whose config, names, shapes and dtype have been checked; its weights are read on demand.

    `format` is its name in `formats.known`; `tokenizer` has its tokenizer files, None where it carries none; `notes`
    are what is worth knowing besides, a line each: who wrote it, in which layout. `files` are further small files that
    a `.nemo` keeps of it, by their names there; `page` are those that go beside its weights on the hub; `tokens` counts
    those that the last step trained it on; `token_ids` are `bos_token_id` and `eos_token_id` of a model that came with
    no Hugging Face config.
    """

    path: Path
    format: str
    arch: ModelArch
    dtype: torch.dtype
    weights: TensorSource
    tokenizer: Contents | None = None
    notes: tuple[str, ...] = ()
    files: Mapping[str, bytes] = field(default_factory=dict)
    page: Mapping[str, bytes] = field(default_factory=dict)
    tokens: int = 0
    token_ids: Mapping[str, int] = field(default_factory=dict)
