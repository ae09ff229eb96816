"""Folders of scores: what one holds, and several joined to one or side by side. No model is run."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from minitron_nemo.artefacts.manifest import read_manifest, verify_files
from minitron_nemo.checkpoint.safetensors_stream import SafetensorsWriter
from minitron_nemo.errors import UserError
from minitron_nemo.importance import second_moments
from minitron_nemo.importance.calibration_text import read_text, write_text
from minitron_nemo.importance.scores import ImportanceScores, by_samples, read_scores, scores_of
from minitron_nemo.importance.second_moments import SecondMomentFile, added, shapes
from minitron_nemo.importance.sums import ImportanceSums, merged, read_sums

# Tensors of the file of second moments by name, in its order, in a dtype.
Moments = Callable[[torch.dtype], Iterable[tuple[str, Tensor]]]


@dataclass(frozen=True, eq=False)
class Estimated:
    """What an importance folder holds: sums, the scores that they come to, and where there are some second moments.

    `text` are samples of the calibration set, [samples, tokens], of which the folder keeps a little.
    """

    sums: ImportanceSums
    batch_aggregation: str
    text: Tensor | None = None
    second_moments: Moments | None = None

    @cached_property
    def scores(self) -> ImportanceScores:
        return scores_of(self.sums, self.batch_aggregation)

    def write(self, folder: Path | None) -> None:
        """Write all into a folder; on all ranks, of which one has the folder and the others give their parts."""
        if folder is not None:
            self.scores.write(folder)
            if self.text is not None:
                write_text(folder, self.text)
        self.write_sums(folder, dtype=torch.float32)

    def write_sums(self, folder: Path | None, *, dtype: torch.dtype) -> None:
        """Write the sums alone, second moments in `dtype`; on all ranks as `write`."""
        if folder is not None:
            self.sums.write(folder)
        if self.second_moments is None:
            return
        with ExitStack() as stack:
            writer = None
            if folder is not None:
                path = folder / second_moments.FILE
                writer = stack.enter_context(SafetensorsWriter(path, shapes(self.sums.arch), dtype=dtype))
            for name, tensor in self.second_moments(dtype):
                if writer is not None:
                    writer.write(name, tensor)


def verify(folders: Sequence[str]) -> None:
    """Refuse a folder that is no scores, or of which a file is not what its manifest says."""
    for folder in folders:
        verify_files(folder, read_manifest(folder, kind="importance"))


def joined(folders: Sequence[str], batch_aggregation: str | None) -> Estimated:
    """All folders in one, finished by the batch aggregation; None: by the one that they have in common.

    Raises UserError where sums do not add up, where some have second moments and others have none, or where no
    aggregation is in common.
    """
    by_folder = {folder: read_sums(folder) for folder in folders}
    sums = merged(by_folder)
    if batch_aggregation is None:
        found = {read_scores(folder).batch_aggregation: folder for folder in folders}
        if len(found) > 1:
            words = ", ".join(f"{how} in {folder}" for how, folder in found.items())
            raise UserError(
                f"batch aggregations differ ({words}): give the one to use, merge_importance.batch_aggregation"
            )
        (batch_aggregation,) = found
    earliest = min(folders, key=lambda folder: by_folder[folder].parts[0].first)
    text = read_text(earliest, vocab_size=sums.arch.vocab_size)
    return Estimated(sums, batch_aggregation, text, _joined_moments(folders, sums))


def _joined_moments(folders: Sequence[str], sums: ImportanceSums) -> Moments | None:
    there = [folder for folder in folders if (Path(folder) / second_moments.FILE).is_file()]
    if not there:
        return None
    if missing := [folder for folder in folders if folder not in there]:
        raise UserError(
            f"{missing[0]} has no second moments, {there[0]} has: estimate both with, or both without, "
            "estimate_importance.second_moments"
        )
    return partial(added, [SecondMomentFile(folder, sums.arch) for folder in folders])


def side_by_side(folders: Sequence[str]) -> dict[str, ImportanceScores]:
    """Scores by a name: those of each folder, or of one over its first samples and over all of them."""
    scores = {folder: read_scores(folder) for folder in folders}
    if len(scores) > 1:
        return scores
    return by_samples(read_sums(folders[0]), scores[folders[0]].batch_aggregation)
