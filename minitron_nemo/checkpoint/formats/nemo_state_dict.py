"""What NeMo's own connector writes of a `MinitronGPT`: a tar or folder with a state dict and a config, both read here.

Read without NeMo: no class that the config names is built, and the state dict may hold tensors and nothing else.
"""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitron_nemo.artefacts.contents import Contents, has
from minitron_nemo.artefacts.manifest import MANIFEST_FILE
from minitron_nemo.artefacts.paths import is_plain_name
from minitron_nemo.artefacts.stretch import Stretch, StretchFile
from minitron_nemo.checkpoint.formats.checkpoint import Checkpoint
from minitron_nemo.checkpoint.formats.nemo import CONFIG_FILE, TOKENIZER_FILES, read_config, shape_and_dtype
from minitron_nemo.checkpoint.geometry import Box
from minitron_nemo.checkpoint.source import ShapedSource
from minitron_nemo.errors import UserError
from minitron_nemo.shape.arch import ModelArch

FORMAT = "nemo_state_dict"
WEIGHTS_FILE = "model_weights.ckpt"
MODEL = "model."  # what the names of its tensors begin with
ARTIFACT = "nemo:"  # what NeMo puts before the name of a file of the archive
# Keys under `tokenizer` of the config -> the name that the file has in a tokenizer folder.
TOKENIZER_KEYS = {name.replace(".", "_"): name for name in TOKENIZER_FILES}
# What NeMo adds to a config besides the shape. `target` names a class to build; nobody asks it here.
BESIDE_THE_SHAPE = ("tokenizer", "target", "nemo_version")
READ_AGAIN = 64 * 2**20  # bytes; around each record of the archive a little is read twice


def recognise(contents: Contents) -> bool:
    """Whether these files look like such a .nemo."""
    return has(contents, WEIGHTS_FILE) and has(contents, CONFIG_FILE) and not has(contents, MANIFEST_FILE)


def shape_of_config(values: dict[str, Any], *, source: str) -> tuple[ModelArch, torch.dtype]:
    """Shape and precision that the config of a `MinitronGPT` describes, what NeMo adds to it left aside."""
    shape = {name: value for name, value in values.items() if name not in BESIDE_THE_SHAPE}
    return shape_and_dtype(shape, source=source)


def open_checkpoint(contents: Contents) -> Checkpoint:
    """The model in these files, its names, shapes and dtype checked; UserError in one line for any other."""
    config = read_config(contents)
    arch, dtype = shape_of_config(config, source=str(contents.path / CONFIG_FILE))
    tokenizer = _tokenizer(contents, config.get("tokenizer"))
    weights = StateDictWeights(contents, arch, dtype)
    version = config.get("nemo_version")
    notes = (f"written by NeMo {version}",) if isinstance(version, str) and version.isprintable() else ()
    return Checkpoint(contents.path, FORMAT, arch, dtype, weights, tokenizer, notes)


class StateDictWeights(ShapedSource):
    """The logical tensors of a state dict that was read whole."""

    def __init__(self, contents: Contents, arch: ModelArch, dtype: torch.dtype) -> None:
        super().__init__(arch)
        path, self._dtype = contents.path / WEIGHTS_FILE, dtype
        found = contents.find(WEIGHTS_FILE)
        assert found is not None
        if found.length < arch.num_params() * dtype.itemsize:
            raise UserError(f"{path}: {found.length} bytes; the model that {CONFIG_FILE} describes has more")
        self._state = _read(found, path)
        for name in self.tensors:
            tensor = self._state.get(MODEL + name)
            if tensor is None:
                raise UserError(
                    f"{path}: tensor {MODEL + name} is missing; {CONFIG_FILE} describes a model that has it"
                )
            if tuple(tensor.shape) != self.shape(name) or tensor.dtype != dtype:
                raise UserError(
                    f"{path}: tensor {MODEL + name} is {tensor.dtype} {tuple(tensor.shape)}; {CONFIG_FILE} says "
                    f"{dtype} {self.shape(name)}"
                )
        if extra := sorted(set(self._state) - {MODEL + name for name in self.tensors}):
            raise UserError(f"{path}: {extra[0][:80]!a} belongs to no parameter of the model in {CONFIG_FILE}")

    def dtype(self, name: str | None = None) -> torch.dtype:
        """The one dtype of all tensors."""
        return self._dtype

    def read(self, name: str, box: Box | None = None) -> Tensor:
        tensor = self._state[MODEL + name]
        return tensor if box is None else tensor[box.slices()]


def _read(found: Stretch, path: Path) -> dict[str, Tensor]:
    """The tensors of a file of torch.save, by name; UserError for a file that holds anything else."""
    with found.path.open("rb", buffering=0) as file:
        inside = StretchFile(file, found.start, found.length, budget=2 * found.length + READ_AGAIN)
        if inside.read(2) != b"PK":
            raise UserError(f"{path}: not a zip archive of torch.save; only these are read")
        inside.seek(0)
        try:
            state = torch.load(io.BufferedReader(inside), map_location="cpu", weights_only=True)
        # A file that was made to be refused raises nearly anything on its way through zip, pickle and torch.
        except Exception as error:
            reason = " ".join(str(error).split())[:160] or type(error).__name__
            raise UserError(f"{path}: not a state dict of tensors alone: {reason}") from None
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise UserError(f"{path}: not a state dict of tensors alone: it holds {type(state).__name__}")
    for name, value in state.items():
        if type(value) is not Tensor or value.is_sparse:
            raise UserError(f"{path}: {name[:80]!a} is no plain tensor but {type(value).__name__}")
    return state


@dataclass(frozen=True)
class _Renamed:
    """Files of other contents under names of their own."""

    contents: Contents
    files: dict[str, str]

    @property
    def path(self) -> Path:
        return self.contents.path

    def names(self) -> list[str]:
        return sorted(self.files)

    def find(self, name: str) -> Stretch | None:
        return self.contents.find(self.files[name]) if name in self.files else None

    def inside(self, folder: str) -> "_Renamed":
        return _Renamed(self.contents, {})


def _tokenizer(contents: Contents, keys: Any) -> Contents | None:
    """The tokenizer files that the config names, which lie under names of their own beside the weights."""
    if keys is None:
        return None
    path = contents.path / CONFIG_FILE
    if not isinstance(keys, dict):
        raise UserError(f"{path}: tokenizer: expected a mapping of files, got {type(keys).__name__}")
    files = {}
    for key, value in keys.items():
        name = value.removeprefix(ARTIFACT) if isinstance(value, str) else ""
        if key not in TOKENIZER_KEYS or not str(value).startswith(ARTIFACT) or not is_plain_name(name):
            raise UserError(
                f"{path}: tokenizer.{str(key)[:40]}={str(value)[:80]!a}: must be a file of the archive, "
                f"{ARTIFACT}NAME, under one of {', '.join(TOKENIZER_KEYS)}"
            )
        if not has(contents, name):
            raise UserError(f"{path}: tokenizer.{key} names {name[:80]!a}, and there is no such file")
        files[TOKENIZER_KEYS[key]] = name
    return _Renamed(contents, files)
