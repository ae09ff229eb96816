"""Correct the teacher: fine-tune it with cross-entropy on the data the student will see (2408.11796)."""

from pathlib import Path
from typing import TYPE_CHECKING

from minitron_nemo.cli import main
from minitron_nemo.config.rules import check_training
from minitron_nemo.config.schema import Config
from minitron_nemo.steps.describe import training_lines
from minitron_nemo.steps.inputs import check_model, open_verified
from minitron_nemo.steps.on_ranks import RankRecipe
from minitron_nemo.steps.settings import blend_for, settings_of
from minitron_nemo.steps.step import Job

if TYPE_CHECKING:
    from minitron_nemo.distributed.groups import Groups


def prepare(config: Config) -> Job:
    section = config.correct_teacher
    teacher = open_verified(section.checkpoint)
    check_model(config, teacher, stages=config.parallel.teacher_stage_layers, trained=True)
    blend = blend_for(config, teacher, weights=section.blend, purpose="correct_teacher")
    return Job(
        output=Path(str(section.output)),
        kind="model",
        settings=settings_of(section, config, blend),
        parents={"teacher": teacher.path},
    )


def run(config: Config, job: Job, groups: "Groups") -> None:
    # torch and Megatron take seconds to import: not before there is something to run.
    from minitron_nemo.checkpoint.formats.nemo import open_nemo
    from minitron_nemo.losses.lm_head import HeadLoss
    from minitron_nemo.losses.tallies import Tallies
    from minitron_nemo.steps.options import build_options
    from minitron_nemo.steps.train import train_model
    from minitron_nemo.training.objectives import LanguageModelObjective

    section = config.correct_teacher
    teacher = open_nemo(section.checkpoint)
    blend = blend_for(config, teacher, weights=section.blend, purpose="correct_teacher")
    head = HeadLoss(
        vocab_size=teacher.arch.vocab_size,
        kl_weight=0.0,
        cross_entropy_weight=1.0,
        chunk_tokens=config.distill.chunk_tokens,
        group=groups.tp,
        tallies=Tallies(blend.seq_length, blend.sources),
    )
    train_model(
        teacher,
        job.output,
        objective=LanguageModelObjective(head),
        options=build_options(config, groups, stages=config.parallel.teacher_stage_layers),
        blend=blend,
        training=section.training,
        run_dir=Path(config.run_dir),
        origin=job.origin,
        log_every_n_steps=config.trainer.log_every_n_steps,
        warn_after_seconds=config.trainer.warn_after_seconds,
    )


RECIPE = RankRecipe(
    "correct_teacher",
    prepare,
    run,
    check=lambda config: check_training(config.correct_teacher.training, "correct_teacher", config.layout),
    lines=lambda config: training_lines(config, config.correct_teacher.training, with_teacher=False),
)

if __name__ == "__main__":
    main(RECIPE)
