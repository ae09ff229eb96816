"""The importance scores of a model: one record, and the two files it is kept in.

`scores.safetensors` has one float64 tensor per axis, and per layer where every layer ranks its own units
(`hidden_size`, `num_layers`, `ffn_hidden_size.layer_00`, `num_attention_heads.layer_00`, ...; layers from 0).
`scores.json` has what the scores were made from and a table for the eye, layers from 1 as in the paper. It lists the
scored axes when they are others than the first four, and the criteria that are not the defaults.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from minitron_nemo.artefacts.strict_json import parse_json
from minitron_nemo.errors import UserError
from minitron_nemo.importance.criteria import names_of
from minitron_nemo.importance.sums import ImportanceSums, read_sums
from minitron_nemo.shape.arch import ModelArch
from minitron_nemo.shape.axes import AXES, FIRST_AXES, Axis

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
AGAIN = "run estimate_importance again"


@dataclass(frozen=True, eq=False)
class ImportanceScores:
    """Scores of every unit of the axes of the model `arch` that were scored: higher matters more. Float64 on CPU.

    `by_axis[axis]` is [num_layers, units] where every layer ranks its own units, else [units]; that of the layers is
    their block importance. Raises UserError when a score has another shape or is not a finite number.
    """

    arch: ModelArch
    by_axis: dict[str, Tensor]
    num_samples: int
    seq_length: int
    sequence_aggregation: str
    batch_aggregation: str
    data_fingerprint: str = ""
    criteria: Mapping[str, str] = field(default_factory=dict)  # of the axes that are not scored by their default

    def __post_init__(self) -> None:
        for name, scores in self.by_axis.items():
            if name not in AXES:
                raise UserError(f"importance of {name}: not a prunable axis; there are {', '.join(AXES)}")
            units = AXES[name].size(self.arch)
            shape = (self.arch.num_layers, units) if AXES[name].per_layer else (units,)
            if tuple(scores.shape) != shape:
                raise UserError(f"importance of {name}: shape {list(scores.shape)}, the model needs {list(shape)}")
            if not torch.isfinite(scores).all():
                raise UserError(f"importance of {name}: not all finite; check the checkpoint's weights, estimate again")

    def __getitem__(self, axis: str) -> Tensor:
        """The scores of an axis. Raises UserError when it was not scored."""
        if axis not in self.by_axis:
            raise UserError(f"importance of {axis}: not scored, only {', '.join(self.by_axis)}; {AGAIN}")
        return self.by_axis[axis]

    def tensors(self) -> dict[str, Tensor]:
        """One named tensor per axis, and per layer where every layer ranks its own units."""
        named: dict[str, Tensor] = {}
        for name, scores in self.by_axis.items():
            keys = _tensor_names(AXES[name], self.arch)
            named |= dict(zip(keys, scores if AXES[name].per_layer else [scores], strict=True))
        return {name: tensor.to("cpu", torch.float64).contiguous() for name, tensor in named.items()}

    def table(self) -> list[dict[str, Any]]:
        """A row per layer, counted from 1: block importance, each head, the spread of the neurons."""
        axes = [axis for name, axis in AXES.items() if name in self.by_axis]
        per_layer = [axis for axis in axes if axis.per_layer]
        columns: list[tuple[str, str, Callable[[Tensor], Any]]] = [
            *((self._layer_column, axis.name, _rounded) for axis in axes if axis.is_layers),
            *((axis.name, axis.name, _each) for axis in per_layer if axis.within is not None),
            *((axis.name, axis.name, _spread) for axis in per_layer if axis.within is None),
        ]
        return [
            {"layer": layer + 1, **{title: show(self[axis][layer]) for title, axis, show in columns}}
            for layer in range(self.arch.num_layers)
        ]

    @property
    def _layer_column(self) -> str:
        return "_".join(("layer", self.criteria["num_layers"])) if "num_layers" in self.criteria else "block_importance"

    def write(self, folder: Path | str) -> None:
        """Writes both files into an existing folder."""
        facts = {
            "schema_version": SCHEMA_VERSION,
            **{name: getattr(self, name) for name in FACTS},
            "arch": self.arch.to_dict(),
            **({} if set(self.by_axis) == set(FIRST_AXES) else {"axes": list(self.by_axis)}),
            **({"criteria": dict(self.criteria)} if self.criteria else {}),
            "layers": self.table(),
        }
        save_file(self.tensors(), Path(folder) / TENSORS_FILE)
        (Path(folder) / FACTS_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="ascii")


def scores_of(sums: ImportanceSums, batch_aggregation: str) -> ImportanceScores:
    """What sums come to by a batch aggregation."""
    return ImportanceScores(
        arch=sums.arch,
        by_axis=sums.finish(batch_aggregation),
        num_samples=sums.num_samples,
        seq_length=sums.heard.seq_length,
        sequence_aggregation=sums.sequence_aggregation,
        batch_aggregation=batch_aggregation,
        data_fingerprint=sums.heard.data,
        criteria={axis: name for axis, name in sums.names.items() if name not in names_of(axis)[:1]},
    )


def by_samples(sums: ImportanceSums, batch_aggregation: str) -> dict[str, ImportanceScores]:
    """The scores of the first samples, as far as each part goes, and of all."""
    if len(sums.parts) < 2:
        raise UserError(
            f"sums over samples {sums.samples} in one part: only sets whose size is a multiple of 8 are kept in parts, "
            "which a comparison of few samples with all needs"
        )
    return {
        f"{so_far.num_samples} samples": scores_of(so_far, batch_aggregation)
        for so_far in (sums.first(part.end) for part in sums.parts)
    }


def read_scores(folder: Path | str, *, batch_aggregation: str | None = None) -> ImportanceScores:
    """The scores of a folder; by another batch aggregation than that they were made with from its sums.

    Raises UserError naming the file when one is missing, damaged or does not fit.
    """
    if (
        batch_aggregation is not None
        and batch_aggregation != _read_facts(Path(folder) / FACTS_FILE)["batch_aggregation"]
    ):
        return scores_of(read_sums(folder), batch_aggregation)
    facts_path, tensors_path = Path(folder) / FACTS_FILE, Path(folder) / TENSORS_FILE
    facts = _read_facts(facts_path)
    arch = ModelArch.from_dict(facts["arch"], source=str(facts_path))
    tensors = _read_tensors(tensors_path)
    try:
        return ImportanceScores(
            arch=arch,
            by_axis=_by_axis(tensors, facts.get("axes", FIRST_AXES), arch=arch),
            **{name: facts[name] for name in FACTS},
            criteria=facts.get("criteria", {}),
        )
    except UserError as error:
        raise UserError(f"{tensors_path}: {error}") from None


def _by_axis(tensors: Mapping[str, Tensor], names: Iterable[str], *, arch: ModelArch) -> dict[str, Tensor]:
    """The scores of these axes; refuses a tensor too few or too many by its name."""
    keys = {name: _tensor_names(AXES[name], arch) for name in names}
    wanted = [key for axis_keys in keys.values() for key in axis_keys]
    if missing := [key for key in wanted if key not in tensors]:
        raise UserError(f"tensor {missing[0]!r} is missing; {AGAIN}")
    if unknown := sorted(set(tensors) - set(wanted)):
        raise UserError(f"tensor {unknown[0]!r} is of no axis of this model; {AGAIN}")
    by_axis = {}
    for name, axis_keys in keys.items():
        rows = [tensors[key].to(torch.float64) for key in axis_keys]
        if len({tuple(row.shape) for row in rows}) != 1:
            raise UserError(f"layers of {name} differ in shape; {AGAIN}")
        by_axis[name] = torch.stack(rows) if AXES[name].per_layer else rows[0]
    return by_axis


def _tensor_names(axis: Axis, arch: ModelArch) -> list[str]:
    """Where the file keeps the scores of an axis."""
    return [f"{axis.name}.layer_{i:02d}" for i in range(arch.num_layers)] if axis.per_layer else [axis.name]


def _each(scores: Tensor) -> list[float]:
    return [_rounded(score) for score in scores]


def _spread(scores: Tensor) -> dict[str, float]:
    return {"min": _rounded(scores.min()), "median": _rounded(scores.median()), "max": _rounded(scores.max())}


def _rounded(score: Tensor) -> float:
    return float(f"{float(score):.6g}")


def _read_facts(path: Path) -> dict[str, Any]:
    try:
        facts = parse_json(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({_first_line(error)}); {AGAIN}") from None
    if not isinstance(facts, dict) or facts.get("schema_version") != SCHEMA_VERSION or "arch" not in facts:
        raise UserError(f"{path}: not importance facts of schema version {SCHEMA_VERSION}; {AGAIN}")
    for name, kind in FACTS.items():
        if type(facts.get(name)) is not kind:
            raise UserError(f"{path}: {name}={facts.get(name)!r} is not of type {kind.__name__}; {AGAIN}")
    criteria = facts.get("criteria", {})
    if not isinstance(criteria, dict) or not all(isinstance(name, str) for name in criteria.values()):
        raise UserError(f"{path}: criteria={criteria!r}: must name a criterion for each axis; {AGAIN}")
    axes = facts.get("axes", list(FIRST_AXES))
    if not isinstance(axes, list) or not all(isinstance(axis, str) and axis in AXES for axis in axes):
        raise UserError(f"{path}: axes={axes!r}: allowed are {', '.join(AXES)}; {AGAIN}")
    return facts


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({_first_line(error)}); {AGAIN}") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
