"""How many micro-batches' teacher states wait on the last stage of a pipeline changes nothing but memory."""

import dataclasses
from pathlib import Path

import pytest
import torch
from layouts import ORIGIN, load_model, share_of_batch, weights_of

from minitron_nemo.checkpoint.formats.nemo import open_nemo
from minitron_nemo.config.schema import OptimConfig
from minitron_nemo.distillation.teacher import Teacher
from minitron_nemo.distributed.groups import Groups
from minitron_nemo.distributed.layout import Layout
from minitron_nemo.engine.model import BuildOptions
from minitron_nemo.losses.lm_head import HeadLoss
from minitron_nemo.testing import ALONE, LLAMA, MISTRAL, random_nemo, run_layout
from minitron_nemo.training.checkpoints import save_model
from minitron_nemo.training.objectives import DistillationObjective, batch_sums
from minitron_nemo.training.state import TrainState

GLOBAL_BATCH, SEQ_LENGTH = 6, 8
WINDOWS = (0, 1, 2, 4, 100)


class Watched(DistillationObjective):
    """Notes how many micro-batches the teacher runs through at a time."""

    def contexts(self, batches):
        self.sizes.append(len(batches))
        return super().contexts(batches)


def steps_with_windows(groups: Groups, models: dict[str, Path], folder: Path) -> dict[int, dict]:
    """For each window the sums of a step in hexadecimal and the windows that there were; gradients in `folder`."""
    student = open_nemo(models["student"])
    found = {}
    for window in WINDOWS:
        overlap = groups.layout.dp > 1
        model = load_model(models["student"], groups)
        options = BuildOptions(groups=groups, distributed_optimizer=False, overlap_grad_reduce=overlap)
        state = TrainState.start(model, OptimConfig(), max_steps=9, options=options)
        head = HeadLoss(vocab_size=student.arch.vocab_size, chunk_tokens=5, group=groups.tp)
        teacher = Teacher(open_nemo(models["teacher"]).weights, BuildOptions(groups=groups))
        objective = Watched(head, teacher, window=window)
        objective.sizes = []
        batches = share_of_batch(student.arch, step=0, size=GLOBAL_BATCH, seq_length=SEQ_LENGTH, groups=groups)
        for _ in range(1 + overlap):  # Megatron overlaps from the second step on: the first counts gradients
            state.zero_gradients()
            objective.sizes.clear()
            sums = batch_sums(state.model, batches, objective, groups=groups, train=True)
        with torch.no_grad():
            validated = batch_sums(state.model, batches, objective, groups=groups, train=False)
            for parameter in state.model.parameters():
                parameter.copy_(parameter.main_grad)
        save_model(folder / f"{window}.nemo", state.model, student.arch, groups, tokenizer=folder / "no_tokenizer",
                   tokens=0, origin=ORIGIN)  # fmt: skip
        hexadecimal = [{name: value.hex() for name, value in each.items()} for each in (sums, validated)]
        found[window] = {"sums": hexadecimal, "sizes": objective.sizes}
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    archs = {"student": dataclasses.replace(MISTRAL, num_layers=3), "teacher": LLAMA}
    return {
        name: random_nemo(folder / f"{name}.nemo", arch, seed=n).path for n, (name, arch) in enumerate(archs.items())
    }


@pytest.fixture(scope="module")
def alone(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    (folder / "no_tokenizer").mkdir()
    return run_layout(steps_with_windows, ALONE, models, folder), folder


@pytest.mark.parametrize("layout", [Layout(pp=2), Layout(pp=2, dp=2)], ids=["pp2", "pp2_dp2"])
def test_every_window_gives_the_loss_and_the_gradients_of_one_process(layout, models, alone, tmp_path):
    (tmp_path / "no_tokenizer").mkdir()
    found = run_layout(steps_with_windows, layout, models, tmp_path)
    share = GLOBAL_BATCH // layout.dp
    for window, entry in found.items():
        size = min(window or share, share)
        windows = [min(size, share - start) for start in range(0, share, size)]
        assert entry["sizes"] == windows * 2, "in the training step, then in validation"
        assert entry["sums"] == found[0]["sums"], f"window {window}: not the same bits as without windows"
        assert entry["sums"][0] == entry["sums"][1], "validation measures what training does"
    for name, value in alone[0][0]["sums"][0].items():
        assert float.fromhex(found[1]["sums"][0][name]) == pytest.approx(float.fromhex(value), rel=1e-6), name
    wanted = weights_of(alone[1] / "0.nemo")
    for window in WINDOWS:
        for key, gradient in weights_of(tmp_path / f"{window}.nemo").items():
            scale = float(wanted[key].abs().max())
            assert scale > 0
            assert float((gradient - wanted[key]).abs().max()) <= 1e-5 * scale, f"window {window}: {key}"


def test_without_a_pipeline_no_teacher_state_waits_and_there_is_one_schedule(alone):
    assert all(entry["sizes"] == [GLOBAL_BATCH] * 2 for entry in alone[0].values())
