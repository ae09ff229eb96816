"""Compare importance: which of the units that a target keeps two scores agree on, and how many samples are enough.

Runs in one process without a model. The target is `prune.target`.
"""

from pathlib import Path

from minitron_nemo.cli import main
from minitron_nemo.config.schema import Config
from minitron_nemo.errors import UserError
from minitron_nemo.steps.inputs import require
from minitron_nemo.steps.step import Job, Recipe


def prepare(config: Config) -> Job:
    section = config.compare_importance
    if not section.inputs:
        raise UserError("compare_importance.inputs is empty: give score folders: inputs=[FOLDER,FOLDER]")
    require(*section.inputs, kind="importance")
    inputs = tuple(Path(folder) for folder in section.inputs)
    return Job(Path(str(section.output)), "importance_overlap", {}, inputs=inputs, always=True)


def run(config: Config, job: Job) -> None:
    # torch takes seconds to import: not before there is something to compare.
    from minitron_nemo.reporting.overlap import format_overlaps, overlaps, write_overlaps
    from minitron_nemo.steps.score_folders import side_by_side, verify

    verify(config.compare_importance.inputs)
    scores = side_by_side(config.compare_importance.inputs)
    arch = next(iter(scores.values())).arch
    found = overlaps(scores, config.fit(arch).arch)
    written = write_overlaps(found, job.output)
    print(format_overlaps(found))
    print(f"compare_importance: {', '.join(map(str, written))}")


RECIPE = Recipe("compare_importance", prepare, run)

if __name__ == "__main__":
    main(RECIPE)
