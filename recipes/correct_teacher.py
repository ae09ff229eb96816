"""Correct the teacher: fine-tune it with cross-entropy on the data the student will see (2408.11796)."""

from minitron_nemo.checkpoint.nemo import open_nemo
from minitron_nemo.cli import Job, Recipe, main, open_verified
from minitron_nemo.config import Config
from minitron_nemo.distillation.head import HeadLoss
from minitron_nemo.objectives import LanguageModelObjective
from minitron_nemo.parallel import Groups
from minitron_nemo.runs import train_model, training_job


def prepare(config: Config) -> Job:
    teacher = open_verified(config.correct_teacher.checkpoint)
    return training_job(
        config,
        config.correct_teacher,
        model=teacher,
        layers=config.parallel.teacher_stage_layers,
        parents={"teacher": teacher.path},
    )


def run(config: Config, job: Job, groups: Groups) -> None:
    section = config.correct_teacher
    head = HeadLoss(
        vocab_size=open_nemo(section.checkpoint).arch.vocab_size,
        kl_weight=0.0,
        cross_entropy_weight=1.0,
        chunk_tokens=config.distill.chunk_tokens,
        group=groups.tp,
    )
    train_model(
        config,
        job,
        groups,
        section=section,
        layers=config.parallel.teacher_stage_layers,
        objective=lambda engine: LanguageModelObjective(head),
    )


RECIPE = Recipe("correct_teacher", prepare, run, on_ranks=True)

if __name__ == "__main__":
    main(RECIPE)
