"""Hugging Face folders in and out: the one place that knows their tensor names.

Weights are safetensors, configs are JSON; nothing of a folder is ever executed. An export of an import is the
import, bit for bit.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minitron_nemo.arch import ModelArch
from minitron_nemo.checkpoint.hf_config import arch_from_config, config_from_arch
from minitron_nemo.checkpoint.manifest import check_free_space, file_sha256, fingerprint_of, publishing
from minitron_nemo.checkpoint.nemo import TOKENIZER, NemoFolder, copy_tokenizer, write_nemo
from minitron_nemo.checkpoint.paths import contained_file, is_plain_name
from minitron_nemo.checkpoint.safetensors_stream import DTYPE_NAMES, SafetensorsWriter
from minitron_nemo.errors import UserError
from minitron_nemo.parameters import EMBEDDING, FINAL_NORM, LAYER, OUTPUT, Parameter, logical_tensors

KIND = "hf"
CONFIG_FILE = "config.json"
SOURCE_CONFIG_FILE = "hf_config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
JSON_LIMIT = 64 * 2**20
SHARD_BYTES = 5 * 10**9
STORED_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
DOWNLOADED = ["*.json", "*.safetensors", "tokenizer*", "*.model", "*.txt", "*.jinja"]

TOP_NAMES = {EMBEDDING: "model.embed_tokens.weight", OUTPUT: "lm_head.weight"}
NORM_NAMES = {
    f"{FINAL_NORM}.": "model.norm.",
    f"{LAYER}.self_attention.linear_qkv.layer_norm_": "model.layers.{layer}.input_layernorm.",
    f"{LAYER}.mlp.linear_fc1.layer_norm_": "model.layers.{layer}.post_attention_layernorm.",
}
MATRIX_NAMES = {
    "self_attention.linear_qkv.weight": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention.linear_proj.weight": ("self_attn.o_proj",),
    "mlp.linear_fc1.weight": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.linear_fc2.weight": ("mlp.down_proj",),
}


def hf_names(parameter: Parameter, layer: int | None, *, arch: ModelArch) -> tuple[str, ...]:
    """The Hugging Face tensors that one logical tensor is packed from, in packing order."""
    if parameter.key in TOP_NAMES:
        return (TOP_NAMES[parameter.key],)
    for prefix, name in NORM_NAMES.items():
        if parameter.key.startswith(prefix):
            return (name.format(layer=layer) + parameter.key.removeprefix(prefix),)
    names = MATRIX_NAMES[parameter.key.removeprefix(f"{LAYER}.")]
    if "mlp.gate_proj" in names and not arch.is_gated:
        names = ("mlp.up_proj",)
    return tuple(f"model.layers.{layer}.{name}.weight" for name in names)


def hf_shapes(parameter: Parameter, arch: ModelArch) -> list[tuple[int, ...]]:
    """The shapes of those tensors."""
    shape = parameter.shape(arch)
    packing = parameter.dims[0].packing
    if packing == "gqa":
        key = arch.num_query_groups * arch.kv_channels
        return [(rows, *shape[1:]) for rows in (arch.query_size, key, key)]
    return [(arch.ffn_hidden_size, *shape[1:])] * 2 if packing == "gated" else [shape]


def pack(tensors: list[Tensor], *, packing: str, arch: ModelArch) -> Tensor:
    """One Megatron tensor from the Hugging Face ones: gate rows then up rows; per query group [queries, key, value]."""
    if packing != "gqa":
        return torch.cat(tensors)
    groups, width = arch.num_query_groups, tensors[0].shape[1]
    return torch.cat([t.reshape(groups, -1, width) for t in tensors], dim=1).reshape(arch.qkv_size, width)


def unpack(tensor: Tensor, *, packing: str, arch: ModelArch) -> list[Tensor]:
    """The inverse of `pack`."""
    if packing == "gated":
        return list(tensor.chunk(2))
    if packing != "gqa":
        return [tensor]
    width = tensor.shape[1]
    rows = [arch.heads_per_group * arch.kv_channels, arch.kv_channels, arch.kv_channels]
    parts = tensor.reshape(arch.num_query_groups, sum(rows), width).split(rows, dim=1)
    return [part.reshape(-1, width) for part in parts]


def hf_tensors(arch: ModelArch) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every tensor that a Hugging Face folder of this shape holds."""
    for parameter, layer in logical_tensors(arch):
        yield from zip(hf_names(parameter, layer, arch=arch), hf_shapes(parameter, arch), strict=True)


class HfFolder:
    """An opened Hugging Face folder: its shape, its dtype, and its weights in Megatron's packing, read on demand.

    Raises UserError, on opening, for an unsupported config and for a tensor that is missing, extra or misshapen.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder)
        self.config = _read_json(self.path, CONFIG_FILE)
        self.arch = arch_from_config(self.config, source=str(self.path / CONFIG_FILE))
        self._files = _weight_files(self.path)
        self._open: dict[str, Any] = {}
        self.dtype = self._check_tensors()

    def read(self, parameter: Parameter, layer: int | None = None) -> Tensor:
        """The logical tensor of one layer (None where there is one per model)."""
        names = hf_names(parameter, layer, arch=self.arch)
        try:
            tensors = [self._handle(name).get_tensor(name) for name in names]
        except SafetensorError as error:
            raise UserError(f"{self.path}: {names[0]} cannot be read: {error}") from None
        return pack(tensors, packing=parameter.dims[0].packing, arch=self.arch)

    def _handle(self, name: str) -> Any:
        """The open safetensors file that holds tensor `name`."""
        file = self._files[name]
        if file not in self._open:
            self._open[file] = _open_safetensors(self.path, file)
        return self._open[file]

    def _check_tensors(self) -> torch.dtype:
        """Names, shapes and dtypes against the shape; the one dtype of all tensors."""
        expected = dict(hf_tensors(self.arch))
        dtypes = set()
        for name, shape in expected.items():
            if name not in self._files:
                raise UserError(f"{self.path}: tensor {name} is missing; {CONFIG_FILE} describes a model that has it")
            try:
                stored = self._handle(name).get_slice(name)
            except SafetensorError as error:
                raise UserError(f"{self.path / self._files[name]}: no tensor {name}: {error}") from None
            if (found := tuple(stored.get_shape())) != shape:
                raise UserError(f"{self.path}: tensor {name} is {found}; {CONFIG_FILE} says {shape}")
            dtypes.add(stored.get_dtype())
            if stored.get_dtype() not in STORED_DTYPES or len(dtypes) > 1:
                raise UserError(
                    f"{self.path}: tensor {name} is stored as {stored.get_dtype()}; supported are models stored "
                    f"wholly as one of {', '.join(STORED_DTYPES)}"
                )
        # Old checkpoints carry the rotary table; tied ones may carry the same table under a second name.
        tolerated = {"lm_head.weight"} if self.arch.share_embeddings_and_output_weights else set()
        for name in sorted(set(self._files) - set(expected) - tolerated):
            if not name.endswith("rotary_emb.inv_freq"):
                raise UserError(f"{self.path}: tensor {name} belongs to no parameter of the model in {CONFIG_FILE}")
        return STORED_DTYPES[dtypes.pop()]


def _open_safetensors(folder: Path, name: str) -> Any:
    path = contained_file(folder, name)
    if path is None:
        raise UserError(f"{folder / name}: named by {INDEX_FILE}, but there is no such file")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file: {error}") from None


def _weight_files(folder: Path) -> dict[str, str]:
    """Tensor name -> file name, from the single file or the index of the shards."""
    if contained_file(folder, WEIGHTS_FILE) is not None:
        return dict.fromkeys(_open_safetensors(folder, WEIGHTS_FILE).keys(), WEIGHTS_FILE)
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
    if path.stat().st_size > JSON_LIMIT:
        raise UserError(f"{path}: larger than {JSON_LIMIT} bytes, which no such file needs")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def resolve_source(source: str) -> Path:
    """The folder of a Hugging Face model: `source` itself when it is one, else a download of the hub name.

    Only JSON, safetensors and tokenizer files are fetched. Raises UserError, also without a network.
    """
    if Path(source).is_dir():
        return Path(source)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", source):
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
    source: str | Path,
    output: str | Path,
    *,
    fingerprint: str,
    config: Mapping[str, Any],
    parents: Mapping[str, str] | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Publish the Hugging Face folder `source` as the model artefact `output`, in the dtype it is stored in."""
    folder = HfFolder(source)
    write_nemo(
        output,
        folder.arch,
        tensors=folder.read,
        tokenizer=folder.path,
        dtype=folder.dtype,
        fingerprint=fingerprint,
        config=config,
        parents=parents or {},
        extra={"source": str(source), "source_config_sha256": file_sha256(folder.path / CONFIG_FILE)},
        overwrite=overwrite,
        progress=progress,
        files={f"{TOKENIZER}/{SOURCE_CONFIG_FILE}": json.dumps(folder.config, indent=2).encode()},
    )


def export_hf(
    nemo: NemoFolder,
    output: str | Path,
    *,
    fingerprint: str | None = None,
    config: Mapping[str, Any] | None = None,
    parents: Mapping[str, str] | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Publish a model artefact as the Hugging Face folder `output`, in shards of at most `shard_bytes`.

    A single tensor larger than that gets a shard of its own.
    """
    check_free_space(output, nemo.arch.num_params() * nemo.dtype.itemsize)
    hashes: dict[str, str] = {}
    with publishing(output, kind=KIND, fingerprint=fingerprint or fingerprint_of(KIND, nemo.sha256),
                    config=config or {}, parents=parents or {"model": nemo.sha256}, tokens=nemo.manifest.tokens,
                    overwrite=overwrite, hashes=hashes) as temp:  # fmt: skip
        copy_tokenizer(nemo.tokenizer, temp)
        base = _read_json(temp, SOURCE_CONFIG_FILE) if (temp / SOURCE_CONFIG_FILE).exists() else None
        (temp / SOURCE_CONFIG_FILE).unlink(missing_ok=True)
        values = config_from_arch(nemo.arch, dtype=nemo.dtype, base=base)
        (temp / CONFIG_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        _write_shards(temp, nemo, shard_bytes=shard_bytes, hashes=hashes, progress=progress)


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


def _unpacked(nemo: NemoFolder, progress: Callable[[int, int], None] | None) -> Iterator[tuple[str, Tensor]]:
    pairs = logical_tensors(nemo.arch)
    for done, (parameter, layer) in enumerate(pairs, start=1):
        tensors = unpack(nemo.read(parameter, layer), packing=parameter.dims[0].packing, arch=nemo.arch)
        yield from zip(hf_names(parameter, layer, arch=nemo.arch), tensors, strict=True)
        if progress is not None:
            progress(done, len(pairs))


def _write_shards(
    folder: Path,
    nemo: NemoFolder,
    *,
    shard_bytes: int,
    hashes: dict[str, str],
    progress: Callable[[int, int], None] | None,
) -> None:
    shards = _plan_shards(nemo.arch, itemsize=nemo.dtype.itemsize, shard_bytes=shard_bytes)
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    names = [WEIGHTS_FILE] if len(shards) == 1 else names
    stream = _unpacked(nemo, progress)
    weight_map = {}
    for file, tensors in zip(names, shards, strict=True):
        with SafetensorsWriter(folder / file, tensors, dtype=nemo.dtype) as writer:
            for _ in tensors:
                name, tensor = next(stream)
                writer.write(name, tensor)
                weight_map[name] = file
        hashes[file] = writer.sha256
    # Runs the stream to its end, for the last call of `progress`.
    assert next(stream, None) is None
    if len(shards) > 1:
        total = nemo.arch.num_params() * nemo.dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
