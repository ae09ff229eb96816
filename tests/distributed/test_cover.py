"""Data-parallel ranks share out samples without a gap and without an overlap: heard at the door of the model itself.

Through the steps that read: training, validation, evaluation and importance. Which samples there are is asked of the
datasets by this process, and which documents a split has is read off the prepared files.
"""

import functools

import pytest
from anchor_world import hear_tokens, make_world, own_cache, rows
from layouts import ORIGIN
from megatron.core.datasets.indexed_dataset import IndexedDataset

from minitron_nemo.checkpoint.formats.nemo import open_nemo
from minitron_nemo.config.schema import TrainingConfig
from minitron_nemo.data.calibration import calibration_set
from minitron_nemo.data.datasets import build_datasets
from minitron_nemo.distributed.layout import Layout
from minitron_nemo.engine.model import BuildOptions
from minitron_nemo.losses.lm_head import HeadLoss
from minitron_nemo.steps.estimate import estimate_importance
from minitron_nemo.steps.evaluate import evaluate_model
from minitron_nemo.steps.train import train_model
from minitron_nemo.testing import run_layout
from minitron_nemo.training.objectives import LanguageModelObjective

STEPS, GLOBAL_BATCH, NUM_SAMPLES = 3, 8, 12
TRAINING = TrainingConfig(
    max_steps=STEPS, global_batch_size=GLOBAL_BATCH, micro_batch_size=2, val_check_interval=STEPS, limit_val_batches=1,
    save_every_n_steps=0,
)  # fmt: skip
LAYOUTS = {"dp2": Layout(dp=2), "dp2_pp2": Layout(dp=2, pp=2)}


def train_here(groups, world, folder):
    source = open_nemo(world.nemo["student"])
    head = HeadLoss(vocab_size=131, kl_weight=0.0, cross_entropy_weight=1.0, group=groups.tp)
    train_model(
        source, folder / "trained.nemo", objective=LanguageModelObjective(head), options=BuildOptions(groups=groups),
        blend=own_cache(world.blend, folder / "index"), training=TRAINING, run_dir=folder, origin=ORIGIN,
    )  # fmt: skip


def evaluate_here(groups, world, folder):
    student, teacher = (open_nemo(world.nemo[role]).weights for role in ("student", "teacher"))
    blend = own_cache(world.blend, folder / "index")
    evaluate_model(student, teacher, options=BuildOptions(groups=groups), blend=blend, num_samples=NUM_SAMPLES,
                   micro_batch_size=2)  # fmt: skip


def estimate_here(groups, world, folder):
    calibration = calibration_set(own_cache(world.blend, folder / "index"), num_samples=NUM_SAMPLES)
    estimate_importance(open_nemo(world.nemo["student"]).weights, calibration, options=BuildOptions(groups=groups),
                        micro_batch_size=2)  # fmt: skip


def heard_by_ranks(groups, step, world, folder):
    """For every rank that hears tokens (the first stage): its data-parallel number and what it heard, in order."""
    heard = hear_tokens()
    step(groups, world, folder)
    return groups.share_json((groups.dp_rank, heard) if groups.is_first_stage else None)


def by_rank(answers):
    """{data-parallel number: [(hidden size, a row of tokens, gradients wanted), ...]}"""
    return {
        dp_rank: [(size, tuple(row), gradients) for size, tokens, gradients in heard for row in tokens]
        for dp_rank, heard in filter(None, answers)
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def tokens_of(dataset, count):
    found = [tuple(row) for row in rows(dataset, range(count))["tokens"].tolist()]
    assert len(set(found)) == count, "samples that are alike would prove nothing"
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_global_batch_is_its_own_samples_once_and_validation_those_held_out(layout, world, tmp_path):
    heard = by_rank(run_layout(heard_by_ranks, LAYOUTS[layout], train_here, world, tmp_path))
    train, valid = build_datasets(
        own_cache(world.blend, tmp_path / "own"), num_train=STEPS * GLOBAL_BATCH, num_valid=GLOBAL_BATCH
    )
    share = GLOBAL_BATCH // 2
    assert heard.keys() == {0, 1}
    wanted = tokens_of(train, STEPS * GLOBAL_BATCH)
    for step in range(STEPS):
        found = [row for rank in (0, 1) for _, row, gradients in heard[rank][step * share :][:share] if gradients]
        assert found == wanted[step * GLOBAL_BATCH :][:GLOBAL_BATCH], f"step {step + 1}"
    after = [row for rank in (0, 1) for _, row, gradients in heard[rank][STEPS * share :] if not gradients]
    assert after == tokens_of(valid, GLOBAL_BATCH)


def test_evaluation_is_every_held_out_sample_once_for_both_models(world, tmp_path):
    heard = by_rank(run_layout(heard_by_ranks, LAYOUTS["dp2"], evaluate_here, world, tmp_path))
    _, valid = build_datasets(own_cache(world.blend, tmp_path / "own"), num_train=0, num_valid=NUM_SAMPLES)
    for hidden_size in (32, 48):
        found = [row for rank in (0, 1) for size, row, _ in heard[rank] if size == hidden_size]
        assert found == tokens_of(valid, NUM_SAMPLES), f"the model of {hidden_size} channels"


def test_importance_is_every_calibration_sample_once(world, tmp_path):
    heard = by_rank(run_layout(heard_by_ranks, LAYOUTS["dp2"], estimate_here, world, tmp_path))
    calibration = calibration_set(own_cache(world.blend, tmp_path / "own"), num_samples=NUM_SAMPLES)
    wanted = [tuple(row) for row in calibration.tokens.tolist()]
    assert len(set(wanted)) == NUM_SAMPLES
    assert [row for rank in (0, 1) for _, row, _ in heard[rank]] == wanted


@functools.cache
def pieces(tokens):
    """Every run of five tokens inside one document."""
    return {tokens[n : n + 5] for n in range(len(tokens) - 4) if 2 not in tokens[n : n + 5]}


def test_held_out_samples_are_of_other_documents_than_training_samples(world, tmp_path):
    """The last fifth of the documents as they lie in the file, whatever the datasets say of themselves."""
    indexed = IndexedDataset(str(world.blend.prepared / "text"))
    documents = [pieces(tuple(indexed[n].tolist())) for n in range(len(indexed))]
    held_out = round(0.8 * len(documents))
    known = {"train": set().union(*documents[:held_out]), "valid": set().union(*documents[held_out:])}
    assert not known["train"] & known["valid"]
    train, valid = build_datasets(own_cache(world.blend, tmp_path), num_train=60, num_valid=15)
    for split, found in (("train", tokens_of(train, 60)), ("valid", tokens_of(valid, 15))):
        seen = set().union(*map(pieces, found))
        assert len(seen) > 50
        assert seen <= known[split], split
