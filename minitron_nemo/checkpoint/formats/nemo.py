"""The model artefact: a `name.nemo/` folder with its shape, its weights as torch_dist shards and its tokenizer."""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from minitron_nemo.artefacts.contents import Contents, Place, TarContents, contents_of, has, read_small
from minitron_nemo.artefacts.manifest import (
    MANIFEST_FILE,
    Manifest,
    check_listed,
    check_signed,
    check_sizes,
    manifest_sha256,
    read_manifest,
    verify_files,
)
from minitron_nemo.artefacts.origin import Origin
from minitron_nemo.artefacts.publishing import check_free_space, publishing
from minitron_nemo.artefacts.strict_yaml import parse_yaml
from minitron_nemo.artefacts.upstream import LICENCE_FILES, LICENCE_LIMIT, UPSTREAM_FILE
from minitron_nemo.checkpoint.formats.checkpoint import Checkpoint
from minitron_nemo.checkpoint.torch_dist_weights import TorchDistWeights, write_stream
from minitron_nemo.distributed.layout import Layout
from minitron_nemo.errors import UserError, shown
from minitron_nemo.shape.arch import ModelArch

KIND = "model"
NAME, TAR_NAME = "nemo", "nemo_tar"  # among the formats: a folder, one file
CONFIG_FILE = "model_config.yaml"
WEIGHTS = "model_weights"
TOKENIZER = "tokenizer"
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# What goes into `tokenizer/`, and nothing else: the folder it is copied from may hold weights or code.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
    "hf_config.json", UPSTREAM_FILE,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class NemoFolder:
    """An opened, checked model artefact; `open_nemo` makes it. `weights` is a TensorSource, read on demand."""

    contents: Contents
    arch: ModelArch
    dtype: torch.dtype
    manifest: Manifest
    weights: TorchDistWeights

    @property
    def path(self) -> Path:
        """Its folder, or the one file that it is packed in."""
        return self.contents.path

    @property
    def tokenizer(self) -> Contents:
        """Its tokenizer files."""
        return self.contents.inside(TOKENIZER)

    @property
    def tokens(self) -> int:
        """How many the last step trained it on."""
        return self.manifest.tokens

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the manifest: what a child artefact names as its parent."""
        return manifest_sha256(self.contents)


def precision_name(dtype: torch.dtype) -> str:
    """bf16, fp16 or fp32."""
    for name, known in PRECISIONS.items():
        if dtype == known:
            return name
    raise UserError(f"dtype {dtype}: weights are stored as bfloat16, float16 or float32")


def open_nemo(path: Place, *, verify: bool = False, verify_while_read: bool = False) -> NemoFolder:
    """The model artefact at `path`, its shape, keys and file sizes checked; with `verify` every hash as well.

    With `verify_while_read` files of weights are hashed as they are read, for a step that reads them once:
    `weights.verify()`, which ends a `stream`, judges them; all other files are hashed here. So they are, whatever was
    asked, where only what a key signed may be opened.

    Raises UserError in one line for anything that is not a whole model artefact.
    """
    contents = contents_of(path)
    for name in (MANIFEST_FILE, CONFIG_FILE):
        if not has(contents, name):
            reason = f"no {name}" if os.path.lexists(contents.path) else "no such folder"
            raise UserError(f"{contents.path} is not a .nemo model folder: {reason}; import_hf or random_init make one")
    manifest = read_manifest(contents, kind=KIND)
    weights_files = {f"{WEIGHTS}/{name}" for name in _hashes_of_weights(manifest)}
    check_signed(contents, kind=KIND, leave=weights_files)
    for name in (CONFIG_FILE, f"{WEIGHTS}/.metadata"):
        if name not in manifest.files:
            raise UserError(
                f"{contents.path / MANIFEST_FILE}: does not list {name}, so nothing vouches for it; make it again"
            )
    check_listed(contents, manifest)
    later = _hashes_of_weights(manifest) if verify_while_read else {}
    if verify or verify_while_read:
        verify_files(contents, manifest, leave=weights_files if verify_while_read else ())
    else:
        check_sizes(contents, manifest)
    arch, dtype = shape_and_dtype(read_config(contents), source=str(contents.path / CONFIG_FILE))
    weights = TorchDistWeights(contents.inside(WEIGHTS), arch, source=CONFIG_FILE, sha256=later)
    if weights.dtype() != dtype:
        raise UserError(f"{contents.path / WEIGHTS}: tensors are {weights.dtype()}; {CONFIG_FILE} says {dtype}")
    return NemoFolder(contents, arch, dtype, manifest, weights)


def recognise(contents: Contents) -> bool:
    """Whether it is an artefact of the kind model, whatever else may be wrong with it."""
    return has(contents, MANIFEST_FILE) and read_manifest(contents, kind=None).kind == KIND


def open_checkpoint(contents: Contents, *, hashes: bool = True) -> Checkpoint:
    """A model artefact as a checkpoint; with `hashes` those of its weights are checked as they are streamed."""
    model = open_nemo(contents, verify_while_read=hashes)
    manifest, name = model.manifest, TAR_NAME if isinstance(contents, TarContents) else NAME
    notes = [f"{made} {fact}" for made, fact in (("made", manifest.created), ("by", manifest.command)) if fact]
    return Checkpoint(
        model.path, name, model.arch, model.dtype, model.weights, model.tokenizer, tuple(notes), tokens=manifest.tokens
    )


def write(
    output: str | Path,
    model: Checkpoint,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    origin: Origin,
    layout: Layout,
    packed: bool = False,
) -> None:
    """Publish a checkpoint of any format as a model artefact, in the files of `layout` or `packed` into one."""
    write_nemo(
        output,
        model.arch,
        tensors,
        dtype=model.dtype,
        tokenizer=model.tokenizer,
        origin=origin,
        extra={"source": str(model.path), "source_format": model.format},
        files=dict(model.files),
        packed=packed,
        layout=layout,
    )


def _hashes_of_weights(manifest: Manifest) -> dict[str, str]:
    """The SHA-256 of each file of tensors, by its name."""
    names = [name for name in manifest.files if name.startswith(f"{WEIGHTS}/") and name.endswith(".distcp")]
    return {name.removeprefix(f"{WEIGHTS}/"): manifest.files[name]["sha256"] for name in names}


def read_config(contents: Contents) -> dict[str, Any]:
    """The values of the `model_config.yaml` of a .nemo, of whatever writer; UserError when it is no mapping."""
    path = contents.path / CONFIG_FILE
    try:
        values = parse_yaml(read_small(contents, CONFIG_FILE))
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{path}: not readable YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping of model shape fields, got {type(values).__name__}")
    return values


def shape_and_dtype(values: Mapping[str, Any], *, source: str) -> tuple[ModelArch, torch.dtype]:
    """The model that the values of a `model_config.yaml` describe; UserError naming `source` where they do not."""
    shape = dict(values)
    precision = shape.pop("precision", None)
    if not isinstance(precision, str) or precision not in PRECISIONS:
        raise UserError(f"{source}: precision={shown(precision)}: allowed are {', '.join(PRECISIONS)}")
    return ModelArch.from_dict(shape, source=source), PRECISIONS[precision]


def config_values(arch: ModelArch, dtype: torch.dtype) -> dict[str, Any]:
    """The values of a `model_config.yaml`."""
    return {**arch.to_dict(), "precision": precision_name(dtype)}


def describe_folder(folder: Path, arch: ModelArch, *, dtype: torch.dtype, tokenizer: Place | None) -> None:
    """Write into `folder` what is not weights: `model_config.yaml`, and the tokenizer files found in `tokenizer`."""
    text = yaml.safe_dump(config_values(arch, dtype), sort_keys=False)
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
    (folder / TOKENIZER).mkdir()
    if tokenizer is not None:
        copy_tokenizer(tokenizer, folder / TOKENIZER)


def copy_tokenizer(source: Place, target: str | Path) -> None:
    """Copy the tokenizer files of a tokenizer folder, a Hugging Face folder or a .nemo model, and its licence."""
    if isinstance(source, str | Path) and not os.path.exists(source):
        raise UserError(f"{source}: no such tokenizer folder; give one with tokenizer.json, or a .nemo folder")
    files = contents_of(source)
    if has(files, CONFIG_FILE):
        files = files.inside(TOKENIZER)
    for name in TOKENIZER_FILES:
        if has(files, name):
            (Path(target) / name).write_bytes(read_small(files, name))
    for name in LICENCE_FILES:
        if has(files, name):
            (Path(target) / name).write_bytes(read_small(files, name, limit=LICENCE_LIMIT))


def model_facts(arch: ModelArch, dtype: torch.dtype) -> dict[str, Any]:
    """What the manifest of every model says about it."""
    return {"arch": arch.to_dict(), "precision": precision_name(dtype)}


def write_nemo(
    path: str | Path,
    arch: ModelArch,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    dtype: torch.dtype,
    tokenizer: Place | None,
    origin: Origin,
    extra: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes] | None = None,
    prove: Callable[[TorchDistWeights], Mapping[str, Any]] | None = None,
    packed: bool = False,
    layout: Layout | None = None,
) -> None:
    """Publish a model artefact from a stream of its logical tensors, taking one at a time and storing it as `dtype`.

    It is a folder, with a file of weights for each rank of `layout`, or `packed` into one tar, which the weights are
    written into as they come.

    `files` are further files of the folder, by relative name; `extra` are further facts for the manifest. `prove` is
    given the weights as they were written: what it returns are facts too, and when it raises nothing is published.
    """
    check_free_space(path, arch.num_params() * dtype.itemsize)
    facts = {**model_facts(arch, dtype), **(extra or {})}
    with publishing(path, kind=KIND, origin=origin, extra=facts, packed=packed) as draft:
        describe_folder(draft.folder, arch, dtype=dtype, tokenizer=tokenizer)
        for name, content in (files or {}).items():
            (draft.folder / name).write_bytes(content)
        write_stream(draft, WEIGHTS, tensors, arch=arch, dtype=dtype, layout=layout)
        if prove is not None:
            assert not packed, "what is packed cannot be looked at before it is complete"
            draft.extra.update(prove(TorchDistWeights(draft.folder / WEIGHTS, arch, source=CONFIG_FILE)))
