"""Models of NeMo 1: `model_config.yaml`, weights and artefacts, in a folder or in one uncompressed `.nemo` tar.

Weights are torch_dist or zarr in `model_weights/`, or files of one rank each. Artefacts, the tokenizer among them, are
called `<32 hex>_<name>` in the archive and `nemo:<32 hex>_<name>` in the config; `target` is never looked up.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from minitron_nemo.artefacts.contents import Contents, TarContents, has, read_small
from minitron_nemo.artefacts.origin import Origin
from minitron_nemo.artefacts.publishing import publishing
from minitron_nemo.artefacts.stretch import Stretch
from minitron_nemo.artefacts.strict_yaml import BYTES_LIMIT
from minitron_nemo.checkpoint.formats.checkpoint import Checkpoint
from minitron_nemo.checkpoint.formats.foreign_yaml import read_yaml_mapping
from minitron_nemo.checkpoint.formats.nemo import CONFIG_FILE, TOKENIZER, TOKENIZER_FILES, WEIGHTS, copy_tokenizer
from minitron_nemo.checkpoint.formats.nemo1_config import arch_of_config, config_of
from minitron_nemo.checkpoint.formats.nemo1_ranks import RANK_FILE, RankFiles, RankWeights
from minitron_nemo.checkpoint.formats.tokenizer_size import tokenizer_size
from minitron_nemo.checkpoint.restricted_metadata import METADATA_FILE
from minitron_nemo.checkpoint.torch_dist import TorchDistReader
from minitron_nemo.checkpoint.torch_dist_weights import StackedTensors, StackedWeights, vocabulary_rows, write_stream
from minitron_nemo.checkpoint.zarr_folder import ZarrTensors
from minitron_nemo.distributed.layout import Layout
from minitron_nemo.errors import UserError
from minitron_nemo.shape.tensors import EMBEDDING

NAME, TAR_NAME = "nemo1", "nemo1_tar"  # among the formats: a folder, one file
PREFIX = "model."
PREFIXES = (PREFIX, "model.module.", "")  # the second with megatron_amp_O2
ARTEFACT = re.compile(r"nemo:([0-9a-f]{32}_[^/\\]+)")


def recognise(contents: Contents) -> bool:
    """Whether this is a model of NeMo 1: ours has a file of the same name, and another name for its length."""
    return has(contents, CONFIG_FILE) and b"encoder_seq_length" in read_small(contents, CONFIG_FILE, limit=BYTES_LIMIT)


def open_checkpoint(contents: Contents) -> Checkpoint:
    """The checkpoint, its shape, keys, dtype and file sizes checked; UserError in one line for anything else."""
    config, source = read_yaml_mapping(contents, CONFIG_FILE), str(contents.path / CONFIG_FILE)
    tokenizer = tokenizer_artefacts(contents, config)
    words = None if tokenizer is None else tokenizer_size(tokenizer)
    note: tuple[str, ...] = (f"NeMo {config['nemo_version']}",) if isinstance(config.get("nemo_version"), str) else ()
    if any(RANK_FILE.fullmatch(name) for name in contents.names()):
        files = RankFiles(contents)
        arch, notes = arch_of_config(config, rows=files.rows, words=words, source=source)
        weights: StackedWeights | RankWeights = RankWeights(files, arch, source=CONFIG_FILE)
        layout = files.layout
    else:
        reader, layout = _reader(contents.inside(WEIGHTS))
        prefix = next((p for p in PREFIXES if p + EMBEDDING in set(reader.keys())), PREFIX)
        rows = vocabulary_rows(reader, prefix=prefix)
        arch, notes = arch_of_config(config, rows=rows, words=words, source=source)
        weights = StackedWeights(reader, arch, source=CONFIG_FILE, prefix=prefix, of_training=True)
    name = TAR_NAME if isinstance(contents, TarContents) else NAME
    return Checkpoint(contents.path, name, arch, weights.dtype(), weights, tokenizer, (*note, layout, *notes))


def _reader(weights: Contents) -> tuple[StackedTensors, str]:
    if has(weights, METADATA_FILE):
        return TorchDistReader(weights), "torch_dist"
    zarr = ZarrTensors(weights)
    if not zarr.keys():
        raise UserError(f"{weights.path}: neither torch_dist nor zarr nor files of ranks; the model has no weights")
    return zarr, "zarr"


class _Artefacts:
    """The tokenizer files of an archive under their plain names."""

    def __init__(self, contents: Contents, stored: Mapping[str, str]) -> None:
        self.path, self._contents, self._stored = contents.path, contents, stored

    def names(self) -> list[str]:
        return sorted(self._stored)

    def find(self, name: str) -> Stretch | None:
        return self._contents.find(self._stored[name]) if name in self._stored else None

    def inside(self, folder: str) -> "_Artefacts":
        return _Artefacts(self._contents, {})


def tokenizer_artefacts(contents: Contents, config: Mapping[str, Any]) -> Contents | None:
    """The tokenizer files of an archive: `tokenizer/`, as we write it, or artefacts that the config names, by their
    plain names.
    """
    if (inside := contents.inside(TOKENIZER)).names():
        return inside
    section = config.get("tokenizer")
    stored: dict[str, str] = {}
    for field, value in section.items() if isinstance(section, dict) else ():
        match = ARTEFACT.fullmatch(value) if isinstance(value, str) else None
        if match is None:
            continue
        if not has(contents, match[1]):
            raise UserError(f"{contents.path / match[1]}: not there, and {CONFIG_FILE} names it as tokenizer.{field}")
        plain = match[1][33:]
        is_model = field in ("model", "tokenizer_model") and plain.endswith(".model")
        stored["tokenizer.model" if is_model else plain] = match[1]
    known = {name: at for name, at in stored.items() if name in TOKENIZER_FILES}
    return _Artefacts(contents, known) if known else None


def write(
    output: str | Path,
    model: Checkpoint,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    origin: Origin,
    layout: Layout | None = None,
    packed: bool = False,
) -> None:
    """Publish the stream of a model's tensors as a NeMo 1 model, weights as torch_dist: a folder, or one tar.

    NeMo 1 restores a folder through `model_extracted_dir`. UserError for a model that NeMo 1 cannot be told.
    """
    layout = layout or Layout()
    config = config_of(model.arch, dtype=model.dtype, tp=layout.tp, pp=layout.pp)
    needed = model.arch.num_params() * model.dtype.itemsize
    with publishing(output, kind=NAME, origin=origin, needed=needed, packed=packed) as draft:
        config["tokenizer"] = _write_tokenizer(draft.folder, model.tokenizer)
        (draft.folder / CONFIG_FILE).write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        write_stream(draft, WEIGHTS, tensors, arch=model.arch, dtype=model.dtype, layout=layout, prefix=PREFIX)


def _write_tokenizer(folder: Path, tokenizer: Contents | None) -> dict[str, Any]:
    """Copy the tokenizer into the folder; the section of the config that names it.

    A model of sentencepiece becomes an artefact, as NeMo 1 has it. NeMo 1 knows other tokenizers by a name of the hub
    or a path of this machine alone: what is in `tokenizer/` is for that path.
    """
    if tokenizer is None:
        return {"library": "null", "type": None, "model": None}
    (folder / TOKENIZER).mkdir()
    copy_tokenizer(tokenizer, folder / TOKENIZER)
    model = folder / TOKENIZER / "tokenizer.model"
    if not model.is_file():
        return {"library": "huggingface", "type": TOKENIZER, "model": None, "use_fast": True}
    content = model.read_bytes()
    name = f"{hashlib.sha256(content).hexdigest()[:32]}_tokenizer.model"
    (folder / name).write_bytes(content)
    return {"library": "sentencepiece", "type": None, "model": f"nemo:{name}", "sentencepiece_legacy": False}
