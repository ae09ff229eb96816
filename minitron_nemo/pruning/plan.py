"""The pruning plan: which units of the source stay, for every axis; a file that a person can read.

Indices count from 0 and ascend, so a pruned model keeps the order of its source. Width is cut evenly: every kept
layer has the same sizes, and every query group keeps the same number of heads, each layer choosing its own units.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitron_nemo.arch import AXES, ModelArch
from minitron_nemo.errors import UserError
from minitron_nemo.importance.scores import ImportanceScores

SCHEMA_VERSION = 1
UNPRUNED_AXES = ("vocab_size",)

Units = tuple[int, ...]


@dataclass(frozen=True)
class PruningPlan:
    """Kept units of `source` that make `target`. Raises UserError when they do not."""

    source: ModelArch
    target: ModelArch
    layers: Units  # [target.num_layers] kept layers of the source
    hidden_size: Units  # [target.hidden_size], the same in every layer
    ffn_hidden_size: tuple[Units, ...]  # for each kept layer
    num_attention_heads: tuple[Units, ...]  # for each kept layer; heads over all groups

    def __post_init__(self) -> None:
        if self.target != _shrunk(self.source, self.target):
            raise UserError(f"plan: the target differs from its source in more than {', '.join(AXES)}")
        self._check_units("num_layers", self.layers)
        self._check_units("hidden_size", self.hidden_size)
        for axis in ("ffn_hidden_size", "num_attention_heads"):
            rows = getattr(self, axis)
            if len(rows) != self.target.num_layers:
                raise UserError(f"plan: {axis} lists {len(rows)} layers, the target has {self.target.num_layers}")
            for row in rows:
                self._check_units(axis, row)
        for row in self.num_attention_heads:
            groups = [head // self.source.heads_per_group for head in row]
            if any(groups.count(group) != self.target.heads_per_group for group in range(self.source.num_query_groups)):
                raise UserError(
                    f"plan: num_attention_heads keeps {list(row)}, but every query group of "
                    f"{self.source.heads_per_group} heads must keep {self.target.heads_per_group}"
                )

    def _check_units(self, axis: str, units: Units) -> None:
        size, wanted = getattr(self.source, axis), getattr(self.target, axis)
        if len(units) != wanted:
            raise UserError(f"plan: {axis} keeps {len(units)} units, the target has {wanted}")
        ascending = all(a < b for a, b in zip(units, units[1:], strict=False))
        if not ascending or units[0] < 0 or units[-1] >= size:
            raise UserError(f"plan: {axis} must list units of 0..{size - 1} in ascending order, each once")

    def keep(self, axis: str, *, layer: int | None) -> Units | None:
        """Kept units of an axis in kept layer `layer`; None where everything stays. KeyError for an unknown axis."""
        if axis in UNPRUNED_AXES:
            return None
        if axis == "hidden_size":
            return self.hidden_size
        if axis in ("ffn_hidden_size", "num_attention_heads") and layer is not None:
            rows: tuple[Units, ...] = getattr(self, axis)
            return rows[layer]
        raise KeyError(axis)

    def then(self, second: "PruningPlan") -> "PruningPlan":
        """The one plan that does what this one and then `second` do."""
        second.check_source(self.target)

        def compose(rows: tuple[Units, ...], second_rows: tuple[Units, ...]) -> tuple[Units, ...]:
            pairs = zip(second.layers, second_rows, strict=True)
            return tuple(tuple(rows[layer][unit] for unit in units) for layer, units in pairs)

        return PruningPlan(
            source=self.source,
            target=second.target,
            layers=tuple(self.layers[layer] for layer in second.layers),
            hidden_size=tuple(self.hidden_size[unit] for unit in second.hidden_size),
            ffn_hidden_size=compose(self.ffn_hidden_size, second.ffn_hidden_size),
            num_attention_heads=compose(self.num_attention_heads, second.num_attention_heads),
        )

    def check_source(self, arch: ModelArch, *, name: str = "plan.json") -> None:
        """Refuses a checkpoint of another shape than the one the plan was made for."""
        fields = [field.name for field in dataclasses.fields(ModelArch)]
        differing = [name for name in fields if getattr(self.source, name) != getattr(arch, name)]
        if differing:
            ours, theirs = (", ".join(f"{f}={getattr(shape, f)}" for f in differing) for shape in (self.source, arch))
            raise UserError(f"{name} was made for {ours}, the checkpoint is {theirs}; make a plan from this checkpoint")

    def dropped_layers(self) -> list[int]:
        """Layers of the source that go, counted from 1 as in the paper."""
        return [number for number in range(1, self.source.num_layers + 1) if number - 1 not in self.layers]

    def describe(self) -> str:
        """What changes, on one line."""
        changes = [
            f"{axis} {getattr(self.source, axis)} -> {getattr(self.target, axis)}"
            for axis in AXES
            if getattr(self.source, axis) != getattr(self.target, axis)
        ]
        if dropped := self.dropped_layers():
            changes.append(f"layers dropped, counted from 1: {', '.join(map(str, dropped))}")
        return "; ".join(changes) or "nothing pruned"

    def to_json(self) -> str:
        """The plan as JSON, each list of indices on one line."""

        def rows(values: Sequence[Units]) -> str:
            return "[\n" + ",\n".join(f"      {json.dumps(row)}" for row in values) + "\n    ]"

        keep = {
            "num_layers": json.dumps(self.layers),
            "hidden_size": json.dumps(self.hidden_size),
            "ffn_hidden_size": rows(self.ffn_hidden_size),
            "num_attention_heads": rows(self.num_attention_heads),
        }
        fields = {
            "schema_version": str(SCHEMA_VERSION),
            "source": json.dumps(self.source.to_dict()),
            "target": json.dumps(self.target.to_dict()),
            "keep": "{\n" + ",\n".join(f'    "{axis}": {units}' for axis, units in keep.items()) + "\n  }",
        }
        return "{\n" + ",\n".join(f'  "{name}": {value}' for name, value in fields.items()) + "\n}\n"

    def write(self, path: Path | str) -> None:
        """Write the plan where a person can read it."""
        Path(path).write_text(self.to_json(), encoding="ascii")


def identity(arch: ModelArch) -> PruningPlan:
    """The plan that keeps everything."""
    return PruningPlan(
        source=arch,
        target=arch,
        layers=tuple(range(arch.num_layers)),
        hidden_size=tuple(range(arch.hidden_size)),
        ffn_hidden_size=(tuple(range(arch.ffn_hidden_size)),) * arch.num_layers,
        num_attention_heads=(tuple(range(arch.num_attention_heads)),) * arch.num_layers,
    )


def make_plan(scores: ImportanceScores, target: ModelArch, *, drop_layers: Sequence[int] | None = None) -> PruningPlan:
    """The plan that keeps the most important units of `scores.arch`; of equals, the lower index stays.

    `drop_layers` counts from 1 as in the paper; unset, the layers of lowest block importance go. Channels, neurons
    and heads are ranked by the scores of the whole source (single shot, as paper 1 found best).
    """
    source = scores.arch
    if target != _shrunk(source, target):
        raise UserError(f"target: pruning changes only {', '.join(AXES)} of the model the importance was estimated on")
    layers = _kept_layers(scores, target.num_layers, drop_layers)
    return PruningPlan(
        source=source,
        target=target,
        layers=layers,
        hidden_size=top_units(scores.hidden_size, target.hidden_size),
        ffn_hidden_size=tuple(top_units(scores.ffn_hidden_size[layer], target.ffn_hidden_size) for layer in layers),
        num_attention_heads=tuple(_top_heads(scores.num_attention_heads[layer], source, target) for layer in layers),
    )


def top_units(scores: Tensor, count: int) -> Units:
    """The `count` highest of `scores` [units], lower index first among equals, ascending."""
    ranked = torch.sort(scores, descending=True, stable=True).indices
    return tuple(sorted(ranked[:count].tolist()))


def _top_heads(scores: Tensor, source: ModelArch, target: ModelArch) -> Units:
    """Ranked inside each query group, so that every key/value head keeps as many queries."""
    per_group = scores.unflatten(0, (source.num_query_groups, source.heads_per_group))
    return tuple(
        group * source.heads_per_group + head
        for group, row in enumerate(per_group)
        for head in top_units(row, target.heads_per_group)
    )


def _kept_layers(scores: ImportanceScores, count: int, drop_layers: Sequence[int] | None) -> Units:
    if drop_layers is None:
        return top_units(scores.num_layers, count)
    total = scores.arch.num_layers
    kept = tuple(layer for layer in range(total) if layer + 1 not in drop_layers)
    if len(kept) != count or len(drop_layers) != total - count:
        raise UserError(
            f"drop_layers={list(drop_layers)}: layers are counted from 1 to {total}, each at most once, "
            f"and {total - count} must go to leave the target's {count}"
        )
    return kept


def _shrunk(source: ModelArch, target: ModelArch) -> ModelArch:
    return source.shrink(**{axis: getattr(target, axis) for axis in AXES})


def read_plan(path: Path | str) -> PruningPlan:
    """The plan in a file. Raises UserError naming the file when it is damaged or contradicts itself."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: cannot be read as a plan ({reason}); give the plan.json that prune wrote") from None
    try:
        _check_fields(values, {"schema_version", "source", "target", "keep"}, "plan")
        if values["schema_version"] != SCHEMA_VERSION:
            raise UserError(f"schema_version={values['schema_version']!r}, this version reads {SCHEMA_VERSION}")
        keep = values["keep"]
        _check_fields(keep, set(AXES), "keep")
        return PruningPlan(
            source=ModelArch.from_dict(values["source"], source="source"),
            target=ModelArch.from_dict(values["target"], source="target"),
            layers=_units(keep["num_layers"], "num_layers"),
            hidden_size=_units(keep["hidden_size"], "hidden_size"),
            ffn_hidden_size=_rows(keep["ffn_hidden_size"], "ffn_hidden_size"),
            num_attention_heads=_rows(keep["num_attention_heads"], "num_attention_heads"),
        )
    except UserError as error:
        raise UserError(f"{path}: {error}; make the plan again or correct the file") from None


def _check_fields(values: Any, fields: set[str], name: str) -> None:
    if not isinstance(values, dict) or set(values) != fields:
        raise UserError(f"{name} must have exactly the fields {', '.join(sorted(fields))}")


def _units(values: Any, axis: str) -> Units:
    if not isinstance(values, list) or any(type(unit) is not int for unit in values):
        raise UserError(f"keep.{axis} must be a list of whole numbers")
    return tuple(values)


def _rows(values: Any, axis: str) -> tuple[Units, ...]:
    if not isinstance(values, list):
        raise UserError(f"keep.{axis} must be a list with one list of whole numbers for each kept layer")
    return tuple(_units(row, axis) for row in values)
