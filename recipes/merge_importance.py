"""Merge importance: add up the sums of jobs over different samples of one calibration set, and score (2407.14679).

Runs in one process without a model. One folder alone is finished anew, by another batch aggregation.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from minitron_nemo.artefacts.publishing import publishing
from minitron_nemo.cli import main
from minitron_nemo.config.schema import Config, identity
from minitron_nemo.errors import UserError
from minitron_nemo.steps.inputs import require
from minitron_nemo.steps.step import Job, Recipe, logger

if TYPE_CHECKING:
    from minitron_nemo.steps.score_folders import Estimated


def prepare(config: Config) -> Job:
    section = config.merge_importance
    inputs = [str(Path(folder)) for folder in section.inputs]
    if not inputs or len(set(inputs)) < len(inputs):
        raise UserError(f"merge_importance.inputs={inputs}: give score folders, each once: inputs=[FOLDER,FOLDER]")
    require(*section.inputs, kind="importance")
    # torch takes seconds to import: not before there is something to add.
    from minitron_nemo.steps.score_folders import verify

    verify(section.inputs)
    joined_inputs(config)
    parents = {f"importance_{number}": Path(folder) for number, folder in enumerate(section.inputs, start=1)}
    return Job(Path(str(section.output)), "importance", identity(section), parents)


def joined_inputs(config: Config) -> "Estimated":
    """All inputs in one; refuses what does not add up."""
    from minitron_nemo.steps.score_folders import joined

    how = config.merge_importance.batch_aggregation
    return joined(config.merge_importance.inputs, None if how is None else how.value)


def run(config: Config, job: Job) -> None:
    found = joined_inputs(config)
    sums = found.sums
    logger.info(f"merge_importance: {sums.num_samples} samples, {sums.samples} of {sums.heard.set_samples}")
    with publishing(job.output, kind=job.kind, origin=job.origin, extra={"arch": sums.arch.to_dict()}) as draft:
        found.write(draft.folder)


RECIPE = Recipe("merge_importance", prepare, run)

if __name__ == "__main__":
    main(RECIPE)
