"""How far two sets of scores agree: the units that both keep at a target, as numbers, a table and heat maps.

Sources of the question: reviewers of 2408.11796 asked how much the calibration set matters.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from minitron_nemo.artefacts.atomic import write_text_atomically
from minitron_nemo.errors import UserError
from minitron_nemo.importance.scores import ImportanceScores
from minitron_nemo.pruning.make_plan import make_plan
from minitron_nemo.reporting import plots
from minitron_nemo.shape.arch import ModelArch
from minitron_nemo.shape.axes import AXES, shrink


@dataclass(frozen=True)
class Overlap:
    """The share of the kept units of an axis that two scores have in common: in each layer, or once for the model.

    `chance` is what scores that know nothing of each other share on average: the part of the units that is kept.
    """

    axis: str
    ours: str
    theirs: str
    shares: tuple[float, ...]
    chance: float

    @property
    def mean(self) -> float:
        return sum(self.shares) / len(self.shares)

    @property
    def above_chance(self) -> float:
        """0: as much as by chance; 1: all."""
        return (self.mean - self.chance) / (1 - self.chance)


def overlaps(scores: Mapping[str, ImportanceScores], target: ModelArch) -> list[Overlap]:
    """Every pair of scores on every axis that was scored and that the target cuts.

    Raises UserError for scores of different models.
    """
    (first, known), *_ = scores.items()
    for name, other in scores.items():
        if other.arch != known.arch:
            raise UserError(f"{name}: scores of another model than {first}: {other.arch.describe()}")
    scored = [axis for name, axis in AXES.items() if all(name in one.by_axis for one in scores.values())]
    cut = [axis for axis in scored if axis.size(target) < axis.size(known.arch)]
    if not cut:
        raise UserError("prune.target cuts nothing that was scored: give the sizes at which kept units are compared")
    found = []
    for axis in cut:
        kept = {name: _kept(one, axis.name, target=target) for name, one in scores.items()}
        for ours, theirs in combinations(scores, 2):
            pairs = zip(kept[ours], kept[theirs], strict=True)
            shares = tuple(len(mine & other) / len(mine) for mine, other in pairs)
            found.append(Overlap(axis.name, ours, theirs, shares, axis.size(target) / axis.size(known.arch)))
    return found


def _kept(scores: ImportanceScores, axis: str, *, target: ModelArch) -> list[set[int]]:
    """Kept units of an axis in every layer of the source, or once, with nothing cut but what it hangs on."""
    related = {axis, AXES[axis].within, *(other.name for other in AXES.values() if other.within == axis)}
    alone = shrink(scores.arch, **{name: AXES[name].size(target) for name in related if name in AXES})
    return [set(row) for row in make_plan(scores, alone).keep[axis]]


def format_overlaps(found: list[Overlap]) -> str:
    """An aligned text table for a terminal."""
    rows = [("axis", "compared", "kept alike", "lowest layer", "above chance")]
    rows += [
        (one.axis, f"{one.ours} / {one.theirs}", f"{one.mean:.1%}", f"{min(one.shares):.1%}", f"{one.above_chance:.2f}")
        for one in found
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(map(str.rstrip, lines))


def write_overlaps(found: list[Overlap], output: Path) -> list[Path]:
    """Write the numbers as JSON and a heat map of each axis beside it, `NAME_AXIS.svg`; the paths."""
    write_text_atomically(output, json.dumps({"overlaps": list(_records(found))}, indent=2) + "\n")
    written = [output]
    for axis in dict.fromkeys(one.axis for one in found):
        columns = {f"{one.ours} / {one.theirs}": one.shares for one in found if one.axis == axis}
        written.append(output.with_name(f"{output.stem}_{axis}.svg"))
        write_text_atomically(written[-1], plots.standing_alone(plots.overlap(axis, columns)))
    return written


def _records(found: list[Overlap]) -> Iterator[dict[str, Any]]:
    for one in found:
        facts = {"axis": one.axis, "ours": one.ours, "theirs": one.theirs, "chance": one.chance}
        yield {**facts, "mean": one.mean, "above_chance": one.above_chance, "shares": list(one.shares)}
