"""Hugging Face folders in and out, a tensor at a time.

Weights are safetensors, configs are JSON; nothing of a folder is ever executed. An export of an import is the
import, bit for bit.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from minitron_nemo.artefacts.contents import SMALL_LIMIT, Contents, has
from minitron_nemo.artefacts.foreign_json import JSON_LIMIT, read_json_object
from minitron_nemo.artefacts.manifest import check_signed, file_sha256
from minitron_nemo.artefacts.origin import Origin
from minitron_nemo.artefacts.paths import contained_file, is_plain_name
from minitron_nemo.artefacts.publishing import Draft, check_free_space, publishing
from minitron_nemo.artefacts.upstream import (
    CARD,
    LICENCE_FILES,
    LICENCE_LIMIT,
    UPSTREAM_FILE,
    is_hub_name,
    upstream_of,
)
from minitron_nemo.checkpoint.buffers import memory_of, new_tensor
from minitron_nemo.checkpoint.finite import is_finite
from minitron_nemo.checkpoint.formats.checkpoint import Checkpoint
from minitron_nemo.checkpoint.formats.hf_config import arch_from_config, config_from_arch
from minitron_nemo.checkpoint.formats.hf_names import hf_names, hf_tensors
from minitron_nemo.checkpoint.formats.nemo import (
    PRECISIONS,
    TOKENIZER,
    TOKENIZER_FILES,
    NemoFolder,
    copy_tokenizer,
    write_nemo,
)
from minitron_nemo.checkpoint.geometry import Box
from minitron_nemo.checkpoint.hashed_files import fill_from
from minitron_nemo.checkpoint.safetensors_stream import DTYPE_NAMES, Entry, SafetensorsWriter, read_header
from minitron_nemo.checkpoint.source import ShapedSource, ended, stream
from minitron_nemo.distributed.layout import Layout
from minitron_nemo.errors import UserError, shown
from minitron_nemo.shape.arch import ModelArch
from minitron_nemo.shape.tensors import LogicalTensor, logical_tensors

KIND = "hf"
CONFIG_FILE = "config.json"
SOURCE_CONFIG_FILE = "hf_config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
STORED_DTYPES = {DTYPE_NAMES[dtype]: dtype for dtype in PRECISIONS.values()}
ITEMSIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4,
    "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
ROTARY_TABLE = "rotary_emb.inv_freq"
GENERATION_FILE = "generation_config.json"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
DOWNLOADED = ["*.json", "*.safetensors", "tokenizer*", "*.model", "*.txt", "*.jinja", CARD, *LICENCE_FILES]


@dataclass(frozen=True, eq=False)
class HfFolder:
    """An opened, checked Hugging Face folder; `open_hf` makes it. `weights` is a TensorSource in Megatron's packing."""

    path: Path
    config: dict[str, Any]
    arch: ModelArch
    dtype: torch.dtype
    weights: "HfWeights"


def open_hf(folder: str | Path) -> HfFolder:
    """The Hugging Face folder, its config and the names, shapes and dtypes of its tensors checked.

    Raises UserError for an unsupported config, for a tensor that is missing, extra or misshapen, and, where a key is
    trusted, for what it did not sign.
    """
    check_signed(folder, kind=KIND)
    return _opened(Path(folder))


def _opened(path: Path) -> HfFolder:
    """The folder, its signature apart, which `formats.known` has asked for."""
    config = _read_json(path, CONFIG_FILE)
    weights = HfWeights(path, arch_from_config(config, source=str(path / CONFIG_FILE)))
    return HfFolder(path, config, weights.arch, weights.dtype(), weights)


class HfWeights(ShapedSource):
    """The logical tensors of a model in a Hugging Face folder, packed when they are read."""

    def __init__(self, folder: Path, arch: ModelArch) -> None:
        super().__init__(arch)
        self.path = folder
        self._files = _weight_files(folder)
        self._headers: dict[str, dict[str, Entry]] = {}
        self._dtype = self._check_tensors()

    def dtype(self, name: str | None = None) -> torch.dtype:
        """The one dtype of all tensors."""
        return self._dtype

    def read(self, name: str, box: Box | None = None) -> Tensor:
        logical = self.tensors[name]
        tensors = [self._read_part(part) for part in hf_names(logical, self.arch)]
        packed = new_tensor(self.shape(name), self._dtype) if len(tensors) > 1 else None
        tensor = logical.row.dims[0].from_hf(tensors, self.arch, out=packed)
        return tensor if box is None else tensor[box.slices()]

    def _read_part(self, name: str) -> Tensor:
        """A tensor as Hugging Face has it."""
        entry, path = self._entry(name), self.path / self._files[name]
        tensor = new_tensor(entry.shape, self._dtype)
        try:
            with path.open("rb", buffering=0) as file:
                fill_from(file, memory_of(tensor), entry.start, uncached=True)
        except (OSError, EOFError) as error:
            raise UserError(f"{path}: {name} cannot be read: {str(error) or 'the file was cut short'}") from None
        _check_finite(tensor, path, name)
        return tensor

    def _entry(self, name: str) -> Entry:
        """Dtype, shape and place of a tensor, from the header of its file."""
        file = self._files[name]
        if name not in self._header(file):
            raise UserError(f"{self.path / file}: no tensor {name}; {INDEX_FILE} says that it is there")
        return self._header(file)[name]

    def _header(self, file: str) -> dict[str, Entry]:
        if file not in self._headers:
            self._headers[file] = _read_header(self.path, file)
        return self._headers[file]

    def _check_tensors(self) -> torch.dtype:
        """Names, shapes and dtypes against the shape; the one dtype of all tensors."""
        expected = dict(hf_tensors(self.arch))
        dtypes = set()
        for name, shape in expected.items():
            if name not in self._files:
                raise UserError(f"{self.path}: tensor {name} is missing; {CONFIG_FILE} describes a model that has it")
            stored = self._entry(name)
            if stored.shape != shape:
                raise UserError(f"{self.path}: tensor {name} is {stored.shape}; {CONFIG_FILE} says {shape}")
            dtypes.add(stored.dtype)
            if stored.dtype not in STORED_DTYPES or len(dtypes) > 1:
                raise UserError(
                    f"{self.path}: tensor {name} is stored as {stored.dtype}; supported are models stored "
                    f"wholly as one of {', '.join(STORED_DTYPES)}"
                )
        # Old checkpoints carry the rotary table; tied ones may carry the same table under a second name.
        tolerated = {"lm_head.weight"} if self.arch.share_embeddings_and_output_weights else set()
        for name in sorted(set(self._files) - set(expected) - tolerated):
            if not name.endswith(ROTARY_TABLE):
                raise UserError(f"{self.path}: tensor {name} belongs to no parameter of the model in {CONFIG_FILE}")
        for file in sorted(set(self._files.values())):
            for name in sorted(set(self._header(file)) - tolerated):
                if self._files.get(name) != file and not name.endswith(ROTARY_TABLE):
                    raise UserError(f"{self.path / file}: holds the tensor {name}, which {INDEX_FILE} does not say")
        self._check_total_size()
        return STORED_DTYPES[dtypes.pop()]

    def _check_total_size(self) -> None:
        """Refuse shards that hold another number of bytes than the index, where there is one, says."""
        if set(self._files.values()) == {WEIGHTS_FILE}:
            return
        metadata = _read_json(self.path, INDEX_FILE).get("metadata")
        said = metadata.get("total_size") if isinstance(metadata, dict) else None
        if said is None:
            return
        entries = [self._entry(name) for name in self._files]
        found = sum(math.prod(entry.shape) * ITEMSIZES.get(entry.dtype, 0) for entry in entries)
        if type(said) not in (int, float) or said != found:
            raise UserError(
                f"{self.path / INDEX_FILE}: total_size={shown(said)}, the tensors that it names have {found} bytes; "
                "fetch the model again, or correct the number if the model is right"
            )


def _check_finite(tensor: Tensor, path: Path, name: str) -> None:
    """Refuse a weight that is no number: its maker gives no hash, and one such weight spoils every logit."""
    if not is_finite(tensor):
        raise UserError(f"{path}: tensor {name} is not all finite numbers; fetch the model again")


def _read_header(folder: Path, name: str) -> dict[str, Entry]:
    path = contained_file(folder, name)
    if path is None:
        raise UserError(f"{folder / name}: named by {INDEX_FILE}, but there is no such file")
    try:
        return read_header(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable safetensors file: {error}") from None


def _weight_files(folder: Path) -> dict[str, str]:
    """Tensor name -> file name, from the single file or the index of the shards."""
    if contained_file(folder, WEIGHTS_FILE) is not None:
        return dict.fromkeys(_read_header(folder, WEIGHTS_FILE), WEIGHTS_FILE)
    if contained_file(folder, INDEX_FILE) is None:
        raise UserError(f"{folder}: neither {WEIGHTS_FILE} nor {INDEX_FILE}; only safetensors weights are read")
    names = _read_json(folder, INDEX_FILE).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
        raise UserError(f"{folder / INDEX_FILE}: weight_map must map tensor names to file names")
    for file in names.values():
        if not is_plain_name(file) or not file.endswith(".safetensors"):
            raise UserError(f"{folder / INDEX_FILE}: names the file {file!r}; only *.safetensors beside it are read")
    return names


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    path = contained_file(folder, name)
    if path is None:
        raise UserError(f"{folder} is not a Hugging Face model folder: no {name}")
    return read_json_object(path)


def source_files(folder: str | Path) -> dict[str, Path]:
    """By name, the small files that an import reads: config, index and tokenizer; no other file is looked at.

    Raises UserError, before opening it, for one that is not a regular file or far too large; for licences too, which
    are copied and decide nothing.
    """
    limits = dict.fromkeys(TOKENIZER_FILES, SMALL_LIMIT) | dict.fromkeys((CONFIG_FILE, INDEX_FILE), JSON_LIMIT)
    found = {}
    for name, limit in (limits | dict.fromkeys(LICENCE_FILES, LICENCE_LIMIT)).items():
        if (path := contained_file(folder, name)) is not None:
            if (size := path.stat().st_size) > limit:
                raise UserError(f"{path}: {size} bytes; no such file needs more than {limit}")
            found[name] = path
    return {name: path for name, path in found.items() if name in limits}


def resolve_source(source: str) -> Path:
    """The folder of a Hugging Face model: `source` itself when it is one, else a download of the hub name.

    Only JSON, safetensors, tokenizer and licence files and the card are fetched. Raises UserError, also offline.
    """
    if Path(source).is_dir():
        return Path(source)
    if not is_hub_name(source):
        raise UserError(f"{source}: no such folder, and not a hub name such as meta-llama/Llama-3.1-8B")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=DOWNLOADED, ignore_patterns=["*/*", "consolidated*"]))
    # The hub client raises its own, httpx's and the system's errors; for the user they are one: no download.
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{source}: no such folder here, and the hub gave nothing: {reason[0]}") from None


def arch_from_hf(folder: str | Path) -> ModelArch:
    """The shape that the `config.json` of a folder describes; UserError names the first unsupported field."""
    return arch_from_config(_read_json(Path(folder), CONFIG_FILE), source=str(Path(folder) / CONFIG_FILE))


def import_hf(
    folder: HfFolder,
    output: str | Path,
    *,
    tensors: Iterable[tuple[str, Tensor]],
    origin: Origin,
    given: str | None = None,
) -> None:
    """Publish an opened folder as the model artefact `output`, in the dtype it is stored in.

    `tensors` is the stream of `folder.weights`, which the caller may watch. `given` is what the user asked for, a hub
    name perhaps: with the folder's licence files it goes along to whatever is made of the model.
    """
    write_nemo(
        output,
        folder.arch,
        tensors,
        dtype=folder.dtype,
        tokenizer=folder.path,
        origin=origin,
        extra={"source": str(folder.path), "source_config_sha256": file_sha256(folder.path / CONFIG_FILE)},
        files=_kept_files(folder, given=given),
    )


def _kept_files(folder: HfFolder, *, given: str | None = None) -> dict[str, bytes]:
    """What a `.nemo` keeps of a Hugging Face folder beside its tokenizer: its config, and whose model it is."""
    upstream = upstream_of(folder.path, given=given or str(folder.path))
    return {
        f"{TOKENIZER}/{SOURCE_CONFIG_FILE}": json.dumps(folder.config, indent=2).encode(),
        f"{TOKENIZER}/{UPSTREAM_FILE}": upstream.to_json(),
    }


def export_hf(
    nemo: NemoFolder | Checkpoint,
    output: str | Path,
    *,
    origin: Origin,
    tensors: Iterable[tuple[str, Tensor]] | None = None,
    token_ids: Mapping[str, int] | None = None,
    shard_bytes: int = SHARD_BYTES,
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Publish a model artefact as the Hugging Face folder `output`, in shards of at most `shard_bytes`.

    A single tensor larger than that gets a shard of its own. `tensors` is the stream of `nemo.weights`, where the
    caller wants to watch it. `token_ids` (`bos_token_id`, `eos_token_id`) are for a model that came with no config:
    without them transformers takes ids of its own. `files` are further files of the folder, by name.
    """
    check_free_space(output, nemo.arch.num_params() * nemo.dtype.itemsize)
    with publishing(output, kind=KIND, origin=origin, tokens=nemo.tokens) as draft:
        if nemo.tokenizer is not None:
            copy_tokenizer(nemo.tokenizer, draft.folder)
        source_config = draft.folder / SOURCE_CONFIG_FILE
        base = _read_json(draft.folder, SOURCE_CONFIG_FILE) if source_config.exists() else None
        for name in (SOURCE_CONFIG_FILE, UPSTREAM_FILE):
            (draft.folder / name).unlink(missing_ok=True)
        values = config_from_arch(nemo.arch, dtype=nemo.dtype, base=base)
        if base is None:
            values |= token_ids or {}
        _write_json(draft.folder / CONFIG_FILE, values)
        ids = {name: values[name] for name in TOKEN_IDS if values.get(name) is not None}
        if ids and not (draft.folder / GENERATION_FILE).exists():
            _write_json(draft.folder / GENERATION_FILE, ids)
        for name, content in (files or {}).items():
            (draft.folder / name).write_bytes(content)
        packed = stream(nemo.weights) if tensors is None else tensors
        with ended(_unpacked(packed, nemo.arch)) as unpacked:
            _write_shards(draft, unpacked, arch=nemo.arch, dtype=nemo.dtype, shard_bytes=shard_bytes)


def recognise(contents: Contents) -> bool:
    """Whether it has a config and weights as safetensors."""
    return has(contents, CONFIG_FILE) and any(name.endswith(".safetensors") for name in contents.names())


def open_checkpoint(contents: Contents) -> Checkpoint:
    """A Hugging Face folder as a checkpoint."""
    folder = _opened(contents.path)
    kept = _kept_files(folder)
    return Checkpoint(folder.path, KIND, folder.arch, folder.dtype, folder.weights, contents, files=kept)


def write(
    output: str | Path, model: Checkpoint, tensors: Iterable[tuple[str, Tensor]], *, origin: Origin, layout: Layout
) -> None:
    """Publish a checkpoint of any format as a Hugging Face folder, which no layout splits."""
    export_hf(model, output, origin=origin, tensors=tensors, token_ids=model.token_ids, files=model.page)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _unpacked(tensors: Iterable[tuple[str, Tensor]], arch: ModelArch) -> Iterator[tuple[str, Tensor]]:
    """A stream of logical tensors as the stream of Hugging Face's."""
    named: dict[str, LogicalTensor] = logical_tensors(arch)
    with ended(tensors) as packed:
        for name, tensor in packed:
            yield from zip(hf_names(named[name], arch), named[name].row.dims[0].to_hf(tensor, arch), strict=True)


def _plan_shards(arch: ModelArch, *, itemsize: int, shard_bytes: int) -> list[dict[str, tuple[int, ...]]]:
    """The tensors (name -> shape) of each shard, in the order in which they are read."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in hf_tensors(arch):
        size = itemsize * torch.Size(shape).numel()
        if shards[-1] and filled + size > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += size
    return shards


def _write_shards(
    draft: Draft, tensors: Iterator[tuple[str, Tensor]], *, arch: ModelArch, dtype: torch.dtype, shard_bytes: int
) -> None:
    """The stream as one safetensors file, or as several with an index."""
    shards = _plan_shards(arch, itemsize=dtype.itemsize, shard_bytes=shard_bytes)
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    names = [WEIGHTS_FILE] if len(shards) == 1 else names
    weight_map = {}
    for file, shapes in zip(names, shards, strict=True):
        with SafetensorsWriter(draft.folder / file, shapes, dtype=dtype) as writer:
            for _ in shapes:
                name, tensor = next(tensors)
                writer.write(name, tensor)
                weight_map[name] = file
        draft.hashes[file] = writer.sha256
    # Runs the stream to its end, so that who watches it sees the last tensor.
    assert next(tensors, None) is None
    if len(shards) > 1:
        index = {"metadata": {"total_size": arch.num_params() * dtype.itemsize}, "weight_map": weight_map}
        _write_json(draft.folder / INDEX_FILE, index)
