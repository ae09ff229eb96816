"""A teacher of another tensor-parallel degree on the same ranks: every layer once in a group, refusals by name."""

import itertools

import pytest

from minitron_nemo.config.compose import compose
from minitron_nemo.config.rules import check_distillation
from minitron_nemo.config.teacher import TeacherParallelConfig
from minitron_nemo.distributed.beside import Beside
from minitron_nemo.distributed.layout import Layout, Place
from minitron_nemo.errors import UserError
from minitron_nemo.steps.describe import describe
from recipes import distill

LAYOUTS = [
    Layout(tp=tp, pp=pp, cp=cp, dp=dp) for tp, pp, cp, dp in itertools.product((1, 2, 4), (1, 2), (1, 2), (1, 4))
]
PAIRS = [Beside.of(layout, tp) for layout in LAYOUTS for tp in (1, 2, 4) if (layout.tp * layout.dp) % tp == 0]


def places(beside: Beside, ranks: list[int]) -> list[tuple[Place, Place]]:
    """Of the student and of the teacher."""
    found = [beside.student.place(rank) for rank in ranks]
    return [(place, beside.teacher_place(place)) for place in found]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_has_a_place_of_its_own(layout):
    assert len({layout.place(rank) for rank in range(layout.world_size)}) == layout.world_size


@pytest.mark.parametrize("beside", PAIRS)
def test_every_group_is_of_ranks_in_the_order_of_what_they_hold(beside):
    """A group's number of a rank is its order: the part of a layer, the copy, or the replica."""
    for kind, size in (("tensor", beside.teacher.tp), ("batch", beside.teacher.batch_ranks),
                       ("exchange", beside.copies * beside.replicas)):  # fmt: skip
        groups = getattr(beside, f"{kind}_groups")()
        assert sorted(rank for ranks in groups for rank in ranks) == list(range(beside.student.world_size))
        assert all(ranks == sorted(ranks) and len(ranks) == size for ranks in groups)
    for ranks in beside.tensor_groups():
        found = places(beside, ranks)
        assert [own.tp for _, own in found] == list(range(beside.teacher.tp))
        assert len({(own.dp, own.cp, own.pp) for _, own in found}) == 1
        assert len({(place.cp, place.pp) for place, _ in found}) == 1, "one stage, and one part of each sequence"
        assert len({place.dp for place, _ in found}) == beside.replicas
    for ranks in beside.batch_groups():
        assert len({(own.tp, own.pp) for _, own in places(beside, ranks)}) == 1, "the same weights"


@pytest.mark.parametrize("beside", PAIRS)
def test_an_exchange_is_between_all_copies_of_a_student_or_all_replicas_of_a_copy(beside):
    for ranks in beside.exchange_groups():
        found = places(beside, ranks)
        assert len({own.tp for _, own in found}) == (1 if beside.replicas == 1 else beside.replicas)
        if beside.replicas > 1:
            assert [place.dp % beside.replicas for place, _ in found] == list(range(beside.replicas))
            assert len({own.dp for _, own in found}) == 1, "they share a copy"
        else:
            assert [own.dp % beside.copies for _, own in found] == list(range(beside.copies))
            assert len({place.dp for place, _ in found}) == 1, "they share a student"


def test_the_layout_of_the_teacher_has_the_ranks_of_the_student():
    student = Layout(tp=2, pp=2, cp=2, vpp=2, dp=4, sequence_parallel=True)
    assert Beside.of(student, None) == Beside(student, student)
    assert Beside.of(student, 1).teacher == Layout(tp=1, pp=2, cp=2, vpp=2, dp=8)
    assert Beside.of(student, 8).teacher == Layout(tp=8, pp=2, cp=2, vpp=2, dp=1, sequence_parallel=True)


@pytest.mark.parametrize(("student", "tp"), [(Layout(tp=4), 3), (Layout(tp=2, dp=2), 3), (Layout(tp=2, dp=3), 4)])
def test_groups_that_would_overlap_in_part_are_refused(student, tp):
    with pytest.raises(UserError, match=rf"^distill.teacher_parallel.tensor_model_parallel_size={tp}: beside .*must"):
        Beside.of(student, tp)


def test_a_teacher_that_does_not_fit_is_refused_by_the_setting_of_its_own():
    how, student = TeacherParallelConfig(tensor_model_parallel_size=4), Layout(tp=2, dp=2, sequence_parallel=True)
    how.check(student, seq_length=16)
    with pytest.raises(UserError, match=r"seq_length=18: .* distill.teacher_parallel.tensor_model_parallel_size=4"):
        how.check(student, seq_length=18)
    sharded = TeacherParallelConfig(shard_weights=True)
    sharded.check(Layout(tp=2, cp=2), seq_length=16)
    with pytest.raises(UserError, match=r"^distill.teacher_parallel.shard_weights=true: no two ranks"):
        sharded.check(Layout(tp=2, pp=2), seq_length=16)
    several = "+distill.teachers={one: {checkpoint: a.nemo, sources: {text: 1}}}"
    for overrides, why in (
        (["shard_weights=true", several], "shard_weights=true: .* with distill.teachers replicas ask other teachers"),
        (["tensor_model_parallel_size=4", several], "size=4: .* with distill.teachers replicas ask other teachers"),
        (["tensor_model_parallel_size=3"], "tensor_model_parallel_size=3: beside"),
        (["shard_weights=true", "trainer.devices=2"], "shard_weights=true: no two ranks"),
        (["tensor_model_parallel_size=1", "distill.hidden_states.kinds=[layer_outputs]"], "have; leave it out, or set"),
        (
            ["cpu_offloading_weights=true", "trainer.fp8=hybrid"],
            "cpu_offloading_weights=true: .* leave out trainer.fp8",
        ),
    ):
        with pytest.raises(UserError, match=why):
            check_distillation(compose("llama31_width", [f"distill.teacher_parallel.{overrides[0]}", *overrides[1:]]))


def test_a_dry_run_lays_the_teacher_out_as_its_own_settings_say():
    """Twelve heads of a teacher on eight ranks of a student: its own degree divides them, the student's does not."""
    overrides = ["trainer.num_nodes=2", "parallel.tensor_model_parallel_size=8", "distill.teacher_model={num_layers: 2,"
                 "hidden_size: 768,ffn_hidden_size: 768,num_attention_heads: 12,num_query_groups: 12,kv_channels: 64,"
                 "vocab_size: 128256,seq_length: 8192}"]  # fmt: skip
    with pytest.raises(UserError, match=r"^parallel.tensor_model_parallel_size=8: must divide the teacher's"):
        describe(distill.RECIPE, compose("llama31_width", overrides))
    own = "distill.teacher_parallel.tensor_model_parallel_size="
    lines = describe(distill.RECIPE, compose("llama31_width", [*overrides, f"{own}4"]))
    assert "  beside    teacher: tensor 4, pipeline 1, data 4" in lines
    with pytest.raises(UserError, match=rf"^{own}8: must divide the teacher's num_attention_heads=12"):
        describe(distill.RECIPE, compose("llama31_width", [*overrides, f"{own}8"]))
