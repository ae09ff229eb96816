"""Who a process is, by the variables of torchrun and Slurm; and that a world of another size is refused."""

import dataclasses

import pytest

from minitron_nemo.config.compose import compose
from minitron_nemo.distributed.ranks import Rank, rank_from_environment
from minitron_nemo.errors import UserError
from minitron_nemo.steps import on_ranks
from minitron_nemo.steps.step import Job

TORCHRUN = {"RANK": "13", "LOCAL_RANK": "5", "WORLD_SIZE": "16"}
SLURM = {"SLURM_PROCID": "13", "SLURM_LOCALID": "5", "SLURM_NTASKS": "16", "SLURM_STEP_ID": "0"}


@pytest.mark.parametrize("environment", [TORCHRUN, SLURM], ids=["torchrun", "srun"])
def test_a_started_process_knows_its_rank_its_place_on_the_node_and_the_world(environment):
    assert rank_from_environment(environment) == Rank(rank=13, local_rank=5, world_size=16)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"RANK": "0"},
        {name: value for name, value in SLURM.items() if name != "SLURM_STEP_ID"},
        {**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
    ],
    ids=["nobody", "half of torchrun", "a batch script", "one task"],
)
def test_a_process_that_nobody_started_as_a_rank_is_none(environment):
    assert rank_from_environment(environment) is None


def test_a_world_of_another_size_than_the_configs_is_refused_before_ranks_meet(monkeypatch, tmp_path):
    overrides = ["trainer.devices=2", "trainer.num_nodes=2", "trainer.accelerator=cpu", f"run_dir={tmp_path}"]
    config, job = compose("quickstart", overrides), Job(tmp_path / "student.nemo", "model", {})
    world = dataclasses.replace(Rank(0, 0, 1), world_size=config.layout.world_size // 2)

    def never(*_, **__):
        raise AssertionError("the ranks met")

    monkeypatch.setattr("minitron_nemo.engine.groups.form_groups", never)
    with pytest.raises(UserError, match="started 2 ranks; make the two agree"):
        on_ranks._on_rank(world, never, config, job)
