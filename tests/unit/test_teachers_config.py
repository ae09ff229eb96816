"""Settings of several teachers: shares, refusals before anything is opened, and what a dry run counts."""

import re

import pytest
from tiny_run import write_tiny_run

from minitron_nemo.config.compose import compose
from minitron_nemo.config.rules import check_distillation
from minitron_nemo.config.schema import DistillConfig, identity
from minitron_nemo.config.teachers import TeacherConfig, running, shares
from minitron_nemo.errors import UserError
from minitron_nemo.steps.describe import shapes, training_lines
from minitron_nemo.steps.settings import teacher_paths

TWO = ["+distill.teachers.one={checkpoint: a.nemo, sources: {first: 3}}",
       "+distill.teachers.two={checkpoint: b.nemo, sources: {first: 1, second: 0.5}}"]  # fmt: skip


@pytest.fixture(scope="module")
def config_dir(tmp_path_factory):
    return write_tiny_run(tmp_path_factory.mktemp("run"))[0]


@pytest.fixture
def tiny(config_dir):
    return lambda *overrides: compose("tiny", list(overrides), config_dir=config_dir)


def test_shares_of_a_source_add_up_to_one_whatever_the_weights(tiny):
    config = tiny(*TWO)
    check_distillation(config)
    found = shares(config.distill.teachers, config.data.blend)
    assert found == {"one": {"first": 0.75}, "two": {"first": 0.25, "second": 1.0}}


def test_a_teacher_runs_through_the_micro_batches_that_have_a_sample_of_its_own(tiny):
    teachers, blend = tiny(*TWO).distill.teachers, {"first": 30.0, "second": 70.0}
    assert running(teachers, blend, micro_batch_size=1) == pytest.approx({"one": 0.3, "two": 1.0})
    assert running(teachers, blend, micro_batch_size=2) == pytest.approx({"one": 0.6, "two": 1.0})


def test_several_teachers_stand_in_the_place_of_the_one(tiny):
    assert tiny(*TWO).distill.teacher is None
    assert teacher_paths(tiny(*TWO).distill) == {"teacher_one": "a.nemo", "teacher_two": "b.nemo"}
    assert teacher_paths(tiny().distill)["teacher"].endswith("corrected_teacher.nemo")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([*TWO, "distill.teacher=c.nemo"], "distill.teacher=c.nemo and distill.teachers are both given"),
        ([*TWO, "+distill.teachers.two.sources.third=1"], "two.sources.third: the blend has no such corpus, only f"),
        (TWO[:1], "no teacher has a weight in second"),
        ([*TWO, "distill.teachers.one.sources.first=0"], "distill.teachers.one.sources.first=0.0: must be above 0"),
        ([*TWO, "+distill.teachers.three={checkpoint: c}"], "distill.teachers.three.sources is empty"),
        ([*TWO, "+distill.teachers.three={sources: {first: 1}}"], "distill.teachers.three.checkpoint is not set"),
        ([*TWO, "distill.kl_weight=0", "distill.cross_entropy_weight=1"], "distill.kl_weight=0: distill.teachers"),
        ([*TWO, "data.blend=null"], "data.blend"),
        ([*TWO, "~data.blend.first", "~data.blend.second"], "the blend is empty"),
        (["+distill.teachers={a/b: {checkpoint: c, sources: {first: 1, second: 1}}}"], "a name has letters, digits"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_line(tiny, overrides, said):
    with pytest.raises(UserError, match=re.escape(said)) as refusal:
        check_distillation(tiny(*overrides))
    assert "\n" not in str(refusal.value)


def test_a_distillation_from_one_teacher_has_the_fingerprint_that_it_had():
    assert "teachers" not in identity(DistillConfig())
    assert not {"on_non_finite", "max_skipped_steps"} & identity(DistillConfig())["training"].keys()
    with_two = DistillConfig(teachers={"a": TeacherConfig("a.nemo", {"x": 1.0})})
    assert identity(with_two)["teachers"] == {"a": {"sources": {"x": 1.0}}}, "the checkpoint is hashed as a parent"


def test_a_dry_run_counts_every_teacher(tiny):
    """Both have the shape that the config describes; `one` runs through 0.6 of the micro-batches of two samples."""

    def figures(*overrides):
        config = tiny(*overrides)
        training, memory, *_ = training_lines(config, config.distill.training, with_teacher=True)
        gflop = float(re.search(r"([\d.e-]+) GFLOP a token", training)[1])
        return gflop, float(re.search(r"GiB: .*teacher ([\d.]+)", memory)[1]), config

    wide = ["model.ffn_hidden_size=65536", "model.vocab_size=4096"]  # or two digits would show nothing
    (alone, one_teacher, config), (both, two_teachers, _) = figures(*wide), figures(*wide, *TWO)
    assert two_teachers == pytest.approx(2 * one_teacher, abs=0.02)
    assert one_teacher > 0.02
    of_teacher = shapes(config).teacher.flops_per_token(config.data.seq_length) / 1e9
    assert both - alone == pytest.approx(0.6 * of_teacher, rel=0.03)
