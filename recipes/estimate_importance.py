"""Estimate importance: score layers, heads, neurons and channels with forward passes (2407.14679)."""

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from minitron_nemo.artefacts.publishing import publishing
from minitron_nemo.cli import main
from minitron_nemo.config.schema import Config
from minitron_nemo.steps.describe import weight_lines
from minitron_nemo.steps.inputs import check_model, open_verified
from minitron_nemo.steps.on_ranks import RankRecipe
from minitron_nemo.steps.settings import blend_for, settings_of
from minitron_nemo.steps.step import Job

if TYPE_CHECKING:
    from minitron_nemo.distributed.groups import Groups


def check(config: Config) -> None:
    section = config.estimate_importance
    config.layout.share(len(section.samples), section.micro_batch_size, name="estimate_importance.num_samples")
    if config.layout.vpp > 1:
        from minitron_nemo.steps.estimate import check_interleaved  # brings torch

        check_interleaved(section, config.layout)


def prepare(config: Config) -> Job:
    section = config.estimate_importance
    model = open_verified(section.checkpoint)
    check_model(config, model, stages=config.parallel.teacher_stage_layers)
    return Job(
        output=Path(str(section.output)),
        kind="importance",
        settings=settings_of(section, config, blend_for(config, model)),
        parents={"model": model.path},
    )


def run(config: Config, job: Job, groups: "Groups") -> None:
    # torch and Megatron take seconds to import: not before there is something to run.
    from minitron_nemo.checkpoint.formats.nemo import open_nemo
    from minitron_nemo.data.calibration import calibration_set
    from minitron_nemo.steps.estimate import estimate, estimate_of, heard_by
    from minitron_nemo.steps.kept_sums import KeptSums
    from minitron_nemo.steps.options import build_options

    section = config.estimate_importance
    model, kept = open_nemo(section.checkpoint), KeptSums.of(config.run_dir, job)
    calibration = calibration_set(blend_for(config, model), num_samples=section.num_samples)
    estimated = estimate(
        model.weights,
        calibration,
        estimate_of(section),
        options=build_options(config, groups, stages=config.parallel.teacher_stage_layers),
        batch_aggregation=section.batch_aggregation.value,
        heard=heard_by(config, model, calibration),
        kept=kept,
    )
    with ExitStack() as stack:
        draft = None
        if groups.is_main:
            extra = {"arch": model.arch.to_dict()}
            draft = stack.enter_context(publishing(job.output, kind=job.kind, origin=job.origin, extra=extra))
        estimated.write(None if draft is None else draft.folder)
    if groups.is_main:
        kept.remove()


RECIPE = RankRecipe("estimate_importance", prepare, run, check=check, lines=weight_lines)

if __name__ == "__main__":
    main(RECIPE)
