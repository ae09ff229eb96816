"""The pruning plan: which units of the source stay, for every axis; a file that a person can read.

Units count from 0 and ascend, so a pruned model keeps the order of its source. Width is cut evenly: every kept layer
has the same sizes, and every query group keeps the same number of heads, each layer choosing its own units.
"""

import dataclasses
import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_nemo.artefacts.contents import Contents, FolderContents, Place, contents_of, has, read_small
from minitron_nemo.artefacts.strict_json import parse_json
from minitron_nemo.errors import UserError
from minitron_nemo.shape.arch import ModelArch
from minitron_nemo.shape.axes import AXES, FIRST_AXES, Axis, blocks_first, shrink

SCHEMA_VERSION = 1
PLAN_FILE = "plan.json"  # of a pruned model

Units = tuple[int, ...]
Rows = tuple[Units, ...]


@dataclass(frozen=True)
class PruningPlan:
    """Kept units of `source` that make `target`. Raises UserError when they do not.

    `keep` has every axis of the registry: one row of units of the source for each kept layer where every layer keeps
    its own, else one row for the model.
    """

    source: ModelArch
    target: ModelArch
    keep: dict[str, Rows]

    def __post_init__(self) -> None:
        if self.target != shrunk(self.source, self.target):
            raise UserError(f"plan: the target differs from its source in more than {', '.join(AXES)}")
        _check_fields(self.keep, AXES, "plan: keep")
        for axis in blocks_first():
            rows = self.keep[axis.name]
            if len(rows) != (wanted := num_rows(axis, self.target)):
                found = "layers, the target has" if axis.per_layer else "rows of units, there must be"
                raise UserError(f"plan: {axis.name} lists {len(rows)} {found} {wanted}")
            for layer, row in enumerate(rows):
                within = None if axis.within not in AXES else self.units(axis.within, layer)
                axis.check_units(row, source=self.source, target=self.target, within=within)

    @property
    def layers(self) -> Units:
        """Kept layers of the source."""
        return self.keep["num_layers"][0]

    def units(self, axis: str, layer: int | None = None) -> Units:
        """Kept units of an axis in kept layer `layer`. KeyError where the plan keeps none or needs a layer."""
        if axis not in self.keep:
            raise KeyError(f"{axis!r} is in no plan")
        if not AXES[axis].per_layer:
            return self.keep[axis][0]
        if layer is None:
            raise KeyError(f"every layer keeps its own units of {axis!r}")
        return self.keep[axis][layer]

    def then(self, second: "PruningPlan") -> "PruningPlan":
        """The one plan that does what this one and then `second` do."""
        second.check_source(self.target)
        keep = {}
        for name, axis in AXES.items():
            layers = second.layers if axis.per_layer else [None]
            chosen = zip(layers, second.keep[name], strict=True)
            keep[name] = tuple(_units_of(self.units(name, layer), row) for layer, row in chosen)
        return PruningPlan(self.source, second.target, keep)

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
        sizes = {name: (axis.size(self.source), axis.size(self.target)) for name, axis in AXES.items()}
        changes = [f"{name} {before} -> {after}" for name, (before, after) in sizes.items() if before != after]
        if dropped := self.dropped_layers():
            changes.append(f"layers dropped, counted from 1: {', '.join(map(str, dropped))}")
        return "; ".join(changes) or "nothing pruned"

    def to_json(self) -> str:
        """The plan as JSON, each list of units on one line."""
        keep = {
            name: _rows_json(self.keep[name]) if axis.per_layer else json.dumps(self.keep[name][0])
            for name, axis in AXES.items()
            if name in FIRST_AXES or axis.size(self.source) != axis.size(self.target)
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


def shrunk(source: ModelArch, target: ModelArch) -> ModelArch:
    """The source with the target's sizes: the target, when pruning can make it. UserError for a size it cannot make."""
    return shrink(source, **{name: axis.size(target) for name, axis in AXES.items()})


def num_rows(axis: Axis, target: ModelArch) -> int:
    """Rows of units that a plan has of an axis."""
    return target.num_layers if axis.per_layer else 1


def everything(axis: Axis, *, source: ModelArch, target: ModelArch) -> Rows:
    """The rows of an axis that keep all of it."""
    return (tuple(range(axis.size(source))),) * num_rows(axis, target)


def identity(arch: ModelArch) -> PruningPlan:
    """The plan that keeps everything."""
    return PruningPlan(arch, arch, {name: everything(axis, source=arch, target=arch) for name, axis in AXES.items()})


def of_words(arch: ModelArch, kept: Units) -> PruningPlan:
    """The plan that keeps these words, ascending, and everything else."""
    whole = identity(arch)
    return PruningPlan(arch, shrink(arch, vocab_size=len(kept)), whole.keep | {"vocab_size": (kept,)})


def read_plan(path: Path | str) -> PruningPlan:
    """The plan in a file. Raises UserError naming the file when it is damaged or contradicts itself.

    An axis registered after the file was written keeps everything.
    """
    return _plan_in(FolderContents(Path(path).parent), Path(path).name)


def plan_of_model(model: Place) -> PruningPlan | None:
    """The plan that a pruned model was cut by, None for a model that carries none."""
    contents = contents_of(model)
    return _plan_in(contents, PLAN_FILE) if has(contents, PLAN_FILE) else None


def _plan_in(contents: Contents, name: str) -> PruningPlan:
    path = contents.path / name
    try:
        values = parse_json(read_small(contents, name))
    except (OSError, ValueError, RecursionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: cannot be read as a plan ({reason}); give the plan.json that prune wrote") from None
    try:
        _check_fields(values, ("schema_version", "source", "target", "keep"), "plan")
        if values["schema_version"] != SCHEMA_VERSION:
            raise UserError(f"schema_version={values['schema_version']!r}, this version reads {SCHEMA_VERSION}")
        _check_fields(values["keep"], FIRST_AXES, "keep", optional=AXES)
        source, target = (ModelArch.from_dict(values[name], source=name) for name in ("source", "target"))
        keep = {name: everything(axis, source=source, target=target) for name, axis in AXES.items()}
        keep |= {name: _read_rows(rows, AXES[name]) for name, rows in values["keep"].items()}
        return PruningPlan(source, target, keep)
    except UserError as error:
        raise UserError(f"{path}: {error}; make the plan again or correct the file") from None


def _units_of(units: Units, places: Units) -> Units:
    return tuple(units[place] for place in places)


def _check_fields(values: Any, fields: Collection[str], name: str, *, optional: Collection[str] = ()) -> None:
    """Refuse what is no mapping with all of `fields` and nothing else, of `optional` abstaining."""
    if not isinstance(values, dict) or not set(fields) <= set(values) <= {*fields, *optional}:
        raise UserError(f"{name} must have exactly the fields {', '.join(sorted(fields))}")


def _rows_json(rows: Rows) -> str:
    return "[\n" + ",\n".join(f"      {json.dumps(row)}" for row in rows) + "\n    ]"


def _read_rows(values: Any, axis: Axis) -> Rows:
    if not axis.per_layer:
        return (_read_units(values, axis),)
    if not isinstance(values, list):
        raise UserError(f"keep.{axis.name} must be a list with one list of whole numbers for each kept layer")
    return tuple(_read_units(row, axis) for row in values)


def _read_units(values: Any, axis: Axis) -> Units:
    if not isinstance(values, list) or any(type(unit) is not int for unit in values):
        raise UserError(f"keep.{axis.name} must be a list of whole numbers")
    return tuple(values)
