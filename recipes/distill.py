"""Distil: train the pruned student against the frozen teacher's logits (2407.14679; 2408.11796)."""

from pathlib import Path
from typing import TYPE_CHECKING

from minitron_nemo.cli import main
from minitron_nemo.config.rules import check_distillation
from minitron_nemo.config.schema import Config
from minitron_nemo.steps.describe import training_lines
from minitron_nemo.steps.inputs import check_model, open_verified, weights_beside
from minitron_nemo.steps.on_ranks import RankRecipe
from minitron_nemo.steps.settings import blend_for, settings_of
from minitron_nemo.steps.step import Job

if TYPE_CHECKING:
    from minitron_nemo.distributed.groups import Groups


def prepare(config: Config) -> Job:
    section = config.distill
    student, teacher = open_verified(section.checkpoint), open_verified(section.teacher)
    weights_beside(student, teacher)  # or a refusal
    check_model(config, student, name="student", stages=config.parallel.student_stage_layers, trained=True)
    check_model(config, teacher, name="teacher", stages=config.parallel.teacher_stage_layers)
    blend = blend_for(config, student, weights=section.blend, purpose="distill")
    return Job(
        output=Path(str(section.output)),
        kind="model",
        settings=settings_of(section, config, blend),
        parents={"student": student.path, "teacher": teacher.path},
    )


def run(config: Config, job: Job, groups: "Groups") -> None:
    # torch and Megatron take seconds to import: not before there is something to run.
    from minitron_nemo.checkpoint.formats.nemo import open_nemo
    from minitron_nemo.distillation.teacher import Teacher
    from minitron_nemo.losses.lm_head import HeadLoss
    from minitron_nemo.steps.options import build_options, divergence_of
    from minitron_nemo.steps.train import train_model
    from minitron_nemo.training.objectives import DistillationObjective

    section = config.distill
    student, teacher = open_nemo(section.checkpoint), open_nemo(section.teacher)
    head = HeadLoss(
        vocab_size=student.arch.vocab_size,
        kl_weight=section.kl_weight,
        cross_entropy_weight=section.cross_entropy_weight,
        temperature=section.temperature,
        chunk_tokens=section.chunk_tokens,
        group=groups.tp,
        divergence=divergence_of(section),
    )
    options = build_options(config, groups, stages=config.parallel.teacher_stage_layers)
    beside = Teacher(weights_beside(student, teacher), options)
    train_model(
        student,
        job.output,
        objective=DistillationObjective(head, beside, window=section.teacher_window),
        options=build_options(config, groups, stages=config.parallel.student_stage_layers),
        blend=blend_for(config, student, weights=section.blend, purpose="distill"),
        training=section.training,
        run_dir=Path(config.run_dir),
        origin=job.origin,
        log_every_n_steps=config.trainer.log_every_n_steps,
        warn_after_seconds=config.trainer.warn_after_seconds,
    )


RECIPE = RankRecipe(
    "distill",
    prepare,
    run,
    check=check_distillation,
    lines=lambda config: training_lines(config, config.distill.training, with_teacher=True),
)

if __name__ == "__main__":
    main(RECIPE)
