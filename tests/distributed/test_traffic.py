"""What a training step is said to send is what its ranks send: every collective that torch dispatches is counted."""

import dataclasses

import pytest
from counted_traffic import Counting
from layouts import share_of_batch

from minitron_nemo.checkpoint.formats.nemo import open_nemo
from minitron_nemo.config.parallel import Recompute
from minitron_nemo.config.schema import OptimConfig
from minitron_nemo.distillation.teacher import Teacher
from minitron_nemo.distributed.layout import Layout
from minitron_nemo.engine.model import BuildOptions, build_model
from minitron_nemo.engine.weights import load_weights
from minitron_nemo.losses.lm_head import HeadLoss
from minitron_nemo.steps.stages import Stages
from minitron_nemo.steps.traffic import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER, Step, sent
from minitron_nemo.testing import LLAMA, MISTRAL, random_nemo, run_layout
from minitron_nemo.training.objectives import DistillationObjective, batch_sums
from minitron_nemo.training.state import TrainState

SEQ_LENGTH, GLOBAL_BATCH = 16, 4
STUDENTS = {chunks: dataclasses.replace(MISTRAL, num_layers=5 if chunks == 4 else 3) for chunks in (1, 2, 4)}
TEACHER = dataclasses.replace(LLAMA, hidden_size=64)
STAGES = {1: (None, None), 2: ([1, 2], [3, 1]), 4: ([1, 2, 1, 1], [1, 1, 1, 1])}
LAYOUTS = {
    "tp2": Layout(tp=2),
    "tp2_sp_recomputed": Layout(tp=2, sequence_parallel=True),
    "dp2": Layout(dp=2),
    "tp2_pp2_sp": Layout(tp=2, pp=2, sequence_parallel=True),
    "pp2_vpp2": Layout(pp=2, vpp=2),
    "tp2_cp2_selective": Layout(tp=2, cp=2),
}
RECOMPUTE = {
    "recomputed": Recompute("full", "uniform", 1),
    "selective": Recompute("selective", None, None, ("core_attn", "mlp")),
}


def counted(groups, student_path, teacher_path, options) -> list:
    """For every rank (its stage, bytes by group and collective) of a whole distillation step."""
    source = open_nemo(student_path)
    student_split, teacher_split = STAGES[groups.layout.pp * groups.layout.vpp]
    build = BuildOptions(groups=groups, stage_layers=student_split, **options)
    model = build_model(source.arch, build)
    load_weights(model, source.weights, groups)
    state = TrainState.start(model, OptimConfig(), max_steps=3, options=build)
    teacher = Teacher(open_nemo(teacher_path).weights, BuildOptions(groups=groups, stage_layers=teacher_split))
    objective = DistillationObjective(
        HeadLoss(vocab_size=source.arch.vocab_size, chunk_tokens=8, group=groups.tp), teacher
    )
    batches = share_of_batch(source.arch, step=0, size=GLOBAL_BATCH, seq_length=SEQ_LENGTH, groups=groups)
    with Counting.of(groups) as counting:
        state.zero_gradients()
        batch_sums(state.model, batches, objective, groups=groups, train=True)
        state.step()
    return groups.share_json([groups.pp_rank, [[*key, size] for key, size in sorted(counting.bytes.items())]])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_sends_what_is_said(layout, tmp_path):
    degrees, recompute = LAYOUTS[layout], RECOMPUTE.get(layout.rpartition("_")[2], Recompute())
    student = STUDENTS[degrees.pp * degrees.vpp]
    student_split, teacher_split = STAGES[degrees.pp * degrees.vpp]
    paths = [random_nemo(tmp_path / f"{n}.nemo", arch).path for n, arch in enumerate((student, TEACHER))]
    options = {"recompute": recompute, "distributed_optimizer": layout != "tp2"}
    step = Step(SEQ_LENGTH, GLOBAL_BATCH // degrees.dp, element_bytes=4, **options)
    for stage, found in run_layout(counted, degrees, *paths, options):
        wanted = step.of_student(Stages.of(student, degrees, student_split), stage, with_teacher=True)
        wanted += step.of_teacher(Stages.of(TEACHER, degrees, teacher_split), stage)
        if degrees.dp == 1:  # then these are the same ranks
            for kind in (ALL_GATHER, REDUCE_SCATTER):
                wanted["batch", kind] += wanted.pop(("cp", kind), 0)
        wanted = {key: size for key, size in wanted.items() if size}
        assert {(group, kind): size for group, kind, size in found} == pytest.approx(wanted, rel=0.01)


def test_each_rank_has_a_part_of_the_gradients_of_the_norms_of_queries_and_keys():
    """As it has heads of its own; the few bytes are too few for the counts above to notice."""
    for layout in (LAYOUTS["tp2"], LAYOUTS["tp2_sp_recomputed"]):
        with_norms, without = (
            Step(SEQ_LENGTH, 1).of_student(Stages(arch, layout, [3]), 0, with_teacher=False)
            for arch in (dataclasses.replace(STUDENTS[1], qk_layernorm=True), STUDENTS[1])
        )
        more = with_norms["tp", ALL_REDUCE] - without["tp", ALL_REDUCE]
        assert more == sent(ALL_REDUCE, 3 * 2 * STUDENTS[1].kv_channels * 4, 2)
