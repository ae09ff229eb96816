"""Items of a long search shared out over data-parallel ranks in rounds, with what they sum up kept on the way."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from minitron_nemo.distributed.groups import Groups
from minitron_nemo.errors import UserError
from minitron_nemo.progress import progress
from minitron_nemo.steps.kept_sums import KeptSums

SAVES = 16  # of a part
FILE = "sums.safetensors"


class Sums(Protocol):
    """Float64 sums that each rank has a summand of."""

    def merged(self) -> Tensor:
        """The whole, on every rank; on all ranks together."""

    def restore(self, total: Tensor) -> None:
        """Begin with the whole of an earlier run."""


@dataclass(frozen=True)
class Rounds:
    """Goes through items in micro-batches, each data-parallel rank one of a round, and saves on the way.

    `kept` is where what was summed so far stays after every sixteenth of the rounds; None keeps nothing.
    """

    groups: Groups
    micro_batch_size: int
    kept: KeptSums | None = None

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
        found = None if self.kept is None else self.kept.of_part(part).newest(self.groups)
        if found is None:
            return 0
        folder, done = found
        try:
            totals = load_file(folder / FILE)
            for each, total in zip(sums, (totals[name] for name in sorted(totals)), strict=True):
                each.restore(total.to(self.groups.device))
        except (OSError, SafetensorError, ValueError, RuntimeError) as error:
            raise UserError(f"{folder}: {error}; it is of a run that was stopped: delete it to begin anew") from None
        return done

    def _save(self, part: str, done: int, sums: Sequence[Sums]) -> None:
        if self.kept is None:
            return
        totals = {f"{number:03d}": each.merged().cpu().contiguous() for number, each in enumerate(sums)}

        def write(folder: Path | None) -> None:
            if folder is not None:
                save_file(totals, folder / FILE)

        self.kept.of_part(part).save(done, write, self.groups)
