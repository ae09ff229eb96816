"""Distil: train the pruned student against the frozen teacher's logits (2407.14679; 2408.11796)."""

from pathlib import Path
from typing import TYPE_CHECKING

from minitron_nemo.cli import main
from minitron_nemo.config.rules import check_distillation
from minitron_nemo.config.schema import Config
from minitron_nemo.steps.describe import training_lines
from minitron_nemo.steps.hidden_states import hidden_state_pairs
from minitron_nemo.steps.inputs import check_model, check_teacher, open_verified, weights_beside
from minitron_nemo.steps.on_ranks import RankRecipe
from minitron_nemo.steps.settings import blend_for, settings_of, teacher_paths
from minitron_nemo.steps.step import Job

if TYPE_CHECKING:
    from minitron_nemo.distributed.groups import Groups


def prepare(config: Config) -> Job:
    section = config.distill
    student = open_verified(section.checkpoint)
    teachers = {role: open_verified(path) for role, path in teacher_paths(section).items()}
    check_model(config, student, name="student", stages=config.parallel.student_stage_layers, trained=True)
    for role, teacher in teachers.items():
        weights_beside(student, teacher)  # or a refusal
        hidden_state_pairs(config, student, teacher)  # or a refusal
        check_teacher(config, teacher, name=role)
    blend = blend_for(config, student, weights=section.blend, purpose="distill")
    return Job(
        output=Path(str(section.output)),
        kind="model",
        settings=settings_of(section, config, blend),
        parents={"student": student.path, **{role: teacher.path for role, teacher in teachers.items()}},
    )


def run(config: Config, job: Job, groups: "Groups") -> None:
    # torch and Megatron take seconds to import: not before there is something to run.
    from minitron_nemo.checkpoint.formats.nemo import open_nemo
    from minitron_nemo.steps.distillation import distillation_objective
    from minitron_nemo.steps.options import build_options
    from minitron_nemo.steps.train import train_model

    section = config.distill
    student = open_nemo(section.checkpoint)
    blend = blend_for(config, student, weights=section.blend, purpose="distill")
    train_model(
        student,
        job.output,
        objective=distillation_objective(config, student, blend=blend, groups=groups),
        options=build_options(config, groups, stages=config.parallel.student_stage_layers),
        blend=blend,
        training=section.training,
        run_dir=Path(config.run_dir),
        origin=job.origin,
        check_teachers=section.check_teacher,
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
