"""The sums that importance follows from: one file that any layout writes alike, that any job reads, that adds up.

`sums.safetensors` has one float64 tensor for each site of each axis and each part, as in
`hidden_size.input_layernorm.000000`: what was heard there in all layers of the whole model over the part's samples,
[layers, ...] (one row where a site is heard once). Parts are stretches of the calibration set that follow each other,
numbered from 0 and cut where an eighth, a quarter and a half of the set end. The facts (what was heard, how, on which
samples) are JSON in the file's metadata.

Shapes: L layers, or 1; M = 4 moments, U units.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minitron_nemo.artefacts.strict_json import parse_json
from minitron_nemo.errors import UserError
from minitron_nemo.importance.criteria import Criterion, chosen
from minitron_nemo.importance.estimators import AGGREGATIONS
from minitron_nemo.shape.arch import ModelArch
from minitron_nemo.shape.axes import AXES

SCHEMA_VERSION = 1
SUMS_FILE = "sums.safetensors"
AGAIN = "run estimate_importance again"

Tables = dict[str, tuple[Tensor, ...]]  # axis -> a table for each site of its criterion, in its order


@dataclass(frozen=True)
class Heard:
    """What was heard: SHA-256 of all tokens of the calibration set, of the tokenizer and of the model's manifest."""

    data: str
    set_samples: int  # of the whole set, of which a job may have taken a part
    seq_length: int
    tokenizer: str = ""
    model: str = ""
    precision: str = ""


@dataclass(frozen=True, eq=False)
class Part:
    """The tables of samples `first` to `end` (not included) of the calibration set, counted from 0."""

    first: int
    end: int
    tables: Tables

    def then(self, other: "Part") -> "Part":
        """One part of both, `other` being the samples right after this one's."""
        tables = {
            axis: tuple(mine + theirs for mine, theirs in zip(ours, other.tables[axis], strict=True))
            for axis, ours in self.tables.items()
        }
        return Part(self.first, other.end, tables)


@dataclass(frozen=True, eq=False)
class ImportanceSums:
    """Sums over samples, from which the scores of every batch aggregation follow. Float64 on CPU.

    `criteria[axis]` is the criterion that the axis was heard for; the file has its name. Raises UserError when a table
    is not of the model's shape or not finite, or when parts overlap.
    """

    arch: ModelArch
    criteria: dict[str, Criterion]
    sequence_aggregation: str
    heard: Heard
    parts: tuple[Part, ...] = ()

    def __post_init__(self) -> None:
        for earlier, later in pairwise(self.parts):
            if earlier.end > later.first:
                raise UserError(
                    f"samples {later.first}..{min(earlier.end, later.end) - 1} of the calibration set are in it twice"
                )
        for axis, criterion in self.criteria.items():
            for part in self.parts:
                _check_tables(axis, part.tables[axis], criterion=criterion, arch=self.arch)

    @property
    def names(self) -> dict[str, str]:
        """The name of each axis' criterion."""
        return {axis: criterion.name for axis, criterion in self.criteria.items()}

    @property
    def num_samples(self) -> int:
        return sum(part.end - part.first for part in self.parts)

    @property
    def samples(self) -> str:
        """The samples it holds, in words: `0..127, 256..511`."""
        spans: list[list[int]] = []
        for part in self.parts:
            if spans and spans[-1][1] == part.first:
                spans[-1][1] = part.end
            else:
                spans.append([part.first, part.end])
        return ", ".join(f"{first}..{end - 1}" for first, end in spans) or "none"

    def add(self, part: Part) -> "ImportanceSums":
        """These sums and those of samples right after the last, or of a later stretch."""
        last = self.parts[-1] if self.parts else None
        if last is not None and last.end == part.first and last.end not in eighths(self.heard.set_samples):
            return dataclasses.replace(self, parts=(*self.parts[:-1], last.then(part)))
        return dataclasses.replace(self, parts=(*self.parts, part))

    def first(self, samples: int) -> "ImportanceSums":
        """The sums of the first parts, up to sample `samples` of the set, which must be where a part ends."""
        parts = tuple(part for part in self.parts if part.end <= samples)
        if not parts or parts[-1].end != samples:
            ends = ", ".join(str(part.end) for part in self.parts)
            raise UserError(f"no part ends at sample {samples}: parts end at {ends}")
        return dataclasses.replace(self, parts=parts)

    def finish(self, batch_aggregation: str) -> dict[str, Tensor]:
        """The scores of every axis, by its criterion."""
        if not self.parts:
            raise UserError(f"sums over no samples have no scores; {AGAIN}")
        whole = self.parts[0]
        for part in self.parts[1:]:
            whole = whole.then(part)
        return {
            axis: criterion.scores(whole.tables[axis], batch_aggregation, self.arch)
            for axis, criterion in self.criteria.items()
        }

    def write(self, folder: Path | str) -> None:
        """Write the file into an existing folder."""
        facts = {
            "schema_version": SCHEMA_VERSION,
            "arch": self.arch.to_dict(),
            "criteria": self.names,
            "sites": {axis: list(names) for axis, names in _site_names(self.criteria).items()},
            "sequence_aggregation": self.sequence_aggregation,
            "heard": dataclasses.asdict(self.heard),
            "samples": self.num_samples,
            "tokens": self.num_samples * self.heard.seq_length,
            "parts": [[part.first, part.end] for part in self.parts],
        }
        tensors = {
            key: table.contiguous()
            for number, part in enumerate(self.parts)
            for key, table in zip(_keys(self.criteria, number), _flat(part.tables), strict=True)
        }
        save_file(tensors, Path(folder) / SUMS_FILE, metadata={"facts": json.dumps(facts)})


def eighths(set_samples: int) -> tuple[int, ...]:
    """Where a set is cut: after an eighth, a quarter and a half of it; a set that has no eighths stays whole."""
    return () if set_samples % 8 else (set_samples // 8, set_samples // 4, set_samples // 2)


def stretches(samples: range, *, set_samples: int, at_most: int) -> list[range]:
    """The samples of a job in stretches of `at_most`, cut at multiples of that and where the set is cut.

    The cuts depend on the set and not on the job, so that jobs over parts of a set and one over all of it add up the
    same numbers in the same order where the jobs meet at a cut.
    """
    cuts = {*range(0, samples.stop, at_most), *eighths(set_samples), samples.stop}
    inside = [samples.start, *sorted(cut for cut in cuts if samples.start < cut <= samples.stop)]
    return [range(first, end) for first, end in pairwise(inside)]


def merged(named: Mapping[str, ImportanceSums]) -> ImportanceSums:
    """The sums of several jobs, by the name of their folder, added up.

    They are those of one job over all of the samples: bit for bit where jobs meet at a cut of the set, else to the
    rounding of float64. Raises UserError, naming the folder, for sums of another model, other data, another tokenizer,
    precision, criterion or sequence aggregation, and for samples that would count twice.
    """
    (name, first), *others = named.items()
    for other_name, other in others:
        for what, ours, theirs in _comparable(first, other):
            if ours != theirs:
                raise UserError(
                    f"{other_name}: {what} {_short(theirs)}, {name} has {_short(ours)}: only sums of the same model, "
                    "data and criteria add up"
                )
    for index, (a_name, a) in enumerate(named.items()):
        for b_name, b in list(named.items())[index + 1 :]:
            _refuse_overlap((a_name, a), (b_name, b))
    parts = sorted((part for sums in named.values() for part in sums.parts), key=lambda part: part.first)
    whole = dataclasses.replace(first, parts=())
    for part in parts:
        whole = whole.add(part)
    return whole


def _comparable(a: ImportanceSums, b: ImportanceSums) -> Iterable[tuple[str, Any, Any]]:
    for field in dataclasses.fields(ModelArch):
        yield f"model of {field.name}", getattr(a.arch, field.name), getattr(b.arch, field.name)
    yield "model", a.heard.model, b.heard.model
    yield "tokenizer", a.heard.tokenizer, b.heard.tokenizer
    yield "calibration set of samples", a.heard.set_samples, b.heard.set_samples
    yield "samples of tokens", a.heard.seq_length, b.heard.seq_length
    yield "calibration data", a.heard.data, b.heard.data
    yield "precision", a.heard.precision, b.heard.precision
    yield "sequence_aggregation", a.sequence_aggregation, b.sequence_aggregation
    for axis in {**a.names, **b.names}:
        yield f"criterion of {axis}", a.names.get(axis), b.names.get(axis)


def _short(value: Any) -> str:
    """A value for a message, a hash by its first letters."""
    return f"{value[:12]}" if isinstance(value, str) and len(value) == 64 else repr(value)


def _refuse_overlap(ours: tuple[str, ImportanceSums], theirs: tuple[str, ImportanceSums]) -> None:
    for a in ours[1].parts:
        for b in theirs[1].parts:
            if (low := max(a.first, b.first)) < (high := min(a.end, b.end)):
                raise UserError(
                    f"{theirs[0]}: samples {low}..{high - 1} of the calibration set are in {ours[0]} too and would "
                    "count twice; give jobs over different samples"
                )


def read_sums(folder: Path | str) -> ImportanceSums:
    """The sums in a folder of scores. Raises UserError naming the file when it is missing, damaged or does not fit."""
    path = Path(folder) / SUMS_FILE
    if not path.is_file():
        raise UserError(f"{path}: not there: only scores that were made with their sums can be added up or finished "
                        f"anew; {AGAIN}")  # fmt: skip
    try:
        with safe_open(path, framework="pt") as file:
            facts = parse_json((file.metadata() or {}).get("facts", "null"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: cannot be read ({reason}); {AGAIN}") from None
    try:
        return _from_file(facts, tensors)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _from_file(facts: Any, tensors: Mapping[str, Tensor]) -> ImportanceSums:
    _check_facts(facts)
    criteria, parts = chosen(facts["criteria"], only=facts["criteria"]), facts["parts"]
    if facts["sites"] != {axis: list(names) for axis, names in _site_names(criteria).items()}:
        raise UserError(f"was heard at other sites than this version's criteria have; {AGAIN}")
    wanted = [key for number in range(len(parts)) for key in _keys(criteria, number)]
    if missing := [key for key in wanted if key not in tensors]:
        raise UserError(f"tensor {missing[0]!r} is missing; {AGAIN}")
    if unknown := sorted(set(tensors) - set(wanted)):
        raise UserError(f"tensor {unknown[0]!r} is of no site of these criteria; {AGAIN}")
    made = []
    for number, (first, end) in enumerate(parts):
        keys = iter(_keys(criteria, number))
        tables = {axis: tuple(tensors[next(keys)] for _ in names) for axis, names in facts["sites"].items()}
        made.append(Part(first, end, tables))
    return ImportanceSums(
        arch=ModelArch.from_dict(facts["arch"], source="arch"),
        criteria=criteria,
        sequence_aggregation=facts["sequence_aggregation"],
        heard=Heard(**facts["heard"]),
        parts=tuple(made),
    )


def _check_facts(facts: Any) -> None:
    """Refuse facts that are not of the form that `write` gives them."""
    if not isinstance(facts, dict) or facts.get("schema_version") != SCHEMA_VERSION:
        raise UserError(f"not sums of schema version {SCHEMA_VERSION}; {AGAIN}")
    heard, kinds = facts.get("heard"), {field.name: field.type for field in dataclasses.fields(Heard)}
    right = isinstance(heard, dict) and {name: type(value) for name, value in heard.items()} == kinds
    criteria, parts = facts.get("criteria"), facts.get("parts")
    set_samples = heard["set_samples"] if isinstance(heard, dict) and right else 0
    right = right and isinstance(criteria, dict) and all(isinstance(name, str) for name in criteria.values())
    right = right and isinstance(facts.get("arch"), dict) and facts.get("sequence_aggregation") in AGGREGATIONS
    right = right and isinstance(parts, list) and all(_is_part(part, set_samples) for part in parts)
    if not right:
        raise UserError(f"its facts are damaged; {AGAIN}")
    chosen(criteria, only=criteria)  # refuses what is not registered here


def _is_part(part: Any, set_samples: int) -> bool:
    pair = isinstance(part, list) and [type(number) for number in part] == [int, int]
    return pair and 0 <= part[0] < part[1] <= set_samples


def _check_tables(axis: str, tables: Sequence[Tensor], *, criterion: Criterion, arch: ModelArch) -> None:
    for site, table, shape in zip(criterion.sites, tables, criterion.shapes(arch), strict=True):
        if tuple(table.shape) != shape or table.dtype != torch.float64:
            raise UserError(
                f"sums of {axis} at {site.name}: {table.dtype} {list(table.shape)}, the model needs torch.float64 "
                f"{list(shape)}; {AGAIN}"
            )
        if not torch.isfinite(table).all():
            raise UserError(f"sums of {axis} at {site.name}: not all finite; check the checkpoint's weights, {AGAIN}")


def _site_names(criteria: Mapping[str, Criterion]) -> dict[str, tuple[str, ...]]:
    return {axis: tuple(site.name for site in criteria[axis].sites) for axis in AXES if axis in criteria}


def _keys(criteria: Mapping[str, Criterion], number: int) -> list[str]:
    """Where the file keeps the tables of a part."""
    return [f"{axis}.{site}.{number:06d}" for axis, sites in _site_names(criteria).items() for site in sites]


def _flat(tables: Tables) -> list[Tensor]:
    return [table for axis in AXES if axis in tables for table in tables[axis]]
