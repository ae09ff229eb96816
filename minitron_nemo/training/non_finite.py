"""A step whose loss or gradient is not finite: which model, which micro-batches and which samples made it so."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from minitron_nemo.artefacts.atomic import write_text_atomically
from minitron_nemo.artefacts.disk import writing
from minitron_nemo.data.sample_ids import SampleId
from minitron_nemo.distributed.groups import Groups
from minitron_nemo.losses.output import CROSS_ENTROPY, FORWARD_KL, TEACHER_ENTROPY, TOKENS, bin_of

SHOWN = 4  # samples that a message names; the file has all

GetSampleIds = Callable[[Sequence[int]], list[SampleId]]  # numbers of training samples -> what they are


@dataclass(frozen=True)
class NonFinite:
    """What was found in a step; the same on every rank."""

    step: int
    found_in: list[str]  # student, teacher (of several their names too), loss mask, gradient
    sums: list[str]  # the names of the sums that are not finite
    samples: list[SampleId] = field(default_factory=list)  # those of the micro-batches that made it

    def __str__(self) -> str:
        """`step 12: the teacher is not finite in 2 samples: sample 57 of code (document 12), ...`"""
        shown = ", ".join(map(str, self.samples[:SHOWN])) + (", ..." if len(self.samples) > SHOWN else "")
        where = f" in {len(self.samples)} sample{'s'[: len(self.samples) != 1]}: {shown}" if self.samples else ""
        named = " and ".join(f"the {name}" for name in self.found_in)
        return f"step {self.step}: {named} {'are' if len(self.found_in) > 1 else 'is'} not finite{where}"

    def write(self, folder: Path) -> Path:
        """As JSON into a folder of logs; returns the file."""
        path = folder / f"non_finite_step_{self.step:08d}.json"
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text_atomically(path, json.dumps(asdict(self), indent=2) + "\n")
        return path


def all_finite(values: Mapping[str, float]) -> bool:
    return all(map(math.isfinite, values.values()))


def find(
    step: int,
    by_micro_batch: Sequence[Mapping[str, Tensor]],
    *,
    samples: Sequence[Sequence[int]],
    groups: Groups,
    ids: GetSampleIds | None,
    total: Mapping[str, float] | None = None,
) -> NonFinite:
    """Where the sums of a step's micro-batches are not finite. Collective, and only called when something is not.

    `by_micro_batch` are this rank's, where it has any; `samples` the numbers of the samples of each micro-batch that
    this data-parallel rank has. `total` are the sums of the whole step, in which those of hidden states are too. Where
    every sum is finite it is the gradient that is not.
    """
    own: list[tuple[list[int], list[str]]] = []
    for numbers, sums in zip(samples, by_micro_batch, strict=False):  # stages without a loss have no sums
        values = torch.stack([value.double() for value in sums.values()])
        bad = [name for name, finite in zip(sums, values.isfinite().tolist(), strict=True) if not finite]
        if bad:
            own.append((list(numbers), bad))
    named: dict[str, None] = {}
    numbers_found: set[int] = set()
    for rank in groups.share_json(own):
        for numbers, bad in rank:
            numbers_found.update(numbers)
            named.update(dict.fromkeys(bad))
    names = sorted(named) or sorted(name for name, value in (total or {}).items() if not math.isfinite(value))
    found = sorted(numbers_found)
    return NonFinite(step, _found_in(names), names, ids(found) if ids is not None else [])


def _found_in(names: Sequence[str]) -> list[str]:
    """Cross-entropy is the student's alone, entropy the teacher's; a divergence has to do with both."""
    if TOKENS in names:
        return ["loss mask"]
    student, teacher = CROSS_ENTROPY in names, TEACHER_ENTROPY in names
    found = ["student"] if student else []
    if teacher and not student:
        named = [inside for quantity, inside in map(bin_of, names) if quantity == FORWARD_KL]
        several = [inside.removeprefix("teacher_") for inside in named if inside.startswith("teacher_")]
        found += [f"teacher {name}" for name in several] or ["teacher"]
    elif teacher:
        found.append("teacher")
    return found or (["loss"] if names else ["gradient"])
