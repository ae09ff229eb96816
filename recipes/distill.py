"""Distil: train the pruned student against the frozen teacher's logits (2407.14679; 2408.11796)."""

from minitron_nemo.checkpoint.nemo import open_nemo
from minitron_nemo.cli import Job, Recipe, main, open_verified
from minitron_nemo.config import Config
from minitron_nemo.distillation.head import HeadLoss
from minitron_nemo.distillation.teacher import Teacher
from minitron_nemo.engine.model import Engine
from minitron_nemo.objectives import DistillationObjective
from minitron_nemo.parallel import Groups
from minitron_nemo.runs import check_model, require_same_tokenizer, train_model, training_job


def prepare(config: Config) -> Job:
    section = config.distill
    student, teacher = open_verified(section.checkpoint), open_verified(section.teacher)
    require_same_tokenizer(student, teacher)
    check_model(config, "teacher", teacher, layers=config.parallel.teacher_stage_layers)
    loss = dict(temperature=section.temperature, kl=section.kl_weight, cross_entropy=section.cross_entropy_weight)
    return training_job(
        config,
        section,
        model=student,
        layers=config.parallel.student_stage_layers,
        parents={"student": student.path, "teacher": teacher.path},
        settings=loss,
    )


def run(config: Config, job: Job, groups: Groups) -> None:
    section = config.distill
    teacher = open_nemo(section.teacher)
    head = HeadLoss(
        vocab_size=teacher.arch.vocab_size,
        kl_weight=section.kl_weight,
        cross_entropy_weight=section.cross_entropy_weight,
        temperature=section.temperature,
        chunk_tokens=section.chunk_tokens,
        group=groups.tp,
    )

    def objective(engine: Engine) -> DistillationObjective:
        return DistillationObjective(head, Teacher(teacher, engine, stage_layers=config.parallel.teacher_stage_layers))

    train_model(
        config,
        job,
        groups,
        section=section,
        layers=config.parallel.student_stage_layers,
        objective=objective,
        teacher_flops_per_token=teacher.arch.flops_per_token(config.data.seq_length),
    )


RECIPE = Recipe("distill", prepare, run, on_ranks=True)

if __name__ == "__main__":
    main(RECIPE)
