"""A training run that was stopped and resumed equals one that never stopped, bit for bit."""

import dataclasses
import json
import logging
import shutil
from types import SimpleNamespace

import pytest
import torch
from layouts import ORIGIN, assert_same_weights, load_model, samples, weights_of

from minitron_nemo.artefacts.manifest import read_manifest
from minitron_nemo.checkpoint.formats.nemo import open_nemo
from minitron_nemo.config.schema import OptimConfig, TrainingConfig
from minitron_nemo.distributed import stopping
from minitron_nemo.engine.model import BuildOptions
from minitron_nemo.errors import StoppedError, UserError
from minitron_nemo.losses.lm_head import HeadLoss
from minitron_nemo.steps.train import layout_in_words
from minitron_nemo.testing import ALONE, LAYOUTS, LLAMA, random_nemo, run_layout
from minitron_nemo.training import loop
from minitron_nemo.training.checkpoints import CheckpointFolder, save_model
from minitron_nemo.training.loop import TrainingRun, train
from minitron_nemo.training.objectives import LanguageModelObjective
from minitron_nemo.training.state import TrainState

SEQ_LENGTH = 8
CONFIG = TrainingConfig(
    max_steps=7, global_batch_size=2, micro_batch_size=1, optim=OptimConfig(lr=3e-3, warmup_steps=3),
    val_check_interval=3, limit_val_batches=1, save_every_n_steps=2, keep_latest_k=2,
)  # fmt: skip
STOPPED_IN = 6  # the step during which the run dies; checkpoints of steps 2 and 4 are there by then
PARENTS = {"student": "1" * 64, "teacher": "2" * 64}
TIMINGS = ("tokens_per_second", "model_flops_per_second_per_rank", "peak_memory_bytes")


class PowerCutError(Exception):
    """What stops a run half-way through a step."""


class AskedToStop(LanguageModelObjective):
    """During step `asked_in` of the run somebody asks this rank to stop."""

    def __init__(self, head, state, asked_in):
        super().__init__(head)
        self.state, self.asked_in = state, asked_in

    def contexts(self, batches):
        if torch.is_grad_enabled() and self.state.position.step + 1 == self.asked_in:
            stopping._requests.stop()
        return super().contexts(batches)


def run_training(groups, path, folder, *, stop_in=None, asked_in=None, config=CONFIG, overlap=None):
    """Train `path` in `folder`, which a former run may have left unfinished; returns the log's lines on rank 0."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    log = logging.getLogger("minitron_nemo")
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    source = open_nemo(path)
    arch = source.arch
    overlap = groups.layout.dp > 1 if overlap is None else overlap
    options = BuildOptions(
        groups=groups, overlap_grad_reduce=overlap, overlap_param_gather=overlap, ddp_bucket_size=3000
    )
    state = TrainState.start(load_model(path, groups), CONFIG.optim, max_steps=CONFIG.max_steps, options=options)

    checkpoints = CheckpointFolder(
        folder / "checkpoints", "same run", arch, groups,
        layout=layout_in_words(options), keep=CONFIG.keep_latest_k, parents=PARENTS,
    )  # fmt: skip

    def train_batch(first, count):
        if stop_in is not None and first >= (stop_in - 1) * CONFIG.global_batch_size:
            raise PowerCutError
        return samples(arch, first=first, count=count, seq_length=SEQ_LENGTH)

    run = TrainingRun(
        name="model", config=config, groups=groups,
        checkpoints=checkpoints, logs=folder / "logs", train_batch=train_batch,
        valid_batch=lambda first, count: samples(arch, first=9000 + first, count=count, seq_length=SEQ_LENGTH),
        seq_length=SEQ_LENGTH, flops_per_token=1.0, log_every_n_steps=1,
    )  # fmt: skip
    head = HeadLoss(vocab_size=arch.vocab_size, kl_weight=0.0, cross_entropy_weight=1.0, group=groups.tp)
    asks = asked_in if groups.rank == groups.layout.world_size - 1 else None
    try:
        train(run, state, AskedToStop(head, state, asks))
    except StoppedError as stop:
        return [*lines, str(stop)]
    except PowerCutError:
        groups.barrier()
        return [*lines, "stopped"]
    save_model(folder / "trained.nemo", state.model, arch, groups, tokenizer=folder / "none",
               tokens=state.position.consumed_tokens, origin=ORIGIN)  # fmt: skip
    return lines


def run_training_asked(groups, path, folder, asked_in):
    return run_training(groups, path, folder, asked_in=asked_in)


def run_training_by_the_clock(groups, path, folder):
    """Rank 0's clock goes on by 37.5 seconds in a step, in which it is read three times; the others' hardly does."""
    readings = iter(range(10**6))
    if groups.is_main:
        loop.time = SimpleNamespace(monotonic=lambda: 12.5 * next(readings))
    return run_training(
        groups, path, folder, config=dataclasses.replace(CONFIG, save_every_n_steps=0, save_every_n_minutes=1)
    )


def run_training_with_and_without_overlap(groups, path, folder):
    """Without a validation, in which parameters would be gathered, between the last step and the saved model."""
    config = dataclasses.replace(CONFIG, max_steps=3, val_check_interval=0, save_every_n_steps=0)
    for name, overlap in (("with", True), ("without", False)):
        run_training(groups, path, folder / name, config=config, overlap=overlap)


def run_training_until(groups, path, folder, stop_in):
    return run_training(groups, path, folder, stop_in=stop_in)


def new_run(path):
    (path / "none").mkdir(parents=True)
    return path


def records(folder):
    lines = (folder / "logs" / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in TIMINGS} for line in lines]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    arch = dataclasses.replace(LLAMA, num_layers=2)
    return random_nemo(tmp_path_factory.mktemp("model") / "model.nemo", arch).path


@pytest.mark.parametrize("layout", ["alone", "tp2_sp", "dp2"])
def test_a_resumed_run_equals_an_uninterrupted_one(layout, model, tmp_path):
    degrees = {"alone": ALONE, **LAYOUTS}[layout]
    whole, stopped = new_run(tmp_path / "whole"), new_run(tmp_path / "stopped")
    assert "stopped" not in run_layout(run_training, degrees, model, whole)
    assert run_layout(run_training_until, degrees, model, stopped, STOPPED_IN)[-1] == "stopped"
    assert not (stopped / "trained.nemo").exists()
    assert sorted(path.name for path in (stopped / "checkpoints").iterdir()) == ["step_00000002", "step_00000004"]
    damaged = shutil.copytree(stopped, tmp_path / "damaged")

    lines = run_layout(run_training, degrees, model, stopped)
    assert any(line.startswith("resumed from") and line.endswith("step_00000004") for line in lines), lines
    check_equal(stopped, whole)

    spoil(damaged / "checkpoints" / "step_00000004")
    lines = run_layout(run_training, degrees, model, damaged)
    assert any("step_00000004" in line and "trying an older checkpoint" in line for line in lines), lines
    assert any(line.startswith("resumed from") and line.endswith("step_00000002") for line in lines), lines
    check_equal(damaged, whole)


def test_what_is_saved_is_whole_where_parameters_are_gathered_in_the_next_forward_pass(model, tmp_path):
    """To the rounding of the gradient's norm, which ranks add up by their parts; a step is a thousand times as long."""
    runs = [new_run(tmp_path / name) for name in ("with", "without")]
    run_layout(run_training_with_and_without_overlap, LAYOUTS["dp2"], model, tmp_path)
    ours, theirs = (weights_of(run / "trained.nemo") for run in runs)
    for name, tensor in ours.items():
        assert (tensor - theirs[name]).abs().max() < 1e-6, name


@pytest.mark.parametrize(("layout", "asked_in"), [("alone", 3), ("tp2_sp", 7), ("pp2", 3)])
def test_a_run_asked_to_stop_on_one_rank_saves_its_step_and_goes_on_as_if_it_had_not(layout, asked_in, model, tmp_path):
    """In a step that validates and saves nothing, and in the last."""
    degrees = {"alone": ALONE, **LAYOUTS}[layout]
    whole, stopped = new_run(tmp_path / "whole"), new_run(tmp_path / "stopped")
    run_layout(run_training, degrees, model, whole)
    last = run_layout(run_training_asked, degrees, model, stopped, asked_in)[-1]
    assert last == f"model at step {asked_in} of 7, saved as asked"
    assert (stopped / "checkpoints" / f"step_{asked_in:08d}" / "manifest.json").is_file()
    assert not (stopped / "trained.nemo").exists()
    run_layout(run_training, degrees, model, stopped)
    check_equal(stopped, whole)


def test_checkpoints_by_time_follow_the_clock_of_rank_0(model, tmp_path):
    folder = new_run(tmp_path / "run")
    run_layout(run_training_by_the_clock, LAYOUTS["dp2"], model, folder)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step_00000004", "step_00000006"]


def test_a_step_folder_without_manifest_does_not_stop_the_run_that_reaches_it(model, tmp_path):
    folder = new_run(tmp_path / "run")
    left = folder / "checkpoints" / "step_00000004"
    left.mkdir(parents=True)
    (left / "optimizer_00000.safetensors").write_bytes(b"half of it")
    lines = run_layout(run_training, ALONE, model, folder)
    assert any(f"{left}: no manifest.json" in line for line in lines), lines
    assert read_manifest(left, kind="training_state").parents == PARENTS
    assert (folder / "trained.nemo").is_dir()


def check_equal(ours, theirs):
    assert_same_weights(open_nemo(ours / "trained.nemo"), open_nemo(theirs / "trained.nemo"))
    assert open_nemo(ours / "trained.nemo").manifest.tokens == open_nemo(theirs / "trained.nemo").manifest.tokens
    assert records(ours) == records(theirs)
    assert [record["step"] for record in records(ours)] == [1, 2, 3, 3, 4, 5, 6, 6, 7, 7], "validation at 3, 6 and 7"


def spoil(checkpoint):
    """Turn one bit in the middle of the optimizer's state; sizes stay."""
    file = checkpoint / "optimizer_00000.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_resuming_under_another_layout_is_refused_in_one_line(model, tmp_path):
    folder = new_run(tmp_path / "run")
    run_layout(run_training_until, LAYOUTS["dp2"], model, folder, 4)
    with pytest.raises(UserError, match="resume under that layout") as refusal:
        run_layout(run_training, ALONE, model, folder)
    assert "\n" not in str(refusal.value)
    assert "data 2" in str(refusal.value)
    assert not (folder / "trained.nemo").exists()
