"""Folders of scores that recipes take: joined to one, or side by side. No model is run."""

from collections.abc import Sequence

from minitron_nemo.artefacts.manifest import read_manifest, verify_files
from minitron_nemo.errors import UserError
from minitron_nemo.importance.scores import ImportanceScores, by_samples, read_scores
from minitron_nemo.importance.sums import ImportanceSums, merged, read_sums


def verify(folders: Sequence[str]) -> None:
    """Refuse a folder that is no scores, or of which a file is not what its manifest says."""
    for folder in folders:
        verify_files(folder, read_manifest(folder, kind="importance"))


def joined(folders: Sequence[str], batch_aggregation: str | None) -> tuple[ImportanceSums, str]:
    """The sums of all folders and the batch aggregation to finish them by; None: the one that they have in common.

    Raises UserError where sums do not add up, or where there is none in common.
    """
    sums = merged({folder: read_sums(folder) for folder in folders})
    if batch_aggregation is not None:
        return sums, batch_aggregation
    found = {read_scores(folder).batch_aggregation: folder for folder in folders}
    if len(found) > 1:
        words = ", ".join(f"{how} in {folder}" for how, folder in found.items())
        raise UserError(f"batch aggregations differ ({words}): give the one to use, merge_importance.batch_aggregation")
    return sums, next(iter(found))


def side_by_side(folders: Sequence[str]) -> dict[str, ImportanceScores]:
    """Scores by a name: those of each folder, or of one over its first samples and over all of them."""
    scores = {folder: read_scores(folder) for folder in folders}
    if len(scores) > 1:
        return scores
    return by_samples(read_sums(folders[0]), scores[folders[0]].batch_aggregation)
