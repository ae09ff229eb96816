"""Sums of a long search over a model, kept so that a run that was stopped goes on from them, under any layout.

A part of the search is a list of items that all ranks share out in rounds; what it sums up is written after every
sixteenth of its rounds. A file that is not of the same search is passed over: the part begins anew.
"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from minitron_nemo.artefacts.atomic import write_text_atomically
from minitron_nemo.artefacts.foreign_json import read_json_object
from minitron_nemo.distributed.groups import Groups
from minitron_nemo.errors import UserError
from minitron_nemo.progress import progress

logger = logging.getLogger(__name__)

SAVES = 16  # of a part


class Sums(Protocol):
    """Float64 sums that each rank has a summand of."""

    def merged(self) -> Tensor:
        """The whole, on every rank; on all ranks together."""

    def restore(self, total: Tensor) -> None:
        """Begin with the whole of an earlier run."""


@dataclass(frozen=True)
class Rounds:
    """Goes through items in micro-batches, each data-parallel rank one of a round, and saves on the way.

    `folder` is where what was summed so far is kept for the search of this `fingerprint`; None keeps nothing.
    """

    groups: Groups
    micro_batch_size: int
    folder: Path | None = None
    fingerprint: str = ""

    def go(self, count: int, part: str, *, unit: str, sums: Sequence[Sums], work: Callable[[range], None]) -> None:
        """Call `work(numbers)` for micro-batches of the items 0 to `count` - 1, those of this rank; on all ranks."""
        done, size = self._resumed(part, sums), self.micro_batch_size
        starts = range(done, count, size * self.groups.layout.dp)
        every = max(1, len(starts) // SAVES)
        with progress(count, part, unit=unit, done=done, enabled=self.groups.is_main) as bar:
            for number, start in enumerate(starts, start=1):
                # In the last round some ranks may have nothing: nothing is sent between them but when saving.
                first = start + self.groups.dp_rank * size
                if numbers := range(first, min(first + size, count)):
                    work(numbers)
                reached = min(start + starts.step, count)
                bar.advance(reached - start)
                if number % every == 0:
                    self._save(part, reached, sums)

    def _resumed(self, part: str, sums: Sequence[Sums]) -> int:
        """Items that an earlier run has done, its sums restored; 0 without one."""
        if self.folder is None:
            return 0
        path = self.folder / f"{part}.json"
        done = self._read(path, sums) if path.is_file() else 0
        if len(seen := set(self.groups.share_json(done))) > 1:
            raise UserError(f"{path}: ranks see {sorted(seen)} done there; run_dir must be one folder to all nodes")
        if done:
            logger.info(f"{part}: resumed after {done} from {path}")
        return done

    def _read(self, path: Path, sums: Sequence[Sums]) -> int:
        try:
            record = read_json_object(path)
            if record.get("fingerprint") != self.fingerprint:
                return 0
            totals = [torch.tensor(total, dtype=torch.float64) for total in record["sums"]]
            done = int(record["done"])
            for each, total in zip(sums, totals, strict=True):
                each.restore(total.to(self.groups.device))
        except (UserError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{path}: {error}; it is of a run that was stopped: delete it to begin anew") from None
        return done

    def _save(self, part: str, done: int, sums: Sequence[Sums]) -> None:
        if self.folder is None:
            return
        totals: list[Any] = [each.merged().tolist() for each in sums]
        if self.groups.is_main:
            record = {"fingerprint": self.fingerprint, "done": done, "sums": totals}
            write_text_atomically(self.folder / f"{part}.json", json.dumps(record))
