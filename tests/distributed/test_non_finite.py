"""A teacher that is not finite where one rare word stands: the run stops there, or drops that step's gradient alone."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from anchor_world import World, datasets_with_holes, make_world, own_cache, rows
from layouts import ORIGIN, assert_same_weights, weights_of
from megatron.core.datasets.indexed_dataset import IndexedDataset
from reference_model import InMemory
from safetensors.torch import load_file

from minitron_nemo.checkpoint.formats.nemo import open_nemo
from minitron_nemo.config.schema import OnNonFinite, OptimConfig, TrainingConfig
from minitron_nemo.distillation.teacher import Teacher
from minitron_nemo.distributed.layout import Layout
from minitron_nemo.engine.model import BuildOptions
from minitron_nemo.errors import UserError
from minitron_nemo.losses.lm_head import HeadLoss
from minitron_nemo.steps import train as training_step
from minitron_nemo.testing import ALONE, run_layout
from minitron_nemo.training.objectives import DistillationObjective

STEPS, GLOBAL_BATCH, MICRO = 5, 8, 2
TRAINING = TrainingConfig(
    max_steps=STEPS, global_batch_size=GLOBAL_BATCH, micro_batch_size=MICRO, val_check_interval=0,
    optim=OptimConfig(lr=1e-2, min_lr=1e-3, warmup_steps=1), save_every_n_steps=1, keep_latest_k=STEPS,
)  # fmt: skip
SKIP = dataclasses.replace(TRAINING, on_non_finite=OnNonFinite.skip, max_skipped_steps=1)
LAYOUTS = {"alone": ALONE, "pp2_dp2": Layout(pp=2, dp=2)}


def teacher_without(words: list[int], world: World, options: BuildOptions) -> Teacher:
    """The teacher, whose embeddings of some words are not numbers."""
    source = open_nemo(world.nemo["teacher"]).weights
    weights = weights_of(world.nemo["teacher"])
    weights["embedding.word_embeddings.weight"][words] = torch.nan
    return Teacher(InMemory(source.arch, weights), options)


def train_here(groups, world: World, folder: Path, training: TrainingConfig, words: list[int]) -> str:
    """What the run said when it ended early, or nothing; the teacher lacks these words."""
    training_step.build_datasets = datasets_with_holes
    overlap = groups.layout.dp > 1
    options = BuildOptions(
        groups=groups, overlap_grad_reduce=overlap, overlap_param_gather=overlap, ddp_bucket_size=3000
    )
    head = HeadLoss(vocab_size=131, chunk_tokens=7, group=groups.tp)
    teacher = teacher_without(words, world, options)
    try:
        training_step.train_model(
            open_nemo(world.nemo["student"]), folder / "trained.nemo", options=options, run_dir=folder, origin=ORIGIN,
            objective=DistillationObjective(head, teacher), training=training, log_every_n_steps=2,
            blend=own_cache(world.blend, folder / "index"),
        )  # fmt: skip
    except UserError as error:
        groups.barrier()
        return str(error)
    return ""


def train_all(groups, world: World, folder: Path, word: int, first_step: int) -> list[str]:
    """Stopped and told to go on; never stopped; the same cut off after the skipped step; and all steps not finite."""
    said = [train_here(groups, world, folder / name, training, words) for name, training, words in (
        ("stopped", TRAINING, [word]), ("stopped", SKIP, [word]), ("whole", SKIP, [word]),
    )]  # fmt: skip
    if groups.is_main:
        shutil.copytree(folder / "whole", folder / "cut")
        shutil.rmtree(folder / "cut" / "trained.nemo")
        for step in range(first_step + 1, STEPS):
            shutil.rmtree(folder / "cut" / "checkpoints" / "trained" / f"step_{step:08d}")
    groups.barrier()
    said.append(train_here(groups, world, folder / "cut", SKIP, [word]))
    if groups.layout.world_size == 1:
        said.append(train_here(groups, world, folder / "hopeless", SKIP, list(range(131))))
    return said


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def rare(world, tmp_path_factory) -> tuple[int, int]:
    """(a word, the only sample that has it), of a step in the middle."""
    blend = own_cache(world.blend, tmp_path_factory.mktemp("index"))
    train, _ = datasets_with_holes(blend, num_train=STEPS * GLOBAL_BATCH, num_valid=0)
    tokens = rows(train, range(STEPS * GLOBAL_BATCH))["tokens"]
    for word in range(3, 131):
        (samples,) = (tokens == word).any(dim=1).nonzero(as_tuple=True)
        if len(samples) == 1 and 2 * GLOBAL_BATCH <= int(samples[0]) < 3 * GLOBAL_BATCH:
            return word, int(samples[0])
    raise AssertionError("no word is so rare: another seed of the corpus is needed")


def optimizer_of(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """Weights in float32 and moments that every rank saved."""
    files = sorted((folder / "checkpoints" / "trained" / f"step_{step:08d}").glob("optimizer_*.safetensors"))
    return {f"{path.name} {name}": tensor for path in files for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_stops_or_drops_one_gradient_and_goes_on(layout, world, rare, tmp_path):
    word, sample = rare
    step = sample // GLOBAL_BATCH + 1
    first, *others = said = run_layout(train_all, LAYOUTS[layout], world, tmp_path, word, step)
    pair = sample - sample % MICRO
    assert first.startswith(f"step {step}: the teacher is not finite in 2 samples: sample {pair} of text (document")
    assert "on_non_finite=skip" in first
    assert others[:3] == ["", "", ""], said
    if layout == "alone":
        assert said[4].startswith("step 2: the teacher is not finite in 8 samples")
        assert "after 1 skipped steps" in said[4]

    found = json.loads((tmp_path / "stopped" / "logs" / "trained" / f"non_finite_step_{step:08d}.json").read_text())
    assert [entry["number"] for entry in found["samples"]] == [pair, pair + 1]
    corpus = IndexedDataset(str(world.blend.prepared / "text"))
    text = [token for entry in found["samples"] for number in entry["documents"] for token in corpus[number].tolist()]
    assert word in text, "the document that is named holds the word"

    before, after, later = (optimizer_of(tmp_path / "whole", number) for number in (step - 1, step, step + 1))
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items()), "weights and moments stay"
    assert not all(torch.equal(tensor, before[name]) for name, tensor in later.items())
    assert all(tensor.isfinite().all() for tensor in later.values())
    assert len(before) > 10

    lines = (tmp_path / "whole" / "logs" / "trained" / "metrics.jsonl").read_text().splitlines()
    records = {record["step"]: record for record in map(json.loads, lines)}
    assert sorted(records) == sorted({2, 4, 5, step}), "a skipped step has a record of its own"
    assert "loss" not in records[step]
    assert [records[n]["skipped_steps"] for n in sorted(records)] == [int(n >= step) for n in sorted(records)]
    rates = {n: 1e-3 + 9e-3 * (1 + math.cos(math.pi * (n - 1) / (STEPS - 1))) / 2 for n in records}
    assert {n: record["learning_rate"] for n, record in records.items()} == pytest.approx(rates)
    assert records[step]["consumed_tokens"] < records[STEPS]["consumed_tokens"]

    whole = open_nemo(tmp_path / "whole" / "trained.nemo")
    for name in ("stopped", "cut"):
        resumed = open_nemo(tmp_path / name / "trained.nemo")
        assert_same_weights(resumed, whole)
        assert resumed.manifest.tokens == whole.manifest.tokens == records[STEPS]["consumed_tokens"]
