"""Samples for training: prepared corpora cut into sequences, shuffled and blended by Megatron-Core's own datasets.

Which tokens sample `i` holds depends on the seed, the blend, the split, `seq_length` and the number of samples asked
for: never on the number of ranks, so a run may continue on another layout. Megatron shuffles documents over all the
epochs it needs. While a corpus is read less than once a longer run begins with the samples of the shorter one; beyond
that, asking for more samples changes the order.
"""

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

import megatron.core
import numpy as np
import torch
import torch.distributed as dist
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split
from torch.utils.data import Dataset

from minitron_nemo.artefacts.manifest import file_sha256
from minitron_nemo.artefacts.publishing import fsync
from minitron_nemo.artefacts.strict_json import parse_json
from minitron_nemo.data.blend import Blend
from minitron_nemo.data.corpus_files import content_fingerprint
from minitron_nemo.data.verified import verify_once
from minitron_nemo.errors import UserError

SPLITS = {Split.train: "training", Split.valid: "validation"}
HASHES_FILE = "hashes.json"  # beside the cached indices


@dataclass(frozen=True)
class _MegatronTokenizer:
    """What Megatron's datasets read off a tokenizer."""

    vocab_size: int
    eod: int
    pad: int = -(2**63)  # no token is padding: samples are always full, and Megatron reads a padding id as 0 in silence
    unique_identifiers: OrderedDict[str, Any] = field(default_factory=OrderedDict)


def build_datasets(blend: Blend, *, num_train: int, num_valid: int) -> tuple[Dataset | None, Dataset | None]:
    """(train, valid): datasets of at least `num_train` and `num_valid` samples, None where 0 were asked for.

    A sample has `tokens` and `labels` (int64 [s], labels one token ahead) and `loss_mask` (float32 [s]). Every rank
    calls this with the same arguments; rank 0 writes the shuffled indices into `blend.cache`, which all ranks must
    see. Raises UserError for a corpus that is missing, damaged, too short or made with another tokenizer.
    """
    if dist.is_initialized() and dist.get_rank() != 0:
        blend = dataclasses.replace(blend, verify=False)
    prefixes = blend.check()
    weights = np.array([blend.weights[name] for name in prefixes], dtype=np.float64)
    weights /= weights.sum()

    def build(split: Split, num_samples: int, seed: int) -> Dataset | None:
        config = _megatron_config(blend, seed=seed)
        return _blend(prefixes, weights, config=config, split=split, num_samples=num_samples, cache=blend.cache)

    return build(Split.train, num_train, blend.training_seed), build(Split.valid, num_valid, blend.seed)


def batch(dataset: Any, indices: Sequence[int], *, documents: bool = False) -> dict[str, torch.Tensor]:
    """`tokens`, `labels` (int64) and `loss_mask` (float32) of these samples, each [b, s] on the CPU.

    And `sources` (int64): the number, in `Blend.sources`, of the corpus that each token's sample is from. And, when
    asked for, `documents` (int64): the number of each token's document in its sample.
    """
    samples = [dataset[index] for index in indices]
    values = {name: torch.stack([sample[name] for sample in samples]) for name in ("tokens", "labels", "loss_mask")}
    _check_ids(values, samples, dataset=dataset, indices=indices)
    # Of one corpus alone Megatron's samples do not say which it is.
    numbers_B1 = torch.tensor([[int(sample.get("dataset_id", 0))] for sample in samples])
    values["sources"] = numbers_B1.expand_as(values["tokens"])
    if documents:
        is_end_BS = (values["tokens"] == dataset.config.tokenizer.eod).long()
        values["documents"] = is_end_BS.cumsum(dim=1) - is_end_BS  # an end token belongs to what it ends
    return values


def _check_ids(
    values: dict[str, torch.Tensor], samples: list[dict[str, Any]], *, dataset: Any, indices: Sequence[int]
) -> None:
    """Refuse an id that the model does not have: under tensor parallelism it would be nobody's row, and train."""
    vocab_size = dataset.config.tokenizer.vocab_size
    ids = torch.cat([values["tokens"], values["labels"][:, -1:]], dim=1)
    low, high = (int(end) for end in torch.aminmax(ids))
    if low >= 0 and high < vocab_size:
        return
    wrong = (ids < 0) | (ids >= vocab_size)
    row = int(wrong.any(dim=1).nonzero()[0])
    corpus = dataset.datasets[samples[row]["dataset_id"]] if "dataset_id" in samples[row] else dataset
    raise UserError(
        f"{corpus.dataset_path}.bin: sample {indices[row]} holds the id {int(ids[row][wrong[row]][0])}, the model has "
        f"ids 0..{vocab_size - 1}; prepare the text with the model's tokenizer: python recipes/prepare_data.py"
    )


def batches_on(
    device: torch.device, dataset: Dataset, *, documents: bool
) -> Callable[[int, int], dict[str, torch.Tensor]]:
    """Reads micro-batches of a dataset onto a device, by (number of the first sample, count), as `batch` does."""

    def get(first: int, count: int) -> dict[str, torch.Tensor]:
        values = batch(dataset, range(first, first + count), documents=documents)
        return {name: x.to(device) for name, x in values.items()}

    return get


def _megatron_config(blend: Blend, *, seed: int) -> GPTDatasetConfig:
    return GPTDatasetConfig(
        random_seed=seed,
        sequence_length=blend.seq_length,
        blend=([], None),  # we hand corpora over ourselves; without it Megatron would make up mock data
        split=blend.split,
        tokenizer=_MegatronTokenizer(vocab_size=blend.vocab_size, eod=blend.tokenizer.eod),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )


def _blend(
    prefixes: dict[str, Path],
    weights: np.ndarray,
    *,
    config: GPTDatasetConfig,
    split: Split,
    num_samples: int,
    cache: Path,
) -> Dataset | None:
    """The samples of one split. Sizes are those of Megatron's BlendedMegatronDatasetBuilder, so the samples are too."""
    if num_samples == 0:
        return None
    only = len(prefixes) == 1
    sizes = [num_samples if only else _with_surplus(num_samples, weight, config) for weight in weights]
    corpora = [
        _corpus(name, prefix, config=config, split=split, num_samples=size, cache=cache)
        for (name, prefix), size in zip(prefixes.items(), sizes, strict=True)
    ]
    if only:
        return corpora[0]
    # The blend itself is cheap and computed by every rank: Megatron's cache of it needs a process group.
    with _path_to_cache(config, None), _quiet("megatron.core.datasets.blended_dataset"):
        return BlendedDataset(corpora, weights.tolist(), num_samples, config)


def _with_surplus(num_samples: int, weight: float, config: GPTDatasetConfig) -> int:
    return ceil(ceil(num_samples * weight) * (1 + config.mid_level_dataset_surplus))


def _corpus(
    name: str, prefix: Path, *, config: GPTDatasetConfig, split: Split, num_samples: int, cache: Path
) -> GPTDataset:
    """One corpus's samples; their indices are built once, by rank 0, in a folder that appears when complete."""
    indexed = IndexedDataset(str(prefix))
    documents = _documents(name, indexed, config=config, split=split)
    # Megatron names its cache by path and settings; the content belongs into the name too, or a corpus prepared
    # again would be read through the indices of the old one.
    key = _cache_key(
        content_fingerprint(prefix), str(prefix), config.random_seed, config.sequence_length, config.split,
        split.name, num_samples, megatron.core.__version__,
    )  # fmt: skip
    folder = cache / key
    arguments = (indexed, str(prefix), documents, num_samples, split, config)
    if not (dist.is_initialized() and dist.get_rank() != 0) and not _is_usable(folder, cache):
        temp = cache / f"{key}.tmp-{uuid.uuid4().hex[:8]}"
        with _path_to_cache(config, temp), _quiet("megatron.core.datasets"):
            GPTDataset(*arguments)
        _move_into_place(temp, folder)
    if dist.is_initialized():
        dist.barrier()
    with _path_to_cache(config, folder), _quiet("megatron.core.datasets"):
        return GPTDataset(*arguments)


def _documents(name: str, indexed: IndexedDataset, *, config: GPTDatasetConfig, split: Split) -> np.ndarray:
    """Numbers of the documents that belong to a split: a run of them, as Megatron divides a corpus."""
    begin, end = config.split_matrix[split.value] or (0.0, 0.0)
    count = len(indexed)
    documents = np.arange(round(begin * count), round(end * count), dtype=np.int32)
    tokens = int(indexed.sequence_lengths[documents].sum(dtype=np.int64))
    needed = config.sequence_length + 1  # labels are one token ahead
    if tokens < needed:
        raise UserError(
            f"data.blend.{name}: data.split='{config.split}' leaves {len(documents)} of {count} documents "
            f"({tokens} tokens) for {SPLITS[split]}, fewer than one sample of data.seq_length={config.sequence_length} "
            f"+ 1; prepare more text, shorten seq_length or give {SPLITS[split]} a larger share"
        )
    return documents


def _cache_key(*parts: str | int | None) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _is_usable(folder: Path, cache: Path) -> bool:
    """Whether the cached indices are there as they were written; anything else is built again.

    Megatron opens them allowing pickles, so only real arrays may pass.
    """
    try:
        hashes = parse_json((folder / HASHES_FILE).read_bytes())
        files = {path.name: path for path in folder.glob("*.npy")}
        if not files or hashes.keys() != files.keys():
            return False
        verify_once({path: hashes[name] for name, path in files.items()}, cache=cache, remedy="")
        for path in files.values():
            np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, AttributeError, RecursionError, UserError):
        return False
    return True


def _move_into_place(temp: Path, folder: Path) -> None:
    """Put new indices in place, on the disk with their hashes before they have their name."""
    hashes = {path.name: file_sha256(path) for path in sorted(temp.glob("*.npy"))}
    (temp / HASHES_FILE).write_text(json.dumps(hashes, indent=2) + "\n", encoding="utf-8")
    for path in (*temp.iterdir(), temp):
        fsync(path)
    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder)
    else:
        folder.unlink(missing_ok=True)
    os.replace(temp, folder)
    fsync(folder.parent)


@contextmanager
def _path_to_cache(config: GPTDatasetConfig, folder: Path | None) -> Iterator[None]:
    before, config.path_to_cache = config.path_to_cache, None if folder is None else str(folder)
    try:
        yield
    finally:
        config.path_to_cache = before


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Megatron reports every index it opens, and warns that the blend is not cached, which is meant."""
    log = logging.getLogger(name)
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)
