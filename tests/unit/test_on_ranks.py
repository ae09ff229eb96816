"""What a step on ranks checks before they start, and what each of them leaves in the run folder."""

import logging
from pathlib import Path

import pytest
import torch

from minitron_nemo.config.compose import compose
from minitron_nemo.distributed.ranks import Rank, start
from minitron_nemo.errors import UserError
from minitron_nemo.steps import on_ranks
from minitron_nemo.steps.execute import execute
from minitron_nemo.steps.on_ranks import RankRecipe
from minitron_nemo.steps.rank_log import log_file, logging_to_file
from minitron_nemo.steps.step import Job


class ReachedError(Exception):
    """Inputs would be opened now."""


def prepare(config):
    raise ReachedError


RECIPE = RankRecipe("distill", prepare, run=prepare)


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(on_ranks, "require", lambda *paths: None)  # inputs that are not there are told first


def config_of(*overrides):
    return compose(
        "quickstart", ["parallel.tensor_model_parallel_size=1", "parallel.sequence_parallel=false", *overrides]
    )


@pytest.mark.parametrize("accelerator", ["gpu", "auto"])
def test_more_ranks_than_gpus_are_refused_before_anything_is_read(accelerator, two_gpus):
    with pytest.raises(UserError) as refusal:
        execute(RECIPE, config_of("trainer.devices=4", f"trainer.accelerator={accelerator}"))
    assert str(refusal.value) == (
        "trainer.devices=4: 2 GPU(s) are visible on this node; set trainer.devices=2, or trainer.accelerator=cpu"
    )


@pytest.mark.parametrize("overrides", [["trainer.devices=2", "trainer.accelerator=gpu"],
                                       ["trainer.devices=4", "trainer.accelerator=cpu"]])  # fmt: skip
def test_as_many_as_there_are_and_any_number_on_the_cpu_are_not(overrides, two_gpus):
    with pytest.raises(ReachedError):
        execute(RECIPE, config_of(*overrides))


def test_a_rank_without_a_gpu_of_its_own_is_refused_by_its_number(two_gpus):
    with pytest.raises(UserError, match=r"rank 6: 2 GPU\(s\) are visible to it and it is number 2 on its node"):
        start(Rank(6, 2, 8), gpu=True)


@pytest.fixture
def logger():
    ours, root = logging.getLogger("minitron_nemo"), logging.getLogger()
    before = ours.level, [(handler, handler.level) for handler in root.handlers]
    yield ours
    ours.setLevel(before[0])
    for handler, level in before[1]:
        handler.setLevel(level)


def test_logs_are_named_by_output_and_rank():
    config = config_of("run_dir=R")
    for output, folder in (("R/student.nemo", "student"), ("R/eval/student.json", "student"), ("R/scores", "scores")):
        job = Job(Path(output), "model", {})
        assert log_file(config, job, Rank(12, 4, 16)) == Path(f"R/logs/{folder}/rank_00012.log")


def test_a_log_has_what_its_rank_said_and_what_it_died_of_and_goes_on_in_the_next_run(logger, tmp_path):
    path = tmp_path / "logs" / "student" / "rank_00003.log"

    def fail(word):
        logging.getLogger("minitron_nemo.training").info(word)
        raise ArithmeticError(f"no {word}")

    for word in ("first", "second"):
        with pytest.raises(ArithmeticError), logging_to_file(path, is_main=False):
            fail(word)
    logger.warning("outside")
    text = path.read_text()
    for word in (
        "INFO first",
        "INFO second",
        "ERROR ended by",
        "ArithmeticError: no first",
        "ArithmeticError: no second",
    ):
        assert word in text
    assert "outside" not in text
