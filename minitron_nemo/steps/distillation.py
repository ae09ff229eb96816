"""What a distillation minimizes, from its settings: the head's loss beside one teacher, or beside several."""

from minitron_nemo.checkpoint.formats.nemo import NemoFolder, open_nemo
from minitron_nemo.config.schema import Config
from minitron_nemo.config.teachers import running, shares
from minitron_nemo.data.blend import Blend
from minitron_nemo.distillation.teacher import Teacher
from minitron_nemo.distillation.teachers_by_source import TeachersBySource
from minitron_nemo.distributed.groups import Groups
from minitron_nemo.losses.tallies import Tallies
from minitron_nemo.steps.hidden_states import hidden_states_of
from minitron_nemo.steps.inputs import weights_beside
from minitron_nemo.steps.options import build_options, head_loss
from minitron_nemo.steps.settings import role_of, teacher_paths
from minitron_nemo.training.objectives import DistillationObjective
from minitron_nemo.training.several_teachers import SeveralTeachersObjective


def distillation_objective(
    config: Config, student: NemoFolder, *, blend: Blend, groups: Groups
) -> DistillationObjective | SeveralTeachersObjective:
    """The objective with its teachers loaded; on all ranks."""
    section = config.distill
    head = head_loss(section, student.arch, groups, tallies=Tallies(blend.seq_length, blend.sources))
    options = build_options(config, groups, stages=config.parallel.teacher_stage_layers)
    opened = {role: open_nemo(path) for role, path in teacher_paths(section).items()}
    by_role = {
        role: Teacher(weights_beside(student, teacher), options, section.teacher_parallel)
        for role, teacher in opened.items()
    }
    if not section.teachers:
        (role,) = opened
        hidden = hidden_states_of(config, student, opened[role], head=head, groups=groups)
        return DistillationObjective(head, by_role[role], window=section.teacher_window, hidden_states=hidden)
    own = shares(section.teachers, blend.weights)
    beside = TeachersBySource(
        {name: by_role[role_of(name)] for name in section.teachers},
        {name: [own[name].get(source, 0.0) for source in blend.sources] for name in section.teachers},
        sources=blend.sources,
    )
    runs = running(section.teachers, blend.weights, micro_batch_size=section.training.micro_batch_size)
    return SeveralTeachersObjective(head, beside, running=runs, window=section.teacher_window)
