"""What `distill.hidden_states` asks for, with a student and a teacher at hand."""

from typing import TYPE_CHECKING

from minitron_nemo.config.schema import Config
from minitron_nemo.distributed.routes import routes
from minitron_nemo.errors import UserError
from minitron_nemo.shape.taps import EMBEDDINGS, Pair, pairs_of

if TYPE_CHECKING:
    from minitron_nemo.checkpoint.formats.nemo import NemoFolder
    from minitron_nemo.distributed.groups import Groups
    from minitron_nemo.losses.lm_head import HeadLoss
    from minitron_nemo.shape.arch import ModelArch
    from minitron_nemo.training.hidden_states import HiddenStates


def hidden_state_pairs(config: Config, student: "NemoFolder", teacher: "NemoFolder") -> tuple[Pair, ...]:
    """The pairs that are compared, none where no kind is named.

    Raises UserError for layers that a model does not have, and where nothing says which layer goes with which.
    """
    section, name = config.distill.hidden_states, "distill.hidden_states"
    if not section.any:
        return ()
    kinds = [kind.value for kind in section.kinds]
    if kinds == [EMBEDDINGS]:
        return pairs_of(kinds, {})
    chosen = section.student_layers or list(range(1, student.arch.num_layers + 1))
    for role, model in (("student", student), ("teacher", teacher)):
        layers = getattr(section, f"{role}_layers")
        if layers and max(layers) > model.arch.num_layers:
            raise UserError(
                f"{name}.{role}_layers={layers}: the {role} {model.path} has {model.arch.num_layers} layers"
            )
    beside = section.teacher_layers or [_teacher_layers(student, teacher)[layer - 1] for layer in chosen]
    return pairs_of([kind.value for kind in section.kinds], {s - 1: t - 1 for s, t in zip(chosen, beside, strict=True)})


def _teacher_layers(student: "NemoFolder", teacher: "NemoFolder") -> list[int]:
    """For each layer of the student that of the teacher, counted from 1."""
    from minitron_nemo.pruning.plan import plan_of_model

    depth, plan = teacher.arch.num_layers, plan_of_model(student.contents)
    if plan is not None and (plan.source.num_layers, plan.target.num_layers) == (depth, student.arch.num_layers):
        return [layer + 1 for layer in plan.layers]
    if student.arch.num_layers == depth:
        return list(range(1, depth + 1))
    raise UserError(
        f"distill.hidden_states: the student {student.path} has {student.arch.num_layers} layers, the teacher "
        f"{teacher.path} {depth}, and no plan.json of the student's says which of them it has; give "
        "distill.hidden_states.student_layers and teacher_layers"
    )


def hidden_states_of(
    config: Config, student: "NemoFolder", teacher: "NemoFolder", *, head: "HeadLoss", groups: "Groups"
) -> "HiddenStates | None":
    """The loss on hidden states that the config asks for; None where it asks for none."""
    from minitron_nemo.losses.hidden_state import HiddenStateLoss, StateNorm
    from minitron_nemo.training.hidden_states import HiddenStates
    from minitron_nemo.training.state_map import StateMap

    section, layout = config.distill.hidden_states, groups.layout
    if not (pairs := hidden_state_pairs(config, student, teacher)):
        return None

    def norm(arch: "ModelArch") -> StateNorm:
        return StateNorm(arch.has_norm_bias, arch.norm_epsilon)

    widths = (student.arch.hidden_size, teacher.arch.hidden_size)
    return HiddenStates(
        pairs,
        HiddenStateLoss(section.divergence.value, norm(student.arch), norm(teacher.arch)),
        routes=routes(
            pairs,
            student=layout.stages(student.arch.num_layers, config.parallel.student_stage_layers),
            teacher=layout.stages(teacher.arch.num_layers, config.parallel.teacher_stage_layers),
            stages=layout.pp,
        ),
        head=head,
        groups=groups,
        weight=section.weight,
        state_map=StateMap(*widths, seed=config.seed, groups=groups) if widths[0] != widths[1] else None,
    )
