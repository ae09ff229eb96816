"""A bf16 run that was stopped and resumed equals one that was not: its float32 main weights are part of its state.

At this learning rate most steps are smaller than what bf16 can show of a weight, so weights that went through bf16
on the way into the new process would come out otherwise.
"""

import functools
import json

import pytest
import torch
from anchor_world import PowerCutError, datasets_with_holes, make_world, own_cache
from layouts import ORIGIN, assert_same_weights

from minitron_nemo.checkpoint.formats.nemo import open_nemo
from minitron_nemo.config.schema import OptimConfig, TrainingConfig
from minitron_nemo.engine.model import BuildOptions
from minitron_nemo.losses.lm_head import HeadLoss
from minitron_nemo.steps import train as training_step
from minitron_nemo.testing import ALONE, LAYOUTS, run_layout
from minitron_nemo.training.objectives import LanguageModelObjective

TRAINING = TrainingConfig(
    max_steps=9, global_batch_size=4, micro_batch_size=2, optim=OptimConfig(lr=1e-4, min_lr=1e-5, warmup_steps=2),
    val_check_interval=0, save_every_n_steps=3, keep_latest_k=1,
)  # fmt: skip
TIMINGS = ("tokens_per_second", "model_flops_per_second_per_rank", "peak_memory_bytes")
LAYOUTS = {"alone": ALONE, "dp2": LAYOUTS["dp2"]}


def train_here(groups, world, folder, *, distributed_optimizer, cut_at=None):
    """Train in bf16; True when reading sample `cut_at` stopped it."""
    training_step.build_datasets = functools.partial(datasets_with_holes, cut_at=cut_at)
    head = HeadLoss(vocab_size=131, kl_weight=0.0, cross_entropy_weight=1.0, group=groups.tp)
    options = BuildOptions(groups=groups, dtype=torch.bfloat16, distributed_optimizer=distributed_optimizer)
    try:
        training_step.train_model(
            open_nemo(world.nemo["student"]), folder / "trained.nemo", objective=LanguageModelObjective(head),
            options=options, blend=own_cache(world.blend, folder / "index"), training=TRAINING, run_dir=folder,
            origin=ORIGIN, log_every_n_steps=1,
        )  # fmt: skip
    except PowerCutError:
        groups.barrier()
        return True
    return False


def records(folder):
    lines = (folder / "logs" / "trained" / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in TIMINGS} for line in lines]


@pytest.mark.parametrize(("layout", "distributed_optimizer"), [("alone", False), ("dp2", True)])
def test_a_resumed_bf16_run_equals_an_uninterrupted_one(layout, distributed_optimizer, tmp_path):
    world = make_world(tmp_path / "world")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run = functools.partial(train_here, distributed_optimizer=distributed_optimizer)
    degrees = LAYOUTS[layout]
    assert not run_layout(run, degrees, world, whole)
    # Every rank's share of the eighth step lies behind the cut, so all of them stop at the same place.
    assert run_layout(functools.partial(run, cut_at=7 * TRAINING.global_batch_size), degrees, world, stopped)
    for folder in (whole, stopped):
        there = [path.name for path in (folder / "checkpoints" / "trained").iterdir()]
        assert there == ["step_00000006"], "the newest of two, as one is to be kept"
    assert not (stopped / "trained.nemo").exists()
    assert not run_layout(run, degrees, world, stopped)
    ours, theirs = open_nemo(stopped / "trained.nemo"), open_nemo(whole / "trained.nemo")
    assert theirs.dtype == torch.bfloat16
    assert_same_weights(ours, theirs)
    assert records(stopped) == records(whole)
