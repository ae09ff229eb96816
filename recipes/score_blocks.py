"""Score blocks: what becomes of the model without each contiguous block of layers (2407.14679; 2408.11796).

By the cosine over the block, the language-model loss, the error of the final hidden states, and tasks of choices.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from minitron_nemo.artefacts.publishing import publishing
from minitron_nemo.cli import main
from minitron_nemo.config.rules import check_one_chunk
from minitron_nemo.config.schema import Config
from minitron_nemo.errors import UserError
from minitron_nemo.steps.depth import lengths_of, search_lines, task_runs
from minitron_nemo.steps.inputs import check_model, open_verified
from minitron_nemo.steps.on_ranks import RankRecipe
from minitron_nemo.steps.settings import blend_for, settings_of
from minitron_nemo.steps.step import Job, logger

if TYPE_CHECKING:
    from minitron_nemo.distributed.groups import Groups


def check(config: Config) -> None:
    section = config.score_blocks
    if not section.measures and not section.tasks:
        raise UserError("score_blocks.measures=[]: there is nothing to score; name a measure, or add a task")
    check_one_chunk(config, "score_blocks")
    config.layout.share(section.num_samples, section.micro_batch_size, name="score_blocks.num_samples")


def prepare(config: Config) -> Job:
    section = config.score_blocks
    model = open_verified(section.checkpoint)
    check_model(config, model, stages=config.parallel.teacher_stage_layers)
    settings = settings_of(section, config, blend_for(config, model))
    settings["lengths"] = lengths_of(config, model.arch)
    settings["task_fingerprints"] = {name: run.task.fingerprint for name, run in task_runs(config, model).items()}
    return Job(Path(str(section.output)), "blocks", settings, {"model": model.path})


def run(config: Config, job: Job, groups: "Groups") -> None:
    # torch and Megatron take seconds to import: not before there is something to run.
    from minitron_nemo.checkpoint.formats.nemo import open_nemo
    from minitron_nemo.data.calibration import calibration_set
    from minitron_nemo.reporting.plots import block_scores
    from minitron_nemo.steps.kept_sums import KeptSums
    from minitron_nemo.steps.options import build_options
    from minitron_nemo.steps.score_blocks import score_blocks, write_blocks

    section = config.score_blocks
    model, kept = open_nemo(section.checkpoint), KeptSums.of(config.run_dir, job)
    calibration = None
    if section.measures:
        calibration = calibration_set(blend_for(config, model), num_samples=section.num_samples)
    scores = score_blocks(
        model.weights,
        calibration,
        options=build_options(config, groups, stages=config.parallel.teacher_stage_layers),
        lengths=lengths_of(config, model.arch),
        measures=[measure.value for measure in section.measures],
        tasks=task_runs(config, model),
        micro_batch_size=section.micro_batch_size,
        chunk_tokens=section.chunk_tokens,
        kept=kept,
    )
    if groups.is_main:
        with publishing(job.output, kind=job.kind, origin=job.origin, extra={"arch": model.arch.to_dict()}) as draft:
            write_blocks(draft.folder, scores, calibration)
            (draft.folder / "blocks.md").write_text(scores.table(), encoding="ascii")
            (draft.folder / "blocks.svg").write_text(block_scores(scores), encoding="utf-8")
        for line in scores.describe():
            logger.info(f"score_blocks: {line}")
        kept.remove()


RECIPE = RankRecipe("score_blocks", prepare, run, check=check, lines=search_lines)

if __name__ == "__main__":
    main(RECIPE)
