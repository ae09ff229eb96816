"""The importance scores of a model: one record, and the two files it is kept in.

`scores.safetensors` has one float64 tensor per axis and layer (`hidden_size`, `num_layers`,
`ffn_hidden_size.layer_00`, `num_attention_heads.layer_00`, ...; layers from 0). `scores.json` has what the scores were
made from and a table for the eye, layers from 1 as in the paper.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from minitron_nemo.arch import ModelArch
from minitron_nemo.errors import UserError

SCHEMA_VERSION = 1
TENSORS_FILE = "scores.safetensors"
FACTS_FILE = "scores.json"
FACTS = {
    "num_samples": int,
    "seq_length": int,
    "sequence_aggregation": str,
    "batch_aggregation": str,
    "data_fingerprint": str,
}
PER_LAYER_AXES = ("ffn_hidden_size", "num_attention_heads")
AXES = ("num_layers", "hidden_size", *PER_LAYER_AXES)
AGAIN = "run estimate_importance again"


@dataclass(frozen=True, eq=False)
class ImportanceScores:
    """Scores of every prunable unit of the model `arch`: higher matters more. Float64 on CPU.

    Raises UserError when a score is missing or not a finite number.
    """

    arch: ModelArch
    hidden_size: Tensor  # [hidden_size]
    ffn_hidden_size: Tensor  # [num_layers, ffn_hidden_size]
    num_attention_heads: Tensor  # [num_layers, num_attention_heads]
    num_layers: Tensor  # [num_layers], block importance
    num_samples: int
    seq_length: int
    sequence_aggregation: str
    batch_aggregation: str
    data_fingerprint: str = ""

    def __post_init__(self) -> None:
        for axis in AXES:
            units, scores = getattr(self.arch, axis), getattr(self, axis)
            shape = (self.arch.num_layers, units) if axis in PER_LAYER_AXES else (units,)
            if tuple(scores.shape) != shape:
                raise UserError(f"importance of {axis}: shape {list(scores.shape)}, the model needs {list(shape)}")
            if not torch.isfinite(scores).all():
                raise UserError(f"importance of {axis}: not all finite; check the checkpoint's weights, estimate again")

    def tensors(self) -> dict[str, Tensor]:
        """One named tensor per axis, and per layer where an axis is ranked in each layer."""
        named = {"num_layers": self.num_layers, "hidden_size": self.hidden_size}
        for axis in PER_LAYER_AXES:
            named |= {_layer_name(axis, layer): row for layer, row in enumerate(getattr(self, axis))}
        return {name: tensor.to("cpu", torch.float64).contiguous() for name, tensor in named.items()}

    def table(self) -> list[dict[str, Any]]:
        """A row per layer, counted from 1: block importance, every head, the spread of the neurons."""
        rows = []
        for layer in range(self.arch.num_layers):
            neurons = self.ffn_hidden_size[layer]
            rows.append({
                "layer": layer + 1,
                "block_importance": _rounded(self.num_layers[layer]),
                "num_attention_heads": [_rounded(score) for score in self.num_attention_heads[layer]],
                "ffn_hidden_size": {
                    "min": _rounded(neurons.min()),
                    "median": _rounded(neurons.median()),
                    "max": _rounded(neurons.max()),
                },
            })  # fmt: skip
        return rows

    def write(self, folder: Path | str) -> None:
        """Writes both files into an existing folder."""
        facts = {
            "schema_version": SCHEMA_VERSION,
            **{name: getattr(self, name) for name in FACTS},
            "arch": self.arch.to_dict(),
            "layers": self.table(),
        }
        save_file(self.tensors(), Path(folder) / TENSORS_FILE)
        (Path(folder) / FACTS_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="ascii")


def read_scores(folder: Path | str) -> ImportanceScores:
    """The scores of a folder. Raises UserError naming the file when one is missing, damaged or does not fit."""
    facts_path, tensors_path = Path(folder) / FACTS_FILE, Path(folder) / TENSORS_FILE
    facts = _read_facts(facts_path)
    arch = ModelArch.from_dict(facts["arch"], source=str(facts_path))
    tensors = _read_tensors(tensors_path)

    def take(name: str) -> Tensor:
        if name not in tensors:
            raise UserError(f"tensor {name!r} is missing; {AGAIN}")
        return tensors[name].to(torch.float64)

    def take_layers(axis: str) -> Tensor:
        rows = [take(_layer_name(axis, layer)) for layer in range(arch.num_layers)]
        if len({tuple(row.shape) for row in rows}) != 1:
            raise UserError(f"layers of {axis} differ in shape; {AGAIN}")
        return torch.stack(rows)

    try:
        return ImportanceScores(
            arch=arch,
            num_layers=take("num_layers"),
            hidden_size=take("hidden_size"),
            ffn_hidden_size=take_layers("ffn_hidden_size"),
            num_attention_heads=take_layers("num_attention_heads"),
            **{name: facts[name] for name in FACTS},
        )
    except UserError as error:
        raise UserError(f"{tensors_path}: {error}") from None


def _layer_name(axis: str, layer: int) -> str:
    return f"{axis}.layer_{layer:02d}"


def _rounded(score: Tensor) -> float:
    return float(f"{float(score):.6g}")


def _read_facts(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({_first_line(error)}); {AGAIN}") from None
    if not isinstance(facts, dict) or facts.get("schema_version") != SCHEMA_VERSION or "arch" not in facts:
        raise UserError(f"{path}: not importance facts of schema version {SCHEMA_VERSION}; {AGAIN}")
    for name, kind in FACTS.items():
        if type(facts.get(name)) is not kind:
            raise UserError(f"{path}: {name}={facts.get(name)!r} is not of type {kind.__name__}; {AGAIN}")
    return facts


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({_first_line(error)}); {AGAIN}") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
