"""Scores of contiguous blocks of layers: what happens to the model when a block goes. A folder that prune reads.

A block is a `range` of layers counted from 0; files and messages count layers from 1 as the papers do. Measures:

    cosine    1 - mean cosine between what enters and what leaves the block (2403.03853; 2403.17887)
    lm_loss   cross-entropy of the language model without the block, in nats (2407.14679; 2408.11796)
    nmse      squared error of the final hidden states without the block over their squared norm (2511.16664)
    task      accuracy without the block, mean over the tasks (2408.11796: Winogrande)

Of the first three the lowest value marks the block to drop, of the last the highest.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minitron_nemo.artefacts.foreign_json import read_json_object
from minitron_nemo.errors import UserError
from minitron_nemo.shape.arch import ModelArch

SCHEMA_VERSION = 1
FILE = "blocks.json"
COSINE, LM_LOSS, NMSE, TASK = MEASURES = ("cosine", "lm_loss", "nmse", "task")
AGAIN = "run score_blocks again"

# By length: the value of each block of that length, in the order of their first layers.
Values = dict[int, list[float]]


def blocks_of(num_layers: int, lengths: Sequence[int]) -> list[range]:
    """Every block of each of these lengths, in order of length and then of first layer.

    Raises UserError for a length that leaves no layer.
    """
    for length in lengths:
        if not 1 <= length < num_layers:
            raise UserError(
                f"score_blocks.lengths={list(lengths)}: a block of a model of {num_layers} layers has 1 to "
                f"{num_layers - 1} of them"
            )
    return [range(start, start + length) for length in lengths for start in range(num_layers - length + 1)]


def layer_evaluations(num_layers: int, lengths: Sequence[int]) -> int:
    """Layers evaluated for each micro-batch: one whole pass, and of each block only the layers after it.

        L + sum over lengths n of (L - n)(L - n + 1) / 2

    Passes of the cut models would take (L - n)(L - n + 1) for each length.
    """
    return num_layers + sum((num_layers - n) * (num_layers - n + 1) // 2 for n in lengths)


@dataclass(frozen=True)
class BlockScores:
    """Scores of blocks of the model `arch`, by measure and length; cosine has every length, the others `lengths`.

    `whole` has the measures of the uncut model that are not zero by definition. `tasks` says of each task what was
    measured: form, examples, accuracies. `facts` are those of the run: samples, tokens, fingerprints. Raises
    UserError when values are missing, too many or not finite.
    """

    arch: ModelArch
    lengths: list[int]
    values: dict[str, Values]
    whole: dict[str, float] = field(default_factory=dict)
    tasks: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        total = self.arch.num_layers
        for measure, by_length in self.values.items():
            if measure not in MEASURES:
                raise UserError(f"{measure}: no measure of blocks; there are {', '.join(MEASURES)}")
            for length, values in by_length.items():
                if not 1 <= length <= total or len(values) != total - length + 1:
                    raise UserError(
                        f"{measure} has {len(values)} blocks of {length} layers; a model of {total} has "
                        f"{max(total - length + 1, 0)}"
                    )
                if not all(math.isfinite(value) for value in values):
                    raise UserError(
                        f"{measure} of blocks of {length} layers: not all finite; check the model's weights"
                    )

    def of(self, measure: str, length: int) -> list[float]:
        """Values of the blocks of a length, by first layer. Raises UserError when those were not scored."""
        if measure not in self.values:
            raise UserError(f"no {measure} in it, only {', '.join(self.values)}; {AGAIN} with it")
        by_length = self.values[measure]
        if length not in by_length:
            raise UserError(
                f"{measure} has blocks of {', '.join(map(str, by_length))} layers and {length} must go; {AGAIN} with "
                f"score_blocks.lengths=[{length}]"
            )
        return by_length[length]

    def best_block(self, measure: str, length: int) -> list[int]:
        """The block whose removal costs least, its layers counted from 1; of equal ones the lower stays."""
        values = self.of(measure, length)
        start = _cheapest_first(measure, values)[0]
        return list(range(start + 1, start + 1 + length))

    def best_layers(self, measure: str, count: int) -> list[int]:
        """The `count` layers that cost least when each goes alone, counted from 1; of equal ones the lower stay."""
        return sorted(layer + 1 for layer in _cheapest_first(measure, self.of(measure, 1))[:count])

    def write(self, folder: Path | str) -> None:
        """Writes the file into an existing folder."""
        values = {
            measure: {str(length): values for length, values in by_length.items()}
            for measure, by_length in self.values.items()
        }
        record = {
            "schema_version": SCHEMA_VERSION,
            **self.facts,
            "arch": self.arch.to_dict(),
            "lengths": self.lengths,
            "whole": self.whole,
            "best": self.best(),
            "tasks": self.tasks,
            "values": values,
        }
        (Path(folder) / FILE).write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="ascii")

    def best(self) -> dict[str, dict[str, list[int]]]:
        """First and last layer of the best block by measure and length, counted from 1."""
        found: dict[str, dict[str, list[int]]] = {}
        for measure, by_length in self.values.items():
            for length in (length for length in self.lengths if length in by_length):
                block = self.best_block(measure, length)
                found.setdefault(measure, {})[str(length)] = [block[0], block[-1]]
        return found

    def describe(self) -> list[str]:
        """The best block by each measure and length, a line each."""
        return [
            f"{measure}: of blocks of {length}, layers {_layers(first, int(length))} cost least: "
            f"{self.values[measure][int(length)][first - 1]:.6g}"
            + (f" (whole model {self.whole[measure]:.6g})" if measure in self.whole else "")
            for measure, by_length in self.best().items()
            for length, (first, _) in by_length.items()
        ]

    def table(self) -> str:
        """Markdown: for each length a row for each block, by its layers counted from 1, with every measure."""
        parts = []
        for length in self.lengths:
            measures = [measure for measure in self.values if length in self.values[measure]]
            best = {measure: self.best_block(measure, length)[0] for measure in measures}
            lines = [f"## {length} of {self.arch.num_layers} layers", "", f"| layers | {' | '.join(measures)} |"]
            lines.append("|---|" + "---:|" * len(measures))
            for start in range(1, self.arch.num_layers - length + 2):
                cells = [
                    f"**{value:.6g}**" if best[measure] == start else f"{value:.6g}"
                    for measure in measures
                    for value in [self.values[measure][length][start - 1]]
                ]
                lines.append(f"| {_layers(start, length)} | {' | '.join(cells)} |")
            if self.whole:
                cells = [f"{self.whole[measure]:.6g}" if measure in self.whole else "0" for measure in measures]
                lines.append(f"| none | {' | '.join(cells)} |")
            parts.append("\n".join(lines))
        return "\n\n".join(parts) + "\n"

    def check_source(self, arch: ModelArch, *, name: str) -> None:
        """Refuses a model of another shape than the one that was scored."""
        if arch != self.arch:
            raise UserError(
                f"{name} is of a model of {self.arch.describe()}; the checkpoint has {arch.describe()}: score that one"
            )


def read_blocks(folder: Path | str) -> BlockScores:
    """The scores of a folder. Raises UserError naming the file when it is missing, damaged or contradicts itself."""
    path = Path(folder) / FILE
    record = read_json_object(path)
    try:
        if record.get("schema_version") != SCHEMA_VERSION:
            raise UserError(f"schema_version={record.get('schema_version')!r}, this version reads {SCHEMA_VERSION}")
        values, lengths = _object(record, "values"), record.get("lengths")
        if not isinstance(lengths, list):
            raise UserError(f"lengths must be a list; {AGAIN}")
        return BlockScores(
            arch=ModelArch.from_dict(_object(record, "arch"), source="arch"),
            lengths=[_integer(length) for length in lengths],
            values={measure: _values(values, measure) for measure in values},
            whole={name: _number(value) for name, value in _object(record, "whole").items()},
            tasks=_object(record, "tasks"),
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _layers(start: int, length: int) -> str:
    return str(start) if length == 1 else f"{start}-{start + length - 1}"


def _cheapest_first(measure: str, values: Sequence[float]) -> list[int]:
    """Places by how little their removal costs; of equal ones the later first, as everywhere the lower unit stays."""
    cost = [-value if measure == TASK else value for value in values]
    return sorted(range(len(cost)), key=lambda place: (cost[place], -place))


def _object(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = values.get(name)
    if not isinstance(found, dict):
        raise UserError(f"{name} must be an object; {AGAIN}")
    return found


def _values(values: Mapping[str, Any], measure: str) -> Values:
    by_length = _object(values, measure)
    if not all(isinstance(row, list) for row in by_length.values()):
        raise UserError(f"values.{measure} must have a list for each length; {AGAIN}")
    return {_integer(length): [_number(value) for value in row] for length, row in by_length.items()}


def _number(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise UserError(f"{value!r:.40} is no number; {AGAIN}")
    return float(value)


def _integer(value: Any) -> int:
    if isinstance(value, bool) or not str(value).isdecimal() or len(str(value)) > 6:
        raise UserError(f"{value!r:.40} is no whole number; {AGAIN}")
    return int(value)
