"""The model artefact: a `name.nemo/` folder with its shape, its weights as torch_dist shards and its tokenizer."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from minitron_nemo.arch import ModelArch
from minitron_nemo.checkpoint.manifest import (
    MANIFEST_FILE,
    Manifest,
    check_free_space,
    check_sizes,
    manifest_sha256,
    publishing,
    read_manifest,
    verify_files,
)
from minitron_nemo.checkpoint.paths import contained_file
from minitron_nemo.checkpoint.torch_dist import TorchDistReader, TorchDistWriter, write_metadata
from minitron_nemo.errors import UserError
from minitron_nemo.parameters import Parameter, logical_tensors, parameters

KIND = "model"
CONFIG_FILE = "model_config.yaml"
WEIGHTS = "model_weights"
TOKENIZER = "tokenizer"
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# What goes into `tokenizer/`, and nothing else: the folder it is copied from may hold weights or code.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
    "hf_config.json",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class NemoFolder:
    """An opened, checked model artefact; `open_nemo` makes it. Weights are read on demand."""

    path: Path
    arch: ModelArch
    dtype: torch.dtype
    manifest: Manifest

    @property
    def tokenizer(self) -> Path:
        return self.path / TOKENIZER

    @property
    def precision(self) -> str:
        return precision_name(self.dtype)

    @cached_property
    def reader(self) -> TorchDistReader:
        return TorchDistReader(self.path / WEIGHTS)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the manifest: what a child artefact names as its parent."""
        return manifest_sha256(self.path)

    def read(self, parameter: Parameter, layer: int | None = None) -> Tensor:
        """The logical tensor of one layer (None where there is one per model), vocabulary padding trimmed."""
        if parameter.per_layer != (layer is not None):
            raise ValueError(f"{parameter.key}: layer={layer}, per_layer={parameter.per_layer}")
        shape = parameter.shape(self.arch)
        if layer is None:
            return self.reader.read(parameter.key, offset=(0,) * len(shape), size=shape)
        return self.reader.read(parameter.key, offset=(layer, *(0 for _ in shape)), size=(1, *shape))[0]


def precision_name(dtype: torch.dtype) -> str:
    """bf16, fp16 or fp32."""
    for name, known in PRECISIONS.items():
        if dtype == known:
            return name
    raise UserError(f"dtype {dtype}: weights are stored as bfloat16, float16 or float32")


def open_nemo(path: str | Path, *, verify: bool = False) -> NemoFolder:
    """The model artefact at `path`, its shape, keys and file sizes checked; with `verify` every hash as well.

    Raises UserError in one line for anything that is not a whole model artefact.
    """
    path = Path(path)
    for name in (MANIFEST_FILE, CONFIG_FILE):
        if not (path / name).is_file():
            reason = f"no {name}" if path.is_dir() else "no such folder"
            raise UserError(f"{path} is not a .nemo model folder: {reason}; import_hf or random_init make one")
    manifest = read_manifest(path, kind=KIND)
    (verify_files if verify else check_sizes)(path, manifest)
    arch, dtype = _read_config(path / CONFIG_FILE)
    nemo = NemoFolder(path, arch, dtype, manifest)
    _check_weights(nemo)
    return nemo


def _read_config(path: Path) -> tuple[ModelArch, torch.dtype]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not readable YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping of model shape fields, got {type(values).__name__}")
    precision = values.pop("precision", None)
    if not isinstance(precision, str) or precision not in PRECISIONS:
        raise UserError(f"{path}: precision={precision!r}: allowed are {', '.join(PRECISIONS)}")
    return ModelArch.from_dict(values, source=str(path)), PRECISIONS[precision]


def stored_shape(parameter: Parameter, arch: ModelArch) -> tuple[int, ...]:
    """Global shape under the checkpoint key: `[num_layers, *shape]` where there is one per layer."""
    return (arch.num_layers, *parameter.shape(arch)) if parameter.per_layer else parameter.shape(arch)


def _check_weights(nemo: NemoFolder) -> None:
    reader, weights = nemo.reader, nemo.path / WEIGHTS
    stored = set(reader.keys())
    for parameter in parameters(nemo.arch):
        key, expected = parameter.key, stored_shape(parameter, nemo.arch)
        if key not in stored:
            raise UserError(f"{weights}: tensor {key} is missing; {CONFIG_FILE} describes a model that has it")
        found = reader.shape(key)
        # Tensor parallelism pads the vocabulary: more rows than words are fine, fewer are not.
        padded = parameter.dims[0].axis == "vocab_size" and len(found) == 2 and found[0] >= expected[0]
        if (found[1:] != expected[1:]) if padded else (found != expected):
            raise UserError(f"{weights}: tensor {key} is {found}; {CONFIG_FILE} says {expected}")
        if reader.dtype(key) != nemo.dtype:
            raise UserError(f"{weights}: tensor {key} is {reader.dtype(key)}; {CONFIG_FILE} says {nemo.dtype}")
    if extra := sorted(stored - {parameter.key for parameter in parameters(nemo.arch)}):
        raise UserError(f"{weights}: tensor {extra[0]} belongs to no parameter of the model in {CONFIG_FILE}")


def describe_folder(folder: str | Path, arch: ModelArch, dtype: torch.dtype, tokenizer: str | Path | None) -> None:
    """Write into `folder` what is not weights: `model_config.yaml`, and the tokenizer files found in `tokenizer`."""
    folder = Path(folder)
    values = {**arch.to_dict(), "precision": precision_name(dtype)}
    (folder / CONFIG_FILE).write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    (folder / TOKENIZER).mkdir()
    if tokenizer is not None:
        copy_tokenizer(tokenizer, folder / TOKENIZER)


def copy_tokenizer(source: str | Path, target: str | Path) -> None:
    """Copy the tokenizer files of a tokenizer folder, a Hugging Face folder or a .nemo folder."""
    source = Path(source)
    if (source / CONFIG_FILE).is_file():
        source = source / TOKENIZER
    if not source.is_dir():
        raise UserError(f"{source}: no such tokenizer folder; give one with tokenizer.json, or a .nemo folder")
    for name in TOKENIZER_FILES:
        if (file := contained_file(source, name)) is not None:
            shutil.copyfile(file, Path(target) / name)


def write_nemo(
    path: str | Path,
    arch: ModelArch,
    *,
    tensors: Callable[[Parameter, int | None], Tensor],
    tokenizer: str | Path | None,
    dtype: torch.dtype,
    fingerprint: str,
    config: Mapping[str, Any],
    parents: Mapping[str, str],
    tokens: int = 0,
    extra: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Publish a model artefact, asking `tensors` for one logical tensor at a time and storing it as `dtype`.

    `progress(done, total)` is called after each tensor; `files` are further files of the folder, by relative name.
    """
    check_free_space(path, arch.num_params() * dtype.itemsize)
    hashes: dict[str, str] = {}
    facts = {"arch": arch.to_dict(), "precision": precision_name(dtype), **(extra or {})}
    with publishing(path, kind=KIND, fingerprint=fingerprint, config=config, parents=parents, tokens=tokens,
                    extra=facts, overwrite=overwrite, hashes=hashes) as temp:  # fmt: skip
        describe_folder(temp, arch, dtype=dtype, tokenizer=tokenizer)
        for name, content in (files or {}).items():
            (temp / name).write_bytes(content)
        (temp / WEIGHTS).mkdir()
        writer = TorchDistWriter(temp / WEIGHTS)
        pairs = logical_tensors(arch)
        for done, (parameter, layer) in enumerate(pairs, start=1):
            tensor = tensors(parameter, layer)
            shape = parameter.shape(arch)
            assert tuple(tensor.shape) == shape, f"{parameter.key}: got {tuple(tensor.shape)}, expected {shape}"
            write_logical(writer, parameter, layer, tensor=tensor.to(dtype), arch=arch)
            if progress is not None:
                progress(done, len(pairs))
        write_metadata(temp / WEIGHTS, writer.close())
        hashes[f"{WEIGHTS}/{writer.name}"] = writer.sha256


def write_logical(
    writer: TorchDistWriter, parameter: Parameter, layer: int | None, *, tensor: Tensor, arch: ModelArch
) -> None:
    """Append a whole logical tensor as one chunk: layer `layer` of the stack, or the tensor itself."""
    offset = tuple(0 for _ in tensor.shape)
    if layer is not None:
        tensor, offset = tensor[None], (layer, *offset)
    writer.write(parameter.key, tensor, global_shape=stored_shape(parameter, arch), offset=offset)
