"""A hostile artefact as data: which sound artefact it is made of, what is done to it, and what the refusal says."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import foreign_layouts
import torch

from minitron_nemo.artefacts.contents import contents_of
from minitron_nemo.artefacts.origin import Origin
from minitron_nemo.artefacts.stretch import Stretch
from minitron_nemo.checkpoint.common_state import common_state
from minitron_nemo.checkpoint.formats.hf import arch_from_hf, export_hf, open_hf, source_files
from minitron_nemo.checkpoint.formats.known import open_checkpoint
from minitron_nemo.checkpoint.formats.nemo import open_nemo, write_nemo
from minitron_nemo.checkpoint.random_init import RandomWeights
from minitron_nemo.checkpoint.source import stream
from minitron_nemo.checkpoint.state_dict_file import StateDictFile
from minitron_nemo.checkpoint.zarr_folder import ZarrTensors
from minitron_nemo.data.tokenizer import load_tokenizer
from minitron_nemo.pruning.plan import identity, read_plan
from minitron_nemo.shape.arch import ModelArch

ARCH = ModelArch(2, 16, 24, 2, 1, 8, 131, 32)
CANARY = "canary"  # what any code that runs makes, in the folder of the case


@dataclass(frozen=True)
class Case:
    """`poison` changes a copy of the sound artefact `base`; the refusal must match `says`.

    With `says=None` the artefact is sound but for what nobody looks at: it opens, and nothing runs.
    """

    name: str
    base: str
    poison: Callable[[Path], object]
    says: str | None


def write_sound(folder: Path, save_tokenizer: Callable[[Path], object]) -> dict[str, Path]:
    """The sound artefacts by their names."""
    save_tokenizer(folder / "tokenizer")
    common: dict[str, Any] = {"dtype": torch.float32, "tokenizer": folder / "tokenizer", "origin": Origin("f")}
    for name, packed in (("nemo", False), ("tar", True)):
        write_nemo(folder / f"{name}.nemo", ARCH, stream(RandomWeights(ARCH, seed=1)), packed=packed, **common)
    export_hf(open_nemo(folder / "nemo.nemo"), folder / "hf", origin=Origin("f"), shard_bytes=12_000)
    (folder / "hf" / "manifest.json").unlink()
    (folder / "plan.json").write_text(identity(ARCH).to_json())
    (folder / "ranks").mkdir()
    torch.save({"weight": torch.ones(3)}, folder / "ranks" / "model_weights.ckpt")
    torch.save({"iteration": 3}, folder / "ranks" / "common.pt")
    foreign_layouts.nemo1_ranks(folder / "nemo1", RandomWeights(ARCH, seed=1), tp=2)
    foreign_layouts.megatron_run(folder / "megatron", RandomWeights(ARCH, seed=1))
    foreign_layouts.nemo2(folder / "nemo2", RandomWeights(ARCH, seed=1))
    names = ("nemo.nemo", "tar.nemo", "hf", "plan.json", "ranks", "ranks", "ranks", "nemo1", "megatron", "nemo2")
    return dict(zip(OPENERS, (folder / name for name in names), strict=True))


def open_model(path: Path) -> None:
    """As a recipe opens the model that it streams: all hashes, the tokenizer, every tensor."""
    model = open_nemo(path, verify=True)
    load_tokenizer(model.tokenizer)
    for _ in stream(model.weights):
        pass


def open_hf_folder(path: Path) -> None:
    """As `import_hf` opens a folder."""
    arch_from_hf(path)
    source_files(path)
    load_tokenizer(path)
    for _ in stream(open_hf(path).weights):
        pass


def open_rank_file(folder: Path) -> None:
    """As the files of the ranks of NeMo 1 are opened."""
    path = folder / "model_weights.ckpt"
    file = StateDictFile(Stretch.whole(path), label=path)
    for name in file.names():
        file.read(name)


def open_zarr(folder: Path) -> None:
    """As the formats that hold arrays of zarr open them."""
    arrays = ZarrTensors(contents_of(folder))
    arrays.check_whole(arrays.keys())
    for key in arrays.keys():  # noqa: SIM118
        arrays.read(key)


def open_any(path: Path) -> None:
    """As `convert` opens a checkpoint of any format."""
    for _ in stream(open_checkpoint(path).weights):
        pass


OPENERS: dict[str, Callable[[Path], object]] = {
    "nemo": open_model,
    "tar": open_model,
    "hf": open_hf_folder,
    "plan": read_plan,
    "rank file": open_rank_file,
    "common state": lambda folder: common_state(contents_of(folder), {}),
    "zarr": open_zarr,
    "nemo1": open_any,
    "megatron": open_any,
    "nemo2": open_any,
}


def put(name: str, content: bytes | str) -> Callable[[Path], None]:
    """Write a file of a .nemo folder and let its manifest vouch for it, as who made it would."""

    def poison(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
        vouch(folder, name)

    return poison


def vouch(folder: Path, name: str) -> None:
    """Bring size and hash of a file in the manifest up to date."""
    manifest = json.loads((folder / "manifest.json").read_text())
    data = (folder / name).read_bytes()
    manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def edit_json(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Change a JSON file of a folder in place; `name` may be the folder's own when it is one file."""

    def poison(path: Path) -> None:
        file = path / name if name else path
        values = json.loads(file.read_text())
        change(values)
        file.write_text(json.dumps(values))

    return poison
