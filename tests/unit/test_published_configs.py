"""The published models: every config composes, and its shapes and token counts are those the papers print."""

import pytest

from minitron_nemo.config.compose import Composition, compose
from minitron_nemo.config.rules import check_ranks, check_training
from minitron_nemo.shape.arch import billions
from minitron_nemo.steps.chain import steps_of
from recipes.pipeline import recipe_named

# config: (teacher or source, student) parameters and distillation tokens in billions, calibration samples.
PUBLISHED = {
    "llama31_width": ("8.03 B", "4.51 B", 94e9),
    "llama31_depth": ("8.03 B", "4.54 B", 94e9),
    "mistral_nemo_width": ("12.2 B", "8.41 B", 380e9),
    "nemotron4_8b": ("15.6 B", "8.27 B", 94e9),
    "nemotron4_4b": ("8.27 B", "4.19 B", 94e9),
}
TRAINING = ("correct_teacher", "distill")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_composes(name):
    assert compose(name).name == name


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_equal_the_published_ones(name):
    config = compose(name)
    source = config.model_arch()
    target = config.prune.target.shrink(source)
    assert (billions(source.num_params()), billions(target.num_params())) == PUBLISHED[name][:2]


@pytest.mark.parametrize("name", PUBLISHED)
def test_distillation_sees_the_published_tokens(name):
    config = compose(name)
    training = config.distill.training
    tokens = training.max_steps * training.global_batch_size * config.data.seq_length
    assert tokens == pytest.approx(PUBLISHED[name][2], rel=0.01)


@pytest.mark.parametrize("name", ["llama31_width", "llama31_depth", "mistral_nemo_width"])
def test_teacher_correction_is_that_of_paper_2(name):
    config = compose(name)
    training = config.correct_teacher.training
    assert training.optim.warmup_steps == 120
    assert training.max_steps * training.global_batch_size * config.data.seq_length == pytest.approx(100e9, rel=0.01)
    assert "correct_teacher" in [step.recipe for step in config.pipeline.steps]


def test_paper_1_corrects_no_teacher():
    for name in ("nemotron4_8b", "nemotron4_4b"):
        config = compose(name)
        assert "correct_teacher" not in [step.recipe for step in config.pipeline.steps]
        assert "corrected" not in config.prune.checkpoint + config.distill.teacher + config.evaluate.reference


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("llama31_width", (1e-4, 1e-5, 40)),
        ("llama31_depth", (1e-4, 1e-5, 40)),
        ("mistral_nemo_width", (1e-4, 4.5e-7, 60)),
        ("nemotron4_8b", (2e-4, 4.5e-7, 40)),
        ("nemotron4_4b", (2e-4, 4.5e-7, 40)),
    ],
)
def test_learning_rates_are_the_published_ones(name, rates):
    optim = compose(name).distill.training.optim
    assert (optim.lr, optim.min_lr, optim.warmup_steps) == rates
    assert optim.betas == [0.9, 0.95]


@pytest.mark.parametrize("name", PUBLISHED)
def test_calibration_has_1024_samples(name):
    assert compose(name).estimate_importance.num_samples == 1024


def test_second_cut_starts_from_the_first_student_and_keeps_the_first_teacher():
    first, second = compose("nemotron4_8b"), compose("nemotron4_4b")
    assert second.prune.checkpoint == first.distill.output
    assert second.distill.teacher == first.distill.teacher
    assert second.model_arch() == first.prune.target.shrink(first.model_arch())
    assert second.prepare_data.output == first.prepare_data.output


def test_the_pipeline_of_the_second_cut_begins_with_the_steps_of_the_first():
    composition = Composition("nemotron4_4b")
    steps = steps_of(composition, composition.compose(), find=recipe_named)
    first = compose("nemotron4_8b")
    of_first = [step for step in steps if step.config.name == first.name]
    recipes = [step.recipe for step in first.pipeline.steps if step.recipe != "export_hf"]
    assert [step.recipe.name for step in of_first] == recipes
    for step in of_first:
        for section in ("model", "data", "prepare_data", "estimate_importance", "prune", "evaluate"):
            assert getattr(step.config, section) == getattr(first, section), section
        assert step.config.distill.output == first.distill.output
        assert step.config.distill.training == first.distill.training


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("num_nodes", [1, 16, 32])
def test_batch_divides_over_the_nodes_of_the_papers(name, num_nodes):
    config = compose(name, [f"trainer.num_nodes={num_nodes}"])
    layout = check_ranks(config)
    for section in TRAINING:
        check_training(getattr(config, section).training, section, layout)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_layout_fits_every_model(name):
    config = compose(name)
    teacher = config.distill.teacher_model.arch() if config.distill.teacher_model else config.model_arch()
    config.layout.check(teacher, name="teacher", stages=config.parallel.teacher_stage_layers)
    student = config.prune.target.shrink(config.model_arch())
    config.layout.check(student, name="student", stages=config.parallel.student_stage_layers)
